"""Calls of the kernels, with the inputs they get and references that numpy computes in float64, for selftest.cpp.

The layout of weights, caches and structures is taken from the bindings (bytelm.native), so that it is theirs for ever.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bytelm.decoding.stacks import Layers
from bytelm.native import kernels as native
from bytelm.native import packing, training
from bytelm.native.kernels import Kernels, ThreadPool, tokens
from bytelm.native.library import library
from bytelm.native.weights import quantised
from bytelm.nn.norm import EPS
from bytelm.nn.transformer import Stack, StackConfig

CALL, NEAR, SAME = range(3)
INTEGER, REAL, ADDRESS = range(3)
KINDS = {"float64": 0, "float32": 1, "uint16": 2, "bfloat16": 2, "int64": 3}
TOTAL = 1 << 32  # of frequencies
POOLED = ((96, 48), (48, 48), (96, 48), (48, 48))  # weights of pooling
Array = NDArray[Any]
Held = Array | Tensor | ctypes.Structure | ctypes.Array[Any]


class Cases:
    """Steps for selftest.cpp, and the memory that they work on."""

    def __init__(self) -> None:
        self.buffers: list[bytes] = []
        self.places: list[tuple[int, int]] = []  # of the buffers here: address, bytes
        self.links: list[tuple[int, int, int, int]] = []
        self.steps: list[bytes] = []
        self.held: list[Any] = []  # so that no address is given out twice

    def hold(self, thing: Held) -> int:
        """The number of the buffer of an array or a structure, with what it holds when it is first named."""
        address, content = memory(thing)
        if (address, len(content)) in self.places:
            return self.places.index((address, len(content)))
        assert not any(begin < address + len(content) and address < begin + size for begin, size in self.places)
        number = len(self.buffers)
        self.buffers.append(content)
        self.places.append((address, len(content)))
        self.held.append(thing)
        if isinstance(thing, ctypes.Structure | ctypes.Array):
            for offset in pointers(type(thing)):
                (target,) = struct.unpack_from("q", content, offset)
                if target:
                    self.links.append((number, offset, *self.find(target)))
        return number

    def find(self, address: int) -> tuple[int, int]:
        """The buffer that an address lies in, and where in it."""
        for number, (begin, size) in enumerate(self.places):
            if begin <= address < begin + size:
                return number, address - begin
        raise ValueError("a structure points to memory that was not held")

    def call(self, name: str, *arguments: Held | int | float | None) -> None:
        """Call a function."""
        given = b""
        for argument in arguments:
            if isinstance(argument, float):
                given += struct.pack("qdq", REAL, argument, 0)
            elif argument is None or isinstance(argument, int):
                given += words(INTEGER, argument or 0, 0)
            else:
                given += words(ADDRESS, self.hold(argument), 0)
        self.steps.append(words(CALL) + text(name) + words(len(arguments)) + given)

    def near(self, name: str, found: Array | Tensor, reference: Array, tolerance: float) -> None:
        """Compare numbers with a reference of the same shape."""
        assert tuple(found.shape) == reference.shape
        kind = KINDS[str(found.dtype).removeprefix("torch.")]
        against = self.hold(np.ascontiguousarray(reference, np.float64))
        line = words(self.hold(found), kind, reference.size, against) + struct.pack("d", tolerance)
        self.steps.append(words(NEAR) + text(name) + line)

    def same(
        self, name: str, one: Array | Tensor, other: Array | Tensor, first: int = 0, second: int = 0, count: int = 0
    ) -> None:
        """Compare bits of `count` elements, from two places on; without a count all of the first array."""
        one_at, other_at, size = first * one.itemsize, second * other.itemsize, count * one.itemsize or one.nbytes
        places = words(self.hold(one), one_at, self.hold(other), other_at, size)
        self.steps.append(words(SAME) + text(name) + places)

    def write(self, file: Path) -> None:
        """All of it, as selftest.cpp reads it."""
        parts = [words(len(self.buffers)), *map(blob, self.buffers), words(len(self.links))]
        parts += [*(words(*link) for link in self.links), words(len(self.steps)), *self.steps]
        file.write_bytes(b"".join(parts))


def words(*values: int) -> bytes:
    return struct.pack(f"{len(values)}q", *values)


def blob(content: bytes) -> bytes:
    return words(len(content)) + content + bytes(-len(content) % 8)


def text(name: str) -> bytes:
    return blob(name.encode())


def memory(thing: Held) -> tuple[int, bytes]:
    """Where something lies, and what it holds."""
    if isinstance(thing, Tensor):
        assert thing.is_contiguous()
        return thing.data_ptr(), ctypes.string_at(thing.data_ptr(), thing.nbytes)
    if isinstance(thing, np.ndarray):
        assert thing.flags.c_contiguous
        return thing.ctypes.data, thing.tobytes()
    return ctypes.addressof(thing), bytes(thing)


def pointers(kind: Any) -> Iterator[int]:
    """Where addresses lie in a structure."""
    if issubclass(kind, ctypes.Array):
        for index in range(kind._length_):
            yield from (index * ctypes.sizeof(kind._type_) + offset for offset in pointers(kind._type_))
    elif issubclass(kind, ctypes.Structure):
        for name, part in kind._fields_:
            yield from (getattr(kind, name).offset + offset for offset in pointers(part))
    elif kind is ctypes.c_void_p or issubclass(kind, ctypes._Pointer):
        yield 0


# --- decoding ---------------------------------------------------------------------------------------------------------


def decoding() -> Cases:
    """Products, norms, embeddings, entropies, pooling, angles and whole stacks, in every precision."""
    cases, random = Cases(), np.random.default_rng(0)
    functions = library("kernels")  # for what decoders compute when they are built
    assert functions is not None
    for exact in (False, True):
        for weights in (None,) if exact else (None, "bf16", "int8"):
            kernels = Kernels(functions, exact, ThreadPool(1, 1), weights)
            products(cases, kernels, random)
            for dim in (64, 36):
                stacks(cases, kernels, StackConfig(2, dim, 2, 5, 10000.0), random)
        kernels = Kernels(functions, exact, ThreadPool(1, 1), None)
        pointwise(cases, kernels, random)
        of_logits(cases, kernels, random)
        pools(cases, kernels, random)
    turns(cases, random)
    return cases


def products(cases: Cases, kernels: Kernels, random: np.random.Generator) -> None:
    dtype, near = torch.float64 if kernels.exact else torch.float32, 1e-12 if kernels.exact else 1e-5
    for out, inner in ((70, 37), (200, 160)):
        weight = torch.from_numpy(random.standard_normal((out, inner)) / inner**0.5).to(dtype)
        matrix = packing.packed(weight, None if kernels.exact else kernels.weights)
        for held in matrix.held:
            if held is not None:
                cases.hold(held)
        x = random.standard_normal((13, inner)).astype(kernels.real)
        norm = (1 + random.standard_normal(inner) / 9).astype(kernels.real)
        reference = rms(x, norm) @ rounded(weight, kernels.weights).T
        name = f"linear, {out} x {inner}, {kernels.weights or dtype}"
        arguments = norm, EPS, x
        whole = np.zeros((13, out), kernels.real)
        cases.call("bytelm_linear", matrix, *arguments, whole, 13, int(kernels.exact), 1)
        cases.near(name, whole, reference, near)
        shared = np.zeros_like(whole)
        cases.call("bytelm_linear", matrix, *arguments, shared, 13, int(kernels.exact), 3)
        cases.same(f"{name}: on three threads", whole, shared)
        for first, count in ((0, 1), (12, 1), (3, 2), (2, 4), (1, 8)):
            some = np.zeros((count, out), kernels.real)
            cases.call(
                *("bytelm_linear", matrix, norm, EPS, x[first : first + count].copy(), some, count),
                *(int(kernels.exact), 1),
            )
            cases.same(f"{name}: rows {first} to {first + count - 1} by themselves", some, whole, 0, first * out)


def stacks(cases: Cases, kernels: Kernels, config: StackConfig, random: np.random.Generator) -> None:
    torch.manual_seed(1)
    stack = Stack(config).to(torch.float64 if kernels.exact else torch.float32)
    for parameter in stack.parameters():
        scale = 0.1 if parameter.ndim == 1 else config.dim**-0.5
        parameter.data = torch.randn_like(parameter) * scale + (parameter.ndim == 1)
    count, new = 9, (6, 2)  # positions of each row, and how many of them come first where they come in two calls
    x = random.standard_normal((2, count, config.dim)).astype(kernels.real)
    name = f"stack, width {config.dim}, {kernels.weights or kernels.real.__name__}"

    def run(layers: Layers, steps: list[tuple[int, int, int]]) -> Array:
        lines = np.concatenate([x[row, begin:end] for row, begin, end in steps])
        row = np.concatenate([np.full(end - begin, row) for row, begin, end in steps])
        position = np.concatenate([np.arange(begin, end) for _, begin, end in steps])
        batch = [row, position, np.zeros_like(row)]
        for held in (*batch, *layers.arrays, *(x for x in vars(layers).values() if isinstance(x, np.ndarray))):
            cases.hold(held)
        for matrix in layers.weights:
            for held in matrix.held:
                if held is not None:
                    cases.hold(held)
        cases.hold(layers.layers)
        threads = len(steps)
        cases.call("bytelm_stack", layers.stack, tokens(*batch), lines, int(kernels.exact), threads)
        return lines

    whole = run(Layers(kernels, stack, 2, 16), [(0, 0, count), (1, 0, count)])
    near = 1e-10 if kernels.exact else 1e-4 if kernels.weights is None else 0.05
    reference = forward(stack, x.astype(np.float64), kernels.weights)
    cases.near(name, whole, reference.reshape(-1, config.dim), near)
    layers = Layers(kernels, stack, 2, 16)
    begun = run(layers, [(0, 0, new[0]), (1, 0, new[1])])
    ended = run(layers, [(0, new[0], count), (1, new[1], count)])
    for row, first, second in ((0, 0, 0), (1, new[0], count - new[0])):
        for part, at, since, size in ((begun, first, 0, new[row]), (ended, second, new[row], count - new[row])):
            cases.same(
                f"{name}: row {row} from {since} on, in two calls",
                *(part, whole, at * config.dim, (row * count + since) * config.dim, size * config.dim),
            )


def pointwise(cases: Cases, kernels: Kernels, random: np.random.Generator) -> None:
    exact, near = int(kernels.exact), 1e-12 if kernels.exact else 1e-5
    x = random.standard_normal((5, 37)).astype(kernels.real)
    weight, out = (1 + random.standard_normal(37) / 9).astype(kernels.real), np.zeros_like(x)
    cases.call("bytelm_norm", weight, EPS, x, out, 5, 37, exact)
    cases.near("norm", out, rms(x, weight), near)
    logits, entropy = (3 * random.standard_normal((4, 261))).astype(kernels.real), np.zeros(4, kernels.real)
    cases.call("bytelm_entropy", logits, 4, 261, entropy, exact)
    share = softmax(logits.astype(np.float64))
    cases.near("entropy", entropy, -(share * np.log(share)).sum(1), near)
    other, found = random.standard_normal((5, 37)).astype(kernels.real), np.zeros(5, kernels.real)
    cases.call("bytelm_dots", x, other, 5, 37, found, exact)
    cases.near("dot products", found, (x.astype(np.float64) * other).sum(1), near)
    kinds = (torch.float64,) if exact else (torch.float32, torch.bfloat16)
    for dtype in kinds:
        table, ids = torch.from_numpy(random.standard_normal((9, 37))).to(dtype), np.array([3, 0, 8, 3])
        matrix, found = kernels.table(table), np.zeros((4, 37), kernels.real)
        cases.hold(matrix.held[0])
        cases.call("bytelm_embed", matrix, ids, found, 4, 0, exact)
        cases.near(f"embedding, {dtype}", found, table.double().numpy()[ids], 0.0)


def of_logits(cases: Cases, kernels: Kernels, random: np.random.Generator) -> None:
    """What coders are given, of lines of any length."""
    exact = int(kernels.exact)
    for lines, symbols in ((3, 256), (4, 261), (2, 3)):
        logits = (6 * random.standard_normal((lines, symbols))).astype(kernels.real)
        share, name = softmax(logits.astype(np.float64)), f"of {symbols} symbols, {kernels.real.__name__}"
        found = np.zeros((lines, symbols), np.int64)
        cases.call("bytelm_frequencies", logits, lines, symbols, TOTAL, found, exact)
        cases.near(f"frequencies {name}", found, np.floor(share * (TOTAL - symbols)) + 1, 1e-9)
        some = min(symbols, 256)
        among, logs = softmax(logits[:, :some].astype(np.float64)), np.zeros((lines, some), np.float32)
        cases.call("bytelm_log_probabilities", logits, lines, symbols, some, logs, exact)
        cases.near(f"log-probabilities {name}", logs, np.log(among), 1e-6)


def turns(cases: Cases, random: np.random.Generator) -> None:
    angles = np.concatenate([random.uniform(0, 10, 50), random.integers(0, 1 << 24, 50)])
    for place, name in enumerate(("cosines", "sines")):
        both = np.zeros(100), np.zeros(100)
        cases.call("bytelm_turns", angles, 100, *both)
        cases.near(name, both[place], (np.cos, np.sin)[place](angles), 1e-15)


def pools(cases: Cases, kernels: Kernels, random: np.random.Generator) -> None:
    """Patches of 1 to 20 bytes, which cross-attend to these."""
    dim, heads, queries, slots = 48, 4, 2, 24
    dtype, near = torch.float64 if kernels.exact else torch.float32, 1e-11 if kernels.exact else 1e-5
    weights = [torch.from_numpy(random.standard_normal(shape) / dim**0.5).to(dtype) for shape in POOLED]
    split, query, key_value, out = (packing.packed(weight) for weight in weights)
    states = random.standard_normal((1, slots, dim)).astype(kernels.real)
    query_norm, key_norm = ((1 + random.standard_normal(dim) / 9).astype(kernels.real) for _ in range(2))
    for held in (*(x.held[0] for x in (split, query, key_value, out)), states, query_norm, key_norm):
        cases.hold(held)
    layer = native.PoolLayer(*map(native.address, (states, query_norm, key_norm)), query, key_value, out)
    layers = native.array_of(native.PoolLayer, [layer])
    cases.hold(layers)
    pool = native.Pool(1, dim, heads, queries, slots, EPS, split, layers)
    row, first, last = np.zeros(3, np.int64), np.array([0, 1, 4]), np.array([0, 3, 23])
    found = np.zeros((3, queries * dim), kernels.real)
    cases.call("bytelm_pool", pool, row, first, last, 3, found, int(kernels.exact), 2)
    at, reference = states[0].astype(np.float64), np.zeros((3, queries * dim))
    w_split, w_query, w_key_value, w_out = (weight.double().numpy().T for weight in weights)
    for patch in range(3):
        own = at[first[patch] : last[patch] + 1]
        x = (own.max(0) @ w_split).reshape(queries, dim)
        key, value = np.split(rms(own, key_norm) @ w_key_value, 2, 1)
        asked = (rms(x, query_norm) @ w_query).reshape(queries, heads, -1)
        scores = np.einsum("qhd,khd->hqk", asked, key.reshape(len(own), heads, -1)) / (dim / heads) ** 0.5
        mixed = np.einsum("hqk,khd->qhd", softmax(scores), value.reshape(len(own), heads, -1)).reshape(queries, dim)
        reference[patch] = (2 * x + mixed @ w_out).ravel()
    cases.near(f"pooling, {dtype}", found, reference, near)


def rms(x: Array, weight: Array) -> Array:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight


def softmax(x: Array) -> Array:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rounded(weight: Tensor, weights: str | None) -> Array:
    """A weight as it is multiplied with."""
    if weights == "int8":
        whole, scale = quantised(weight)
        return whole.double().numpy() * scale.double().numpy()[:, None]
    return (weight.to(torch.bfloat16) if weights == "bf16" else weight).detach().double().numpy()


def rotated(x: Array, theta: float) -> Array:
    """Rotary positions of `[rows, places, heads, size]`."""
    angle = np.arange(x.shape[1])[:, None] * theta ** -(np.arange(0, x.shape[3], 2) / x.shape[3])
    turn = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
    return np.stack([turn.real, turn.imag], -1).reshape(x.shape)


def forward(stack: Stack, x: Array, weights: str | None) -> Array:
    """A stack over `[rows, places, dim]`, from its definition, but for the rounding of caches."""
    config = stack.config
    rows, places, _ = x.shape
    apart = np.arange(places)[:, None] - np.arange(places)
    seen = (apart >= 0) & (apart < (config.attention_window or places))
    for block in stack.blocks:
        of = {name: p.detach() for name, p in block.named_parameters()}
        norms = {name: of.pop(f"{name}.weight").double().numpy() for name in ("attention_norm", "feed_forward_norm")}
        matrix = {name.split(".")[1]: rounded(weight, weights) for name, weight in of.items()}
        qkv = rms(x, norms["attention_norm"]) @ matrix["qkv"].T
        query, key, value = qkv.reshape(rows, places, 3, config.heads, -1).transpose(2, 0, 1, 3, 4)
        query, key = rotated(query, config.theta), rotated(key, config.theta)
        scores = np.einsum("rqhd,rkhd->rhqk", query, key) / query.shape[-1] ** 0.5
        mixed = np.einsum("rhqk,rkhd->rqhd", softmax(np.where(seen, scores, -np.inf)), value)
        x = x + mixed.reshape(x.shape) @ matrix["out"].T
        gate, up = np.split(rms(x, norms["feed_forward_norm"]) @ matrix["gate_up"].T, 2, -1)
        x = x + (gate / (1 + np.exp(-gate)) * up) @ matrix["down"].T
    return x


# --- training ---------------------------------------------------------------------------------------------------------


def of_training() -> Cases:
    """Norms, gates and attention in both precisions, forward and backward."""
    cases, random = Cases(), np.random.default_rng(0)
    for dtype in (torch.bfloat16, torch.float32):
        norms(cases, dtype, random)
        gates(cases, dtype, random)
        attention(cases, dtype, random)
    return cases


def normal(dtype: torch.dtype, random: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(random.standard_normal(shape)).to(dtype)


def plain(x: Tensor) -> Array:
    return x.double().numpy()


def norms(cases: Cases, dtype: torch.dtype, random: np.random.Generator) -> None:
    lines, dim, wide = 70, 48, int(dtype == torch.float32)
    near = 1e-5 if wide else 0.01
    x, slope = normal(dtype, random, lines, dim), normal(dtype, random, lines, dim)
    weight = torch.from_numpy(1 + random.standard_normal(dim) / 9).float()
    y, factor = torch.zeros_like(x), torch.zeros(lines)
    cases.call("bytelm_norm", x, wide, weight, lines, dim, EPS, y, wide, factor, 2)
    by = 1 / np.sqrt((plain(x) ** 2).mean(1, keepdims=True) + EPS)
    cases.near(f"norm, {dtype}", y, plain(x) * by * plain(weight), near)
    cases.near(f"norm's factor, {dtype}", factor, by[:, 0], 1e-5)
    d_x, d_weight = torch.zeros_like(x), torch.zeros(2, dim)
    cases.call("bytelm_norm_back", x, wide, weight, factor, slope, wide, lines, dim, d_x, d_weight, 2)
    pulled = plain(slope) * plain(weight)
    back = (pulled - plain(x) * by**2 * (pulled * plain(x)).mean(1, keepdims=True)) * by
    cases.near(f"norm, gradient, {dtype}", d_x, back, near)
    strips = np.stack([(plain(slope) * plain(x) * by)[part].sum(0) for part in (slice(64), slice(64, None))])
    cases.near(f"norm, gradient of the weight, {dtype}", d_weight, strips, 1e-4)


def gates(cases: Cases, dtype: torch.dtype, random: np.random.Generator) -> None:
    lines, dim, wide = 70, 48, int(dtype == torch.float32)
    near = 1e-5 if wide else 0.01
    x, slope = normal(dtype, random, lines, 2 * dim), normal(dtype, random, lines, dim)
    y, d_x = torch.zeros_like(slope), torch.zeros_like(x)
    cases.call("bytelm_swiglu", x, wide, None, lines, dim, y, 2)
    gate, up = np.split(plain(x), 2, 1)
    part = 1 / (1 + np.exp(-gate))
    cases.near(f"gate, {dtype}", y, gate * part * up, near)
    cases.call("bytelm_swiglu", x, wide, slope, lines, dim, d_x, 2)
    d_gate = plain(slope) * up * part * (1 + gate * (1 - part))
    cases.near(f"gate, gradient, {dtype}", d_x, np.concatenate([d_gate, plain(slope) * gate * part], 1), near)


def attention(cases: Cases, dtype: torch.dtype, random: np.random.Generator) -> None:
    rows, queries, slots, heads, dim = 2, 70, 75, 2, 32
    query, d_out = (normal(dtype, random, rows, queries, heads, dim) for _ in range(2))
    keys, values = (normal(dtype, random, rows, slots, heads, dim) for _ in range(2))
    last = np.arange(queries) + slots - queries
    first = np.maximum(0, last - np.array([[20], [200]])).astype(np.int32)
    outs: list[tuple[Tensor, ...]] = []
    for threads in (1, 2):
        found = tuple(torch.zeros_like(x) for x in (query, query, keys, values))
        lse = torch.zeros(rows, heads, queries)
        for thing in (query, keys, values, first, lse, d_out, *found):
            cases.hold(thing)
        shape = training.Attend(
            *(rows, heads, dim, queries, slots),
            *(x.data_ptr() for x in (query, keys, values)),
            *(training.strides(x) for x in (query, keys, values)),
            *(first.ctypes.data, queries, found[0].data_ptr(), lse.data_ptr(), d_out.data_ptr()),
            *(x.data_ptr() for x in found[1:]),
        )
        for back in (0, 1):
            cases.call("bytelm_attend", shape, int(dtype == torch.float32), back, threads)
        outs.append(found)
    q, k, v, d = map(plain, (query, keys, values, d_out))
    at = np.arange(slots)
    seen = (at >= first[..., None]) & (at <= last[:, None])
    share = softmax(np.where(seen[:, None], np.einsum("rqhd,rkhd->rhqk", q, k) / dim**0.5, -np.inf))
    pull = np.einsum("rqhd,rkhd->rhqk", d, v)
    slope = share * (pull - (share * pull).sum(-1, keepdims=True)) / dim**0.5
    references = [np.einsum("rhqk,rkhd->rqhd", share, v), np.einsum("rhqk,rkhd->rqhd", slope, k)]
    references += [np.einsum("rhqk,rqhd->rkhd", slope, q), np.einsum("rhqk,rqhd->rkhd", share, d)]
    for name, one, two, reference in zip(("", " (queries)", " (keys)", " (values)"), *outs, references, strict=True):
        what = f"attention{name and ', gradient'}{name}, {dtype}"
        cases.near(what, one, reference, 0.03 if dtype == torch.bfloat16 else 1e-4)
        cases.same(f"{what}: on two threads", one, two)
