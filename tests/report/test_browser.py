"""The report in a browser, of any width, dark, light, printed: nothing runs over, overlaps, fades or calls out."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bytelm.report.page import Files, FileType, HeldOut, ReportData, Sample, render
from bytelm.report.patches import PatchView
from report_pages import full

WIDTHS = (390, 800, 1400)
PAPER = 720  # pixels of a printed page's width
BROWSER = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no chromium or google-chrome here")

# Looks at each page in a frame of its own; what it finds goes into the page around them. The pages run no script.
LOOK = """
const luminance = c => c.map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const channels = colour => colour.match(/[\\d.]+/g).map(Number);
const clear = colour => colour === "transparent" || channels(colour)[3] === 0;
const words = node => [...node.childNodes].filter(n => n.nodeType === 3).map(n => n.data.trim()).join("");
function background(node, view) {
  for (; node; node = node.parentElement) {
    const colour = view.getComputedStyle(node).backgroundColor;
    if (!clear(colour)) return colour;
  }
  return "rgb(255, 255, 255)";
}
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, found = [];
  const width = page.documentElement.clientWidth;
  const say = (what, node, more) => found.push(`${what}: <${node.tagName} ${node.getAttribute("class") || ""}> ` +
    `${node.textContent.trim().slice(0, 40)} ${more || ""}`);
  if (page.documentElement.scrollWidth > width) found.push(`the page is ${page.documentElement.scrollWidth} wide`);
  for (const node of page.body.querySelectorAll("*")) {
    const style = view.getComputedStyle(node), box = node.getBoundingClientRect();
    if (style.visibility === "hidden" || !node.checkVisibility() || !box.width || node.closest(".matrix")) continue;
    if (box.right > width + .5 || box.left < -.5) say("runs over", node, `${box.left} to ${box.right}`);
    if (!words(node) || node.tagName === "TITLE" || node.tagName === "DESC") continue;
    const svg = node.closest("svg"), ink = svg ? style.fill : style.color;
    const pair = [ink, background(svg || node, view)].map(c => luminance(channels(c).slice(0, 3)));
    pair.sort((a, b) => b - a);
    const contrast = (pair[0] + .05) / (pair[1] + .05);
    if (contrast < 4.5) say("faint", node, contrast.toFixed(2));
  }
  for (const svg of page.querySelectorAll("svg")) {
    const own = svg.getBoundingClientRect();
    if (svg.checkVisibility() && !(own.width > 0 && own.height > 0)) say("empty", svg);
    const texts = [...svg.querySelectorAll("text")].filter(t => view.getComputedStyle(t).visibility !== "hidden")
      .map(t => [t, t.getBoundingClientRect()]).filter(([t, b]) => b.width > 0);
    for (const [t, b] of texts) {
      if (b.top < own.top - 2 || b.bottom > own.bottom + 2) say("outside its chart", t);
      for (const [u, c] of texts) {
        if (t === u) break;
        const across = Math.min(b.right, c.right) - Math.max(b.left, c.left);
        const down = Math.min(b.bottom, c.bottom) - Math.max(b.top, c.top);
        if (across > 1 && down > .3 * Math.min(b.height, c.height)) say("overlaps", t, u.textContent);
      }
    }
  }
  const fetched = view.performance.getEntriesByType("resource").map(entry => entry.name);
  const shown = [...page.querySelectorAll("svg, .sample, .code")].filter(n => n.checkVisibility(
    {contentVisibilityAuto: true}) && n.getBoundingClientRect().height > 0).length;
  return {found, fetched, shown, paper: view.getComputedStyle(page.body).backgroundColor};
}
addEventListener("load", () => {
  const told = [...document.querySelectorAll("iframe")].map(look);
  const pre = document.createElement("pre");
  pre.id = "told"; pre.textContent = JSON.stringify(told);
  document.body.append(pre);
});
"""


def browse(home: Path, target: Path, *options: str) -> tuple[str, str]:
    """What the browser prints, and what pages and the browser's console said."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [
        f"--user-data-dir={home / 'profile'}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
    ]
    done = subprocess.run(
        [*command, *options, target.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def looked_at(home: Path, pages: list[tuple[str, int]], dark: bool = False) -> tuple[list[dict[str, Any]], str]:
    """What the script finds in each (page, width), and what the console said."""
    frames = "\n".join(
        f'<iframe width="{width}" height="900" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
        for page, width in pages
    )
    (home / "frames.html").write_text(f'<!DOCTYPE html><meta charset="utf-8">{frames}<script>{LOOK}</script>')
    scheme = f"--blink-settings=preferredColorScheme={int(not dark)}"
    printed, console = browse(home, home / "frames.html", "--dump-dom", "--virtual-time-budget=5000", scheme)
    told = re.search('<pre id="told">(.*?)</pre>', printed, re.DOTALL)
    assert told, printed[-500:]
    return json.loads(html.unescape(told[1])), console


def line(kind: str, step: int, **more: object) -> dict[str, object]:
    return {"kind": kind, "step": step, "bytes": step * 4_123_456, "seconds": step * 40.0, **more}


def long() -> ReportData:
    """A run with much of everything: thousands of lines, long names, many types, marks beside each other."""
    curve = [2 + 6 / (1 + step / 50) + 0.2 * (step * 7919 % 13) / 13 for step in range(3000)]
    metrics = [
        line("train", step, bits_per_byte=curve[step], learning_rate=1e-3 * (1 - step / 3000), grad_norm=9 / (1 + step))
        | {"bytes_per_second": 1e5 + step, "patch_lengths": [step % 7, 40, 30, 9, 4, 0, 1, *([0] * 24), step % 5]}
        for step in range(1, 3000)
    ]
    metrics += [line("validation", step, bits_per_byte=2.1 + 6 / (1 + step / 50)) for step in range(100, 3000, 100)]
    metrics += [line("skipped", step, reason=f"a spike of {step} " * 3) for step in (5, 6, 7, 1500, 2999)]
    metrics += [line("resumed", step) for step in (1000, 1010, 2998)]
    metrics += [line("sample", step, prompt="x" * 300, text="y" * 900) for step in range(0, 3000, 900)]
    names = ("packing", "fitting entropy model", "computing patch boundaries", "encoding", "validation", "saving")
    metrics += [line("phase", 0, name=name, duration=10.0**power) for power, name in enumerate(names)]
    metrics += [line("memory", 10, peak=123.4e9, baseline=0.7e9, predicted=98.7e9)]
    types = [FileType(f".{'suffix' * 6}{n}", 10**n, 1.0 + n / 4, 5.0) for n in range(14)]
    held = HeldOut(1.234, 10**12, 1.1, 1.4, types)
    view = PatchView(bytes(range(256)) + b"w" * 90, [True] + [False] * 345, [n % 8 / 1.5 for n in range(346)], 2.0)
    return full(
        title="a_run_of_a_long_name_" * 9, metrics=metrics, patch_lengths={n: 10**6 // n for n in range(1, 60)},
        views=[("of a document", view)], samples=[Sample(None, b"p" * 200, b"\xff" * 300)], held_out=held,
        compressors={"gzip": 2.9, "the best PNG of all encoders": 2.6}, facts={"run": "/a/folder" * 30},
        config_toml='name = "' + "x" * 400 + '"', command="bytelm train " + "/a/path" * 60,
        files=Files(
            [(f".{'suffix' * 6}{n}", [n, 10**n, 10**n, 10**n]) for n in range(15)],
            [("/a/long/path" * 20, "no such file or directory")] * 50,
        ),
        subtitle="blt over entropy patches " * 5, state="unfinished: 63 % of its budget", finished=False,
        key_figures=[("123.4B", "parameters, 1.23B in n-gram tables")] * 5,
    )  # fmt: skip


def unfinished() -> ReportData:
    """A run that was stopped at its first line."""
    return ReportData("stopped", [line("train", 1, bits_per_byte=8.1, learning_rate=1e-5, grad_norm=2.0)])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("browser")
    yield home
    shutil.rmtree(home / "profile", ignore_errors=True)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_report_stands_on_every_width(home: Path, dark: bool) -> None:
    shown = {"full": (full(), WIDTHS), "long": (long(), WIDTHS[:1]), "unfinished": (unfinished(), WIDTHS[:1])}
    shown = {"full": (full(), WIDTHS[1:2])} if dark else shown
    pages = [(name, render(data), width) for name, (data, widths) in shown.items() for width in widths]
    told, console = looked_at(home, [(page, width) for _, page, width in pages], dark)
    assert console == ""
    for (name, _, width), one in zip(pages, told, strict=True):
        assert one["found"] == [], f"{name} at {width}"
        assert one["fetched"] == []
        assert one["shown"] >= (1 if name == "unfinished" else 10)
    assert {one["paper"] for one in told} == {"rgb(19, 22, 27)" if dark else "rgb(255, 255, 255)"}


def test_paper_holds_all_of_a_report(home: Path) -> None:
    page = render(full())
    told, _ = looked_at(home, [(page.replace("@media print", "@media all"), PAPER)], dark=False)
    assert told[0]["found"] == []
    assert told[0]["shown"] == len(re.findall('<svg|class="sample"|class="code"', page))  # what is folded too
    (home / "page.html").write_text(page, encoding="utf-8")
    browse(home, home / "page.html", f"--print-to-pdf={home / 'page.pdf'}", "--no-pdf-header-footer")
    pdf = (home / "page.pdf").read_bytes()
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
    assert len(re.findall(rb"/S\s*/Figure", pdf)) >= page.count("<svg")


def test_the_look_finds_what_is_wrong(home: Path) -> None:
    planted = {
        "runs over": '<div style="width:2000px">wide</div>',
        "faint": '<p style="color:#aaa;background:#fff">faint</p>',
        "overlaps": '<svg viewBox="0 0 440 50"><text x="9" y="20">one</text><text x="12" y="22">two</text></svg>',
        "empty": '<svg style="height:0"></svg>',
        "outside its chart": '<svg viewBox="0 0 440 50"><text x="9" y="90">one</text></svg>',
    }
    page = render(unfinished())
    pages = [page.replace("</body>", f"{bad}</body>") for bad in planted.values()]
    calling = page.replace("</body>", '<script>1</script><img src="https://example.com/x.png"></body>')
    told, console = looked_at(home, [(page, 800) for page in [*pages, calling]])
    for what, one in zip(planted, told, strict=False):
        assert any(line.startswith(what) for line in one["found"]), (what, one["found"])
    assert "Content Security Policy" in console
