"""Answers in JSON: characters are never broken, bytes are exact, and what cannot be asked for is named."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bytelm.evaluate.bits import logprobs
from bytelm.generate.request import Chunk, Request
from bytelm.lm import load
from bytelm.serve.answers import NAMES, Choice, merged
from bytelm.serve.app import build
from bytelm.serve.chat import Template
from bytelm.serve.generating import event
from bytelm.serve.guard import Keys, guarded
from bytelm.serve.schema import Message
from bytelm.serve.service import Service
from guarded import unlocked
from serving import RUN, Live, events, live, served


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live() as found:
        yield found


PARTS = st.lists(st.one_of(st.binary(max_size=5), st.text(max_size=3).map(str.encode)), max_size=12)


@pytest.mark.fault("S7")
@given(PARTS, st.booleans(), st.booleans(), st.integers(0, 3))
def test_any_bytes_in_any_pieces_are_whole_text_and_exact_bytes(
    parts: list[bytes], chat: bool, echo: bool, cut: int
) -> None:
    data = b"".join(parts)
    parts = [data[i : i + 1 + cut] for i in range(0, len(data), 1 + cut)]  # characters are cut anywhere
    choice = Choice(0, Request(b"\xe2\x82", 9), echo and not chat, chat)
    ends = [None] * len(parts) + ["length"]
    chunks = [Chunk(0, part, end) for part, end in zip([*parts, b""], ends, strict=True)]  # type: ignore[arg-type]
    pieces = [piece for chunk in chunks if (piece := choice.piece([chunk])) is not None]
    shown = (b"\xe2\x82" if echo and not chat else b"") + data
    texts = [piece["delta"]["content"] if chat else piece["text"] for piece in pieces]
    assert "".join(texts) == shown.decode(errors="replace")
    assert b"".join(base64.b64decode(piece["bytes_b64"]) for piece in pieces) == shown
    for piece in pieces:
        line = event(piece)
        assert line.startswith(b"data: ") and line.endswith(b"\n\n") and line.count(b"\n") == 2
        assert json.loads(line[6:].decode("utf-8")) == piece
    whole = merged(pieces, chat)
    assert whole["finish_reason"] == "length" and choice.generated == len(data)
    assert (whole["message"]["content"] if chat else whole["text"]) == "".join(texts)


def test_ids_have_names_of_their_own() -> None:
    assert len(NAMES) == len(set(NAMES)) == 260
    assert json.loads(json.dumps(NAMES)) == NAMES


def test_scores_of_an_echo_are_those_of_the_library(server: Live) -> None:
    lm, prompt = load(RUN), "Größe: any text"
    found = server.complete(prompt=prompt, max_tokens=4, echo=True, logprobs=2, temperature=0, ignore_eos=True)
    choice = found["choices"][0]
    data = base64.b64decode(choice["bytes_b64"])
    assert data.startswith(prompt.encode()) and len(data) == len(prompt.encode()) + 4
    scores = choice["logprobs"]
    assert {len(entries) for entries in scores.values()} == {len(data)}
    np.testing.assert_allclose(scores["token_logprobs"], logprobs(lm.model, b"", data), atol=2e-4)
    assert bytes(scores["bytes"]) == data
    assert scores["text_offset"][:5] == [0, 1, 2, 2, 3]  # ö is two bytes of one character
    for name, nats, top in zip(*(scores[k] for k in ("tokens", "token_logprobs", "top_logprobs")), strict=True):
        assert top[name] == nats and len(top) in (2, 3)
    scored = server.complete(prompt=prompt, max_tokens=0, echo=True, logprobs=0)["choices"][0]
    assert (
        scored["text"] == prompt and scored["finish_reason"] == "length" and scored["logprobs"]["top_logprobs"] is None
    )
    assert scored["logprobs"]["token_logprobs"] == scores["token_logprobs"][: len(prompt.encode())]
    plain = server.complete(prompt=prompt, max_tokens=4, logprobs=0, temperature=0, ignore_eos=True)["choices"][0]
    assert plain["logprobs"]["text_offset"][0] == len(prompt)


def test_ids_are_read_as_they_are(server: Live) -> None:
    with_bos, bare = server.complete(
        prompt=[[257, 104, 105], [104, 105]], max_tokens=1, echo=True, logprobs=1, temperature=0
    )["choices"]
    assert (
        with_bos["logprobs"]["tokens"][:3] == ["<bos>", "h", "i"] and with_bos["logprobs"]["token_logprobs"][0] is None
    )
    assert bare["logprobs"]["tokens"][:2] == ["h", "i"] and len(bare["logprobs"]["tokens"]) == 3
    text = server.complete(prompt="hi", max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]
    assert text["token_logprobs"] == with_bos["logprobs"]["token_logprobs"][1:3]
    assert server.complete(prompt=[[]], max_tokens=2)["choices"][0]["bytes_b64"]


def test_eos_has_a_score_too() -> None:
    with live() as found:
        decoder = found.served.session.decoder
        plain = decoder.read

        def read(*given: Any) -> Any:
            logits = plain(*given).copy()
            logits[:, 258] = 50
            return logits

        decoder.read = read  # type: ignore[method-assign]
        choice = found.complete(prompt=[257, 97], max_tokens=1, temperature=0, logprobs=0, echo=True)["choices"][0]
        assert choice["logprobs"]["tokens"] == ["<bos>", "a", "<eos>"] and choice["text"] == "a"
        assert choice["finish_reason"] == "stop" and choice["logprobs"]["bytes"] == [None, 97, None]
        assert choice["logprobs"]["token_logprobs"][-1] == pytest.approx(0, abs=1e-9)


def test_a_stop_sequence_cuts_exactly(server: Live) -> None:
    body: dict[str, Any] = {"prompt": "a", "seed": 3, "temperature": 0.8, "ignore_eos": True}
    free = base64.b64decode(server.complete(**body, max_tokens=60)["choices"][0]["bytes_b64"])
    stop = next(chr(byte) for byte in free[5:] if byte < 128)
    cut = server.complete(**body, max_tokens=60, stop=["", stop], logprobs=0)["choices"][0]
    at = free.index(stop.encode())
    assert base64.b64decode(cut["bytes_b64"]) == free[:at] and cut["finish_reason"] == "stop"
    assert bytes(cut["logprobs"]["bytes"]) == free[:at]


def test_valid_text_can_be_asked_for(server: Live) -> None:
    found = server.complete(prompt="a", max_tokens=200, utf8=True, ignore_eos=True, seed=1)["choices"][0]
    assert base64.b64decode(found["bytes_b64"]).decode() == found["text"]
    assert len(found["text"].encode()) <= 200 and "\ufffd" not in found["text"]


REFUSED = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"top_p": 1.5}, "top_p"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 10**12}, "max_tokens"),
    ({"n": 10**9}, "n"),
    ({"n": 0}, "n"),
    ({"logprobs": 10**6}, "logprobs"),
    ({"stop": ["x"] * 10**4}, "stop"),
    ({"stop": "x" * 10**5}, "stop"),
    ({"seed": 10**40}, "seed"),
    ({"prompt": [300]}, "prompt"),
    ({"prompt": [[1, 256]]}, "prompt"),
    ({"prompt": "a\ud800"}, "prompt"),
    ({"prompt": ["x"] * 5000}, "prompt"),
    ({"prompt": None, "prompt_b64": "*"}, "prompt_b64"),
    ({"prompt": "x" * 5000}, "prompt"),
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"logit_bias": {"1": 5}}, "logit_bias"),
    ({"temprature": 1}, "temprature"),
    ({"response_format": {"type": "regex"}}, "response_format"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"prompt": "a", "online": "primed"}, "online"),
    ({"prompt": "a", "online": "cold", "echo": True, "logprobs": 1}, "online"),
]


@pytest.mark.fault("S2")
@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[param + str(i) for i, (_, param) in enumerate(REFUSED)])
def test_what_cannot_be_asked_for_is_refused_with_its_name(server: Live, body: dict[str, Any], param: str) -> None:
    content = json.dumps({"prompt": "hi", **body})
    found = httpx.post(server.url + "/v1/completions", content=content, headers={"content-type": "application/json"})
    assert found.status_code == 422, found.text
    error = found.json()["error"]
    assert error["param"] == param and len(error["message"]) < 400


@pytest.mark.fault("S2")
def test_bodies_that_are_no_json_or_deep_are_refused(server: Live) -> None:
    for content in (b"", b"{", b"\xff\xfe", b"[" * 10_000 + b"]" * 10_000, b'{"prompt":' + b"[" * 5_000):
        found = httpx.post(
            server.url + "/v1/completions", content=content, headers={"content-type": "application/json"}
        )
        assert found.status_code in (400, 422) and "error" in found.json()
    assert server.complete(prompt="a", max_tokens=1)["choices"]


@pytest.mark.fault("S8")
@pytest.mark.parametrize(
    "name", ["../golden-run", "/etc/passwd", "golden-run/", "a\r\nx: y", "http://127.0.0.1:1/x", "\x00"]
)
def test_names_are_of_the_table_of_models_alone(server: Live, name: str) -> None:
    found = server.post("/v1/completions", model=name, prompt="a")
    assert found.status_code == 404 and found.json()["error"]["code"] == "model_not_found"
    assert "\n" not in found.json()["error"]["message"] and "\x00" not in found.text
    assert "x" not in found.headers


def test_clients_nulls_and_neutral_values_are_taken(server: Live) -> None:
    nulls = dict.fromkeys(("logprobs", "seed", "stop", "n", "stream", "stream_options", "echo", "suffix", "user"))
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "top_p": 1, "n": 1, "best_of": 1, "logit_bias": {}}
    assert server.complete(model=RUN.name, prompt=["a"], max_tokens=2, metadata={"a": 1}, **{**nulls, **neutral})
    listed = httpx.get(server.url + "/v1/models").json()["data"]
    assert [card["id"] for card in listed] == [RUN.name] and listed[0]["patches"] == "entropy"
    assert httpx.get(f"{server.url}/v1/models/{RUN.name}").json() == listed[0]
    assert httpx.get(server.url + "/v1/models/other").status_code == 404


def test_a_conversation_is_bytes_by_a_template(server: Live) -> None:
    messages = [Message(role="user", content="Hello"), Message(role="assistant", content="Hi."), Message(role="user")]
    assert Template().prompt(messages) == b"User: Hello\n\nAssistant: Hi.\n\nUser: \n\nAssistant: "
    body: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "text", "text": "é"}]}], "seed": 5}
    found = server.post("/v1/chat/completions", **body, max_tokens=12, logprobs=True, top_logprobs=2).json()
    choice = found["choices"][0]
    alone = load(RUN).generate(
        "User: é\n\nAssistant: ".encode(), seed=5, temperature=1, max_bytes=12, stop=[b"\n\nUser:"]
    )
    assert base64.b64decode(choice["bytes_b64"]) == alone
    assert [entry["bytes"] for entry in choice["logprobs"]["content"] if entry["bytes"]] == [[byte] for byte in alone]
    with httpx.stream(
        "POST", server.url + "/v1/chat/completions", json={**body, "max_completion_tokens": 12, "stream": True}
    ) as answer:
        found = list(events(answer.iter_lines()))
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(e["choices"][0]["delta"]["content"] for e in found) == choice["message"]["content"]
    assert server.post("/v1/chat/completions", messages=[]).status_code == 422


def test_ids_patches_and_files(server: Live) -> None:
    ids = server.post("/tokenize", prompt="é<bos>", add_special_tokens=False).json()["tokens"]
    assert bytes(ids) == "é<bos>".encode()
    assert server.post("/tokenize", prompt="a").json()["tokens"] == [257, 97]
    info = httpx.get(server.url + "/tokenizer_info").json()
    for kind, symbol in (("bos", 257), ("eos", 258), ("pad", 256)):
        name = info[f"{kind}_token"]
        assert server.post("/tokenize", prompt=name, add_special_tokens=False).json()["tokens"] == [symbol]
    back = server.post("/detokenize", tokens=[257, *b"\xc3\xa9\xff", 258]).json()
    assert back["prompt"] == "é\ufffd" and base64.b64decode(back["bytes_b64"]) == b"\xc3\xa9\xff"
    assert server.post("/detokenize", tokens=[260]).status_code == 422
    found = server.post("/v1/patches", prompt="any bytes at all").json()
    patches = load(RUN).patches(b"any bytes at all")
    starts = np.cumsum([0, *map(len, patches)])[:-1].tolist()
    assert found["patch_starts"] == starts and len(found["entropy_bits"]) == found["bytes"] == 16
    data = base64.b64encode(b"\x00\xff").decode()
    assert server.post("/v1/encode", file_b64=data).json()["bytes_b64"] == data
    assert server.post("/v1/decode", bytes_b64=data).content == b"\x00\xff"


def test_output_is_constrained_where_a_request_says_so(server: Live) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    formats: list[dict[str, Any]] = [
        {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        {"type": "regex", "regex": "[ab]{3,5}c"},
        {"type": "grammar", "grammar": 'start: "yes" | "no"'},
    ]
    texts = [
        server.complete(prompt="a", max_tokens=400, seed=seed, temperature=0.3, response_format=one)["choices"][0][
            "text"
        ]
        for seed, one in enumerate(formats)
    ]
    assert set(json.loads(texts[0])) == {"a"} and re.fullmatch("[ab]{3,5}c", texts[1]) and texts[2] in ("yes", "no")
    wrong = server.post("/v1/completions", prompt="a", response_format={"type": "regex", "regex": "(("})
    assert wrong.status_code == 422 and wrong.json()["error"]["param"] == "response_format"


def test_a_constraint_that_leaves_nothing_ends_the_text(server: Live) -> None:
    """A character that does not fit any more is a matter of length; a text that is complete ends, whatever is asked."""
    wide = {"type": "regex", "regex": "éé"}
    cut = server.complete(prompt="a", max_tokens=3, response_format=wide, ignore_eos=True)["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == ("é", "length")
    whole = {"type": "regex", "regex": "abc"}
    done = server.complete(prompt="a", max_tokens=9, response_format=whole, ignore_eos=True)["choices"][0]
    assert (done["text"], done["finish_reason"]) == ("abc", "stop")
    assert server.metric("step_failures_total", model=RUN.name) == 0


@pytest.mark.fault("S1")
def test_no_route_of_the_real_application_is_open_without_a_key() -> None:
    app = build(Service([served()]))
    locked = guarded(app, keys=Keys.of("a key of a test".replace(" ", "-")))
    assert unlocked(app, locked) == {("GET", "/health"), ("HEAD", "/health")}
