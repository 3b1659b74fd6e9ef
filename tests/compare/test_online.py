"""An online memory beside the runs of a comparison: begun empty for each, kept, shown, and no part of the models."""

from __future__ import annotations

import pytest

from bytelm.compare import held_out, online
from bytelm.compare.run import Outcome, folder_of
from bytelm.compare.worker import HELD_OUT
from bytelm.decoding import over_bytes
from bytelm.evaluate.bits import measure
from bytelm.lm import load
from bytelm.online.memory import Memory
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.units import LN2
from small import TRAINED

PLAIN = [*TRAINED, "model.layers=1", "model.dim=16", "model.heads=2"]
SEGMENTS = [b"the patch reads the byte; ", b"the patch reads the byte again and again"] * 4


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Two seeds of a model of bytes, one of tokens."""
    home = tmp_path_factory.mktemp("compared")
    (home / "notes.txt").write_text("the patch reads a byte, the model writes another one\n" * 60)
    results: list[dict[str, object]] = []
    for name, seed, preset in (("byte", 0, "byte-tiny"), ("byte", 1, "byte-tiny"), ("bpe:300", 0, "bpe-tiny")):
        sets = [*PLAIN, f"train.seed={seed}", *(["model.vocabulary=300"] if preset == "bpe-tiny" else [])]
        train([home / "notes.txt"], configure(preset, sets=sets, steps=3), home / folder_of(name, seed), quiet=True)
        results.append({"model": name, "seed": seed})
    held_out.keep(home / HELD_OUT, list(enumerate(SEGMENTS)))
    return Outcome({}, home, results)


def test_a_memory_reads_beside_each_run_and_none_twice(outcome: Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    watched: list[str] = []
    found = online.ask(outcome, "cpu", lambda what, total: watched.append(f"{what}, {total}"))
    size = sum(map(len, SEGMENTS))
    assert watched == [f"{name} beside a memory, {size}" for name in ("byte-0", "byte-1", "bpe-300-0")]
    byte, tokens = found["models"]
    assert (byte["model"], tokens["model"], list(byte["seeds"])) == ("byte", "bpe:300", ["0", "1"])
    alone = Memory()
    assert found["alone"] == pytest.approx(sum(alone.nats(one).sum() for one in SEGMENTS) / LN2 / size)
    assert found["memory"] == alone.bytes
    for seed, bits in byte["seeds"].items():
        lm, memory = load(outcome.home / folder_of("byte", int(seed))), Memory()
        assert bits == pytest.approx(sum(lm.bits(one, online=memory)[0] for one in SEGMENTS) / size)
    assert byte["online"] == pytest.approx(sum(byte["seeds"].values()) / 2)
    assert byte["online"] < byte["bits_per_byte"] and tokens["online"] < tokens["bits_per_byte"]
    lm = load(outcome.home / folder_of("bpe:300", 0))
    exact = measure(over_bytes(lm.model), [("", one) for one in SEGMENTS], context=512)
    assert tokens["bits_per_byte"] == pytest.approx(sum(one.nats for one in exact) / LN2 / size)
    monkeypatch.setattr(online, "measure", None)
    assert online.ask(outcome, "cpu", lambda *_: None) == found


def test_the_table_has_seeds_and_the_memory_alone() -> None:
    models = [
        {"model": "a", "bits_per_byte": 2.0, "online": 1.75, "seeds": {"0": 1.5, "1": 2.0}},
        {"model": "b", "bits_per_byte": 1.9, "online": 1.7, "seeds": {"0": 1.7}},
    ]
    table = online.table({"online": {"memory": 1, "alone": 2.25, "models": models}})
    assert [list(row) for row in table.rows] == [
        ["b", "1.900", "1.700", "-0.200"],
        ["a", "2.000", "1.750 (1.500 to 2.000)", "-0.250"],
        ["the memory alone", "", "2.250", ""],
    ]
