"""Models of transformers and suites of robustness in a comparison: measured alike, kept, shown, and never trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelm.cli import run as cli
from bytelm.compare import cells, foreign, held_out, prepare, results, robustness
from bytelm.robust import answers
from bytelm.training.journal import Journal
from bytelm.training.stop import Interrupted, StopRequest
from comparisons import Found, results_of, words
from report_pages import Page

pytest.importorskip("transformers")
import hf_tokenizers

MODELS = "bpe:300"  # over tokens, so that it has two rows


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of transformers, one of which loses case and accents, and a folder without a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    for name, kind in (("exact", hf_tokenizers.byte_level), ("lossy", hf_tokenizers.wordpiece)):
        hf_tokenizers.saved(folder / name, kind(), positions=128)
    shutil.copytree(folder / "exact", folder / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    return folder


@pytest.fixture(scope="module")
def command(data: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    home = tmp_path_factory.mktemp("compared") / "home"
    names = f"{MODELS},hf:{models / 'exact'},hf:{models / 'lossy'}"
    return words(data, home, names, "--suite", "degenerate", "--suite", "scripts", "--seeds", "2")


@pytest.fixture(scope="module")
def home(command: list[str]) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(robustness, "AMOUNT", 1)
        assert cli(command) == 0
    return Path(command[3])


@pytest.fixture(scope="module")
def found(home: Path) -> Found:
    return json.loads((home / "results.json").read_bytes())


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "AMOUNT", 1)
    monkeypatch.setattr(cells, "trained", None)


def test_a_model_of_transformers_is_measured_on_the_same_segments(home: Path, models: Path, found: Found) -> None:
    from bytelm.hf.foreign import load_foreign
    from bytelm.hf.verdict import judge_foreign

    segments = [(str(number), data) for number, data in held_out.kept(home / "held-out.bin")]
    levels = {model["model"]: model["bits_per_byte"] for model in found["models"]}
    assert len(levels) == 3 and list(levels.values()) == sorted(levels.values())
    assert {(pair["model"], pair["baseline"]) for pair in found["differences"]} >= {("bpe:300", f"hf:{models}/exact")}
    for name in ("exact", "lossy"):
        own = next(model for model in found["models"] if model["model"] == f"hf:{models / name}")
        theirs, context = load_foreign(own["model"])
        report = judge_foreign(theirs, segments, context)
        assert own["bits_per_byte"] == pytest.approx(report.verdict.bits_per_byte, rel=1e-5)
        assert own["low"] < own["bits_per_byte"] < own["high"] and own["bytes"] == found["measured_bytes"]
        assert own["foreign"]["bits_per_byte_bound"] == pytest.approx(report.bound, rel=1e-5)
        assert own["foreign"]["exact"] is report.exact is (name == "exact")
        assert own["patch_size"] == own["bytes"] / report.survey.tokens
        assert own["parameters"] == sum(p.numel() for p in theirs.parameters())
        assert own["tables"] == theirs.model.get_input_embeddings().weight.numel()
        assert own["seeds"] == {} and own["trained_bytes"] is own["seconds"] is own["executed"] is None


def test_what_it_loses_is_said_wherever_its_bits_are(
    command: list[str], home: Path, models: Path, found: Found, capfd: pytest.CaptureFixture[str], few: None
) -> None:
    assert cli(command) == 0
    said, page = capfd.readouterr().out, Page((home / "index.html").read_text())
    page.assert_inert()
    lossy = next(model for model in found["models"] if model["model"].endswith("lossy"))
    bound = f"at most {lossy['foreign']['bits_per_byte_bound']:.3f}"
    for text in (said, page.text):
        assert f"hf:{models}/lossy: NOT a code of the files" in text and "accents: " in text
        assert text.count(bound) >= 2 and f"hf:{models}/exact: NOT" not in text
    assert "NOT a code of the files" in (home / "picture.svg").read_text()
    rows = {row[0]: row for row in results.rows(found)}
    assert rows[f"hf:{models}/exact"][len(results.HEAD) :] == ["–"] * len(results.HEAD_COSTS)
    assert rows[f"hf:{models}/exact"][3] == "–" and " to " in rows["bpe:300"][3]


def test_suites_are_a_row_per_model_and_a_column_per_suite(home: Path, models: Path, found: Found) -> None:
    own = found["robustness"]
    table = robustness.table(found)
    order = [model["model"] for model in found["models"]]
    naive = {"bpe:300", f"hf:{models}/exact", f"hf:{models}/lossy"}
    wanted = [
        shown
        for name in order
        for shown in ([] if name.startswith("hf:") else [name]) + ([f"{name}, naive"] if name in naive else [])
    ]
    assert [row[0] for row in table.rows] == wanted
    assert list(table.head) == ["model", "degenerate: bits/byte of the worst row"]
    assert own["skipped"].keys() == {"scripts"}
    full = json.loads((home / "robustness" / "results.json").read_bytes())["suites"]["degenerate"]["headline"]["values"]
    for row in own["models"][:2]:
        end = ", naive" if row["naive"] else ""
        each = [full[f"bpe-300-{seed}{end}"] for seed in (0, 1)]
        figure = row["suites"]["degenerate"]
        assert figure == {"value": pytest.approx(sum(each) / 2), "seeds": {"0": each[0], "1": each[1]}}
        cells = next(cells for cells in table.rows if cells[0] == row["model"] + end)
        assert f"({min(each):.3f} to {max(each):.3f})" in cells[1]


def test_a_suite_that_cannot_be_asked_is_said_and_stops_nothing(
    command: list[str], home: Path, models: Path, found: Found, capfd: pytest.CaptureFixture[str], few: None
) -> None:
    """No files for one, and random bytes for a tokenizer that reads text alone."""
    assert cli(command) == 0
    said, page = capfd.readouterr().out, Page((home / "index.html").read_text()).text
    full = Page((home / "robustness" / "index.html").read_text()).text
    refused = f"degenerate was not asked of hf:{models}/lossy, naive: byte"
    for text in (said, page):
        assert "scripts was not measured: it needs a folder" in text and refused in text
    assert refused in full and next(row for row in robustness.table(found).rows if "lossy" in row[0])[1] == "–"


@pytest.mark.parametrize("names", ["lossy,exact", "lossy"])
def test_whichever_model_comes_first_a_suite_that_it_cannot_read_is_asked_of_the_others(
    data: str, models: Path, tmp_path: Path, names: str, capfd: pytest.CaptureFixture[str], few: None
) -> None:
    """And nothing is shown where there are no others."""
    listed = ",".join(f"hf:{models / name}" for name in names.split(","))
    assert cli(words(data, tmp_path / "home", listed, "--suite", "degenerate")) == 0
    said = capfd.readouterr().out
    assert f"degenerate was not asked of hf:{models}/lossy, naive: byte" in said
    found = json.loads((tmp_path / "home" / "results.json").read_bytes())
    assert list(found["robustness"]["suites"]) == (["degenerate"] if "exact" in names else [])
    assert len(robustness.table(found).rows) == (2 if "exact" in names else 0)
    assert ("degenerate: bits/byte of the worst row" in said) == ("exact" in names)
    assert refused_on(tmp_path / "home" / "index.html")


def refused_on(page: Path) -> bool:
    return "degenerate was not asked of" in Page(page.read_text()).text


def test_the_same_command_measures_nothing_again(
    command: list[str], home: Path, found: Found, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, few: None,
) -> None:  # fmt: skip
    before = results_of(home)
    monkeypatch.setattr(foreign, "measured", None)
    monkeypatch.setattr(answers, "completed", None)
    assert cli([*command, "--json"]) == 0
    again = json.loads(capfd.readouterr().out)
    assert again == found and results_of(home) == before
    assert len(list((home / "foreign").iterdir())) == 2


def test_without_suites_nothing_is_asked_and_without_others_nothing_is_added(
    data: str, home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], few: None
) -> None:
    copy = shutil.copytree(home, tmp_path / "home", symlinks=True)
    shutil.rmtree(copy / "robustness")
    assert cli(words(data, copy, MODELS, "--json")) == 0
    plain = json.loads(capfd.readouterr().out)
    assert "robustness" not in plain and not (copy / "robustness").exists()
    assert (
        not any("foreign" in model for model in plain["models"])
        and "Robustness" not in (copy / "index.html").read_text()
    )


def test_an_interruption_of_suites_keeps_answers(
    command: list[str], home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, few: None,
) -> None:  # fmt: skip
    copy = shutil.copytree(home, tmp_path / "home", symlinks=True)
    shutil.rmtree(copy / "robustness")
    words = [str(copy) if word == str(home) else word for word in command]
    count = list[int]()

    def patches(*_: Any) -> None:
        count.append(1)
        if len(count) == 3:
            raise Interrupted(2)

    with monkeypatch.context() as patched:
        patched.setattr(answers, "patches", patches)
        assert cli(words) == 130
    said = capfd.readouterr()
    assert f"answers so far are in {copy / 'robustness'}; run the same command again to resume" in said.err
    assert "bits/byte" in said.out and "robustness" not in json.loads((copy / "results.json").read_bytes())
    assert len(list((copy / "robustness" / "answers").iterdir())) == 1


def test_an_interruption_while_one_is_evaluated_resumes(
    data: str, home: Path, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], few: None
) -> None:
    copy = shutil.copytree(home, tmp_path / "home", symlinks=True)
    shutil.rmtree(copy / "foreign")
    command = words(data, copy, f"{MODELS},hf:{models / 'exact'}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(foreign, "progress_of", lambda *_: (_ for _ in ()).throw(Interrupted(2)))
        assert cli(command) == 130
    assert f"saved in {copy}; run the same command again" in capfd.readouterr().err
    assert cli(command) == 0 and len(list((copy / "foreign").iterdir())) == 1


def test_a_result_is_kept_for_a_folder_and_segments_as_they_were(tmp_path: Path) -> None:
    tokenizer, journal = hf_tokenizers.byte_level(), Journal(None, quiet=True)
    width = max(tokenizer.get_vocab().values()) + 1
    name = hf_tokenizers.saved(tmp_path / "model", tokenizer)

    def nats() -> float:
        (one,) = foreign.evaluated([name], tmp_path, torch.device("cpu"), journal, dry=False)
        return sum(nats for _, _, nats in one["documents"])

    held_out.keep(tmp_path / "held-out.bin", [(0, b"the patches of a text")])
    first = nats()
    assert nats() == first and len(list((tmp_path / "foreign").iterdir())) == 1
    hf_tokenizers.saved(tmp_path / "model", tokenizer, hf_tokenizers.llama(width, uniform=True))
    assert (uniform := nats()) != first
    held_out.keep(tmp_path / "held-out.bin", [(0, b"the patches of a text that is longer")])
    assert nats() > uniform
    assert len(list((tmp_path / "foreign").iterdir())) == 3


def test_progress_stops_at_a_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as request:
        progress = foreign.progress_of("hf:a", 10, Journal(None, quiet=True))
        progress(5)
        request.received = 2
        with pytest.raises(Interrupted):
            progress(5)


def test_a_dry_run_shows_it_as_not_trained(
    data: str, models: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "bytes_per_second", lambda config, mean: 1000.0)
    monkeypatch.setattr(foreign, "measured", None)
    command = words(data, tmp_path / "home", f"byte-window:32,hf:{models / 'exact'}", "--dry-run")
    assert cli(command) == 0
    (row,) = [line for line in capfd.readouterr().out.splitlines() if "hf:" in line]
    assert "not trained" in row
    assert cli([*command, "--json"]) == 0
    (one,) = json.loads(capfd.readouterr().out)["foreign"]
    assert one["parameters"] > one["tables"] > 0


BAD = [
    (
        "--models: hf:{models}/exact and hf:{models}/../models0/exact are one model",
        2,
        "hf:{models}/exact,hf:{models}/../models0/exact",
    ),
    ("--models: hf:nobody/nothing and hf:nobody/nothing are one model", 2, "hf:nobody/nothing,hf:nobody/nothing"),
    ("{models}/nowhere is not a folder", 4, "hf:{models}/nowhere"),
    ("{models}/bare has no tokenizer", 4, "hf:{models}/bare"),
    ("accelerate, which is not installed: pip install 'bytelm[hf]'", 2, "hf:{models}/exact"),
    ("unknown robustness suite 'nois': did you mean 'noise'?", 2, "byte-window:32"),
    ("the suites are of texts", 2, "byte-window:32"),
]


@pytest.mark.parametrize(("said", "code", "names"), BAD, ids=[row[0][-30:] for row in BAD])
def test_bad_input_is_one_line_before_anything_is_trained(
    data: str, models: Path, tmp_path: Path, said: str, code: int, names: str,
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    import sys

    monkeypatch.setattr(cells, "trained", None)
    monkeypatch.setattr(prepare, "bytes_per_second", lambda config, mean: 1000.0)
    if "accelerate" in said:
        for module in [name for name in sys.modules if name == "accelerate" or name.startswith("bytelm.hf")]:
            monkeypatch.delitem(sys.modules, module)
        monkeypatch.setitem(sys.modules, "accelerate", None)
    more = (
        ["--suite", "nois"] if "nois'" in said else ["--suite", "noise", "--as", "image:32"] if "texts" in said else []
    )
    names, said = (text.replace("models0", models.name).format(models=models) for text in (names, said))
    assert cli(words(data, tmp_path / "home", names, *more)) == code
    err = capfd.readouterr().err
    assert said in err and err.startswith("bytelm: ") and err.count("\n") == 1
    assert not list(tmp_path.glob("home/*-0")) and not (tmp_path / "home" / "results.json").exists()
