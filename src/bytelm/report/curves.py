"""Charts of a training over its processed bytes: stacked panels of lines, a strip of histograms.

The x-axis shows bytes, steps and time. Hovering shows the values below, by the stylesheet, without a script.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bytelm.report.charts import LEFT, WIDTH, Axis, Show, _rounded, _svg, _text, axis_over, show_plain
from bytelm.report.markup import escape
from bytelm.report.recorded import Clock, Mark, Series
from bytelm.units import show_bytes, show_seconds

FAR = WIDTH - 74  # right end of lines, before their names
TITLE, GAP, BELOW = 28, 16, 76  # pixels above a panel, between two, and below the last one
APART = 28  # pixels between two names
EARLY = 0.05  # share of the training whose losses are clipped, as they would take most of the height
SHADES = 10  # of a strip
LETTER = 6.2  # pixels


@dataclass(frozen=True)
class Line:
    """One line of (processed bytes, value). `colour`: number of its series; `dots`: mark each point."""

    name: str
    points: Series
    colour: int = 0
    show: Show = show_plain
    dots: bool = False


@dataclass(frozen=True)
class Panel:
    """Lines over one axis. `zero`: it starts at 0. `cut`: values above the maximum after the first 5 % are clipped."""

    label: str
    lines: Sequence[Line]
    height: int
    zero: bool = False
    log: bool = False
    cut: bool = False


def panels(shown: Sequence[Panel], title: str, clock: Clock, marks: Sequence[Mark] = ()) -> str:
    """Panels that share an axis of processed bytes, as one `<svg>`; empty ones are omitted."""
    shown = [panel for panel in shown if any(line.points for line in panel.lines)]
    if not shown:
        return _svg(title, "No data.", [_text(WIDTH / 2, 20, "no data yet", anchor="middle")], 40)
    x = _over(max(at for panel in shown for line in panel.lines for at, _ in line.points))
    bottom = sum(TITLE + panel.height for panel in shown) + GAP * (len(shown) - 1)
    parts = list(_marked(marks, x, bottom))
    top, words = 0, ["X-axis: processed bytes."]
    for panel in shown:
        parts += _panel(panel, x, top + TITLE)
        words += [_described(panel, line) for line in panel.lines if line.points]
        top += TITLE + panel.height + GAP
    parts += [*_below(x, clock, bottom), *_read_out(shown, x, clock, bottom)]
    return _svg(title, " ".join(words), parts, bottom + BELOW)


def _over(most: float) -> Axis:
    return Axis(0.0, most or 1.0, LEFT, FAR)


def _described(panel: Panel, line: Line) -> str:
    (first, began), (last, ended) = line.points[0], line.points[-1]
    return f"{line.name}: {line.show(began)} at {show_bytes(first)}, {line.show(ended)} at {show_bytes(last)}."


def _panel(panel: Panel, x: Axis, top: int) -> Iterator[str]:
    bottom = top + panel.height
    lines = [line for line in panel.lines if line.points]
    later = [v for line in lines for at, v in line.points if at >= EARLY * x.high or line.dots]
    values = [v for line in lines for _, v in line.points if v > 0 or not panel.log]
    if not values:
        return
    if panel.cut and later:
        values = [v for v in values if v <= max(later)]
    y = _rounded(axis_over([0.0, *values] if panel.zero else values, bottom, top, panel.log))
    yield _text(4, top - 14, panel.label)
    for tick in y.ticks(max(3, panel.height // 40)):
        yield f'<line class="grid" x1="{LEFT}" x2="{FAR}" y1="{y.at(tick):.1f}" y2="{y.at(tick):.1f}"/>'
        yield _text(LEFT - 8, y.at(tick) + 4, lines[0].show(tick), "end")
    yield f'<line class="axis" x1="{LEFT}" x2="{FAR}" y1="{bottom}" y2="{bottom}"/>'
    ends: list[tuple[float, Line]] = []
    for line in lines:
        drawn = [(x.at(at), y.at(v)) for at, v in _within(line.points, y.low, y.high)]
        if not drawn:
            continue
        colour = f"var(--series{line.colour})"
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in drawn)
        yield f'<polyline class="line" stroke="{colour}" points="{path}"/>'
        for px, py in drawn if line.dots or len(drawn) == 1 else ():
            yield f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{colour}"/>'
        ends.append((drawn[-1][1], line))
    yield from _named(ends, top, bottom, alone=len(panel.lines) == 1)


def _within(points: Series, low: float, high: float) -> list[tuple[float, float]]:
    """The points from the first within range; before it, where the line enters from above."""
    first = next((i for i, (_, v) in enumerate(points) if v <= high), len(points))
    kept = [(at, max(low, min(high, v))) for at, v in points[first:]]
    if first and kept:
        (a, above), (b, below) = points[first - 1], points[first]
        kept.insert(0, (a + (b - a) * (above - high) / (above - below), high))
    return kept


def _named(ends: list[tuple[float, Line]], top: int, bottom: int, alone: bool) -> Iterator[str]:
    """Name and last value at the end of each line, moved apart where they overlap; only the value of a single line."""
    ends = sorted(ends, key=lambda end: end[0])
    places = [end[0] for end in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + APART)
    over = max(0.0, places[-1] - (bottom - 8)) if places else 0.0
    for place, (_, line) in zip(places, ends, strict=True):
        at = max(place - over, top + 4.0)
        style = f'style="fill:var(--series{line.colour})"'
        name = "" if alone else f'<tspan x="{FAR + 8}" dy="-2">{escape(line.name)}</tspan>'
        value = escape(line.show(line.points[-1][1]))
        yield f'<text x="{FAR + 8}" y="{at:.1f}" {style}>{name}'
        yield f'<tspan x="{FAR + 8}" dy="{4 if alone else 13}" class="ours">{value}</tspan></text>'


def _marked(marks: Sequence[Mark], x: Axis, bottom: int) -> Iterator[str]:
    """A dashed line where a training was resumed, a triangle where a step was skipped."""
    for mark in marks:
        at, hover = x.at(min(max(mark.bytes, x.low), x.high)), f"<title>{escape(f'{mark.kind}: {mark.words}')}</title>"
        if mark.kind == "resumed":
            yield f'<line class="resumed" x1="{at:.1f}" x2="{at:.1f}" y1="{TITLE}" y2="{bottom}">{hover}</line>'
            yield f'<circle class="resumed" cx="{at:.1f}" cy="{TITLE - 4}" r="3">{hover}</circle>'
        else:
            yield f'<path class="skipped" d="M{at - 4:.1f} {TITLE - 8}h8l-4 7z">{hover}</path>'


def _below(x: Axis, clock: Clock, bottom: int) -> Iterator[str]:
    """Labels of the x-axis: bytes, step, time."""
    for name, down in (("bytes", 18), ("step", 33), ("time", 48)):
        yield _text(4, bottom + down, name)
    for tick in x.ticks(5):
        if x.at(tick) < LEFT + 20:
            continue  # the origin needs no label
        step, seconds = clock.at(tick)
        at = x.at(tick)
        yield f'<line class="axis" x1="{at:.1f}" x2="{at:.1f}" y1="{bottom}" y2="{bottom + 4}"/>'
        for words, down in ((show_bytes(tick), 18), (f"{step:,}", 33), (show_seconds(seconds), 48)):
            yield _text(at, bottom + down, words, "middle", "strong" if down == 18 else "")


def _read_out(shown: Sequence[Panel], x: Axis, clock: Clock, bottom: int) -> Iterator[str]:
    """A band for each point of the first line; hovering over it shows the values of all lines there."""
    lines = [line for panel in shown for line in panel.lines if line.points]
    places = [at for at, _ in lines[0].points]

    def read(at: float) -> str:
        found: list[str] = []
        for line in lines:
            number = bisect.bisect_right(line.points, (at * (1 + 1e-9), math.inf))
            if number:
                found.append(f"{line.name} {line.show(line.points[number - 1][1])}")
        return " · ".join(found)

    yield from _bands([(at, read(at)) for at in places], x, clock, bottom)


def _bands(places: Sequence[tuple[float, str]], x: Axis, clock: Clock, bottom: int) -> Iterator[str]:
    pixels = [x.at(at) for at, _ in places]
    edges = [float(LEFT), *((a + b) / 2 for a, b in itertools.pairwise(pixels)), float(FAR)]
    for (at, words), pixel, (left, right) in zip(places, pixels, itertools.pairwise(edges), strict=True):
        step, seconds = clock.at(at)
        words = f"{show_bytes(at)} · step {step:,} · {show_seconds(seconds)} · {words}"
        box = f'x="{left:.1f}" y="{TITLE}" width="{max(0.0, right - left):.1f}" height="{bottom - TITLE}"'
        line = f'<line x1="{pixel:.1f}" x2="{pixel:.1f}" y1="{TITLE}" y2="{bottom}"/>'
        yield f'<g class="at"><rect {box}/>{line}{_text(4, bottom + BELOW - 8, words, kind="strong")}</g>'


def strip(columns: Sequence[tuple[float, float, Counter[int]]], of: str, longest: int, clock: Clock, title: str) -> str:
    """Histograms as columns, each (first byte, last byte, counts): darker cells are more frequent.

    `of` is what was counted; lengths from `longest` on are counted together. The line is the mean.
    """
    x, height = _over(max(end for _, end, _ in columns)), 182
    total = sum((counts for _, _, counts in columns), Counter[int]())
    top = _enough(total)
    y = Axis(0.5, top + 0.5, TITLE + height, TITLE)
    most = max(count / counts.total() for _, _, counts in columns for count in counts.values())
    shades: dict[int, list[str]] = {}
    tall = (y.start - y.stop) / top
    for begin, end, counts in columns:
        wide = x.at(end) - x.at(begin)
        for length, count in counts.items():
            shade = math.ceil(SHADES * count / counts.total() / most - 0.25)
            if length <= top and shade > 0:
                cell = f"M{x.at(begin):.1f} {y.at(length + 0.5):.1f}h{wide:.1f}v{tall:.1f}h{-wide:.1f}z"
                shades.setdefault(shade, []).append(cell)
    parts = [_text(4, 12, f"{of} length (bytes)")]
    for shade, cells in sorted(shades.items()):
        parts.append(f'<path fill="var(--series0)" fill-opacity="{shade / SHADES:.2g}" d="{"".join(cells)}"/>')
    for tick in y.ticks(7):
        if tick == round(tick) and 1 <= tick <= top:
            words = f"{tick:.0f}+" if tick == longest else f"{tick:.0f}"
            parts.append(_text(LEFT - 8, y.at(tick) + 4, words, "end"))
    means = [(begin, end, sum(k * n for k, n in counts.items()) / counts.total()) for begin, end, counts in columns]
    mean = Line("mean", [(end, value) for _, end, value in means], 1, lambda value: f"{value:.2f}")
    path = "".join(f"{'L' if i else 'M'}{x.at(b):.1f} {y.at(m):.1f}H{x.at(e):.1f}" for i, (b, e, m) in enumerate(means))
    parts.append(f'<path class="step" d="{path}"/>')
    parts += _named([(y.at(means[-1][2]), mean)], TITLE, TITLE + height, alone=False)
    bottom = TITLE + height
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{FAR}" y1="{bottom}" y2="{bottom}"/>')
    read = [
        (end, f"mean {value:.2f}, half up to {_quantile(counts, 0.5)}, 9 in 10 up to {_quantile(counts, 0.9)}")
        for (_, end, counts), (_, _, value) in zip(columns, means, strict=True)
    ]
    parts += [*_below(x, clock, bottom), *_bands(read, x, clock, bottom)]
    described_means = f"from {means[0][2]:.2f} to {means[-1][2]:.2f}"
    return _svg(title, f"{total.total():,} counted, mean {described_means} bytes.", parts, bottom + BELOW)


def _enough(counts: Counter[int]) -> int:
    """The length that 98 % do not exceed: the top of the axis."""
    return max(4, _quantile(counts, 0.98))


def _quantile(counts: Counter[int], share: float) -> int:
    """The smallest length that so large a share does not exceed."""
    left = share * counts.total()
    for length, count in sorted(counts.items()):
        left -= count
        if left <= 0:
            return length
    return max(counts)
