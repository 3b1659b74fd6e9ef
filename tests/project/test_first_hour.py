"""What a newcomer types first: doctor, presets, settings from everywhere, and what a training will take."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bytelm import machine
from bytelm.checkpoint import store
from bytelm.cli import doctor
from bytelm.cli import run as cli
from bytelm.config import load_toml
from bytelm.errors import ResourceError
from bytelm.training import estimate
from bytelm.training.settings import configure
from small import BLT, TRAINED

TINY = [*(setting for setting in BLT if "entropy_model" not in setting), "entropy_model.rows=512", *TRAINED]
SMALL = [word for setting in TINY for word in ("--set", setting)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "notes.txt"
    path.write_text("".join(f"line {number} of some notes\n" for number in range(2000)))
    return path


def printed(capfd: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    capfd.readouterr()
    assert cli(words) == code
    out, err = capfd.readouterr()
    return err if code else out


# --- doctor ---


def test_the_doctor_names_what_there_is_and_what_to_type_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    told = printed(capfd, "doctor")
    for word in (torch.__version__, "kernels", "memory", "disk", "GPU", f"{machine.cores()} cores", "[media]"):
        assert word in told
    assert told.endswith("Ready. Next: bytelm demo\n")
    (tmp_path / "README.md").write_text("here")
    assert printed(capfd, "doctor").endswith("Next: bytelm train README.md --minutes 2\n")
    assert json.loads(printed(capfd, "doctor", "--json"))["torch"]["found"].startswith(torch.__version__)


def test_the_doctor_tells_how_to_install_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "installed", lambda package: package != "pillow")
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(1 << 34, 1 << 30))
    told = printed(capfd, "doctor")
    assert re.search(r"^\[media\] +no pillow: pip install 'bytelm\[media\]'$", told, re.MULTILINE)
    assert re.search(r"^\[data\] +installed$", told, re.MULTILINE)
    assert "train.batch=4" in told


def test_a_container_has_what_it_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = machine.memory()
    for name, content in {
        "cpu.max": "100000 100000",
        "memory.max": "1000000000",
        "memory.current": "700000000",
        "memory.stat": "inactive_file 200000000\nactive_file 100000000\nanon 1",
    }.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    assert machine.cores() == 1
    assert machine.memory() == machine.Memory(1_000_000_000, 600_000_000)
    (tmp_path / "memory.max").write_text("max")
    assert machine.memory().total == host.total
    assert machine.disk(tmp_path / "not" / "yet" / "there") > 0


# --- settings ---


def test_a_setting_comes_from_the_nearest_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "my.toml"
    file.write_text("[train]\nbatch = 3\ncontext_length = 300\nmax_grad_norm = 0.3\n")
    environment = {
        "BYTELM_TRAIN__BATCH": "4",
        "BYTELM_TRAIN__CONTEXT_LENGTH": "400",
        "BYTELM_DEBUG": "1",
        "OTHER__KEY": "1",
    }
    train = configure("blt-tiny", file, ["train.batch=5"], environment=environment).train
    assert (train.batch, train.context_length, train.max_grad_norm) == (5, 400, 0.3)  # --set, variable, file


def test_variables_reach_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BYTELM_MODEL__GLOBAL_DIM", "96")
    monkeypatch.setenv("BYTELM_PRESET", "blt-small")
    file = tmp_path / "resolved.toml"
    file.write_text(printed(capfd, "train", "--print-config", "--steps", "7", "--set", "model.global_heads=3"))
    config = load_toml(file)
    assert (config["model"]["global_dim"], config["model"]["global_heads"]) == (96, 3)
    assert config["train"]["steps"] == 7
    monkeypatch.delenv("BYTELM_MODEL__GLOBAL_DIM")
    monkeypatch.delenv("BYTELM_PRESET")
    assert printed(capfd, "train", "--print-config", "--config", str(file)) == file.read_text()


@pytest.mark.fault("C1")
@pytest.mark.parametrize(
    "words, variables, message",
    [
        (["--preset", "blt-tinny"], {}, "unknown preset 'blt-tinny': did you mean 'blt-tiny'?"),
        (["--set", "train.bacth=4"], {}, "--set: unknown key train.bacth: did you mean train.batch?"),
        (
            ["--set", "train.max_grad_norm=2"],
            {"BYTELM_TRAIN__BACTH": "4"},
            "BYTELM_TRAIN__BACTH: unknown key train.bacth",
        ),
        (
            ["--set", "train.max_grad_norm=2"],
            {"BYTELM_TRAIN__BATCH": "many"},
            "BYTELM_TRAIN__BATCH: train.batch must be an in",
        ),
        (
            ["--set", "train.batch=many"],
            {"BYTELM_TRAIN__MAX_GRAD_NORM": "2"},
            "--set: train.batch must be an integer, not",
        ),
        (
            ["--config", "bad.toml"],
            {"BYTELM_TRAIN__MAX_GRAD_NORM": "2"},
            "bad.toml: train.batch = -1: must be at least 1",
        ),
        (["--steps", "some"], {}, 'Invalid value for --steps: unable to convert "some" into int'),
        (["--stepps", "3"], {}, "Unknown option: --stepps. Did you mean --steps?"),
    ],
)
def test_a_wrong_setting_is_one_line_with_its_source(
    words: list[str],
    variables: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.toml").write_text("[train]\nbatch = -1\n")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told = printed(capfd, "train", "--print-config", *words, code=2)
    assert told.count("\n") == 1 and message in told and told.startswith(("bytelm: config: ", "bytelm: usage: "))


@pytest.mark.fault("C2")
@pytest.mark.parametrize(
    "settings, message",
    [
        (["model.global_dim=30", "model.global_heads=4"], "heads"),
        (["model.name=megabyte", "model.sizes=[0]"], "sizes"),
        (["model.cross_ratio=0"], "cross_ratio"),
        (
            ["train.batch=0", "train.context_length=0", "train.max_grad_norm=-1"],
            "train.context_length = 0: must be at least 1; train.batch = 0",
        ),
        (["entropy_model.name=ngram", "entropy_model.rows=0"], "rows"),
        (["patching.target_mean_length=0.5"], "target_mean_length"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_made(
    settings: list[str], message: str, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sets = [word for setting in settings for word in ("--set", setting)]
    told = printed(capfd, "train", str(text), "--run", str(tmp_path / "run"), *sets, code=2)
    assert told.startswith("bytelm: config: --set: ") and message in told and told.count("\n") == 1
    assert not (tmp_path / "run").exists()


# --- what a training will take ---


def test_a_dry_run_says_what_it_takes_and_writes_nothing(
    text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["train", str(text), "--run", str(tmp_path / "run"), "--dry-run", "--steps", "10", *SMALL]
    told = printed(capfd, *words)
    assert re.findall(r"^(\w+)", told, re.MULTILINE) == [
        *("model", "memory", "speed", "steps", "FLOPs", "time", "disk", "run", "next"),
    ]
    found = json.loads(printed(capfd, *words, "--json"))
    assert found["bytes"] == 10 * 64 * 2 and found["steps"] == 10
    assert found["needs"]["data"] == text.stat().st_size * 9 // 8
    assert found["flops"] == pytest.approx(found["flops_per_byte"] * found["bytes"])
    assert found["seconds"] == pytest.approx(found["bytes"] / found["bytes_per_second"])
    assert not (tmp_path / "run").exists()


def test_the_estimate_of_the_disk_is_what_is_written(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli(["train", str(text), "--run", str(run), "--steps", "2", "--quiet", *SMALL]) == 0
    needed = estimate.needs([str(text)], configure(sets=TINY, steps=2), tmp_path / "new")
    assert needed.data is not None
    packed = sum(file.stat().st_size for file in (run / "data").rglob("*") if file.suffix != ".json")
    assert packed <= needed.data + 4096 and needed.data <= 1.2 * packed + 4096
    checkpoint = sum(file.stat().st_size for file in store.newest(run).iterdir())
    assert needed.checkpoints / (store.KEEP + 1) == pytest.approx(checkpoint, rel=0.1)


@pytest.mark.fault("C3")
@pytest.mark.parametrize("dry", [True, False])
def test_what_does_not_fit_is_refused_with_the_knob_that_makes_it_fit(
    dry: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configure(sets=[*TINY, "train.batch=64"], steps=1)
    needed = estimate.needs([str(text)], config, tmp_path / "run")
    monkeypatch.setattr(machine, "memory", lambda: machine.Memory(1 << 40, needed.memory - 1))
    words = ["train", str(text), "--run", str(tmp_path / "run"), "--steps", "1", *SMALL, "--set", "train.batch=64"]
    told = printed(capfd, *words, *(["--dry-run"] if dry else []), code=5)
    suggest_fit = re.search(r"(--set train\.batch=32) takes", told)
    assert suggest_fit and told.count("\n") == 1 and not (tmp_path / "run").exists()
    assert cli([*words, *suggest_fit[1].split(), "--quiet"]) == 0  # the later --set wins, and fits


@pytest.mark.fault("C3")
def test_what_cannot_be_made_to_fit_and_a_full_disk_have_other_ways_out(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config = configure(sets=TINY, steps=1)
    with pytest.raises(ResourceError, match=r"use a smaller --preset .*--force"):
        estimate.check(estimate.Needs(1 << 40, 0, 1 << 28, 1, 0, 0, 1), config, tmp_path)
    with pytest.raises(ResourceError, match=r"2 kB of disk \(1 kB of data, 1 kB of checkpoints\) and 1.5 kB are free"):
        estimate.check(estimate.Needs(0, 0, 1, 1, 1000, 1000, 1500), config, tmp_path)
    estimate.check(estimate.Needs(1, 1, 1, 1, 700, 700, 1500), config, tmp_path)
    with pytest.raises(ResourceError, match=r"counting n-grams takes 2 B of memory and 1 B .*patching\.name=space"):
        estimate.check(estimate.Needs(1, 2, 9, 1, 0, 0, 1), config, tmp_path)
    monkeypatch.setattr(machine, "disk", lambda path: 1)
    words = ["train", str(text), "--run", str(tmp_path / "run"), "--steps", "1", *SMALL]
    assert "1 B are free" in printed(capfd, *words, code=5)
    assert cli([*words, "--force", "--quiet"]) == 0


def test_recomputation_and_shorter_windows_are_tried_last() -> None:
    train = configure(sets=["train.batch=4", "train.context_length=256"], steps=1).train
    tried = [(t.batch, t.activation_checkpointing, t.context_length) for t in estimate.smaller(train)]
    assert tried[:4] == [(2, False, 256), (1, False, 256), (4, True, 256), (2, True, 256)]
    assert tried[-2:] == [(1, True, 128), (1, True, 64)]


def test_presets_have_a_time_on_this_machine(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(estimate, "multiplied", lambda _: 1e11)
    rows = {row["preset"]: row for row in json.loads(printed(capfd, "presets", "--json"))}
    row = rows["byte-tiny"]
    assert row["seconds_per_megabyte"] == pytest.approx(1e6 * 3 * row["flops_per_byte"] / (0.5 * 1e11))
    monkeypatch.undo()
    assert 1e8 < estimate.multiplied(torch.device("cpu")) < 1e16


# --- how it prints ---


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    (folder / "notes.txt").write_text("".join(f"line {number} of some notes\n" for number in range(2000)))
    words = ["train", str(folder / "notes.txt"), "--run", str(folder / "run"), "--steps", "2", "--quiet", *SMALL]
    assert cli(words) == 0
    return folder


def test_quiet_verbs_print_results_and_nothing_else(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["eval", str(home / "run"), str(home / "notes.txt")],
        ["generate", str(home / "run"), "line", "--max-bytes", "3"],
        ["report", str(home / "run")],
    ):
        capfd.readouterr()
        assert cli([*words, "--quiet"]) == 0
        out, err = capfd.readouterr()
        assert out and not err


def test_without_a_terminal_lines_are_plain(home: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bytelm", "train", str(home / "notes.txt"), "--run", str(tmp_path / "run")]
    done = subprocess.run([*command, "--steps", "2", *SMALL], capture_output=True, text=True, check=True)
    assert "step 1 | " in done.stderr
    for text in (done.stdout, done.stderr):
        assert "\r" not in text and "\x1b" not in text


@pytest.mark.parametrize("plain", [True, False])
def test_colours_are_left_out_where_they_are_not_wanted(home: Path, plain: bool) -> None:
    import pty

    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "NO_COLOR": "1" if plain else ""}
    command = [sys.executable, "-m", "bytelm", "patches", "space", "two words"]
    subprocess.run(command, stdout=child, env=environment, check=True)
    os.close(child)
    told = os.read(parent, 1 << 16).decode()
    os.close(parent)
    assert told == "two |words\r\n" if plain else "\x1b[" in told


def test_completion_is_written_for_the_shell(tmp_path: Path) -> None:
    file = tmp_path / "bytelm.bash"
    command = [sys.executable, "-m", "bytelm", "--install-completion", "--shell", "bash", "--output", str(file)]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HOME": str(tmp_path)})
    assert "train" in file.read_text() and "--minutes" in file.read_text()
