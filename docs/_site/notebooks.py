"""Notebooks, Python files with text between their cells: run as the site is built, and shown with what came out."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient

LONGEST = 600  # seconds that a cell may take


def pages(folder: Path) -> Iterator[tuple[str, str]]:
    """(address, Markdown) of every notebook. Raises nbclient's CellExecutionError for a cell that fails."""
    for path in sorted(folder.glob("*.py")):
        yield f"notebooks/{path.stem}.md", "\n\n".join(shown(executed(path).cells)) + "\n"


def executed(path: Path) -> Any:
    """A notebook after all of its cells, which find an empty folder to work in."""
    notebook = jupytext.read(path)
    with tempfile.TemporaryDirectory() as here:
        kernel = AsyncKernelManager(transport="ipc", ip=f"{here}/socket")  # a file, which nobody else can reach
        work = {"metadata": {"path": here}}
        return NotebookClient(notebook, km=kernel, timeout=LONGEST, resources=work).execute(cleanup_kc=True)


def shown(cells: list[Any]) -> Iterator[str]:
    """The Markdown of cells: their text, their code, and what it gave."""
    for cell in cells:
        if cell.cell_type == "markdown":
            yield cell.source
        else:
            yield f"``````python\n{cell.source}\n``````"
            yield from map(output, cell.outputs)


def output(given: Any) -> str:
    """One output: HTML as it is, anything else as text."""
    data = {"text/plain": given.text} if given.output_type == "stream" else given.data
    if "text/html" in data:
        return data["text/html"]
    return f"``````text\n{data['text/plain'].rstrip()}\n``````"
