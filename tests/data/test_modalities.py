"""Modalities of any kind: what a name of one may say, and folders packed as one; what is unfit is skipped by name."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bytelm.config import build, dump_toml, to_mapping
from bytelm.data import convert
from bytelm.data.corpus import Corpus, Index, iterate_documents
from bytelm.data.modalities import audio, dna, image
from bytelm.data.modalities.base import Modality
from bytelm.data.pack import pack
from bytelm.data.selection import sample_evenly
from bytelm.errors import ConfigError, DataError
from bytelm.find import find, names
from bytelm.training.config import RunConfig
from media_files import AUDIO, folder_of, picture, raster, saved, wav

RANDOM = np.random.default_rng(0)


def noise(*shape: int) -> NDArray[np.uint8]:
    return RANDOM.integers(0, 256, shape, np.uint8)


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("image:64", image.Config(64, 64)),
        ("image", image.Config()),
        ("image:96x64:grey:patch8", image.Config(96, 64, grey=True, block=8)),
        ("image:7:raster", image.Config(7, 7, block=1)),
        ("audio:16k", audio.Config(16000)),
        ("audio:22.05k:8bit", audio.Config(22050, bits=8)),
        ("audio:44100:16bit", audio.Config(44100)),
        ("dna", dna.Config()),
    ],
)
def test_a_spec_is_a_table_that_goes_through_toml_and_back(text: str, expected: Any) -> None:
    name, _, spec = text.partition(":")
    table = {"name": name, **find("data.modalities", name).Config.parse(spec)}
    run = {"model": {"name": "transformer"}, "train": {"steps": 1}}
    config = build(RunConfig, run | {"modality": table}, "test")
    assert config.modality == expected
    assert build(RunConfig, tomllib.loads(dump_toml(to_mapping(config))), "test") == config
    assert isinstance(config.modality.build(), Modality)


def test_every_modality_has_defaults_and_a_parser() -> None:
    for name in names("data.modalities"):
        config = find("data.modalities", name).Config
        assert config.parse("") == {} and isinstance(config().build(), Modality)


@pytest.mark.parametrize(
    ("config", "spec"),
    [(image.Config, "64:gray"), (image.Config, "64x"), (image.Config, ""), (audio.Config, "12bit"), (dna.Config, "64")],
)
def test_a_spec_of_unknown_words_is_refused(config: Any, spec: str) -> None:
    if spec:
        with pytest.raises(ConfigError, match=repr(spec.split(":")[-1])):
            config.parse(spec)
    for wrong in ({"width": 0}, {"height": 4097}, {"block": 0}) if config is image.Config else ():
        with pytest.raises(ConfigError, match=rf"modality\.{next(iter(wrong))} = "):
            image.Config(**wrong)
    for rate in (999, 192001) if config is audio.Config else ():
        with pytest.raises(ConfigError, match=r"modality\.rate = "):
            audio.Config(rate)


# --- packed -----------------------------------------------------------------------------------------------------------


def contents(corpus: Corpus) -> list[bytes]:
    return [data.tobytes() for _, data in iterate_documents(corpus)]


@pytest.mark.fault("D9")
def test_a_mixed_folder_gives_its_images_and_names_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = [noise(4, 4, 3) for _ in range(40)]
    files = {f"{i:02d}.png": picture(p) for i, p in enumerate(pixels)}
    files |= {"notes.jsonl": b"not json\n", "readme.txt": b"hello", "y.npy": saved(np.stack(pixels))}
    files |= {"cut.png": picture(noise(64, 64, 3))[:5000], "large.png": picture(noise(8, 8, 3)), "void": b""}
    monkeypatch.setattr(convert, "LARGEST", 8000)
    files["z.bin"] = b"\0" * 8001
    source = folder_of(tmp_path / "s", files)
    with pytest.raises(DataError, match=r"--as image: 1 of 43 files are damaged.*cut\.png: .*data\.max_bad = 0\.001"):
        pack([source], tmp_path / "p", modality=raster(4, 4))
    corpus = pack([source], tmp_path / "p", modality=raster(4, 4), max_bad=1 / 43)
    found = contents(corpus)
    assert found[:40] == [p.tobytes() for p in pixels] == found[41:] and set(map(len, found)) == {48}
    report = Index.load(tmp_path / "p").source
    reasons = {Path(name).name: reason for name, reason in report.skipped}
    assert reasons.keys() == {"notes.jsonl", "readme.txt", "cut.png", "z.bin"}
    assert reasons["readme.txt"] == "not an image" and "truncated" in reasons["cut.png"] and "MiB" in reasons["z.bin"]
    assert (report.files, report.empty, report.bad, report.converted) == (47, 1, 1, {"resized": 1})
    assert report.reasons == {"not an image": 2, "a damaged image": 1, "more than 0 MiB": 1}
    assert report.losses()[0].startswith(f"4 skipped (the first {source / 'cut.png'}: a damaged image")
    assert report.losses()[1:] == ["1 empty skipped", "1 damaged skipped", "1 resized"]


def test_nothing_fit_is_one_line_with_the_reasons(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "s", {"a.txt": b"hello", "b.wav": wav(b"")})
    with pytest.raises(
        DataError, match=r"no bytes found in .*2 files; skipped .*a\.txt: not an audio file; skipped .*"
    ) as e:
        pack([source], tmp_path / "p", modality=AUDIO)
    assert "\n" not in str(e.value) and not (tmp_path / "p").exists()


def test_long_clips_are_cut_between_samples_and_images_never(tmp_path: Path) -> None:
    clip = RANDOM.integers(0, 256, 20018, np.uint8)  # a sixteenth of it is odd
    clip[1::2] = ord("\n")  # where text would be cut
    source = folder_of(tmp_path / "s", {"x.s16le": clip.tobytes(), "y.wav": wav(b"")})
    corpus = pack([source], tmp_path / "p", modality=AUDIO)
    sizes = corpus.documents().sizes
    assert len(sizes) >= 16 and set(sizes[:-1].tolist()) == {1250} and b"".join(contents(corpus)) == clip.tobytes()
    assert corpus.source_report.reasons == {"no audio data in it": 1} and corpus.grain == 2
    few = folder_of(tmp_path / "t", {"x.npy": saved(noise(3, 32, 32, 3))})
    corpus = pack([few], tmp_path / "q", modality=raster(32, 32))
    assert corpus.documents().sizes.tolist() == [3072] * 3 and corpus.grain == 3072


def test_a_corpus_packed_before_there_were_modalities_opens(tmp_path: Path) -> None:
    pack([folder_of(tmp_path / "s", {"a": b"hello"})], tmp_path / "p")
    index = tmp_path / "p" / "index.json"
    old = json.loads(index.read_text())
    for key in ("checksum", "grain", "modality", "options", "repeated", "looked"):
        del old[key]
    old["source"] = {"files": 2, "empty": 0, "bad_lines": 3, "skipped": [["x", "a link"], ["y", "a link"]]}
    index.write_text(json.dumps(old))
    corpus = Corpus.open(tmp_path / "p")
    assert (corpus.grain, corpus.index.options, corpus.source_report.bad) == (1, None, 3)
    assert corpus.source_report.losses() == ["2 skipped (the first x: a link)", "3 damaged skipped"]


def test_a_selection_parts_no_image_and_no_sample(tmp_path: Path) -> None:
    source = folder_of(tmp_path / "s", {"x.npy": saved(noise(20, 8, 8, 3))})
    corpus = pack([source], tmp_path / "p", modality=raster(8, 8), valid=0, test=0)
    for limit, count in ((192 * 5 + 100, 4), (192, 1), (100, 1), (1, 1), (None, 20)):
        found = [len(data) for _, data in sample_evenly(corpus, "train", limit)]
        assert set(found) == {192} and (limit is None or sum(found) <= max(limit, 192))
        assert len(found) >= count
    source = folder_of(tmp_path / "t", {f"{i}.s16le": noise(100).tobytes() for i in range(9)})
    corpus = pack([source], tmp_path / "q", modality=AUDIO, valid=0, test=0)
    for limit in (899, 333, 99, 3, 1):
        found = [len(data) for _, data in sample_evenly(corpus, "train", limit)]
        assert found and not any(size % 2 for size in found) and sum(found) <= max(limit, 2)
