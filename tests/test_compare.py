"""Comparisons: what is the same for all models, that every figure is what it says, and that nothing done is lost."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import combinations, pairwise, product
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bytelm
from bytelm.checkpoint.metrics import read_metrics
from bytelm.cli import run as cli
from bytelm.cli.comparing import BUDGETS
from bytelm.compare import held_out, results, run, worker
from bytelm.compare.candidates import (
    DEFAULT,
    DEPTH_OFFSETS,
    DEPTH_PENALTY,
    WIDTHS,
    candidate,
    candidates,
    nearest,
    usual,
)
from bytelm.compare.page import charts, show_power
from bytelm.compare.plan import (
    EPOCHS,
    LARGE_STEP,
    OFF,
    RATIO,
    STEP,
    STEPS,
    WINDOW,
    Budget,
    built,
    check_memory,
    planned,
    step_of,
    window_of,
)
from bytelm.data.corpus import Corpus, iterate_documents
from bytelm.errors import ConfigError, DataError, ResourceError, UsageError
from bytelm.evaluate.bits import DocumentBits
from bytelm.evaluate.costs import costs
from bytelm.evaluate.meter import interval
from bytelm.machine import Memory
from bytelm.report.charts import log_ticks
from bytelm.training.config import RunConfig
from bytelm.training.settings import modality_table
from bytelm.units import LN2
from test_report import Page

MODELS = ("byte-window:32", "bpe:300", "space")
BUDGET = "1.3e11"  # about the least that suits them on this much data: some seconds each
WORDS = ["the", "patch", "byte", "model", "reads", "and", "writes", "déjà", "vu", "return", "x =", "tree", "light"]
MEANS = {"blt": 5.0, "space": 5.0, "megabyte": 8.0, "bpe": 3.0}
Found = Mapping[str, Any]
Results = dict[str, tuple[int, bytes]]


def write_data(path: Path, size: int) -> str:
    """So many bytes of text and some more, a document a line; some of them longer than a window."""
    rng, lines = random.Random(0), list[str]()
    while sum(map(len, lines)) < size:
        lines.append(" ".join(rng.choice(WORDS) for _ in range(rng.choice((20, 30, 200)))))
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


def words(data: str | Path, home: Path, models: str, *more: str, budget: str = BUDGET) -> list[str]:
    return ["compare", str(data), "--run", str(home), "--models", models, "--budget", budget, "--quiet", *more]


def results_of(home: Path) -> Results:
    """The result of each run there is: when it was written, and what."""
    return {path.parent.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in home.glob("*/result.json")}


def run_of(home: Path, model: str) -> Path:
    return home / f"{model.replace(':', '-')}-0"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "texts.jsonl", 76_000)


@dataclass(frozen=True)
class Begun:
    """A comparison of two models that was interrupted, then ended, then given a third; what was there after each."""

    home: Path
    code: int
    said: str
    metrics: str
    plans: list[bytes]
    results: list[Results]


@pytest.fixture(scope="module")
def begun(data: str, tmp_path_factory: pytest.TempPathFactory) -> Begun:
    home = tmp_path_factory.mktemp("compared") / "home"
    two = words(data, home, ",".join(MODELS[:2]))
    job = subprocess.Popen([sys.executable, "-m", "bytelm", *two], stderr=subprocess.PIPE, text=True)
    metrics, deadline = run_of(home, MODELS[0]) / "metrics.jsonl", time.monotonic() + 120
    while '"train"' not in (metrics.read_text() if metrics.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.05)
    job.send_signal(signal.SIGINT)
    _, said = job.communicate(timeout=60)
    begun = Begun(home, job.returncode, said, metrics.read_text(), [], [])
    for command in (None, two, words(data, home, ",".join(MODELS))):
        assert command is None or cli(command) == 0
        begun.plans.append((home / "plan.json").read_bytes())
        begun.results.append(results_of(home))
    return begun


@pytest.fixture(scope="module")
def home(begun: Begun) -> Path:
    return begun.home


@pytest.fixture(scope="module")
def found(home: Path) -> Found:
    return json.loads((home / "results.json").read_bytes())


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """A copy of the comparison that a test may spoil."""
    return shutil.copytree(home, tmp_path / "home", symlinks=True)


class Sized(Corpus):
    """A corpus of which only the size is asked."""

    def __init__(self, size: int) -> None:
        self.size = size

    def bytes(self, split: str) -> int:
        return self.size


def sized(name: str, budget: Budget, size: int = 10**9, table: Mapping[str, Any] | None = None) -> Any:
    return planned(candidate(name), budget, Sized(size), MEANS.get(name.split(":")[0], 1.0), table)


# ---- who takes part


def test_names_carry_numbers_or_have_their_own() -> None:
    found = [(one.name, one.number, one.tokens) for one in candidates("blt, byte-window:7,bpe:300,linear")]
    assert found == [("blt", 5, False), ("byte-window:7", 7, False), ("bpe:300", 300, True), ("linear", 0, False)]
    assert candidate("bpe:300").tables(64, 0)["model"]["vocabulary"] == 300
    assert candidate("blt:7").tables(64, 0)["patching"]["target_mean_length"] == 7
    assert candidate("megabyte:4").tables(64, 0)["model"]["sizes"] == [4]


UNKNOWN = [("byte,megabite", "did you mean 'megabyte'"), ("", "unknown model ''"), ("space:4", "space takes no number")]
UNKNOWN += [("bpe:260", "from 261 up"), ("megabyte:1", "from 2 up"), ("byte-window:0", "from 1 up")]
UNKNOWN += [("blt:4.5", "a whole one"), ("blt:", "a whole one"), ("byte,blt:5,byte", "byte twice")]
UNKNOWN += [("blt,blt:5", "twice")]


@pytest.mark.parametrize(("names", "said"), UNKNOWN)
def test_a_model_that_cannot_be_had_is_told(names: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        candidates(names)


@given(st.floats(3, 11), st.floats(0, 1))
@settings(max_examples=30)
def test_the_nearest_shape_is_the_nearest_of_all(power: float, linear: float) -> None:
    def cost(width: int, depth_offset: int) -> float:
        return (
            24.0 * (usual(width) + depth_offset) * width**2 + linear * 1e5 * (usual(width) + depth_offset) + 520 * width
        )

    def apart(size: tuple[int, int]) -> float:
        return abs(math.log(cost(*size) / 10**power)) + DEPTH_PENALTY * size[1] ** 2

    shapes = [
        (width, depth_offset)
        for width, depth_offset in product(WIDTHS, DEPTH_OFFSETS)
        if usual(width) + depth_offset > 1
    ]
    assert apart(nearest(cost, 10**power)) == pytest.approx(min(map(apart, shapes)))


@pytest.mark.parametrize("modality", [None, "image:8", "audio:16k"])
def test_every_model_can_be_had_in_every_size(modality: str | None) -> None:
    table = modality_table(modality) if modality else None
    for name in [*DEFAULT.split(","), "blt-no-ngrams:3", "megabyte:5", "perceiver:2000", "byte-window:1", "bpe:261"]:
        for width, depth_offset in [(32, 0), (48, 2), (80, -1), (208, 1)]:
            tables = candidate(name).tables(width, depth_offset) | ({"modality": table} if table else {})
            config = built(tables, steps=1, context_length=window_of(table))
            assert costs(config.recipe, config.train.context_length, 3.0).executed > 0


# ---- what a budget gives each


def test_the_same_operations_for_all() -> None:
    amount, spent = BUDGETS["flops"], list[float]()
    for name in DEFAULT.split(","):
        model = sized(name, Budget("flops", amount))
        config = model.run(0)
        counted = costs(config.recipe, config.train.context_length, model.mean)
        assert counted == model.costs and config.train.bytes == model.bytes
        assert abs(3 * counted.executed * model.bytes - amount) <= 3 * counted.executed
        spent.append(counted.executed)
    goal, read = Budget("flops", amount).goal(10**9)
    assert 3 * goal * read == pytest.approx(amount) and read == pytest.approx(RATIO * goal / 2)
    assert max(spent) / min(spent) < OFF and all(1 / OFF < cost / goal < OFF for cost in spent)


def test_the_same_bytes_and_parameters_for_all() -> None:
    amount = BUDGETS["bytes"]
    models = [sized(name, Budget("bytes", amount)) for name in DEFAULT.split(",")]
    assert {model.bytes for model in models} == {amount}
    own = [model.costs.parameters - model.costs.tables for model in models]
    assert max(own) / min(own) < OFF and all(1 / OFF < count * RATIO / amount < OFF for count in own)


def test_the_same_seconds_for_all() -> None:
    model = sized("blt", Budget("time", 90.0, rate=1e11))
    assert (model.run(0).train.minutes, model.run(0).train.bytes, model.bytes) == (1.5, None, None)
    assert model.costs == sized("blt", Budget("flops", 9e12)).costs


def test_little_data_is_not_read_more_often_than_is_worth_it() -> None:
    budget = Budget("flops", 1e13)
    goal, read = budget.goal(10**6)
    assert read == EPOCHS * 10**6 and 3 * goal * read == pytest.approx(1e13) and goal > budget.goal(10**9)[0]
    assert Budget("bytes", 1e8).goal(10**6)[1] == 1e8


@pytest.mark.parametrize(
    ("name", "match", "amount", "size"),
    [
        ("byte-window", "flops", 1e9, 10**9),
        ("byte-window", "flops", 2e10, 40_000),  # so little data that it would be read more than EPOCHS times
        ("byte-window", "flops", 1e19, 10**5),
        ("space", "bytes", 1e6, 10**9),
    ],
)
def test_a_budget_that_suits_no_shape_names_one_that_does(name: str, match: Any, amount: float, size: int) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: .* or leave it out of --models$") as refused:
        sized(name, Budget(match, amount), size)
    said = re.search(r"nearest shape has ([\d.]+)([KB]): give (\w+) --budget \(([^ ]+) suits it", str(refused.value))
    assert said is not None
    suits = Budget(match, float(said[4]))
    assert said[3] == ("more" if suits.amount > amount else "less")
    assert suits.goal(size)[0] == pytest.approx(float(said[1]) * {"K": 1e3, "B": 1e9}[said[2]], rel=0.1)
    sized(name, suits, size)


def test_little_data_does_not_make_the_look_at_the_machine_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def timed(config: RunConfig, mean: float) -> float:
        seen.append(costs(config.recipe, config.train.context_length, mean).executed)
        return 1e5

    monkeypatch.setattr(run, "bytes_per_second", timed)
    for size in (1 << 17, 1 << 30):
        assert run.rate_of(Sized(size), run.ComparisonSpec(["-"], "byte", "time", 60.0)) == 3e5 * seen[-1]
    assert max(seen) < 1e7, "a step of the probe would take minutes"


def test_a_document_of_one_size_is_read_in_a_row() -> None:
    windows = {"dna": WINDOW, "image:8": 8 * 8 * 3 + 1, "image:64:grey": 64 * 64 + 1, "image:128": WINDOW}
    assert {text: window_of(modality_table(text)) for text in windows} == windows and window_of(None) == WINDOW
    for name, text, window in [("byte-window", "image:8", 193), ("bpe", None, round(WINDOW / 3))]:
        train = sized(name, Budget("flops", 1e13), table=modality_table(text) if text else None).run(0).train
        bytes = train.context_length * train.batch * (MEANS["bpe"] if name == "bpe" else 1)
        assert train.context_length == window and bytes == pytest.approx(STEP, rel=0.05)


def test_memory_is_asked_for_before_it_is_missing() -> None:
    model = sized("byte-window", Budget("flops", 1e13))
    assert model.memory > 12 * model.costs.parameters  # weights, and two moments, in float32
    check_memory(model, model.memory)
    with pytest.raises(ResourceError, match=r"byte-window: a step takes .* less --budget"):
        check_memory(model, model.memory - 1)


# ---- what all are measured on


@given(st.lists(st.integers(0, 60), min_size=1, max_size=20), st.integers(1, 200), st.integers(1, 40))
@settings(max_examples=50)
def test_stretches_are_parts_of_documents_in_order(sizes: list[int], limit: int, longest: int) -> None:
    documents = [bytes(range(size)) for size in sizes]
    for grain in (1, 3):
        if not sum(sizes):
            with pytest.raises(DataError, match="no held-out bytes"):
                held_out.stretches(documents, limit, longest, grain)
            return
        chosen = held_out.stretches(documents, limit, longest, grain)
        for number, data in chosen:
            assert data[0] % grain == 0 and 0 < len(data) <= max(longest, grain)
            assert documents[number][data[0] :].startswith(data)
            assert len(data) % grain == 0 or data[-1] == sizes[number] - 1
        assert all(a[0] < b[0] or (a[0] == b[0] and a[1][-1] < b[1][0]) for a, b in pairwise(chosen))
        assert chosen and (sum(sizes) > limit or sum(len(data) for _, data in chosen) == sum(sizes))


@pytest.mark.parametrize("size", [6400, 16384, 20000, 40000])
def test_stretches_come_to_about_the_limit_evenly_over_all(size: int) -> None:
    chosen = held_out.stretches([bytes([number]) * size for number in range(64)], limit=64 * size // 2)
    numbers = [number for number, _ in chosen]
    assert sum(len(data) for _, data in chosen) == pytest.approx(64 * size // 2, rel=0.2)
    assert fmean(numbers) == pytest.approx(31.5, abs=2) and max(b - a for a, b in pairwise(numbers)) <= 3


def test_stretches_are_kept(tmp_path: Path) -> None:
    chosen = [(0, b"\n\n[]"), (0, bytes(range(256))), (7, b"\xff")]
    held_out.keep(tmp_path / "kept", chosen)
    assert held_out.kept(tmp_path / "kept") == chosen


def test_documents_are_what_is_resampled_where_there_are_enough() -> None:
    few = [DocumentBits(str(i % 7), 10, float(i)) for i in range(21)]
    assert held_out.units(few) == few
    many = [DocumentBits(str(i % 8), 10 + i, float(i)) for i in range(16)]
    assert held_out.units(many) == [DocumentBits(str(i), 28 + 2 * i, 8.0 + 2 * i) for i in range(8)]


# ---- what is found


def test_every_model_is_measured_on_the_same_bytes_and_every_byte_counts_once(home: Path, found: Found) -> None:
    corpus = Corpus.open(home / "data")
    stretches = [data for _, data in held_out.kept(home / "held-out.bin")]
    assert stretches == [data.tobytes() for _, data in iterate_documents(corpus, "test")]
    assert len(stretches) >= held_out.UNITS and max(map(len, stretches)) > WINDOW
    assert found["measured_bytes"] == corpus.bytes("test")
    assert {model["model"] for model in found["models"]} == set(MODELS)
    for model in found["models"]:
        lm = bytelm.load(run_of(home, model["model"]))
        each = [DocumentBits("", len(data), lm.bits(data)[0] * LN2) for data in stretches]
        bits = sum(document.nats for document in each) / LN2 / corpus.bytes("test")
        assert model["bytes"] == corpus.bytes("test") and model["bits_per_byte"] == pytest.approx(bits, rel=1e-4)
        assert (model["low"], model["high"]) == pytest.approx(interval(each), rel=1e-4)
        assert model["low"] < model["bits_per_byte"] < model["high"] and model["seeds"] == {"0": model["bits_per_byte"]}
    levels = [model["bits_per_byte"] for model in found["models"]]
    assert levels == sorted(levels) and levels[0] < 0.6 * found["compressors"]["gzip"]


def test_costs_and_shapes_are_those_of_the_models_trained(begun: Begun, found: Found) -> None:
    plan = json.loads(begun.plans[-1])
    for model in found["models"]:
        lm, learnt = bytelm.load(run_of(begun.home, model["model"])), model["trained_bytes"]
        counted = costs(built(model["config"]).recipe, lm.context, plan["models"][model["model"]]["mean"])
        assert {key: model[key] for key in asdict(counted)} == asdict(counted)
        assert model["parameters"] == sum(p.numel() for p in lm.model.parameters())
        assert model["training_flops"] == pytest.approx(3 * counted.executed * learnt)
        assert model["training_flops"] == pytest.approx(float(BUDGET), rel=0.06)  # it ends with a whole step
        assert model["epochs"] == learnt / found["train_bytes"] <= EPOCHS * OFF
        assert model["training_bytes_per_second"] * model["seconds"] == pytest.approx(learnt)
        assert min(model[key] for key in ("seconds", "generated_bytes_per_second", "steps")) > 0
        assert 1e8 < model["peak_memory"] < 4e9 and model["skipped"] == 0


def test_patches_are_those_of_the_bytes_measured(home: Path, found: Found) -> None:
    sizes = {model["model"]: model["patch_size"] for model in found["models"]}
    stretches = [data for _, data in held_out.kept(home / "held-out.bin")]
    for name in ("bpe:300", "space"):
        lm = bytelm.load(run_of(home, name))
        assert sizes[name] == pytest.approx(fmean(len(patch) for data in stretches for patch in lm.patches(data)))
    assert sizes["byte-window:32"] is None


def test_curves_fall_as_operations_and_seconds_are_spent(home: Path, found: Found) -> None:
    for model in found["models"]:
        curve = model["curve"]
        assert len(curve) >= 3 and curve[-1]["bits_per_byte"] < curve[0]["bits_per_byte"]
        for key in ("flops", "seconds", "bytes"):
            assert curve[0][key] > 0 and all(a[key] < b[key] for a, b in pairwise(curve))
        assert curve[-1]["bytes"] == model["trained_bytes"] and curve[-1]["seconds"] == model["seconds"]
        assert [point["flops"] for point in curve] == [3 * model["executed"] * point["bytes"] for point in curve]
        validations = [
            line
            for line in read_metrics(run_of(home, model["model"]) / "metrics.jsonl")
            if line["kind"] == "validation"
        ]
        assert [point["bits_per_byte"] for point in curve] == [line["bits_per_byte"] for line in validations]


def test_differences_are_those_of_the_levels(found: Found) -> None:
    level = {model["model"]: model["bits_per_byte"] for model in found["models"]}
    assert [(pair["model"], pair["baseline"]) for pair in found["differences"]] == list(combinations(level, 2))
    for pair in found["differences"]:
        assert pair["difference"] == pytest.approx(level[pair["model"]] - level[pair["baseline"]])
        assert pair["low"] < pair["difference"] < pair["high"] and pair["difference"] <= 0


def test_a_difference_is_paired() -> None:
    rng = random.Random(0)
    hard = [rng.uniform(50, 900) for _ in range(40)]  # nats of 200 bytes: documents differ far more than models
    one = [DocumentBits(str(i), 200, nats) for i, nats in enumerate(hard)]
    other = [DocumentBits(str(i), 200, nats + rng.uniform(4, 6)) for i, nats in enumerate(hard)]
    assert results.difference(one, one) == {"difference": 0.0, "low": 0.0, "high": 0.0}
    less, more = results.difference(one, other), results.difference(other, one)
    assert [-less[key] for key in ("difference", "high", "low")] == pytest.approx(list(more.values()))
    assert more["difference"] == pytest.approx(5 / 200 / LN2, rel=0.05) and more["low"] > 0
    low, high = interval(one) or (0.0, 0.0)
    assert more["high"] - more["low"] < 0.02 * (high - low)
    assert results.difference(one[:1], other[:1])["low"] is None


def test_the_page_and_the_picture_show_all_and_fetch_nothing(home: Path, found: Found) -> None:
    page, picture = Page((home / "index.html").read_text()), (home / "picture.svg").read_text()
    page.assert_inert()
    assert picture.count("://") == 1 and "url(" not in picture  # the name of SVG
    drawn = "".join(ET.fromstring(picture).itertext())
    for model in found["models"]:
        for words in (model["model"], f"{model['bits_per_byte']:.3f}"):
            assert min(page.text.count(words), drawn.count(words)) >= 2
        for key, chart in zip(("flops", "seconds"), charts(found)[1:], strict=True):
            said = re.search(rf"{model['model']}: (\d+) points, from \S+ at (\S+) to \S+ at (\S+)\. ?", chart[0])
            assert said is not None and int(said[1]) == len(model["curve"])
            ends = [model["curve"][0][key], model["curve"][-1][key]]
            assert [float(said[2]), float(said[3])] == pytest.approx(ends, rel=0.03)
    assert sum(tag == "svg" for tag, _ in page.found) == 3 and picture.count("<polyline") == 2 * len(MODELS)


@pytest.mark.parametrize(("low", "high"), [(2.7e10, 1.2e11), (4e9, 1e11), (1e11, 3e11), (2e13, 4e16)])
def test_operations_on_an_axis_are_what_they_say(low: float, high: float) -> None:
    assert [float(show_power(tick)) for tick in log_ticks(low, high)] == pytest.approx(log_ticks(low, high))


# ---- the same command again


def test_the_same_command_trains_nothing_and_says_the_same(
    begun: Begun, data: str, found: Found, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "trained", None)
    command = words(data, begun.home, ",".join(MODELS))
    assert cli(command) == 0
    table = capfd.readouterr().out
    for model in found["models"]:
        rows = [line.split() for line in table.splitlines() if line.startswith(f" {model['model']} ")]
        assert len(rows) == 2 and rows[0][1] == f"{model['bits_per_byte']:.3f}"
    assert cli(command) == 0 and capfd.readouterr().out == table
    assert cli([*command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == found == json.loads((begun.home / "results.json").read_bytes())
    assert results_of(begun.home) == begun.results[-1] and (begun.home / "plan.json").read_bytes() == begun.plans[-1]


def test_what_was_interrupted_goes_on(begun: Begun) -> None:
    assert begun.code == 130 and "run the same command again to resume" in begun.said and "Traceback" not in begun.said
    assert not begun.results[0] and begun.plans[1] == begun.plans[0]
    now = (run_of(begun.home, MODELS[0]) / "metrics.jsonl").read_text()
    assert now.startswith(begun.metrics) and now.count("\n") > begun.metrics.count("\n") > 0
    learnt = json.loads(begun.results[1]["byte-window-32-0"][1])["trained_bytes"]
    wanted = json.loads(begun.plans[0])["models"][MODELS[0]]["bytes"]
    assert wanted <= learnt < wanted + 2 * STEP


def test_another_model_leaves_the_others_as_they_are(begun: Begun) -> None:
    _, before, now = begun.results
    assert len(before) == 2 and len(now) == 3 and now | before == now
    old, new = map(json.loads, begun.plans[1:])
    assert new["models"] | old["models"] == new["models"] and new["speeds"] | old["speeds"] == new["speeds"]


def test_a_run_stopped_while_it_was_measured_is_measured_and_not_trained_again(copied: Path) -> None:
    run = copied / "bpe-300-0"
    first = json.loads((run / "result.json").read_bytes())
    (run / "result.json").unlink()
    job = {"home": str(copied), "name": "bpe:300", "seed": 0, "run": str(run), "device": "cpu", "quiet": True}
    assert worker.main(json.dumps(job)) == 0
    again = json.loads((run / "result.json").read_bytes())
    for a, b in zip(again["documents"], first["documents"], strict=True):
        assert a[:2] == b[:2] and a[2] == pytest.approx(b[2], rel=1e-5)
    for key in ("steps", "trained_bytes", "seconds", "patch_size", "curve"):
        assert again[key] == first[key], key


def test_more_seeds_are_added_and_what_fails_loses_nothing(
    copied: Path, data: str, found: Found, capfd: pytest.CaptureFixture[str]
) -> None:
    """Seed 1 of one model cannot be trained: its folder holds the run of another seed. The other one has both."""
    before = results_of(copied)
    (copied / "space-1").mkdir()
    shutil.copy(copied / "space-0" / "config.toml", copied / "space-1")
    assert cli(words(data, copied, "space,bpe:300", "--seeds", "2", "--json")) == 0
    said = capfd.readouterr()
    now, again = results_of(copied), json.loads(said.out)
    assert now | before == now and now.keys() - before.keys() == {"bpe-300-1"}
    models, old = ({model["model"]: model for model in each["models"]} for each in (again, found))
    assert models.keys() == {"space", "bpe:300"} and models["space"] == old["space"]
    seeds, level = models["bpe:300"]["seeds"], models["bpe:300"]["bits_per_byte"]
    assert seeds.keys() == {"0", "1"} and seeds["0"] == old["bpe:300"]["bits_per_byte"] != seeds["1"]
    assert level == pytest.approx(fmean(seeds.values())) and level == pytest.approx(seeds["0"], rel=0.2)
    row = next(row for row in results.rows(again) if row[0] == "bpe:300")
    assert row[3] == f"{min(seeds.values()):.3f} to {max(seeds.values()):.3f}"
    ((name, reason),) = again["failed"].items()
    assert name == "space, seed 1" and "train.seed was 0, now 1" in reason
    assert f"{name} failed: {reason}" in said.err and reason in Page((copied / "index.html").read_text()).text


def test_a_model_that_diverges_is_told_and_where_no_other_came_to_an_end_it_is_an_error(
    copied: Path, data: str, capfd: pytest.CaptureFixture[str]
) -> None:
    plan = json.loads((copied / "plan.json").read_bytes())
    plan["models"][MODELS[0]]["config"]["train"] |= {"learning_rate": 1e30, "warmup": 0}
    (copied / "plan.json").write_text(json.dumps(plan))
    shutil.rmtree(run_of(copied, MODELS[0]))
    assert cli(words(data, copied, MODELS[0])) == 6
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("bytelm: ")]
    assert len(lines) == 1 and "10 consecutive steps with a non-finite" in lines[0] and "no model finished" in lines[0]


KILLED = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(("code", "said"), [(KILLED, "killed by signal 9"), ("raise SystemExit(3)", "3")])
def test_a_worker_that_dies_without_a_word_is_told(
    copied: Path, data: str, code: str, said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def dying(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        job = json.loads(command[-1])
        assert (job["name"], job["device"]) == ("space", "cpu")
        return subprocess.Popen([sys.executable, "-c", code], **options)

    monkeypatch.setattr(run, "subprocess", SimpleNamespace(Popen=dying, TimeoutExpired=subprocess.TimeoutExpired))
    (copied / "space-0" / "result.json").unlink()
    assert cli(words(data, copied, ",".join(MODELS), "--json", "--device", "cpu")) == 0
    again = json.loads(capfd.readouterr().out)
    assert {model["model"] for model in again["models"]} == set(MODELS[:2])
    reason = again["failed"]["space, seed 0"]
    assert len(again["failed"]) == 1 and said in reason and ("signal" in reason) == (code == KILLED)


# ---- bad input


@pytest.mark.parametrize(
    ("said", "code", "more"),
    [
        ("budget was 130000000000.0, now 200000000000.0", 2, ["2e11"]),
        ("match was 'flops', now 'bytes'", 2, [BUDGET, "--match", "bytes"]),
        ("held_out was [], now", 2, [BUDGET, "--held-out", __file__]),
        ("has changed since it was packed", 3, [BUDGET]),
    ],
)
def test_another_comparison_in_the_same_place_is_refused(
    begun: Begun, data: str, tmp_path: Path, said: str, code: int, more: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copy(data, tmp_path) if "changed" in said else data
    assert cli(words(source, begun.home, MODELS[0], *more[1:], budget=more[0])) == code
    err = capfd.readouterr().err
    assert said in err and err.count("\n") == 1
    assert results_of(begun.home) == begun.results[-1] and (begun.home / "plan.json").read_bytes() == begun.plans[-1]


BAD = [
    ("nothing to compare on", 2, ["compare"]),
    ("standard input", 2, ["compare", "-"]),
    ("--seeds 0", 2, ["compare", "{data}", "--seeds", "0"]),
    *((f"budget {bad}", 2, ["compare", "{data}", f"--budget={bad}"]) for bad in ("0", "-1", "nan", "inf")),
    ("did you mean 'perceiver'?", 2, ["compare", "{data}", "--models", "byte,perceever"]),
    ("more --budget", 2, ["compare", "{data}", "--budget", "1e9"]),
    ("no such file or folder", 3, ["compare", "{home}/nowhere"]),
    ("bytes to learn from are too few to compare models: give 65,536 or more", 3, ["compare", "{few}"]),
    ("tokenizers, which is not installed: pip install 'bytelm[bpe]'", 2, ["compare", "{data}", "--models", "bpe:300"]),
    ("byte-window:32: a step takes", 5, ["compare", "{data}"]),
]


@pytest.mark.parametrize(("said", "code", "given"), BAD, ids=[row[0] for row in BAD])
def test_bad_input_is_one_line_before_anything_is_trained(
    data: str, tmp_path: Path, said: str, code: int, given: list[str], capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(run, "trained", None)
    if "a step takes" in said:
        monkeypatch.setattr(run, "memory", lambda _: Memory(1, 1))
    if "tokenizers" in said:
        monkeypatch.setitem(sys.modules, "tokenizers", None)
    few = write_data(tmp_path / "few.jsonl", 9000) if "too few" in said else ""
    given = [word.format(data=data, home=tmp_path, few=few) for word in given]
    given += [] if "--budget" in " ".join(given) else ["--budget", BUDGET]
    given += [] if "--models" in given else ["--models", MODELS[0]]
    assert cli([*given, "--quiet", "--run", str(tmp_path / "home")]) == code
    err = capfd.readouterr().err
    assert said in err and err.startswith("bytelm: ") and err.count("\n") == 1
    assert not list(tmp_path.glob("home/*-0")) and not (tmp_path / "home" / "results.json").exists()


# ---- a look before, and bytes of one's own


def test_a_dry_run_says_what_it_would_take_and_trains_nothing(
    data: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "trained", None)
    monkeypatch.setattr(run, "bytes_per_second", lambda config, mean: 1000.0)

    def shown(models: str, *more: str) -> list[list[str]]:
        assert cli(words(data, tmp_path / "home", models, "--dry-run", *more)) == 0
        return [line.split() for line in capfd.readouterr().out.splitlines() if line.strip()][2:]

    def clock(seconds: float) -> str:
        return f"{round(seconds) // 60}:{round(seconds) % 60:02d}"

    rows = shown("byte-window:32,space")
    plan = json.loads((tmp_path / "home" / "plan.json").read_bytes())["models"]
    seconds = [plan[name]["bytes"] / 1000 for name in ("byte-window:32", "space")]
    assert [row[0] for row in rows] == ["byte-window:32", "space", "all"]
    assert [row[-1] for row in rows] == [*map(clock, seconds), clock(sum(seconds))]
    assert f"{plan['space']['costs']['executed'] / 1e6:.3g}" in rows[1]
    # Of those that are asked for now, every seed.
    rows = shown("space", "--seeds", "2")
    assert [row[0] for row in rows] == ["space", "all,"] and rows[1][-1] == clock(2 * seconds[1])
    assert not list(tmp_path.glob("home/*-0")) and not (tmp_path / "home" / "results.json").exists()


@pytest.mark.parametrize("where", ["elsewhere", "after a command that came to nothing", "among the paths"])
def test_files_of_ones_own_are_what_is_measured_and_nothing_is_learnt_from(
    data: str, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "bytes_per_second", lambda config, mean: 1000.0)
    home, folder = tmp_path / "home", tmp_path / "folder"
    folder.mkdir()
    shutil.copy(data, folder)
    own = (folder if "among" in where else tmp_path) / "own.txt"
    own.write_bytes(b"measured " * 50)
    if "after" in where:
        assert cli(words(folder, home, MODELS[0], budget="1e9")) == 2
    command = words(folder, home, MODELS[0], "--held-out", str(own), "--dry-run")
    assert cli(command) == 0
    assert held_out.kept(home / "held-out.bin") == [(0, b"measured " * 50)]
    learnt = [data.tobytes() for _, data in iterate_documents(Corpus.open(home / "data"), "train")]
    assert not any(b"measured" in document for document in learnt)
    own.write_bytes(b"changed " * 50)  # nothing was trained yet: nothing binds
    assert cli(command) == 0
    assert held_out.kept(home / "held-out.bin") == [(0, b"changed " * 50)]


def test_data_packed_for_a_command_that_came_to_nothing_is_not_taken_for_another_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "bytes_per_second", lambda config, mean: 1000.0)
    home, genome, rng = tmp_path / "home", tmp_path / "genome.fa", random.Random(0)
    genome.write_text(">name\n" + "".join("".join(rng.choices("ACGT", k=70)) + "\n" for _ in range(1200)))
    assert cli(words(genome, home, MODELS[0], budget="1e9")) == 2
    assert cli(words(genome, home, MODELS[0], "--as", "dna", "--dry-run")) == 0
    kept = [data.tobytes() for _, data in iterate_documents(Corpus.open(home / "data"))]
    assert set(b"".join(kept)) == set(b"ACGT")


def test_a_folder_that_holds_other_runs_takes_a_comparison_too(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "bytes_per_second", lambda config, mean: 1000.0)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "config.toml").write_text("")
    assert cli(words(data, tmp_path, MODELS[0], "--dry-run")) == 0


def test_a_worker_looks_often_enough_for_a_curve(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where the budget is time: so many looks in the minutes there are."""
    seen: list[Any] = []
    stopped = SimpleNamespace(signal=signal.SIGTERM, progress=None)
    monkeypatch.setattr(worker, "train", lambda paths, config, run, **_: seen.append(config.train) or stopped)
    held_out.keep(tmp_path / "held-out.bin", [(0, b"a")])
    model = sized("byte-window", Budget("time", 1200.0, rate=1e9))
    plan = {"models": {"byte-window": model.mapping()}, "paths": [], "held_out": [], "speeds": {"byte-window": 5.0}}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    assert worker.work(tmp_path, "byte-window", 3, tmp_path, "cpu", True) == 128 + signal.SIGTERM
    assert (seen[0].eval_every_minutes, seen[0].minutes, seen[0].seed) == (20 / worker.LOOKS, 20.0, 3)
    assert seen[0].device == "cpu"


def test_steps_grow_where_there_are_many_of_them() -> None:
    """From 4096 bytes, which all that is published was trained with, to 64 KiB."""
    assert [step_of(n) for n in (0, 1.2e7, STEPS * 2 * STEP, 2e8, 1e12)] == [
        STEP,
        STEP,
        2 * STEP,
        LARGE_STEP,
        LARGE_STEP,
    ]
    assert all(n / step_of(n) >= STEPS for n in (1.7e7, 5e7, 1e9))


def test_wide_models_have_heads_of_64() -> None:
    shapes = {width: candidate("byte").tables(width, 0)["model"] for width in (128, 480, 512, 1008, 1024)}
    assert {width: width // shape["heads"] for width, shape in shapes.items()} == {
        128: 32,
        480: 32,
        512: 64,
        1008: 48,
        1024: 64,
    }
