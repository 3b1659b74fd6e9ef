"""A memory beside a model: the model's own figure stays, the other is what a decoder can repeat, whatever the batch."""

from __future__ import annotations

import numpy as np
import pytest

import bytelm
from bytelm.compress.header import HEADER, ONLINE, SEAL, opened, sealed, unsealed
from bytelm.compress.stream import compress, decompress
from bytelm.errors import DataError, UsageError
from bytelm.evaluate.bits import measure
from bytelm.evaluate.verdict import judge
from bytelm.online.memory import Memory
from bytelm.online.settings import Settings
from bytelm.testing import UniformModel, tiny_models
from bytelm.units import LN2

SMALL = Settings(memory=1 << 20)
TEXT = b"the cat sat on the mat. the cat sat on the hat. " * 12
DOCUMENTS = [("a", TEXT), ("b", b""), ("c", bytes(range(256))), ("d", TEXT[:100])]


def test_the_models_own_bits_stay_and_repeats_cost_little() -> None:
    model = UniformModel()
    plain = judge(model, DOCUMENTS, 64)
    with_memory = judge(model, DOCUMENTS, 64, memory=Memory(SMALL))
    assert "online" not in plain.mapping() and plain.mapping() == {
        name: value for name, value in with_memory.mapping().items() if name != "online"
    }
    online = with_memory.online
    assert (
        online is not None and online.read_before == 0 and (online.memory, online.kind) == (Memory(SMALL).bytes, "text")
    )
    bits = {file.name: file.bits_per_byte for file in online.files}
    assert bits["d"] < 1.0 < bits["c"] and bits["a"] < 2.0, "what was read in one document helps the next"
    assert sum(file.bits for file in online.files) == pytest.approx(online.bits)


@pytest.mark.parametrize(("name", "model"), [pair for pair in tiny_models() if pair[1].tokens is None][:4])
def test_no_batch_and_no_cut_changes_what_is_learned(name: str, model: bytelm.interfaces.model.ByteModel) -> None:
    """Neither of windows nor of documents: the memory reads one byte after another."""
    found = []
    for batch in (1, 3):
        memory = Memory(SMALL)
        bits = list(measure(model.eval(), DOCUMENTS, context=32, batch=batch, memory=memory))
        found.append(([document.online for document in bits], memory.identity(), memory.read_bytes))
    assert found[0] == found[1] and found[0][2] == sum(len(data) for _, data in DOCUMENTS)


@pytest.mark.parametrize("data", [b"x", TEXT, bytes(300), np.random.default_rng(0).bytes(400)])
def test_what_is_compressed_beside_a_memory_comes_back(data: bytes) -> None:
    (_, model), *_ = tiny_models()
    nats = sum(d.online or 0.0 for d in measure(model.eval(), [("", data)], context=64, memory=Memory(SMALL)))
    packed = compress(model, data, 64, memory=Memory(SMALL))
    assert (
        len(data) < 300
        or opened(model, compress(model, data, 8))[0].streams
        > opened(model, compress(model, data, 8, memory=Memory(SMALL)))[0].streams
        == 1
    ), "streams would not see each other's repeats"
    assert decompress(model, packed, memory=Memory(SMALL)) == data
    coded = 8 * (len(packed) - SEAL.size - HEADER.size - ONLINE.size)
    assert coded <= 1.0001 * nats / LN2 + 64


def test_another_memory_is_refused() -> None:
    (_, model), *_ = tiny_models()
    cold, primed = Memory(SMALL), Memory(SMALL)
    primed.learn(TEXT)
    for wrote, reads, why in (
        (cold, None, "give the same one"),
        (None, cold, "leave the memory out"),
        (primed, cold, "primed by other bytes"),
        (cold, primed, "had read something"),
    ):
        packed = compress(model.eval(), b"abc", 64, memory=wrote and wrote.clone())
        with pytest.raises(DataError, match=why):
            decompress(model, packed, memory=reads and reads.clone())
    packed = compress(model, TEXT, 64, memory=Memory(SMALL))
    body = unsealed(packed)
    for cut in (HEADER.size + 3, len(body) - 5):
        with pytest.raises(DataError, match="it is truncated"):
            decompress(model, packed[: SEAL.size + cut], memory=Memory(SMALL))
        with pytest.raises(DataError, match=r"header is damaged|cut off"):
            decompress(model, sealed(body[:cut]), memory=Memory(SMALL))
    flipped = bytearray(body)
    flipped[len(body) // 2 + 20] ^= 1
    with pytest.raises(DataError, match=r"does not restore|cut off"):
        decompress(model, sealed(bytes(flipped)), memory=Memory(SMALL))


def test_a_model_of_tokens_is_refused() -> None:
    model = next(model for _, model in tiny_models() if model.tokens is not None)
    with pytest.raises(UsageError, match="reads tokens"):
        list(measure(model, [("", b"abc")], context=8, memory=Memory(SMALL)))
