"""The kernel does what the definition says, bit for bit, at every level that this machine runs."""

from __future__ import annotations

import ctypes
import hashlib

import numpy as np
import pytest

from bytelm.native import library
from bytelm.native.online import kernel, typed
from bytelm.online import tables
from bytelm.online.engine import Kernel, Python
from bytelm.online.layout import Layout
from bytelm.online.settings import TEXT, Settings
from online_inputs import inputs, logs

MEMORY = 1 << 20
FAR = ("order:1", "order:2", "stride:96", "order:12", "match:4")
PLANES = ("plane:3:3:24:1", "plane:1:5:0:0", "plane:7:5:5:0", "plane:2:9:0:4")
WAVES = ("wave:1:255:0", "wave:2:128:1", "wave:7:3:0", "order:0")
FIELDS = ("field:1:0", "field:24:5", "field:3:15", "field:70:8", "field:2:2")
pytestmark = pytest.mark.skipif(not library.compilers(), reason="no C++ compiler")


def opened(settings: Settings, library: ctypes.CDLL | None = None) -> Kernel:
    layout = Layout(settings)
    arena = np.zeros(layout.size, np.uint8)
    layout.begin(arena)
    found = library or kernel()
    assert found is not None
    return Kernel(found, arena)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("predictors", [TEXT, FAR, PLANES, WAVES, FIELDS, ("order:0",)])
@pytest.mark.parametrize("kind", inputs())
def test_kernel_and_definition_agree(kind: str, predictors: tuple[str, ...], beside: bool) -> None:
    settings = Settings(predictors, MEMORY)
    data = inputs()[kind][:90]
    logp = logs(len(data)) if beside else None
    fast = opened(settings)
    slow = Python(Layout(settings), opened(settings).arena)
    assert (fast.read(data, logp) == slow.read(data, logp)).all()
    assert (fast.arena == slow.arena).all()
    row = None if logp is None else logp[-1]
    assert (fast.nodes(row) == slow.nodes(row)).all()


def test_they_agree_where_samples_are_as_loud_as_can_be() -> None:
    """Cracks after near silence, and turns that take what a filter expects to its bounds."""
    cracks = np.where(np.arange(200) % 20, 1, 32767)
    turns = np.where(np.arange(200) // 9 % 2, 32767, -32768)
    loud = np.concatenate([cracks, turns, np.random.default_rng(3).integers(-32768, 32768, 60)])
    fast = opened(settings := Settings(("wave:1:255:0", "wave:2:255:1", "order:0"), MEMORY))
    slow = Python(Layout(settings), opened(settings).arena)
    data = loud.astype("<i2").view(np.uint8)
    assert (fast.read(data, None) == slow.read(data, None)).all() and (fast.arena == slow.arena).all()


def test_they_agree_where_slots_are_replaced_the_ring_goes_round_and_a_network_comes_and_goes() -> None:
    settings = Settings(TEXT, MEMORY)
    random = np.random.default_rng(2)
    fast = opened(settings)
    ring = Layout(settings).sizes["ring"]
    fast.read(random.choice(np.frombuffer(b"abcdefgh \n", np.uint8), ring - 40), None)
    slots = fast.arena[Layout(settings).places["slots"] :][: 64 * Layout(settings).slots].reshape(-1, 64)
    assert (slots[:, :2].any(1)).mean() > 0.99  # so that slots are replaced from here on
    slow = Python(Layout(settings), fast.arena.copy())
    data = np.concatenate([fast.arena[Layout(settings).places["ring"] :][ring // 2 :][:30], inputs()["random"][:20]])
    for logp in (None, logs(len(data)), None, logs(len(data), 1)):
        assert (fast.read(data, logp) == slow.read(data, logp)).all()
    assert (fast.arena == slow.arena).all()


@pytest.mark.parametrize("level", ["x86-64-v2", "x86-64-v3", "x86-64-v4", "arm64"])
def test_every_level_gives_the_same_bytes(level: str) -> None:
    if level not in library.levels():
        pytest.skip(f"this processor does not run {level}")
    data = np.tile(inputs()["text"], 20)
    logp = logs(len(data))
    own = opened(Settings(memory=MEMORY))
    built = typed(ctypes.CDLL(str(library.compiled("online", library.compilers()[0], level))))
    other = opened(Settings(memory=MEMORY), built)
    for some in (logp, None):
        assert (own.read(data, some) == other.read(data, some)).all()
    assert (own.arena == other.arena).all()


def test_tables_are_the_same_everywhere() -> None:
    assert hashlib.sha256(tables.blob().tobytes()).hexdigest()[:16] == "89feaa65ae4e7425"


def test_tables_are_what_they_say() -> None:
    x = np.arange(-tables.WIDE, tables.WIDE) / tables.NAT
    assert abs(tables.squash() - tables.WHOLE / (1 + np.exp(-x))).max() <= 0.5
    p = (np.arange(4096) + 0.5) / 4096
    assert abs(tables.stretch() - tables.NAT * np.log(p / (1 - p))).max() <= 0.5 + 1e-9
    assert abs(tables.falling(4, 128) / 2**31 - np.exp(-np.arange(128) / 4)).max() < 2**-31
    assert abs(tables.mantissas() - tables.FINE * np.log(1 + (np.arange(2048) + 0.5) / 2048)).max() <= 0.5 + 1e-9
    after, states = tables.histories()
    assert len(states) <= 256 and all(n0 + n1 <= 48 for n0, n1, _ in states)
    assert states[after[0, 1]] == (0, 1, 1) and states[after[after[0, 1], 0]] == (1, 1, 0)
