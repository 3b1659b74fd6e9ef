"""The patching schemes against their rules written out byte by byte, and what follows from where patches open."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bytelm.errors import ConfigError
from bytelm.patching import entropy, fixed, space
from bytelm.patching.base import Guard, Patcher
from bytelm.patching.layout import Layout, Rows, at_end, forced_openings, since, tail
from bytelm.testing import ScriptedEntropyModel
from bytelm.units import BOS, EOS, PAD

FREE: dict[str, Any] = {"max_length": None, "max_single_byte_run": None}


def patches(patcher: Patcher, data: bytes) -> list[bytes]:
    """The patches of a document, BOS left out."""
    opens, _ = patcher.extend(torch.tensor([[BOS, *data]]))
    starts = [i for i, opened in enumerate(opens[0].tolist()) if opened and i < len(data)]
    return [data[a:b] for a, b in itertools.pairwise([*starts, len(data)])]


# --- the schemes ------------------------------------------------------------------------------------------------------


def test_space_patches_end_after_a_spacelike_byte() -> None:
    assert patches(space.Config().build(), b"The quick fox, jumps ") == [b"The ", b"quick ", b"fox,", b" jumps "]


@given(st.binary() | st.text().map(str.encode))
def test_space_patches_are_those_of_the_rule(data: bytes) -> None:
    def spacelike(byte: int) -> bool:
        return not (chr(byte).isalnum() and byte < 128) and not 0x80 <= byte <= 0xBF

    before = [True, *map(spacelike, data)]  # a BOS is spacelike
    wanted, patch = list[bytes](), b""
    for index, byte in enumerate(data):
        patch += bytes([byte])
        if spacelike(byte) and not before[index]:
            wanted, patch = [*wanted, patch], b""
    assert patches(space.Config(**FREE).build(), data) == [p for p in (*wanted, patch) if p]


@given(st.binary(), st.integers(1, 9))
def test_fixed_patches_have_their_size(data: bytes, size: int) -> None:
    assert patches(fixed.Config(size).build(), data) == [data[i : i + size] for i in range(0, len(data), size)]


SCRIPT = {BOS: 1.0, ord("a"): 0.5, ord("b"): 2.0, ord("c"): 2.5, ord("d"): 4.0}
RULES: dict[str, Callable[[float, float], bool]] = {
    "threshold": lambda now, before: now > 2.25,
    "relative": lambda now, before: now - before > 1.0,
    "both": lambda now, before: now > 2.25 and now - before > 1.0,
}


@given(st.lists(st.sampled_from(b"abcd")).map(bytes))
@pytest.mark.parametrize("rule", RULES)
def test_entropy_patches_are_those_of_the_rule(rule: str, data: bytes) -> None:
    """The entropy after each byte is known: a patch ends where that of the byte to come meets the rule."""
    config = entropy.Config(threshold=2.25, relative_threshold=1.0, rule=rule, **FREE)
    wanted, patch, before = list[bytes](), b"", SCRIPT[BOS]
    for byte in data:
        patch += bytes([byte])
        if RULES[rule](SCRIPT[byte], before):
            wanted, patch = [*wanted, patch], b""
        before = SCRIPT[byte]
    assert patches(config.build(ScriptedEntropyModel(SCRIPT)), data) == [p for p in (*wanted, patch) if p]


def test_an_entropy_equal_to_the_threshold_opens_nothing() -> None:
    at = entropy.Config(threshold=2.0, **FREE).build(ScriptedEntropyModel({}, 2.0))
    below = entropy.Config(threshold=1.9999, **FREE).build(ScriptedEntropyModel({}, 2.0))
    assert patches(at, b"abc") == [b"abc"]
    assert patches(below, b"abc") == [b"a", b"b", b"c"]


def test_entropy_needs_the_thresholds_of_its_rule() -> None:
    for config, missing in (
        (entropy.Config(), "threshold"),
        (entropy.Config(threshold=1.0, rule="both"), "relative_threshold"),
    ):
        with pytest.raises(ConfigError, match=rf"patching\.{missing} is not set"):
            config.build(ScriptedEntropyModel({}))
    with pytest.raises(ConfigError, match="known: threshold, relative, both"):
        entropy.Config(rule="fall")


# --- the guard --------------------------------------------------------------------------------------------------------


def test_every_byte_a_surprise_costs_a_quarter_of_them() -> None:
    patcher = entropy.Config(threshold=1.0).build(ScriptedEntropyModel({}, 5.0))
    found = patches(patcher, bytes(range(256)) * 4)
    assert [len(patch) for patch in found[:17]] == [1] * 16 + [4]  # the patch of BOS is no one-byte patch
    assert {len(patch) for patch in found[17:-1]} == {4}


def test_a_document_is_cut_as_alone_whatever_was_dense_before_it() -> None:
    patcher = entropy.Config(threshold=1.0, max_single_byte_run=4).build(ScriptedEntropyModel({}, 5.0))
    alone, _ = patcher.extend(torch.tensor([[BOS, *b"abcdefghij"]]))
    packed, _ = patcher.extend(torch.tensor([[BOS, *b"xy", EOS, BOS, *b"abcdefghij"]]))
    assert packed[0, 4:].tolist() == alone[0].tolist()


def test_no_byte_a_surprise_costs_one_patch_a_bound() -> None:
    patcher = entropy.Config(threshold=9.0, max_length=5).build(ScriptedEntropyModel({}))
    assert [len(patch) for patch in patches(patcher, bytes(12))] == [5, 5, 2]


def test_noise_costs_little_more_than_a_quarter_of_its_bytes() -> None:
    noise = torch.randint(256, (8192,), generator=torch.Generator().manual_seed(0)).tolist()
    assert len(patches(space.Config().build(), bytes(noise))) < 8192 * 0.27


@given(st.lists(st.booleans(), min_size=1), st.none() | st.integers(1, 7), st.none() | st.integers(1, 7))
def test_the_guard_counts_as_written_out(proposed: list[bool], longest: int | None, singles: int | None) -> None:
    guard = Guard(longest, singles)
    rows = Rows.of(torch.zeros(1, len(proposed), dtype=torch.long))
    nothing = torch.zeros(1, len(proposed), dtype=torch.bool)
    found, _ = guard.apply(torch.tensor([proposed]), nothing, rows, guard.initial_state(1))
    gap = run = 0
    for proposal, opened in zip(proposed, found[0].tolist(), strict=True):
        run = run + 1 if proposal else 0
        stands = proposal and (singles is None or run <= singles or run % 4 == 0)
        gap = 0 if stands else gap + 1
        assert opened == (stands or (longest is not None and gap % longest == 0))


def test_a_guard_must_be_able_to_bound() -> None:
    with pytest.raises(ConfigError, match=r"patching\.max_length = 0: must be at least 1"):
        fixed.Config(0)
    with pytest.raises(ConfigError, match=r"patching\.max_single_byte_run = 0"):
        space.Config(max_single_byte_run=0)


# --- rows and layouts -------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from([PAD, BOS, 0, 65]), min_size=4, max_size=4), min_size=1, max_size=3))
def test_rows_move_real_ids_to_the_front_and_back(batch: list[list[int]]) -> None:
    ids = torch.tensor(batch)
    rows = Rows.of(ids)
    for index, line in enumerate(batch):
        real = [i for i in line if i != PAD]
        assert rows.ids[index, : rows.lengths[index]].tolist() == real
        assert rows.real[index].tolist() == [i < len(real) for i in range(4)]
    assert torch.equal(rows.restore(rows.ids), ids)
    assert torch.equal(rows.align(ids != PAD), rows.real)


def test_nul_is_a_byte_and_opens_nothing() -> None:
    rows = Rows.of(torch.tensor([[BOS, 0, 0, EOS, PAD]]))
    assert rows.lengths.tolist() == [4]
    forced = forced_openings(rows.ids, rows.starts(torch.tensor([0])))
    assert forced.tolist() == [[True, False, False, True, False]]
    middle = Rows.of(torch.tensor([[65, 66, BOS]]))
    assert middle.starts(torch.tensor([0])).tolist() == [[True, False, True]]
    assert middle.starts(torch.tensor([5])).tolist() == [[False, False, True]]


@given(st.lists(st.booleans(), min_size=1, max_size=9), st.integers(0, 3))
def test_since_counts_back_to_the_last_mark(marks: list[bool], carry: int) -> None:
    wanted, ago = list[int](), carry
    for mark in marks:
        ago = 0 if mark else ago + 1
        wanted.append(ago)
    assert since(torch.tensor([marks]), torch.tensor([carry]))[0].tolist() == wanted


def test_ends_and_tails() -> None:
    values, before = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([8, 9])
    assert at_end(values, torch.tensor([2, 0]), before).tolist() == [2, 9]
    assert tail(values, torch.tensor([3, 2]), 2).tolist() == [[2, 3], [4, 5]]


def layout(ids: list[int], opens: list[int], held: int = 0, slots: int = 0) -> Layout:
    rows = Rows.of(torch.tensor([ids]))
    decided = torch.tensor([opens], dtype=torch.bool)
    return Layout.of(decided, rows.starts(torch.tensor([slots])), rows, torch.tensor([held]), slots)


def of(tensor: Tensor) -> list[int]:
    return tensor[0].int().tolist()


def test_a_layout_is_the_picture_in_its_file() -> None:
    found = layout([BOS, *b"The cat"], [1, 0, 0, 0, 1, 0, 0, 0])
    assert (found.patches, of(found.counts[None]), of(found.held[None])) == (2, [2], [3])
    assert of(found.closed) == [1, 1, 1, 1, 2, 2, 2, 2]
    assert of(found.segment) == [0, 1, 1, 1, 1, 2, 2, 2]  # 2: of no patch that closes
    assert of(found.first) == [1, 0]


def test_held_bytes_are_the_front_of_the_first_patch() -> None:
    found = layout([*b"e cat"], [0, 1, 0, 0, 0], held=2, slots=3)
    assert of(found.segment) == [1, 0, 0, 0, 0, 1, 1, 1]  # the oldest slot is another row's
    assert (of(found.closed), of(found.held[None])) == ([0, 1, 1, 1, 1], [3])


def test_a_document_that_starts_leaves_an_open_patch_behind() -> None:
    found = layout([65, BOS, 66], [0, 1, 0], held=1, slots=1)
    assert of(found.segment) == [1, 1, 0, 1]  # the patch that closes at BOS is BOS alone
    assert of(found.first) == [1]
