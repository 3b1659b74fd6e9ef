"""Results of a sweep: one mapping (JSON), a table, a picture and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from bytelm.compare.results import averaged, difference
from bytelm.config import dump_toml
from bytelm.data.files import write_whole
from bytelm.report.charts import Bar, bar_chart, line_chart, page
from bytelm.report.markup import Figure, Table, rendered
from bytelm.sweep.plan import Plan
from bytelm.sweep.run import Outcome, Rung, bits_in, failed, shown
from bytelm.sweep.space import show
from bytelm.units import show_bytes, show_count, show_seconds

RESULTS, PICTURE, PAGE, BEST = "results.json", "picture.svg", "index.html", "best.toml"
DRAWN = 10  # best trials in charts
FAR = 3  # from this ratio of the largest to the smallest value on, an axis is logarithmic


def summary(outcome: Outcome) -> dict[str, Any]:
    """Everything, as JSON: trials from best to worst; of a trial, its last round counts."""
    plan = outcome.plan
    assert plan is not None
    last = {trial: rung for rung in outcome.rungs for trial in rung.trials if trial in rung.results}
    order = sorted(last, key=lambda trial: (-last[trial].share, last[trial].bits(trial)))
    best = order[0] if order else None
    keys = list(dict.fromkeys(key for trial in plan.trials for key in trial))
    return {
        "paths": plan.paths,
        "search": plan.search,
        "over": plan.over,
        "keys": keys,
        "trials": [of_trial(trial, last[trial], plan, best) for trial in order],
        "rounds": [{"share": rung.share, "trials": len(rung.trials)} for rung in outcome.rungs],
        "failed": failed(outcome.rungs, plan),
    }


def of_trial(trial: int, rung: Rung, plan: Plan, best: int | None) -> dict[str, Any]:
    """One trial; figures are means over seeds."""
    results = rung.results[trial]
    valid, test = ([bits_in(result[split]) for result in results] for split in ("valid", "test"))
    apart: dict[str, Any] | None = None
    if best is not None and trial != best and best in rung.results:
        own, first = (
            averaged([{"documents": result["valid"]} for result in rung.results[one]]) for one in (trial, best)
        )
        apart = difference(own, first, valid, [bits_in(result["valid"]) for result in rung.results[best]])
    return {
        "trial": trial,
        "set": plan.trials[trial],
        "share": rung.share,
        "bits_per_byte": fmean(valid),
        "test_bits_per_byte": fmean(test),
        "seeds": {str(result["seed"]): bits for result, bits in zip(results, valid, strict=True)},
        "difference": apart,
        **{key: fmean(result[key] for result in results) for key in ("trained_bytes", "seconds", "peak_memory")},
        "parameters": results[0]["parameters"],
        "curve": results[0]["curve"],
    }


def head(found: Mapping[str, Any]) -> list[str]:
    """The columns of the table."""
    more = ["of the budget"] if len(found["rounds"]) > 1 else []
    columns = ["validation", "difference to best", "seeds", "test", "parameters", "training bytes", "time"]
    return ["trial", *found["keys"], *columns, *more]


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """One row per trial, from best to worst."""
    return [_row(trial, found) for trial in found["trials"]]


def _row(trial: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    seeds, apart = list(trial["seeds"].values()), trial["difference"]
    more = "" if apart is None or apart["low"] is None else f" ({apart['low']:.3f} to {apart['high']:.3f})"
    return [
        str(trial["trial"]),
        *(show(trial["set"][key]) if key in trial["set"] else "–" for key in found["keys"]),
        f"{trial['bits_per_byte']:.3f}",
        "–" if apart is None else f"{apart['difference']:+.3f}{more}",
        f"{min(seeds):.3f} to {max(seeds):.3f}" if len(seeds) > 1 else "1",
        f"{trial['test_bits_per_byte']:.3f}",
        show_count(trial["parameters"]),
        show_bytes(trial["trained_bytes"]),
        show_seconds(trial["seconds"]),
        *([f"{trial['share']:.2g}"] if len(found["rounds"]) > 1 else []),
    ]


def figures(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The best trials, what each numeric key does, and learning curves; with captions."""
    trials = found["trials"][:DRAWN]
    names = [name_of(trial, trials) for trial in trials]
    bars = [Bar(name, trial["bits_per_byte"], ours=True) for name, trial in zip(names, trials, strict=True)]
    drawn = [
        (
            bar_chart(bars, "bits per byte", "Bits per byte of the best trials"),
            f"Validation, the best trials, by {', '.join(found['keys'])}.",
        )
    ]
    for key in found["keys"]:
        if points := against(key, found["trials"]):
            label = f"Bits per byte against {key}"
            tried = [x for x, _ in points["all"]]
            log = min(tried) > 0 and max(tried) > FAR * min(tried)
            caption = f"Validation against {key}: every trial, and the best of each value."
            drawn.append((line_chart(points, key, "bits per byte", label, log, apart={"all"}), caption))
    curves = {
        name: [(bytes, bits) for bytes, bits in trial["curve"]] for name, trial in zip(names, trials, strict=True)
    }
    label = "Validation loss during training (seed 0)"
    if any(len(points) > 1 for points in curves.values()):
        drawn.append((line_chart(curves, "training bytes", "bits per byte", label, True, show_bytes), f"{label}."))
    return drawn


def name_of(trial: Mapping[str, Any], among: Sequence[Mapping[str, Any]]) -> str:
    """A trial by its number, and what it sets of the keys in which those of a chart differ: "3: 0.008, 2"."""
    keys = [key for key in trial["set"] if len({repr(other["set"].get(key)) for other in among}) > 1]
    told = ", ".join(show(trial["set"][key]) for key in keys)
    return f"{trial['trial']}: {told}" if told else f"trial {trial['trial']}"


def against(key: str, trials: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]] | None:
    """Bits per byte of all trials against a numeric key, and the best at each value; None for other keys."""
    share = max(trial["share"] for trial in trials)
    own = [(trial["set"].get(key), trial["bits_per_byte"]) for trial in trials if trial["share"] == share]
    points = [(float(x), bits) for x, bits in own if isinstance(x, int | float) and not isinstance(x, bool)]
    if len(points) < len(own) or len({x for x, _ in points}) < 2:
        return None
    best = {x: min(bits for other, bits in points if other == x) for x, _ in points}
    return {"best": sorted(best.items()), "all": points}


def write_all(found: Mapping[str, Any], plan: Plan, home: Path) -> None:
    """Write the results as JSON, the best configuration, the picture, and the page."""
    charts = figures(found)
    write_whole(home / RESULTS, (json.dumps(found, indent=1) + "\n").encode())
    best = found["trials"][0]
    said = f"# Trial {best['trial']} of {len(found['trials'])}: {shown(best['set'])}\n"
    write_whole(home / BEST, (said + dump_toml(plan.configs[best["trial"]])).encode())
    write_whole(home / PICTURE, page([charts]).encode())
    write_whole(home / PAGE, html(found, plan, charts).encode())


def html(found: Mapping[str, Any], plan: Plan, charts: Sequence[tuple[str, str]]) -> str:
    """The whole page."""
    return rendered(
        "sweep.html",
        title=f"{len(plan.trials)} trials swept by bytelm",
        paths=", ".join(found["paths"]),
        over=" · ".join(found["over"]),
        figures=[[Figure(chart, caption)] for chart, caption in charts],
        trials=Table(head(found), rows(found)),
        failed=found["failed"],
        best=dump_toml(plan.configs[found["trials"][0]["trial"]]),
    )
