"""Coded bytes come back, cost what they were said to, and cut streams are noticed."""

from __future__ import annotations

import numpy as np
import pytest

from bytelm.errors import DataError
from bytelm.native import online as bindings
from bytelm.online import engine
from bytelm.online.coding import Decoder, Encoder
from bytelm.online.memory import Memory
from bytelm.online.settings import Settings
from online_inputs import inputs, logs

SMALL = Settings(memory=1 << 20)
CASES = {kind: data.tobytes() for kind, data in inputs().items()} | {"empty": b"", "one": b"x", "long": b"ab" * 4000}


def encoded(data: bytes, beside: bool) -> bytes:
    memory, encoder = Memory(SMALL), Encoder()
    logp = logs(len(data)) if beside else None
    for begin, end in ((0, 3), (3, 3), (3, len(data))):
        encoder.put(memory, data[begin:end], None if logp is None else logp[begin:end])
    return encoder.end()


def decoded(stream: bytes, count: int, beside: bool) -> tuple[bytes, int]:
    memory, decoder = Memory(SMALL), Decoder(stream)
    logp = logs(count)
    found = bytes(decoder.get(memory, logp[i] if beside else None) for i in range(count))
    return found, decoder.used


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("kind", CASES)
def test_what_was_coded_comes_back_and_takes_what_it_costs(kind: str, beside: bool) -> None:
    data = CASES[kind]
    stream = encoded(data, beside)
    assert decoded(stream + b"more", len(data), beside) == (data, len(stream))
    bits = Memory(SMALL).nats(data, logs(len(data)) if beside else None).sum() / np.log(2)
    assert bits <= 8 * len(stream) <= bits * 1.0001 + 64


@pytest.mark.parametrize("kind", ["text", "random", "one"])
def test_a_cut_stream_is_noticed(kind: str) -> None:
    data = CASES[kind]
    stream = encoded(data, False)
    for end in {0, 3, 4, len(stream) // 2, len(stream) - 1} - {len(stream)}:
        with pytest.raises(DataError, match=f"{end} are too few"):
            decoded(stream[:end], len(data), False)


def test_a_byte_that_is_not_there_teaches_nothing() -> None:
    memory, decoder = Memory(SMALL), Decoder(encoded(CASES["random"], False)[:20])
    count = 0
    with pytest.raises(DataError):
        while True:
            decoder.get(memory)
            count += 1
    assert memory.read_bytes == count > 5
    with pytest.raises(DataError):
        decoder.get(memory)


def test_an_ended_stream_takes_no_more() -> None:
    encoder = Encoder()
    assert encoder.end() == encoder.end()
    with pytest.raises(DataError, match="was ended"):
        encoder.put(Memory(SMALL), b"x")


def test_the_definition_codes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    if bindings.kernel() is None:
        pytest.skip("no C++ compiler")
    data = CASES["text"][:50] + CASES["random"][:50]
    stream = encoded(data, True)
    monkeypatch.setattr(engine, "kernel", lambda: None)
    assert encoded(data, True) == stream and decoded(stream, len(data), True) == (data, len(stream))
    with pytest.raises(DataError):
        decoded(stream[:-1], len(data), True)
