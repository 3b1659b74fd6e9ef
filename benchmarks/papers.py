"""The papers' tables at small scale: all model kinds at equal FLOPs on prose, LaTeX, code, images and audio.

    python benchmarks/papers.py --data DATA --budget 3e12 --only books,code    resumes; prints the tables in Markdown
    python benchmarks/papers.py --data DATA --budget 3e12,1e13,3e13 --only books     the trend with the budget

DATA has one folder per corpus (see CORPORA), with a training and a test file. Each corpus and budget is one
`bytelm compare`, in RUNS/CORPUS-BUDGET.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bytelm.compare.page import write_all
from bytelm.compare.prepare import ComparisonSpec
from bytelm.compare.results import HEAD, HEAD_COSTS, rows, summary
from bytelm.compare.run import run_all
from bytelm.data.files import write_whole
from bytelm.errors import BytelmError
from bytelm.report.charts import line_chart, page
from bytelm.training.settings import modality_table

TEXT = "blt,space,megabyte,byte,byte-window,perceiver,linear,bpe:1024,bpe:4096"


@dataclass(frozen=True)
class Corpus:
    """A corpus, its counterpart in the papers, and suitable models."""

    learnt: str
    held_out: str
    stands_for: str
    models: str = TEXT
    modality: str | None = None


CORPORA = {
    "books": Corpus("books/train.txt.xz", "books/test.txt.xz", "PG-19"),
    "stories": Corpus("stories/train.txt.xz", "stories/test.txt.xz", "Stories"),
    "latex": Corpus("latex/train.tex.xz", "latex/test.tex.xz", "arXiv"),
    "code": Corpus("code/train.txt.xz", "code/test.txt.xz", "Code"),
    "images": Corpus(
        "images/natural64.train.npy.xz",
        "images/natural64.test.npy.xz",
        "Image64",
        "blt,megabyte:12,byte-window,linear",  # perceiver fits from 1.5e13 FLOPs, byte from 3.4e13
        "image:32:patch2",
    ),
    "audio": Corpus(
        "audio/utterances16k.train.s16le.xz",
        "audio/utterances16k.test.s16le.xz",
        "audio",
        "blt,megabyte:32,byte,byte-window,perceiver,linear",
        "audio:16k",
    ),
}

# Bits per byte. MEGABYTE, NeurIPS 2023: Table 1 (text, 80 billion bytes each), Table 4 (images), section 6 (audio).
MEGABYTE = {
    "PG-19": {"byte": 1.057, "perceiver": 1.104, "megabyte": 1.000},
    "Stories": {"byte": 1.064, "perceiver": 1.070, "megabyte": 0.978},
    "arXiv": {"byte": 0.816, "perceiver": 0.791, "megabyte": 0.678},
    "Code": {"byte": 0.575, "perceiver": 0.546, "megabyte": 0.411},
    "Image64": {"byte": 3.62, "perceiver": 3.55, "megabyte": 3.52},
    "audio": {"byte": 3.567, "perceiver": 3.543, "megabyte": 3.477},
}
# SpaceByte (arXiv 2404.14408), Table 1, 1e19 training FLOPs each; its BPE is SentencePiece.
SPACEBYTE = {
    "PG-19": {"byte": 1.138, "byte-window": 1.089, "megabyte": 1.083, "space": 1.009, "bpe": 0.989},
    "arXiv": {"byte": 0.909, "byte-window": 0.818, "megabyte": 0.822, "space": 0.748, "bpe": 0.768},
    "Code": {"byte": 0.655, "byte-window": 0.560, "megabyte": 0.570, "space": 0.500, "bpe": 0.508},
}
PAPERS = {"MEGABYTE": MEGABYTE, "SpaceByte": SPACEBYTE}


def markdown(found: Mapping[str, Any]) -> str:
    """The tables of a comparison in Markdown."""
    head = [*HEAD, *HEAD_COSTS]
    lines = [head, ["---"] * len(head), *rows(found)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def compared(name: str, budget: float, data: Path, runs: Path, seeds: int, models: str | None) -> dict[str, Any] | int:
    """The results of one corpus at one budget, or the signal that stopped it."""
    corpus, home = CORPORA[name], runs / f"{name}-{power(budget)}"
    table = modality_table(corpus.modality) if corpus.modality else None
    paths, held_out = [str(data / corpus.learnt)], [str(data / corpus.held_out)]
    asked = ComparisonSpec(paths, models or corpus.models, "flops", (budget,), seeds, held_out, table)
    (outcome,) = run_all(asked, home)
    if outcome.signal is not None:
        return outcome.signal
    for which, reason in outcome.failed.items():
        print(f"{name}: {which} failed: {reason}", file=sys.stderr)
    found = summary(outcome)
    write_all(found, home)
    return found


def kind(model: str) -> str:
    """A model without its number."""
    return model.partition(":")[0]


def best_of(found: Mapping[str, Any]) -> dict[str, float]:
    """Bits per byte of each kind, the best if there are several."""
    best: dict[str, float] = {}
    for model in found["models"]:
        best[kind(model["model"])] = min(model["bits_per_byte"], best.get(kind(model["model"]), 99.0))
    return best


def ratios(name: str, found: Mapping[str, Any]) -> Iterator[list[str]]:
    """One row per claim: bits per byte of a kind relative to MEGABYTE, here and in the papers."""
    ours = best_of(found)
    for other in (other for other in ours if other != "megabyte" and "megabyte" in ours):
        ratio = ours[other] / ours["megabyte"]
        row = [name, f"{other} / megabyte", f"{ratio:.3f}"]
        for table in PAPERS.values():
            theirs = table.get(CORPORA[name].stands_for, {})
            paper = theirs[other] / theirs["megabyte"] if other in theirs else None
            row.append("–" if paper is None else f"{paper:.3f}")
            row.append("–" if paper is None else "yes" if (ratio > 1) == (paper > 1) else "no")
        if any(cell != "–" for cell in row[3:]):
            yield row


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def trend(found: Mapping[float, Mapping[str, Any]]) -> str:
    """Bits per byte by budget, and the difference of each model to the better BPE model."""
    names = list(dict.fromkeys(model["model"] for one in found.values() for model in one["models"]))
    rows: list[list[str]] = []
    for name in names:
        row = [name]
        for one in found.values():
            bits = {model["model"]: model["bits_per_byte"] for model in one["models"]}
            to = best_of(one).get("bpe")
            gap = f" ({bits[name] - to:+.3f})" if name in bits and to is not None else ""
            row.append(f"{bits[name]:.3f}{gap}" if name in bits else "–")
        rows.append(row)
    return table(["model", *map(power, found)], rows)


def picture(found: Mapping[str, Mapping[float, Mapping[str, Any]]]) -> str:
    """Bits per byte against the budget, one chart per corpus, for models with several budgets, as an SVG file."""
    charts: list[tuple[str, str]] = []
    for name, budgets in found.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for budget, one in budgets.items():
            for model in one["models"]:
                lines.setdefault(model["model"], []).append((budget, model["bits_per_byte"]))
        lines = {model: points for model, points in lines.items() if len(points) > 1}
        title = f"{name}: bits per byte by budget"
        words = f"{name}: held-out bits per byte at each budget, every model sized to the budget."
        charts.append((line_chart(lines, "training FLOPs", "bits per byte", title, log_x=True, show_x=power), words))
    return page([charts[i : i + 2] for i in range(0, len(charts), 2)])


def power(value: float) -> str:
    return f"{value:g}".replace("e+", "e")


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--runs", type=Path, default=Path("runs/papers"), metavar="DIR")
    parser.add_argument("--budget", default="3e12", help="training FLOPs of each model; several with commas")
    parser.add_argument("--only", default=",".join(CORPORA), help="corpora (default: %(default)s)")
    parser.add_argument("--models", help="default: those of each corpus")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="write the picture")
    options = parser.parse_args(arguments)
    options.wanted = options.only.split(",")
    if unknown := [name for name in options.wanted if name not in CORPORA]:
        parser.error(f"--only {','.join(unknown)}: no such corpus; there are {', '.join(CORPORA)}")
    options.budgets = [float(budget) for budget in options.budget.split(",")]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    found: dict[str, dict[float, dict[str, Any]]] = {name: {} for name in options.wanted}
    try:
        for budget in options.budgets:  # the cheap ones of all corpora first
            for name in options.wanted:
                one = compared(name, budget, options.data, options.runs, options.seeds, options.models)
                if isinstance(one, int):
                    print("stopped; run the same command again to resume", file=sys.stderr)
                    return 128 + one
                found[name][budget] = one
    except BytelmError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if options.svg is not None:
        write_whole(options.svg, picture(found).encode())
    if options.json:
        print(json.dumps({name: {power(b): one for b, one in budgets.items()} for name, budgets in found.items()}))
        return 0
    for name, budgets in found.items():
        for budget, one in budgets.items():
            print(f"\n### {name}, {power(budget)} FLOPs\n\n{markdown(one)}")
        if len(budgets) > 1:
            print(f"\n### {name}: by budget (and difference to the better BPE model)\n\n{trend(budgets)}")
    rows = [row for name, budgets in found.items() for row in ratios(name, budgets[max(budgets)])]
    head = ["corpus", "ratio", "ours", *(word for paper in PAPERS for word in (paper, "same sign"))]
    print(f"\n### Ratios\n\n{table(head, rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
