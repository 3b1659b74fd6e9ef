"""Sweeps: what is tried, that the better trials go on, and that nothing done is lost."""

from __future__ import annotations

import json
import math
import random
import shutil
import tomllib
from pathlib import Path
from typing import Any

import pytest

from bytelm.cli import run as cli
from bytelm.compare import cells, held_out
from bytelm.compare.cells import Failure
from bytelm.config import assignments
from bytelm.data.corpus import Corpus, iterate_documents
from bytelm.errors import UsageError
from bytelm.sweep import run, space
from bytelm.sweep.results import against, name_of
from bytelm.sweep.run import Rung, shares
from bytelm.sweep.space import Range, Values, axes, axis, drawn, grid, told
from comparisons import write_data
from report_pages import Page

SMALL = ["dim=32", "layers=1", "heads=2"]
TRAIN = ["context_length=128", "batch=8", "warmup_steps=2", "eval_bytes=4096", "sample_bytes=0"]
SETTINGS = [
    word for table, sets in (("model", SMALL), ("train", TRAIN)) for one in sets for word in ("--set", f"{table}.{one}")
]
BYTES = 60_000
RATES = "train.learning_rate=1e30,5e-4,8e-3"


def words(data: str, home: Path, *more: str, preset: str = "byte-window-tiny") -> list[str]:
    given = ["sweep", data, "--run", str(home), "--preset", preset, "--quiet", *SETTINGS, *more]
    return given if {"--bytes", "--minutes", "--steps"} & set(more) else [*given, "--bytes", str(BYTES)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "texts.jsonl", 76_000)


@pytest.fixture(scope="module")
def home(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("swept") / "home"
    assert cli(words(data, home, "--over", RATES, "--search", "halving")) == 0
    return home


@pytest.fixture(scope="module")
def found(home: Path) -> Any:
    return json.loads((home / "results.json").read_bytes())


# ---- what is tried


def test_values_and_ranges_are_read_as_settings_are() -> None:
    assert axis("train.learning_rate=1e-3,2e-3") == Values("train.learning_rate", (1e-3, 2e-3))
    assert axis("train.table_optimizer=adam,rowwise_adam") == Values("train.table_optimizer", ("adam", "rowwise_adam"))
    assert axis("model.sizes=[8],[4, 2]") == Values("model.sizes", ([8], [4, 2]))
    assert axis("a.b=none,4") == Values("a.b", ("none", 4))
    assert axis("model.layers=2..6") == Range("model.layers", 2, 6, whole=True)
    assert axis("train.dropout=0..0.3") == Range("train.dropout", 0.0, 0.3, whole=False)
    for value in (1e-3, 0.0, 3, True, "adam", "none", [8, 4], [["a"]]):
        table = assignments([f"a.b={told(value)}"], "--set")
        assert table == {"a": {"b": value}}, value


def test_a_grid_is_every_combination_and_a_draw_is_the_same_again() -> None:
    found = axes(["a=1,2", "b=x,y,z"])
    assert grid(found) == [{"a": a, "b": b} for a in (1, 2) for b in "xyz"]
    four = drawn(found, 4)
    assert drawn(found, 6)[:4] == four and len({repr(trial) for trial in drawn(found, 6)}) == 6
    assert len(drawn(found, 50)) == 6 and all(trial in grid(found) for trial in four)
    wide = drawn(axes(["rate=1e-4..1e-2", "layers=1..4", "drop=0..0.5"]), 400)
    rates = [trial["rate"] for trial in wide]
    assert all(1e-4 <= rate <= 1e-2 for rate in rates)
    assert sum(rate < 1e-3 for rate in rates) / 400 == pytest.approx(0.5, abs=0.08)  # log-uniform
    assert sum(trial["drop"] < 0.25 for trial in wide) / 400 == pytest.approx(0.5, abs=0.08)
    assert {trial["layers"] for trial in wide} == {1, 2, 3, 4}
    share = sum(trial["layers"] == 1 for trial in wide) / 400
    assert share == pytest.approx(math.log(2) / math.log(5), abs=0.08)
    at = random.Random(1)
    assert all(1 <= Range("a", 1, 3, whole=True).draw(at) <= 3 for _ in range(1000))


BAD = [
    ("nothing to vary", []),
    ("write key=value,value", ["train.learning_rate"]),
    ("write key=value,value", ["=3"]),
    ("both ends of a range must be numbers", ["a=x..3"]),
    ("the low end must be below the high end", ["a=3..3"]),
    ("the low end must be below the high end", ["a=1..inf"]),
    ("names a value twice", ["a=1,2,1"]),
    ("is there twice", ["a=1,2", "a=3"]),
    ("all trials share data", ["data.split=1,2"]),
    ("use --seeds", ["train.seed=1,2"]),
]


@pytest.mark.parametrize(("said", "over"), BAD)
def test_bad_axes_are_refused_by_name(said: str, over: list[str]) -> None:
    with pytest.raises(UsageError, match=said):
        axes(over)


def test_a_grid_takes_no_range_and_has_an_end() -> None:
    with pytest.raises(UsageError, match="a range needs --search random or halving"):
        grid(axes(["a=1..3"]))
    with pytest.raises(UsageError, match="1,000,000 combinations"):
        grid(axes([f"{key}={','.join(map(str, range(100)))}" for key in "abc"]))


def test_halving_has_rounds_that_end_with_the_whole_budget() -> None:
    assert shares("grid", 100) == shares("random", 100) == shares("halving", 2) == [1.0]
    assert shares("halving", 3) == pytest.approx([1 / 3, 1]) and shares("halving", 8) == pytest.approx([1 / 3, 1])
    assert shares("halving", 9) == shares("halving", 1000) == pytest.approx([1 / 9, 1 / 3, 1])


# ---- what comes out


def test_the_best_third_goes_on_with_the_whole_budget(home: Path, found: Any) -> None:
    assert [one["trials"] for one in found["rounds"]] == [3, 1]
    best, other = found["trials"]
    assert best["set"] == {"train.learning_rate": 8e-3} and best["share"] == 1
    assert other["set"] == {"train.learning_rate": 5e-4} and other["share"] == pytest.approx(1 / 3)
    for trial, bytes in ((best, BYTES), (other, BYTES / 3)):
        assert trial["trained_bytes"] == pytest.approx(bytes, abs=2048)
    corpus = Corpus.open(home / "data")
    for name, split in (("valid.bin", "valid"), ("test.bin", "test")):
        assert [data for _, data in held_out.kept(home / name)] == [
            data.tobytes() for _, data in iterate_documents(corpus, split)
        ]
    kept = json.loads((home / "trial-002" / "seed-0" / "result.json").read_bytes())
    for split, key in (("valid", "bits_per_byte"), ("test", "test_bits_per_byte")):
        nats, size = (sum(document[column] for document in kept[split]) for column in (2, 1))
        assert best[key] == pytest.approx(nats / math.log(2) / size) and size == corpus.bytes(split)
    assert kept["valid"] != kept["test"]


def test_a_trial_that_diverges_is_told_and_the_others_go_on(home: Path, found: Any) -> None:
    ((name, reason),) = found["failed"].items()
    assert name == "trial 0, train.learning_rate=1e+30, seed 0" and "non-finite" in reason
    page = Page((home / "index.html").read_text())
    page.assert_inert()
    assert reason in page.text and name in page.text
    for trial in found["trials"]:
        assert f"{trial['bits_per_byte']:.3f}" in page.text


def test_a_trial_no_better_than_a_guess_is_told_as_one_that_diverged(
    home: Path, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As one may be that failed by its loss, and was tried again: it goes on from where its loss was no number."""
    swept = tmp_path / "home"
    shutil.copytree(home, swept)
    monkeypatch.setattr(cells, "trained", lambda cell: Failure("not now").write(cell.run))
    for nats, said in ((9.0, "13 bits per byte, where guessing takes 8"), (math.nan, "nan bits per byte, where")):
        file = swept / "trial-001" / "seed-0-of-3" / "result.json"
        result = json.loads(file.read_bytes())
        result["valid"] = [[name, size, nats * size] for name, size, _ in result["valid"]]
        file.write_text(json.dumps(result))
        assert cli(words(data, swept, "--over", RATES, "--search", "halving", "--json")) == 0
        found = json.loads(capfd.readouterr().out)
        assert said in found["failed"]["trial 1, train.learning_rate=0.0005, seed 0"]
        assert [trial["trial"] for trial in found["trials"]] == [2]


def test_the_best_configuration_is_a_file_that_train_reads(
    home: Path, data: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli(["train", data, "--config", str(home / "best.toml"), "--print-config"]) == 0
    printed = tomllib.loads(capfd.readouterr().out)
    assert printed["train"]["learning_rate"] == 8e-3 and printed["train"]["bytes"] == BYTES
    assert printed["model"]["dim"] == 32 and printed == tomllib.loads((home / "best.toml").read_text())


def test_the_same_command_trains_nothing_and_a_new_value_only_itself(
    home: Path, data: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    seen: list[str] = []

    def trained(cell: Any) -> None:
        seen.append(cell.label)
        cell.run.mkdir(parents=True, exist_ok=True)
        Failure("not now").write(cell.run)

    monkeypatch.setattr(cells, "trained", trained)
    assert cli(words(data, home, "--over", RATES, "--search", "halving", "--json")) == 0
    again = json.loads(capfd.readouterr().out)
    assert seen == ["trial 0, train.learning_rate=1e+30, seed 0, 1/3 of the budget"]  # what failed is tried again
    seen.clear()
    assert cli(words(data, home, "--over", "train.learning_rate=8e-3,1e-3", "--search", "halving")) == 0
    third = "seed 0, 1/3 of the budget"
    assert seen == [
        f"trial 0, train.learning_rate=1e+30, {third}",
        f"trial 3, train.learning_rate=0.001, {third}",
        "trial 1, train.learning_rate=0.0005, seed 0",  # of four the best two go on, and two have no result
    ]
    assert [trial["trial"] for trial in again["trials"]] == [2, 1]


@pytest.mark.parametrize(
    ("said", "code", "more"),
    [
        ("nothing to vary", 2, []),
        ("train.dropout was 0.0, now 0.5", 2, ["--over", RATES, "--search", "halving", "--set", "train.dropout=0.5"]),
        ("search was 'halving', now 'grid'", 2, ["--over", RATES]),
        ("a grid has as many as there are", 2, ["--over", RATES, "--trials", "3"]),
        ("give at least 1", 2, ["--over", RATES, "--seeds", "0"]),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    home: Path, data: str, said: str, code: int, more: list[str], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cells, "trained", None)
    before = (home / "results.json").read_bytes()
    assert cli(words(data, home, *more)) == code
    err = capfd.readouterr().err
    assert said in err and err.startswith("bytelm: ") and err.count("\n") == 1
    assert (home / "results.json").read_bytes() == before


@pytest.mark.parametrize(
    ("said", "more"),
    [
        ("trial 1, model.dim=33: ", ["--over", "model.dim=32,33"]),
        ("unknown key", ["--over", "train.learnin_rate=1,2"]),
        ("needs a budget in --bytes or --steps", ["--over", RATES, "--search", "halving", "--minutes", "1"]),
        ("a sweep is over one source", ["--over", RATES, "--mix", "a=1"]),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is(
    tmp_path: Path, data: str, said: str, more: list[str], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cells, "trained", None)
    assert cli(words(data, tmp_path / "home", *more)) == 2
    err = capfd.readouterr().err
    assert said in err and err.count("\n") == 1


def test_a_dry_run_says_what_would_be_trained(
    tmp_path: Path, data: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "trained", None)
    over = ["--over", "train.learning_rate=1e-4..1e-2", "--search", "halving", "--trials", "10", "--dry-run"]
    assert cli(words(data, tmp_path / "home", *over, "--seeds", "2")) == 0
    out = capfd.readouterr().out
    assert out.count("train.learning_rate=") == 10 and "4 trials with 0.33 of the budget, 2 seeds each" in out
    assert not list(tmp_path.glob("home/trial-*"))


def test_what_decides_is_the_mean_over_seeds_and_a_trial_without_a_result_is_last() -> None:
    def result(nats: float) -> dict[str, Any]:
        return {"valid": [["0", 100, nats]]}

    rung = Rung(1.0, [0, 1, 2, 3], {0: [result(100.0), result(140.0)], 1: [result(110.0)], 2: [result(math.nan)]})
    assert rung.order()[:2] == [1, 0] and rung.bits(0) == pytest.approx(120 / 100 / math.log(2))
    assert rung.bits(2) == rung.bits(3) == math.inf
    assert run.WORKER == "bytelm.sweep.worker"


def test_charts_name_what_differs_and_show_numeric_keys() -> None:
    trials = [
        {"trial": n, "set": {"train.dropout": d, "model.name": "a", "x.y": "b"}, "bits_per_byte": bits, "share": 1.0}
        for n, (d, bits) in enumerate([(0.0, 2.0), (0.1, 1.9), (0.0, 1.8)])
    ]
    assert name_of(trials[1], trials) == "1: 0.1" and name_of(trials[1], trials[:1]) == "trial 1"
    assert against("train.dropout", trials) == {
        "best": [(0.0, 1.8), (0.1, 1.9)],
        "all": [(0.0, 2.0), (0.1, 1.9), (0.0, 1.8)],
    }
    assert against("x.y", trials) is None and space.show(0.00123456) == "0.001235"
