"""Runs on pictures and sound: what is generated, measured and shown is what the bytes stand for."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import wave
from base64 import b64decode
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import bytelm
from bytelm import inspection
from bytelm.checkpoint.assemble import load
from bytelm.cli import run as cli
from bytelm.data.modalities import audio, dna, image
from bytelm.data.modalities.base import Modality, UnfitError
from bytelm.errors import DataError, UsageError
from bytelm.evaluate.verdict import judge, unit_of
from bytelm.generate import prompts, session
from bytelm.generate.document import completion, continuation, first_document
from bytelm.report.artifacts import EVALUATION
from bytelm.report.gather import gather
from bytelm.report.media import Completion, Media, gallery
from bytelm.report.page import HeldOut, ReportData, Sample, render
from bytelm.testing.tiny import UniformModel
from bytelm.units import EOS, VOCAB
from report_pages import Page

SIDE, RATE, SAMPLES = 8, 8000, 150
TINY = """
[model]
name = "transformer"
layers = 1
dim = 16
heads = 2

[train]
context_length = 64
batch = 2
warmup_steps = 1
steps = 2
sample_bytes = 8
precision = "float32"
"""
PATCHED = """
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

[patching]
name = "fixed"
size = 12

"""


def picture(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def clip(seed: int) -> bytes:
    return np.random.default_rng(seed).integers(-9000, 9000, SAMPLES).astype("<i2").tobytes()


def wav(pcm: bytes) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(RATE)
        sound.writeframes(pcm)
    return file.getvalue()


def pixels(file: bytes | Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.asarray(Image.open(io.BytesIO(file) if isinstance(file, bytes) else file))


def frames(file: bytes | Path) -> bytes:
    with wave.open(io.BytesIO(file) if isinstance(file, bytes) else str(file)) as sound:
        assert (sound.getnchannels(), sound.getsampwidth(), sound.getframerate()) == (1, 2, RATE)
        return sound.readframes(sound.getnframes())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pictures and clips, and a run on each, and on text: `pictures`, `clips`, `words`."""
    folder = tmp_path_factory.mktemp("media")
    for kind in ("png", "wav", "txt"):
        (folder / kind).mkdir()
    for seed in range(24):
        Image.fromarray(picture(seed)).save(folder / "png" / f"{seed}.png")
        (folder / "wav" / f"{seed}.wav").write_bytes(wav(clip(seed)))
        (folder / "txt" / f"{seed}.txt").write_text(f"document {seed} " * 20)
    (folder / "blt.toml").write_text(PATCHED + TINY[TINY.index("[train]") :])
    (folder / "tiny.toml").write_text(TINY)
    for run, kind, words in (
        ("pictures", "png", ["--as", "image:8", "--config", str(folder / "blt.toml")]),
        ("clips", "wav", ["--as", "audio:8k", "--config", str(folder / "tiny.toml")]),
        ("words", "txt", ["--config", str(folder / "tiny.toml")]),
    ):
        share = ["--set", "data.test=0.3", "--run", str(folder / run), "--quiet"]
        assert cli(["train", str(folder / kind), *words, *share]) == 0
    return folder


def generated(capfd: pytest.CaptureFixture[str], *words: str | Path) -> dict[str, Any]:
    assert cli(["generate", *map(str, words), "--json"]) == 0
    return json.loads(capfd.readouterr().out)


# ---- generate


@pytest.mark.parametrize(("keep", "rows"), [([], 4), (["--keep", "0.25"], 2), (["--keep", "1"], 8)])
def test_a_picture_is_completed_below_what_was_kept(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], keep: list[str], rows: int
) -> None:
    out, photo = tmp_path / "out.png", home / "png" / "3.png"
    found = generated(capfd, home / "pictures", f"@{photo}", "--png", out, *keep)
    assert found["file"] == str(out) and found["bytes"] == (SIDE - rows) * SIDE * 3
    made = pixels(out)
    assert made.shape == (SIDE, SIDE, 3)
    assert np.array_equal(made[:rows], picture(3)[:rows])
    assert rows == SIDE or not np.array_equal(made[rows:], picture(3)[rows:])
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_a_new_picture_is_whole_whatever_is_drawn(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lm = bytelm.load(home / "pictures")
    for seed in range(6):
        found = generated(capfd, home / "pictures", "--out", tmp_path / "new.png", "--seed", str(seed))
        assert found["bytes"] == SIDE * SIDE * 3
        assert lm.modality is not None
        assert (tmp_path / "new.png").read_bytes() == lm.modality.decode(bytes.fromhex(found["hex"]))


def test_bytes_given_as_hex_are_the_beginning_of_a_picture(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = generated(capfd, home / "pictures", "ff0080", "--hex", "--png", tmp_path / "new.png")
    assert found["bytes"] == SIDE * SIDE * 3 - 3
    assert pixels(tmp_path / "new.png")[0, 0].tolist() == [255, 0, 128]
    found = generated(capfd, home / "pictures", "--max-bytes", "7", "--png", tmp_path / "new.png")
    assert found["bytes"] == 6


@pytest.mark.parametrize(
    ("words", "kept", "samples"),
    [
        ([], SAMPLES // 2, SAMPLES),
        (["--keep", "0.333"], SAMPLES // 3 - 1, SAMPLES),
        (["--keep", "1", "--max-bytes", "41"], SAMPLES, SAMPLES + 20),
        (["--keep", "0.5", "--max-bytes", "9"], SAMPLES // 2, SAMPLES // 2 + 4),
    ],
)
def test_a_clip_is_completed_after_what_was_kept(
    home: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    words: list[str],
    kept: int,
    samples: int,
) -> None:
    out = tmp_path / "out.wav"
    for seed in range(3):
        generated(capfd, home / "clips", f"@{home / 'wav' / '5.wav'}", "--wav", out, "--seed", str(seed), *words)
        made = frames(out)
        assert len(made) == 2 * samples
        assert made[: 2 * kept] == clip(5)[: 2 * kept]


def test_a_new_clip_has_whole_samples(home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = generated(capfd, home / "clips", "--wav", tmp_path / "new.wav", "--max-bytes", "31", "--seed", "3")
    assert found["bytes"] == 30
    assert frames(tmp_path / "new.wav") == bytes.fromhex(found["hex"])


@pytest.mark.parametrize(
    ("line", "words", "code"),
    [
        ("{tmp}/x.png cannot be written: this run generates .wav files", ["clips", "--png", "{tmp}/x.png"], 2),
        ("{tmp}/x.wav cannot be written: this run generates .png files", ["pictures", "--wav", "{tmp}/x.wav"], 2),
        ("{tmp}/x.png needs a run trained --as image", ["words", "--png", "{tmp}/x.png"], 2),
        ("is not text: leave out --stop and --utf8", ["pictures", "--png", "{tmp}/x.png", "--utf8"], 2),
        ("is not text", ["pictures", "--png", "{tmp}/x.png", "--stop", "a"], 2),
        ("is not a writable folder", ["pictures", "--png", "{tmp}/none/x.png"], 2),
        ("keep 1.5 is not in [0, 1]", ["pictures", "@{home}/png/1.png", "--keep", "1.5"], 2),
        ("keep 0.5 needs a run trained --as", ["words", "@{home}/txt/1.txt", "--keep", "0.5"], 2),
        ("keep 0.5 needs", ["pictures", "00", "--hex", "--keep", "0.5"], 2),
        ("the prompt has 193 bytes, and a document of this run 192", ["pictures", "00" * 193, "--hex"], 2),
        ("max_bytes -1 is negative", ["pictures", "--max-bytes=-1"], 2),
        ("1.txt cannot be the prompt (not an image)", ["pictures", "@{home}/txt/1.txt", "--png", "{tmp}/x.png"], 3),
    ],
)
def test_what_does_not_fit_is_one_line_and_leaves_nothing(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], line: str, words: list[str], code: int
) -> None:
    places = {"home": str(home), "tmp": str(tmp_path)}
    assert cli(["generate", f"{home}/{words[0]}", *(word.format(**places) for word in words[1:])]) == code
    said = capfd.readouterr().err.strip()
    assert line.format(**places) in said and "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_leaves_the_old_file(
    home: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.png").write_bytes(b"old")
    step, count = session.Session.step, iter(range(100))

    def interrupted(*arguments: Any) -> Any:
        if next(count) == 10:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(session.Session, "step", interrupted)
    try:
        code = cli(["generate", str(home / "pictures"), "--png", str(tmp_path / "out.png")])
    except SystemExit as exit:
        code = exit.code
    assert code == 130
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("out.png", b"old")]


class Ending(UniformModel):
    """Would end every document at once."""

    def forward(self, ids: Tensor, state: None = None, boundaries: Tensor | None = None) -> tuple[Tensor, None]:
        return torch.eye(VOCAB)[EOS].expand(*ids.shape, VOCAB) * 50, None


def test_without_eos_a_document_does_not_end_early() -> None:
    options: dict[str, Any] = {"max_bytes": 20}
    assert [g.data for g in prompts.generate(Ending(), [b"", b"ab"], **options)] == [b"", b""]
    for utf8 in (False, True):
        whole = prompts.generate(Ending(), [b"", b"ab"], eos=False, utf8=utf8, **options)
        assert [(len(g.data), g.reason) for g in whole] == [(20, "length")] * 2


@given(size=st.integers(0, 100), keep=st.floats(0, 1), more=st.none() | st.integers(0, 50))
def test_a_task_keeps_whole_units(size: int, keep: float, more: int | None) -> None:
    sound = audio.Config().build()
    document = bytes(2 * size)
    task = completion(sound, document, keep, more)
    assert 0 <= keep * len(document) - len(task.prompt) < 2 and len(task.prompt) % 2 == 0
    assert task.max_bytes == (len(document) - len(task.prompt) if more is None else more // 2 * 2)
    assert not task.eos
    free = continuation(sound, b"", more)
    assert (free.max_bytes, free.eos) == (256 if more is None else more // 2 * 2, True)


def test_the_first_document_that_has_bytes_is_taken() -> None:
    letters = dna.Config().build()
    assert first_document(letters, "x.fa", b">a\n>b\nacgt\n>c\nTT\n", Counter()) == b"ACGT"
    for data, reason in ((b"", "it is empty"), (b">a\nxyz!", "not a DNA letter")):
        with pytest.raises(DataError, match=reason) as caught:
            first_document(letters, "x.fa", data, Counter())
        assert not isinstance(caught.value, UnfitError)
    with pytest.raises(UsageError, match="shorten it"):
        continuation(image.Config(2, 2).build(), bytes(13))


# ---- eval


class AfterSeven(UniformModel):
    """Knows that 7 is followed by 0, and nothing else."""

    def forward(self, ids: Tensor, state: None = None, boundaries: Tensor | None = None) -> tuple[Tensor, None]:
        return torch.eye(VOCAB)[0] * 100 * (ids == 7)[..., None], None


@pytest.mark.parametrize("context", [5, 8, 100])
def test_planes_are_measured_apart(context: int) -> None:
    rgb = image.Config(4, 5).build()
    documents = [("a", b"\7\0\x09" * 20), ("b", b"\7\0\x09" * 20), ("cut short", b"\7\0\x09\7")]
    known = judge(AfterSeven(), documents, context, modality=rgb)
    dear = math.log2(260)
    assert known.planes == {
        "red": pytest.approx(dear),
        "green": pytest.approx(0, abs=1e-6),
        "blue": pytest.approx(dear),
    }
    assert known.bits == pytest.approx(dear * (42 + 41))
    chance = judge(UniformModel(), documents, context, modality=rgb)
    assert chance.planes == dict.fromkeys(("red", "green", "blue"), pytest.approx(dear))
    assert chance.unit == "bits per dimension"


def test_the_formats_of_a_modality_are_among_the_compressors() -> None:
    rgb, sound = image.Config(SIDE, SIDE).build(), audio.Config(RATE).build()
    documents = [("", picture(seed).tobytes()) for seed in range(2)]
    found = judge(UniformModel(), documents, 100, modality=rgb)
    assert found.compressors.keys() == {"gzip", "bzip2", "xz", "png", "webp"}
    sizes = [rgb.compressors()["png"](data) for _, data in documents]
    assert found.compressors["png"] == pytest.approx(8 * sum(sizes) / 384)
    heard = judge(UniformModel(), [("", clip(1)), ("", b"")], 100, modality=sound)
    assert "flac" in heard.compressors and heard.planes.keys() == {"low byte", "high byte"}
    plain = judge(UniformModel(), documents, 100)
    assert (plain.planes, plain.unit) == ({}, "bits per byte")
    assert plain.compressors.keys() == {"gzip", "bzip2", "xz"}
    assert judge(UniformModel(), documents, 100, modality=image.Config(SIDE, SIDE, grey=True).build()).planes == {}


def test_eval_tells_planes_and_formats(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli(["eval", str(home / "pictures"), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["planes"].keys() == {"red", "green", "blue"} and "png" in found["compressors"]
    assert sum(found["planes"].values()) / 3 == pytest.approx(found["bits_per_byte"])
    assert cli(["eval", str(home / "pictures")]) == 0
    said = capfd.readouterr().out
    assert "bits per dimension" in said and "green" in said and "bits per byte" not in said


# ---- the report


def report_of(run: Path, anew: bool = False) -> tuple[str, Page]:
    source = render(gather(run, inspection.inspect(run, load(run)) if anew else None))
    page = Page(source)
    page.assert_inert()
    return source, page


def shown(page: Page, tag: str) -> dict[str, bytes]:
    """What is inside the page, by its `alt` or its number."""
    found = [attributes for name, attributes in page.found if name == tag]
    return {a.get("alt", str(i)): b64decode(a["src"].partition(",")[2]) for i, a in enumerate(found)}


@pytest.fixture
def copy(home: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(home / name, tmp_path / name))


def test_the_report_shows_pictures_and_no_text(home: Path) -> None:
    source, page = report_of(home / "pictures")
    images = shown(page, "img")
    wanted = [f"{row} {n}" for row in ("original", "given", "completed", "free") for n in range(1, 5)]
    assert list(images) == wanted
    originals = {picture(seed).tobytes() for seed in range(24)}
    for n in range(1, 5):
        held, prompt, done = (pixels(images[f"{row} {n}"]) for row in ("original", "given", "completed"))
        assert held.tobytes() in originals
        assert np.array_equal(prompt[:4], held[:4]) and not prompt[4:].any()
        assert np.array_equal(done[:4], held[:4]) and not np.array_equal(done[4:], held[4:])
    assert "Originals from the test split" in page.text
    assert "bits per dimension" in page.text and "bits per byte" not in page.text and "webp" in page.text
    assert page.classed("sample") == page.classed("patch") == 0
    assert not re.search(r"https?:|url\(|<script", source)


@pytest.mark.parametrize(("block", "kept"), [(1, 7 * 30), (2, 6 * 30), (4, 4 * 30), (16, 0)])
def test_half_an_image_is_whole_rows_of_its_blocks(block: int, kept: int) -> None:
    """10 x 15 pixels of colour: never a row of blocks in part, so that what is kept is a rectangle."""
    picture = image.Config(10, 15, block=block).build()
    assert len(completion(picture, bytes(450)).prompt) == kept


def test_all_samples_come_from_one_batch_and_none_ends_early() -> None:
    rgb, told = image.Config(2, 2, block=1).build(), Counter[str]()

    def watch(what: str, total: int) -> Callable[[int], None]:
        return lambda more: told.update({what: more, f"{what} of {total}": 0})

    tasks = [completion(rgb, bytes(12), 0.7), continuation(rgb, b""), completion(rgb, bytes(12), 1)]
    added = inspection.generated(Ending(), tasks, watch)
    assert [len(data) for data in added] == [6, 12, 0]
    assert told == {"sampling": 36, "sampling of 36": 0}


def test_the_report_plays_clips(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "LONGEST", 101)
    _, page = report_of(home / "clips", anew=True)
    sounds = [*shown(page, "audio").values()]
    assert [len(frames(sound)) for sound in sounds] == [100, 100, 100, 100, 50, 50]
    for original, completed in (sounds[:2], sounds[2:4]):
        assert frames(original) in {clip(seed)[:100] for seed in range(24)}
        assert frames(completed)[:50] == frames(original)[:50]
    assert "low byte" in page.text and "flac" in page.text
    assert len(re.findall(r"0\.01 seconds", page.text)) >= 6


def test_the_report_samples_nothing_that_takes_long_or_is_not_wanted(
    copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = copy("pictures")
    monkeypatch.setattr(inspection, "LONGEST", SIDE * SIDE * 3 - 1)
    source, page = report_of(run, anew=True)
    assert "<img" not in source and "Not sampled, as 192 B per document would take long" in page.text
    monkeypatch.undo()
    config = run / "config.toml"
    config.write_text(re.sub("(?m)^sample_bytes = .*", "sample_bytes = 0", config.read_text()))
    source, page = report_of(run, anew=True)
    assert "<img" not in source and "Samples" not in page.text


def test_a_measurement_of_an_older_bytelm_is_still_shown(copy: Callable[[str], Path]) -> None:
    run = copy("clips")
    kept = json.loads((run / EVALUATION).read_text())
    del kept["planes"], kept["unit"], kept["split"], kept["step"]
    (run / EVALUATION).write_text(json.dumps(kept))
    _, page = report_of(run)
    assert f"{kept['bits_per_byte']:.3f}" in page.text and "low byte" not in page.text


class Sound(Modality):
    """Clips of a few bytes a second, as they are."""

    suffix = ".wav"

    def encode(self, name: str, data: bytes, notes: Counter[str]) -> Iterator[bytes]:
        yield data

    def decode(self, document: bytes) -> bytes:
        return wav(document[: len(document) // 2 * 2])


@pytest.mark.parametrize("size", [0, 1, 2, 3, 958, 960, 962, 5001])
def test_a_wave_is_drawn_within_its_frame_in_two_colours(size: int) -> None:
    pcm = (30000 * np.sin(np.arange(size // 2 + 1))).astype("<i2").tobytes()[:size]
    given = size // 4 * 2
    source = gallery(Media(Sound(), [Completion(pcm, given, pcm[given:])], [pcm]))
    assert Page(source).values("controls") == ["", "", ""]
    waves = re.findall(r"<svg.*?</svg>", source)
    strokes = [re.findall(r"M([\d.]+) ([\d.]+)v([\d.]+)", svg) for svg in waves]
    for x, top, tall in (map(float, stroke) for found in strokes for stroke in found):
        assert 0 <= x <= 480 and 0 <= top <= top + tall <= 72.5
    assert [len(found) for found in strokes] == [min(480, size // 2)] * 3
    colours = [re.findall(r"--series(\d)", svg) for svg in waves]
    if size >= 4:
        assert colours == [["0"], ["0", "1"], ["1"]]
        second = waves[1].index("--series1")
        share = len(re.findall("M", waves[1][:second])) / len(strokes[1])
        assert share == pytest.approx(given / size, abs=0.01)


def test_media_stand_in_the_place_of_text_and_nothing_becomes_markup() -> None:
    metrics = [{"kind": "sample", "step": 1, "prompt": "P", "text": "T"}]
    hostile = "<script>alert(1)</script>"
    media = Media(Sound(), note=hostile)
    held = HeldOut(2.0, 9, planes={hostile: 1.5})
    data = ReportData("run", metrics, samples=[Sample(None, b"", b"text")], media=media, held_out=held, unit=hostile)
    page = Page(render(data))
    page.assert_inert()
    assert page.text.count(hostile) == 4 and page.classed("sample") == 0 and "1.500" in page.text
    assert gallery(Media(dna.Config().build())) == ""


def test_only_documents_of_one_size_have_dimensions() -> None:
    built = [image.Config().build(), audio.Config().build(), dna.Config().build(), None]
    assert [unit_of(modality) for modality in built] == ["bits per dimension", *["bits per byte"] * 3]
