"""Trainings on images, sound and DNA: what they are told, and where their windows start."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bytelm.cli import run as cli
from bytelm.errors import ConfigError
from bytelm.training.journal import Journal
from bytelm.training.prepare import prepare
from bytelm.training.settings import configure
from media_files import CLIP, folder_of, picture, saved, wav

RANDOM = np.random.default_rng(0)


def noise(*shape: int) -> NDArray[np.uint8]:
    return RANDOM.integers(0, 256, shape, np.uint8)


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

[patching]
name = "fixed"
size = 12

[train]
batch = 2
sample_bytes = 8
precision = "float32"
"""


def trained(tmp_path: Path, source: Path, spec: str, *more: str) -> int:
    (tmp_path / "nano.toml").write_text(NANO)
    words = ["train", str(source), "--as", spec, "--run", str(tmp_path / "run"), "--steps", "2"]
    return cli([*words, "--config", str(tmp_path / "nano.toml"), *more])


def test_a_run_on_images(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = {f"{i:02d}.png": picture(noise(8, 8, 3)) for i in range(30)} | {"big.png": picture(noise(32, 16, 3))}
    source = folder_of(tmp_path / "s", files | {"readme.txt": b"hello"})
    assert trained(tmp_path, source, "image:8") == 0
    told = capfd.readouterr().err
    name = source / "readme.txt"
    assert f"data: 32 files, 1 skipped ({name}: not an image), 1 cropped, 1 resized, 5.95 kB: " in told
    config = tomllib.loads((tmp_path / "run/config.toml").read_text())
    assert config["modality"] == {"name": "image", "width": 8, "height": 8, "grey": False, "block": 2}
    assert config["train"]["context_length"] == 8 * 8 * 3 + 1
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert rows and not any("sample" in str(row) for row in rows)

    assert cli(["eval", str(tmp_path / "run"), str(source / "big.png"), str(name), "--json"]) == 0
    out, told = capfd.readouterr()
    assert json.loads(out)["bytes"] == 192 and told == f"1 skipped ({name}: not an image), 1 cropped, 1 resized\n"
    assert cli(["eval", str(tmp_path / "run"), str(name)]) == 3
    told = capfd.readouterr().err
    assert told.count("\n") == 1 and f"skipped {name}: not an image" in told

    assert trained(tmp_path, source, "image:8:raster", "--quiet") == 2
    assert "modality.block was 2, now 1" in capfd.readouterr().err
    assert trained(tmp_path, source, "image:8", "--quiet") == 0


def test_windows_of_images_start_where_images_do(tmp_path: Path) -> None:
    """Two windows an image, as asked for: the second starts at the same byte of every image."""
    pixels = np.full((30, 8, 8, 3), np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    pixels[:, 0, 0, 0] = range(200, 230)
    source = folder_of(tmp_path / "s", {"x.npy": saved(pixels)})
    config = configure(
        None, None, ["patching.name=fixed", "train.context_length=97"], modality="image:8:raster", steps=1
    )
    tmp_path.joinpath("run").mkdir()
    prepared = prepare(
        [source], config, tmp_path / "run", Journal(tmp_path / "metrics.jsonl", True), torch.device("cpu")
    )
    assert prepared.valid is not None
    for sampler in (prepared.sampler, prepared.valid):
        starts = {int(row[1]) for step in range(20) for row in sampler.batch(step).ids}
        assert starts <= {*range(200, 230), 97} and 97 in starts


def test_a_run_on_sound_and_one_on_dna(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    clips = folder_of(tmp_path / "s", {f"{i}.wav": wav(CLIP[i:], 8000) for i in range(9)} | {"no.wav": wav(b"")})
    assert trained(tmp_path, clips, "audio:8k") == 0
    told = f"data: 10 files, 1 skipped ({clips / 'no.wav'}: no audio data in it), 8.93 kB: "
    assert told in capfd.readouterr().err
    config = tomllib.loads((tmp_path / "run/config.toml").read_text())
    assert config["train"]["context_length"] == 8192  # what the preset for sound says
    assert "sample" not in (tmp_path / "run/metrics.jsonl").read_text()
    letters = [bytes(RANDOM.choice(list(b"acgt"), 200).astype(np.uint8)) for _ in range(20)]
    genes = folder_of(tmp_path / "t", {"x.fasta": b"".join(b">header\n%b\n" % text for text in letters)})
    (tmp_path / "dna").mkdir()
    assert trained(tmp_path / "dna", genes, "dna") == 0
    assert "data: 1 files, 20 converted to upper case, 4 kB: " in capfd.readouterr().err
    assert "sample" in (tmp_path / "dna/run/metrics.jsonl").read_text()


def test_the_window_is_one_image_unless_something_says_otherwise(tmp_path: Path) -> None:
    def train(modality: str | None, *sets: str, file: str = "") -> tuple[int, int]:
        (tmp_path / "x.toml").write_text(file)
        config = configure("blt-tiny", tmp_path / "x.toml", sets, modality=modality, steps=1).train
        return config.context_length, config.batch

    assert train(None) == (1024, 4)  # what the preset says, 4096 bytes a step
    assert train("image:32") == (3073, 1)
    assert train("image:16") == (769, 5)
    assert train("image:16", "train.batch=3") == (769, 3)
    assert train("image:16", "train.context_length=512") == (512, 4)
    assert train("image:16", file="[train]\ncontext_length = 100") == (100, 4)
    assert train(None, file='[modality]\nname = "image"\nwidth = 16\nheight = 16') == (769, 5)
    assert train("image:64") == (12289, 1)  # three times a step
    assert train("image:128") == (1024, 4)  # would be twelve times a step
    assert train("audio:16k") == train("dna") == (1024, 4)
    for wrong, message in (
        ("imag:64", "unknown modality 'imag': did you mean 'image'?"),
        ("image:6.5", "--as image:6.5: '6.5' is none of"),
        ("image:0", "--as image:0: modality.width = 0: must be between 1 and 4096"),
        ("dna:4", "--as dna:4: '4' is not an option of dna"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            configure(modality=wrong)
