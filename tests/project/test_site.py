"""The documentation site builds without a warning, notebooks and all, and its pages load nothing from anywhere else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
SHOWN = [  # on page, in what words
    ("reference/cli.html", "bytelm train"),
    ("reference/configuration.html", "embedding_lr_scale"),
    ("reference/presets.html", "megabyte-image640-125m-83m"),
    ("reference/python.html", "what the model generates after a prompt"),
    ("notebooks/first_model.html", "Learning curves: bits per byte"),
    ("notebooks/look_inside.html", "Lengths of the patches of bisect.py"),
    ("source/src/bytelm/models/blt/model.py.html", "newest"),
    ("tour.html", "source/src/bytelm/models/blt/model.py.html"),
]


class Loads(HTMLParser):
    """What a browser fetches for a page, and where its links lead."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.fetched += [given[name] for name in ("src", "srcset", "poster", "data") if name in given]
        if tag == "link" and given.get("rel") not in ("canonical", "prev", "next"):
            self.fetched.append(given["href"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.fetched += re.findall(r"url\(['\"]?([^)'\"]+)", given.get("style", ""))


@pytest.mark.slow
def test_the_site_builds_strictly_and_loads_nothing_from_other_hosts(tmp_path: Path) -> None:
    """One test, as a build takes a while: it runs both notebooks, and fails if a cell does."""
    mkdocs = Path(sys.executable).with_name("mkdocs")
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    build = [mkdocs, "build", "--strict", "--site-dir", str(tmp_path)]
    # Not --quiet: it lets no warning through, not even to the count that --strict goes by.
    run = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and "WARNING" not in run.stderr, run.stdout + run.stderr
    for page, words in SHOWN:
        assert words.lower() in (tmp_path / page).read_text().lower(), f"{page} does not say {words!r}"
    for page in tmp_path.rglob("*.html"):
        loads = Loads(page.read_text())
        assert [url for url in loads.fetched if is_elsewhere(url)] == [], page
        lost = [url for url in [*loads.fetched, *loads.links] if not is_there(page, tmp_path, url)]
        assert lost == [], page
        assert "mermaid" not in page.read_text().split('<script id="__config"')[0], page  # theirs is fetched
    for sheet in tmp_path.rglob("*.css"):
        urls = re.findall(r"(?:url\(|@import\s+)['\"]?([^)'\"]+)", sheet.read_text())
        assert [url for url in urls if is_elsewhere(url)] == [], sheet


def is_elsewhere(url: str) -> bool:
    return bool(urlsplit(url).netloc) or urlsplit(url).scheme in ("http", "https")


def is_there(page: Path, site: Path, url: str) -> bool:
    """Whether an address within the site leads to a file."""
    parts = urlsplit(url)
    if parts.scheme or parts.netloc or not parts.path:
        return True
    base = site if parts.path.startswith("/") else page.parent  # 404.html may be shown at any address
    return (base / unquote(parts.path).lstrip("/")).exists()
