"""The clients that people have, as they are installed: each asks a real server, and gets what it needs."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from bytelm.lm import LM, load
from bytelm.serve.engine import BusyError
from serving import RUN, Live, live, served

NAME = RUN.name
PROMPT = "The quick"
WILD: dict[str, Any] = {"temperature": 2.0, "seed": 5, "max_tokens": 120, "extra_body": {"ignore_eos": True}}
"""Settings under which the small model writes bytes that are no UTF-8."""


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as found:
        yield found


@pytest.fixture(scope="module")
def lm() -> LM:
    return load(RUN)


@pytest.fixture(scope="module")
def page() -> list[str]:
    """The blocks of code of docs/serving-clients.md: openai, its extensions, litellm, langchain, lm-eval."""
    path = Path(__file__).parents[2] / "docs" / "serving-clients.md"
    return re.findall(r"^```python\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def client(server: Live) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


def asked(program: str, url: str, home: Path, **environment: str) -> Any:
    """What a program prints last, as JSON; `URL` and `NAME` are the server's and the model's, for it."""
    names = f"URL, NAME, PROMPT = {url!r}, {NAME!r}, {PROMPT!r}\nimport json\n"
    return json.loads(ran([sys.executable, "-c", names + program], home, **environment).splitlines()[-1])


def ran(command: list[str], home: Path, **environment: str) -> str:
    """The output of a command that succeeds, with a home of its own and no network."""
    own = {"HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "LLM_USER_PATH": str(home)}
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**kept, **own, **environment}, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    return found.stdout


# ---- openai


def test_openai_lists_models(client: Any) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == (NAME, "bytelm", 4096)
    assert client.models.retrieve(NAME).id == NAME


def test_openai_completes(client: Any, lm: LM) -> None:
    options: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 40, "temperature": 0.8, "seed": 3}
    whole = client.completions.create(**options, n=2)
    written = lm.generate([PROMPT.encode()] * 2, max_bytes=40, temperature=0.8, seed=3)
    assert [choice.text for choice in whole.choices] == [data.decode(errors="replace") for data in written]
    assert whole.choices[0].finish_reason in ("stop", "length")
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (9, sum(map(len, written)))
    events = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].text for event in events if event.choices) == whole.choices[0].text
    assert events[-1].usage.completion_tokens == len(written[0])
    end = next(char for char in whole.choices[0].text[3:] if char.isascii())
    cut = client.completions.create(**options, stop=[end, "never"]).choices[0]
    assert (cut.text, cut.finish_reason) == (whole.choices[0].text.partition(end)[0], "stop")


def test_openai_reads_logprobs(client: Any, lm: LM) -> None:
    options: dict[str, Any] = {"model": NAME, "prompt": "dé", "temperature": 0, "logprobs": 2}
    (choice,) = client.completions.create(**options, max_tokens=5, echo=True).choices
    found = choice.logprobs
    assert found.tokens[:3] == ["d", "bytes:\\xc3", "bytes:\\xa9"]
    assert found.text_offset[:3] == [0, 1, 1]
    data = base64.b64decode(choice.bytes_b64)
    assert len(found.token_logprobs) == len(data) == 8
    assert found.token_logprobs == pytest.approx(lm.logprobs(b"", data).tolist(), rel=1e-4)
    assert all(2 <= len(best) <= 3 for best in found.top_logprobs)
    assert bytes(found.bytes) == data
    (scored,) = client.completions.create(**options, max_tokens=0, echo=True).choices
    assert (scored.text, scored.finish_reason) == ("dé", "length")
    assert scored.logprobs.token_logprobs == found.token_logprobs[:3]


def test_broken_bytes_do_not_break_an_openai_stream(client: Any) -> None:
    pieces = [e.choices[0] for e in client.completions.create(model=NAME, prompt=PROMPT, stream=True, **WILD)]
    data = b"".join(base64.b64decode(piece.bytes_b64) for piece in pieces)
    assert len(data) == 120 and "\ufffd" in data.decode(errors="replace")
    assert "".join(piece.text for piece in pieces) == data.decode(errors="replace")
    chat = client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "é"}], stream=True, **WILD)
    parts = [event.choices[0] for event in chat]
    assert "\ufffd" in "".join(part.delta.content or "" for part in parts)
    assert parts[-1].finish_reason == "length"


def test_openai_chats(client: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    options: dict[str, Any] = {"model": NAME, "messages": messages, "max_completion_tokens": 9, "seed": 1}
    (choice,) = client.chat.completions.create(**options, logprobs=True, top_logprobs=3).choices
    assert choice.message.role == "assistant"
    assert b"".join(bytes(one.bytes or []) for one in choice.logprobs.content) == base64.b64decode(choice.bytes_b64)
    assert all(len(one.top_logprobs) == 3 for one in choice.logprobs.content)
    streamed = client.chat.completions.create(**options, stream=True)
    assert "".join(event.choices[0].delta.content or "" for event in streamed) == choice.message.content


ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"model": "gpt-4"}, openai.NotFoundError, "model"),
    ({"max_tokens": -1}, openai.UnprocessableEntityError, "max_tokens"),
    ({"frequency_penalty": 0.5}, openai.UnprocessableEntityError, "frequency_penalty"),
    ({"extra_body": {"temprature": 0.5}}, openai.UnprocessableEntityError, "temprature"),
    ({"prompt": [[300]]}, openai.UnprocessableEntityError, ""),
    ({"max_tokens": 5000}, openai.UnprocessableEntityError, ""),
]


@pytest.mark.parametrize(("options", "kind", "field"), ERRORS, ids=[str(case[0]) for case in ERRORS])
def test_openai_raises_the_right_error(client: Any, options: dict[str, Any], kind: type[Exception], field: str) -> None:
    with pytest.raises(kind) as caught:
        client.completions.create(**{"model": NAME, "prompt": PROMPT, **options})
    assert "\n" not in caught.value.body["message"]  # type: ignore[attr-defined]
    if field:
        assert caught.value.param == field  # type: ignore[attr-defined]
    assert client.completions.create(model=NAME, prompt=PROMPT, max_tokens=1).choices


def test_openai_is_told_to_come_again(server: Live, client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise BusyError(7, 64)

    monkeypatch.setattr(server.service.engine, "submit", full)
    with pytest.raises(openai.RateLimitError) as caught:
        client.completions.create(model=NAME, prompt=PROMPT)
    assert caught.value.response.headers["retry-after"] == "7"


def test_what_openai_gives_up_is_ended(lm: LM) -> None:
    with live(served(rows=2)) as slowed:
        decoder = slowed.served.session.decoder
        plain = decoder.read
        decoder.read = lambda *given: (time.sleep(0.02), plain(*given))[1]  # type: ignore[method-assign]
        with openai.OpenAI(base_url=f"{slowed.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            options: dict[str, Any] = {"model": NAME, "prompt": PROMPT, "max_tokens": 4000}
            options["extra_body"] = {"ignore_eos": True}
            with pytest.raises(openai.APITimeoutError):
                client.completions.create(**options, timeout=0.3)
            assert slowed.idle()
            with client.completions.create(**options, stream=True) as stream:
                next(stream)
            assert slowed.idle()


def test_openai_asks_for_a_form(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "é": {"enum": ["字", None]}},
        "required": ["n", "é"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema, "strict": True}}
    messages = [{"role": "user", "content": "a pair"}]
    options: dict[str, Any] = {"model": NAME, "messages": messages, "max_tokens": 900, "response_format": form}
    for seed in range(3):
        (choice,) = client.chat.completions.create(**options, seed=seed).choices
        found = json.loads(choice.message.content)
        assert found["n"] in range(100) and found["é"] in ("字", None) and choice.finish_reason == "stop"
    schema["uniqueItems"] = True
    with pytest.raises(openai.UnprocessableEntityError, match="Unimplemented keys"):
        client.chat.completions.create(**options)


# ---- what docs/serving-clients.md shows: "serving-clients.md" is run here


def as_here(block: str, server: Live) -> str:
    """A block of the page, for the server of these tests."""
    return block.replace("http://127.0.0.1:8000", server.url).replace("demo-hf", "saved").replace("demo", NAME)


def test_the_page_shows_how_openai_asks(server: Live, page: list[str]) -> None:
    known: dict[str, Any] = {}
    for block in page[:2]:
        exec(as_here(block, server), known)
    assert len(known["data"]) <= 60 and known["answer"].text
    known["stream"].close()
    known["client"].close()


@pytest.mark.slow
@pytest.mark.parametrize(("index", "shown"), [(2, "nats"), (3, "text"), (4, "results")])
def test_the_page_shows_how_others_ask(
    server: Live, page: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int, shown: str
) -> None:
    assert len(page) == 5
    tasks = tmp_path / "my-tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text('{"q": "1 + 1 =", "a": ["2", "3"]}\n')
    (tasks / "choices.yaml").write_text(
        "task: my_choices\ndataset_path: json\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: q\n"
        f"doc_to_choice: '{{{{a}}}}'\ndoc_to_target: 0\ndataset_kwargs: {{data_files: {{test: {tasks}/rows.jsonl}}}}\n"
    )
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / NAME).symlink_to(RUN)
    monkeypatch.chdir(tmp_path)
    found = asked(as_here(page[index], server) + f"\nprint(json.dumps({shown}, default=str))", server.url, tmp_path)
    assert found["my_choices"]["acc,none"] in (0.0, 1.0) if shown == "results" else found


# ---- llm


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--no-stream"]], ids=["streamed", "whole"])
def test_llm_logs_an_answer_that_is_no_text(server: Live, tmp_path: Path, flags: list[str]) -> None:
    model = f"- model_id: bytes\n  model_name: {NAME}\n  api_base: {server.url}/v1\n  completion: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(model)
    (tmp_path / "keys.json").write_text('{"openai": "none"}')
    llm = [sys.executable, "-m", "llm"]
    options = [word for name in ("temperature", "seed", "max_tokens") for word in ("-o", name, str(WILD[name]))]
    shown = ran([*llm, "-m", "bytes", *options, *flags, PROMPT], tmp_path)
    (logged,) = json.loads(ran([*llm, "logs", "--json"], tmp_path))
    assert logged["prompt"] == PROMPT
    assert "\ufffd" in logged["response"]
    assert shown.rstrip("\n") == logged["response"].rstrip("\n")


# ---- keys


@pytest.fixture(scope="module")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server as `bytelm serve` starts it, which asks for a key."""
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys").write_text(KEY + "\n")
    command = [sys.executable, "-m", "bytelm", "serve", str(RUN), "--port", "0", "--api-key-file", str(folder / "keys")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, "--quiet"], stdout=subprocess.PIPE, stderr=log, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


KEY = "a-key-of-these-tests"
LM_EVAL = """
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

model = LocalCompletionsAPI(base_url=URL + "/v1/completions", model=NAME, auth_token=KEY)
((nats, _),) = model.loglikelihood([Instance("loglikelihood", {}, (PROMPT, " brown fox"), 0)])
print(json.dumps([model.tokenizer_backend, nats]))
"""


@pytest.mark.slow
def test_clients_give_their_keys(keyed: str, tmp_path: Path) -> None:
    with openai.OpenAI(base_url=f"{keyed}/v1", api_key="another", max_retries=0, timeout=60) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert KEY not in str(caught.value)
        answer = client.with_options(api_key=KEY).completions.create(model=NAME, prompt=PROMPT, max_tokens=3)
        assert answer.usage and answer.usage.prompt_tokens == len(PROMPT)
    backend, nats = asked(f"KEY = {KEY!r}\n{LM_EVAL}", keyed, tmp_path, OPENAI_API_KEY=KEY)
    assert backend == "remote" and nats < 0


# ---- litellm


LITELLM = """
import litellm
litellm.suppress_debug_info = True
server = {"model": "openai/" + NAME, "api_base": URL + "/v1", "api_key": "none"}
(choice,) = litellm.text_completion(prompt=PROMPT, max_tokens=0, echo=True, logprobs=1, **server).choices
parts = litellm.text_completion(prompt=PROMPT, max_tokens=20, temperature=0, stream=True, **server)
chat = litellm.completion(messages=[{"role": "user", "content": "Hi"}], max_tokens=5, **server)
print(json.dumps({
    "text": choice.text, "nats": choice.logprobs.token_logprobs, "best": choice.logprobs.top_logprobs,
    "streamed": "".join(part.choices[0].text or "" for part in parts), "chat": chat.choices[0].message.content,
}))
"""


@pytest.mark.slow
def test_litellm_scores_without_generating(server: Live, lm: LM, tmp_path: Path) -> None:
    found = asked(LITELLM, server.url, tmp_path, LITELLM_LOCAL_MODEL_COST_MAP="True")
    assert found["text"] == PROMPT
    assert found["nats"] == pytest.approx(lm.logprobs(b"", PROMPT.encode()).tolist(), rel=1e-4)
    assert len(found["best"]) == len(PROMPT)
    written = lm.generate(PROMPT.encode(), max_bytes=20, temperature=0)
    assert found["streamed"] == written.decode(errors="replace")
    assert isinstance(found["chat"], str)


# ---- langchain


LANGCHAIN = """
from langchain_openai import ChatOpenAI, OpenAI
server = {"base_url": URL + "/v1", "api_key": "none", "model": NAME, "max_retries": 0}
model = OpenAI(**server, temperature=0, max_tokens=20)
chat = ChatOpenAI(**server, max_tokens=5)
print(json.dumps({
    "default": OpenAI(**server).invoke(PROMPT),
    "one": model.invoke(PROMPT), "streamed": "".join(model.stream(PROMPT)), "several": model.batch([PROMPT, "é"]),
    "chat": chat.invoke("Hi").content, "chunks": "".join(chunk.content for chunk in chat.stream("Hi")),
}))
"""


@pytest.mark.slow
def test_langchain_completes(server: Live, lm: LM, tmp_path: Path) -> None:
    found = asked(LANGCHAIN, server.url, tmp_path)
    texts = [
        d.decode(errors="replace") for d in lm.generate([PROMPT.encode(), "é".encode()], max_bytes=20, temperature=0)
    ]
    assert found["one"] == found["streamed"] == texts[0]
    assert found["several"] == texts
    assert all(isinstance(found[name], str) for name in ("default", "chat", "chunks"))
