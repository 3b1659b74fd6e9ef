"""Whatever a model would choose, the text satisfies its grammar; and whatever satisfies it can be chosen."""

from __future__ import annotations

import importlib
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.errors import MissingExtraError, UsageError
from bytelm.generate.constraint import Constraint
from bytelm.units import EOS

pytest.importorskip("llguidance")

from bytelm.generate import compiling, grammar

TREE: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "parts": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}},
    "required": ["name"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object"},
    {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 120}, "minItems": 1},
    {"type": "object", "properties": {"é": {"enum": ["字", 1, None]}, "b": {"type": "boolean"}}, "required": ["é"]},
    {"type": "string", "pattern": "^[a-cé]{2,5}$"},
    {"anyOf": [{"type": "number"}, {"type": "null"}, {"type": "string", "maxLength": 3}]},
    TREE,
]
PATTERNS = ["[a-c]+x?", "é{2,3}|😀*", "(ab|cd){1,4}\\.", "[^a]", "", '\\{"k": [0-9]{1,3}\\}', "(?s:.){0,3}"]
CLOSING = [EOS, *b'"}]0']


# llguidance takes DEL only as an escape, which Python does not write.
TEXTS = st.text(st.characters(exclude_characters="\x7f", codec="utf-8"), max_size=4)


def written(constraint: Constraint, seed: int, most: int = 2000, soon: int = 60) -> tuple[bytes, bool]:
    """A text of ids drawn from those allowed, what is open closed after `soon` bytes; and whether EOS ended it."""
    rng, text = np.random.default_rng(seed), b""
    for left in range(most, 0, -1):
        allowed = constraint.allowed(left)
        if not allowed.any():  # the next character does not fit: never before the end
            assert left < 4 and constraint.allowed(4).any()
            break
        closing = [symbol for symbol in CLOSING if allowed[symbol]] if len(text) > soon or rng.random() < 0.3 else []
        symbol = closing[0] if closing else int(rng.choice(allowed.nonzero()[0]))
        if symbol == EOS:
            return text, True
        constraint.extend(symbol)
        text += bytes([symbol])
    return text, False


def accepts(constraint: Constraint, text: bytes) -> bool:
    for index, byte in enumerate(text):
        if not constraint.allowed(len(text) - index)[byte]:
            return False
        constraint.extend(byte)
    return bool(constraint.allowed(1)[EOS])


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize("schema", SCHEMAS, ids=range(len(SCHEMAS)))
def test_a_text_satisfies_its_schema(schema: dict[str, Any], seed: int) -> None:
    text, ended = written(grammar.json_schema(schema).constraint(), seed)
    assert ended
    jsonschema.validate(json.loads(text.decode()), schema)


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_text_matches_its_pattern(pattern: str, seed: int) -> None:
    text, ended = written(grammar.regex(pattern).constraint(), seed)
    assert ended and re.fullmatch(pattern, text.decode())


@settings(max_examples=15)
@given(st.data())
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_match_may_be_written(pattern: str, data: st.DataObject) -> None:
    text = data.draw(st.from_regex(pattern, fullmatch=True).filter(lambda t: t.isprintable()))
    constraint = grammar.regex(pattern).constraint()
    assert accepts(constraint, text.encode())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=30)
@given(value=st.dictionaries(TEXTS, VALUES, max_size=3), indent=st.sampled_from([None, 2, "\t"]))
def test_every_object_may_be_written(value: dict[str, Any], indent: Any) -> None:
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    assert accepts(grammar.json_object().constraint(), text.encode())


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32), most=st.integers(1, 12))
def test_where_bytes_run_out_no_character_is_broken(seed: int, most: int) -> None:
    text, _ = written(grammar.regex("[é字😀]{1,9}").constraint(), seed, most)
    assert len(text) <= most
    text.decode()


def test_white_space_ends() -> None:
    constraint = grammar.json_object().constraint()
    constraint.extend(ord("{"))
    taken = 0
    while constraint.allowed(9)[[*b" \n\t"]].any():
        allowed = constraint.allowed(9)
        constraint.extend(next(byte for byte in b"\n \t" if allowed[byte]))
        taken += 1
    assert taken == 41


def test_the_end_is_where_the_grammar_accepts() -> None:
    constraint = grammar.lark('start: "a" ("," "a")*').constraint()
    ends: list[bool] = []
    for byte in b"a,a,a":
        ends.append(bool(constraint.allowed(5)[EOS]))
        constraint.extend(byte)
    assert ends == [False, True, False, True, False]
    assert constraint.allowed(5).nonzero()[0].tolist() == [ord(","), EOS]
    constraint.extend(EOS)


def test_rows_share_a_grammar() -> None:
    shared = grammar.json_schema(TREE)
    alone = [written(shared.constraint(), seed) for seed in range(24)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda seed: written(shared.constraint(), seed), range(24))) == alone
    assert len({text for text, _ in alone}) > 12
    assert grammar.json_schema(dict(TREE)) is shared  # compiled once


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"not": {"type": "string"}, "x-guidance": {"lenient": True}}, 'Unimplemented keys: ["not"]'),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
        ({"type": "text"}, "Invalid type: text"),
        ({"$ref": "#"}, "no text satisfies it"),
        ({"$ref": "http://127.0.0.1:9/x"}, "does not fetch resources"),
        ({"const": float("nan")}, "not JSON compliant"),
        ({"enum": ["\ud800"]}, "surrogates not allowed"),
        ({"enum": [{1, 2}]}, "set is not JSON serializable"),
    ],
)
def test_schemas_that_cannot_be_enforced(schema: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        grammar.json_schema(schema)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("[", "(unclosed character class)"),
        ("a\\b", "lookarounds not supported yet"),
        ("(a)\\1", "backreferences are not supported"),
        ("(?s-u:.)", "pattern can match invalid UTF-8"),
        ("a" * 300_000, "300000 characters, and the limit is 262144"),
        ("\udcff", "surrogates not allowed"),
    ],
)
def test_patterns_that_cannot_be_used(pattern: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)) as caught:
        grammar.regex(pattern)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("start: word", 'unknown name: "word"'),
        ("start: A\nA: /a+/ & /b+/", "no text satisfies it"),
        ('start: start "a"', "no text satisfies it"),
        ("start: <eos>", "no text satisfies it"),
        ("start: " + "(" * 200 + '"a"' + ")" * 200, "too deeply nested"),
    ],
)
def test_grammars_that_cannot_be_used(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        grammar.lark(text)


@pytest.mark.parametrize("text", ['start: "a" <[255]>', 'start: "a" <eos>', "start[max_tokens=3]: /[éàü]+/"])
def test_no_grammar_breaks_a_character(text: str) -> None:
    constraint = grammar.lark(text).constraint()
    with pytest.raises(UsageError, match="allows no byte of a text after"):
        for _ in range(9):
            constraint.extend(int(constraint.allowed(9).nonzero()[0][0]))


def test_a_grammar_that_becomes_too_complex() -> None:
    constraint = grammar.lark('start: "x" endless\nendless: "y" endless').constraint()
    assert constraint.allowed(9).nonzero()[0].tolist() == [ord("x")]
    with pytest.raises(UsageError, match=r"cannot be followed with byte 120 \(parser error: Too many items"):
        constraint.extend(ord("x"))


def test_a_byte_that_was_not_allowed() -> None:
    with pytest.raises(UsageError, match="cannot be followed with byte 98"):
        grammar.regex("a").constraint().extend(ord("b"))


@pytest.mark.parametrize("program", ["import os; os.abort()", "while True: pass"])
def test_a_grammar_that_ends_or_occupies_the_compiler(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = tmp_path / "compiler.py"
    trial.write_text(program)
    monkeypatch.setattr(compiling, "__file__", str(trial))
    monkeypatch.setattr(grammar, "SECONDS", 0.5)
    for _ in range(2):
        with pytest.raises(UsageError, match="compiling it takes more than"):
            grammar.regex("of this test alone" + program)


def test_a_refused_grammar_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):
        with pytest.raises(UsageError, match="unclosed group"):
            grammar.regex("(of this test alone")
        monkeypatch.setattr(compiling, "__file__", "nowhere.py")


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.delitem(sys.modules, "bytelm.generate.grammar")
    with pytest.raises(MissingExtraError, match=r"needs llguidance.*bytelm\[grammar\]"):
        importlib.import_module("bytelm.generate.grammar")
