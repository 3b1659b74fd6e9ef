"""`bytelm robust` as a user has it: tables, page and picture, again, resumed, and a line for whatever is wrong."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelm.cli import run as cli
from bytelm.find import names
from bytelm.robust import answers, columns, page
from bytelm.training.stop import Interrupted, StopRequest

ROOT = Path(__file__).parents[2]
TEXT = "The 12 dogs of the café ran 345 miles, and nobody knew why. " * 30


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small runs, one over tokens, one of pictures in name, and texts."""
    folder = tmp_path_factory.mktemp("home")
    settings = ["context_length=256", "batch=2", "sample_bytes=0"]
    shape = ["layers=1", "dim=16", "heads=2", "ffn_multiple=16"]
    sets = [f"train.{each}" for each in settings] + [f"model.{each}" for each in shape]
    for name, preset, *more in (
        ("a", "byte-tiny"),
        ("b", "byte-tiny", "--set", "train.seed=1"),
        ("tokens", "bpe-tiny", "--set", "model.vocabulary=300"),
    ):
        words = ["train", str(ROOT / "docs" / "log.md"), str(ROOT / "README.md"), "--preset", preset, "--steps", "2"]
        words += [word for each in sets for word in ("--set", each)]
        assert cli([*words, "--run", str(folder / name), "--quiet", *more]) == 0
    texts = folder / "texts"
    for language, text in (("eng", TEXT), ("deu", TEXT.replace("dogs", "Hunde"))):
        (texts / language).mkdir(parents=True)
        for number in range(3):
            (texts / language / f"{number}.txt").write_text(text[number * 7 :])
    (folder / "short.txt").write_text("short")
    (folder / "empty.txt").write_text("")
    (folder / "latin-1.txt").write_bytes(TEXT.encode("latin-1"))
    return folder


def found(home: Path, out: Path, capfd: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli(["robust", str(home / "a"), *words, "--run", str(out), "--amount", "3", "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_everything_is_measured_shown_and_written(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["robust", str(home / "a"), str(home / "b"), str(home / "texts"), "--amount", "3", "--run", str(out)]
    suites = ["noise", "boundary", "scripts", "degenerate"]
    words += [word for suite in suites for word in ("--suite", suite)]
    assert cli(words) == 0
    said = capfd.readouterr().out
    for text in (
        "noise: bits/byte lost",
        "b − a",
        "drops 10 %",
        "mean at 10 %",
        "random bytes",
        "bits/article relative",
    ):
        assert text in said, text
    assert f"{out / 'index.html'}" in said and "-0.000" not in said
    results = json.loads((out / "results.json").read_bytes())
    assert [model["model"] for model in results["models"]] == ["a", "b"]
    assert list(results["suites"]) == suites and results["skipped"] == {}
    for suite in results["suites"].values():
        assert suite["title"] and len(suite["manifest"]) == 64 and suite["seconds"].keys() == {"a", "b"}
        for row in suite["rows"]:
            assert row["figures"].keys() == {"a", "b"} and row["differences"].keys() == {"b"}
            for figure in (*row["figures"]["a"].values(), *row["differences"]["b"].values()):
                assert figure.keys() == {"value", "low", "high"}
    for row in results["suites"]["boundary"]["rows"]:
        assert row["figures"]["a"]["difference"]["value"] == pytest.approx(0.0, abs=1e-4)
    html, picture = (out / "index.html").read_text(), (out / "picture.svg").read_text()
    assert "<svg" in html and "Not measured" not in html and "SHA-256" in html and "bits/byte original" in html
    assert "mean over perturbations" in picture and "keyboard neighbours" in picture.lower()


def test_again_nobody_is_asked_and_a_model_or_suite_can_be_added(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(home / "texts"), "--suite", "boundary"]
    first = found(home, tmp_path, capfd, *words)
    one = sorted((tmp_path / "answers").iterdir())
    with monkeypatch.context() as patched:
        patched.setattr(answers, "scored", None)
        assert found(home, tmp_path, capfd, *words) == first
    more = found(home, tmp_path, capfd, str(home / "b"), *words, "--suite", "degenerate")
    assert len(list((tmp_path / "answers").iterdir())) == 4 and one[0] in (tmp_path / "answers").iterdir()
    before, after = (r["suites"]["boundary"]["rows"][0]["figures"]["a"] for r in (first, more))
    assert before == after
    for other in (["--seed", "1"], ["--context", "32"]):
        assert found(home, tmp_path, capfd, *words, *other)["suites"].keys() == {"boundary"}
    assert len(list((tmp_path / "answers").iterdir())) == 6


def test_a_copied_run_is_known_by_its_weights_and_a_trained_one_is_another(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(home / "a", tmp_path / "copy")
    shutil.copytree(home / "b", tmp_path / "other")
    words = [str(home / "texts"), "--suite", "degenerate", "--run", str(tmp_path / "out"), "--amount", "1"]
    for run, count in ((home / "a", 1), (tmp_path / "copy", 1), (tmp_path / "other", 2)):
        assert cli(["robust", str(run), *words]) == 0
        assert len(list((tmp_path / "out" / "answers").iterdir())) == count
    capfd.readouterr()
    assert cli(["robust", str(home / "a"), str(tmp_path / "copy" / "checkpoints" / "step-00000002"), *words]) == 0
    assert "copy/step-00000002 − a" in capfd.readouterr().out


def test_an_interruption_keeps_what_was_answered(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["robust", str(home / "a"), str(home / "texts"), "--suite", "boundary", "--amount", "3"]
    asked = list[int]()

    def check() -> None:
        asked.append(1)
        if len(asked) == 10:
            raise Interrupted(2)

    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "check", check)
        assert cli([*words, "--run", str(tmp_path)]) == 130
        assert f"{tmp_path}; run the same command again to resume" in capfd.readouterr().err
        assert not (tmp_path / "results.json").exists()
        assert cli([*words, "--run", str(tmp_path)]) == 0
    (kept,) = (tmp_path / "answers").iterdir()
    found = json.loads(kept.read_bytes())
    assert len(asked) == len(found["nats"]) + len(found["prompted"]) > 10


def test_the_test_split_of_the_first_run_is_read_unless_files_are_named(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = found(home, tmp_path, capfd, "--suite", "degenerate", "--suite", "scripts", "--suite", "noise")
    assert results["documents"] >= 1 and "noise" in results["suites"]
    assert results["skipped"].keys() == {"scripts"} and "LANGUAGE/ARTICLE" in results["skipped"]["scripts"]
    assert cli(["robust", str(home / "a"), "--suite", "degenerate", "--suite", "scripts", "--run", str(tmp_path)]) == 0
    assert "scripts was not measured: it needs a folder" in capfd.readouterr().out
    assert "Not measured" in (tmp_path / "index.html").read_text() and not (tmp_path / "nothing").exists()


def test_texts_that_are_not_utf8_are_measured(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    results = found(home, tmp_path, capfd, str(home / "latin-1.txt"), "--suite", "noise", "--suite", "boundary")
    assert {row["row"] for row in results["suites"]["noise"]["rows"]} >= {"drops 2 %", "upper case"}
    assert "inside a character" not in {row["row"] for row in results["suites"]["boundary"]["rows"]}


def test_a_run_over_tokens_is_asked_exactly_and_as_is_published(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Exactly, cutting a prompt costs nothing; as published, it does where tokens reach across the cut."""
    words = [str(home / "tokens"), str(home / "texts"), "--suite", "boundary", "--suite", "degenerate"]
    result = found(home, tmp_path / "out", capfd, *words)
    assert [model["model"] for model in result["models"]] == ["a", "tokens", "tokens, naive"]
    rows = {row["row"]: row["figures"] for row in result["suites"]["boundary"]["rows"]}
    for name, figures in rows.items():
        assert figures["tokens"]["difference"]["value"] == pytest.approx(0.0, abs=1e-4), name
        assert figures["tokens"]["changed"]["value"] < figures["tokens, naive"]["changed"]["value"] + 1e-4, name
    assert any(abs(figures["tokens, naive"]["difference"]["value"]) > 0.01 for figures in rows.values())
    shown = [table.head[0] for table in page.tables(result, "degenerate")]
    assert "degenerate: bytes/patch" in shown and "bytes_per_patch" not in str(result["suites"]["boundary"])
    for row in result["suites"]["degenerate"]["rows"]:
        assert "bytes_per_patch" not in row["figures"]["a"]  # which must not hide those of the others
        assert row["figures"]["tokens"]["bytes_per_patch"] == row["figures"]["tokens, naive"]["bytes_per_patch"]


def test_a_model_of_transformers_is_asked_by_its_tokens(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    import hf_tokenizers

    tokenizer = hf_tokenizers.byte_level()
    model = hf_tokenizers.llama(max(tokenizer.get_vocab().values()) + 1, positions=600)
    name = hf_tokenizers.saved(tmp_path / "model", tokenizer, model).removeprefix("hf:")
    words = ["robust", f"hf:{name}", str(home / "texts"), "--suite", "boundary", "--suite", "numbers", "--json"]
    assert cli([*words, "--amount", "2", "--run", str(tmp_path / "out")]) == 0
    result = json.loads(capfd.readouterr().out)
    assert [model["model"] for model in result["models"]] == [f"hf:{name}, naive"]
    figures = [row["figures"][f"hf:{name}, naive"] for row in result["suites"]["boundary"]["rows"]]
    assert figures and all(math.isfinite(each["changed"]["value"]) for each in figures)
    assert cli([*words[:2], f"hf:{name}", *words[2:]]) == 2
    assert "is given twice: name it once" in capfd.readouterr().err


def test_a_tokenizer_that_loses_text_and_reads_text_alone(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its tokens are counted as they are; where it cannot read anything that is said with model, suite and way out."""
    pytest.importorskip("transformers")
    import hf_tokenizers

    name = hf_tokenizers.saved(tmp_path / "model", hf_tokenizers.unigram())
    model = columns.foreign(name, torch.device("cpu"), None).model
    assert answers.patches(model, b"THE \n\n\n fox") == len(model.tokens.encode(b"THE \n\n\n fox"))
    words = ["robust", name, str(home / "texts"), "--suite", "degenerate", "--amount", "1"]
    assert cli([*words, "--run", str(tmp_path / "out")]) == 3
    (said,) = capfd.readouterr().err.splitlines()
    assert f"degenerate was not asked of {name}, naive: byte" in said and "with --suite" in said


def test_a_suite_that_one_model_cannot_read_is_asked_of_the_others(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whichever comes first: differences are to the first one that was asked."""
    pytest.importorskip("transformers")
    import hf_tokenizers

    name = hf_tokenizers.saved(tmp_path / "model", hf_tokenizers.unigram())
    words = [str(home / "latin-1.txt"), "--suite", "noise", "--suite", "numbers", "--amount", "1"]
    words += ["--run", str(tmp_path / "out")]
    rows: list[Any] = []
    for models in ([name, str(home / "a"), str(home / "b")], [str(home / "a"), str(home / "b"), name]):
        assert cli(["robust", *models, *words]) == 0
        said = capfd.readouterr().out
        assert f"noise was not asked of {name}, naive: byte" in said and "b − a" in said
        assert "naive − a" not in said.partition("numbers: ")[0] and f"a − {name}" not in said.partition("numbers: ")[0]
        result = json.loads((tmp_path / "out" / "results.json").read_bytes())
        assert result["suites"]["noise"]["seconds"].keys() == {"a", "b"}
        assert result["suites"]["numbers"]["seconds"].keys() == {"a", "b", f"{name}, naive"}
        rows.append(result["suites"]["noise"]["rows"])
        table = next(page.tables(result, "noise"))
        assert table.head[-1] == "b − a" and all(len(row) == len(table.head) for row in table.rows)
        assert all(row[-1] != "–" for row in table.rows)
        assert f"noise was not asked of {name}" in (tmp_path / "out" / "index.html").read_text()
    assert rows[0] == rows[1]


def test_a_row_that_takes_more_positions_than_a_model_has_is_said(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of short and long numbers the long ones; what it has no figure in has no mean of it either."""
    pytest.importorskip("transformers")
    import hf_tokenizers

    name = hf_tokenizers.saved(tmp_path / "model", hf_tokenizers.byte_level(), positions=64)
    words = ["robust", name, str(home / "a"), str(home / "texts"), "--suite", "numbers", "--amount", "2"]
    assert cli([*words, "--run", str(tmp_path / "out")]) == 0
    said = capfd.readouterr().out
    result = json.loads((tmp_path / "out" / "results.json").read_bytes())
    column, own = result["models"][0], {row["row"]: row["figures"] for row in result["suites"]["numbers"]["rows"]}
    lacking = column["unwritten"]["numbers"]
    assert "addition, 6 digits, generated" in lacking and "addition, 1 digit, generated" not in lacking
    assert (
        f"numbers was not asked of {name}, naive where it takes more positions than the model has: {lacking[0]}" in said
    )
    for row, figures in own.items():
        assert (row in lacking) == (column["model"] not in figures or not figures[column["model"]]), row
        assert figures["a"]
    assert "unwritten" not in result["models"][1]


def test_suites_are_written_as_tasks_without_a_model(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["robust", "--export", str(tmp_path / "tasks"), "--suite", "noise", "--amount", "2", "--json"]
    assert cli([*words, str(home / "texts")]) == 0
    tasks = json.loads(capfd.readouterr().out)["tasks"]
    assert len(tasks) > 10 and all((tmp_path / "tasks" / f"{task}.yaml").exists() for task in tasks)
    assert cli([*words, str(home / "short.txt")]) == 3 and "give longer texts" in capfd.readouterr().err
    assert cli([*words[:6], "0", str(home / "texts")]) == 2 and "--amount 0" in capfd.readouterr().err


BAD: list[tuple[str, list[str], int]] = [
    ("no model to measure: name a run", [], 2),
    ("no run at {home}/nowhere", ["{home}/nowhere"], 4),
    ("no checkpoint in {home}/texts", ["{home}/texts", "{home}/a"], 4),
    ("{home}/a/ and {home}/a are one model: name it once", ["{home}/a", "{home}/a/"], 2),
    ("unknown robustness suite 'nois': did you mean 'noise'?", ["{home}/a", "--suite", "nois"], 2),
    ("{home}/b is a model, and comes after texts: name models first", ["{home}/a", "{home}/short.txt", "{home}/b"], 2),
    ("--amount 0: give at least 1", ["{home}/a", "--amount", "0"], 2),
    ("--context 0: give at least 1", ["{home}/a", "--context", "0"], 2),
    ("no such file or folder: {home}/none.txt", ["{home}/a", "{home}/none.txt"], 3),
    ("noise needs texts of at least 240 bytes", ["{home}/a", "{home}/short.txt", "--suite", "noise"], 3),
    ("no bytes found in {home}/empty.txt", ["{home}/a", "{home}/empty.txt", "--suite", "noise"], 3),
    ("cannot make /dev/null/out", ["{home}/a", "--suite", "degenerate", "--run", "/dev/null/out"], 5),
    ("no data", ["{home}/alone", "--suite", "degenerate"], 3),
    ("hf:{home}/none has no test split here: name files after the models", ["hf:{home}/none"], 3),
    ("no texts to make tasks of: name files", ["--export", "{home}/tasks"], 2),
    ("hf:x has no test split here: name files", ["hf:x", "--export", "{home}/tasks"], 3),
]


@pytest.mark.parametrize(("message", "words", "code"), BAD, ids=[message[:40] for message, _, _ in BAD])
def test_what_is_wrong_is_said_in_one_line(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], message: str, words: list[str], code: int
) -> None:
    if not (home / "alone").exists():
        shutil.copytree(home / "a" / "checkpoints", home / "alone" / "checkpoints")
    given = [word.format(home=home) for word in words]
    out = [] if "--run" in given else ["--run", str(tmp_path / "out")]
    assert cli(["robust", *given, *out]) == code
    (said,) = capfd.readouterr().err.splitlines()
    assert message.format(home=home) in said
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_help_names_every_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli(["robust", "--help"]) == 0
    help = " ".join(capsys.readouterr().out.split())
    assert [name for name in names("evaluate.robustness") if name not in help] == []


def test_folders_of_texts_are_not_taken_for_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not columns.is_model(str(tmp_path)) and not columns.is_model("README.md")
    (tmp_path / "checkpoints").mkdir()
    assert columns.is_model(str(tmp_path))
