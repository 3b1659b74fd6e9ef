"""The command that counts the cost of models: a table of presets, and the papers' cost figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from bytelm.cli.common import Json, print_json, print_table
from bytelm.units import show_bytes, show_count

if TYPE_CHECKING:
    from bytelm.compare.figures import Figure
    from bytelm.evaluate.costs import Costs

HEAD = (
    *("preset", "parameters", "without tables", "entropy model"),
    *("FLOPs/byte: paper", "executed", "H-Net's", "bytes read/byte"),
)
WORDS = {
    "paper": "By the papers' formulas, which count the causal half of attention.",
    "executed": "As executed: whole matrix products, masked positions included.",
}


def costs(
    presets: Annotated[list[str] | None, Parameter(negative="")] = None,
    /,
    *,
    svg: Annotated[Path | None, Parameter(help="Write the figures to this file.")] = None,
    json: Json = False,
) -> int:
    """Count the cost of presets, without training: parameters, FLOPs per byte in three conventions, memory traffic.

    Without names: all presets, and FLOPs per byte over model size, sequence length and patch size.

    The latter are as in the figures of the MEGABYTE and BLT papers.

    Example: bytelm costs blt-8b megabyte-text-758m-262m
    Example: bytelm costs --svg costs.svg

    Parameters
    ----------
    presets
        Names, as `bytelm presets` lists them.
    """
    from bytelm.compare.figures import figures
    from bytelm.config import preset_names

    counts = [_count(name) for name in presets or preset_names()]
    drawn = figures() if svg is not None or not presets else []
    if svg is not None:
        from bytelm.report.page import write

        write(svg, _picture(drawn))
    if json:
        keys = ("preset", "context_length", "mean")
        found = [{**dict(zip(keys, row[:3], strict=True)), **asdict(row[3])} for row in counts]
        print_json({"presets": found, "figures": [asdict(figure) for figure in drawn]})
        return 0
    _print_presets(counts)
    if not presets:
        for figure in drawn:
            _print_figure(figure)
        print("paper / executed, FLOPs per byte")
    if svg is not None:
        print(svg)
    return 0


def _count(name: str) -> tuple[str, int, float, Costs]:
    """A preset, its context length, mean bytes per patch or token, and its cost."""
    from bytelm.evaluate.costs import costs as count
    from bytelm.evaluate.costs import usual_mean
    from bytelm.training.settings import configure

    config = configure(name)
    window, mean = config.train.context_length, usual_mean(config.recipe)
    return name, window, mean, count(config.recipe, window, mean)


def _print_presets(counts: Sequence[tuple[str, int, float, Costs]]) -> None:
    rows = [
        [
            name,
            *map(show_count, (c.parameters, c.parameters - c.tables)),
            show_count(c.entropy_model) if c.entropy_model else "none",
            *map(show_count, (c.paper, c.executed, c.hnet)),
            show_bytes(c.read),
        ]
        for name, _, _, c in counts
    ]
    print_table(HEAD, rows)
    print("FLOPs/byte: of a forward pass, per byte, over the preset's context length; times 3 in training")
    print("  paper: the formula of the architecture's paper, without the entropy model")
    print("  executed: all matrix products (masked positions, the entropy model), hash tables, cross-attention")
    print("  H-Net's: the same, and input embeddings as if they were matrix products")
    print("bytes read/byte: weights and caches to decode one byte in bfloat16, batch size 1, mid-context")


def _print_figure(figure: Figure) -> None:
    """One row per x value, one column per line of the figure."""
    places = sorted({point.x for points in figure.lines.values() for point in points})
    at = {
        (name, p.x): f"{show_count(p.paper)} / {show_count(p.executed)}"
        for name, line in figure.lines.items()
        for p in line
    }
    print(f"\n{figure.title}")
    rows = [[show_count(x), *(at.get((name, x), "") for name in figure.lines)] for x in places]
    print_table([figure.x, *figure.lines], rows)


def _picture(figures: Sequence[Figure]) -> str:
    """Each figure twice, side by side: by the papers' formulas, and as executed."""
    from bytelm.report.charts import line_chart, page

    def drawn(figure: Figure, convention: Literal["paper", "executed"]) -> tuple[str, str]:
        lines = {name: [(p.x, getattr(p, convention)) for p in line] for name, line in figure.lines.items()}
        show = show_count
        chart = line_chart(lines, figure.x, "FLOPs/byte", figure.title, True, show, show, log_y=True)
        return chart, f"{figure.title}. {figure.says} {WORDS[convention]}"

    return page([[drawn(figure, "paper"), drawn(figure, "executed")] for figure in figures])
