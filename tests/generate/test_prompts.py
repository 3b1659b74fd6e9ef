"""What the Python interface takes for bytes and what it refuses, and that nothing which fails is passed over."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bytelm.generate import request
from bytelm.generate.prompts import generate
from bytelm.testing import tiny_models
from serving import RUN

GIVEN = f"""
import bytelm, numpy
lm = bytelm.load({str(RUN)!r})
calls = {{
    "prompt": lambda given: lm.generate(given, max_bytes=9, eos=False),
    "prompt of several": lambda given: lm.generate([b"a", given], max_bytes=9, eos=False),
    "prompt of a stream": lambda given: b"".join(lm.stream(given, max_bytes=9, eos=False)),
    "prefix": lambda given: lm.logprobs(given, b"a").tolist(),
    "continuation": lambda given: lm.logprobs(b"a", given).tolist(),
    "data": lm.bits,
    "data of patches": lm.patches,
    "data to compress": lm.compress,
    "packed": lm.decompress,
}}
for name, call in calls.items():
    data = lm.compress(b"some bytes") if name == "packed" else b"some bytes"
    for given in (bytearray(data), memoryview(data), numpy.frombuffer(data, numpy.uint8)):
        assert call(given) == call(data), (name, given)
    for given in ("text", None, 5, [b"a", "b"]):
        try:
            call(given)
        except bytelm.BytelmError as refused:
            print(refused)
for stop in (b"a", "a", ["a"], [b"a", 97]):
    try:
        lm.generate(b"x", max_bytes=4, stop=stop)
    except bytelm.BytelmError as refused:
        print(refused)
"""


def test_bytes_are_taken_however_they_are_held_and_text_is_refused() -> None:
    """In a process of its own: here a wrong type is refused by the checks of the tests."""
    lines = subprocess.run([sys.executable, "-c", GIVEN], capture_output=True, text=True, check=True).stdout.split("\n")
    wanted = list[str]()
    for name in ("prompt", "prompt", "prompt", "prefix", "continuation", "data", "data", "data", "packed"):
        for kind in ("str", "NoneType", "int", "list"):
            what = "str" if (len(wanted), kind) == (3, "list") else kind  # a list of prompts, one of them text
            wanted.append(f"{name} is of type {what}: give bytes, as text.encode() makes them")
    wanted += [f"stop {stop}: give a list of bytes, as in [b'\\n']" for stop in ("b'a'", "'a'", "['a']", "[b'a', 97]")]
    assert lines == [*wanted, ""]


def test_a_row_that_fails_is_not_an_empty_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server ends one request with the error; here nobody else would hear of it."""

    def fails(*given: object) -> None:
        raise RuntimeError("of a constraint")

    monkeypatch.setattr(request.stopping, "release", fails)
    with pytest.raises(RuntimeError, match="of a constraint"):
        generate(next(model for _, model in tiny_models()), [b"a", b"b"], max_bytes=4)
