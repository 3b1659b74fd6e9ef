"""The field's terms (docs/glossary.md) in headings, table headers, help texts, log lines and error messages."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bytelm import errors
from bytelm.cli import app

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "src" / "bytelm"
SAYS = {"print", "say", "progress", "warn", "fail", "writeln"}  # functions that show their arguments to somebody
ERRORS = {name for name in dir(errors) if name.endswith("Error")}
UNITS = "bytes?|bits|nats|FLOPs?|MFLOP|ms|milliseconds|seconds|steps|thousand parameters|lines?"

BANNED = {  # a word or phrase of our own: what the field says
    r"(?<!scaling )laws?": "invariant, invariant test",
    r"(a|each|every|at|always) looks?|looks": "validation, validation pass",
    r"sittings?": "session",
    r"scorers?": "entropy model",
    r"slopes?": "gradient",
    r"learnt": "trained, learned",
    r"told|tells?": "reported, logged",
    r"entrants?": "candidate",
    r"(go|goes|going|went) on": "resume, continue",
    r"(?<!are )(?<!is )(?<!be )held out(?! by)": "validation, test split, held-out bytes",
    r"unless (given|said|told|named)": "default: ...",
    r"of (its|their|one's) own": "separate; cannot be combined with",
    r"(is|are) there already": "already exists",
    r"stretch(es)?": "segment",
    r"passed over": "skipping ...: reason",
    r"(was|were|is) begun": "differs from the existing run",
    r"(came|come|comes) to an end": "finished",
    r"anew|afresh": "again, retrain, reset",
    r"(is |are )?sound(?! file)": "OK, intact; for the modality: audio",
    r"oddness": "depth offset",
    r"left \{\}|left \d": "ETA",
    r"seen": "processed",
    r"knobs?": "setting",
    r"houses?": "project, package",
    r"floors?": "layer",
    r"verbs?": "command",
    r"by heart": "overfitting",
    r"(any|whatever|its) company": "batch-invariant",
    r"to the last bit": "bitwise identical",
    r"side by side": "non-overlapping",
    r"in all": "total",
    r"likeliest": "most likely",
    r"(has|have) not got": "does not support",
    r"(no longer|never) answers?": "unresponsive",
    r"a row (holds|of)": "sequence",
    rf"({UNITS}) an? (byte|patch|token|step|second|model|row)": "per",
}


def found(text: str) -> list[str]:
    """Every banned phrase in a text, with what to say instead."""
    hits = ((re.search(rf"\b(?:{pattern})(?!\w)", text, re.IGNORECASE), better) for pattern, better in BANNED.items())
    return [f"{hit[0]!r}: say {better!r}" for hit, better in hits if hit]


def pages() -> Iterator[tuple[str, str]]:
    """(place, text) of every heading and table header of the documentation."""
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        lines = re.sub(r"(?ms)^```.*?^```", "", path.read_text(encoding="utf-8")).splitlines()
        for line, below in zip(lines, [*lines[1:], ""], strict=True):
            if line.startswith("#") or (re.match(r"\|[ :-]+\|", below) and path.name != "log.md"):  # whose past is kept
                yield path.name, line


def helps() -> Iterator[tuple[str, str]]:
    """(place, line) of the help of every command."""
    yield from (("--help", line) for line in app.generate_docs().splitlines())


def messages() -> Iterator[tuple[str, str]]:
    """(place, text) of every literal that is printed, logged or raised; {} stands for what is put in."""
    for path in sorted(SOURCES.rglob("*.py")):
        name = path.relative_to(SOURCES).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if called in SAYS | ERRORS:
                    for argument in node.args:
                        yield f"{name}:{argument.lineno}", literal(argument)


def literal(node: ast.AST) -> str:
    """The text that an expression holds, {} for each part that is computed."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join("{}" if isinstance(part, ast.FormattedValue) else literal(part) for part in node.values)
    if isinstance(node, ast.IfExp | ast.BinOp):
        return " ".join(literal(child) for child in ast.iter_child_nodes(node))
    return ""


@pytest.mark.parametrize("texts", [pages, helps, messages])
def test_the_fields_words_are_used(texts: type[Iterator[tuple[str, str]]]) -> None:
    read = list(texts())
    assert len(read) > 100, "nothing was found to read"
    assert [f"{place}: {text.strip()!r}: {hit}" for place, text in read for hit in found(text)] == []


def test_a_banned_word_is_found() -> None:
    assert found("the laws hold") and found("| FLOPs a byte |") and found("step {} | left {}") and found("going on")
    assert not found("the lawn, scaling laws, learned anyhow: gone one way, held-out bytes, FLOPs per byte")
