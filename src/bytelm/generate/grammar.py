"""Output constrained by a JSON schema, a regular expression or a grammar (extra `grammar`).

The outcome is always valid UTF-8, and EOS is allowed exactly where the grammar accepts. A text that ends because the
bytes ran out is the beginning of one that the grammar accepts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm.errors import MissingExtraError, UsageError
from bytelm.generate.utf8 import Utf8State
from bytelm.units import BYTES, EOS, VOCAB

try:
    from llguidance import LLMatcher

    from bytelm.generate import compiling
except ImportError as error:
    raise MissingExtraError("llguidance", "grammar", "output constrained by a grammar") from error

LONGEST = 4  # bytes of a character
MOST = 1 << 18  # characters of a grammar
SECONDS = 20  # that the trial of a grammar may take on a busy machine
# Between the tokens of JSON: nothing, a space, or a new line and its indentation. Free white space has no end.
SPACES = r" |\n {0,40}|\n\t{0,10}"
_one = threading.Lock()  # trials come one after another, so that many hostile grammars take one core


class Grammar:
    """A compiled grammar, to be used by any number of rows."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def constraint(self) -> GrammarConstraint:
        """A new row that is to satisfy the grammar."""
        return GrammarConstraint(self._matcher.deep_copy())


class GrammarConstraint:
    """A `generate.constraint.Constraint`: the text of one row satisfies a grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        self._characters = Utf8State.after([b""])
        self._next = self._following()

    def allowed(self, left: int) -> NDArray[np.bool_]:
        """The ids `[vocab]` that may come next; none if the next character takes more than `left` bytes."""
        return self._next & self._characters.allowed(left).numpy()[0]

    def extend(self, symbol: int) -> None:
        """Read the id that was generated.

        Raises UsageError for one that was not allowed, and where the grammar becomes too complex or allows no text.
        """
        if symbol == EOS:
            return
        self._matcher.consume_token(symbol)
        self._check(symbol)
        self._characters = self._characters.extend(torch.tensor([symbol]))
        self._next = self._following()
        self._check(symbol)
        # A grammar may ask for a part of a character: with tokens by their ids, or max_tokens.
        if not self.allowed(LONGEST).any():
            raise UsageError(f"the grammar allows no byte of a text after byte {symbol}: change it")

    def _following(self) -> NDArray[np.bool_]:
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8, (VOCAB + 7) // 8)
        allowed = np.unpackbits(mask, count=VOCAB, bitorder="little").astype(bool)
        allowed[BYTES:] = False
        allowed[EOS] = self._matcher.is_accepting()  # llguidance allows it after an error, too
        return allowed

    def _check(self, symbol: int) -> None:
        if self._matcher.is_error():
            reason = compiling.shortened(self._matcher.get_error())
            raise UsageError(f"the grammar cannot be followed with byte {symbol} ({reason}): change or simplify it")


def json_schema(schema: dict[str, Any]) -> Grammar:
    """JSON that a schema describes, its properties in the order of the schema.

    Raises UsageError for a schema that is not valid, that nothing satisfies, or with keywords that cannot be enforced
    (such as `not` or `uniqueItems`).
    """
    try:
        text = json.dumps(schema, allow_nan=False)
        json.dumps(schema, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, TypeError, RecursionError) as error:  # UnicodeEncodeError is a ValueError
        raise UsageError(f"the JSON schema is no JSON ({error}): give an object as its texts have it") from None
    return _grammar("JSON schema", text)


def json_object() -> Grammar:
    """Any JSON object."""
    return json_schema({"type": "object"})


def regex(pattern: str) -> Grammar:
    """Texts that a regular expression matches as a whole, in Rust's syntax without look-around.

    Raises UsageError for one that is not valid, or too complex.
    """
    return _grammar("regular expression", pattern)


def lark(grammar: str) -> Grammar:
    """Texts of a grammar in llguidance's variant of Lark's syntax.

    Raises UsageError for one that is not valid, or too complex.
    """
    return _grammar("grammar", grammar)


@lru_cache(maxsize=32)
def _grammar(kind: str, text: str) -> Grammar:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the {kind} is not valid Unicode ({error}): remove lone surrogates") from None
    if len(text) > MOST:
        raise UsageError(f"the {kind} has {len(text)} characters, and the limit is {MOST}: shorten it")
    source = _source(kind, text)
    try:
        with _one:
            wrong = _trial(source)
    except subprocess.TimeoutExpired:
        wrong = f"compiling it takes more than {SECONDS} s"
    if wrong:
        raise UsageError(f"the {kind} cannot be used ({wrong}): change or simplify it")
    return Grammar(compiling.compiled(source))


@lru_cache(maxsize=64)
def _trial(source: str) -> str:
    """What is wrong with a grammar, by a process that only compiles it: see `compiling`. Raises TimeoutExpired."""
    trial = subprocess.run(
        [sys.executable, "-P", str(Path(compiling.__file__))],
        input=source.encode(),
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    if trial.returncode:  # out of stack, memory or time
        return f"compiling it takes more than {compiling.CPU_SECONDS} s or {compiling.MEMORY >> 20} MiB"
    return trial.stdout.decode().strip()


def _source(kind: str, text: str) -> str:
    """The grammar as llguidance takes it."""
    if kind == "grammar":
        return LLMatcher.grammar_from_lark(text)
    if kind == "regular expression":
        return LLMatcher.grammar_from_regex(text)
    # A schema may have options of its own ("x-guidance"), which these override.
    return LLMatcher.grammar_from_json_schema(
        text,
        overrides={
            "item_separator": ",",
            "key_separator": ":",
            "whitespace_pattern": SPACES,
            "whitespace_flexible": True,
            "coerce_one_of": False,
            "lenient": False,
            "json_allow_general_unicode_escapes": False,
        },
    )
