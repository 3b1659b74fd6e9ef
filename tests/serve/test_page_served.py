"""The page of a real server, behind a key, in front of models for text, pictures and sound."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bytelm.cli import run as cli
from devtools import BROWSER, CONTROL, Loop, Page, browser
from small import BLT, TRAINED

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not BROWSER, reason="there is no chromium or google-chrome here")]
KEY = "a-key-of-the-page"
PLAIN = ["model.layers=1", "model.dim=16", "model.heads=2", *TRAINED]


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def clip(seed: int) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(np.random.default_rng(seed).integers(-9000, 9000, 150).astype("<i2").tobytes())
    return file.getvalue()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Runs on texts, pictures and clips."""
    home = tmp_path_factory.mktemp("runs")
    for kind in ("txt", "png", "wav"):
        (home / kind).mkdir()
    for seed in range(24):
        (home / "txt" / f"{seed}.txt").write_text(f"document {seed} " * 20)
        (home / "png" / f"{seed}.png").write_bytes(picture(seed))
        (home / "wav" / f"{seed}.wav").write_bytes(clip(seed))
    for name, kind, words, sets in (
        ("words", "txt", ["--preset", "demo"], [*BLT, *TRAINED]),
        ("pictures", "png", ["--preset", "byte-tiny", "--as", "image:8"], PLAIN),
        ("clips", "wav", ["--preset", "byte-tiny", "--as", "audio:8k"], PLAIN),
    ):
        options = [word for one in sets for word in ("--set", one)]
        command = ["train", str(home / kind), *words, *options, "--steps", "3", "--run", str(home / name), "--quiet"]
        assert cli(command) == 0
    return [home / name for name in ("words", "pictures", "clips")]


@pytest.fixture(scope="module")
def address(runs: list[Path]) -> Iterator[str]:
    command = [sys.executable, "-m", "bytelm", "serve", *map(str, runs), "--port", "0", "--device", "cpu"]
    environment = os.environ | {"BYTELM_API_KEY": KEY}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as run:
        assert run.stdout
        try:
            found = next(m[0] for line in run.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
            yield f"{found}/"
        finally:
            run.terminate()
            run.stdout.read()
            run.wait(60)


@pytest.fixture
def tab(address: str, tmp_path: Path) -> Iterator[Page]:
    loop = Loop()
    with browser(loop, tmp_path) as chromium:
        tab = chromium.open(address, login=("anybody", KEY))
        tab.until("document.querySelector('.column .next button:not([hidden])')")
        yield tab
        complaints = [line for line in tab.console if "401" not in line]  # before the key was given
        assert complaints == []
        assert [one for one in tab.requests if not one.startswith((address, f"blob:{address}", "data:"))] == []
    loop.close()


COUNT = "document.querySelectorAll('{}').length"
DROP = """(() => {
  const data = new DataTransfer();
  data.items.add(new File([Uint8Array.from(atob("%s"), c => c.charCodeAt(0))], "%s"));
  document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
})()"""


def use(tab: Page, model: str) -> None:
    tab.run(f"document.querySelector('.top select').value = '{model}'")
    tab.run("document.querySelector('.top select').dispatchEvent(new Event('change'))")


def test_text_is_read_and_continued(tab: Page) -> None:
    tab.type("document — 7")
    tab.until(f"{COUNT.format('.patch .cell')} === 12")
    assert float(tab.text(".summary strong")) > 0
    heights = "[...document.querySelectorAll('.view i')].map(i => Number(i.style.getPropertyValue('--height')))"
    assert all(height > 0 for height in tab.run(heights))
    shares = "[...document.querySelectorAll('.next button')].map(b => Number(b.style.getPropertyValue('--share')))"
    found = tab.run(shares)[:10]
    assert found == sorted(found, reverse=True) and 0 < sum(found) <= 1
    tab.press("Enter", CONTROL)
    tab.until("document.querySelector('.ended').textContent")
    made = int(re.match(r"\d+", tab.text(".ended"))[0])  # type: ignore[index]
    tab.until(f"{COUNT.format('.patch .made i')} === {made}")
    assert tab.run(f"{COUNT.format('.error:not([hidden])')}") == 0


@pytest.mark.parametrize(("model", "name", "data"), [("pictures", "a.png", picture(99)), ("clips", "a.wav", clip(99))])
def test_half_a_file_is_completed(tab: Page, model: str, name: str, data: bytes) -> None:
    use(tab, model)
    tab.run(DROP % (base64.b64encode(data).decode(), name))
    tab.until("document.querySelector('.ended').textContent || !document.querySelector('.error').hidden")
    media = "img" if model == "pictures" else "audio"
    tab.until(f"{COUNT.format(f'figure {media}[src]')} === 2")
    whole = 8 * 8 * 3 if model == "pictures" else 300
    assert tab.text(".ended").startswith(f"{whole // 2} bytes generated")
    if model == "pictures":
        tab.until("[...document.images].every(one => one.complete)")
        assert tab.run("[...document.images].map(one => one.naturalWidth)") == [8, 8]
    else:
        tab.until("[...document.querySelectorAll('audio')].every(one => one.readyState >= 1)")
        assert tab.run("[...document.querySelectorAll('audio')].map(one => one.duration)") == [150 / 8000] * 2
