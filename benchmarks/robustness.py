"""What tokens break: models trained at equal FLOPs on books, code and languages, and every robustness suite.

    python benchmarks/robustness.py --data DATA --budget 5e12 --seeds 2     resumes; prints the tables in Markdown

DATA has the folders books, code and multilingual, each with documents in one file and an index of them, and eval with
published test sets (see CORPORA and PUBLISHED). RUNS gets the texts, the runs of one `bytelm compare`, and the answers
of two `bytelm robust`: all suites on English books, and those of noise, boundaries and scripts on 36 languages.
Figures are means over seeds. Noise and CUTE stand beside those of the BLT paper.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from articles import cut, indexed, read

from bytelm.cli.common import counter
from bytelm.cli.robustness import sources_of
from bytelm.compare.page import write_all
from bytelm.compare.results import summary
from bytelm.compare.run import ComparisonSpec, run_all, slug
from bytelm.data.files import write_whole
from bytelm.errors import BytelmError
from bytelm.evaluate.robustness import noise
from bytelm.report.charts import line_chart, page
from bytelm.robust.page import write_all as write_answers
from bytelm.robust.run import RobustSpec, run_suites
from bytelm.training.stop import Interrupted

MODELS = "blt,space,megabyte,byte-window,bpe:1024,bpe:4096,bpe:16384"
CORPORA = {
    "books": ("books/{}.txt.xz", "books/index.tsv.xz", 3.9e6, 4e5),
    "code": ("code/{}.txt.xz", "code/index.tsv.xz", 2.9e6, 3e5),
    "languages": ("multilingual/ntrex.{}.txt.xz", "multilingual/ntrex.index.tsv.xz", 3.0e6, 5e5),
}
"""{name: (text of a split, index, bytes to learn from, bytes held out)}."""
PUBLISHED = ("eval/cmudict.valid.txt.xz", "eval/blimp200.jsonl.xz", "eval/cute")
LONGEST = 1 << 17  # bytes of one document, so that a few novels do not make up the corpus
OTHERS = ("noise", "boundary", "scripts")  # suites on languages

# BLT (arXiv 2412.09871), Table 3: accuracy in per cent of Llama 3 and of BLT, 8B parameters, both trained on 1T tokens.
HELLASWAG = {
    "original": (79.1, 80.6),
    "spaced upper case (AntSpeak)": (45.6, 57.9),
    "drops": (53.8, 58.2),
    "random case": (55.3, 65.7),
    "repeats": (57.0, 66.6),
    "upper case": (72.9, 77.3),
}
CUTE = {
    "contains": (0.0, 55.9), "delete": (34.6, 35.9), "insert": (7.5, 7.6), "spell": (1.1, 99.9),
    "join": (30.1, 99.9), "substitute": (0.4, 48.7), "swap": (2.6, 11.5),
}  # fmt: skip


def corpora(data: Path, out: Path) -> None:
    """The texts, once: OUT/learnt/NAME.jsonl, OUT/held-out/NAME.jsonl, OUT/articles/LANGUAGE/ARTICLE.txt."""
    for name, (text, index, learnt, held_out) in CORPORA.items():
        for split, part, size in (("train", "learnt", learnt), ("test", "held-out", held_out)):
            whole, rows = read(data / text.format(split)), read(data / index).decode()
            lines: list[str] = []
            left = int(size)
            for _, document in sorted(indexed(whole, rows, split), key=lambda one: sha256(one[0].encode()).digest()):
                document = document[: min(LONGEST, left)].decode(errors="ignore")
                left -= len(document.encode())
                lines.append(json.dumps({"text": document}))
                if left < 256:
                    break
            (out / part).mkdir(parents=True, exist_ok=True)
            write_whole(out / part / f"{name}.jsonl", ("\n".join(lines) + "\n").encode())
            if name == "languages" and split == "test":
                cut(whole, rows, split, out / "articles")


def trained(out: Path, models: str, budget: float, seeds: int) -> dict[str, list[str]]:
    """The runs of each model. Raises Interrupted; BytelmError where a model failed."""
    learnt, held_out = ([str(out / part / f"{name}.jsonl") for name in CORPORA] for part in ("learnt", "held-out"))
    outcome = run_all(ComparisonSpec(learnt, models, "flops", budget, seeds, held_out), out / "compare")
    if outcome.signal is not None:
        raise Interrupted(outcome.signal)
    if outcome.failed:
        raise BytelmError("; ".join(f"{name}: {reason}" for name, reason in outcome.failed.items()))
    found = summary(outcome, out / "compare")
    write_all(found, out / "compare")
    return {
        model["model"]: [str(out / "compare" / slug(model["model"], seed)) for seed in range(seeds)]
        for model in found["models"]
    }


def asked(spec: RobustSpec, paths: Sequence[Path], home: Path) -> dict[str, Any]:
    """The results of suites on some files."""
    found = run_suites(spec, sources_of(spec.runs, [str(path) for path in paths]), home, partial(counter, quiet=False))
    write_answers(found, home)
    return found


Cells = dict[str, dict[str, float]]


def means(found: Mapping[str, Any], suite: str, figure: str, runs: Mapping[str, Sequence[str]]) -> dict[str, Cells]:
    """{row: {model: {"mean", "spread"}}} of a figure: the mean over seeds, and half the range. Naive columns too."""
    rows: dict[str, Cells] = {}
    for row in found["suites"][suite]["rows"] if suite in found["suites"] else ():
        for model, paths in runs.items():
            for naive in ("", ", naive"):
                names = [Path(path).name + naive for path in paths]
                values = [
                    row["figures"][name][figure]["value"] for name in names if figure in row["figures"].get(name, {})
                ]
                if values:
                    cell = {"mean": sum(values) / len(values), "spread": (max(values) - min(values)) / 2}
                    rows.setdefault(row["row"], {})[model + naive] = cell
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def shown(title: str, rows: Mapping[str, Cells]) -> str:
    """A table of means, with half the range between seeds."""
    models = list(dict.fromkeys(model for cells in rows.values() for model in cells))
    lines = [
        [row, *(f"{c['mean']:.3f} ± {c['spread']:.3f}" if (c := cells.get(model)) else "–" for model in models)]
        for row, cells in rows.items()
    ]
    return table([title, *models], lines)


def signs(lost: Mapping[str, Cells], right: Mapping[str, Cells]) -> Iterator[list[str]]:
    """A row per claim of the paper: BLT less affected than tokens, there and here, against each model over tokens."""
    for row, (llama, blt) in HELLASWAG.items():
        ours = lost.get(row) or lost.get(f"{row} 10 %")
        if row == "original" or ours is None or "blt" not in ours:
            continue
        theirs = (HELLASWAG["original"][0] - llama) - (HELLASWAG["original"][1] - blt)  # points less lost by BLT
        for other in (model for model in ours if model.startswith("bpe")):
            here = ours[other]["mean"] - ours["blt"]["mean"]
            yield [f"noise: {row}", other, f"{theirs:+.1f} points", f"{here:+.3f} bits/byte", agrees(theirs, here)]
    for task, (llama, blt) in CUTE.items():
        for row, ours in right.items():
            if (not row.startswith(f"{task},") and row != task) or "blt" not in ours:
                continue
            for other in (model for model in ours if model.startswith("bpe")):
                here = ours["blt"]["mean"] - ours[other]["mean"]
                yield [f"CUTE: {row}", other, f"{blt - llama:+.1f} points", f"{100 * here:+.1f} points",
                       agrees(blt - llama, here)]  # fmt: skip


def agrees(theirs: float, here: float) -> str:
    """Whether two differences have one sign."""
    return "yes" if (theirs > 0) == (here > 0) and here != 0 else "no"


def picture(lost: Mapping[str, Cells], out: Path) -> None:
    """Bits per byte lost against the strength of noise: the mean over perturbations, then each."""
    curves = noise.curves(list(lost))
    models = list(dict.fromkeys(model for cells in lost.values() for model in cells))

    def chart(points: Mapping[float, Sequence[str]], what: str) -> tuple[str, str]:
        lines = {
            model: [(s, sum(lost[row][model]["mean"] for row in rows) / len(rows)) for s, rows in points.items()]
            for model in models
        }
        title = f"Bits per byte lost against the strength of noise, {what}"
        return line_chart(lines, "characters changed (%)", "bits/byte lost", title), f"{what.capitalize()}."

    strengths = {float(s): [row for own in curves.values() for at, row in own if at == s] for s in noise.STRENGTHS}
    drawn = [chart(strengths, "mean over perturbations")]
    drawn += [chart({s: [row] for s, row in own}, name) for name, own in curves.items()]
    write_whole(out / "robustness.svg", page([drawn[i : i + 2] for i in range(0, len(drawn), 2)]).encode())


FIGURES = {
    "noise": "difference", "boundary": "difference", "degenerate": "bits_per_byte", "spelling": "accuracy",
    "characters": "accuracy", "copying": "difference", "numbers": "accuracy", "pronunciation": "accuracy",
    "blimp": "accuracy", "scripts": "relative",
}  # fmt: skip


def report(books: Mapping[str, Any], languages: Mapping[str, Any], runs: Mapping[str, Sequence[str]], out: Path) -> str:
    """All tables, and the picture."""
    parts: list[str] = []
    for where, found in (("English books", books), ("36 languages", languages)):
        for suite, figure in FIGURES.items():
            if rows := means(found, suite, figure, runs):
                parts += [f"### {suite}, {where}\n", shown(figure.replace("_", " "), rows), ""]
                if figure == "accuracy" and (rows := means(found, suite, "exact_match", runs)):
                    parts += [shown("exact match, generated", rows), ""]
    lost, right = means(books, "noise", "difference", runs), means(books, "characters", "accuracy", runs)
    picture(lost, out)
    head = ["claim", "BLT against", "paper", "here", "same sign"]
    parts += ["### Signs of the BLT paper\n", table(head, list(signs(lost, right))), ""]
    return "\n".join(parts)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/robustness"))
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--budget", type=float, default=5e12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--amount", type=int, default=100)
    given = parser.parse_args(words)
    try:
        if not (given.run / "articles").exists():
            corpora(given.data, given.run)
        runs = trained(given.run, given.models, given.budget, given.seeds)
        spec = RobustSpec([path for paths in runs.values() for path in paths], amount=given.amount)
        published = [given.data / path for path in PUBLISHED if (given.data / path).exists()]
        books = asked(spec, [given.run / "held-out" / "books.jsonl", *published], given.run / "books")
        languages = asked(replace(spec, suites=OTHERS), [given.run / "articles"], given.run / "languages")
    except Interrupted as stopped:
        return 128 + stopped.signal
    except (BytelmError, OSError, lzma.LZMAError) as error:
        print(error, file=sys.stderr)
        return 1
    text = report(books, languages, runs, given.run)
    write_whole(given.run / "tables.md", text.encode())
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
