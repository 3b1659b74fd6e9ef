"""Suites as tasks of the harness: the figures are those of our own windows, item by item."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelm.errors import ResourceError, UsageError
from bytelm.evaluate.bits import continuations, measure
from bytelm.evaluate.exported import export
from bytelm.evaluate.robustness import characters, copying, numbers, spelling
from bytelm.evaluate.robustness.base import Item, Query
from bytelm.generate.prompts import generate
from bytelm.generate.sampling import Sampling
from bytelm.lm import LM
from bytelm.models.transformer import model as transformer
from bytelm.units import LN2
from solving import TEXTS, by_row

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    from bytelm.harness import run_tasks

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
CONTEXT = 512


def model(seed: int) -> transformer.ByteTransformer:
    """A model whose most probable byte is a small letter, a digit or the end of a line."""
    built = transformer.Config(layers=1, dim=16, heads=2, ffn_multiple=16).build()
    built.init_weights(seed)
    allowed = torch.zeros(built.head.weight.shape[0], 1)
    allowed[list(b"\n 0123456789abcdefghijklmnopqrstuvwxyz")] = 1
    with torch.no_grad():
        built.head.weight *= allowed * 3
    return built.eval()


MODEL = model(2)
PROMPTS = [b"%d + %d =" % (one, other) for one in range(8) for other in range(8)]


def written(prompts: list[bytes]) -> list[bytes | None]:
    """What the model writes up to the end of a line; None where that does not come."""
    found = generate(MODEL, prompts, max_bytes=13, sampling=Sampling(0.0), stop=[b"\n"])
    return [None if one.reason == "length" else one.data for one in found]


EASY = [
    Item("by itself", str(n), "generation", (Query(prompt, answer or b"never written"),))
    for n, (prompt, answer) in enumerate(zip(PROMPTS, written(PROMPTS), strict=True))
    if answer or n < 9
]
DOCUMENTS = [Item("whole", str(n), "document", (Query(b"", text),)) for n, text in enumerate((b"ab", "é\n字".encode()))]
TIMES = [
    Item("dates", day, "bits", (Query(b"2024-01-02", day.encode()),)) for day in ("2024-01-03", "2024-02-03T04:05:06Z")
]
CUT = [Item("in a word", "1", "cut", (Query(b"a wo", b"rd"), Query(b"", b"a word"), Query(b"", b"a wo")))]
OTHER = {"easy": EASY, "degenerate": DOCUMENTS, "times": TIMES}


def ours(items: list[Item]) -> dict[str, float]:
    """The figures of one row, in our own windows."""
    kind, queries = items[0].kind, [item.queries for item in items]
    sizes = sum(len(one[0].continuation) for one in queries)
    if kind == "generation":
        texts = written([one[0].prefix for one in queries])
        done = [text == one[0].continuation for text, one in zip(texts, queries, strict=True)]
        return {"exact_match": sum(done) / len(done)}
    if kind == "document":
        found = measure(MODEL, [("", one[0].continuation) for one in queries], context=CONTEXT)
        return {"bits_per_byte": sum(one.nats for one in found) / LN2 / sizes}
    pairs = [[(query.prefix, query.continuation) for query in one] for one in queries]
    bits = [[nats / LN2 for nats, _ in continuations(MODEL, one, context=CONTEXT)] for one in pairs]
    if kind == "difference":
        changed, original = (sum(one[n] for one in bits) / sizes for n in (0, 1))
        return {"changed": changed, "original": original, "difference": changed - original}
    figures = {"bits_per_byte": sum(one[0] for one in bits) / sizes}
    return figures | ({"acc": sum(one[0] < min(one[1:]) for one in bits) / len(bits)} if kind == "choice" else {})


def figures(folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """What the harness measures."""
    found = run_tasks(LM(MODEL, CONTEXT), names, folder)
    return {
        task: {
            key.removesuffix(",none"): value for key, value in row.items() if key.endswith(",none") and "std" not in key
        }
        for task, row in found.items()
    }


SUITES: dict[str, Any] = {
    "characters": [item for item in characters.items(TEXTS, 3, 0) if "held" in item.row],
    "copying": list(copying.items(TEXTS, 3, 0)),
    "numbers": [item for item in numbers.items(TEXTS, 3, 0) if "2" in item.row or "separated" in item.row],
    "spelling": [item for item in spelling.items(TEXTS, 3, 0) if "rare" in item.row],
}


@pytest.mark.fault("M4")
def test_the_harness_gives_our_figures(tmp_path: Path) -> None:
    suites = SUITES | OTHER
    tasks = export(suites, tmp_path / "tasks")
    rows = {f"{suite} {row}": items for suite in suites for row, items in by_row(suites[suite]).items()}
    names = {title.replace("characters ", "cute ", 1): items for title, items in rows.items()}
    wanted: dict[str, dict[str, float]] = {}
    for title, items in names.items():
        suite, _, row = title.partition(" ")
        if title != "copying bytes":  # which are no text
            wanted[f"{suite}_bytes_" + row.replace(", ", "_").replace(" ", "_").replace("-", "_")] = ours(items)
    assert sorted(wanted) == tasks and len(tasks) > 30
    found = figures(tmp_path / "tasks", [f"{suite}_bytes" for suite in ("cute", "copying", "spelling", "numbers")])
    found |= figures(tmp_path / "tasks", ["easy_bytes", "degenerate_bytes", "times_bytes"])
    assert set(found) == set(wanted)
    for task, row in wanted.items():
        assert found[task] == pytest.approx(row, rel=1e-5, abs=1e-6), task
    assert 0 < wanted["easy_bytes_by_itself"]["exact_match"] < 1
    assert len({row["acc"] for row in wanted.values() if "acc" in row}) > 2


def test_a_folder_may_be_moved_and_the_same_items_make_the_same_bytes(tmp_path: Path) -> None:
    assert export(OTHER, tmp_path / "one") == export(OTHER, tmp_path / "two")
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1] and "questions.py" in files[0]
    (tmp_path / "one").rename(tmp_path / "elsewhere")
    assert figures(tmp_path / "elsewhere", ["times_bytes_dates"])["times_bytes_dates"] == pytest.approx(ours(TIMES))


def test_nobody_is_right_where_all_are_as_probable(tmp_path: Path) -> None:
    """The harness's own accuracy takes the first of them, and the right one is the first."""
    same = Item("same", "x", "choice", (Query(b"a", b"b"), Query(b"a", b"b")))
    export({"ties": [same]}, tmp_path)
    assert figures(tmp_path, ["ties_bytes"])["ties_bytes_same"]["acc"] == 0


def test_what_has_no_place_in_the_harness_is_left_out(tmp_path: Path) -> None:
    odd = Item("odd", "1", "bits", (Query(b"\xff", b"a"),))
    assert export({"some": [odd]}, tmp_path) == []
    assert export({"boundary": [*CUT, odd]}, tmp_path) == ["boundary_bytes_in_a_word"]
    assert json.loads((tmp_path / "boundary_bytes_in_a_word.jsonl").read_text()) == {
        "context": "a wo",
        "continuation": "rd",
    }
    assert "boundary_bytes_in_a_word" in TaskManager(include_path=str(tmp_path), include_defaults=False).all_tasks
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="choose another place"):
        export(OTHER, tmp_path / "file" / "tasks")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_export_takes_the_place_of_an_earlier_one_and_of_nothing_else(tmp_path: Path) -> None:
    """The tasks of the tag are those that were exported; a file of somebody else stays."""
    (first,) = export({"boundary": CUT}, tmp_path)
    (tmp_path / "notes.yaml").write_text("task: mine")
    tasks = export(OTHER, tmp_path)
    kept = {"questions.py", "exported.json", "notes.yaml"}
    assert first not in tasks and names(tmp_path) == {f"{t}.{end}" for t in tasks for end in ("yaml", "jsonl")} | kept
    export({"times": TIMES}, tmp_path / "fresh")
    for _ in range(2):
        export({"times": TIMES}, tmp_path)
        assert names(tmp_path) - {"fresh"} == names(tmp_path / "fresh") | {"notes.yaml"}
    before = {path.name: path.read_bytes() for path in (tmp_path / "fresh").iterdir()}
    assert export({"some": []}, tmp_path / "fresh") == [] and export({"some": []}, tmp_path / "none") == []
    assert {path.name: path.read_bytes() for path in (tmp_path / "fresh").iterdir()} == before
    assert not (tmp_path / "none").exists()


def test_an_export_that_ended_halfway_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export({"boundary": CUT}, tmp_path)
    with monkeypatch.context() as patched:

        def fail(self: Path, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        patched.setattr(Path, "write_bytes", fail)
        with pytest.raises(ResourceError, match="No space left"):
            export(OTHER, tmp_path)
    (task,) = export({"times": TIMES}, tmp_path)
    assert names(tmp_path) == {f"{task}.yaml", f"{task}.jsonl", "questions.py", "exported.json"}


@pytest.mark.parametrize("damage", [None, b"{", b"[1]", b'{"../notes.yaml": "0"}', b'{"a/b.yaml": "0"}'])
def test_an_earlier_export_without_a_sound_manifest_is_refused(tmp_path: Path, damage: bytes | None) -> None:
    folder = tmp_path / "tasks"
    export({"boundary": CUT}, folder)
    (tmp_path / "notes.yaml").write_text("task: mine")
    manifest = folder / "exported.json"
    manifest.unlink() if damage is None else manifest.write_bytes(damage)
    before = names(folder)
    with pytest.raises(UsageError, match=r"exported\.json is missing or damaged.*choose another folder"):
        export(OTHER, folder)
    assert names(folder) == before and (tmp_path / "notes.yaml").exists()


def test_a_task_that_was_changed_is_not_removed(tmp_path: Path) -> None:
    (task,) = export({"boundary": CUT}, tmp_path)
    (tmp_path / f"{task}.yaml").write_text("task: mine")
    before = names(tmp_path)
    with pytest.raises(UsageError, match=f"{task}.yaml was changed since it was exported.*move it"):
        export(OTHER, tmp_path)
    assert names(tmp_path) == before
    (tmp_path / f"{task}.yaml").unlink()  # moved away
    assert task not in export(OTHER, tmp_path)
