"""The pictures: nothing is lost, nothing becomes markup, nothing is fetched, and every chart can be drawn."""

from __future__ import annotations

import itertools
import math
import re
import xml.etree.ElementTree as ET
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from bytelm.errors import DataError, ResourceError
from bytelm.report.charts import Bar, bar_chart, histogram, line_chart, log_ticks, ticks
from bytelm.report.glyphs import character, glyph, pieces
from bytelm.report.markup import rendered
from bytelm.report.page import Files, FileType, HeldOut, ReportData, Sample, render, write
from bytelm.report.patches import PatchView, drawable, fragment, html, plain, summary, terminal
from bytelm.report.sections import lengths_over_training
from report_pages import Page, drawn, full, metrics

HOSTILE = ["</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "]]>--><!--", "&lt;\x00\ud800"]
TEXTS = st.text(max_size=20) | st.sampled_from(HOSTILE)
BYTES = st.binary(max_size=40) | TEXTS.map(lambda text: text.encode("utf-8", "surrogatepass"))
NUMBERS = st.floats(-1e100, 1e100, allow_subnormal=False) | st.sampled_from(
    [0.0, 1.0, -1.0, 2.5, math.nan, math.inf, -math.inf]
)
# The marks that stand for bytes; where the bytes hold them themselves, a picture cannot be read back.
UNREADABLE = re.compile("[⏎⇥◌·‹›]")
Cut = tuple[bytes, list[bool], list[float] | None, float | None]


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    """What a PatchView is made of."""
    data = draw(BYTES)
    opens = draw(st.lists(st.booleans(), min_size=len(data), max_size=len(data)))
    opens[:1] = [True] * bool(data)
    known = st.lists(st.floats(0, 5.6) | st.just(math.nan), min_size=len(data), max_size=len(data))
    return data, opens, draw(st.none() | known), draw(st.none() | st.floats(0, 6))


def read_back(shown: str) -> bytes:
    """The bytes that a line of glyphs stands for."""
    parts = re.split("‹(..)›", shown.replace("◌", "").replace("⏎", "\n").replace("⇥", "\t").replace("·", " "))
    return b"".join(bytes.fromhex(part) if nth % 2 else part.encode() for nth, part in enumerate(parts))


def is_readable(data: bytes) -> bool:
    return not UNREADABLE.search(data.decode("utf-8", "ignore"))


# ---- glyphs


@given(BYTES)
def test_pieces_are_the_bytes(data: bytes) -> None:
    assert b"".join(pieces(data)) == data
    assert all(len(piece) == 1 or character(piece) is not None for piece in pieces(data))
    assert all(cell_len(glyph(piece)) > 0 and glyph(piece).isprintable() for piece in pieces(data))


def test_text_is_cut_into_its_characters() -> None:
    text = "na\u00efve 字節 😀|\n\t"
    assert [piece.decode() for piece in pieces(text.encode())] == list(text)


@pytest.mark.parametrize("hidden", ["\u202e", "\u200b", "\ufeff", "\u00a0", "\x1b", "\ue000", "\u3164"])
def test_what_leaves_no_trace_is_shown_as_bytes(hidden: str) -> None:
    assert "".join(map(glyph, pieces(hidden.encode()))) == "".join(f"‹{byte:02X}›" for byte in hidden.encode())


@pytest.mark.parametrize(
    "broken", [b"\xe5\xad", b"\xad\x97", b"\xc0\x80", b"\xed\xa0\x80", b"\xf5\x80\x80\x80", b"\x80\x80"]
)
def test_broken_utf8_is_shown_as_bytes(broken: bytes) -> None:
    assert [character(piece) for piece in pieces(broken)] == [None] * len(broken)


# ---- patches


@given(cuts())
@example(("字ab".encode(), [True, False, False, False, False], [0.0, 1.0, 2.0, 3.0, 4.0], 2.5))
@settings(max_examples=50)
def test_html_shows_every_byte_once_in_its_patch(cut: Cut) -> None:
    view = PatchView(*cut)
    page = Page(fragment(view))
    titles = [line for title in page.values("title") for line in title.split("\n")]
    assert bytes(int(line[2:4], 16) for line in titles) == view.data
    assert page.classed("patch") == sum(view.opens)
    assert page.values("data-length") == [str(len(patch)) for patch in view.patches]
    known = [f", {bits:.2f} bits" for bits in view.bits(0, len(view.data))]
    assert [line[4:] for line in titles] == (known or [""] * len(view.data))
    bars = [attributes["style"] for tag, attributes in page.found if tag == "i"]
    assert len(bars) == (0 if view.entropies is None else len(view.data))
    assert all(0 <= float(bar[len("height:") : -1]) <= 100 for bar in bars)


@given(cuts())
@settings(max_examples=50)
def test_plain_shows_every_byte_once_in_its_patch(cut: Cut) -> None:
    view = PatchView(*cut)
    shown = plain(view).replace("⏎\n", "⏎")
    assert shown.count("|") == max(0, sum(view.opens) - 1)
    if is_readable(view.data):
        assert [read_back(patch) for patch in shown.split("|") if patch] == view.patches


@given(cuts(), st.integers(4, 30))
@settings(max_examples=50)
def test_terminal_shows_every_byte_once_in_its_patch(cut: Cut, width: int) -> None:
    view = PatchView(*cut)
    text = terminal(view, width)
    lines = text.split("\n") if text.plain else []
    upper = lines if view.entropies is None else lines[::2]
    assert all(line.cell_len <= width for line in lines)
    if view.entropies is not None:
        assert [line.cell_len for line in upper] == [line.cell_len for line in lines[1::2]]
    backgrounds = [str(span.style).split()[-1] for line in upper for span in line.spans]
    changes = sum(a != b for a, b in itertools.pairwise(backgrounds))
    assert changes == max(0, sum(view.opens) - 1)
    if is_readable(view.data) and view.entropies is None:
        assert read_back("".join(line.plain for line in upper)) == view.data


def test_a_character_cut_by_a_boundary_is_shown_as_bytes() -> None:
    data = "a字b|".encode()
    view = PatchView(data, [True, True, False, True, False, False])
    assert plain(view) == "a|‹E5›‹AD›|‹97›b‹7C›"
    assert terminal(view, 80).plain == "a‹E5›‹AD›‹97›b|"
    assert plain(PatchView("a字".encode(), [True, True, False, False])) == "a|字"


def test_terminal_entropy_is_one_block_a_bit_for_each_byte() -> None:
    bits = [0.0, 0.99, 1.0, 4.5, 7.99, 9.0, 2.0]
    view = PatchView("ab字cd".encode(), [True] + [False] * 6, [b * math.log(2) + 1e-12 for b in bits], 2.5)
    assert terminal(view, 80).plain == "ab字 cd\n▁▁▂▅██▃"
    assert [str(span.style) for span in terminal(view, 80).split("\n")[1].spans] == ["dim"] * 3 + ["bold"] * 3 + ["dim"]


def test_terminal_wraps_and_follows_the_lines_of_the_text() -> None:
    view = PatchView(b"abcd\nef", [True] + [False] * 6)
    assert terminal(view, 3).plain == "abc\nd⏎\nef"
    assert terminal(PatchView(b"", []), 3).plain == plain(PatchView(b"", [])) == ""


def test_html_marks_the_bars_above_the_threshold() -> None:
    view = PatchView(b"ab", [True, False], [0.5 * math.log(2), 3 * math.log(2)], 2 * math.log(2))
    page = Page(html(view, "<title>"))
    page.assert_inert()
    bars = [attributes for tag, attributes in page.found if tag == "i"]
    assert bars == [{"style": "height:12.5%"}, {"class": "above", "style": "height:75%"}]
    assert "--threshold:50%" in "".join(page.values("style"))
    assert summary(view) == "1 patch, mean 2.00 bytes, longest 2; threshold 1.39 nats = 2 bits"
    assert "<title>" in page.text
    assert "<b>&lt;</b>" in fragment(PatchView(b"<", [True]))


def test_a_view_that_does_not_fit_is_refused() -> None:
    for opens, entropies in (([True], None), ([True, False], [1.0]), ([False, True], None)):
        with pytest.raises(DataError, match="patch view"):
            PatchView(b"ab", opens, entropies)


def elements(root: ET.Element, tag: str) -> list[ET.Element]:
    return list(root.iter(tag))


@given(st.dictionaries(TEXTS, st.lists(st.tuples(NUMBERS, NUMBERS), max_size=9), max_size=3), st.booleans())
def test_any_points_can_be_drawn(series: dict[str, list[tuple[float, float]]], log_x: bool) -> None:
    root = drawn(line_chart(series, "x", "y", "<title> & \x00", log_x=log_x))
    good = [[p for p in points if all(map(math.isfinite, p)) and (p[0] > 0 or not log_x)] for points in series.values()]
    assert len(elements(root, "circle")) == sum(map(len, good))
    assert len(elements(root, "polyline")) == sum(map(bool, good))


def test_a_line_keeps_its_points_and_names() -> None:
    series = {"training": [(1.0, 3.0), (100.0, 2.0), (10.0, 2.5)], "valid": [(50.0, 2.2)]}
    root = drawn(line_chart(series, "bytes", "bpb", "t", log_x=True))
    xs = [float(circle.attrib["cx"]) for circle in elements(root, "circle")][:3]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    words = [text.text for text in elements(root, "text")]
    assert {"training", "valid", "bytes", "bpb", "1", "10", "100"} <= set(words)


def test_a_chart_of_hardly_different_values_or_long_names_stays_legible() -> None:
    root = drawn(line_chart({letter * 80: [(1.0, 2.0), (2.0, 2.0 + 1e-15)] for letter in "abc"}, "x", "y", "t"))
    heights = [text.text for text in elements(root, "text") if text.get("text-anchor") == "end"]
    assert len(set(heights)) == len(heights) >= 3
    assert sum((text.text or "").endswith("…") for text in elements(root, "text")) == 3


@given(st.floats(-1e4, 1e4), st.floats(0.01, 1e6))
def test_ticks_are_few_round_and_inside(low: float, size: float) -> None:
    found = ticks(low, low + size)
    step = found[1] - found[0]
    assert 2 <= len(found) <= 7
    assert low - 1e-6 * step <= found[0] and found[-1] <= low + size + 1e-6 * step
    assert round(step / 10.0 ** math.floor(math.log10(step * 1.001)), 2) in (1, 2, 5)


def test_log_ticks_fall_back_to_round_values() -> None:
    assert log_ticks(1, 1000) == [1, 10, 100, 1000]
    assert log_ticks(3, 60) == [5, 10, 20, 50]
    assert log_ticks(31, 34) == [31, 32, 33, 34]


@given(st.dictionaries(st.integers(0, 300), st.integers(0, 10**9), max_size=80))
def test_a_histogram_counts_everything(counts: dict[int, int]) -> None:
    root = drawn(histogram(counts, "bytes", "patches", "lengths"))
    hovers = [title.text or "" for rect in elements(root, "rect") for title in rect]
    assert sum(int(hover.split()[1].replace(",", "")) for hover in hovers) == sum(counts.values())
    assert len(hovers) <= 48
    if any(counts.values()):
        mean = sum(k * n for k, n in counts.items()) / sum(counts.values())
        assert f"mean {mean:.2f}" in "".join(root.itertext())


def test_bars_start_at_zero_and_are_to_scale() -> None:
    bars = [Bar("model", 2.0, 1.9, 2.2, ours=True), Bar("gzip", 4.0), Bar("</svg>", math.nan), Bar("none", 0.0)]
    widths = [float(rect.attrib["width"]) for rect in elements(drawn(bar_chart(bars, "bits", "t")), "rect")]
    assert widths[1] == pytest.approx(2 * widths[0]) and widths[2:] == [0, 0]


def test_a_full_report_shows_everything_and_fetches_nothing() -> None:
    source = render(full())
    page = Page(source)
    page.assert_inert()
    assert not re.search(r"https?:|url\(|@import|<script", source)
    assert sum(tag == "svg" for tag, _ in page.found) == 9
    wanted = [
        "2.200",
        "2.100 to 2.300",
        "gzip",
        "2.900",
        "4.00",
        "<none>",
        "A caption: 2 patches",
        "Hello world",
        "<blt>",
    ]
    wanted += ["2 cores", "xz", "2.600", "bytelm train notes", "a pipe", "1 (not a file)", "90 kB", "packing", "900 MB"]
    wanted += [
        "skipped: step 250 (a <spike>)",
        "resumed: from step 400",
        "on the validation split",
        "frozen before the first",
    ]
    assert [words for words in wanted if words not in page.text] == []
    for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL):
        drawn(svg)


def test_an_interrupted_run_still_has_a_report() -> None:
    assert "Nothing has been measured yet." in Page(render(ReportData("run"))).text
    page = Page(render(ReportData("run", metrics())))
    assert "2.500" in page.text and "step 600" in page.text
    lost: dict[str, object] = {"kind": "train", "step": 1, "bytes": 1, "seconds": 1.0, "bits_per_byte": math.nan}
    assert "Nothing has been measured yet." in Page(render(ReportData("run", [lost]))).text


def test_a_step_done_again_counts_once_and_long_runs_are_thinned() -> None:
    line: dict[str, object] = {"kind": "train", "step": 1, "bytes": 10, "seconds": 1.0, "bits_per_byte": 3.0}
    again = render(ReportData("run", [line, {**line, "seconds": 9.0, "bits_per_byte": 2.0}]))
    assert "3 at" not in again and again.count("<circle") == 1
    many = [{**line, "step": s, "bytes": s, "seconds": s / 9, "bits_per_byte": 2.0} for s in range(1, 2001)]
    points = re.findall(r'points="([^"]*)"', render(ReportData("run", many)))
    assert [100 <= len(line.split()) <= 300 for line in points] == [True]


def test_patch_lengths_that_cannot_change_have_no_picture() -> None:
    for scheme, why in (("entropy", "frozen before the first step"), ("space", "The rule is fixed")):
        figure = lengths_over_training(metrics(), scheme)
        assert figure is not None and why in figure.caption
    assert lengths_over_training(metrics(), "fixed") is lengths_over_training(metrics(), "") is None
    assert lengths_over_training([], "entropy") is None


@given(BYTES, TEXTS)
@settings(max_examples=40)
def test_nothing_in_the_data_becomes_markup(data: bytes, text: str) -> None:
    line: dict[str, object] = {"kind": "sample", "step": 3, "prompt": text, "text": text}
    skipped: dict[str, object] = {"kind": "skipped", "step": 3, "bytes": 3, "reason": text}
    phase: dict[str, object] = {"kind": "phase", "name": text, "duration": 3.0}
    lines = [*metrics(), line, skipped, phase]
    report = full(
        title=text, metrics=lines, samples=[Sample(1, data, data)], compressors={text: 2.0},
        config_toml=text, facts={text: text}, held_out=HeldOut(2.2, 9, by_type=[FileType(text, 9, 2.0)]),
        views=[(text, PatchView(data, [True] * len(data)))], subtitle=text, state=text, key_figures=[(text, text)],
        command=text, split=text, files=Files([(text, [1, 2, 3, 4])], [(text, text)], [text]),
    )  # fmt: skip
    source = render(report)
    source.encode()
    Page(source).assert_inert()


@pytest.mark.parametrize("template", ["report.html", "comparison.html", "patches.html", "fragment.html", "media.html"])
def test_every_template_escapes_what_it_is_given(template: str) -> None:
    """`safe` is for what Python made markup of: charts, the stylesheet, the gallery. Nothing else may ask for it."""
    folder = files("bytelm.report") / "templates"
    for name in (template, "base.html", "parts.html"):
        marked = re.findall(r"\{\{([^}]*)\| *safe", (folder / name).read_text(encoding="utf-8"))
        assert {words.strip() for words in marked} <= {"f.chart", "sheet()", "gallery", "sound.wave"}
    assert (
        rendered("patches.html", title="<i>&\"'", view=drawable(PatchView(b"", []))).count("&lt;i&gt;&amp;&#34;&#39;")
        == 2
    )


def test_samples_are_shown_through_training_with_the_prompt_marked() -> None:
    lines: list[dict[str, object]] = [{"kind": "sample", "step": s, "prompt": "P<", "text": f"t{s}"} for s in range(30)]
    source = render(ReportData("run", lines))
    steps = [int(step) for step in re.findall("<span>step ([0-9]+)</span>", source)]
    assert len(steps) == 12 and steps == sorted(set(steps), reverse=True) and steps[0] == 29 and steps[-1] == 0
    assert "11 of 29 earlier samples" in source and source.index("step 29") < source.index("<details>")
    assert "<mark>P&lt;</mark>t29</pre>" in source
    assert render(ReportData("run", samples=[Sample(None, b"", b"a\xe5")])).count('<span class="hex">E5</span>') == 1


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(path, "old")
    write(path, "new ü")
    assert path.read_text(encoding="utf-8") == "new ü"
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResourceError, match="cannot write"):
        write(tmp_path / "folder", "x")
    with pytest.raises(ResourceError, match="name another place"):
        write(tmp_path / "missing" / "report.html", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "report.html"]
