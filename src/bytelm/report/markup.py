"""HTML from the templates of this package, every value escaped; and text for SVG."""

from __future__ import annotations

import functools
import html
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from bytelm.report.glyphs import character, pieces

# Not valid in XML or UTF-8: control characters, lone surrogates, the two non-characters.
_UNHOLDABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


class Table(NamedTuple):
    """Text cells, numbers right-aligned; row `ours` is highlighted."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    ours: int | None = None


class Figure(NamedTuple):
    """An SVG chart or a table, with a caption of text."""

    chart: str = ""
    caption: str = ""
    table: Table | None = None


def escape(text: str) -> str:
    """Escape text for HTML and XML, attributes included; invalid characters become U+FFFD."""
    return html.escape(_holdable(text))


def rendered(template: str, **values: Any) -> str:
    """Render a template of this package, every value escaped."""
    return _environment().get_template(template).render(values)


@functools.cache
def sheet() -> str:
    """The stylesheet of all pages and charts."""
    return files("bytelm.report").joinpath("templates", "style.css").read_text(encoding="utf-8")


@functools.cache
def _environment() -> Environment:
    """`finalize` sees every value before it is escaped; markup passes unchanged."""
    environment = Environment(
        loader=PackageLoader("bytelm.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    functions: dict[str, Any] = {"sheet": sheet, "pieces": pieces, "character": character}
    environment.globals.update(functions)
    return environment


def _shown(value: Any) -> Any:
    return _holdable(value) if type(value) is str else value


def _holdable(text: str) -> str:
    return _UNHOLDABLE.sub("\N{REPLACEMENT CHARACTER}", text)
