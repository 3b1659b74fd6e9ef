"""Comparisons: what is the same for all models, that every figure is what it says, and that nothing done is lost."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import asdict
from itertools import combinations, pairwise
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest

import bytelm
from bytelm.checkpoint.metrics import read_metrics
from bytelm.checkpoint.store import checkpoints
from bytelm.cli import run as cli
from bytelm.compare import cells, held_out, prepare, results, worker
from bytelm.compare.page import charts, show_power
from bytelm.compare.plan import EPOCHS, OFF, STEP, WINDOW, built
from bytelm.data.corpus import Corpus, iterate_documents
from bytelm.errors import ConfigError, DataError
from bytelm.evaluate.bits import DocumentBits
from bytelm.evaluate.costs import costs
from bytelm.evaluate.meter import interval
from bytelm.machine import Memory
from bytelm.report.charts import log_ticks
from bytelm.units import LN2
from comparisons import BUDGET, MODELS, Begun, Found, results_of, run_of, words, write_data
from report_pages import Page


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
        for words in (model["model"], f"{model['bits_per_byte']:.3f}"):  # noqa: F402
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
    monkeypatch.setattr(cells, "trained", None)
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


def test_a_run_stopped_while_it_was_measured_is_measured_and_not_trained_again(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copied / "bpe-300-0"
    first = json.loads((run / "result.json").read_bytes())
    shutil.rmtree(run / "checkpoints")
    for name in ("result.json", "metrics.jsonl"):
        (run / name).unlink()
    named = {"home": str(copied), "root": str(copied), "run": str(run), "name": "bpe:300"}
    job = json.dumps({**named, "seed": 0, "device": "cpu", "quiet": True})

    def stopped(*_: Any, **__: Any) -> Any:
        raise DataError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(worker, "measure", stopped)
        assert worker.main(job) == DataError.exit_code and not (run / "result.json").exists()
    steps = (run / "metrics.jsonl").read_text().count('"train"')
    assert worker.main(job) == 0 and (run / "metrics.jsonl").read_text().count('"train"') == steps > 0
    again = json.loads((run / "result.json").read_bytes())
    for a, b in zip(again["documents"], first["documents"], strict=True):
        assert a[:2] == b[:2] and a[2] == pytest.approx(b[2], rel=1e-5)
    for key in ("steps", "trained_bytes", "patch_size"):
        assert again[key] == first[key], key


def test_of_what_is_done_the_last_weights_stay(home: Path) -> None:
    for model in MODELS:
        run = run_of(home, model)
        (checkpoint,) = checkpoints(run)
        assert {file.name for file in checkpoint.iterdir()} == {"model.safetensors", "state.json", "MANIFEST.json"}
        assert bytelm.load(str(run)).bits(b"the quick brown fox")[0] > 0


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
    plan["models"][MODELS[0]]["config"]["train"] |= {"learning_rate": 1e30, "warmup_steps": 0}
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

    monkeypatch.setattr(cells, "subprocess", SimpleNamespace(Popen=dying, TimeoutExpired=subprocess.TimeoutExpired))
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
        ("paths was", 2, [BUDGET]),
    ],
)
def test_another_comparison_in_the_same_place_is_refused(
    begun: Begun, data: str, tmp_path: Path, said: str, code: int, more: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copy(data, tmp_path) if said.startswith(("has changed", "paths")) else data
    if said.startswith("has changed"):
        (tmp_path / Path(data).name).write_text('{"text": "other words"}\n' * 9999)
    assert cli(words(source, begun.home, MODELS[0], *more[1:], budget=more[0])) == code
    err = capfd.readouterr().err
    assert said in err and err.count("\n") == 1
    assert results_of(begun.home) == begun.results[-1] and (begun.home / "plan.json").read_bytes() == begun.plans[-1]


def test_a_copy_of_the_held_out_files_counts_by_its_content(data: str, tmp_path: Path) -> None:
    file = tmp_path / "held.txt"
    file.write_text("held out\n" * 99)
    spec = prepare.ComparisonSpec([data], "space", "flops", (1e11,), held_out=[str(file)])
    plan = prepare.plan_of(spec, tmp_path, begun=False)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    held_out.keep(tmp_path / "held-out.bin", prepare.held_out_of(spec))
    os.utime(file, ns=(5, 5))
    again = prepare.plan_of(spec, tmp_path, begun=True)
    assert again.pop("held_out_fingerprint") != plan.pop("held_out_fingerprint") and again == plan
    file.write_text("held OUT\n" * 99)
    with pytest.raises(ConfigError, match="held_out_fingerprint was"):
        prepare.plan_of(spec, tmp_path, begun=True)


BAD = [
    ("no files to read: name some, or folders, as in `bytelm compare ~/notes`", 2, ["compare"]),
    ("standard input", 2, ["compare", "-"]),
    ("--seeds 0", 2, ["compare", "{data}", "--seeds", "0"]),
    ("--fit with 1 budget: a scaling law needs 3", 2, ["compare", "{data}", "--fit"]),
    ("--fit with --match time", 2, ["compare", "{data}", "--fit", "--match", "time", "--budget", "1,2,3"]),
    ("--budget 1e12, 1e12: names one twice", 2, ["compare", "{data}", "--budget", "1e12,1e12"]),
    ("--budget 1e12;2e12: give a number", 2, ["compare", "{data}", "--budget", "1e12;2e12"]),
    ("--rates 10: give 1 to 9", 2, ["compare", "{data}", "--rates", "10"]),
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
    monkeypatch.setattr(cells, "trained", None)
    if "a step takes" in said:
        monkeypatch.setattr(prepare, "memory", lambda _: Memory(1, 1))
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
