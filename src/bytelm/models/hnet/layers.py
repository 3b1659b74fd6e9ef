"""Stacks of the published H-Nets: layers of Mamba-2 and of attention, in any order.

    m   x + mamba(norm x)            M   the same, then h + feed_forward(norm h)
    t   x + attention(norm x)        T   the same: a block of `nn.transformer`

A number behind a letter says how often, as in "T1m4". Of attention, the first numbers of a head have rotary positions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bytelm.nn.attention import Attention, Cache, CausalPattern, RowPositions, pairs
from bytelm.nn.mamba import CHUNK, Mamba2, MambaConfig, MambaState
from bytelm.nn.norm import RMSNorm
from bytelm.nn.transformer import FeedForward, Stack, StackConfig, dropped

KINDS = re.compile(r"([mMtT])(\d{1,3})")
Memory = Cache | MambaState


@dataclass(frozen=True)
class Published:
    """Layers of all networks as published checkpoints have them.

    `layers`: "m4" and the like, of the networks in the order in which a byte passes through them. The other tuples have
    a value per width, outermost first: `ffn_dims`, 0 without a feed-forward layer; `rotary_dims`, of a head;
    `attention_windows`, in positions, 0 for no bound. Of Mamba-2: see `nn.mamba`.
    """

    layers: tuple[str, ...] = ("m4", "T22", "m4")
    ffn_dims: tuple[int, ...] = (0, 4096)
    rotary_dims: tuple[int, ...] = (32, 48)
    attention_windows: tuple[int, ...] = (1024, 0)
    states: int = 128
    expand: int = 2
    convolution: int = 4
    state_head_dim: int = 64

    def problems(self, widths: int) -> list[str]:
        """What is impossible about this for so many widths, in words."""
        found, where, each = list[str](), "model.published.", ("ffn_dims", "rotary_dims", "attention_windows")
        for name in ("layers", *each):
            count = 2 * widths - 1 if name == "layers" else widths
            if len(given := getattr(self, name)) != count:
                found.append(f"{where}{name} = {list(given)}: {widths} model.dims need {count}")
        for layers in self.layers:
            if not re.fullmatch(f"({KINDS.pattern})+", layers) or not kinds_of(layers):
                found.append(
                    f'{where}layers has "{layers}": write letters m, M, t, T, each with a number, as in "T1m4"'
                )
        for name in each:
            if min(getattr(self, name), default=0) < 0:
                found.append(f"{where}{name} = {list(getattr(self, name))}: each must be at least 0")
        return found

    def stack(self, place: int, width: int, dim: int, heads: int, theta: float) -> MixedConfig:
        """The shape of the network at a place in `layers`, whose widths are number `width`."""
        kinds = kinds_of(self.layers[place])
        return MixedConfig(
            layers=len(kinds),
            dim=dim,
            heads=heads,
            attention_window=self.attention_windows[width] or None,
            theta=theta,
            ffn_dim=self.ffn_dims[width] or None,
            kinds=kinds,
            rotary_dim=self.rotary_dims[width],
            mamba=MambaConfig(dim, self.states, self.expand, self.convolution, self.state_head_dim),
        )


def kinds_of(layers: str) -> str:
    """A letter for each layer."""
    return "".join(kind * int(count) for kind, count in KINDS.findall(layers))


@dataclass(frozen=True, kw_only=True)
class MixedConfig(StackConfig):
    """Shape of a stack of several kinds of layers; `ffn_dim` must be given if some have feed-forward layers."""

    kinds: str
    rotary_dim: int
    mamba: MambaConfig

    def problems(self, name: str) -> list[str]:
        """See `StackConfig`."""
        found = super().problems(name)
        if not found and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            found.append(f"{name}: rotary width {self.rotary_dim} must be even, and at most a head's, {self.head_dim}")
        if self.ffn_dim is None and self.kinds != self.kinds.lower():
            found.append(f"{name}: layers M and T have feed-forward layers, whose width is 0 in ffn_dims")
        return found + (self.mamba.problems(name) if "m" in self.kinds.lower() else [])

    def flops(self, new: int) -> int:
        """See `StackConfig`."""
        attention = 8 * new * self.dim**2 + 4 * self.dim * pairs(new, self.attention_window)
        found = 0
        for kind in self.kinds:
            found += self.mamba.flops(new) if kind in "mM" else attention
            found += 6 * new * self.dim * self.hidden() if kind.isupper() else 0
        return found

    def products(self, new: int) -> int:
        """See `StackConfig`: of a layer on average."""
        found = sum(self.mamba.products(new) if kind in "mM" else 8 * new * self.dim**2 for kind in self.kinds)
        return (found + sum(map(str.isupper, self.kinds)) * 6 * new * self.dim * self.hidden()) // max(1, self.layers)

    def kept(self, recompute: bool) -> int:
        """See `StackConfig`; of Mamba-2, whose parts are float32, also the convolution's and a chunk's."""
        mamba = self.mamba
        scanned = 8 * mamba.projected + 24 * mamba.channels + 12 * mamba.heads * CHUNK + 16 * mamba.inner
        layers = [
            (6 * self.dim + scanned if kind in "mM" else 18 * self.dim)
            + (6 * (self.dim + self.hidden()) if kind.isupper() else 0)
            for kind in self.kinds
        ]
        return 4 * self.dim * self.layers + max(layers, default=0) if recompute else sum(layers)

    def remembered(self, seen: float) -> float:
        """Numbers in the state of a row that has read so many positions."""
        cached = 2 * self.dim * min(seen, self.attention_window or seen)
        return sum(self.mamba.remembered if kind in "mM" else cached for kind in self.kinds)


class MixedBlock(nn.Module):
    """One layer of a kind."""

    def __init__(self, config: MixedConfig, kind: str) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim)
        self.mixer = Mamba2(config.mamba) if kind in "mM" else Attention(config.dim, config.heads)
        self.feed_forward_norm = RMSNorm(config.dim) if kind.isupper() else None
        self.feed_forward = FeedForward(config.dim, config.hidden()) if kind.isupper() else None
        self.dropout = 0.0
        """See `nn.transformer.Block`."""

    def forward(
        self, x: Float[Tensor, "rows new dim"], view: CausalPattern, cache: Memory | None
    ) -> tuple[Float[Tensor, "rows new dim"], Memory | None]:
        """One layer over the new positions."""
        if isinstance(self.mixer, Mamba2):
            assert not isinstance(cache, Cache)
            mixed, cache = self.mixer(self.norm(x), view.document, view.lengths, cache)
        else:
            mixed, cache = self.mixer(self.norm(x), view, cache)
        x = x + dropped(mixed, self)
        if self.feed_forward is None or self.feed_forward_norm is None:
            return x, cache
        return x + dropped(self.feed_forward(self.feed_forward_norm(x)), self), cache


class MixedStack(Stack):
    """Layers of several kinds, under one view."""

    def __init__(self, config: MixedConfig) -> None:
        self.shape = config
        super().__init__(config)

    def block(self, index: int) -> nn.Module:
        """See `Stack`."""
        return MixedBlock(self.shape, self.shape.kinds[index])

    def initial_state(self, batch: int, device: torch.device) -> tuple[Memory, ...]:
        """See `Stack`."""
        empty = Cache.empty(batch, self.shape.heads, self.shape.head_dim, device)
        nothing = MambaState.zero(self.shape.mamba, batch, device)
        return tuple(nothing if kind in "mM" else empty for kind in self.shape.kinds)

    def view(
        self,
        lengths: Int[Tensor, " batch"],
        starts: Bool[Tensor, "batch new"],
        where: RowPositions,
        caches: tuple[Memory, ...] | None,
    ) -> CausalPattern:
        """See `Stack`."""
        shape = self.shape
        cached = next((cache.keys.shape[1] for cache in caches or () if isinstance(cache, Cache)), 0)
        size = (shape.attention_window, shape.head_dim, shape.theta)
        return CausalPattern.of(lengths, starts, where, cached, *size, self.device, shape.rotary_dim)


def stack_of(config: StackConfig) -> Stack:
    """The stack of a shape."""
    return MixedStack(config) if isinstance(config, MixedConfig) else Stack(config)
