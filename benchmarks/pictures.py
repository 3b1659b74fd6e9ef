"""Charts in columns as one self-contained SVG file."""

from __future__ import annotations

from collections.abc import Sequence

from bytelm.report.charts import WIDTH, alone, height_of, placed

MARGIN = 20


def page(charts: Sequence[tuple[int, int, str]]) -> str:
    """Charts, each with its column and its top in pixels."""
    columns = 1 + max(column for column, _, _ in charts)
    height = max(top + height_of(chart) for _, top, chart in charts) + MARGIN
    parts = [placed(chart, MARGIN + column * (WIDTH + 2 * MARGIN), top) for column, top, chart in charts]
    return alone(parts, columns * (WIDTH + 2 * MARGIN), height)
