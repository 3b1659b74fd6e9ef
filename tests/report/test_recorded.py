"""What trainings record for their reports, and the reports of runs of every kind, finished or not."""

from __future__ import annotations

import html
import random
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from bytelm import inspection
from bytelm.checkpoint import assemble, store
from bytelm.checkpoint.metrics import METRICS, current, read_history, read_metrics
from bytelm.cli import run as cli
from bytelm.data.corpus import Corpus
from bytelm.errors import CheckpointError, ResourceError
from bytelm.evaluate.patches import lengths_by_kind
from bytelm.lm import load
from bytelm.report import artifacts
from bytelm.report.artifacts import EVALUATION, Inspection, keep_inspection, read_inspection
from bytelm.report.gather import gather
from bytelm.report.media import Completion
from bytelm.report.page import Sample, render
from bytelm.report.patches import PatchView
from bytelm.report.recorded import Clock, curve, intervals, marks, memory, phases, thinned
from bytelm.training import finish, lengths
from bytelm.training.journal import Journal
from bytelm.training.run import keep_config, train
from bytelm.training.settings import configure
from bytelm.units import BOS, EOS, PAD
from report_pages import Page, drawn
from small import BLT, TRAINED

PLAIN = ["model.layers=1", "model.dim=16", "model.heads=2"]
SHOWN = [s for s in TRAINED if "sample_bytes" not in s] + ["train.sample_bytes=8", "train.eval_every_minutes=1e-9"]
KINDS = {
    "blt over entropy patches": ("demo", BLT),
    "megabyte over patches of 8 bytes": (
        "megabyte-tiny",
        ["model.sizes=[8]", "model.dims=[32,16]", "model.layers=[1,1]", "model.heads=[2,2]"],
    ),
    "transformer over 300 tokens": ("bpe-tiny", [*PLAIN, "model.vocabulary=300"]),
    "transformer": ("byte-tiny", PLAIN),
}
FILES = artifacts.FILES
DRIFTS = ("entropy", "tokens")
GOING = ("blt over entropy patches", "megabyte over patches of 8 bytes")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    words = ["the", "patch", "byte", "model", "of", "reads", "\x00", "déjà", "return", "x = 1\n"]
    for i in range(12):
        (folder / f"{i}.{'py' if i % 3 else 'md'}").write_text(" ".join(rng.choice(words) for _ in range(150)))
    (folder / "gone").symlink_to("nowhere")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_a_report(corpus: Path, tmp_path: Path, kind: str) -> None:
    preset, sets = KINDS[kind]
    run = tmp_path / "a run"
    ended = finish.train([corpus], configure(preset, sets=[*sets, *SHOWN], steps=4), run, quiet=True)
    assert ended.final is not None and ended.final.evaluation is not None
    source = render(gather(run))
    assert ended.final.report.read_text(encoding="utf-8") == source
    page = Page(source)
    page.assert_inert()
    for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        drawn(svg)
    said = ["a run", kind, "finished", "parameters", "steps, 0 skipped", "validation", "Samples", "packing", "peak"]
    said += ["config.toml", "12 files read; skipped: 1 (no such file or directory)."]
    assert [words for words in said if words not in page.text] == []
    assert ("one histogram per column" in page.text) == any(name in kind for name in DRIFTS)
    assert len(source) < 1_000_000
    if kind in GOING:  # the command of the page goes on with the run
        (command,) = re.findall(r'<pre class="code">(bytelm train .*?)</pre>', source)
        assert cli([*shlex.split(html.unescape(command))[1:], "--steps", "6", "--quiet"]) == 0
        page = Page((run / "report.html").read_text(encoding="utf-8"))
        assert "resumed: from step 4." in page.text and page.classed("resumed") >= 2 and "6 steps" in page.text


def test_an_unfinished_run_without_validation_has_a_report(corpus: Path, tmp_path: Path) -> None:
    sets = [*PLAIN, *SHOWN, "data.valid=0", "data.test=0"]
    train([corpus], configure("byte-tiny", sets=sets, steps=2), tmp_path / "run", quiet=True)
    journal = Journal(tmp_path / "run" / METRICS, quiet=True)
    keep_config(configure("byte-tiny", sets=sets, steps=8), tmp_path / "run", (), journal)
    page = Page(render(gather(tmp_path / "run")))
    assert "unfinished: 25% of its budget" in page.text and "validation split is empty" in page.text
    assert "on the training split, at step 2; not yet evaluated" in page.text
    (tmp_path / "run" / METRICS).unlink()  # as it is in weights that came from elsewhere
    assert "Nothing has been measured yet." in Page(render(gather(tmp_path / "run"))).text


def test_eval_keeps_what_the_report_shows_and_an_old_run_gets_its_panels(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Training alone leaves no inspection: `gather` leaves its panels out, `report` and `eval` make it, once a step."""
    run, config = tmp_path / "run", configure("demo", sets=[*BLT, *SHOWN], steps=2)
    assert finish.train([corpus], config, run, quiet=True, evaluate=False).final is None
    assert not [name for name in (EVALUATION, *FILES, "report.html") if (run / name).exists()]
    page = Page(render(gather(run)))
    assert page.classed("patch") == 0 and "parameters" not in page.text and "not yet evaluated" in page.text
    assert cli(["report", str(run), "--quiet"]) == 0
    made = {name: (run / name).read_bytes() for name in FILES}
    page = Page((run / "report.html").read_text(encoding="utf-8"))
    assert page.classed("patch") and "parameters" in page.text and "not yet evaluated" in page.text

    monkeypatch.setattr(inspection, "inspect", None)  # nothing is made twice, and no model loaded for it
    monkeypatch.setattr(assemble, "load", None)
    assert cli(["report", str(run), "--quiet"]) == 0
    monkeypatch.undo()
    assert cli(["eval", str(run), str(corpus / "0.md"), "--quiet"]) == 0 and not (run / EVALUATION).exists()
    assert cli(["eval", str(run), "--context", "32"]) == 0 and not (run / EVALUATION).exists()
    assert cli(["eval", str(run), "--json"]) == 0 and (run / EVALUATION).exists()
    assert {name: (run / name).read_bytes() for name in FILES} == made
    assert "of the test split" in Page(render(gather(run))).text

    more = configure("demo", sets=[*BLT, *SHOWN], steps=3)
    assert finish.train([corpus], more, run, quiet=True, evaluate=False).signal is None
    assert "at step 2 of 3" in Page(render(gather(run))).text
    monkeypatch.setattr(artifacts, "write_whole", no_room)
    capfd.readouterr()
    assert cli(["eval", str(run), "--quiet"]) == 0 and "not kept for the report: no room" in capfd.readouterr().err
    assert cli(["report", str(run), "--quiet", "--out", str(tmp_path / "x.html")]) == 0
    assert "3 steps" in Page((tmp_path / "x.html").read_text(encoding="utf-8")).text


def no_room(*_: object) -> None:
    raise ResourceError("no room")


def test_an_inspection_is_read_as_it_was_kept(tmp_path: Path) -> None:
    found = Inspection(
        3, "test", "a model", "entropy", 10, 4, {".py": {1: 2, 9: 1}},
        [PatchView(b"\xffab", [True, False, True], [1.0, 2.0, 0.5], 0.7), PatchView(b"", [])],
        [Sample(None, b"\x00", b"\xfe")], [Completion(b"abc", 1, b"\x80")], [b"", b"\xff"], "a note",
    )  # fmt: skip
    assert read_inspection(tmp_path) == Inspection(passages=[], samples=[], completions=[])
    keep_inspection(tmp_path, found)
    assert read_inspection(tmp_path) == found
    for name in FILES:
        kept = (tmp_path / name).read_text()
        for damaged in ("{", "[]", '{"step": 3, "passages": [{}], "samples": 5, "what": 1}'):
            (tmp_path / name).write_text(damaged)
            with pytest.raises(CheckpointError, match=r"damaged.*delete them"):
                read_inspection(tmp_path)
        (tmp_path / name).unlink()
        assert read_inspection(tmp_path).step is None  # of which one cannot tell whether it is the newest
        (tmp_path / name).write_text(kept)


def test_pictures_have_a_report(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(12):
        Image.effect_noise((8, 8), number).convert("RGB").save(tmp_path / "photos" / f"{number}.png")
    shape = ["model.sizes=[12]", "model.dims=[32,16]", "model.layers=[1,1]", "model.heads=[2,2]"]
    config = configure(None, sets=[*shape, "train.batch=2", "train.sample_bytes=4"], modality="image:4", steps=2)
    finish.train([tmp_path / "photos"], config, tmp_path / "run", quiet=True)
    page = Page(render(gather(tmp_path / "run")))
    page.assert_inert()
    assert "bits per dimension over the training" in page.text.lower() and "Unconditional samples" in page.text


# ---- what is recorded


def test_lengths_are_those_of_whole_patches_in_bytes() -> None:
    #               BOS | a  b | c  d  e EOS| BOS | f ...
    ids = torch.tensor([[BOS, 97, 98, 99, 100, 101, EOS, BOS, 102], [97, 98, 99, PAD, PAD, PAD, PAD, PAD, PAD]])
    opens = torch.tensor([[1, 0, 1, 0, 0, 0, 1, 1, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
    assert lengths.between(ids, opens).tolist() == [2, 3, 0, 1]
    assert lengths.counted(torch.tensor([2, 3, 0, 1, 3, 99, 32])).tolist() == [1, 1, 2, *[0] * 28, 2]


def test_the_lengths_of_an_epoch_are_those_of_the_corpus(corpus: Path, tmp_path: Path) -> None:
    spaces = [*(s for s in BLT if not s.startswith("entropy_model")), "patching.name=space"]
    sets = [*spaces, *TRAINED, "train.context_length=4096", "train.batch=1", "data.valid=0"]
    train([corpus], configure("demo", sets=[*sets, "data.test=0"], steps=4), tmp_path / "run", quiet=True)
    lm, data = load(tmp_path / "run"), Corpus.open(tmp_path / "run" / "data")
    patcher = lm.model.patcher
    assert patcher is not None
    table = data.documents("train")
    documents = [("", data.read(int(s), int(n))) for s, n in zip(table.starts, table.sizes, strict=True)]
    expected = lengths_by_kind(patcher, documents)[""]
    lines = [line for line in read_metrics(tmp_path / "run" / METRICS) if line["kind"] == "train"]
    found = [sum(counts) for counts in zip(*(line["patch_lengths"] for line in lines), strict=True)]
    seen, total = sum(line["bytes"] for line in lines[-1:]), sum(map(len, (d for _, d in documents)))
    assert seen >= total  # an epoch, and a little of the next
    for length in range(1, 8):
        assert found[length - 1] == pytest.approx(expected[length] * seen / total, rel=0.25, abs=25)


def test_where_time_and_memory_went_is_recorded(corpus: Path, tmp_path: Path) -> None:
    train([corpus], configure("demo", sets=[*BLT, *SHOWN], steps=3), tmp_path / "run", quiet=True)
    metrics = read_history(tmp_path / "run" / METRICS)
    names = ["packing", "fitting entropy model", "calibrating thresholds", "computing patch boundaries"]
    names += ["steps", "validation", "saving"]
    assert [*phases(metrics)] == names
    assert all(seconds > 0 for seconds in phases(metrics).values())
    held = memory(metrics)
    assert held["peak"] >= held["baseline"] > 50e6  # a process that holds torch
    assert "predicted" not in held  # float32 here
    low = configure("byte-tiny", sets=[*PLAIN, *TRAINED, "train.precision=bfloat16"], steps=1)
    train([corpus], low, tmp_path / "low", quiet=True)
    assert 1e5 < memory(read_history(tmp_path / "low" / METRICS))["predicted"] < 1e8
    (session,) = (line for line in metrics if line["kind"] == "session_start")
    assert session["paths"] == [str(corpus)] and session["torch"] == torch.__version__


def test_a_save_that_fails_is_not_told(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(store, "save", full)
    with pytest.raises(OSError, match="no space"):
        train([corpus], configure("byte-tiny", sets=[*PLAIN, *SHOWN], steps=1), tmp_path / "run", quiet=True)
    told = read_history(tmp_path / "run" / METRICS)
    assert "saving" not in phases(told) and memory(told) == {}


# ---- what is read


def line(kind: str, step: int, **more: object) -> dict[str, object]:
    return {"kind": kind, "step": step, "bytes": 100 * step, "seconds": 2.0 * step, **more}


def test_the_clock_tells_steps_and_seconds_between_lines() -> None:
    clock = Clock.of([line("train", 10), line("validation", 20), line("train", 20)])
    assert [clock.at(bytes) for bytes in (0, 500, 1000, 1500, 9999)] == [(0, 0), (5, 10), (10, 20), (15, 30), (20, 40)]
    assert Clock.of([]).at(50) == (0, 0)


def test_intervals_hold_every_patch_once_and_follow_each_other() -> None:
    metrics = [line("train", step, patch_lengths=[step, 0, 1]) for step in range(1, 101)]
    found = intervals(metrics, 8)
    assert 7 <= len(found) <= 8
    assert [begin for begin, _, _ in found] == [0, *(end for _, end, _ in found[:-1])] and found[-1][1] == 10_000
    assert sum(counts[1] for _, _, counts in found) == 5050 and sum(counts[3] for _, _, counts in found) == 100
    assert intervals([line("train", 1, patch_lengths=None)], 8) == []


def test_phases_add_up_over_sessions_and_marks_say_why() -> None:
    """In the names of older runs: a file of theirs is drawn as any other."""
    older = [
        line("phase", 0, name="packing", took=3.0),
        line("phase", 9, name="looks", took=1.0),
        line("phase", 0, name="packing", took=0.5),
        line("train", 9),
        line("skipped", 4, nats="nan", grad_norm="1.0"),
        line("skipped", 5, reason="a spike"),
        line("resumed", 3),
    ]
    metrics = [current(line) for line in older]
    newer = [{"duration" if key == "took" else key: value for key, value in line.items()} for line in metrics]
    assert [current(line) for line in newer] == newer
    assert phases(metrics) == phases(newer) == {"packing": 3.5, "steps": 18.0, "validation": 1.0}
    assert memory([current(line("memory", 1, before=2.0, peak=3.0))]) == {"baseline": 2.0, "peak": 3.0}
    assert [(mark.bytes, mark.kind) for mark in marks(metrics)] == [
        (400, "skipped"),
        (500, "skipped"),
        (300, "resumed"),
    ]
    assert [mark.words for mark in marks(metrics)][:2] == [
        "step 4 (loss nan, gradient norm 1.0)",
        "step 5 (a spike)",
    ]
    assert curve(metrics, "train", "absent") == [] and thinned([(0.0, 1.0), (2.0, 3.0)], 1) == [(1.0, 2.0)]
