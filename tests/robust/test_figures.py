"""Known models have known figures: uniform, order 0 and order 1; intervals, pairing, and what is asked of whom."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from asked import Counts, Next, column
from bytelm.checkpoint.assemble import Loaded
from bytelm.errors import UsageError
from bytelm.evaluate import meter
from bytelm.evaluate.bits import DocumentBits
from bytelm.evaluate.meter import bootstrap, interval
from bytelm.evaluate.robustness import boundary, noise
from bytelm.evaluate.robustness.base import Item, Query, Sources, cut
from bytelm.find import find
from bytelm.robust.answers import Answers, Asked, Document, ask, kept, unwritten_rows
from bytelm.robust.columns import Column, columns_of, identity_of
from bytelm.robust.figures import headline, results
from bytelm.testing.tiny import UniformModel, tiny_models
from bytelm.training.stop import Interrupted
from bytelm.units import LN2

TEXT = ("Every day, 31 cafés in the old town sell 1205 cups of coffee to people who know. " * 40).encode()
UNIFORM = math.log2(260)


def asked(tmp_path: Path, items: list[Item], *columns: Column, suite: Any = None) -> dict[str, Any]:
    """The results of models on items."""
    queries = Asked.of(items)
    answers = {c.name: (queries, ask(c, queries, tmp_path / f"{c.name}.json", None)) for c in columns}
    return results(suite or ModuleType("suite"), items, answers)


def figures(found: dict[str, Any], model: str = "model") -> dict[str, dict[str, float]]:
    return {row["row"]: {k: v["value"] for k, v in row["figures"][model].items()} for row in found["rows"]}


def one(kind: Any, *queries: Query, row: str = "row", unit: str = "unit") -> Item:
    return Item(row, unit, kind, queries)


# --- known answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", [noise, boundary])
def test_a_uniform_model_loses_nothing(tmp_path: Path, suite: Any) -> None:
    items = list(suite.items(Sources([("a", TEXT), ("b", TEXT[11:])]), 4, 0))
    for row, own in figures(asked(tmp_path, items, column(UniformModel()), suite=suite)).items():
        assert own["difference"] == pytest.approx(0.0, abs=1e-5), row
        assert own["changed"] == pytest.approx(UNIFORM, abs=1e-5) == own["original"]


def test_every_kind_has_its_known_figures_of_an_order_0_model(tmp_path: Path) -> None:
    model = Counts({ord("a"): 0.5, ord("b"): 0.25}, 0.25 / 254)  # 1 and 2 bits; the rest are dear
    items = [
        one("bits", Query(b"zz", b"ab"), row="bits"),
        one("choice", Query(b"zz", b"ba"), Query(b"zz", b"bb"), row="right"),
        one("choice", Query(b"zz", b"bb"), Query(b"zz", b"ba"), row="wrong"),
        one("choice", Query(b"zz", b"aa"), Query(b"yy", b"aa"), row="a tie"),
        one("difference", Query(b"noise", b"aab"), Query(b"clean", b"aab"), row="difference"),
        one("document", Query(b"", b"aabb" * 30), row="document"),
        Item("cut", "unit", "cut", cut(b"ba", b"ab")),
        one("generation", Query(b"b", b"aaa\n"), row="generation"),
    ]
    found = figures(asked(tmp_path, items, column(model)))
    assert found["bits"] == {"bits_per_byte": pytest.approx(1.5, abs=1e-5)}
    assert found["right"] == {"accuracy": 1.0, "bits_per_byte": pytest.approx(1.5, abs=1e-5)}
    assert found["wrong"] == {"accuracy": 0.0, "bits_per_byte": pytest.approx(2.0, abs=1e-5)}
    assert found["a tie"]["accuracy"] == 0.0  # a model that cannot tell them apart does not know
    wanted = {"difference": 0.0, "changed": 4 / 3, "original": 4 / 3}
    assert found["difference"] == pytest.approx(wanted, abs=1e-5)
    assert found["cut"] == pytest.approx({"difference": 0.0, "changed": 1.5, "original": 1.5}, abs=1e-5)
    assert found["document"]["bits_per_byte"] == pytest.approx(1.5, abs=1e-5)
    assert found["document"]["bytes_per_second"] > 0 and "bytes_per_patch" not in found["document"]
    assert found["generation"] == {"exact_match": 0.0}  # it writes "a" for ever


def test_what_is_generated_counts_up_to_the_end_of_the_line(tmp_path: Path) -> None:
    """`Next` counts upwards from the prompt's last byte: after 6, 7, 8, 9 comes 10, which ends the line."""
    items = [
        one("generation", Query(b"\x06", bytes([7, 8, 9])), row="right"),
        one("generation", Query(b"\x06", bytes([7, 8, 9, 10])), row="right, with its end"),
        one("generation", Query(b"\x06", bytes([7, 8])), row="too short"),
        one("generation", Query(b"\x06", bytes([7, 8, 8])), row="other"),
        one("generation", Query(b"\x05", bytes([6, 7, 8, 9, 11, 12])), row="beyond the end"),
        one("generation", Query(b"a", b"bcd"), row="no end"),
    ]
    found = {row: own["exact_match"] for row, own in figures(asked(tmp_path, items, column(Next()))).items()}
    assert [row for row, share in found.items() if share == 1.0] == ["right", "right, with its end"]


def test_the_prefix_is_not_counted_and_is_read(tmp_path: Path) -> None:
    right, wrong = (math.log2(math.e ** (5 * (1 - hit)) * (math.e**5 + 259) / math.e**5) for hit in (1, 0))
    items = [one("difference", Query(b"xxx" * 50, b"bc"), Query(b"xxa", b"bc"))]
    own = figures(asked(tmp_path, items, column(Next())))["row"]
    assert own["original"] == pytest.approx(right, abs=1e-4)
    assert own["changed"] == pytest.approx((wrong + right) / 2, abs=1e-4)


def test_cutting_costs_models_over_bytes_nothing(tmp_path: Path) -> None:
    """The chain rule, in every architecture and patching scheme, in texts longer than the context too."""
    items = list(boundary.items(Sources([("a", TEXT)]), 2, 0))
    for name, model in [pair for pair in tiny_models() if pair[1].tokens is None][::5]:
        found = asked(tmp_path, items, Column(name.replace("/", " "), name, model.eval(), 100))
        for row, own in figures(found, name.replace("/", " ")).items():
            assert own["difference"] == pytest.approx(0.0, abs=1e-4), (name, row)


def test_a_model_whose_likelihood_is_of_tokens_may_lose_by_a_cut(tmp_path: Path) -> None:
    def together(model: Any, pairs: Any, context: int) -> Any:
        """Two "a" are one token, which costs as much as any other: a bit."""
        return (len((prefix + text).replace(b"aa", b"A")[len(prefix) :]) * LN2 for prefix, text in pairs)

    def apart(model: Any, pairs: Any, context: int) -> Any:
        return (len(text.replace(b"aa", b"A")) * LN2 for _, text in pairs)

    items = [Item("row", "unit", "cut", cut(b"xa", b"ay"))]
    own = figures(asked(tmp_path, items, column(UniformModel(), likelihood=together, prompted=apart)))["row"]
    # The prompt "xa" and then "ay" are 2 + 2 tokens, "xaay" is 3: of the rest, 2 against 1.
    assert own == pytest.approx({"difference": 0.5, "changed": 1.0, "original": 0.5})


# --- intervals and pairs ----------------------------------------------------------------------------------------------


def test_an_interval_is_that_of_meter_and_over_units() -> None:
    rng = np.random.default_rng(0)
    documents = [
        DocumentBits("", int(n), float(n * x)) for n, x in zip(rng.integers(50, 90, 20), rng.random(20), strict=True)
    ]
    sums = np.array([[d.nats / LN2, d.bytes] for d in documents])
    low, high = bootstrap(sums, lambda drawn: drawn[:, :1] / drawn[:, 1:])[:, 0]
    assert interval(documents) == pytest.approx((low, high))


def varied(count: int, units: int) -> list[Item]:
    """Items of one row whose bits per byte vary, in units."""
    rng = np.random.default_rng(1)
    return [
        one("bits", Query(b"", bytes(rng.integers(97, 99 + k % 5, 30).astype(np.uint8).tolist())), unit=str(k % units))
        for k in range(count)
    ]


def test_few_units_are_resampled_by_item_and_many_as_wholes(tmp_path: Path) -> None:
    model = column(Counts({97: 0.5, 98: 0.3}, 0.2 / 254))
    widths: list[float] = []
    for units in (1, 7, 8, 40):
        (row,) = asked(tmp_path, varied(40, units), model)["rows"]
        own = row["figures"]["model"]["bits_per_byte"]
        assert own["low"] < own["value"] < own["high"]
        widths.append(own["high"] - own["low"])
    assert widths[0] == widths[1] == widths[3] != widths[2]
    (single,) = asked(tmp_path / ".", [one("bits", Query(b"", b"a"))], column(UniformModel(), "another"))["rows"]
    assert single["figures"]["another"]["bits_per_byte"]["low"] is None


def test_differences_are_paired(tmp_path: Path) -> None:
    """A model that is 1/10 bit dearer on every byte is so for sure, however much items vary."""
    model, dearer = Counts({97: 0.5, 98: 0.3}, 0.2 / 254), Counts({97: 0.5, 98: 0.3}, 0.2 / 254)
    with torch.no_grad():
        dearer.line -= 0.1 * LN2
    dearer.line.data[-1] = math.log(1 - 2**-0.1)
    (row,) = asked(tmp_path, varied(40, 40), column(model), column(dearer, "dearer"))["rows"]
    own, apart = row["figures"]["model"]["bits_per_byte"], row["differences"]["dearer"]["bits_per_byte"]
    assert apart["value"] == pytest.approx(0.1, abs=1e-4)
    assert apart["high"] - apart["low"] < 1e-4 < own["high"] - own["low"]
    assert "model" not in row["differences"]


def test_the_memory_of_resampling_does_not_change_what_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = np.random.default_rng(2).random((30, 6))

    def ratios(drawn: Any) -> Any:
        return drawn[:, ::2] / drawn[:, 1::2]

    wanted = bootstrap(sums, ratios)
    assert wanted.shape == (2, 3) and (wanted[0] < wanted[1]).all()
    monkeypatch.setattr(meter, "AREA", 500)
    assert (bootstrap(sums, ratios) == wanted).all()


def test_rows_are_related_to_the_reference_over_the_units_they_share(tmp_path: Path) -> None:
    model = Counts({97: 0.5, 98: 0.25}, 0.25 / 254)
    texts = {("eng", "1"): b"a" * 40, ("eng", "2"): b"a" * 60, ("deu", "1"): b"b" * 40, ("deu", "3"): b"b" * 90}
    items = [one("document", Query(b"", data), row=row, unit=unit) for (row, unit), data in texts.items()]
    suite = ModuleType("suite")
    vars(suite).update(PER="article", reference=lambda rows: "eng", summary=lambda rows: {"n": len(rows)})
    found = asked(tmp_path, items, column(model), suite=suite)
    own = figures(found)
    assert own["eng"]["relative"] == pytest.approx(1.0) and own["deu"]["relative"] == pytest.approx(2.0, abs=1e-5)
    assert own["eng"]["bits_per_unit"] == pytest.approx(50.0, abs=1e-3)
    assert "patches_per_unit" not in own["eng"] and own["eng"]["seconds_per_unit"] > 0
    assert found["summary"] == {"model": {"n": 2.0}} and found["reference"] == "eng"


def test_figures_of_a_unit_are_over_units() -> None:
    """Whatever their size; patches of a model that has some."""
    items = [one("document", Query(b"", b"a" * size), unit=str(size)) for size in (40, 60)]
    asked = Asked.of(items)
    answers = Answers(documents=[Document(LN2 * 80, 10, 2.0), Document(LN2 * 30, 5, 3.0)])
    suite = ModuleType("suite")
    suite.PER = "article"
    (row,) = results(suite, items, {"model": (asked, answers)})["rows"]
    assert {key: each["value"] for key, each in row["figures"]["model"].items()} == pytest.approx(
        {
            "bits_per_byte": 1.1,
            "bytes_per_patch": 100 / 15,
            "bytes_per_second": 20.0,
            "bits_per_unit": 55.0,
            "patches_per_unit": 7.5,
            "seconds_per_unit": 2.5,
        }
    )


# --- asking -----------------------------------------------------------------------------------------------------------


def test_what_was_answered_before_an_interruption_is_not_asked_again(tmp_path: Path) -> None:
    items = [*varied(30, 30), one("generation", Query(b"a", b"b")), one("document", Query(b"", b"abc" * 9))]
    queries, path, scored = Asked.of(items), tmp_path / "kept.json", list[int]()

    def progress(size: int) -> None:
        scored.append(size)
        if len(scored) == 12:
            raise Interrupted(2)

    with pytest.raises(Interrupted):
        ask(column(Next()), queries, path, progress)
    part = kept(path)
    assert len(part.nats) == 12 and not part.complete(queries)
    whole = ask(column(Next()), queries, path, progress)
    assert len(scored) == len(set(map(str, items))) == len(items) and kept(path) == whole
    fresh = ask(column(Next()), queries, tmp_path / "fresh.json", None)
    assert whole.nats == pytest.approx(fresh.nats) and whole.written == fresh.written
    assert whole.seconds > part.seconds
    assert ask(column(Next()), queries, path, progress) == whole and len(scored) == len(items)


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b'{"nats": []}', b'{"documents": [{"x": 1}]}', b"\xff"])
def test_damaged_answers_are_asked_again(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "kept.json"
    path.write_bytes(damage)
    assert kept(path) == Answers()


@pytest.mark.parametrize("change", [{"nats": "abc"}, {"nats": ["a"]}, {"nats": [1.0] * 99}, {"seconds": [1]}])
def test_answers_that_do_not_fit_the_questions_are_asked_again(tmp_path: Path, change: dict[str, Any]) -> None:
    queries, path = Asked.of(varied(3, 3)), tmp_path / "kept.json"
    wanted = ask(column(UniformModel()), queries, path, None)
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    assert ask(column(UniformModel()), queries, path, None).nats == pytest.approx(wanted.nats)


def test_differences_of_each_model_are_to_the_first_one(tmp_path: Path) -> None:
    models = [
        column(Counts({97: p, 98: 0.3}, (0.7 - p) / 254), name) for p, name in ((0.5, "a"), (0.4, "b"), (0.2, "c"))
    ]
    (row,) = asked(tmp_path, varied(20, 20), *models)["rows"]
    value = {name: figures["bits_per_byte"]["value"] for name, figures in row["figures"].items()}
    for name in "bc":
        assert row["differences"][name]["bits_per_byte"]["value"] == pytest.approx(value[name] - value["a"])


def test_the_order_of_queries_follows_from_them_alone() -> None:
    """Kept answers are told apart by it: of one length by the prefix, of one prefix by the continuation."""
    pairs = [(bytes((p,)), bytes((c, 65))) for p in b"abc" for c in b"ABCDEFGHIJKL"] + [(b"", b"z")]
    items = [one("bits", Query(*pair)) for pair in pairs[::-1]]
    assert Asked.of(items).likelihoods == [Query(b"", b"z"), *(Query(*pair) for pair in pairs[:-1])]


def test_seconds_are_those_of_all_sessions(tmp_path: Path) -> None:
    queries, path = Asked.of(varied(4, 4)), tmp_path / "kept.json"
    ask(column(UniformModel()), queries, path, None)
    found = json.loads(path.read_bytes())
    path.write_text(json.dumps(found | {"nats": found["nats"][:2], "seconds": 1e6}))
    assert ask(column(UniformModel()), queries, path, None).seconds > 1e6


def test_a_query_that_many_items_share_is_asked_once() -> None:
    clean = Query(b"clean", b"text")
    items = [one("difference", Query(bytes([k]), b"text"), clean) for k in range(9)]
    queries = Asked.of(items)
    assert len(queries.likelihoods) == 10 and not queries.prompted and queries == Asked.of(items[::-1])
    assert queries.bytes == 9 * 5 + 9


def test_a_run_over_pictures_is_refused(tmp_path: Path) -> None:
    pictures = find("data.modalities", "image").Config().build()
    loaded = Loaded(UniformModel(), {"context": 9}, tmp_path, pictures)
    with pytest.raises(UsageError, match="photos models image data, and the suites are of texts"):
        columns_of("photos", loaded, None)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (texts,) = columns_of("texts", Loaded(UniformModel(), {"context": 9}, tmp_path, None), None)
    assert (texts.name, texts.context) == ("texts", 9)
    (tmp_path / "model.safetensors").write_bytes(b"others")
    (others,) = columns_of("texts", Loaded(UniformModel(), {"context": 9}, tmp_path, None), 5)
    assert others.context == 5 and others.identity != texts.identity


# --- the figure that stands for a suite -------------------------------------------------------------------------------


def test_the_headline_of_a_suite_is_the_mean_over_rows_of_its_main_figure(tmp_path: Path) -> None:
    """However many items a row has, and whatever its other rows are of."""
    model = Counts({ord("a"): 0.5, ord("b"): 0.25}, 0.25 / 254)
    right, wrong = (Query(b"zz", b"ba"), Query(b"zz", b"bb")), (Query(b"zz", b"bb"), Query(b"zz", b"ba"))
    items = [one("generation", Query(b"b", b"aaa\n"), row="written"), one("choice", *right, row="one")]
    items += [one("choice", *both, row="three") for both in (right, wrong, wrong)]
    found = asked(tmp_path, items, column(model))
    assert found["headline"] == {"label": "accuracy", "values": {"model": pytest.approx((1 + 1 / 3) / 2)}}
    (tmp_path / "model.json").unlink()
    found = asked(tmp_path, items[:1], column(model))
    assert found["headline"] == {"label": "exact match", "values": {"model": 0.0}}


@pytest.mark.parametrize(
    ("name", "label"), [("noise", "mean at 10 %"), ("degenerate", "worst"), ("scripts", "max/min")]
)
def test_a_suite_may_say_which_of_its_further_figures_that_is(tmp_path: Path, name: str, label: str) -> None:
    suite = find("evaluate.robustness", name)
    texts = [(f"{code}/1.txt", TEXT[at:]) for code, at in (("eng", 0), ("deu", 700))]
    found = asked(tmp_path, list(suite.items(Sources(texts), 2, 0)), column(UniformModel()), suite=suite)
    assert label in found["headline"]["label"]
    assert found["headline"]["values"] == {"model": found["summary"]["model"][found["headline"]["label"]]}
    wanted = {"noise": 0.0, "degenerate": UNIFORM, "scripts": len(TEXT) / (len(TEXT) - 700)}
    assert found["headline"]["values"]["model"] == pytest.approx(wanted[name], abs=1e-4)


def test_a_model_without_the_figure_has_no_headline() -> None:
    rows = [{"kinds": ["bits"], "figures": {"a": {"bits_per_byte": {"value": 2.0}}, "b": {}}}]
    found = {"rows": rows, "summary": {"a": {"worst": 3.0}, "b": {}}}
    suite = ModuleType("suite")
    assert headline(suite, found, ["a", "b"]) == {"label": "bits/byte", "values": {"a": 2.0}}
    suite.HEADLINE = "worst"
    assert headline(suite, found, ["a", "b"]) == {"label": "worst", "values": {"a": 3.0}}


def test_a_row_that_a_model_could_not_write_has_no_figure_and_the_suite_no_mean(tmp_path: Path) -> None:
    """One of its prompts is too long for it: others would be compared on other items."""
    items = [
        one("generation", Query(b"\x06" * n, bytes([7, 8, 9])), row=f"row {n > 2}", unit=str(n)) for n in (1, 2, 3, 4)
    ]

    def writes(prompt: bytes, text: bytes, end: bytes) -> bool | None:
        assert (text, end) == (bytes([7, 8, 9]), b"\n")
        return None if len(prompt) > 3 else len(prompt) != 1

    short = column(Next(), "short", writes=writes)
    found = asked(tmp_path, items, short, column(Next()))
    assert figures(found, "short") == {"row False": {"exact_match": 0.5}, "row True": {}}
    assert figures(found) == {"row False": {"exact_match": 1.0}, "row True": {"exact_match": 1.0}}
    assert [row["differences"]["model"] != {} for row in found["rows"]] == [True, False]
    assert found["headline"] == {"label": "exact match", "values": {"model": 1.0}}
    queries = Asked.of(items)
    answers = ask(short, queries, tmp_path / "short.json", None)
    assert unwritten_rows(items, queries, answers) == ["row True"] and kept(tmp_path / "short.json") == answers


def test_every_file_of_a_folder_is_part_of_its_identity(tmp_path: Path) -> None:
    """Vocabularies of some tokenizers are no JSON: vocab.txt, merges.txt, tokenizer.model."""
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (tmp_path / name).write_text(name)
    before = identity_of(tmp_path)
    assert identity_of(tmp_path) == before
    (tmp_path / "vocab.txt").write_text("another")
    assert identity_of(tmp_path) != before
