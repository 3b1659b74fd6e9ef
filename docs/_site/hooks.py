"""What mkdocs calls as it builds the site: pages that are made, folders in the navigation, links to the sources.

A link from a page to a file outside docs/ works where the code is read; in the site it leads to a page with that file's
text, under source/, so that the site needs no host for it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import notebooks
import reference
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

DOCS = Path(__file__).resolve().parents[1]
ROOT, NOTEBOOKS = DOCS.parent, DOCS / "notebooks"
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)\s]*)?\))")
QUOTED = "---\nhide: [toc]\nsearch:\n  exclude: true\n---\n\n# {name}\n\n``````{language}\n{text}\n``````\n"
LANGUAGES = {".py": "python", ".toml": "toml", ".cpp": "cpp", ".h": "cpp", ".md": "markdown"}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of a folder where the navigation names it."""
    config.nav = opened(config.nav or [])
    return config


def opened(entries: list[Any]) -> list[Any]:
    """Navigation without folders."""
    found: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict):
            found += [{title: opened(below) if isinstance(below, list) else below} for title, below in entry.items()]
        elif entry.endswith("/"):
            found += sorted(f"{entry}{page.name}" for page in (DOCS / entry).glob("*.md"))
        else:
            found.append(entry)
    return found


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made: the notebooks as they ran, and the sources that pages lead to."""
    for uri, text in notebooks.pages(NOTEBOOKS):
        files.append(File.generated(config, uri, content=text))
    for path in sorted({path for page in files.documentation_pages() for path in sources(page)}):
        name, language = path.relative_to(ROOT).as_posix(), LANGUAGES.get(path.suffix, "text")
        text = QUOTED.format(name=name, language=language, text=path.read_text(encoding="utf-8").rstrip())
        files.append(File.generated(config, shown_at(path), content=text, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to sources to the pages that show them, and add what the program says itself."""
    folder = PurePosixPath(page.file.src_uri).parent

    def led(match: re.Match[str]) -> str:
        path = leads_to(page.file, match[2])
        return match[0] if path is None else match[1] + os.path.relpath(shown_at(path), folder) + match[3]

    return LINK.sub(led, markdown) + reference.made(page.file.src_uri)


def sources(page: File) -> Iterator[Path]:
    """The files outside docs/ that a page leads to."""
    for match in LINK.finditer(page.content_string):
        if (path := leads_to(page, match[2])) is not None and not path.is_relative_to(DOCS):
            yield path


def leads_to(page: File, target: str) -> Path | None:
    """The file of the repository that a link leads to, if it is no page of docs/ itself."""
    path = (DOCS / page.src_uri).parent.joinpath(target).resolve()
    is_source = path.parent == NOTEBOOKS or not path.is_relative_to(DOCS)
    return path if is_source and path.is_file() and path.is_relative_to(ROOT) else None


def shown_at(path: Path) -> str:
    """Where the site shows a source."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).with_suffix(".md").as_posix()
    return f"source/{path.relative_to(ROOT).as_posix()}.md"
