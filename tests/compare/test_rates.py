"""Learning rates: as many trials for every family, chosen by validation alone; and several seeds and budgets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bytelm.cli import run as cli
from bytelm.compare import cells, laws, overview, prepare, rates, results
from bytelm.compare.candidates import candidate, candidates
from bytelm.compare.plan import RATIO, Budget
from bytelm.compare.prepare import ComparisonSpec, Place
from bytelm.errors import UsageError
from bytelm.evaluate.bits import DocumentBits
from bytelm.evaluate.meter import interval
from bytelm.training.config import TrainConfig
from bytelm.units import LN2
from comparisons import Found, sized, words
from fits import compared, law
from report_pages import Page

MODELS = candidates("blt:5,blt:8,bpe:300,blt:5@60")


def place(name: str, *models: str) -> Place:
    return Place(ComparisonSpec(["-"], "blt", "flops", (1e12,)), Path(name), {"models": dict.fromkeys(models)})


def test_every_family_gets_the_same_trials_at_each_budget_that_suits_it() -> None:
    small, large = place("small", "bpe:300"), place("large", *(model.name for model in MODELS))
    assert rates.trials(MODELS, small, 3) == [("bpe:300", factor) for factor in (0.5, 1.0, 2.0)]
    assert rates.trials(MODELS, large, 3) == [
        (name, factor) for factor in (0.5, 1.0, 2.0) for name in ("blt:5", "bpe:300")
    ]
    assert rates.trials(MODELS, large, 1) == []
    assert [rates.factors(count) for count in (2, 4)] == [[0.5, 1], [0.25, 0.5, 1, 2]]


@pytest.mark.parametrize(
    ("bits", "taken", "edge"),
    [
        ({"x0.5": 2.1, "x1": 2.0, "x2": 2.2}, 1.0, False),
        ({"x0.5": 2.1, "x1": 2.0, "x2": 1.9}, 2.0, True),
        ({"x0.5": 2.1, "x1": None, "x2": float("nan")}, 0.5, True),
        ({"x0.5": None, "x1": None, "x2": None}, 1.0, False),
    ],
)
def test_the_lowest_validation_loss_decides_and_what_diverged_cannot(
    bits: dict[str, float | None], taken: float, edge: bool
) -> None:
    chosen = rates.chosen(MODELS, {("blt:5", float(factor[1:])): loss for factor, loss in bits.items()})
    assert chosen["blt"]["taken"] == taken and chosen["blt"]["edge"] is edge
    assert list(chosen["blt"]["trials"]) == ["0.5", "1", "2"]
    assert [rates.factor(chosen, model) for model in MODELS] == [taken, taken, 1.0, taken]


def test_a_factor_is_of_the_models_own_learning_rate() -> None:
    for name in ("byte-window", "bpe:4096"):
        model = sized(name, Budget("flops", 1e13))
        assert model.run(0, 2.0).train.learning_rate == 2 * model.run(0).train.learning_rate
        assert model.run(0, 2.0).model == model.run(0).model
    plain = sized("byte-window", Budget("flops", 1e13))
    plain.config["train"].pop("learning_rate")
    assert plain.run(0, 0.5).train.learning_rate == 0.5 * TrainConfig(steps=1).learning_rate


def test_a_ratio_is_training_bytes_per_parameter() -> None:
    usual, twice = (sized(name, Budget("flops", 1e14)) for name in ("byte-window", f"byte-window@{2 * RATIO}"))
    for model, ratio in ((usual, RATIO), (twice, 2 * RATIO)):
        assert model.bytes is not None
        assert model.bytes / (model.costs.executed / 2) == pytest.approx(ratio, rel=0.15)
    assert candidate("blt:5@12.5").ratio == 12.5 and candidate("blt@60").number == candidate("blt").number
    assert candidate("bpe:300@60").without_ratio == "bpe:300" and candidate("bpe@60").family_name == "bpe"
    for bad in ("blt@", "blt@0.5", "blt@-3", "blt@nan", "blt@1e2", "blt@1.2.3"):
        with pytest.raises(UsageError, match="after @ give training bytes per parameter"):
            candidate(bad)
    with pytest.raises(UsageError, match="names blt:5@60 twice"):
        candidates("blt@60,blt:5,blt:5@60")


def test_a_page_of_several_budgets_has_the_laws_that_advise_reads(tmp_path: Path) -> None:
    truths = {"blt:5": law(1.2, 0.5, 0.2), "bpe:300": law(1.3, 0.5, 0.25)}
    shown = {"unsuited": {}, "rates": {}}
    found = {budget: {**shown, **one} for budget, one in compared(truths).items()}
    for budget, one in found.items():
        one["models"] = [{**model, "low": None, "high": None} for model in one["models"] if budget > 1e11]
    found[1e11]["unsuited"] = {"blt:5": "blt:5: this budget is too small"}
    found[1e13]["diverged"] = {"linear": {"0": "9.1 bits per byte"}}
    whole = overview.joined(found, fit=True)
    overview.write_all(whole, tmp_path)
    assert laws.read(tmp_path) == json.loads((tmp_path / "results.json").read_bytes())["fit"]
    page = Page((tmp_path / "index.html").read_text())
    page.assert_inert()
    for said in (
        "Scaling laws",
        "Runs left out",
        "1e11: blt:5: this budget is too small",
        "9.1 bits per byte",
        "diverged",
    ):
        assert said in page.text, said
    assert overview.table(whole)[1][-1] == ["linear", "–", "–", "–", "–", "diverged"]
    assert overview.joined(found)["fit"] is None


def documents(*nats: float) -> list[DocumentBits]:
    return [DocumentBits(str(number), 100, each) for number, each in enumerate(nats)]


def test_intervals_have_the_variance_among_seeds() -> None:
    """Against the formula of Student's interval, for one sample and for two with pooled variance."""
    assert results.of_seeds([2.0]) is None and results.of_seeds([2.0], [3.0]) is None
    assert results.of_seeds([1.9, 2.0, 2.1]) == pytest.approx(4.303 * 0.1 / 3**0.5)
    assert results.of_seeds([1.9, 2.0, 2.1], [3.0]) == pytest.approx(4.303 * 0.1 * (1 / 3 + 1) ** 0.5)
    assert results.of_seeds([1.9, 2.1], [3.0, 3.4]) == pytest.approx(4.303 * ((0.02 + 0.08) / 2 * 1) ** 0.5)
    assert results.of_seeds([2.0, 2.1] * 10) == pytest.approx(1.96 * 0.0512989 / 20**0.5, rel=1e-4)
    one, other = documents(100, 140, 120, 130), documents(110, 138, 141, 139)
    apart = [DocumentBits(a.name, a.bytes, a.nats - b.nats) for a, b in zip(one, other, strict=True)]
    low, high = interval(apart) or (0.0, 0.0)
    middle = sum(each.nats for each in apart) / 400 / LN2
    found = results.difference(one, other, [1.9, 2.0, 2.1], [2.0, 2.0, 2.0])
    more = 2.776 * (0.02 / 4 * 2 / 3) ** 0.5
    assert found["difference"] == pytest.approx(middle)
    assert found["low"] == pytest.approx(middle - ((middle - low) ** 2 + more**2) ** 0.5)
    assert found["high"] == pytest.approx(middle + ((high - middle) ** 2 + more**2) ** 0.5)
    assert results.difference(one, other, [2.0], [2.1]) == results.difference(one, other) != found
    assert results.level(one, [1.9, 2.1])["high"] > results.level(one, [2.0])["high"] == results.level(one)["high"]


@pytest.fixture(scope="module")
def home(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("several") / "home"
    assert cli(words(data, home, "byte-window:32", "--rates", "2", budget="2e11,1.3e11")) == 0
    return home


@pytest.fixture(scope="module")
def found(home: Path) -> Found:
    return json.loads((home / "results.json").read_bytes())


def test_several_budgets_are_as_many_comparisons_in_one_table(home: Path, found: Found) -> None:
    assert found["budgets"] == [1.3e11, 2e11] and found["fit"] is None
    assert list(found["comparisons"]) == ["1.3e11", "2e11"]
    for name, one in found["comparisons"].items():
        assert one == json.loads((home / name / "results.json").read_bytes())
        assert (home / name / "index.html").exists() and (home / name / "data").resolve() == (home / "data").resolve()
        (model,) = one["models"]
        assert model["training_flops"] == pytest.approx(float(name), rel=0.15)
        assert name in (page := (home / "index.html").read_text()) and f"{model['bits_per_byte']:.3f}" in page


def test_one_budget_of_several_is_asked_alone(
    home: Path, found: Found, data: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cells, "trained", None)
    assert cli(words(data, home, "byte-window:32", "--rates", "2", budget="2e11")) == 0
    assert f"full report: {home / '2e11'}" in capfd.readouterr().out
    assert json.loads((home / "results.json").read_bytes()) == found
    assert json.loads((home / "2e11" / "results.json").read_bytes()) == found["comparisons"]["2e11"]


def test_the_rate_that_was_chosen_at_a_budget_is_that_of_all_runs_of_the_family_there(home: Path, found: Found) -> None:
    assert not (home / "rates.json").exists() and "rates" not in found
    for name, one in found["comparisons"].items():
        chosen = json.loads((home / name / "rates.json").read_bytes())
        assert chosen == one["rates"] and list(chosen) == ["byte-window"]
        of = chosen["byte-window"]
        assert of["model"] == "byte-window:32" and list(of["trials"]) == ["0.5", "1"]
        assert all(1.5 > bits > 0.5 for bits in of["trials"].values())
        assert of["trials"][f"{of['taken']:g}"] == min(of["trials"].values())
        assert "Learning rates" in (home / name / "index.html").read_text()
        (model,) = one["models"]
        suffix = "" if of["taken"] == 1 else f"-rate-{of['taken']:g}"
        run = home / name / f"byte-window-32-0{suffix}"
        assert json.loads((run / "result.json").read_bytes())["factor"] == of["taken"]
        own = json.loads((home / name / "plan.json").read_bytes())["models"]["byte-window:32"]
        own = own["config"]["train"]["learning_rate"]
        assert model["config"]["train"]["learning_rate"] == pytest.approx(of["taken"] * own)


def test_a_model_is_left_out_at_a_budget_that_does_not_suit_it(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(prepare, "bytes_per_second", lambda config, mean: 1000.0)
    names = ("byte-window:32", "byte")
    assert cli(words(data, tmp_path, ",".join(names), "--dry-run", budget="1.3e11,3e11")) == 0
    out = capfd.readouterr().out
    assert out.count("byte-window:32") == 2 and out.count("no size suits this budget") == 1
    small, large = (json.loads((tmp_path / name / "plan.json").read_bytes()) for name in ("1.3e11", "3e11"))
    assert list(small["models"]) == ["byte-window:32"] and "more --budget" in small["unsuited"]["byte"]
    assert set(large["models"]) == set(names) and large["unsuited"] == {}
    assert cli(words(data, tmp_path / "other", "byte", "--dry-run", budget="1e11,1.3e11")) == 2
    assert "more --budget" in capfd.readouterr().err
