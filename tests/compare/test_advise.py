"""What `bytelm advise` chooses: from known scaling laws and a known speed."""

from __future__ import annotations

import functools
import json
import math
import re
import shlex
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bytelm.cli import run
from bytelm.cli.advising import remarks
from bytelm.compare import advise, laws
from bytelm.compare.candidates import Candidate, candidate, families
from bytelm.compare.fitting import Law
from bytelm.compare.plan import EPOCHS, RATIO, Budget, Planned, planned
from bytelm.config import to_mapping
from bytelm.errors import BytelmError, DataError, ResourceError, UsageError
from bytelm.evaluate.compressors import compressed
from bytelm.evaluate.costs import costs
from bytelm.training.config import RunConfig
from bytelm.training.estimate import BESIDE, TRAINING
from bytelm.training.settings import configure
from fits import compared, law

RATE = 1e10  # FLOPs per second, of every model
TRUTHS = {"byte-window": law(1.5, 0.6, 0.05), "bpe:4096": law(1.2, 0.9, 0.2)}  # equal at 1e12
PATCHES = {"bpe:4096": 3.4}
HOURS = 1e13 / RATE / 3600
Data = advise.Data


@pytest.fixture(scope="module")
def fit() -> Any:
    return json.loads(json.dumps(laws.fit_all(compared(TRUTHS, patches=PATCHES))))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_bytes(b"".join(b"Line %d has words, and number %d.\n" % (n, n * n) for n in range(6000)))
    return str(path)


def speed(config: RunConfig, mean: float) -> float:
    """Bytes per second of a machine that does RATE."""
    return RATE / TRAINING / costs(config.recipe, config.train.context_length, mean).executed


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advise, "bytes_per_second", speed)
    monkeypatch.setattr(advise, "planned", remembered)


@functools.cache
def sized(name: str, budget: Budget, mean: float) -> Planned:
    return planned(candidate(name), budget, advise.Endless(), mean, None)


def remembered(one: Candidate, budget: Budget, corpus: Any, mean: float, modality: None) -> Planned:
    """`planned`, whose search for a shape takes longest."""
    return sized(one.name, budget, mean)


@pytest.fixture
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that no budget of the tests exhausts, and that are those of the fit."""
    monkeypatch.setattr(advise, "weighed", lambda paths, fit: Data(10**12, 9 * 10**11, None, 2.4, 1 << 19, True))


def chosen(found: Mapping[str, Any], model: str) -> Any:
    return next(one for one in found["choices"] if one["model"] == model)


# ---- what is chosen


@pytest.mark.usefixtures("plenty")
def test_every_model_gets_the_hours_and_is_judged_by_its_law(fit: Any) -> None:
    found = advise.advise(["books"], HOURS, fit)
    for model in fit["models"]:
        one, own = chosen(found, model["model"]), Law.of(model["law"])
        assert one["flops"] == pytest.approx(1e13, rel=1e-3) and one["hours"] == pytest.approx(HOURS, rel=1e-3)
        assert one["bits"] == pytest.approx(own.bits(1e13), rel=1e-6)
        assert (one["low"], one["high"]) == pytest.approx(own.interval(1e13, runs=1), rel=1e-6)
        assert one["bytes"] / one["parameters"] == pytest.approx(RATIO, rel=1.2)
        assert not one["limited"] and one["beyond"] == pytest.approx(1.0, rel=0.01)
    assert [one["bits"] for one in found["choices"]] == sorted(one["bits"] for one in found["choices"])
    assert chosen(found, "bpe:4096")["patch_size"] == 3.4 and chosen(found, "byte-window")["patch_size"] is None


@pytest.mark.usefixtures("plenty")
def test_the_best_model_depends_on_the_hours(fit: Any) -> None:
    best = [advise.advise(["books"], HOURS * times, fit)["choices"][0]["model"] for times in (0.06, 50)]
    assert best == ["byte-window", "bpe:4096"]


@pytest.mark.usefixtures("plenty")
def test_the_speed_is_measured_at_the_size_that_is_trained(fit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = list[int]()

    def slower(config: RunConfig, mean: float) -> float:
        """Large models do four times as many operations per second."""
        sizes.append(dim := to_mapping(config)["model"]["dim"])
        return speed(config, mean) * (4 if dim >= 64 else 1)

    only = {**fit, "models": [model for model in fit["models"] if model["model"] == "byte-window"]}
    monkeypatch.setattr(advise, "bytes_per_second", slower)
    found = advise.advise(["books"], 10 * HOURS, only)["choices"][0]
    assert len(sizes) == 2 and sizes[0] < 64 <= sizes[1]
    assert found["flops_per_second"] == pytest.approx(4 * RATE, rel=1e-6)
    assert found["flops"] == pytest.approx(4e14, rel=1e-3)


def test_little_data_limits_what_is_trained(fit: Any, text: str) -> None:
    found = advise.advise([text], HOURS, fit)
    size = Path(text).stat().st_size
    assert found["data"]["bytes"] == size and found["data"]["train_bytes"] == pytest.approx(0.9 * size, abs=1)
    for one in found["choices"]:
        assert one["limited"] and one["bytes"] <= EPOCHS * found["data"]["train_bytes"]
        assert one["epochs"] > EPOCHS / 2 and one["hours"] < HOURS / 2
        assert one["flops"] == pytest.approx(one["hours"] * 3600 * RATE, rel=1e-6)
        cost = one["flops"] / TRAINING / one["bytes"]  # of a byte: half as many parameters
        assert one["bytes"] / (cost / 2) > RATIO / 4, "as small as its bytes, or the smallest there is"
    best = found["choices"][0]
    train = advise.run_of(best).train
    assert (train.bytes, train.minutes) == (best["bytes"], None)
    assert [one["config"]["train"]["bytes"] for one in found["choices"]] == [one["bytes"] for one in found["choices"]]
    assert "--bytes" in advise.command([text], best) and "--minutes" not in advise.command([text], best)


def test_more_hours_than_the_data_is_enough_for_take_no_more_memory(fit: Any, text: str) -> None:
    enough = advise.advise([text], HOURS, fit)
    most = max(one["memory"] for one in enough["choices"])
    found = advise.advise([text], 1e4 * HOURS, fit, most_memory=most)
    assert found["excluded"] == {} and {one["limited"] for one in found["choices"]} == {True}
    assert [one["bytes"] for one in found["choices"]] == [one["bytes"] for one in enough["choices"]]


def test_n_gram_tables_read_the_files_once(text: str) -> None:
    tables = laws.fit_all(compared({"megabyte-across:8": law(1.2, 0.9, 0.2)}))
    (one,) = advise.advise([text], HOURS, tables)["choices"]
    assert one["limited"] and EPOCHS > 1 >= one["epochs"] > 0.5


def test_bits_of_other_files_are_carried_over_with_a_wider_interval(fit: Any, text: str) -> None:
    found = advise.advise([text], HOURS, fit)
    bzip2 = compressed([Path(text).read_bytes()])["bzip2"]
    assert not found["data"]["own"] and found["data"]["bzip2"] == pytest.approx(bzip2, rel=0.1)
    best = found["choices"][0]
    own = Law.of(next(model["law"] for model in fit["models"] if model["model"] == best["model"]))
    factor = math.sqrt(found["data"]["bzip2"] / 2.4)
    assert best["bits"] == pytest.approx(factor * own.bits(best["flops"]), rel=0.02)
    assert best["high"] / best["bits"] > advise.CARRIED and best["bits"] / best["low"] > advise.CARRIED
    same = {**fit, "corpus": fit["corpus"] | {"paths": [text]}}
    again = advise.advise([text], HOURS, same)["choices"][0]
    assert again["bits"] == pytest.approx(best["bits"] / factor) and again["high"] / again["bits"] < 1.1


@pytest.mark.usefixtures("plenty")
def test_what_does_not_fit_into_memory_is_left_out(fit: Any) -> None:
    needed = {one["model"]: one["memory"] for one in advise.advise(["books"], HOURS, fit)["choices"]}
    smallest = min(needed.values())
    assert smallest > BESIDE
    found = advise.advise(["books"], HOURS, fit, most_memory=smallest)
    assert {one["memory"] <= smallest for one in found["choices"]} == {True} and found["excluded"]
    assert "are allowed" in next(iter(found["excluded"].values()))
    with pytest.raises(ResourceError, match=r"no model .* byte-window: a step of it takes .* 1 MB are allowed"):
        advise.advise(["books"], HOURS, fit, most_memory=1e6)


@pytest.mark.usefixtures("plenty")
def test_a_law_of_three_budgets_comes_last_where_it_is_extrapolated(fit: Any) -> None:
    three = {budget: one for budget, one in compared({"byte-window": law(0.0, 1.5, 0.2)}).items() if budget <= 1e12}
    mixed = {**fit, "models": [fit["models"][1], laws.fit_all(three)["models"][0]]}
    within, beyond = (advise.advise(["books"], HOURS * times, mixed) for times in (0.06, 1))
    assert [one["model"] for one in within["choices"]] == ["byte-window", "bpe:4096"]
    assert [one["model"] for one in beyond["choices"]] == ["bpe:4096", "byte-window"]
    assert beyond["choices"][1]["bits"] < beyond["choices"][0]["bits"]
    (said,) = remarks(beyond)
    assert "caution:   byte-window: of 3 budgets" in said and remarks(within) == []


def test_a_budget_below_those_of_the_fit_is_said_to_be_extrapolated(fit: Any) -> None:
    def said(below: float) -> list[str]:
        best = {"limited": False, "beyond": 0.1, "below": below, "flops": 2e10, "form": "offset"}
        return remarks({"choices": [best], "data": {"own": True}, "excluded": {}})

    assert said(0.2) == ["caution:   0.2 of the smallest budget of the fit (1e+11 FLOPs): extrapolated"]
    assert said(1.0) == []


@pytest.mark.usefixtures("plenty")
def test_the_choice_knows_the_smallest_budget_of_its_law(fit: Any) -> None:
    (one, *_) = advise.advise(["books"], HOURS, fit)["choices"]
    assert one["below"] == pytest.approx(one["flops"] / min(fit["budgets"]), rel=0.01)


@pytest.mark.usefixtures("plenty")
def test_a_model_without_a_law_is_left_out_by_name(fit: Any) -> None:
    none = {**fit["models"][0], "law": None, "why": "runs at 2 budgets: 1 missing"}
    gone = {**fit["models"][0], "model": "no-such:3"}
    found = advise.advise(["books"], HOURS, {**fit, "models": [none, gone, *fit["models"][1:]]})
    assert "1 missing" in found["excluded"]["byte-window"] and "unknown model" in found["excluded"]["no-such:3"]
    assert len(found["choices"]) == 1


@pytest.mark.usefixtures("plenty")
def test_hours_for_which_there_is_no_shape_are_said(fit: Any) -> None:
    with pytest.raises(ResourceError, match=r"no shape of it suits 3\.6e\+07 FLOPs: give more --hours"):
        advise.advise(["books"], 1e-6, fit)


# ---- what is read


def test_a_sample_is_even_and_small(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(b"".join(b"%s%06d " % (name.encode(), n) for n in range(200_000)))
    total, kept = advise.sampled([str(tmp_path)], None, 1 << 18)
    assert total == 3_200_000 and 1 << 17 <= sum(map(len, kept)) <= 1 << 18
    assert sum(segment.count(b"a") for segment in kept) == pytest.approx(sum(s.count(b"b") for s in kept), rel=0.2)
    starts = [int(match[1]) for segment in kept if (match := re.search(rb"a(\d{6}) ", segment))]
    assert min(starts) < 20_000 and max(starts) > 170_000


def test_reading_ends_and_the_sizes_of_files_count(fit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(b"many words " * 9000)
    monkeypatch.setattr(advise, "MOST", 1000)
    assert advise.sampled([str(tmp_path)], None, 1 << 18)[0] == 99_000
    assert advise.weighed([str(tmp_path)], fit).bytes == 198_000


def test_a_packed_corpus_is_weighed_as_its_files_are(fit: Any, text: str, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    for part in range(40):
        (tmp_path / "notes" / f"{part}.txt").write_bytes(Path(text).read_bytes()[part * 5000 : (part + 1) * 5000])
    assert run(["data", "pack", str(tmp_path / "notes"), "--out", str(tmp_path / "pack"), "--quiet"]) == 0
    files, pack = (advise.weighed([str(tmp_path / name)], fit) for name in ("notes", "pack"))
    assert pack.bytes == files.bytes and pack.train_bytes == pytest.approx(files.train_bytes, rel=0.15)
    assert pack.bzip2 == pytest.approx(files.bzip2, rel=0.1)


def pictures(folder: Path) -> str:
    (folder / "a.png").write_bytes(b"\x89PNG" + bytes(100_000))
    return str(folder)


def empty(folder: Path) -> str:
    (folder / "a.txt").write_bytes(b"")
    return str(folder)


def small(folder: Path) -> str:
    (folder / "a.txt").write_bytes(b"few words " * 99)
    return str(folder)


FILES: list[tuple[Any, type[BytelmError], str]] = [
    (pictures, UsageError, "image, and the fit is of raw bytes: .*--as MODALITY --fit"),
    (empty, DataError, r"0 bytes to train on are too few: give 65,536"),
    (small, DataError, r"891 bytes to train on are too few"),
    (lambda folder: str(folder / "gone"), DataError, "gone"),
    (lambda folder: "-", UsageError, "standard input"),
]


@pytest.mark.parametrize(("made", "error", "said"), FILES)
def test_files_that_cannot_be_weighed_are_refused(
    fit: Any, tmp_path: Path, made: Any, error: type[BytelmError], said: str
) -> None:
    with pytest.raises(error, match=said):
        advise.advise([made(tmp_path)], 1.0, fit)


@pytest.mark.parametrize("hours", [0.0, -1.0, math.inf, math.nan])
def test_hours_must_be_above_zero(fit: Any, hours: float) -> None:
    with pytest.raises(UsageError, match="--hours"):
        advise.advise(["books"], hours, fit)


def test_without_a_fit_the_command_that_makes_one_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(advise, "SHIPPED", "none.json")
    with pytest.raises(UsageError, match=r"bytelm compare PATH --models .* --fit --run HOME"):
        advise.fit_of(None)


# ---- what to do


@pytest.mark.parametrize("name", [name for name in families() if name != "megabyte_pytorch"])
def test_the_command_gives_the_configuration_that_was_planned(name: str, tmp_path: Path) -> None:
    plan = planned(candidate(name), Budget("flops", 1e13), advise.Endless(), 4.0, None)
    choice = {"config": Planned.of(plan.mapping()).config, "hours": 1.23456, "bytes": plan.bytes, "limited": False}
    wanted = advise.run_of(choice)
    assert wanted.train.minutes == 74.07 and wanted.train.bytes is None
    words = shlex.split(advise.command(["a b.txt"], choice, "cpu"))
    assert words[:3] == ["bytelm", "train", "a b.txt"] and words[-4:] == ["--minutes", "74.07", "--device", "cpu"]
    sets = [value for word, value in pairwise(words) if word == "--set"]
    assert configure(words[words.index("--preset") + 1], sets=sets, minutes=74.07) == wanted
    assert len(sets) < 16, "another preset would be nearer"


def test_the_command_line(fit: Any, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "fit.json").write_text(json.dumps(fit))
    file = tmp_path / "chosen.toml"
    words = ["advise", text, "--hours", f"{HOURS}", "--fit", str(tmp_path), "--device", "cpu"]
    assert run([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    best = found["choices"][0]
    assert found["preset"] in found["command"] and found["settings"] and best["limited"]
    assert run([*words, "--write", str(file)]) == 0
    shown = capsys.readouterr().out
    assert f"train:     {best['model']} (preset {found['preset']})" in shown
    assert f"{best['bits']:.3f} bits per byte ({best['low']:.3f} to {best['high']:.3f})" in shown
    assert f"{found['choices'][1]['bits'] - best['bits']:+.3f}" in shown
    assert "caution:   bits per byte are a guess" in shown and "limit:     the data" in shown
    limit = f"--bytes {best['bytes']} --device cpu"
    assert f"next:      bytelm train {text} --config {file} {limit}" in shown and limit in found["command"]
    of_file, of_preset = configure(None, file), configure(found["preset"], sets=found["settings"], bytes=best["bytes"])
    assert of_file == of_preset == advise.run_of(best)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--hours", "0"], 2, "--hours 0: must be above 0"),
        (["--hours", "inf"], 2, "--hours inf: must be above 0 and finite"),
        (["--hours", "1", "--memory", "nan"], 2, "--memory nan: must be above 0 and finite, in gigabytes"),
        (["--hours", "1", "--memory", "inf"], 2, "--memory inf: must be"),
        (["--hours", "1", "--memory", "0"], 2, "--memory 0: must be"),
        (["--hours", "1", "--write", "."], 5, "cannot write . (a folder"),
        (["--hours", "1", "--write", "none/x.toml"], 5, "cannot write none/x.toml (a folder, or in none that is there"),
        (["--hours", "1", "--memory", "0.001"], 5, "1 MB are allowed"),
        ([], 2, "hours"),
    ],
)
def test_what_the_command_refuses(
    fit: Any, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    (tmp_path / "fit.json").write_text(json.dumps(fit))
    assert run(["advise", text, *words, "--fit", str(tmp_path / "fit.json")]) == code
    assert said in capsys.readouterr().err.replace("\n", " ")


def test_laws_come_with_bytelm() -> None:
    """Of files that are named in words: nobody's folders; all have a limit, and predict their largest budget."""
    fit = advise.fit_of(None)
    assert all("/" not in path for path in fit["corpus"]["paths"]) and fit["corpus"]["measured_bytes"] > 500_000
    forms = {model["model"]: model["law"]["form"] for model in fit["models"]}
    assert forms.keys() == {
        *("megabyte-across", "byte-window-ngrams", "space", "blt", "hnet", "bpe-ngrams:4096", "bpe:4096")
    }
    assert "power" not in forms.values()
    for model in fit["models"]:
        assert candidate(model["model"]).name == model["model"]
        assert model["held_out"]["inside"]
