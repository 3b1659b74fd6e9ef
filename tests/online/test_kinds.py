"""Predictors are those for text, pictures, sound or records, as the bytes are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bytelm import machine
from bytelm.cli import run as cli
from bytelm.online import kinds, saved
from bytelm.online.kinds import audio, image, kind_of, records, suited
from bytelm.online.memory import Memory
from bytelm.online.settings import TEXT, Settings

SMALL = 4 << 20


def smooth(rows: int, width: int, channels: int) -> NDArray[np.uint8]:
    """Pictures of rolling hills with some noise, whose colours are alike."""
    random = np.random.default_rng(rows * width)
    y, x = np.mgrid[0:rows, 0:width]
    hills = 110 + 50 * np.sin(x / 17 + y / 40) + 40 * np.cos(y / 11 - x / 60)
    grain = random.normal(0, 3, (rows, width, 1)) + random.normal(0, 1, (rows, width, channels))
    colours = hills[..., None] * (1 - 0.25 * np.arange(channels)) + 15 * np.arange(channels) + grain
    return colours.clip(0, 255).astype(np.uint8).ravel()


def tones(count: int, channels: int) -> NDArray[np.uint8]:
    """Some seconds of chords, different ones in each channel, that fade in."""
    random, time = np.random.default_rng(channels), np.arange(count) / 16_000
    chords = [sum(np.sin(2 * np.pi * pitch * (1 + c / 3) * time) for pitch in (220, 331, 517)) for c in range(channels)]
    loud = np.stack(chords, 1) * np.linspace(500, 6000, count)[:, None] + random.normal(0, 20, (count, channels))
    return loud.astype("<i2").view(np.uint8).ravel()


def prose() -> NDArray[np.uint8]:
    words = np.random.default_rng(0).choice(["when ", "the ", "sea, ", "calm ", "as glass, ", "lay\n", "we "], 9000)
    return np.frombuffer("".join(words).encode(), np.uint8)


def table(rows: int) -> NDArray[np.uint8]:
    """Records of 20 bytes: a counter, a time, a place, a kind and a small number."""
    random = np.random.default_rng(0)
    found = np.zeros(
        rows, [("id", "<u4"), ("time", "<f8"), ("place", "<f4"), ("kind", "u1"), ("count", "<u2"), ("end", "u1")]
    )
    found["id"], found["time"] = np.arange(rows) + 70_000, 1.7e9 + np.cumsum(random.exponential(3, rows))
    found["place"], found["kind"] = (
        np.cumsum(random.normal(0, 0.1, rows)),
        random.choice(4, rows, p=[0.7, 0.1, 0.1, 0.1]),
    )
    found["count"] = random.poisson(20, rows)
    return found.view(np.uint8)


KINDS = {
    "grey picture": (smooth(240, 300, 1), image(1, 300)),
    "colour pictures": (smooth(400, 64, 3), image(3, 192)),
    "mono": (tones(60_000, 1), audio(1)),
    "stereo": (tones(60_000, 2), audio(2)),
    "records": (table(4000), records(20)),
    "wide numbers": (np.cumsum(np.random.default_rng(2).normal(0, 1, 20_000)).astype("<f4").view(np.uint8), records(4)),
    "prose": (prose(), TEXT),
    "noise": (np.random.default_rng(1).integers(0, 256, 70_000).astype(np.uint8), TEXT),
    "zeros": (np.zeros(70_000, np.uint8), TEXT),
    "few bytes": (smooth(10, 10, 1), TEXT),
    "no bytes": (np.zeros(0, np.uint8), TEXT),
}


@pytest.mark.parametrize("kind", KINDS)
def test_predictors_suit_the_bytes(kind: str) -> None:
    data, predictors = KINDS[kind]
    assert suited(data, Settings(memory=SMALL)) == Settings(predictors, SMALL)
    assert suited(data.tobytes()) == Settings(predictors)


def test_what_suits_has_a_name() -> None:
    named = {kind: kind_of(Settings(predictors)) for kind, (_, predictors) in KINDS.items()}
    assert named["prose"] == "text" and named["colour pictures"] == "images of 3 bytes a pixel and 192 a row"
    assert named["mono"] == "16-bit audio of 1 channel" and named["stereo"] == "16-bit audio of 2 channels"
    assert named["records"] == "records of 20 bytes"
    assert kind_of(Settings(("order:0", "order:2"))) == "order:0, order:2"


@pytest.mark.parametrize("kind", ["grey picture", "colour pictures", "mono", "stereo", "records", "wide numbers"])
def test_they_are_worth_it(kind: str) -> None:
    data, predictors = KINDS[kind]
    costs = [Memory(Settings(some, SMALL)).nats(data).sum() for some in (predictors, TEXT)]
    assert costs[0] < 0.95 * costs[1]


def test_planes_filters_and_fields_pay() -> None:
    """Without any plane images cost more, without any filter audio does, and records without any field."""
    for kind, name in (("colour pictures", "plane"), ("mono", "wave"), ("records", "field")):
        data, predictors = KINDS[kind]
        rest = tuple(one for one in predictors if not one.startswith(name))
        assert kinds.cost(data, predictors) < 0.97 * kinds.cost(data, rest)


def test_text_costs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(data: NDArray[np.uint8], predictors: tuple[str, ...]) -> float:
        raise AssertionError(predictors)

    monkeypatch.setattr(kinds, "cost", tried)
    assert suited(prose()).predictors == TEXT


def test_what_suits_is_found_in_the_middle() -> None:
    """A quiet beginning does not hide sound, nor a title page pictures."""
    silence = np.zeros(70_000, np.uint8)
    assert suited(np.concatenate([silence, tones(100_000, 1)])).predictors == audio(1)


def test_what_suits_the_middle_must_suit_the_rest() -> None:
    """A text around a table that is nearly empty is a text."""
    text, empty = prose(), np.zeros((3000, 24), np.uint8)
    empty[:, 0] = np.arange(3000)
    assert suited(empty.ravel()).predictors == records(24)
    assert suited(np.concatenate([text, empty.ravel(), text])).predictors == TEXT


def test_the_memory_of_a_run_suits_its_training_split(tmp_path: Path) -> None:
    file, run = tmp_path / "hills.raw", tmp_path / "run"
    file.write_bytes(smooth(240, 300, 1).tobytes())
    assert saved.empty(run, Settings(memory=SMALL)).settings == Settings(memory=SMALL)
    packed = ["data", "pack", str(file), "--out", str(run / "data"), "--quiet"]
    assert cli([*packed, "--set", "data.valid=0", "--set", "data.test=0"]) == 0
    assert saved.empty(run, Settings(memory=SMALL)).settings == Settings(image(1, 300), SMALL)
    assert cli(["prime", str(run), "--memory", "4", "--quiet"]) == 0
    assert saved.opened(run, "primed").settings == Settings(image(1, 300), 4 << 20)


def test_a_memory_grows_with_what_it_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    for total, most in ((0, 1 << 30), (1 << 40, 1 << 30), (5 << 30, 512 << 20), (1 << 20, 128 << 20)):
        monkeypatch.setattr(kinds.machine, "memory", lambda total=total: machine.Memory(total, total))
        assert [kinds.memory_for(count) for count in (0, 1, 10**6)] == [128 << 20] * 3
        assert [kinds.memory_for(count) for count in (4_123_775, 10**9)] == [min(256 << 20, most), most]
