"""The fault table is whole: every row has tests, every mark a row, and the page in docs/ is the table."""

from __future__ import annotations

import re

import faults


def without_results(page: str) -> str:
    """The page with the last column of its tables empty."""
    return re.sub(r"^(\| [A-Z]\d+ \|.*\|) [^|]*\|$", r"\1  |", page, flags=re.MULTILINE)


def test_marks_name_rows_that_there_are() -> None:
    assert list(faults.marked()) == list(faults.ROWS)  # a mark of an unknown row is a KeyError
    assert {row[0] for row in faults.ROWS} == set(faults.SECTIONS)


def test_results_are_the_last_column_alone() -> None:
    tests = {test for named in faults.marked().values() for test in named}
    told = faults.page({test: faults.Counter(passed=3, skipped=1) for test in tests})
    assert told != faults.page(None) and "3 passed, 1 skipped" in told
    assert without_results(told) == faults.page(None) == without_results(faults.page(None))


def test_every_row_has_tests() -> None:
    assert [row for row, tests in faults.marked().items() if not tests] == []


def test_the_page_is_the_table() -> None:
    """Written by `make faults`; the results in it are those of its last run, all else is as it stands here."""
    assert without_results(faults.PAGE.read_text(encoding="utf-8")) == faults.page(None)
