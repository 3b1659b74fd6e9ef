"""CUTE, CMUdict and BLiMP are known by what is in them."""

from __future__ import annotations

import lzma
from pathlib import Path

import pytest

from bytelm.cli.robustness import sources_of
from bytelm.evaluate.published import Pair, blimp, cmudict, cute, holds_pairs, texts
from bytelm.evaluate.robustness import characters
from bytelm.evaluate.robustness.base import Sources
from solving import TEXTS, accuracy, by_row, knows

ROWS = {
    "spell.tsv": [
        "input1\tlabel",
        *(f"{w}\t{' '.join(w)}" for w in ("house", "tree", "water", "stone", "cloud", "sea")),
    ],
    "ins_char.tsv": [
        "input1\tinput2\tinput3\tlabel",
        *(
            f"x\t{w[1]}\t{w}\t{w.replace(w[1], w[1] + 'x')}"
            for w in ("house", "tree", "water", "stone", "cloud", "sea")
        ),
    ],
    "contains_char_rand.tsv": [
        "input1\tinput2\tlabel",
        "q\thouse\tNo",
        *(f"{w[0]}\t{w}\tYes" for w in ("tr", "we", "st", "on")),
    ],
    "orth.tsv": ["input1\tinput2\tinput3\tlabel", *(f"w{n}\ta{n}\tb{n}\t{'ab'[n % 2]}{n}" for n in range(6))],
    "del_word.tsv": ["input1\tinput2\tlabel", *(f"the\tSee the {n} cats.\tSee {n} cats." for n in range(6))],
}
CUTE = [(f"cute/{name}", "\n".join(rows).encode()) for name, rows in ROWS.items()]


def test_questions_of_cute_are_asked_with_their_own_answers() -> None:
    rows = by_row(characters.items(Sources([*TEXTS.documents, *CUTE]), 4, 0))
    choices = {row: items for row, items in rows.items() if not row.endswith("generated")}
    assert set(choices) == {f"CUTE {name.removesuffix('.tsv')}" for name in ROWS}
    assert all(len(items) == 4 for items in choices.values())
    for name in ("spell", "ins_char", "contains_char_rand"):
        assert accuracy(choices[f"CUTE {name}"], knows) == 1.0
    for items in choices.values():
        for item in items:
            right, *wrong = (query.continuation for query in item.queries)
            question = item.queries[0].prefix.decode().split("\n")[-1]
            assert right not in wrong
            assert question.count(":") == 1 and item.queries[0].prefix.count(b"\n") == 4
    assert {len(item.queries) for item in choices["CUTE orth"]} == {2}
    assert all(b"generated" not in query.prefix for query in rows["CUTE spell, generated"][0].queries)


def test_a_file_that_is_none_of_its_tasks_gives_no_items() -> None:
    for name, data in (
        ("other.tsv", CUTE[0][1]),
        ("ins_char.tsv", CUTE[0][1]),  # which has fewer columns
        ("spell.tsv", b"input1\tlabel\nhouse\th o u s e\n"),
        ("spell.tsv", b"input1\tlabel\n"),
    ):
        assert list(characters.items(Sources([*TEXTS.documents, (name, data)]), 4, 0)) == []


@pytest.mark.parametrize(
    "line",
    ["{word} 1 {spoken}", "{word}  {spoken}", "{word} {spoken}", "{word}(2)  {spoken}", ";;; said\n{word}  {spoken}"],
)
def test_dictionaries_are_known_in_every_form(line: str) -> None:
    data = "\n".join(line.format(word=w, spoken=s) for w, s in (("CAT", "K AE1 T"), ("DOG", "D AO1 G"), ("A", "AH0")))
    assert cmudict(data.encode()) == {"CAT": ["K AE1 T"], "DOG": ["D AO1 G"], "A": ["AH0"]}
    assert cmudict((data + "\n").encode() * 1000 + b"\xff") is not None


def test_what_is_no_test_set_is_text() -> None:
    for data in (
        b"",
        b"A CAT\n" * 9,
        b"A B C\n" * 9,
        b"a,b\n1,2\n",
        b"{}\n",
        b"\xff\xfe",
        *(d for _, d in TEXTS.documents),
    ):
        assert cute("spell.tsv", data) is None and cmudict(data) is None and blimp(data) is None
        assert texts(Sources([("x", data)])).documents == [("x", data)]
    assert texts(Sources(CUTE)).documents == []


def test_pairs_are_read_under_both_names_and_what_is_none_is_left_out() -> None:
    lines = [
        '{"sentence_good": "a", "sentence_bad": "b", "linguistics_term": "t", "UID": "u", "pairID": "3"}',
        '{"good": "c", "bad": "d", "term": "t"}',
        '{"good": "e", "bad": "e", "term": "t"}',
        '{"good": 1, "bad": "e"}',
        "[1]",
        "no JSON",
        "",
    ]
    assert blimp("\n".join(lines).encode()) == [Pair("t", "u 3", "a", "b"), Pair("t", " 1", "c", "d")]


def test_files_of_pairs_are_read_whole_and_others_as_documents(tmp_path: Path) -> None:
    """A line of JSON without a text is no document, and too many of these are an error."""
    line = '{"sentence_good": "a", "sentence_bad": "b", "linguistics_term": "t", "UID": "u", "pairID": "3"}\n'
    (tmp_path / "pairs").mkdir()
    (tmp_path / "pairs" / "one.jsonl").write_text(line * 3)
    (tmp_path / "two.jsonl.xz").write_bytes(lzma.compress(line.encode() * 2))
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    paths = [str(tmp_path / name) for name in ("pairs", "two.jsonl.xz", "texts.jsonl")]
    assert list(map(holds_pairs, paths)) == [True, True, False] and not holds_pairs("-")
    found = sources_of([], paths).documents
    assert [data for _, data in found] == [b"one", b"two", line.encode() * 3, line.encode() * 2]
    assert [data for _, data in sources_of([], paths[:1]).documents] == [line.encode() * 3]
