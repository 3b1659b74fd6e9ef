"""The command line as a user has it: the road on real files, and one clear line for whatever is wrong."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import bytelm
from bytelm.cli import run as cli
from bytelm.cli.generating import Generating
from bytelm.cli.training import ended
from bytelm.config import preset_names
from bytelm.generate import prompts
from bytelm.generate.request import Chunk
from bytelm.training.finish import Final, Result

ROOT = Path(__file__).parents[2]
NANO = """
[model]
name = "blt"
local_dim = 16
local_heads = 2
cross_heads = 2
global_dim = 32
global_heads = 2
global_layers = 1
decoder_layers = 1
attention_window = 16
ngram_rows = 64

[entropy_model]
name = "ngram"
order = 3
rows = 1024

[train]
context_length = 64
batch = 2
warmup_steps = 2
sample_bytes = 8
precision = "float32"
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration and a small run on this project's own sources."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "nano.toml").write_text(NANO)
    # A copy: Python writes __pycache__ into the package while the other tests run, and a run's data must stay as it is.
    shutil.copytree(ROOT / "src" / "bytelm" / "data", folder / "data", ignore=shutil.ignore_patterns("__pycache__"))
    files = [str(ROOT / "src" / "bytelm" / name) for name in ("units.py", "errors.py", "find.py", "lm.py")]
    words = ["train", *files, "--config", str(folder / "nano.toml"), "--run", str(folder / "run"), "--steps", "4"]
    assert cli([*words, "--quiet"]) == 0
    return folder


def said(capfd: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli(words) == 0
    return capfd.readouterr().out


def test_eval_tells_bytes_bits_and_files(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = ROOT / "pyproject.toml"
    found = json.loads(said(capfd, "eval", str(home / "run"), str(file), str(ROOT / "Makefile"), "--json"))
    assert found["bytes"] == file.stat().st_size + (ROOT / "Makefile").stat().st_size
    assert found["bits_per_byte"] == pytest.approx(found["bits"] / found["bytes"])
    assert [f["bytes"] for f in found["files"]] == [file.stat().st_size, (ROOT / "Makefile").stat().st_size]
    assert found["compressors"].keys() == {"gzip", "bzip2", "xz"}
    assert "each scored once" in said(capfd, "eval", str(home / "run"))


def test_generate_is_the_same_from_text_hex_file_and_python(
    home: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    run = str(home / "run")
    (home / "prompt").write_bytes(b"def \xff")
    wanted = bytelm.load(run).generate(b"def \xff", max_bytes=20, seed=3)
    for words in ([f"@{home / 'prompt'}"], ["64656620ff", "--hex"]):
        assert cli(["generate", run, *words, "--max-bytes", "20", "--seed", "3"]) == 0
        assert capfdbinary.readouterr().out == wanted
    assert cli(["generate", run, "def ", "--max-bytes", "20", "--utf8", "--json"]) == 0
    found = json.loads(capfdbinary.readouterr().out)
    assert bytes.fromhex(found["hex"]).decode() == found["text"]
    assert (found["finish_reason"], found["prompt_bytes"]) == ("length", 4)


def test_the_speed_of_generation_leaves_out_the_prompt() -> None:
    ticks = iter([0.0, 8.0, 10.0])

    def chunks() -> Iterator[Chunk]:
        yield Chunk(0, b"ab", None)  # two at once: drafted
        yield Chunk(0, b"cdef", None)
        yield Chunk(0, b"", "stop")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bytelm.cli.generating.time", SimpleNamespace(perf_counter=lambda: next(ticks)))
        generating = Generating(9, chunks())
        assert b"".join(generating.stream()) == b"abcdef"
    found = {"finish_reason": "stop", "prompt_bytes": 9, "seconds": 10.0, "first_byte_seconds": 8.0}
    assert generating.mapping(6) == found | {"bytes_per_second": 2.0}
    nothing = Generating(9, [Chunk(0, b"", "length")])
    assert not [*nothing.stream()] and nothing.mapping(0)["bytes_per_second"] is None


def test_weights_are_rounded_for_writing_and_for_measuring(
    home: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    run, words = str(home / "run"), ["--max-bytes", "20", "--temperature", "0", "--weights", "int8"]
    wanted = bytelm.load(run).generate(b"def ", max_bytes=20, temperature=0.0, quantize="int8")
    assert cli(["generate", run, "def ", *words]) == 0
    assert capfdbinary.readouterr().out == wanted
    (home / "prompt").write_bytes(b"def f(x):\n    return x\n")
    found: list[float] = []
    for more in ([], ["--weights", "bf16"], ["--weights", "int8", "--tables", "mapped"]):
        assert cli(["eval", run, str(home / "prompt"), *more, "--json"]) == 0
        found.append(json.loads(capfdbinary.readouterr().out)["bits_per_byte"])
    assert len(set(found)) == 3 and found == pytest.approx([found[0]] * 3, rel=0.01)


def test_a_lone_hyphen_is_standard_input(home: Path, tmp_path: Path) -> None:
    data = (ROOT / "src" / "bytelm" / "units.py").read_bytes()
    words = [sys.executable, "-m", "bytelm"]
    run = ["--config", str(home / "nano.toml"), "--run", str(tmp_path / "run"), "--steps", "1", "--quiet", "--json"]
    trained = subprocess.run([*words, "train", "-", *run], input=data, capture_output=True, timeout=120)
    assert trained.returncode == 0 and json.loads(trained.stdout)["step"] == 1, trained.stderr
    shown = subprocess.run([*words, "patches", "fixed:2", "-"], input=b"abcd\xff", capture_output=True, timeout=120)
    assert shown.stdout.decode() == "ab|cd|‹FF›\n"


def test_the_python_interface(home: Path) -> None:
    lm = bytelm.load(home / "run")
    prompts = [b"", b"def main(", b"\x00\xff"]
    together = lm.generate(prompts, max_bytes=12, seed=1, temperature=0.0)
    assert together == [lm.generate(p, max_bytes=12, seed=1, temperature=0.0) for p in prompts]
    assert b"".join(lm.stream(b"def", max_bytes=12)) == lm.generate(b"def", max_bytes=12)
    data = b"patches of bytes\x00"
    assert b"".join(lm.patches(data)) == data
    bits, count = lm.bits(data)
    nats = lm.logprobs(b"", data)
    assert count == len(data) == len(nats)
    assert bits == pytest.approx(-nats.sum() / 0.6931471805599453, rel=1e-5)
    assert lm.logprobs(b"patches", b" of").sum() == pytest.approx(lm.logprobs(b"", b"patches of")[7:].sum(), rel=1e-4)
    state = lm.model.initial_state(1)
    assert state is not None


def test_patches_are_shown_and_written(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert said(capfd, "patches", "space", "The quick fox, jumps") == "The |quick |fox,| jumps\n"
    assert said(capfd, "patches", "fixed:3", "abcdefgh") == "abc|def|gh\n"
    found = json.loads(said(capfd, "patches", str(home / "run"), "a text", "--html", str(home / "p.html"), "--json"))
    assert found["opens"][0] == 0 and len(found["entropies"]) == 6
    assert "<svg" in (home / "p.html").read_text() or "<span" in (home / "p.html").read_text()


def test_calibrate_reports_what_it_reached(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = json.loads(said(capfd, "calibrate", str(home / "run"), "3", "--rule", "both", "--json"))
    assert found["threshold"] is not None and found["relative_threshold"] is not None
    assert 2 < found["realised"] < 4.5 and ".py" in found["by_kind"]


def test_presets_have_the_papers_counts(capfd: pytest.CaptureFixture[str]) -> None:
    """The published 1B and 8B models have 4.53 B and 10.55 B parameters with their tables, the scorer 99.5 M."""
    rows = {row["preset"]: row for row in json.loads(said(capfd, "presets", "--json"))}
    assert sorted(rows) == preset_names()
    assert rows["blt-1b"]["parameters"] == pytest.approx(4.534e9, rel=1e-3)
    assert rows["blt-8b"]["parameters"] == pytest.approx(10.554e9, rel=1e-3)
    assert rows["blt-1b"]["ngram_tables"] == 6 * 500002 * 1024
    assert rows["blt-1b"]["entropy_model"] == pytest.approx(99.5e6, rel=1e-3)

    def block(dim: int) -> int:
        hidden = -(-int(8 * dim / 3) // 256) * 256
        return 4 * dim * dim + 3 * dim * hidden + 2 * dim

    # Table 10 of the paper: local width, decoder layers, latent width, latent layers, k.
    table = {"400m": (768, 7, 1280, 24, 2), "1b": (1024, 9, 2048, 25, 2), "2b": (1024, 9, 2560, 26, 3)}
    table |= {"4b": (1024, 9, 3072, 36, 3), "8b": (1280, 6, 4096, 32, 4)}
    for name, (local, layers, latent, depth, k) in table.items():
        cross = (1 + layers) * (4 * local * local + 2 * local)
        ends = 2 * 260 * local + local + local * local * k + latent * local * k
        widen = 0 if k * local == latent else k * local * latent
        wanted = (1 + layers) * block(local) + depth * block(latent) + cross + ends + widen
        row = rows[f"blt-{name}"]
        assert row["parameters"] - row["ngram_tables"] == wanted, name


def test_the_report_is_one_page(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = Path(said(capfd, "report", str(home / "run")).strip())
    html = page.read_text()
    assert "bits per byte" in html and "gzip" in html and "<svg" in html
    assert not re.search(r'(src|href)="https?:', html)


BAD: list[tuple[str, list[str], int]] = [
    ("nothing to train on", ["train"], 2),
    ("RUN is missing: see `bytelm eval --help`", ["eval"], 2),
    ("FILE is missing: see `bytelm compress --help`", ["compress", "{home}/run"], 2),
    ("--hours is missing: see `bytelm advise --help`", ["advise", "{root}"], 2),
    ("--hours has no value: see `bytelm advise --help`", ["advise", "{root}", "--hours"], 2),
    ("--out is missing: see `bytelm data pack --help`", ["data", "pack", "{root}"], 2),
    ("as in `bytelm advise ~/notes`", ["advise", "--hours", "1"], 2),
    ("as in `bytelm sweep ~/notes`", ["sweep"], 2),
    ("no such file or folder: {home}/nowhere", ["train", "{home}/nowhere"], 3),
    ("no document of the sample has 2 bytes", ["train", "{home}/one", "--run", "{home}/tiny", "--quiet"], 3),
    ("no bytes found in {home}/empty", ["train", "{home}/empty", "--run", "{home}/bad"], 3),
    ("did you mean model.local_heads?", ["train", "{root}", "--set", "model.locl_heads=2", "--run", "{home}/bad"], 2),
    ("7 heads do not divide width 128", ["train", "{root}", "--set", "model.local_heads=7", "--run", "{home}/bad"], 2),
    ("must be a number", ["train", "{root}", "--set", "train.learning_rate=fast", "--run", "{home}/bad"], 2),
    ("did you mean 'blt-tiny'?", ["train", "{root}", "--preset", "blt-tin", "--run", "{home}/bad"], 2),
    ("cannot read {home}/none.toml", ["train", "{root}", "--config", "{home}/none.toml", "--run", "{home}/bad"], 2),
    ("no run at {home}/nowhere", ["generate", "{home}/nowhere", "x"], 4),
    ("no checkpoint in {home}/empty", ["generate", "{home}/empty", "x"], 4),
    ("temperature -1.0", ["generate", "{home}/run", "x", "--temperature", "-1"], 2),
    ("--hex 'zz': give two hex digits for each byte", ["generate", "{home}/run", "zz", "--hex"], 2),
    ("max_bytes -1", ["generate", "{home}/run", "x", "--max-bytes=-1"], 2),
    ("need an entropy model", ["patches", "entropy", "x"], 2),
    ("no such file or folder", ["eval", "{home}/run", "{home}/nowhere"], 3),
    (
        "--bytewise is for runs over tokens, and {home}/run predicts bytes already",
        ["eval", "{home}/run", "--bytewise"],
        2,
    ),
    ('Did you mean "train"', ["trian"], 2),
    ("no longer than max_length", ["calibrate", "{home}/run", "99"], 2),
]


@pytest.mark.parametrize(("words", "arguments", "code"), BAD, ids=[row[0] for row in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(
    home: Path, capfd: pytest.CaptureFixture[str], words: str, arguments: list[str], code: int
) -> None:
    (home / "empty").mkdir(exist_ok=True)
    (home / "one").write_bytes(b"x")
    places = {"home": str(home), "root": str(home / "data")}
    assert cli([a.format(**places) for a in arguments]) == code
    found = capfd.readouterr()
    lines = found.err.strip().splitlines()
    wanted = words.format(**places)
    if wanted == "no longer than max_length":
        wanted = "no patch is longer than max_length"
    assert len(lines) == 1 and wanted in lines[0] and "Traceback" not in found.err
    assert not (home / "bad" / "checkpoints").exists()


@pytest.mark.fault("K1")
@pytest.mark.parametrize(("last", "said"), [(1.52, False), (1.9, True)])
def test_a_validation_loss_that_rose_is_said_at_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], last: float, said: bool
) -> None:
    losses = [(100_000, 2.0), (350_000, 1.5), (700_000, 1.6), (1_400_000, last)]
    lines = [{"kind": "validation", "bytes": read, "bits_per_byte": bits} for read, bits in losses]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    final = Final(None, None, tmp_path / "report.html", None)
    assert ended(Result(tmp_path, None, None, final), quiet=False, json=False) == 0
    wanted = "caution: validation was at 1.500 bits/byte after 350 kB, and rose to 1.900: "
    assert (wanted in (out := capfd.readouterr().out)) == said and ("caution" in out) == said


@pytest.mark.parametrize("kind", ["cut short", "flipped"])
def test_a_damaged_checkpoint_is_named(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    copy = tmp_path / "run"
    subprocess.run(["cp", "-r", str(home / "run"), str(copy)], check=True)
    file = next((copy / "checkpoints").glob("step-*/model.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 64
    file.write_bytes(data[:-9] if kind == "cut short" else data)
    assert cli(["generate", str(copy), "x"]) == 4
    line = capfd.readouterr().err.strip()
    assert "model.safetensors is" in line and "\n" not in line


@pytest.mark.fault("D2", "D4")
@pytest.mark.parametrize(
    "data", [b"\x00" * 3000, bytes(range(256)) * 12, b"\xff\xfe" * 1500, b"ab", b"a" * 5000 + os.urandom(3000)]
)
def test_any_bytes_train(tmp_path: Path, data: bytes) -> None:
    """NULs, all 256 values, invalid UTF-8, two bytes, runaway patches: everything is data."""
    (tmp_path / "data.bin").write_bytes(data)
    (tmp_path / "zero").write_bytes(b"")
    (tmp_path / "nano.toml").write_text(NANO)
    words = ["train", str(tmp_path / "data.bin"), str(tmp_path / "zero"), "--run", str(tmp_path / "run")]
    assert cli([*words, "--config", str(tmp_path / "nano.toml"), "--steps", "2", "--quiet"]) == 0
    lm = bytelm.load(tmp_path / "run")
    assert lm.bits(data)[1] == len(data)


def test_help_is_quick_to_import() -> None:
    code = "import sys, bytelm.cli; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_paragraphs_of_help_break_where_the_terminal_ends() -> None:
    """Lines of a help text are shown as they are: a paragraph is one line of the source, but for examples."""
    from bytelm.cli import app

    def texts(command: Any, path: str) -> Iterator[tuple[str, str]]:
        yield path, inspect.cleandoc(command.help or "").partition("Parameters\n---")[0]
        if command.default_command is not None:
            for option in command.assemble_argument_collection(parse_docstring=True):
                yield f"{path} {option.name}", re.sub(r"\.\n", "\n\n", option.parameter.help or "")
        for word in command:
            if not word.startswith("-"):
                yield from texts(command[word], f"{path} {word}")

    found = dict(texts(app, "bytelm"))
    assert len(found) > 20 and "Example: bytelm data curriculum" in found["bytelm data curriculum"]
    for path, text in found.items():
        for paragraph in text.strip().split("\n\n"):
            lines = paragraph.splitlines()
            assert len(lines) <= 1 or all(line.startswith("Example: ") for line in lines), (path, lines)


@pytest.mark.fault("T3")
def test_ctrl_c_saves_and_the_same_command_goes_on(home: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-m", "bytelm", "train", str(home / "data")]
    words += ["--config", str(home / "nano.toml"), "--run", str(tmp_path / "run"), "--steps", "100000"]
    job = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.2)
        metrics = tmp_path / "run" / "metrics.jsonl"
        if metrics.exists() and metrics.read_text().count('"kind": "train"') >= 2:
            break
    job.send_signal(signal.SIGINT)
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130, err
    step = int(re.findall(r"saved step (\d+)", err)[0])
    words[-1] = str(step + 2)
    again = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and f"resuming from step {step}" in again.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["report", "-"],
        ["data", "verify", "-"],
        ["data", "pack", "x", "--out", "-"],
        ["convert", "-", "x", "--format", "hf"],
        ["export", "x", "-", "--to", "hf"],
        ["train", "x", "--run", "-"],
        ["train", "x", "--config", "-"],
        ["train", "x", "--init-from", "-"],
        ["generate", "x", "--out", "-"],
        ["costs", "--svg", "-"],
    ],
    ids=" ".join,
)
def test_a_lone_hyphen_that_cannot_be_a_stream_is_one_true_line(
    words: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    """None of them looks for a file called "@-", which is how the command line passes a hyphen on."""
    assert cli(words) == 2
    out, error = capfd.readouterr()
    assert re.fullmatch(r'bytelm: usage: Invalid value "-" for \S+ It cannot be standard input or output: .*\n', error)
    assert not out


def test_a_report_goes_to_standard_output(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = said(capfd, "report", str(home / "run"), "--out", "-", "--quiet")
    assert page.lower().startswith("<!doctype html>") and page.rstrip().endswith("</html>")
    assert not Path("@-").exists()


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (r"\n\n", b"\n\n"),
        (r"\r\t\\", b"\r\t\\"),
        (r"\x00\xfF", b"\x00\xff"),
        (r"\\n", b"\\n"),
        (r"\\\n", b"\\\n"),
        (r"\begin", b"\\begin"),
        (r"\xi", b"\\xi"),
        (r"\x4", b"\\x4"),
        (r"C:\Users", b"C:\\Users"),
        ("\\", b"\\"),
        (r"\u20ac\N{DASH}\101\0", rb"\u20ac\N{DASH}\101\0"),
        ("é。", "é。".encode()),
        ("\udcff", b"\xff"),  # how Python holds a byte of the command line that is no UTF-8
        ("-", b"-"),
    ],
)
def test_a_stop_sequence_has_one_rule_of_escapes(
    home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], typed: str, wanted: bytes
) -> None:
    seen, pieces = list[bytes](), prompts.pieces
    monkeypatch.setattr(
        prompts, "pieces", lambda model, given, **more: seen.extend(more["stop"]) or pieces(model, given, **more)
    )
    assert cli(["generate", str(home / "run"), "a", "--max-bytes", "2", "--stop", typed, "--quiet"]) == 0
    assert seen == [wanted]
