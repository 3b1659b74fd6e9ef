"""The compressors of `compression.py`, ours and others', each of which works in a process of its own.

    python benchmarks/compressors.py compress METHOD FOLDER RUN       reads FOLDER/data, writes its packed file there
    python benchmarks/compressors.py decompress METHOD FOLDER RUN     reads the packed file, writes the restored one

A method whose name ends in ", primed" begins with what it has learned from FOLDER/before. RUN is for ours alone. Prints
one line of JSON: bytes (compressed), seconds (of the processor, once all code is loaded), wall (of the clock),
peak_bytes (resident memory of the process, Python's included); of ours when it compresses, loss_bits (what
coding has beyond the sum of log-probabilities, which is found after that).

Where a compressor cannot keep what it has learned, both parts are compressed in one piece, and what `before` takes
alone is subtracted; the seconds are those of both parts, and both come back. zstd has a dictionary of raw content.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

PRIMED = ", primed"
SIZE = 8  # bytes that say how long the content is, where a format does not
ANY = 1 << 40
MODEL = 1 << 30  # bytes that PPMd may use: more than it needs for these sizes
BLOCK = 1 << 26  # bytes of zpaq's
SEEN = 27  # log2 of the bytes that zstd looks back with --long


@dataclass(frozen=True)
class Peer:
    """Somebody else's: how to compress and decompress with its package, or its program."""

    module: str
    """What is imported, and what both are given."""
    pack: Callable[[Any, bytes, bytes], bytes]
    unpack: Callable[[Any, bytes, bytes], bytes]
    reach: int = ANY
    """How many bytes back it looks: it can be primed where that is all of it."""
    dictionary: bool = False
    """Whether it takes what it has learned as such, as the last argument of both."""
    program: bool = False
    """Whether it is a program, and its path is what both are given."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Its code."""
        return () if self.program else (self.module,)

    def code(self) -> Any:
        """What `pack` and `unpack` are given. Raises ImportError."""
        if not self.program:
            return importlib.import_module(self.module)
        found = shutil.which(self.module) or shutil.which(self.module + "z")  # as some systems call 7z
        if found is None:
            raise ImportError(f"{self.module}: no such program")
        return found

    def missing(self) -> str | None:
        """How to get it, where it is not here."""
        try:
            self.code()
        except ImportError:
            return f"install {self.module}: it is on no path" if self.program else f"pip install {self.module}"
        return None

    def compress(self, data: bytes, before: bytes, run: Path) -> tuple[bytes, int]:
        """What is to be kept, and how many bytes of it are for `data`."""
        module = self.code()
        if self.dictionary or not before:
            packed = self.pack(module, data, before)
            return packed, len(packed)
        packed = self.pack(module, before + data, b"")
        return packed, len(packed) - len(self.pack(module, before, b""))

    def decompress(self, packed: bytes, before: bytes, run: Path) -> bytes:
        module = self.code()
        if self.dictionary:
            return self.unpack(module, packed, before)
        restored = self.unpack(module, packed, b"")
        if not restored.startswith(before):
            raise ValueError("what was read before did not come back")
        return restored[len(before) :]


def gzip(zlib: Any, data: bytes, _: bytes) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    return packer.compress(data) + packer.flush()


def xz(lzma: Any, data: bytes, _: bytes) -> bytes:
    larger = max(1 << 26, 1 << len(data).bit_length())  # the preset's dictionary, or all where that is larger
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": min(larger, 1536 << 20)}]
    return lzma.compress(data, filters=filters)


def zstd(zstandard: Any, data: bytes, before: bytes) -> bytes:
    settings = zstandard.ZstdCompressionParameters.from_level(
        22, source_size=len(data), dict_size=len(before), window_log=SEEN, enable_ldm=True
    )
    words = {"dict_data": raw(zstandard, before)} if before else {}
    return zstandard.ZstdCompressor(compression_params=settings, **words).compress(data)


def unzstd(zstandard: Any, packed: bytes, before: bytes) -> bytes:
    words = {"dict_data": raw(zstandard, before)} if before else {}
    return zstandard.ZstdDecompressor(max_window_size=1 << SEEN, **words).decompress(packed)


def raw(zstandard: Any, before: bytes) -> Any:
    return zstandard.ZstdCompressionDict(before, dict_type=zstandard.DICT_TYPE_RAWCONTENT)


def ppmd(order: int, seven: str, data: bytes, _: bytes) -> bytes:
    """In an archive of 7z. (pyppmd 1.3.1 does not restore some files.)"""
    with tempfile.TemporaryDirectory() as folder:
        words = ["a", "-t7z", f"-m0=PPMd:o={order}:mem={MODEL}b", "-mmt=1", "-bso0", "-bsp0", "-sidata", "packed.7z"]
        subprocess.run([seven, *words], input=data, cwd=folder, check=True)
        return (Path(folder) / "packed.7z").read_bytes()


def unppmd(seven: str, packed: bytes, _: bytes) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "packed.7z").write_bytes(packed)
        words = ["x", "-so", "-mmt=1", "-bsp0", "packed.7z"]
        return subprocess.run([seven, *words], stdout=subprocess.PIPE, cwd=folder, check=True).stdout


def zpaq(module: Any, data: bytes, _: bytes) -> bytes:
    """In blocks of 64 MiB, as its program has them, and with the better of the two hints of what kind of data it is.

    The block's size is also that of the tables: one for both sizes whose difference is taken, and so is the hint.
    """
    first = data[: 1 << 16]
    text = min((0, 1), key=lambda hint: len(module.compress(first, threads=1, method=f"56,128,{hint}")))
    return module.compress(data, threads=1, method=f"56,128,{text}")


PEERS = {
    "gzip -9": Peer("zlib", gzip, lambda zlib, packed, _: zlib.decompress(packed, 47), reach=1 << 15),
    "bzip2 -9": Peer("bz2", lambda bz2, data, _: bz2.compress(data), lambda bz2, data, _: bz2.decompress(data), 1),
    "xz -9e": Peer("lzma", xz, lambda lzma, packed, _: lzma.decompress(packed), reach=1536 << 20),
    "zstd --ultra -22 --long": Peer("zstandard", zstd, unzstd, reach=1 << SEEN, dictionary=True),
    "brotli -q 11": Peer(
        "brotli",
        lambda brotli, data, _: brotli.compress(data, quality=11, lgwin=24),
        lambda brotli, packed, _: brotli.decompress(packed),
        reach=(1 << 24) - 16,
    ),
    "PPMd, order 8": Peer("7z", partial(ppmd, 8), unppmd, program=True),
    "PPMd, order 16": Peer("7z", partial(ppmd, 16), unppmd, program=True),
    "zpaq -m5": Peer("zpaq", zpaq, lambda module, packed, _: module.decompress(packed, threads=1), BLOCK - 4096),
}


@dataclass(frozen=True)
class Ours:
    """A network, a memory that learns while it reads, or both; `bytelm compress`, and its coder without a network."""

    network: bool
    memory: Literal["cold", "primed"] | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """Its code: torch comes with a network alone."""
        memory = ("bytelm.cli.online", "bytelm.online.coding", "bytelm.online.memory")
        return (*memory, "bytelm.compress.stream", "bytelm.lm") if self.network else memory

    def missing(self) -> None:
        """Nothing is."""

    def opened(self, before: bytes, run: Path) -> tuple[Any, Any]:
        """The network and the memory, or None in the place of either."""
        from bytelm.cli.online import opened
        from bytelm.lm import load

        memory = opened(run, self.memory)
        if self.memory == "primed" and memory is not None and memory.read_bytes != len(before):
            raise ValueError(
                f"memory.bin has read {memory.read_bytes} bytes of {len(before)}: run `bytelm prime` again"
            )
        return load(run) if self.network else None, memory

    def compress(self, data: bytes, before: bytes, run: Path) -> tuple[bytes, int]:
        from bytelm.online.coding import Encoder

        lm, memory = self.opened(before, run)
        if lm is not None:
            from bytelm.compress.stream import compress

            packed = compress(lm.model, data, lm.context, memory=memory)
        else:
            encoder = Encoder()
            encoder.put(memory, data)
            packed = len(data).to_bytes(SIZE, "little") + encoder.end()
        return packed, len(packed)

    def loss(self, data: bytes, packed: bytes, before: bytes, run: Path) -> float:
        """Bits that coding has beyond the sum of the log-probabilities of what was coded; the header is not counted."""
        lm, memory = self.opened(before, run)
        if lm is None:
            nats = memory.nats(np.frombuffer(data, np.uint8)).sum()
            return 8 * (len(packed) - SIZE) - float(nats) / math.log(2)
        from bytelm.compress.header import opened
        from bytelm.compress.windows import Streams

        header, coded = opened(lm.model, packed)
        parts = Streams(header.size, header.streams)  # of which each is predicted from its own bytes alone
        found = [
            lm.bits(data[start : start + size], online=memory if memory is None else memory.clone())[0]
            for start, size in zip(parts.starts.tolist(), parts.sizes.tolist(), strict=True)
        ]
        return 8 * sum(map(len, coded)) - sum(found)

    def decompress(self, packed: bytes, before: bytes, run: Path) -> bytes:
        from bytelm.online.coding import Decoder

        lm, memory = self.opened(before, run)
        if lm is not None:
            from bytelm.compress.stream import decompress

            return decompress(lm.model, packed, memory=memory)
        decoder = Decoder(packed[SIZE:])
        return bytes(decoder.get(memory) for _ in range(int.from_bytes(packed[:SIZE], "little")))


ALONE, MODEL_ALONE, BOTH = "bytelm, memory alone", "bytelm, model alone", "bytelm, model and memory"
METHODS: dict[str, Peer | Ours] = {
    **PEERS,
    ALONE: Ours(False, "cold"),
    MODEL_ALONE: Ours(True),
    BOTH: Ours(True, "cold"),
    **{name + PRIMED: peer for name, peer in PEERS.items() if peer.reach > 1 << 20},
    ALONE + PRIMED: Ours(False, "primed"),
    BOTH + PRIMED: Ours(True, "primed"),
}


def peak() -> int:
    """The most memory that was resident in this process or in one that it started, in bytes; 0 where nobody says."""
    status = Path("/proc/self/status")  # and not rusage, which begins with that of the process that started this one
    found = re.search(r"VmHWM:\s*(\d+)", status.read_text()) if status.exists() else None
    started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return max(int(found[1]), started) * 1024 if found else 0


def processor() -> float:
    """Seconds of the processor, of this process and of those that it started."""
    return sum(os.times()[:4])


def packed_file(name: str, folder: Path) -> Path:
    """What a method has compressed; what it restores has the suffix .restored."""
    return folder / (re.sub(r"\W+", "-", name) + ".packed")


def work(direction: str, name: str, folder: Path, run: Path) -> dict[str, float]:
    """One direction of one method, and what it took. Raises ValueError, ImportError and BytelmError."""
    method = METHODS[name]
    for module in method.modules:
        importlib.import_module(module)
    before = (folder / "before").read_bytes() if name.endswith(PRIMED) else b""
    packed = packed_file(name, folder)
    source = (folder / "data" if direction == "compress" else packed).read_bytes()
    began, clock = processor(), time.perf_counter()
    if direction == "compress":
        made, size = method.compress(source, before, run)
    else:
        made, size = method.decompress(source, before, run), len(source)
    found = {"bytes": size, "seconds": processor() - began, "wall": time.perf_counter() - clock}
    (packed if direction == "compress" else packed.with_suffix(".restored")).write_bytes(made)
    found["peak_bytes"] = peak()
    if direction == "compress" and isinstance(method, Ours):
        found["loss_bits"] = method.loss(source, made, before, run)
    return found


if __name__ == "__main__":
    print(json.dumps(work(sys.argv[1], sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4]))))
