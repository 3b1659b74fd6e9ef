"""A program that holds something of ours when it ends prints nothing of its own accord, whatever was half done."""

from __future__ import annotations

import ast
import builtins
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import bytelm

GOLDEN = Path(__file__).parents[1] / "golden" / "format-1"

# Modules that outlive the objects in them, as those do that an extension module refers to: the interpreter then empties
# them one by one while objects of theirs still die. So it is in programs that have imported torch and others.
PINNED = """
import ctypes, sys
from pathlib import Path
{code}
for module in list(sys.modules.values()):
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(module))
print("held", end="")
"""

PACKED = """
from bytelm.data.corpus import Corpus, iterate_documents
from bytelm.data.pack import pack
Path("notes.txt").write_text("".join(f"line {i}\\n" for i in range(2000)))
corpus = pack(["notes.txt"], "packed", test=0.0, valid=0.0)
"""

HOLDERS = {
    "a corpus": PACKED,
    "documents of a corpus": PACKED + "some = iterate_documents(corpus); next(some)",
    "a thread that reads": PACKED
    + """
import threading
from bytelm.data.files import PositionReader
def read():
    while True:
        corpus.read(0, 1000)
threading.Thread(target=read, daemon=True).start()
""",
    "boundaries, and some that are not finished": PACKED
    + """
import numpy as np
from bytelm.data.boundaries import Boundaries, BoundaryWriter
other = BoundaryWriter("packed", "f" * 16, corpus.total)
other.write(np.zeros(100, bool))
with BoundaryWriter("packed", "a" * 16, corpus.total) as writer:
    writer.write(np.zeros(corpus.total, bool))
    boundaries = writer.finish()
""",
    "a shard that is not finished": """
from bytelm.data.shards import ShardWriter
writer = ShardWriter(Path(), 1000)
writer.write(b"some text")
""",
    "files that are read half": """
import gzip
from bytelm.data.sources import documents
Path("a.txt").write_text("some text" * 500_000)
Path("b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\\n' * 9999))
held = [documents([name]) for name in ("a.txt", "b.jsonl.gz")]
pieces = [next(next(some).pieces) for some in held]
""",
    "rows of a table that are read half": """
import pyarrow, pyarrow.parquet
from bytelm.data.sources import documents
pyarrow.parquet.write_table(pyarrow.table({"text": ["a"] * 9999}), "x.parquet", row_group_size=99)
held = documents(["x.parquet"])
next(held)
""",
    "pictures that are read half": """
from PIL import Image
from bytelm.data.convert import read
from bytelm.data.modalities.image import Config
Image.linear_gradient("L").save("x.png"), Image.linear_gradient("L").save("y.png")
held = read(["x.png", "y.png"], Config(8, 8).build())
next(held)
""",
    "a dataset that is read half": """
from bytelm.data.sources import documents
Path("set").mkdir()
Path("set", "train.jsonl").write_text('{"text": "a"}\\n' * 999)
held = documents(["hf:./set"])
next(held)
""",
    "a run, its lock and its signals": """
from bytelm.checkpoint.lock import exclusive
from bytelm.training.journal import Journal
from bytelm.training.stop import StopRequest
lock, stop, journal = exclusive(Path()), StopRequest(), Journal(Path("metrics.jsonl"), quiet=True)
lock.__enter__(), stop.__enter__()
journal.write("train", step=1)
""",
    "a text that is being written": """
import bytelm
lm = bytelm.load(sys.argv[1])
text = lm.stream(b"some", max_bytes=20, eos=False)
next(text)
""",
    "a training as far as its windows": PACKED
    + """
from bytelm.data.bpe import Bpe
from bytelm.data.sampler import Sampler
from bytelm.data.tokens import encoded
tokens = encoded(corpus, Bpe.learn([b"line 1\\nline 2\\n"], 262))
samplers = [Sampler(source, "train", 16, 2, 0) for source in (corpus, tokens)]
batches = [sampler.batch(0) for sampler in samplers]
""",
    "a step that is drawn ahead": PACKED
    + """
import torch
from bytelm.data.sampler import Sampler
from bytelm.training.ahead import Ahead
ahead = Ahead(Sampler(corpus, "train", 1 << 14, 8, 0).batch, torch.device("cpu"))
ahead.take(0), ahead.take(1)
""",
    "figures for tensorboard": """
from bytelm.training.loggers import TensorBoard
logger = TensorBoard(Path(), {})
logger.log(1, {"bits": 1.0})
""",
}
NEEDED = {
    "rows of a table that are read half": "pyarrow",
    "pictures that are read half": "PIL",
    "a dataset that is read half": "datasets",
    "figures for tensorboard": "tensorboard",
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_nothing_is_printed_at_the_end(holder: str, tmp_path: Path) -> None:
    if (package := NEEDED.get(holder)) and find_spec(package) is None:
        pytest.skip(f"there is no {package} here")
    words = [sys.executable, "-c", PINNED.format(code=HOLDERS[holder]), str(GOLDEN)]
    run = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "held", "")


def yields_in(body: list[ast.stmt]) -> bool:
    """Whether a generator may be left there, in these statements and not in functions within them."""
    found: list[ast.AST] = list(body)
    while found:
        node = found.pop()
        if isinstance(node, ast.Yield | ast.YieldFrom):
            return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            found += ast.iter_child_nodes(node)
    return False


def test_generators_can_be_left_when_names_are_gone() -> None:
    """The end of a generator that is read half is an exception in it: its handlers are looked up, gone or not."""
    for path in sorted(Path(bytelm.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Try) and yields_in(node.body):
                kinds = [handler.type for handler in node.handlers]
                caught = [ast.unparse(each) for kind in kinds for each in getattr(kind, "elts", [kind])]
                # Names of no module: those of Python's own, and local ones, which are in small letters.
                safe = all(hasattr(builtins, name) or (name.isidentifier() and name.islower()) for name in caught)
                named = f"{path}:{node.lineno} looks up {caught}"
                assert safe or caught[0] == "GeneratorExit", f"{named}: catch GeneratorExit before"


def test_a_file_is_closed_when_it_is_let_go(tmp_path: Path) -> None:
    from bytelm.data.files import PositionReader

    (tmp_path / "x").write_bytes(b"some")
    reader = PositionReader(tmp_path / "x", 4)
    descriptor = reader._descriptor  # pyright: ignore[reportPrivateUsage]
    assert os.fstat(descriptor).st_size == 4
    del reader
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
