"""The command that serves models: serve."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bytelm.cli.common import Device, Quiet, Tables, Weights, counter
from bytelm.errors import UsageError

KEY = "BYTELM_API_KEY"


def serve(
    *runs: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    weights: Weights = None,
    tables: Tables = None,
    device: Device = "auto",
    rows: int = 32,
    queue: int = 128,
    max_length: int | None = None,
    max_body: int = 1 << 25,
    drain: float = 30.0,
    reload_on: Annotated[list[Path] | None, Parameter(negative="")] = None,
    chat_template: Path | None = None,
    log_prompts: Annotated[bool, Parameter(negative="")] = False,
    quiet: Quiet = False,
) -> int:
    """Serve models by the OpenAI API, with a page to look inside at /.

    Example: bytelm serve runs/demo
    Example: bytelm serve runs/demo runs/other --host 0.0.0.0 --api-key-file keys.txt --weights bf16

    Parameters
    ----------
    runs
        Runs, or checkpoints of them: each is a model, by the name of its folder; the first is the default.
    host
        Address to listen on; one that others can reach needs keys.
    port
        0 takes any free one.
    api_key_file
        A file with a key in each line (or one key in the environment variable BYTELM_API_KEY).
    rows
        Sequences of a model that run at once; fewer where memory is short.
    queue
        Sequences of a model that wait at most; more are told to come again (429).
    max_length
        Ids of a sequence, prompt included (default: twice the training context length, 4096 at least).
    max_body
        Bytes of a request at most.
    drain
        Seconds that running requests have to finish after SIGTERM.
    reload_on
        One of the runs, whose newer checkpoints are taken over as its training writes them. May be repeated.
    chat_template
        A Jinja template that makes the prompt of a conversation (default: "User: ...", "Assistant: ...").
    log_prompts
        Write prompts into the log.
    """
    from bytelm.device import use
    from bytelm.serve import guard, server
    from bytelm.serve.app import build
    from bytelm.serve.chat import Template
    from bytelm.serve.engine import Served
    from bytelm.serve.reload import Reloader, loaded
    from bytelm.serve.service import Service

    names = named(runs)
    for name, value, least in (("rows", rows, 1), ("queue", queue, 1), ("max-length", max_length or 2, 2)):
        if value < least:
            raise UsageError(f"--{name} {value}: give {least} or more")
    keys = keys_of(api_key_file)
    guard.check_address(host, keys)
    template = Template.read(chat_template)
    watched = {path.resolve() for path in reload_on or []}
    if unknown := watched - {path.resolve() for path in runs}:
        raise UsageError(f"--reload-on {unknown.pop()}: it is not one of the runs that are served")
    options = {"device": use(device), "weights": weights, "tables": tables}
    load = partial(loaded, watch=partial(counter, quiet=quiet), **options)
    service = Service([Served(name, load(run), rows, queue, max_length) for name, run in names.items()], template)
    for name, run in names.items():
        if run.resolve() in watched:
            served = service.engine.models[name]
            service.beside.append(Reloader(service, served, run, partial(loaded, **options)).watch)
    app = guard.guarded(build(service), keys=keys, max_body=max_body)
    said = partial(announce, names=list(names), keyed=keys is not None, quiet=quiet)
    return server.serve(app, service, host, port, drain=drain, ready=said, log_prompts=log_prompts)


def named(runs: tuple[Path, ...]) -> dict[str, Path]:
    """The runs by the names of their folders. Raises UsageError for none, and for two of one name."""
    if not runs:
        raise UsageError("no run: name one or more, as in `bytelm serve runs/demo`")
    found: dict[str, Path] = {}
    for run in runs:
        name = run.resolve().name
        if name in found:
            raise UsageError(f"{found[name]} and {run} would both be served as {name}: rename one of the folders")
        found[name] = run
    return found


def keys_of(path: Path | None):
    """The keys of a file, or of the environment; None for neither."""
    from bytelm.serve.guard import Keys

    if path is not None:
        return Keys.read(path)
    key = os.environ.get(KEY)
    return Keys.of(key) if key else None


def announce(url: str, names: list[str], keyed: bool, quiet: bool) -> None:
    """Print the address, and how to ask from a shell and from Python."""
    if quiet:
        print(url, flush=True)
        return
    header = f' -H "Authorization: Bearer ${KEY}"' if keyed else ""
    body = f'{{"model": "{names[0]}", "prompt": "Once upon a time", "max_tokens": 100}}'
    key = f'os.environ["{KEY}"]' if keyed else '"none"'
    ask = f'client.completions.create(model="{names[0]}", prompt="Once upon a time", max_tokens=100).choices[0].text'
    print(
        f"{', '.join(names)} at {url}\n"
        f"curl -s {url}/v1/completions -H 'Content-Type: application/json'{header} -d '{body}'\n"
        f'import os, openai; client = openai.OpenAI(base_url="{url}/v1", api_key={key}); print({ask})',
        flush=True,
    )
    print("Ctrl-C stops it.", file=sys.stderr, flush=True)
