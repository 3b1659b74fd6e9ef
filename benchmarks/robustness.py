"""What tokens break: models trained at equal FLOPs on books, code and languages, and every robustness suite.

    python benchmarks/robustness.py --data DATA --budget 5e12 --seeds 2     resumes; prints the tables in Markdown

DATA has the folders books, code and multilingual, each with documents in one file and an index of them, and eval with
published test sets (see CORPORA and PUBLISHED). RUNS gets the texts, the runs of one `bytelm compare`, and the answers
of three `bytelm robust`: all suites on English books; those of boundaries and scripts on 36 languages; and that
of characters for models that learnt a curriculum too. Figures are means over seeds, with half the range of seeds; what
the BLT paper has stands beside.
"""

from __future__ import annotations

import argparse
import json
import lzma
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from articles import cut, indexed, read
from papers import table

from bytelm.cli.common import counter
from bytelm.cli.robustness import sources_of
from bytelm.compare.page import write_all
from bytelm.compare.prepare import ComparisonSpec
from bytelm.compare.results import summary
from bytelm.compare.run import folder_of, run_all
from bytelm.data.curriculum import training_words, write
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
SHORTEST = 256  # bytes of the last one
ARTICLES = 4  # in each language
SLOW = ("bpe:4096", "bpe:16384")  # whose exact bytes take longer on these articles than all else together
OTHERS = ("boundary", "scripts")  # suites on languages, of the first seed
TAUGHT, SHARE = "blt,space,byte-window,bpe:4096", 0.1  # models that learn a curriculum too, and its share of the bytes

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
    "spell": (1.1, 99.9), "spell_inverse": (30.1, 99.9), "contains_char": (0.0, 55.9), "contains_word": (55.1, 73.5),
    "orth": (43.1, 52.4), "sem": (65.0, 90.5), "ins_char": (7.5, 7.6), "ins_word": (33.5, 31.2),
    "del_char": (34.6, 35.9), "del_word": (75.5, 56.1), "sub_char": (0.4, 48.7), "sub_word": (16.4, 72.8),
    "swap_char": (2.6, 11.5), "swap_word": (20.1, 21.0),
}  # fmt: skip
PHONEMES = (11.8, 13.0)  # the same table, Phonology-G2P


def corpora(data: Path, out: Path) -> None:
    """The texts: OUT/learnt/NAME.jsonl and OUT/held-out/NAME.jsonl, and once OUT/articles/LANGUAGE/ARTICLE.txt."""
    for name, (text, index, learnt, held_out) in CORPORA.items():
        for split, part, size in (("train", "learnt", learnt), ("test", "held-out", held_out)):
            if (path := out / part / f"{name}.jsonl").exists():
                continue
            whole, rows = read(data / text.format(split)), read(data / index).decode()
            documents = sorted(indexed(whole, rows, split), key=lambda one: sha256(one[0].encode()).digest())
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, b"".join(lines(documents, int(size))))
    if not (out / "articles").exists():
        text, index, *_ = CORPORA["languages"]
        cut(read(data / text.format("test")), read(data / index).decode(), "test", out / "articles", ARTICLES)
    path = out / "learnt" / "curriculum.jsonl"
    if not path.exists():
        size = SHARE / (1 - SHARE) * sum(learnt for _, _, learnt, _ in CORPORA.values())
        write(path, training_words([out / "learnt" / "books.jsonl"]), int(size), 0)


def lines(documents: Iterable[tuple[str, bytes]], left: int) -> Iterator[bytes]:
    """Documents as JSON lines, up to so many bytes of text."""
    for _, document in documents:
        if left < SHORTEST:
            return
        text = document[: min(LONGEST, left)].decode(errors="ignore")
        left -= len(text.encode())
        yield json.dumps({"text": text}).encode() + b"\n"


def trained(out: Path, name: str, models: str, budget: float, seeds: int) -> dict[str, list[str]]:
    """The runs of each model. Raises Interrupted; BytelmError where a model failed."""
    learnt, held_out = ([str(out / part / f"{corpus}.jsonl") for corpus in CORPORA] for part in ("learnt", "held-out"))
    if name == "taught":
        learnt.append(str(out / "learnt" / "curriculum.jsonl"))
    (outcome,) = run_all(ComparisonSpec(learnt, models, "flops", (budget,), seeds, held_out), out / name)
    if outcome.signal is not None:
        raise Interrupted(outcome.signal)
    if outcome.failed:
        raise BytelmError("; ".join(f"{which}: {reason}" for which, reason in outcome.failed.items()))
    found = summary(outcome)
    write_all(found, out / name)
    order = [model["model"] for model in found["models"]]
    return {model: [str(out / name / folder_of(model, seed)) for seed in range(seeds)] for model in order}


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


def shown(title: str, rows: Mapping[str, Cells]) -> str:
    """A table of means, with half the range between seeds."""
    models = list(dict.fromkeys(model for cells in rows.values() for model in cells))
    lines = [
        [row, *(f"{c['mean']:.3f} ± {c['spread']:.3f}" if (c := cells.get(model)) else "–" for model in models)]
        for row, cells in rows.items()
    ]
    return table([title, *models], lines)


def signs(lost: Mapping[str, Cells], right: Mapping[str, Cells], phonemes: Mapping[str, Cells]) -> Iterator[list[str]]:
    """A row per claim of the paper, against each model over tokens: what BLT loses less, or answers more often."""
    for row, (llama, blt) in HELLASWAG.items():
        ours = lost.get(row) or lost.get(f"{row} 10 %") or {}
        if row != "original":
            fewer = (HELLASWAG["original"][0] - llama) - (HELLASWAG["original"][1] - blt)
            yield from beside(f"noise: {row}", fewer, ours, "bits/byte lost", -1.0)
    for task, (llama, blt) in CUTE.items():
        for row in (f"CUTE {task}", f"CUTE {task}_rand"):
            yield from beside(row, blt - llama, right.get(row, {}), "points", 100.0)
    for row, ours in phonemes.items():
        yield from beside(f"phonemes: {row}", PHONEMES[1] - PHONEMES[0], ours, "points", 100.0)


def beside(claim: str, theirs: float, ours: Cells, unit: str, scale: float) -> Iterator[list[str]]:
    """A claim against each model over tokens: by how much BLT is better, in points in the paper, in `unit` here."""
    tokens = [model for model in ours if model.startswith("bpe") and "naive" not in model]
    for other in tokens if "blt" in ours else []:
        here = scale * (ours["blt"]["mean"] - ours[other]["mean"])
        sure = abs(here) > abs(scale) * (ours["blt"]["spread"] + ours[other]["spread"])
        yield [claim, other, f"{theirs:+.1f} points", f"{here:+.3g} {unit}", agrees(theirs, here) if sure else "unsure"]


def agrees(theirs: float, here: float) -> str:
    """Whether two differences have one sign."""
    return "yes" if (theirs > 0) == (here > 0) and here != 0 else "no"


def picture(lost: Mapping[str, Cells], out: Path) -> None:
    """Bits per byte lost against the strength of noise, exactly: the mean over perturbations, then each."""
    curves = noise.curves(list(lost))
    models = [model for model in dict.fromkeys(m for cells in lost.values() for m in cells) if "naive" not in model]

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


def tables(where: str, found: Mapping[str, Any], runs: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """The tables of suites."""
    for suite, figure in FIGURES.items():
        for key in (figure, "exact_match"):
            if rows := means(found, suite, key, runs):
                yield from (f"### {suite}, {where}\n", shown(key.replace("_", " "), rows), "")


def report(found: Mapping[str, Mapping[str, Any]], runs: Mapping[str, Sequence[str]], out: Path) -> str:
    """All tables, and the picture; of the first of several results also the signs."""
    parts = [part for where, own in found.items() for part in tables(where, own, runs)]
    first = next(iter(found.values()))
    lost, right = means(first, "noise", "difference", runs), means(first, "characters", "accuracy", runs)
    picture(lost, out)
    claims = list(signs(lost, right, means(first, "pronunciation", "accuracy", runs)))
    head = ["claim", "BLT against", "paper", "here", "same sign"]
    return "\n".join([*parts, "### Signs of the BLT paper\n", table(head, claims), ""])


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--run", type=Path, default=Path("runs/robustness"))
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--taught", default=TAUGHT, help="models that learn a curriculum too")
    parser.add_argument("--budget", type=float, default=5e12)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--amount", type=int, default=100)
    given = parser.parse_args(words)
    try:
        corpora(given.data, given.run)
        runs = trained(given.run, "compare", given.models, given.budget, given.seeds)
        spec = RobustSpec([path for paths in runs.values() for path in paths], amount=given.amount)
        prose = given.run / "held-out" / "books.jsonl"
        published = [given.data / path for path in PUBLISHED if (given.data / path).exists()]
        books = asked(spec, [prose, *published], given.run / "books")
        first = RobustSpec([runs[model][0] for model in runs if model not in SLOW], OTHERS, given.amount)
        languages = asked(first, [given.run / "articles"], given.run / "languages")
        text = report({"English books": books, "36 languages": languages}, runs, given.run)
        print(text)
        taught = trained(given.run, "taught", given.taught, given.budget, 1)
        asking = RobustSpec([path for paths in taught.values() for path in paths], ["characters"], given.amount)
        characters = asked(asking, [prose], given.run / "characters")
        more = "\n".join(tables("after a curriculum", characters, taught))
        print(more)
    except Interrupted as stopped:
        return 128 + stopped.signal
    except (BytelmError, OSError, lzma.LZMAError) as error:
        print(error, file=sys.stderr)
        return 1
    write_whole(given.run / "tables.md", f"{text}\n{more}".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
