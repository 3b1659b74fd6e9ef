"""The one stylesheet, and the shell of a page that needs nothing but itself: no script, no network."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

# What neither XML nor UTF-8 can hold: control characters, lone surrogates, the two non-characters.
_UNHOLDABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")

SHEET = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #1c2128; --soft: #59636f; --rule: #dfe3e8;
  --series0: #1f5fbf; --series1: #b4500b; --series2: #20794d;
  --series3: #8a3fa0; --series4: #6b7280; --series5: #a6243c;
  --series6: #0f7c8c; --series7: #8a6d00; --series8: #d1508f; --series9: #4f7d1c;
  --patch0: #d9e7fb; --patch1: #fbe8c4; --bar: #8b97a6; --above: #b4500b; --prompt: #e3ecf9;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #13161b; --card: #1b1f26; --ink: #e4e7eb; --soft: #9aa5b1; --rule: #2d333c;
    --series0: #79aefc; --series1: #f0a35e; --series2: #6cc79a;
    --series3: #cf9be0; --series4: #9ca3af; --series5: #f08b9d;
    --series6: #5cc8d8; --series7: #d9bc4a; --series8: #f29ac4; --series9: #a5cf74;
    --patch0: #203a60; --patch1: #55421a; --bar: #8592a3; --above: #f0a35e; --prompt: #22304a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3.5rem 1.5rem 5rem; max-width: 64rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-print-color-adjust: exact; print-color-adjust: exact;
}
h1 {
  font-size: 1.75rem; font-weight: 650; letter-spacing: -.015em; line-height: 1.2; margin: 0 0 .4rem;
  overflow-wrap: anywhere;
}
h2 { font-size: 1.15rem; font-weight: 650; margin: 3.5rem 0 .75rem; }
p { margin: .25rem 0 1rem; max-width: 46rem; }
.note, figcaption { color: var(--soft); font-size: .875rem; max-width: 46rem; }
figure { margin: 0 0 1.5rem; break-inside: avoid; }
figcaption { margin-top: .5rem; }
.columns {
  display: grid; grid-template-columns: repeat(auto-fill, minmax(min(26rem, 100%), 1fr)); gap: 1.5rem 2.5rem;
  align-items: start; margin-bottom: 1rem;
}
.columns figure { margin: 0; } .columns > div > figure + figure { margin-top: 1.5rem; }
header p { color: var(--soft); max-width: none; }
.pill {
  display: inline-block; border-radius: 1rem; padding: 0 .7rem; margin-left: .35rem; font-size: .875rem;
  color: var(--paper); background: var(--series2);
}
.pill.open { background: var(--series1); }
.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 1.75rem 0 0;
}
.tiles div { background: var(--card); border-radius: 8px; padding: .7rem .9rem; font-size: .875rem; }
.tiles b { display: block; font-size: 1.25rem; font-weight: 650; color: var(--ink); }
.figure { font-size: 3.25rem; font-weight: 650; letter-spacing: -.03em; line-height: 1; margin: 1.5rem 0 .5rem; }
.figure small { font-size: 1.1rem; font-weight: 400; letter-spacing: 0; color: var(--soft); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: right; padding: .42rem 0 .42rem 1rem; border-bottom: 1px solid var(--rule); }
th:first-child, td:first-child { text-align: left; padding-left: 0; overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 500; } td:not(:first-child) { white-space: nowrap; }
tr.ours td { font-weight: 650; }
.matrix { overflow-x: auto; font-size: .9em; } .matrix th, .matrix td:first-child { white-space: nowrap; }
dl {
  display: grid; grid-template-columns: fit-content(60%) minmax(0, 1fr); gap: .35rem 1.5rem; font-size: .9rem;
  margin: 0;
}
dt { color: var(--soft); overflow-wrap: anywhere; } dd { margin: 0; overflow-wrap: anywhere; }
pre { font: .84rem/1.6 var(--mono); margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
details { margin: 1rem 0; }
.code { background: var(--card); border-radius: 8px; padding: 1rem 1.25rem; margin: .75rem 0; }
summary { cursor: pointer; }
.pictures { display: grid; grid-template-columns: repeat(4, minmax(0, 9rem)); gap: .5rem .75rem; }
.pictures figcaption { grid-column: 1 / -1; }
.pictures img { width: 100%; height: auto; image-rendering: pixelated; border-radius: 2px; }
audio { display: block; width: 100%; height: 2.25rem; margin-top: .5rem; }
.sample {
  display: grid; grid-template-columns: 7rem 1fr; gap: 1rem; padding: 1rem 0; border-top: 1px solid var(--rule);
  break-inside: avoid;
}
.sample span { color: var(--soft); font-size: .875rem; }
mark { background: var(--prompt); color: inherit; font-weight: 650; border-radius: 3px; }
.hex {
  font: .72em var(--mono); color: var(--soft); border: 1px solid var(--rule); border-radius: 3px; padding: 0 .2em;
}
@media (max-width: 40rem) {
  body { padding: 2rem 1rem 3rem; }
  h2 { margin-top: 2.5rem; }
  .sample { grid-template-columns: 1fr; gap: .25rem; } .figure { font-size: 2.5rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  th, td { padding-left: .5rem; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dd { margin-bottom: .6rem; }
}
@media print {
  :root { font-size: 9.5pt; }
  body { padding: 0; max-width: none; font-size: 1rem; }
  h2 { break-after: avoid; margin-top: 2rem; }
  .columns { grid-template-columns: 1fr 1fr; }
  tr, .tiles, dl { break-inside: avoid; }
  details::details-content { content-visibility: visible; block-size: auto; } /* what is folded is printed */
}

svg { display: block; width: 100%; height: auto; overflow: visible; font-size: 12px; fill: var(--soft); }
svg .grid { stroke: var(--rule); } svg .axis { stroke: var(--soft); }
svg .mean { stroke: var(--ink); stroke-dasharray: 4 3; }
svg .line { fill: none; stroke-width: 1.75; stroke-linejoin: round; stroke-linecap: round; }
svg .resumed { stroke: var(--ink); stroke-dasharray: 3 3; fill: var(--paper); }
svg circle.resumed { stroke-dasharray: none; }
svg .skipped { fill: var(--series5); }
svg .step { fill: none; stroke: var(--series1); stroke-width: 1.75; }
svg .at rect { fill: transparent; } svg .at line { stroke: var(--ink); stroke-opacity: .45; }
svg .at line, svg .at text { visibility: hidden; } svg .at:hover line, svg .at:hover text { visibility: visible; }
svg .strong { fill: var(--ink); } svg .ours { font-weight: 650; }

.patches { font: 15px/1.3 var(--mono); direction: ltr; padding: .25rem 0; }
.patch { white-space: nowrap; } .patch.long { white-space: normal; }
.patch > span {
  display: inline-block; vertical-align: bottom; position: relative; margin-bottom: .9rem; padding-top: .8rem;
}
.patch b {
  display: block; font-weight: 400; text-align: center; white-space: pre; min-width: 1ch;
  height: 1.5em; line-height: 1.5em; background: var(--patch0);
}
.patch:nth-of-type(even) b { background: var(--patch1); }
.patch > span:first-child b { border-radius: 4px 0 0 4px; } .patch > span:last-of-type b { border-radius: 0 4px 4px 0; }
.patch > span:only-of-type b { border-radius: 4px; } .patch > span:last-of-type { margin-right: 2px; }
.patch b.mark, .patch b.byte { color: var(--soft); }
.patch b.byte { font-size: 11px; height: 2.045em; line-height: 2.045em; padding: 0 2px; }
.patch > span[data-length]::before {
  content: attr(data-length); position: absolute; top: -1px; left: 1px; font-size: 10px; line-height: 1.2;
  color: var(--soft);
}
.bars { display: flex; align-items: flex-end; height: 36px; position: relative; border-bottom: 1px solid var(--rule); }
.bars::after {
  content: ""; position: absolute; left: 0; right: 0; bottom: var(--threshold, 0);
  border-top: var(--line, 0) dashed var(--above);
}
.bars i { flex: 1 1 0; min-width: 4px; margin: 0 1px; background: var(--bar); border-radius: 1px 1px 0 0; }
.bars i.above { background: var(--above); }
"""


POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"


def escape(text: str) -> str:
    """Text that is nothing but text in HTML and XML, attributes included. What they cannot hold becomes U+FFFD."""
    return html.escape(_UNHOLDABLE.sub("\N{REPLACEMENT CHARACTER}", text))


def document(title: str, body: str) -> str:
    """A whole page around `body`, which is HTML already. The policy in its head forbids scripts and all fetching.

    Pictures and sound may stand in the page itself, as data: addresses.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{SHEET}</style>
</head>
<body>
{body}
</body>
</html>
"""


def figure(body: str, caption: str = "") -> str:
    """A figure around HTML, with a caption of text."""
    under = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{body}{under}</figure>"


def folded(summary: str, body: str) -> str:
    """HTML that is folded away under a line of text; print unfolds it."""
    return f"<details><summary>{escape(summary)}</summary>\n{body}</details>"


def definitions(rows: Sequence[tuple[str, str]]) -> str:
    """Names, and what each is."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>\n" for name, value in rows) + "</dl>"


def table(head: list[str], rows: list[list[str]], ours: int | None = None) -> str:
    """A table of text cells, numbers to the right; row `ours` stands out."""
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = [f"<table>\n<tr>{top}</tr>"]
    for index, row in enumerate(rows):
        mine = ' class="ours"' if index == ours else ""
        lines.append(f"<tr{mine}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return "\n".join([*lines, "</table>"])
