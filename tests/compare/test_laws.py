"""Scaling laws are found again in runs that follow one, with intervals that cover; and what does not determine one is
refused or said."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bytelm.compare import fitting, laws, laws_page
from bytelm.compare.fitting import Law, fit_law
from bytelm.compare.optima import Sizes, optimum
from bytelm.errors import DataError, UsageError
from bytelm.report.charts import BOTTOM, TOP, Fitted, fitted_chart
from fits import BUDGETS, compared, law, model, results

TRUTH = (1.0, 1.2, 0.15)  # of a law over C / 1e12


def runs(truth: Any, budgets: Any, seeds: int, spread: float, shared: float, seed: int) -> tuple[Any, Any, Any]:
    """FLOPs, bits and the number of the budget: noise of each run, and one that runs of a budget share."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(budgets)), seeds)
    noise = spread * rng.standard_normal(len(group)) + shared * rng.standard_normal(len(budgets))[group]
    flops = np.array(budgets, np.float64)[group]
    return flops, np.array([truth(at) for at in flops]) * np.exp(noise), group


# ---- one law


@pytest.mark.parametrize(("offset", "exponent"), [(1.0, 0.15), (0.3, 0.06), (1.7, 0.5), (0.0, 0.08)])
def test_a_law_without_noise_is_found_exactly(offset: float, exponent: float) -> None:
    truth = law(offset, 1.3, exponent)
    found = fit_law(*runs(truth, BUDGETS, 1, 0.0, 0.0, 0), draws=10)
    assert found.form == "offset"
    assert found.exponent == pytest.approx(exponent, rel=0.02) and found.offset == pytest.approx(offset, abs=0.02)
    assert found.bits(1e15) == pytest.approx(truth(1e15), rel=2e-3)


def test_one_wild_run_moves_the_law_little() -> None:
    truth = law(*TRUTH)
    flops, bits, group = runs(truth, BUDGETS, 3, 0.001, 0.0, 0)
    bits[7] *= 1.3
    assert fit_law(flops, bits, group, draws=10).bits(1e14) == pytest.approx(truth(1e14), rel=5e-3)


def covered(budgets: Any, seeds: int, spread: float, shared: float, sets: int = 30) -> dict[str, float]:
    """How many of the intervals contain what is true: of the exponent, the curve, and three new runs."""
    truth, found = law(*TRUTH), dict.fromkeys(("exponent", "curve", "runs"), 0)
    rng = np.random.default_rng(0)
    for seed in range(sets):
        fitted = fit_law(*runs(truth, budgets, seeds, spread, shared, seed), draws=50)
        far = 10 * max(budgets)
        new = truth(far) * math.exp(spread * rng.standard_normal(3).mean() + shared * rng.standard_normal())
        low, high = fitted.intervals["exponent"]
        found["exponent"] += low <= TRUTH[2] <= high
        for what, value, (low, high) in (
            ("curve", truth(far), fitted.interval(far)),
            ("runs", new, fitted.interval(far, runs=3)),
        ):
            found[what] += low <= value <= high
    return {what: count / sets for what, count in found.items()}


@pytest.mark.parametrize(
    ("budgets", "seeds", "spread", "shared"),
    [
        pytest.param(BUDGETS, 3, 0.01, 0.0, id="seeds differ"),
        pytest.param(BUDGETS, 3, 0.004, 0.01, id="budgets differ more"),
        pytest.param(BUDGETS[:4], 1, 0.01, 0.0, id="one run each, one degree of freedom"),
    ],
)
def test_intervals_cover(budgets: Any, seeds: int, spread: float, shared: float) -> None:
    found = covered(budgets, seeds, spread, shared)
    assert min(found.values()) >= 0.85, found


def test_intervals_are_not_just_wide() -> None:
    truth = law(*TRUTH)
    low, high = fit_law(*runs(truth, BUDGETS, 3, 0.003, 0.0, 1)).interval(1e14)
    assert high - low < 0.1 * truth(1e14)
    nearer, further = (fit_law(*runs(truth, BUDGETS, 3, s, 0.0, 1)).interval(1e14) for s in (0.001, 0.01))
    assert nearer[1] - nearer[0] < (further[1] - further[0]) / 3


def test_what_is_drawn_follows_from_the_runs() -> None:
    truth = law(*TRUTH)
    assert fit_law(*runs(truth, BUDGETS, 3, 0.01, 0.0, 1), draws=10).resampled == "runs"
    found = fit_law(*runs(truth, BUDGETS, 3, 0.001, 0.02, 2), draws=10)
    assert found.resampled == "budgets" and found.freedom == 2


def test_new_runs_are_less_certain_than_the_curve_and_one_less_than_the_mean_of_several() -> None:
    found = fit_law(*runs(law(*TRUTH), BUDGETS, 3, 0.01, 0.0, 1))
    curve, four, one = (high - low for low, high in (found.interval(1e12, runs=count) for count in (None, 4, 1)))
    assert 1.1 * curve < four and 1.3 * four < one


def test_three_budgets_give_a_power_law_and_say_so() -> None:
    found = fit_law(*runs(law(0.0, 2.0, 0.08), BUDGETS[:3], 2, 0.0, 0.0, 0), draws=10)
    assert found.form == "power" and found.offset == 0.0 and "offset" not in found.intervals
    assert found.exponent == pytest.approx(0.08, rel=1e-3)
    with pytest.raises(ValueError, match="needs 3"):
        fit_law(*runs(law(*TRUTH), BUDGETS[:2], 2, 0.01, 0.0, 0))


def test_a_law_survives_json() -> None:
    found = fit_law(*runs(law(*TRUTH), BUDGETS, 2, 0.01, 0.0, 0), draws=20)
    again = Law.of(json.loads(json.dumps(found.mapping())))
    assert again.interval(1e14, 2) == pytest.approx(found.interval(1e14, 2), rel=1e-4)
    assert again.bits(1e14) == found.bits(1e14) and again.intervals == found.intervals


# ---- the best size


def surface(best: float, spread: float, seeds: int, sizes: Any, budget: float, seed: int = 0) -> Sizes:
    """Runs whose log bits are a parabola in log size with its vertex at `best`."""
    rng = np.random.default_rng(seed)
    x = np.repeat(np.array(sizes, np.float64), seeds)
    bits = 2.0 * np.exp(0.03 * np.log(x / best) ** 2 + spread * rng.standard_normal(len(x)))
    return Sizes(budget, x, bits, budget / 6 / x)


def test_the_best_size_and_its_power_law_are_found() -> None:
    truth = [1e5 * (budget / 1e12) ** 0.5 for budget in BUDGETS]
    grids = [[size / 4, size / 1.5, size * 1.5, size * 4] for size in truth]
    at = list(zip(truth, grids, BUDGETS, strict=True))
    exact = optimum([surface(best, 0.0, 1, grid, budget) for best, grid, budget in at])
    assert exact is not None and exact.exponent == pytest.approx(0.5, abs=1e-6)
    assert [one.size for one in exact.minima] == pytest.approx(truth, rel=1e-6)
    assert exact.size(1e14) == pytest.approx(1e6, rel=1e-6)
    assert exact.minima[0].bytes == pytest.approx(BUDGETS[0] / 6 / truth[0], rel=1e-6)
    inside = 0
    for seed in range(40):
        found = optimum([surface(best, 0.004, 2, grid, b, seed * 9 + i) for i, (best, grid, b) in enumerate(at)], 100)
        assert found is not None and found.interval is not None
        inside += found.interval[0] <= 0.5 <= found.interval[1]
    assert inside >= 34


@pytest.mark.parametrize(("best", "place"), [(1e4, "smallest"), (1e7, "largest")])
def test_an_optimum_outside_the_sizes_is_said_to_be_at_the_edge(best: float, place: str) -> None:
    found = optimum([surface(best, 0.0, 1, (1e5, 2e5, 4e5), budget) for budget in BUDGETS])
    assert found is not None and {one.place for one in found.minima} == {place}
    assert found.minima[0].size == pytest.approx(1e5 if place == "smallest" else 4e5)
    assert found.exponent is None and found.size(1e13) is None


def test_two_sizes_have_no_optimum_and_no_spare_run_no_interval() -> None:
    assert optimum([surface(2e5, 0.0, 3, (1e5, 1.001e5, 4e5), 1e12)]) is None
    found = optimum([surface(2e5, 0.0, 1, (1e5, 2e5, 4e5), budget) for budget in BUDGETS[:2]])
    assert found is not None and found.exponent == pytest.approx(0.0, abs=1e-9)
    assert found.interval is None and found.minima[0].interval is None


# ---- the fit of a comparison


def test_models_are_fitted_and_checked_at_the_largest_budget() -> None:
    truths = {"blt:5": law(*TRUTH), "bpe:4096": law(0.9, 1.35, 0.2)}
    fit = json.loads(json.dumps(laws.fit_all(compared(truths))))
    assert fit["budgets"] == list(BUDGETS) and fit["corpus"]["compressors"]["bzip2"] == 2.4
    for name, truth in truths.items():
        (found,) = (one for one in fit["models"] if one["model"] == name)
        assert Law.of(found["law"]).bits(1e14) == pytest.approx(truth(1e14), rel=0.02)
        check = found["held_out"]
        assert check["inside"] and check["budget"] == 1e13 and check["low"] < check["predicted"] < check["high"]
        assert check["measured"] == pytest.approx(truth(1e13), rel=0.01) and check["form"] == "offset"
        assert [point["budget"] for point in found["points"]] == list(BUDGETS)
    assert (fit["models"][0]["family"], fit["models"][0]["number"], fit["models"][0]["ratio"]) == ("blt", 5, 30.0)


def test_a_prediction_that_misses_is_said_to_miss() -> None:
    found = compared({"byte": law(*TRUTH)}, spread=0.001)
    found[1e13]["models"] = [model("byte", 1e13, [1.5, 1.501, 1.502])]
    fit = laws.fit_all(found)
    assert not fit["models"][0]["held_out"]["inside"]
    ((_, head, (row,)),) = laws_page.tables(fit)
    assert row[head.index("predicted")] == "miss" and row[head.index("measured")] == "1.501"


def test_diverged_and_failed_runs_are_left_out_and_listed() -> None:
    clean = compared({"byte": law(*TRUTH)}, spread=0.0)
    found = compared({"byte": law(*TRUTH)}, spread=0.0)
    found[1e12]["models"][0]["seeds"] |= {3: 8.2, 4: math.nan}
    found[3e11]["failed"] = {"byte, seed 5": "killed by signal 9"}
    fit = laws.fit_all(found)
    bits = {(run["seed"], run["budget"]): run["bits"] for run in fit["diverged"]}
    assert bits == {(3, 1e12): 8.2, (4, 1e12): None, (5, 3e11): None}
    assert fit["diverged"][2]["reason"] == "killed by signal 9" and json.dumps(fit, allow_nan=False)
    assert fit["models"][0]["law"] == laws.fit_all(clean)["models"][0]["law"]


def test_a_model_that_diverged_at_most_budgets_has_no_law() -> None:
    found = compared({"byte": law(*TRUTH), "linear": law(*TRUTH)})
    for budget in BUDGETS[2:]:
        found[budget]["models"][1]["seeds"] = {0: 8.0}
    linear = laws.fit_all(found)["models"][1]
    assert linear["law"] is None and linear["held_out"] is None and "1 missing" in linear["why"]


def with_sizes() -> dict[float, dict[str, Any]]:
    """Ratios 10, 30, 90 of one model and three patch sizes of it; the best ratio is 30, the best patch size 6."""

    def bits(budget: float, ratio: float, patch: float) -> float:
        return law(*TRUTH)(budget) * math.exp(0.02 * math.log(ratio / 30) ** 2 + 0.1 * math.log(patch / 6) ** 2)

    return {
        budget: results(
            budget,
            [model(f"blt:5@{r:g}", budget, [bits(budget, r, 5)], r, 5.0) for r in (10, 90)]
            + [model(f"blt:{p}", budget, [bits(budget, 30, p)], 30, float(p)) for p in (4, 5, 9)],
        )
        for budget in BUDGETS
    }


def test_the_best_size_and_patch_size_of_a_comparison_are_found() -> None:
    fit = json.loads(json.dumps(laws.fit_all(with_sizes())))
    sizes, patches = fit["optima"]
    assert (sizes["of"], patches["of"]) == ("parameters", "patch_size")
    assert sizes["models"] == ["blt:5", "blt:5@10", "blt:5@90"] and patches["models"] == ["blt:4", "blt:5", "blt:9"]
    assert sizes["exponent"] == pytest.approx(0.5, abs=0.01)
    assert [best["bytes"] / best["size"] for best in sizes["minima"]] == pytest.approx([30] * 5, rel=0.02)
    assert sizes["minima"][0]["size"] == pytest.approx(math.sqrt(1e11 / 180), rel=0.01)
    assert [best["size"] for best in patches["minima"]] == pytest.approx([6] * 5, rel=1e-3)
    two = {budget: one | {"models": one["models"][1:3]} for budget, one in with_sizes().items()}
    two = {budget: results(budget, [*one["models"], model("blt:5", budget, [2.0])]) for budget, one in two.items()}
    assert "an optimum needs 3" in laws.fit_all(two)["optima"][0]["why"]


REFUSED: list[tuple[Any, type[Exception], str]] = [
    (lambda: compared({"byte": law(*TRUTH)}, BUDGETS[:2]), UsageError, "give 1 more to --budget"),
    (lambda: compared({"byte": law(*TRUTH)}, BUDGETS[:1]), UsageError, "with 1 budget: .* give 2 more"),
    (lambda: changed(match="time"), UsageError, "--match time"),
    (lambda: changed(compressors={"bzip2": 2.5}), DataError, "held-out bytes at 1e.11"),
]


def changed(**keys: Any) -> dict[float, dict[str, Any]]:
    found = compared({"byte": law(*TRUTH)})
    found[1e11] |= keys
    return found


@pytest.mark.parametrize(("made", "error", "said"), REFUSED)
def test_results_that_give_no_law_are_refused(made: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        laws.fit_all(made())


# ---- files and pages


def test_a_fit_is_read_from_a_folder_or_a_file(tmp_path: Path) -> None:
    fit = laws.fit_all(compared({"byte": law(*TRUTH)}, seeds=1))
    (tmp_path / laws.FIT).write_text(json.dumps(fit))
    assert laws.read(tmp_path) == laws.read(tmp_path / laws.FIT) == json.loads(json.dumps(fit))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("{", "not JSON"),
        ("[]", "version None"),
        ('{"version": 99}', "version 99, and 1 is read"),
        ('{"version": 1}', "damaged .*models"),
        ('{"version": 1, "models": [{"model": "byte", "points": [], "law": {"form": "power"}}]}', "damaged"),
    ],
)
def test_a_fit_that_cannot_be_read_is_refused_by_name(tmp_path: Path, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / laws.FIT).write_text(text)
    with pytest.raises(DataError, match=f"{re.escape(laws.FIT)}.*{said}.*make one with"):
        laws.read(tmp_path)


def test_tables_and_charts_have_every_model() -> None:
    found = with_sizes()
    for budget in BUDGETS:
        found[budget]["models"] += [model("megabyte:8", budget, [2.5])]
    found[1e13]["models"][-1]["seeds"] = {0: 8.5}
    found[3e12]["failed"] = {"<bad>, seed 0": "died"}
    fit = json.loads(json.dumps(laws.fit_all(found)))
    shown = laws_page.tables(fit)
    titles = ["Scaling laws", "Best size at each budget", "Best patch size at each budget", "Runs left out"]
    assert [title for title, _, _ in shown] == titles
    assert all(len(row) == len(head) for _, head, rows in shown for row in rows)
    assert [row[0] for row in shown[0][2]] == [one["model"] for one in fit["models"]]
    assert [row[-1] for row in shown[3][2]] == ["8.500 bits per byte: it learned nothing", "died"]
    charts = laws_page.figures(fit)
    assert len(charts) == 3 and "predict it" in charts[0][1]
    assert charts[0][0].count("<polygon") == 6 and charts[0][0].count("<circle") == 29
    assert all("nan" not in svg for svg, _ in charts)


def test_a_wide_interval_is_cut_off_where_the_chart_ends() -> None:
    points = [(1e11, 3.0), (1e13, 2.0)]
    chart = fitted_chart({"a": Fitted(points, points, [(1e11, 0.1, 90.0), (1e13, 1.9, 2.1)])}, "x", "y", "title")
    outline = re.search(r'<polygon [^>]*points="([^"]*)"', chart)
    assert outline is not None
    heights = [float(point.split(",")[1]) for point in outline[1].split()]
    assert min(heights) == TOP and max(heights) == BOTTOM
    assert "no data yet" in fitted_chart({"a": Fitted([], [], [])}, "x", "y", "title")


def test_three_budgets_are_said_to_leave_the_limit_open() -> None:
    fit = laws.fit_all(compared({"byte": law(*TRUTH)}, BUDGETS[:3], seeds=1))
    ((_, head, (row,)),) = laws_page.tables(fit)
    assert row[head.index("limit")] == "0, not fitted" and row[-1] == "–" and fitting.NEEDED["power"] == 3
