"""A report with everything in it, and strict readers of its page and its charts."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

from bytelm.report.page import Files, FileType, HeldOut, ReportData, Sample
from bytelm.report.patches import PatchView

VOID = {"meta", "br", "wbr", "img"}
TAGS = re.findall(
    "[a-z0-9]+",
    "html head title style meta body header section h1 h2 p small figure figcaption div span b i br wbr mark pre "
    "details summary table tr th td dl dt dd svg g desc text tspan line rect circle polyline polygon path img audio",
)


class Page(HTMLParser):
    """Reads a page strictly: tags must balance, and be ours; keeps attributes and text for the tests."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, f"foreign tag {tag}"
        self.found.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, f"foreign tag {tag}"
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.found if attribute in attributes]

    def classed(self, name: str) -> int:
        return sum(name in value.split() for value in self.values("class"))

    def assert_inert(self) -> None:
        """No script, and nothing that a browser would fetch or follow."""
        names = {name for _, attributes in self.found for name in attributes}
        assert not {name for name in names if name.startswith("on")}
        assert not names & {"srcset", "href", "action", "data"}
        assert all(re.fullmatch("data:(image/png|audio/wav);base64,[A-Za-z0-9+/=]+", v) for v in self.values("src"))
        policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
        assert self.values("content")[0] == policy


# ---- charts


def drawn(svg: str) -> ET.Element:
    """The chart as XML, every coordinate finite and inside the picture."""
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and root[0].tag == "title" and root[1].tag == "desc"
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    for element in root.iter():
        for name in {"x", "x1", "x2", "cx", "width"} & element.attrib.keys():
            assert 0 <= float(element.attrib[name]) <= width
        for name in {"y", "y1", "y2", "cy", "height"} & element.attrib.keys():
            assert 0 <= float(element.attrib[name]) <= height
        for pair in element.attrib.get("points", "").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= width and 0 <= y <= height
    return root


# ---- the page


def metrics() -> list[dict[str, object]]:
    def line(kind: str, step: int, bits: float) -> dict[str, object]:
        return {"kind": kind, "step": step, "bytes": step * 1000, "seconds": step / 2, "bits_per_byte": bits}

    train = [
        {**line("train", step, 8 / (1 + step / 100)), "learning_rate": 1e-3, "grad_norm": 90 / step}
        | {"bytes_per_second": 2e3, "patch_lengths": [step, 0, 3 * step]}
        for step in range(100, 900, 100)
    ]
    validation = [line("validation", step, 2.5) for step in (300, 600)]
    beside: list[dict[str, object]] = [
        {"kind": "phase", "step": 0, "name": "packing", "duration": 3.0},
        {"kind": "phase", "step": 300, "name": "validation", "duration": 7.0},
        {"kind": "phase", "step": 600, "name": "validation", "duration": 8.0},
        {"kind": "memory", "step": 600, "bytes": 600_000, "peak": 900e6, "baseline": 300e6, "predicted": 500e6},
        {"kind": "skipped", "step": 250, "bytes": 250_000, "seconds": 125.0, "reason": "a <spike>"},
        {"kind": "resumed", "step": 400, "bytes": 400_000, "seconds": 200.0},
    ]
    return [*train, *validation, *beside, {"kind": "strange", "bits_per_byte": "x"}, {}]


def full(**changes: object) -> ReportData:
    held = HeldOut(2.2, 61_000, 2.1, 2.3, [FileType(".md", 40_000, 2.0, 4.0), FileType("<none>", 21_000, 2.5)])
    view = PatchView(b"ab", [True, True], [1.0, 2.0], 1.5)
    fields: dict[str, object] = dict(
        title="run", metrics=metrics(), patch_lengths={1: 3, 4: 9}, views=[("A caption", view)],
        samples=[Sample(None, b"Hello", b" world\xff")], compressors={"gzip": 2.9, "xz": 2.6}, held_out=held,
        config_toml='name = "<blt>"', facts={"machine": "2 cores"}, subtitle="blt", state="finished",
        segmentation="entropy",
        key_figures=[("8.9M", "parameters")], command="bytelm train notes", split="valid",
        files=Files([(".md", [3, 90_000, 0, 40_000])], [("a pipe", "not a file")], ["4 files read"]),
    )  # fmt: skip
    return ReportData(**{**fields, **changes})  # pyright: ignore[reportArgumentType]
