"""Charts side by side as one SVG file that stands by itself."""

from __future__ import annotations

from collections.abc import Sequence

from bytelm.report.charts import WIDTH
from bytelm.report.style import SHEET

MARGIN = 20


def page(charts: Sequence[tuple[int, int, str]]) -> str:
    """Charts, each with the column and the pixel from the top at which it begins."""
    columns = 1 + max(column for column, _, _ in charts)
    breadth = columns * (WIDTH + 2 * MARGIN)
    height = max(top + height_of(chart) for _, top, chart in charts) + MARGIN
    size = f'width="{breadth}" height="{height}" viewBox="0 0 {breadth} {height}"'
    sheet = SHEET.replace("width: 100%; height: auto;", "")  # charts are as large here as they are drawn
    style = f"<style>{sheet}\nsvg {{ font-family: system-ui, sans-serif; }}</style>"
    paper = f'<rect width="100%" height="{height}" fill="var(--paper)"/>'
    body = "\n".join(placed(chart, MARGIN + column * (WIDTH + 2 * MARGIN), top) for column, top, chart in charts)
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{style}\n{paper}\n{body}\n</svg>\n'


def height_of(chart: str) -> int:
    """What its viewBox says."""
    return int(float(chart.split('viewBox="', 1)[1].split('"', 1)[0].split()[3]))


def placed(chart: str, x: int, y: int) -> str:
    return chart.replace("<svg ", f'<svg x="{x}" y="{y}" width="{WIDTH}" height="{height_of(chart)}" ', 1)
