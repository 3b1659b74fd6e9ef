"""Files that were compressed on another machine: the same, or refused before anything is decoded."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import pytest

from bytelm.compress import stream
from bytelm.compress.stream import compress, decompress
from bytelm.errors import DataError
from bytelm.interfaces.model import ByteModel
from bytelm.native import kernels, library, logits, packing
from bytelm.online.memory import Memory
from bytelm.online.settings import Settings
from bytelm.testing import tiny_models

DATA = np.random.default_rng(0).choice(np.frombuffer(b"the cat sat on a mat. \n", np.uint8), 400).tobytes()
PREFIXES = ("blt (last layer crossed) on entropy (relative)", "megabyte (two", "hnet (one", "transformer (windowed")
MODELS = [(name, model.eval()) for name, model in tiny_models() if name.startswith(PREFIXES)]
SMALL = Settings(memory=1 << 20)

pytestmark = pytest.mark.skipif(not library.compilers(), reason="no C++ compiler")


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have all kernels of models be those of a level; skips those that this processor does not run."""

    def chosen(level: str) -> None:
        if level not in library.levels():
            pytest.skip(f"this processor does not run {level}")
        used = ctypes.CDLL(str(library.compiled("kernels", library.compilers()[0], level)))
        for module in (kernels, packing, logits):
            monkeypatch.setattr(module, "library", lambda name: used)

    return chosen


@pytest.mark.fault("M5")
@pytest.mark.parametrize(("name", "model"), MODELS, ids=[name for name, _ in MODELS])
def test_a_file_of_another_processor(
    name: str, model: ByteModel, use: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The levels stand for processors: what they compute was recorded on others, too (decoding/test_arithmetic.py)."""
    monkeypatch.setattr(stream, "CHECK", 60)
    for memory in (lambda: None, lambda: Memory(SMALL)):
        here = compress(model, DATA, 64, memory=memory())
        use("x86-64-v3")
        assert compress(model, DATA, 64, memory=memory()) == here
        assert decompress(model, here, memory=memory()) == DATA
        use("x86-64-v2")
        decoded: list[int] = []
        with pytest.raises(DataError, match="this machine rounds the model's predictions otherwise"):
            decompress(model, here, decoded.append, memory=memory())
        assert not decoded
        monkeypatch.undo()
        monkeypatch.setattr(stream, "CHECK", 60)
