"""Kernels of one arithmetic compute the same bits: on every processor, by every compiler, and by those of before.

Weights and ids are of integer arithmetic alone, so that they too are the same everywhere. RECORDED is what kernels of
each arithmetic gave: where it differs, files that were compressed before cannot be decompressed any more (and a
compressed file's header must say so), or this machine computes something else than all others.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import shutil
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from bytelm.compress.coder import frequencies
from bytelm.decoding import open_decoder
from bytelm.interfaces.decoder import Decoder
from bytelm.interfaces.model import ByteModel
from bytelm.models.blt import model as blt
from bytelm.models.hnet import model as hnet
from bytelm.models.megabyte import model as megabyte
from bytelm.models.ngram import entropy_model as ngram
from bytelm.models.perceiver import model as perceiver
from bytelm.models.transformer import entropy_model
from bytelm.models.transformer import model as transformer
from bytelm.native import kernels, library, logits, packing
from bytelm.online.memory import among_bytes
from bytelm.patching import entropy, space
from bytelm.units import BOS, BYTES

RECORDED: dict[str | None, str] = {"fused": "108d028a2074805d", "separate": "16d5b29733626eae"}
ROUNDED_BY_PROCESSOR = ("exp", "log", "log2", "cos", "sin", "power", "sum", "mean", "dot", "matmul", "einsum")
"""Functions of numpy that nothing may call here."""
LENGTH, WIDE = 90, 16
QUICK = ["native", "x86-64-v2", "x86-64-v3"]

pytestmark = pytest.mark.skipif(not library.compilers(), reason="no C++ compiler")


def bytelatent(patcher: entropy.Entropy | space.Space, **options: object) -> ByteModel:
    shape = {"local_dim": WIDE, "local_heads": 2, "cross_heads": 2, "attention_window": 6, "ngram_rows": 101}
    inner = {"global_dim": 32, "global_heads": 2, "global_layers": 2, "decoder_layers": 2, "ffn_multiple": 16}
    return blt.Config(**(shape | inner | options)).build(patcher)


def on_entropies() -> ByteModel:
    small = entropy_model.Config(layers=1, dim=WIDE, heads=2, attention_window=7, ffn_multiple=16, reset_newline=True)
    rule = entropy.Config(rule="both", threshold=4.0, relative_threshold=-0.125)
    return bytelatent(rule.build(small.build()), encoder_layers=2, encoder_cross="all", ngram_output=True)


def on_counted_entropies() -> ByteModel:
    return bytelatent(entropy.Config(threshold=2.5).build(ngram.Config(order=2, rows=512).build()), queries=1)


MODELS: dict[str, Callable[[], ByteModel]] = {
    "BLT, entropies of a Transformer": on_entropies,
    "BLT, entropies of n-grams": on_counted_entropies,
    "BLT, space": lambda: bytelatent(space.Config().build(), global_dim=48, ngram_sizes=()),
    "MEGABYTE": lambda: megabyte.Config((4,), (32, WIDE), (2, 2), (2, 2), reach=3, filters=(3, 5)).build(),
    "byte-window": lambda: transformer.Config(2, 32, 2, attention_window=40, ffn_multiple=16).build(),
    "H-Net": lambda: hnet.Config((WIDE, 32), (2, 2), (1,), (2,), 2, (3.0,), attention_window=6).build(),
    "PerceiverAR": lambda: perceiver.Config(latents=5, layers=2, dim=WIDE, heads=2, ffn_multiple=16).build(),
}


def scattered(count: int, seed: int) -> np.ndarray:
    """Numbers from -1 to 1 that look random: steps of a linear congruential generator, mixed (Knuth 1997, 3.2.1)."""
    with np.errstate(over="ignore"):
        state = (np.arange(count, dtype=np.uint64) + np.uint64(seed << 32)) * np.uint64(6364136223846793005)
        state = (state ^ (state >> np.uint64(29))) * np.uint64(1442695040888963407)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1


def filled(model: ByteModel) -> ByteModel:
    """Its weights of a size for which what comes out is of the size of what goes in, those of norms about 1."""
    for number, tensor in enumerate(model.state_dict().values()):
        if not tensor.is_floating_point():
            continue
        numbers = scattered(tensor.numel(), number + 1).reshape(tensor.shape)
        if tensor.ndim == 1:
            numbers = 1 + numbers / 8
        elif tensor.shape[-1] == 512:  # entropies in nats; below 0: never counted
            numbers = 2 + 3 * numbers
        else:
            numbers *= 2 * math.sqrt(3 / tensor.shape[-1])
        tensor.copy_(torch.from_numpy(numbers.astype(np.float32)))
    return model.eval()


def document() -> np.ndarray:
    """A document with words and lines."""
    ids = (scattered(LENGTH, 0) * 128 + 128).astype(np.int64)
    ids[::5], ids[::23], ids[0] = ord(" "), ord("\n"), BOS
    return ids


def read(decoder: Decoder, ids: np.ndarray, sizes: list[int], threads: int) -> list[np.ndarray]:
    """Logits in chunks of such sizes, in turn, and where patches open; what a coder is given."""
    assert decoder.thread_pool is not None
    decoder.thread_pool.threads = threads
    decoder.rollback(np.zeros(1, np.int64), np.zeros(1, np.int64))
    parts: list[np.ndarray] = []
    at = turn = 0
    while at < len(ids):
        new = ids[at : at + sizes[turn % len(sizes)]]
        parts.append(decoder.read(np.zeros(len(new), np.int64), new))
        at, turn = at + len(new), turn + 1
    found = np.concatenate(parts)
    patches = getattr(decoder, "patches", None)
    opened = decoder.depth(0) if patches is None else np.diff(patches.closed[0], prepend=0)
    opened = np.zeros(0) if opened is None else opened
    line = found[:, :BYTES]
    return [found, opened, frequencies(np.ascontiguousarray(line)), among_bytes(line)]


def computed(used: ctypes.CDLL) -> str:
    """A checksum of what these kernels compute of every model, which is the same in any chunks and threads."""
    digest, ids = hashlib.sha256(), document()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        for module in (kernels, packing, logits):
            patch.setattr(module, "library", lambda name: used)
        for name in ROUNDED_BY_PROCESSOR:
            patch.delattr(np, name)
        for name, build in MODELS.items():
            for weights in (None, "bf16", "int8"):
                decoder = open_decoder(filled(build()), rows=1, capacity=LENGTH, quantize=weights)
                whole, *others = [read(decoder, ids, *how) for how in (([LENGTH], 2), ([1], 1), ([5, 1, 20], 1))]
                assert not whole[1].size or 9 < np.count_nonzero(whole[1]) < LENGTH - 9, name
                for part in others:
                    assert all(map(np.array_equal, whole, part)), (name, weights)
                digest.update(b"".join(map(np.ndarray.tobytes, whole)))
    return digest.hexdigest()[:16]


@pytest.mark.parametrize(
    "level", QUICK + [pytest.param(level, marks=pytest.mark.slow) for level in library.LEVELS if level not in QUICK]
)
def test_a_level_computes_what_is_recorded_of_its_arithmetic(level: str) -> None:
    if level != "native" and level not in library.levels():
        pytest.skip(f"this processor does not run {level}")
    used = ctypes.CDLL(str(library.compiled("kernels", library.compilers()[0], level)))
    assert computed(used) == RECORDED["fused" if used.bytelm_fused() else "separate"]
    assert level == "native" or used.bytelm_fused() == (level != "x86-64-v2")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", library.COMPILERS[:2])
def test_every_compiler_makes_kernels_that_compute_the_same(compiler: str) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    for level in filter(QUICK.__contains__, library.levels()):
        used = ctypes.CDLL(str(library.compiled("kernels", compiler, level)))
        assert computed(used) == RECORDED["fused" if used.bytelm_fused() else "separate"], level


def test_arithmetic_is_that_of_the_kernels_that_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for level in filter(QUICK.__contains__, library.levels()):
        used = ctypes.CDLL(str(library.compiled("kernels", library.compilers()[0], level)))
        monkeypatch.setattr(library, "library", lambda name, used=used: used)
        assert library.arithmetic() == ("separate" if level == "x86-64-v2" else "fused")
    monkeypatch.setattr(library, "library", lambda name: None)
    assert library.arithmetic() is None


def test_kernels_take_no_function_from_the_library_of_mathematics() -> None:
    """But square roots, which every processor rounds right: others differ between systems."""
    if shutil.which("nm") is None or not sys.platform.startswith("linux"):
        pytest.skip("no nm, which lists what a library of Linux takes from others")
    built = library.compiled("kernels", library.compilers()[0])
    told = subprocess.run(["nm", "-D", "--undefined-only", str(built)], capture_output=True, text=True, check=True)
    taken = {line.split()[-1].split("@")[0] for line in told.stdout.splitlines()}
    assert "memcpy" in taken  # it was read
    known = {name for name in dir(math) if not name.startswith("_")} - {"sqrt"}
    assert not {name for name in taken if name in known or name.rstrip("f") in known}
