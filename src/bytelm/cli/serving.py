"""The command that serves models: serve."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bytelm.cli.common import Device, Quiet, Tables, Weights, counter
from bytelm.errors import UsageError

if TYPE_CHECKING:
    from bytelm.serve.chat import Template
    from bytelm.serve.guard import Keys
    from bytelm.serve.service import Service

KEY = "BYTELM_API_KEY"


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on."""

    rows: int = 64
    """Sequences of a model that run at once; fewer where memory is short."""
    queue: int = 128
    """Sequences of a model that wait at most; more are refused for now (429)."""
    max_length: int | None = None
    """Ids of a sequence, prompt included (default: the training context length, 4096 at least)."""
    max_body: int = 1 << 25
    """Bytes of a request at most."""
    drain: float = 30.0
    """Seconds that running requests have to finish after SIGTERM."""

    def check(self) -> None:
        """Raises UsageError for a limit that leaves nothing."""
        least = {"rows": 1, "queue": 1, "max_length": 2, "max_body": 1, "drain": 0}
        for name, value in vars(self).items():
            if value is not None and not value >= least[name]:
                raise UsageError(f"--{name.replace('_', '-')} {value}: give {least[name]} or more")


def serve(
    *runs: Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    weights: Weights = None,
    tables: Tables = None,
    device: Device = "auto",
    limits: Limits | None = None,
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
    reload_on
        One of the runs, whose newer checkpoints are taken over as its training writes them. May be repeated.
    chat_template
        A Jinja template that makes the prompt of a conversation (default: "User: ...", "Assistant: ...").
    log_prompts
        Write prompts into the log.
    """
    from bytelm.serve import guard
    from bytelm.serve.chat import Template

    names, limits = named(runs), limits or Limits()
    limits.check()
    keys = keys_of(api_key_file)
    guard.check_address(host, keys)
    template = Template.read(chat_template)
    watched = {path.resolve() for path in reload_on or []}
    if unknown := watched - {path.resolve() for path in runs}:
        raise UsageError(f"--reload-on {unknown.pop()}: it is not one of the runs that are served")
    options = {"device": device, "weights": weights, "tables": tables}
    service = opened(names, watched, options, template, limits, quiet)
    said = partial(announce, names=list(names), keyed=keys is not None, quiet=quiet)
    return served(service, keys, limits, (host, port), said, log_prompts)


def opened(
    names: Mapping[str, Path],
    watched: Set[Path],
    options: Mapping[str, Any],
    template: Template,
    limits: Limits,
    quiet: bool,
) -> Service:
    """The models, loaded, and what watches their runs."""
    from bytelm.device import use
    from bytelm.serve.reload import Reloader, loaded
    from bytelm.serve.served import Served
    from bytelm.serve.service import Service

    load = partial(loaded, **{**options, "device": use(options["device"])})
    watch = partial(counter, quiet=quiet)
    size = (limits.rows, limits.queue, limits.max_length)
    service = Service([Served(name, load(run, watch=watch), *size) for name, run in names.items()], template)
    for name, run in names.items():
        if run.resolve() in watched:
            service.beside.append(Reloader(service, service.engine.models[name], run, load).watch)
    return service


def served(
    service: Service,
    keys: Keys | None,
    limits: Limits,
    address: tuple[str, int],
    ready: Callable[[str], None],
    log_prompts: bool,
) -> int:
    """Serve until a signal ends it."""
    from bytelm.serve import guard, server
    from bytelm.serve.app import build

    app = guard.guarded(build(service), keys=keys, max_body=limits.max_body)
    return server.serve(app, service, *address, drain=limits.drain, ready=ready, log_prompts=log_prompts)


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


def keys_of(path: Path | None) -> Keys | None:
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
