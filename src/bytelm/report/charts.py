"""Small SVG charts for pages with `markup.sheet`: lines, a histogram of small integers, horizontal bars."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bytelm.report.markup import escape, sheet
from bytelm.units import show_count

Show = Callable[[float], str]  # formats a value
Series = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 440, 270
LEFT, RIGHT, TOP, BOTTOM = 46, WIDTH - 14, 34, HEIGHT - 40
COLOURS = 10  # --series0 .. --series9
MARKED = 40  # up to so many points of a line are marked
LONGEST = 26  # letters of a bar's name
BINS = 48  # of a histogram; larger values share the last bar


def show_plain(value: float) -> str:
    """A value with up to four significant digits and no trailing zeros."""
    return f"{value:.4g}"


@dataclass(frozen=True)
class Axis:
    """Maps values from `low` to `high` to pixels from `start` to `stop`, linearly or logarithmically."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value."""
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self, about: int = 5) -> list[float]:
        """Round values inside the range."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high, about)


def axis_over(values: Sequence[float], start: float, stop: float, log: bool = False) -> Axis:
    """The axis over the range of values, widened if they are (nearly) equal."""
    low, high = min(values), max(values)
    if log:
        return Axis(low, high, start, stop, log) if high > low * 1.01 else Axis(low / 2, high * 2, start, stop, log)
    if high - low <= 1e-6 * max(abs(low), abs(high)) + 1e-12:
        room = abs(high) / 10 if abs(high) > 1e-9 else 1.0
        low, high = low - room, high + room
    return Axis(low, high, start, stop)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`."""
    step = _nice_step((high - low) / about)
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`; with 2 and 5 times them if few; round values if still few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = max(1, len(powers) // 6)
    for factors in ((1,), (1, 2, 5)):
        found = [f * 10.0**p for p in powers if p % every == 0 for f in factors if low <= f * 10.0**p <= high]
        if len(found) >= 3:
            return found
    return ticks(low, high)


def _nice_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1.0, 2.0, 5.0, 10.0) if f * power >= rough * 0.999)


def line_chart(
    series: Mapping[str, Series],
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool = False,
    show_x: Show = show_plain,
    show_y: Show = show_plain,
    log_y: bool = False,
    apart: Collection[str] = (),
) -> str:
    """Lines of (x, y) points with axes and a legend, as one `<svg>`.

    The points of series in `apart` are not joined. Points that are not finite, or not positive on a logarithmic axis,
    are omitted, as are series without points.
    """
    lines = {name: _drawable(points, log_x, log_y) for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return _svg(title, "No data.", [_text(WIDTH / 2, HEIGHT / 2, "no data yet", anchor="middle")])
    x = axis_over([x for points in lines.values() for x, _ in points], LEFT, RIGHT, log_x)
    y = _rounded(axis_over([y for points in lines.values() for _, y in points], BOTTOM, TOP, log_y))
    legend, above = _legend(list(lines))
    parts = [*_frame(x, y, x_label, y_label, show_x, show_y)]
    for index, (name, points) in enumerate(lines.items()):
        found = [(x.at(px), y.at(py), f"{show_y(py)} at {show_x(px)}") for px, py in points]
        parts += _line(index, name, found, joined=name not in apart)
    described = [f"{y_label} against {x_label}."]
    for name, points in lines.items():
        first, last = (f"{show_y(py)} at {show_x(px)}" for px, py in (points[0], points[-1]))
        described.append(f"{name}: {len(points)} points, from {first} to {last}.")
    moved = [*legend, f'<g transform="translate(0 {above})">', *parts, "</g>"]
    return _svg(title, " ".join(described), moved, HEIGHT + above)


def _line(index: int, name: str, points: Sequence[tuple[float, float, str]], joined: bool) -> Iterator[str]:
    """One line through points (x and y in pixels, text), or the points alone."""
    colour = f"var(--series{index % COLOURS})"
    dashes = ' stroke-dasharray="5 4"' if index >= COLOURS else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    if joined:
        yield f'<polyline class="line" stroke="{colour}"{dashes} points="{path}"/>'
    for x, y, words in points if len(points) <= MARKED or not joined else ():
        hover = escape(f"{name}: {words}")
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{hover}</title></circle>'


@dataclass(frozen=True)
class Fitted:
    """Measured points, the curve fitted to them, and its interval as (x, low, high)."""

    points: Series
    curve: Series
    band: Sequence[tuple[float, float, float]]


def fitted_chart(fits: Mapping[str, Fitted], x_label: str, y_label: str, title: str, show_x: Show = show_plain) -> str:
    """Measured points with fitted curves and their intervals on two logarithmic axes, as one `<svg>`.

    The x axis covers the curves; the y axis covers points and curves, and cuts off intervals that are wider.
    """
    fits = {name: fit for name, fit in fits.items() if fit.points or fit.curve}
    shown = [point for fit in fits.values() for point in (*fit.points, *fit.curve)]
    if not shown:
        return _svg(title, "No data.", [_text(WIDTH / 2, HEIGHT / 2, "no data yet", anchor="middle")])
    x = axis_over([x for x, _ in shown], LEFT, RIGHT, True)
    y = axis_over([y for _, y in shown], BOTTOM, TOP, True)
    y = Axis(y.low / 1.02, y.high * 1.02, BOTTOM, TOP, True)
    legend, above = _legend(list(fits))
    parts = [*_frame(x, y, x_label, y_label, show_x, show_plain)]
    described = [f"{y_label} against {x_label}."]
    for index, (name, fit) in enumerate(fits.items()):
        colour = f"var(--series{index % COLOURS})"
        cut = [(at, *(min(max(end, y.low), y.high) for end in ends)) for at, *ends in fit.band]
        outline = [(at, high) for at, _, high in cut] + [(at, low) for at, low, _ in reversed(cut)]
        for css, form, points in (
            (f'fill="{colour}" fill-opacity="0.12"', "polygon", outline),
            (f'class="line" stroke="{colour}"', "polyline", fit.curve),
        ):
            path = " ".join(f"{x.at(px):.1f},{y.at(py):.1f}" for px, py in points)
            parts += [f'<{form} {css} points="{path}"/>'] if points else []
        for px, py in fit.points:
            hover = escape(f"{name}: {show_plain(py)} at {show_x(px)}")
            circle = f'<circle cx="{x.at(px):.1f}" cy="{y.at(py):.1f}" r="3" fill="{colour}">'
            parts.append(f"{circle}<title>{hover}</title></circle>")
        described.append(f"{name}: {len(fit.points)} points{'' if fit.curve else ', no curve'}.")
    moved = [*legend, f'<g transform="translate(0 {above})">', *parts, "</g>"]
    return _svg(title, " ".join(described), moved, HEIGHT + above)


def histogram(counts: Mapping[int, int], x_label: str, y_label: str, title: str) -> str:
    """Counts of small integers, with the mean as a dashed line, as one `<svg>`; values from BINS on share a bar."""
    counts = {value: count for value, count in counts.items() if count > 0}
    if not counts:
        return _svg(title, "No data.", [_text(WIDTH / 2, HEIGHT / 2, "no data yet", anchor="middle")])
    total = sum(counts.values())
    mean = sum(value * count for value, count in counts.items()) / total
    last = min(max(counts), min(counts) + BINS - 1)
    bars: dict[int, int] = {}
    for value, count in counts.items():
        bars[min(value, last)] = bars.get(min(value, last), 0) + count
    gathered = max(counts) > last

    def show(value: float) -> str:
        return f"{value:.0f}+" if gathered and value == last else f"{value:.0f}"

    x = Axis(min(bars) - 0.6, last + 0.6, LEFT, RIGHT)
    y = _rounded(Axis(0.0, float(max(bars.values())), BOTTOM, TOP))
    parts = list(_frame(x, y, x_label, y_label, show, show_count, whole=True))
    breadth = max(1.0, 0.8 * (x.at(1) - x.at(0)))
    for value, count in sorted(bars.items()):
        top = y.at(count)
        hover = escape(f"{show(value)}: {count:,} ({count / total:.1%})")
        box = f'x="{x.at(value) - breadth / 2:.1f}" y="{top:.1f}" width="{breadth:.1f}" height="{BOTTOM - top:.1f}"'
        parts.append(f'<rect {box} rx="1" fill="var(--series0)"><title>{hover}</title></rect>')
    middle = x.at(min(mean, last))
    anchor = "start" if middle < (LEFT + RIGHT) / 2 else "end"
    parts.append(f'<line class="mean" x1="{middle:.1f}" x2="{middle:.1f}" y1="{TOP - 8}" y2="{BOTTOM}"/>')
    parts.append(_text(middle + (6 if anchor == "start" else -6), TOP - 2, f"mean {mean:.2f}", anchor, "strong"))
    return _svg(title, f"{total:,} counted, from {min(counts)} to {max(counts)}, mean {mean:.2f}.", parts)


def height_of(chart: str) -> int:
    """The height of a chart in pixels, from its viewBox."""
    return int(chart.split('viewBox="', 1)[1].split('"', 1)[0].split()[3])


def page(rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Charts in rows, with captions, as one self-contained SVG."""
    margin, line = 24, 17
    parts: list[str] = []
    top = margin
    for row in rows:
        captions = [textwrap.wrap(caption, 72) for _, caption in row]
        tallest = max(height_of(chart) for chart, _ in row)
        for column, (chart, _) in enumerate(row):
            x = margin + column * (WIDTH + 2 * margin)
            parts.append(placed(chart, x, top))
            under = top + tallest + 24
            parts += [_text(x, under + i * line, words) for i, words in enumerate(captions[column])]
        top += tallest + 24 + line * max(map(len, captions)) + margin
    return alone(parts, max(map(len, rows)) * (WIDTH + 2 * margin), top)


def placed(chart: str, x: int, y: int) -> str:
    """A chart nested in another at its natural size."""
    return chart.replace("<svg ", f'<svg x="{x}" y="{y}" width="{WIDTH}" height="{height_of(chart)}" ', 1)


def alone(parts: Sequence[str], breadth: int, height: int) -> str:
    """Placed charts and text as one SVG file with its stylesheet."""
    size = f'width="{breadth}" height="{height}" viewBox="0 0 {breadth} {height}"'
    css = sheet().replace("width: 100%; height: auto;", "")  # charts have their natural size here
    style = f"<style>{css}\nsvg {{ font-family: system-ui, sans-serif; }}</style>"
    paper = '<rect width="100%" height="100%" fill="var(--paper)"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n{style}\n{paper}\n' + "\n".join(parts) + "\n</svg>\n"


@dataclass(frozen=True)
class Bar:
    """One bar of a bar chart, with the ends of its interval if it has one; `ours` is highlighted."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    ours: bool = False


def show_thousandths(value: float) -> str:
    """A value with three decimals."""
    return f"{value:.3f}"


def bar_chart(bars: Sequence[Bar], unit: str, title: str, show: Show = show_thousandths) -> str:
    """Horizontal bars from zero, each with its name and value, as one `<svg>`."""
    names = [shortened(bar.name, LONGEST) for bar in bars]
    longest = max(map(len, names), default=0)
    widest = max((len(show(bar.value)) for bar in bars), default=0)
    row, left, right = 34, min(200, max(96, round(7 * longest) + 12)), WIDTH - max(52, 8 * widest + 10)
    ends = [end for bar in bars for end in (bar.value, bar.high or 0.0) if math.isfinite(end)]
    x = Axis(0.0, max([*ends, 0.0]) or 1.0, left, right)
    parts: list[str] = []
    for index, bar in enumerate(bars):
        top, ours = index * row + 4, " ours" if bar.ours else ""
        colour = "var(--series0)" if bar.ours else "var(--bar)"
        end = x.at(bar.value) if math.isfinite(bar.value) else left
        size = f'width="{end - left:.1f}" height="{row - 10}"'
        parts.append(_text(left - 10, top + row / 2 - 1, names[index], "end", "strong" + ours))
        parts.append(f'<rect x="{left}" y="{top}" {size} rx="2" fill="{colour}"/>')
        if bar.low is not None and bar.high is not None and math.isfinite(bar.high - bar.low):
            low, high, middle = x.at(bar.low), x.at(bar.high), top + row / 2 - 5
            d = f"M{low:.1f} {middle - 5}v10m0 -5H{high:.1f}m0 -5v10"
            parts.append(f'<path d="{d}" fill="none" stroke="var(--ink)" stroke-width="1.25"/>')
            end = max(end, high)
        parts.append(_text(end + 8, top + row / 2 - 1, show(bar.value), "start", "strong" + ours))
    words = ", ".join(f"{bar.name} {show(bar.value)}" for bar in bars)
    return _svg(title, f"{unit}: {words}.", parts, height=len(bars) * row + 4)


def _drawable(points: Series, log_x: bool, log_y: bool) -> list[tuple[float, float]]:
    finite = ((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
    return sorted((x, y) for x, y in finite if (x > 0 or not log_x) and (y > 0 or not log_y))


def _rounded(axis: Axis) -> Axis:
    """The axis widened to round values, or to powers of ten if logarithmic."""
    if axis.log:
        low, high = math.floor(math.log10(axis.low) + 1e-9), math.ceil(math.log10(axis.high) - 1e-9)
        return Axis(10.0**low, 10.0**high, axis.start, axis.stop, axis.log)
    step = _nice_step((axis.high - axis.low) / 5)
    low, high = math.floor(axis.low / step + 1e-9) * step, math.ceil(axis.high / step - 1e-9) * step
    return Axis(low, high, axis.start, axis.stop)


def _frame(
    x: Axis, y: Axis, x_label: str, y_label: str, show_x: Show, show_y: Show, whole: bool = False
) -> Iterator[str]:
    """Grid, ticks and labels; `whole`: more ticks on the x axis, at integers only."""
    for value in y.ticks():
        at = y.at(value)
        yield f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield _text(LEFT - 8, at + 4, show_y(value), "end")
    yield f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>'
    for value in x.ticks(9 if whole else 5):
        if not whole or value == round(value):
            yield f'<line class="axis" x1="{x.at(value):.1f}" x2="{x.at(value):.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>'
            yield _text(x.at(value), BOTTOM + 18, show_x(value), "middle")
    yield _text((LEFT + RIGHT) / 2, HEIGHT - 4, x_label, "middle")
    yield _text(4, 12, y_label, "start")


def _legend(names: Sequence[str]) -> tuple[list[str], int]:
    """Names with the colours of their lines, right-aligned, in one or more rows; and the height of the further rows."""
    letter, swatch, row = 6.6, 32, 18
    longest = int((RIGHT - LEFT - 60 - swatch) / letter)
    names = [shortened(name, longest) for name in names]
    widths = [letter * len(name) + swatch for name in names]
    lines: list[list[int]] = [[]]
    for index, width in enumerate(widths):
        if sum(widths[i] for i in lines[-1]) + width > RIGHT - LEFT - 60 + swatch:
            lines.append([])
        lines[-1].append(index)
    parts: list[str] = []
    for number, line in enumerate(lines):
        y, at = 12 + row * number, RIGHT - sum(widths[i] for i in line) + swatch
        for index in line:
            colour = f"var(--series{index % COLOURS})"
            breadth = 12 if index < COLOURS else 6  # short for dashed lines
            parts.append(f'<rect x="{at - 18:.1f}" y="{y - 5}" width="{breadth}" height="3" rx="1" fill="{colour}"/>')
            parts.append(_text(at, y, names[index], "start", "strong"))
            at += widths[index]
    return parts, row * (len(lines) - 1)


def shortened(name: str, most: int) -> str:
    """A name shortened to at most so many characters, with an ellipsis."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(words)}</text>'


def _svg(title: str, description: str, parts: Sequence[str], height: int = HEIGHT) -> str:
    head = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{head}\n' + "\n".join(parts) + "\n</svg>"
