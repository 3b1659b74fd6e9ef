"""Suites of words and numbers: right answers are right, wrong ones are alike, and nothing gives them away."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bytelm.data.words import GROUPS, LONGER, LONGEST, group_of, is_held_out
from bytelm.evaluate.robustness import blimp, characters, copying, numbers, pronunciation, spelling
from bytelm.evaluate.robustness.base import Item, Query, Sources, checksum
from solving import TEXTS, accuracy, by_row, guess, knows, text

SPOKEN = "".join(
    f"{first}{second}{third} 1 {first} {vowel}1 {third}\n"
    for first in "BDFGKLMN"
    for second, vowel in (("A", "AE"), ("E", "EH"), ("I", "IH"), ("OO", "UW"))
    for third in "BDGKLMNPST"
)
PAIRS = "".join(
    f'{{"sentence_good": "The {w}s sit.", "sentence_bad": "The {w}s sits.", "linguistics_term": "agreement", '
    f'"UID": "verbs", "pairID": "{n}"}}\n'
    for n, w in enumerate(("cat", "dog", "hen", "cow", "fox"))
)
FILES = [("d/cmudict.txt", SPOKEN.encode()), ("blimp.jsonl", PAIRS.encode())]
ALL = Sources([*TEXTS.documents, *FILES])
SUITES = {
    module.__name__.rpartition(".")[2]: module
    for module in (blimp, characters, copying, numbers, pronunciation, spelling)
}
ASKED = {name: list(suite.items(ALL, 40, 0)) for name, suite in SUITES.items()}


@pytest.mark.parametrize("name", SUITES)
def test_a_seed_gives_the_same_items_in_every_process(name: str) -> None:
    code = (
        "import sys; from solving import TEXTS; from bytelm.evaluate.robustness.base import Sources, checksum;"
        f"from bytelm.evaluate.robustness import {name} as suite; files = eval(sys.stdin.read());"
        "print(checksum(suite.items(Sources([*TEXTS.documents, *files]), 3, 7)))"
    )
    environment = {"PYTHONPATH": f"{Path(__file__).parents[2]}:{Path(__file__).parents[3] / 'src'}"}
    found = subprocess.run(
        [sys.executable, "-c", code],
        input=repr(FILES),
        env=environment | {"PYTHONHASHSEED": "99"},
        capture_output=True,
        text=True,
        check=True,
    )
    here = checksum(SUITES[name].items(ALL, 3, 7))
    assert found.stdout.strip() == here
    assert checksum(SUITES[name].items(ALL, 3, 8)) != here


@pytest.mark.parametrize("name", SUITES)
def test_no_row_has_more_than_the_amount_and_no_item_is_there_twice(name: str) -> None:
    rows = by_row(ASKED[name])
    assert rows and all(0 < len(items) <= 40 for items in rows.values())
    assert {row: len(items) for row, items in by_row(SUITES[name].items(ALL, 2, 0)).items()} == dict.fromkeys(rows, 2)
    for row, items in rows.items():
        assert len({item.unit for item in items}) == len(items), row


@pytest.mark.parametrize("name", SUITES)
def test_the_candidates_differ_and_no_context_ends_in_white_space(name: str) -> None:
    """Tokenizers join white space at the end of a context and what follows it."""
    for item in ASKED[name]:
        continuations = [query.continuation for query in item.queries]
        if item.kind == "choice":
            assert len(set(continuations)) == len(continuations), item
            assert len({query.prefix for query in item.queries}) == 1
        for query in item.queries:
            assert query.prefix == query.prefix.rstrip() or name == "copying", item


@pytest.mark.parametrize("name", ["characters", "numbers"])
def test_right_answers_are_right_and_wrong_ones_are_not(name: str) -> None:
    for row, items in by_row(ASKED[name]).items():
        assert accuracy(items, knows) == 1.0, row
        for item in items:
            assert not any(map(knows, item.queries[1:])), item
            examples = item.queries[0].prefix.decode().split("\n")[:-1]
            assert len(examples) == 4
            for line in examples:
                asked, _, answer = line.rpartition(" ")
                if line.startswith("Spell"):
                    asked, _, answer = line.partition(": ")
                assert knows(Query(asked.removesuffix(":").encode(), answer.encode())), line
            assert examples[-1].rpartition(" ")[0] != item.queries[0].prefix.decode().split("\n")[-1]


@pytest.mark.parametrize("name", ["blimp", "characters", "numbers", "pronunciation", "spelling"])
def test_whoever_knows_nothing_is_right_as_often_as_by_chance(name: str) -> None:
    for most in (2, 4):
        items = [item for item in ASKED[name] if item.kind == "choice" and len(item.queries) == most]
        if len(items) > 50:
            assert accuracy(items, guess) == pytest.approx(1 / most, abs=2.5 / len(items) ** 0.5)


def test_length_gives_no_answer_away() -> None:
    """The shortest of four is not the right one: candidates have one length, but for a few."""
    items = [item for item in ASKED["characters"] + ASKED["numbers"] if len(item.queries) == 4]
    lengths = Counter(len({len(query.continuation) for query in item.queries}) for item in items)
    assert lengths[1] > 0.97 * len(items)


def test_words_are_in_their_rows_and_examples_are_of_training_words() -> None:
    for item in ASKED["characters"]:
        assert any(f", {group}" in item.row for group in GROUPS)
        assert f", {group_of(item.unit)}" in item.row
        assert ("held-out" in item.row) <= is_held_out(item.unit)
        assert (LONGEST < len(item.unit) <= LONGER) == ("longer" in item.row)
        if item.row.startswith("Reverse"):
            words = [line.split(":")[0].split()[-1] for line in item.queries[0].prefix.decode().split("\n")[:-1]]
            assert all(group_of(word) == "training words" for word in words)


def test_a_misspelling_is_an_edit_of_a_word_that_the_texts_have_and_is_not_there_itself() -> None:
    data = b"\n".join(data for _, data in TEXTS.documents)
    tokens = {token.strip(b".,").lower() for token in data.split()}
    counts = Counter(data.split())
    frequency: dict[str, list[int]] = {"frequent": [], "rare": []}
    for item in ASKED["spelling"]:
        (right, wrong), word = (query.continuation for query in item.queries), item.unit.encode()
        assert item.queries[0].prefix + right in data and right.lstrip().startswith(word)
        after = right.lstrip()[len(word) :]
        assert 0 < len(after) <= 8 and wrong.endswith(after)
        misspelt = wrong.lstrip().removesuffix(after)
        assert misspelt not in tokens
        more = {"swapped": 0, "replaced": 0, "dropped": -1, "doubled": 1}[item.row.split(",")[0]]
        assert len(misspelt) == len(word) + more
        if item.row.startswith("swapped"):
            assert sorted(misspelt) == sorted(word)
        frequency["rare" if "rare" in item.row else "frequent"].append(counts[word])
    assert min(frequency["frequent"]) > sum(frequency["rare"]) / len(frequency["rare"])


def test_a_string_is_scored_after_itself_and_after_another_of_its_kind() -> None:
    rows = by_row(ASKED["copying"])
    assert set(rows) == {"hex", "base64", "rare words", "unseen words", "bytes"}
    for row, items in rows.items():
        assert len({item.queries[1].prefix for item in items}) == 40, row
        for item in items:
            other, same = item.queries
            assert same.continuation == b"\n" + same.prefix != b"\n" + other.prefix
            assert 40 <= len(same.prefix) < 64 and b"\n" not in same.prefix + other.prefix


def test_pronunciations_are_those_of_the_file_and_wrong_ones_of_its_other_words() -> None:
    spoken = dict(line.split(" 1 ") for line in SPOKEN.splitlines())
    for item in ASKED["pronunciation"]:
        first, *others = (query.continuation.decode().strip() for query in item.queries)
        assert item.queries[0].prefix.decode().endswith(f"\nPronounce {item.unit.lower()}:")
        assert spoken[item.unit] == first and len(others) == 3
        assert set(others) <= set(spoken.values()) - {first}


def test_pairs_are_whole_sentences_by_phenomenon() -> None:
    assert {item.row for item in ASKED["blimp"]} == {"agreement"} and len(ASKED["blimp"]) == 5
    assert Item("agreement", "verbs 0", "choice", (Query(b"", b"The cats sit."), Query(b"", b"The cats sits."))) in set(
        ASKED["blimp"]
    )


BAD = {
    "nothing": [],
    "empty": [("a", b"")],
    "short": [("a", b"word")],
    "one word": [("a", b"word " * 500)],
    "no letters": [("a", b"1 2 3 ... --- \n" * 500)],
    "no lower case": [("a", b"ALL OF THIS IS SHOUTED\n" * 500)],
    "bytes": [("a", bytes(range(256)) * 40)],
    "UTF-16": [("a", text(3000).decode().encode("utf-16"))],
    "a long line": [("a", b"a" * 20_000)],
}


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("bad", BAD)
def test_texts_that_have_no_words_give_no_items(name: str, bad: str) -> None:
    found = list(SUITES[name].items(Sources(BAD[bad]), 5, 0))
    if name == "copying":
        found = [item for item in found if item.row == "rare words"]
    assert found == [] or name == "numbers" or (name, bad) == ("spelling", "one word")


@pytest.mark.parametrize("encoding", ["latin-1", "cp1251", "utf-8"])
def test_words_of_other_encodings_are_those_of_plain_letters(encoding: str) -> None:
    """And contexts keep their bytes, whatever they are."""
    foreign = {"cp1251": "привет", "latin-1": "déjà", "utf-8": "déjà"}[encoding]
    data = text().decode().replace("\n", f" {foreign}\n").encode(encoding)
    sources = Sources([("a", data)])
    found = list(spelling.items(sources, 400, 0))
    assert found and all(item.queries[0].prefix + item.queries[0].continuation in data for item in found)
    assert any(foreign.encode(encoding) in item.queries[0].prefix for item in found)
    assert any(item.unit == foreign for item in found) == (encoding == "utf-8")
    assert any("Spell" in item.queries[0].prefix.decode() for item in characters.items(sources, 2, 0))


def test_files_that_are_asked_for_themselves_are_no_texts() -> None:
    assert list(characters.items(Sources([("x", SPOKEN.encode() * 3)]), 5, 0)) == []
    assert list(spelling.items(Sources(FILES), 5, 0)) == []
    assert checksum(spelling.items(ALL, 5, 0)) == checksum(spelling.items(TEXTS, 5, 0))
