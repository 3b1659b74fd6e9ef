"""Fused kernels of a GPU besides matmuls, in Triton: each program reads its tile once, and writes its result once.

Sums and products are in float32 whatever is read and written, offsets are in 64 bits (n-gram tables hold more than
2³¹ numbers), and nothing is added by atomics: equal inputs give equal bits. `device_kernels` starts them.
"""

# Triton has no types of its own, its functions are Python in name only, and it is not there on a CPU.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import no_type_check

import triton
import triton.language as tl

# Triton recompiles for whole numbers that are 1 or multiples of 16, and for addresses that are. These change from
# step to step, and would gain nothing.
COUNTS = ["lines", "tokens", "places", "slots", "runs", "bytes", "new", "bags"]
EDGES = ["first", "last"]
kernel = triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=EDGES)


@kernel
@no_type_check
def norm(x, weight, y, factors, lines, eps, WIDTH: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr):
    """y = x · factors · weight `[lines, WIDTH]`; factors = 1 / rms(x) `[lines]`."""
    line = tl.program_id(0).to(tl.int64) * LINES + tl.arange(0, LINES)
    column = tl.arange(0, COLUMNS)
    here = (line < lines)[:, None] & (column < WIDTH)
    at = line[:, None] * WIDTH + column
    numbers = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    factor = tl.rsqrt(tl.sum(numbers * numbers, 1) / WIDTH + eps)
    gain = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(factors + line, factor, mask=line < lines)
    tl.store(y + at, (numbers * factor[:, None] * gain).to(y.dtype.element_ty), mask=here)


@kernel
@no_type_check
def norm_back(
    x, weight, factors, d_y, d_x, d_weight, lines, WIDTH: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr
):
    """`d_x`, and a part of the sum for `d_weight` `[programs, WIDTH]` each: lines are dealt out to programs in turn."""
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    gain = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    added = tl.zeros((LINES, COLUMNS), tl.float32)
    first = program.to(tl.int64) * LINES
    while first < lines:
        line = first + tl.arange(0, LINES)
        here = (line < lines)[:, None] & (column < WIDTH)
        at = line[:, None] * WIDTH + column
        factor = tl.load(factors + line, mask=line < lines, other=0.0)[:, None]
        unit = tl.load(x + at, mask=here, other=0.0).to(tl.float32) * factor
        gradient = tl.load(d_y + at, mask=here, other=0.0).to(tl.float32)
        added += gradient * unit
        gradient *= gain
        along = tl.sum(gradient * unit, 1)[:, None] / WIDTH
        tl.store(d_x + at, ((gradient - unit * along) * factor).to(d_x.dtype.element_ty), mask=here)
        first += tl.num_programs(0) * LINES
    tl.store(d_weight + program * WIDTH + column, tl.sum(added, 0), mask=column < WIDTH)


@kernel
@no_type_check
def swiglu(x, y, lines, WIDTH: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr):
    """y `[lines, WIDTH]` = silu(gate) · up, of x `[lines, 2 WIDTH]`."""
    program = tl.program_id(0)
    line = (program // ACROSS).to(tl.int64) * LINES + tl.arange(0, LINES)
    column = program % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    here = (line < lines)[:, None] & (column < WIDTH)
    at = line[:, None] * (2 * WIDTH) + column
    gate = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(x + at + WIDTH, mask=here, other=0.0).to(tl.float32)
    tl.store(y + line[:, None] * WIDTH + column, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=here)


@kernel
@no_type_check
def swiglu_back(
    x, d_y, d_x, lines, WIDTH: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr
):
    """`d_x` `[lines, 2 WIDTH]`."""
    program = tl.program_id(0)
    line = (program // ACROSS).to(tl.int64) * LINES + tl.arange(0, LINES)
    column = program % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    here = (line < lines)[:, None] & (column < WIDTH)
    at = line[:, None] * (2 * WIDTH) + column
    gate = tl.load(x + at, mask=here, other=0.0).to(tl.float32)
    up = tl.load(x + at + WIDTH, mask=here, other=0.0).to(tl.float32)
    gradient = tl.load(d_y + line[:, None] * WIDTH + column, mask=here, other=0.0).to(tl.float32)
    open = tl.sigmoid(gate)
    d_gate = gradient * up * open * (1 + gate * (1 - open))
    tl.store(d_x + at, d_gate.to(d_x.dtype.element_ty), mask=here)
    tl.store(d_x + at + WIDTH, (gradient * gate * open).to(d_x.dtype.element_ty), mask=here)


@kernel
@no_type_check
def read(x, row, place, number, row_step, place_step, head_step, here, HEAD: tl.constexpr):
    """A tile of `[rows, places, heads, HEAD]` at any strides, heads in one line."""
    at = (row * row_step + place * place_step)[:, None] + (number // HEAD).to(tl.int64) * head_step + number % HEAD
    return tl.load(x + at, mask=here, other=0.0).to(tl.float32)


@kernel
@no_type_check
def turn(
    x0, x1, x2, cosines, sines, y, tokens, places,
    row0, place0, head0, row1, place1, head1, row2, place2, head2, angle_row, angle_place,
    SIGN: tl.constexpr, PARTS: tl.constexpr, HEAD: tl.constexpr,
    WIDTH: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """y `[rows, places, PARTS, heads, HEAD]`: x0 and x1, their pairs turned by SIGN times the angles, and x2."""
    program, part = tl.program_id(0), tl.program_id(1)
    token = (program // ACROSS).to(tl.int64) * LINES + tl.arange(0, LINES)
    row, place = token // places, token % places
    number = program % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    here = (token < tokens)[:, None] & (number < WIDTH)
    if part == 0:
        numbers = read(x0, row, place, number, row0, place0, head0, here, HEAD)
    elif part == 1:
        numbers = read(x1, row, place, number, row1, place1, head1, here, HEAD)
    else:
        numbers = read(x2, row, place, number, row2, place2, head2, here, HEAD)
    pair = program % ACROSS * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    at = (row * angle_row + place * angle_place)[:, None] + pair % (HEAD // 2)
    turned = (token < tokens)[:, None] & (pair < WIDTH // 2) & (part < 2)  # the third part is only copied
    cosine = tl.load(cosines + at, mask=turned, other=1.0)
    sine = tl.load(sines + at, mask=turned, other=0.0) * SIGN
    even, odd = tl.split(tl.reshape(numbers, (LINES, COLUMNS // 2, 2)))
    numbers = tl.reshape(tl.join(even * cosine - odd * sine, even * sine + odd * cosine), (LINES, COLUMNS))
    at = (token * PARTS + part)[:, None] * WIDTH + number
    tl.store(y + at, numbers.to(y.dtype.element_ty), mask=here)


@kernel
@no_type_check
def edges(segment, first, last, slots, BLOCK: tl.constexpr):
    """The first slot of each run, and the slot behind its last."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(segment + slot, mask=slot < slots, other=0)
    before = tl.load(segment + slot - 1, mask=(slot > 0) & (slot < slots), other=-1)
    after = tl.load(segment + slot + 1, mask=slot + 1 < slots, other=-1)
    tl.store(first + own, slot.to(tl.int32), mask=(slot < slots) & (own != before))
    tl.store(last + own, slot.to(tl.int32) + 1, mask=(slot < slots) & (own != after))


@kernel
@no_type_check
def maxima(values, first, last, y, best, WIDTH: tl.constexpr, COLUMNS: tl.constexpr):
    """y `[runs, WIDTH]`, and the slot of each maximum, -1 where a run has none."""
    run = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < WIDTH
    slot, end = tl.load(first + run), tl.load(last + run)
    highest = tl.full((COLUMNS,), float("-inf"), tl.float32)
    chosen = tl.full((COLUMNS,), -1, tl.int32)
    while slot < end:
        found = tl.load(values + slot.to(tl.int64) * WIDTH + column, mask=here, other=0.0).to(tl.float32)
        better = (found > highest) | (found != found)  # what is not a number stays so
        highest = tl.where(better, found, highest)
        chosen = tl.where(better, slot, chosen)
        slot += 1
    highest = tl.where(chosen < 0, 0.0, highest)
    tl.store(y + run * WIDTH + column, highest.to(y.dtype.element_ty), mask=here)
    tl.store(best + run * WIDTH + column, chosen, mask=here)


@kernel
@no_type_check
def maxima_back(
    d_y, best, segment, d_values, slots, runs,
    WIDTH: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """`d_values` `[slots, WIDTH]`: each slot looks whether it was the maximum of its run."""
    program = tl.program_id(0)
    slot = (program // ACROSS).to(tl.int64) * LINES + tl.arange(0, LINES)
    column = program % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    own = tl.load(segment + slot, mask=slot < slots, other=runs)
    at = own[:, None] * WIDTH + column
    chosen = tl.load(best + at, mask=(own < runs)[:, None] & (column < WIDTH), other=-1)
    gradient = tl.load(d_y + at, mask=chosen == slot[:, None], other=0.0)
    tl.store(d_values + slot[:, None] * WIDTH + column, gradient, mask=(slot < slots)[:, None] & (column < WIDTH))


@kernel
@no_type_check
def hashes(
    ids, starts, recent, index, bytes, new, reach, rows, PRIMES: tl.constexpr, SIZES: tl.constexpr,
    LONGEST: tl.constexpr, OFFSET: tl.constexpr, PAD: tl.constexpr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """index `[bytes, tables]`: the table row of every n-gram that ends at each byte."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = byte < bytes
    row, place = byte // new, byte % new
    for function in tl.static_range(len(PRIMES)):
        hashed = tl.zeros((BLOCK,), tl.int64)
        inside = here  # of the document of the byte
        for ago in tl.static_range(LONGEST):
            read = tl.load(ids + byte - ago, mask=inside & (place >= ago), other=PAD)
            read = tl.load(recent + row * reach + (reach + place - ago), mask=inside & (place < ago), other=read)
            # The newest id has the highest power: each older one moves all that came before it up by one.
            hashed = hashed * PRIMES[function] + (read + OFFSET) % VOCAB
            for size in tl.static_range(len(SIZES)):
                if SIZES[size] == ago + 1:
                    table = function * len(SIZES) + size
                    found = hashed % rows
                    found = tl.where(found < 0, found + rows, found) + table * rows
                    tl.store(index + byte * (len(PRIMES) * len(SIZES)) + table, found, mask=here)
            inside = inside & (tl.load(starts + byte - ago, mask=here & (place >= ago), other=0) == 0)


@kernel
@no_type_check
def sum_rows(
    table, index, y, bags, TABLES: tl.constexpr,
    WIDTH: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, ACROSS: tl.constexpr,
):  # fmt: skip
    """y `[bags, WIDTH]`: the sum of TABLES rows each."""
    program = tl.program_id(0)
    bag = (program // ACROSS).to(tl.int64) * LINES + tl.arange(0, LINES)
    column = program % ACROSS * COLUMNS + tl.arange(0, COLUMNS)
    here = (bag < bags)[:, None] & (column < WIDTH)
    total = tl.zeros((LINES, COLUMNS), tl.float32)
    for each in range(TABLES):
        row = tl.load(index + bag * TABLES + each, mask=bag < bags, other=0)
        total += tl.load(table + row[:, None] * WIDTH + column, mask=here, other=0.0).to(tl.float32)
    tl.store(y + bag[:, None] * WIDTH + column, total.to(y.dtype.element_ty), mask=here)


@kernel
@no_type_check
def attend_run(
    query, keys, values, first, last, y, lse, scale,
    PARTS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y `[runs, PARTS, HEADS, HEAD]`: each part of a run attends the run's bytes. lse: log of the sum of exponents."""
    part, head, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, COLUMNS)
    wide = column < HEAD
    byte, end = tl.load(first + part // PARTS), tl.load(last + part // PARTS)
    at = (part * HEADS + head) * HEAD + column
    asked = tl.load(query + at, mask=wide, other=0.0).to(tl.float32) * scale
    highest, total, mixed = -float("inf"), 0.0, tl.zeros((COLUMNS,), tl.float32)
    while byte < end:
        own = byte + tl.arange(0, BLOCK)
        there = (own.to(tl.int64)[:, None] * HEADS + head) * HEAD + column
        here = (own < end)[:, None] & wide
        scores = tl.sum(tl.load(keys + there, mask=here, other=0.0).to(tl.float32) * asked, 1)
        scores = tl.where(own < end, scores, -float("inf"))
        above = tl.maximum(highest, tl.max(scores, 0))
        weights, before = tl.exp(scores - above), tl.exp(highest - above)
        mixed = mixed * before + tl.sum(
            tl.load(values + there, mask=here, other=0.0).to(tl.float32) * weights[:, None], 0
        )
        total = total * before + tl.sum(weights, 0)
        highest = above
        byte += BLOCK
    total = tl.where(total > 0.0, total, 1.0)  # a run without bytes
    tl.store(y + at, (mixed / total).to(y.dtype.element_ty), mask=wide)
    tl.store(lse + part * HEADS + head, highest + tl.log(total))


@kernel
@no_type_check
def attend_parts(
    query, keys, values, segment, y, lse, slots, scale,
    PARTS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y `[slots, HEADS, HEAD]`: each byte attends the parts of its own run. lse: log of the sum of exponents."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    head, column = tl.program_id(1), tl.arange(0, COLUMNS)
    real = byte < slots
    here = real[:, None] & (column < HEAD)
    own = tl.load(segment + byte, mask=real, other=0).to(tl.int64)
    at = (byte[:, None] * HEADS + head) * HEAD + column
    asked = tl.load(query + at, mask=here, other=0.0).to(tl.float32) * scale
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    total, mixed = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK, COLUMNS), tl.float32)
    for part in tl.static_range(PARTS):
        there = ((own * PARTS + part)[:, None] * HEADS + head) * HEAD + column
        scores = tl.sum(tl.load(keys + there, mask=here, other=0.0).to(tl.float32) * asked, 1)
        above = tl.maximum(highest, scores)
        weights, before = tl.exp(scores - above), tl.exp(highest - above)
        mixed = (
            mixed * before[:, None] + tl.load(values + there, mask=here, other=0.0).to(tl.float32) * weights[:, None]
        )
        total = total * before + weights
        highest = above
    tl.store(y + at, (mixed / total[:, None]).to(y.dtype.element_ty), mask=here)
    tl.store(lse + byte * HEADS + head, highest + tl.log(total), mask=real)


@kernel
@no_type_check
def slopes_of_parts(
    query, keys, values, d_y, lse, along, first, last, d_one, d_two, scale, ASKS: tl.constexpr,
    PARTS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of the parts of runs: of queries if parts query (`d_one`), else of keys and values; over a run's bytes.

    along: the sum of y · d_y of each query.
    """
    part, head, column = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, COLUMNS)
    wide = column < HEAD
    byte, end = tl.load(first + part // PARTS), tl.load(last + part // PARTS)
    at, line = (part * HEADS + head) * HEAD + column, part * HEADS + head
    one, two = tl.zeros((COLUMNS,), tl.float32), tl.zeros((COLUMNS,), tl.float32)
    while byte < end:
        own = (byte + tl.arange(0, BLOCK)).to(tl.int64)
        real = own < end
        lines = own * HEADS + head
        there, here = lines[:, None] * HEAD + column, real[:, None] & wide
        if ASKS:
            asked = tl.load(query + at, mask=wide, other=0.0).to(tl.float32)[None, :]
            gradient = tl.load(d_y + at, mask=wide, other=0.0).to(tl.float32)[None, :]
            key = tl.load(keys + there, mask=here, other=0.0).to(tl.float32)
            value = tl.load(values + there, mask=here, other=0.0).to(tl.float32)
            level, mean = tl.load(lse + line), tl.load(along + line)
        else:
            asked = tl.load(query + there, mask=here, other=0.0).to(tl.float32)
            gradient = tl.load(d_y + there, mask=here, other=0.0).to(tl.float32)
            key = tl.load(keys + at, mask=wide, other=0.0).to(tl.float32)[None, :]
            value = tl.load(values + at, mask=wide, other=0.0).to(tl.float32)[None, :]
            level = tl.load(lse + lines, mask=real, other=0.0)
            mean = tl.load(along + lines, mask=real, other=0.0)
        weights = tl.where(real, tl.exp(tl.sum(asked * key, 1) * scale - level), 0.0)
        scores = weights * (tl.sum(gradient * value, 1) - mean) * scale
        if ASKS:
            one += tl.sum(scores[:, None] * key, 0)
        else:
            one += tl.sum(scores[:, None] * asked, 0)
            two += tl.sum(weights[:, None] * gradient, 0)
        byte += BLOCK
    tl.store(d_one + at, one.to(d_one.dtype.element_ty), mask=wide)
    if not ASKS:
        tl.store(d_two + at, two.to(d_two.dtype.element_ty), mask=wide)


@kernel
@no_type_check
def slopes_of_bytes(
    query, keys, values, d_y, lse, along, segment, d_one, d_two, slots, runs, scale, ASKS: tl.constexpr,
    PARTS: tl.constexpr, HEADS: tl.constexpr, HEAD: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of bytes: of queries if bytes query (`d_one`), else of keys and values; over the parts of their run."""
    byte = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    head, column = tl.program_id(1), tl.arange(0, COLUMNS)
    own = tl.load(segment + byte, mask=byte < slots, other=runs).to(tl.int64)
    real = own < runs  # others are of no run, and are neither seen nor see
    wide = (column < HEAD)[None, :]
    lines = byte * HEADS + head
    at, here = lines[:, None] * HEAD + column, real[:, None] & wide
    one, two = tl.zeros((BLOCK, COLUMNS), tl.float32), tl.zeros((BLOCK, COLUMNS), tl.float32)
    for part in tl.static_range(PARTS):
        others = (own * PARTS + part) * HEADS + head
        there = others[:, None] * HEAD + column
        asks, asked_from, seen = (at, lines, there) if ASKS else (there, others, at)
        asked = tl.load(query + asks, mask=here, other=0.0).to(tl.float32)
        gradient = tl.load(d_y + asks, mask=here, other=0.0).to(tl.float32)
        key = tl.load(keys + seen, mask=here, other=0.0).to(tl.float32)
        value = tl.load(values + seen, mask=here, other=0.0).to(tl.float32)
        level = tl.load(lse + asked_from, mask=real, other=0.0)
        mean = tl.load(along + asked_from, mask=real, other=0.0)
        weights = tl.where(real, tl.exp(tl.sum(asked * key, 1) * scale - level), 0.0)
        scores = weights * (tl.sum(gradient * value, 1) - mean) * scale
        if ASKS:
            one += scores[:, None] * key
        else:
            one += scores[:, None] * asked
            two += weights[:, None] * gradient
    inside = (byte < slots)[:, None] & wide
    tl.store(d_one + at, one.to(d_one.dtype.element_ty), mask=inside)
    if not ASKS:
        tl.store(d_two + at, two.to(d_two.dtype.element_ty), mask=inside)
