"""The suites of this folder: what they make is what they say, from the seed alone, the same everywhere."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import unicodedata
from collections import Counter
from itertools import groupby

import numpy as np
import pytest

from bytelm.evaluate.robustness import boundary, degenerate, noise, scripts
from bytelm.evaluate.robustness.base import Item, Query, Sources, checksum, cut

ENGLISH = "The quick brown fox, 42 years old, jumps over 1234567 lazy dogs and naïve cats at the café. " * 30
RUSSIAN = "Съешь же ещё этих мягких французских булок, да выпей чаю. " * 30
LATIN_1 = ENGLISH.encode("latin-1")
SOURCES = Sources([("a.txt", ENGLISH.encode()), ("b.txt", RUSSIAN.encode())])
MODULES = {"noise": noise, "boundary": boundary, "degenerate": degenerate}


def rows(items: list[Item]) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.row, []).append(item)
    return found


# --- noise ------------------------------------------------------------------------------------------------------------


def test_noise_is_in_the_prefix_and_the_target_is_clean() -> None:
    found = rows(list(noise.items(SOURCES, 6, 0)))
    assert len(found) == 5 + 6 * 4
    whole = {name: data for name, data in SOURCES.documents}
    for items in found.values():
        for item in items:
            changed, original = item.queries
            assert original.prefix + original.continuation in whole[item.unit]
            assert changed.continuation == original.continuation and changed.prefix != original.prefix
            assert noise.TARGET - 4 <= len(original.continuation) <= noise.TARGET
            for data in (original.prefix, original.continuation, changed.prefix):
                data.decode()  # characters are whole


def test_each_perturbation_does_what_its_name_says() -> None:
    text, random = "Ab, café 12", np.random.default_rng(0)
    found = dict(noise.whole(text, random))
    assert found["spaced upper case (AntSpeak)"] == "A B ,   C A F É   1 2"
    assert found["upper case"] == "AB, CAFÉ 12"
    assert found["random case"].lower() == text.lower()
    mixed = dict(noise.whole("ab" * 200, random))["random case"]
    assert 140 < sum(c.isupper() for c in mixed) < 260
    assert found["decomposed (NFD)"] == unicodedata.normalize("NFD", text) != text
    assert found["no spaces"] == "Ab,café12"
    letters = "abcdefghijklmnop qrst" * 20
    for strength in noise.STRENGTHS:
        count = round(len(letters) * strength / 100)
        assert len(noise.graded(letters, "drops", strength, np.random.default_rng(1))) == len(letters) - count
        spread = noise.graded(letters, "zero-width", strength, np.random.default_rng(1))
        assert spread.count("\u200b") == count and spread.replace("\u200b", "") == letters
        repeated = noise.graded(letters, "repeats", strength, np.random.default_rng(1))
        runs = Counter(len(list(run)) for _, run in groupby(repeated))
        assert runs.keys() <= {1, 2, 3, 4} and runs.total() - runs[1] == count
        for name, able in (("keyboard neighbours", noise.NEAR), ("homoglyphs", noise.HOMOGLYPHS)):
            other = noise.graded(letters, name, strength, np.random.default_rng(1))
            apart = [(a, b) for a, b in zip(letters, other, strict=True) if a != b]
            assert len(apart) == round(sum(c in able for c in letters) * strength / 100)
            assert all(b in able[a] for a, b in apart)
        less = noise.graded(letters, "removed spaces", strength, np.random.default_rng(1))
        assert letters.count(" ") - less.count(" ") == max(1, round(letters.count(" ") * strength / 100))


def test_keys_are_near_each_other_both_ways() -> None:
    assert set(noise.NEAR["g"]) == set("ftyhvb") | set("") and "s" not in noise.NEAR["q"]
    assert all(key in noise.NEAR[near] for key, others in noise.NEAR.items() for near in others)
    assert all(unicodedata.name(c) != unicodedata.name(other) for c, other in noise.HOMOGLYPHS.items())
    assert not set(noise.LATIN) & set(noise.ALIKE)


def test_what_changes_at_one_strength_changes_at_higher_ones_too() -> None:
    letters = "abcdefghij" * 30
    less, more = (noise.graded(letters, "homoglyphs", s, np.random.default_rng(5)) for s in (5, 20))
    changed = [{i for i, c in enumerate(text) if c != letters[i]} for text in (less, more)]
    assert changed[0] < changed[1]


def test_bytes_that_are_not_utf8_stay_as_they_are() -> None:
    found = list(noise.items(Sources([("latin-1", LATIN_1)]), 9, 0))
    assert len({item.row for item in found}) > 20
    for item in found:
        changed, original = ([query.prefix.count(byte) for byte in b"\xe9\xef"] for query in item.queries)
        assert changed == original and sum(original) > 1, item.row


def test_a_prefix_that_stays_as_it_was_is_no_item() -> None:
    found = rows(list(noise.items(Sources([("x", b"0123456789" * 60)]), 2, 0)))
    assert not {"upper case", "decomposed (NFD)", "no spaces", "homoglyphs 10 %"} & found.keys()
    assert "drops 10 %" in found


def test_too_short_texts_make_no_items() -> None:
    short = Sources([("x", b"word " * 20), ("y", b"w"), ("z", b"")])
    assert list(noise.items(short, 5, 0)) == [] and list(boundary.items(short, 5, 0)) == []


def test_the_mean_at_a_strength_is_over_its_rows() -> None:
    rows = {"drops 2 %": {"difference": 1.0}, "repeats 2 %": {"difference": 3.0}, "upper case": {"difference": 9.0}}
    assert noise.summary(rows) == {"bits/byte lost, mean at 2 %": 2.0}
    assert noise.curves(list(rows)) == {"drops": [(2.0, "drops 2 %")], "repeats": [(2.0, "repeats 2 %")]}


# --- boundary ---------------------------------------------------------------------------------------------------------


def test_cuts_are_where_their_row_says() -> None:
    found = rows(list(boundary.items(SOURCES, 20, 0)))
    assert set(found) == {*boundary.PLACES, boundary.INSIDE}
    for name, items in found.items():
        for item in items:
            prefix, rest = item.queries[0].prefix, item.queries[0].continuation
            assert item.queries == cut(prefix, rest) and len(rest) == boundary.REST
            if name == "before a space":
                assert rest[:1] == b" " != prefix[-1:]
            elif name == "after a space":
                assert prefix[-1:] == b" " != rest[:1]
            elif name == "in a number":
                assert prefix[-1:].isdigit() and rest[:1].isdigit()
            elif name == "in a word":
                assert prefix.decode()[-1].isalpha() and (rest + b"  ").decode(errors="ignore")[0].isalpha()
            else:
                with pytest.raises(UnicodeDecodeError):
                    prefix.decode()
                assert rest[0] & 0xC0 == 0x80


def test_rare_places_are_searched_for() -> None:
    text = (b"words and words " * 40 + b"1234567890" * 10) * 20
    found = rows(list(boundary.items(Sources([("x", text)]), 4, 0)))
    assert {name: len(items) for name, items in found.items()} == dict.fromkeys(boundary.PLACES, 4)


def test_bytes_that_are_not_utf8_are_not_cut_inside() -> None:
    assert boundary.places(b"a\xe9b \xff 12") == {
        "before a space": [3, 5],
        "after a space": [4, 6],
        "in a word": [],
        "in a number": [7],
        "inside a character": [],
    }
    assert boundary.places("é€".encode())["inside a character"] == [1, 3, 4]


def test_queries_that_do_not_belong_together_are_refused() -> None:
    with pytest.raises(ValueError, match="do not belong"):
        Item("row", "unit", "cut", (Query(b"a", b"b"), Query(b"", b"ab"), Query(b"", b"b")))
    with pytest.raises(ValueError, match="empty continuation"):
        Item("row", "unit", "cut", cut(b"", b"b"))
    with pytest.raises(ValueError, match="no prefix"):
        Item("row", "unit", "document", (Query(b"a", b"b"),))


# --- degenerate, scripts ----------------------------------------------------------------------------------------------


def test_degenerate_documents_need_no_files_and_are_what_they_are_called() -> None:
    found = rows(list(degenerate.items(Sources([]), 8, 0)))
    assert {row: len(items) for row, items in found.items()} == dict.fromkeys(found, 2) and len(found) == 6
    for row, items in found.items():
        for item in items:
            data = item.queries[0].continuation
            assert len(data) == degenerate.SIZE
            assert len(set(data)) == {"runs of one byte": 1, "NULs": 1, "long whitespace": 4}.get(row, len(set(data)))
    (document, _) = (item.queries[0].continuation for item in found["minified JSON"])
    assert document.startswith(b'[{"id":') and b" " not in document and b"\n" not in document
    assert len(set(found["random bytes"][0].queries[0].continuation)) > 200
    whole = dict(degenerate.texts(np.random.default_rng(0)))
    assert json.loads(whole["minified JSON"])


def folder(*languages: str, articles: int = 3) -> Sources:
    names = [f"texts/{language}/{number}.txt" for language in languages for number in range(articles)]
    return Sources([(name, f"{name} says".encode() * 3) for name in names])


def test_scripts_pairs_the_articles_of_languages() -> None:
    items = list(scripts.items(folder("deu", "eng", "zh-Hans"), 2, 0))
    assert Counter(item.row for item in items) == {"deu": 2, "eng": 2, "zh-Hans": 2}
    units = {row: [item.unit for item in own] for row, own in rows(items).items()}
    assert units["deu"] == units["eng"] == units["zh-Hans"]
    assert scripts.reference(["deu", "eng", "zh-Hans"]) == "eng" and scripts.reference(["fra", "deu"]) == "deu"
    assert all(item.queries[0].continuation.startswith(f"texts/{item.row}/{item.unit}".encode()) for item in items)


@pytest.mark.parametrize("sources", [
    folder("eng"), folder("Documents", "Pictures"), Sources([("0 .txt", b"text"), ("1 .txt", b"text")]),
    Sources([(f"src/{name}.py", b"x = 1") for name in ("cli/__init__", "cli/a", "cli/b", "cli/c", "hf/__init__")]),
])  # fmt: skip
def test_folders_that_are_no_languages_make_no_items(sources: Sources) -> None:
    assert list(scripts.items(sources, 5, 0)) == []


def test_an_article_that_a_language_lacks_is_left_out_there() -> None:
    missing = Sources([(n, d) for n, d in folder("eng", "deu").documents if n != "texts/deu/1.txt"])
    assert Counter(item.row for item in scripts.items(missing, 9, 0)) == {"eng": 3, "deu": 2}


def test_gini_and_parity_are_known_for_known_shares() -> None:
    assert scripts.gini([2.0, 2.0, 2.0]) == pytest.approx(0.0)
    assert scripts.gini([0.0, 0.0, 0.0, 4.0]) == pytest.approx(0.75)
    assert scripts.gini([1.0, 3.0]) == pytest.approx(0.25)
    found = scripts.summary({"eng": {"relative": 1.0}, "deu": {"relative": 3.0}})
    assert found == {"bits per article, max/min": 3.0, "bits per article, Gini": pytest.approx(0.25)}


# --- all of them ------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import sys
from importlib import import_module
from bytelm.evaluate.robustness.base import Sources, checksum
text = sys.argv[2].encode()
module = import_module(f"bytelm.evaluate.robustness.{sys.argv[1]}")
print(checksum(module.items(Sources([("a", text), ("b", text[7:])]), 4, 3)))
"""


@pytest.mark.parametrize("name", MODULES)
def test_a_manifest_is_the_same_in_another_process_and_another_with_another_seed(name: str) -> None:
    text = (ENGLISH + RUSSIAN).encode()
    sources = Sources([("a", text), ("b", text[7:])])
    here, other = (checksum(MODULES[name].items(sources, 4, seed)) for seed in (3, 4))
    command = [sys.executable, "-c", ELSEWHERE, name, text.decode()]
    there = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert here == there != other and len(here) == len(hashlib.sha256().hexdigest())
