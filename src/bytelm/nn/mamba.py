"""The layer of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060): a state-space model, one definition for both its forms.

    S_t = exp(Δ_t A) S_t-1 + Δ_t x_t B_tᵀ        of each head, A < 0: what is not renewed only decays
    y_t = S_t C_t + D x_t                        Δ, x, B, C from the input; x, B, C convolved over the newest positions
    out = W norm(y silu(z))                      z, the gate, from the input too

S and the newest inputs of the convolution are the state. The parallel form goes in chunks: the decays within a chunk as
a matrix, and S for the chunks before; one position is a chunk of one, which is the recurrence.

    chunk 0            chunk 1                 chunk 2
    C Bᵀ decays ── S ─▶ C Bᵀ decays + C S ── S ─▶ ...        cost: positions × (chunk + states) × width

Neither reaches back over the start of a document. All but the two products is in float32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.nn.norm import RMSNorm
from bytelm.nn.products import Linear
from bytelm.nn.sharded import rows_here
from bytelm.patching.layout import at_end, tail
from bytelm.transfer import to_device

CHUNK = 64  # positions per chunk
STEPS = (1e-3, 1e-1)  # of Δ at first
DECAYS = (1.0, 16.0)  # of -A at first


@dataclass(frozen=True)
class MambaConfig:
    """Shape of a layer: `states` numbers for each of `expand` · `dim`, which are in heads of `head_dim`."""

    dim: int
    states: int = 128
    expand: int = 2
    convolution: int = 4
    """Positions over which it goes, the own one included."""
    head_dim: int = 64

    def problems(self, name: str) -> list[str]:
        """What is impossible about this shape, in words."""
        least = {"dim": 1, "states": 1, "expand": 1, "convolution": 1, "head_dim": 1}
        given = {key: getattr(self, key) for key in least}
        found = [f"{name}: {key} {value} must be at least 1" for key, value in given.items() if value < 1]
        if not found and self.inner % self.head_dim:
            found.append(f"{name}: heads of {self.head_dim} do not divide {self.expand} times the width {self.dim}")
        return found

    @property
    def inner(self) -> int:
        """Width of all heads."""
        return self.expand * self.dim

    @property
    def heads(self) -> int:
        """Heads; each has an A, a D and a Δ."""
        return self.inner // self.head_dim

    @property
    def channels(self) -> int:
        """Width of what is convolved: x, B, C."""
        return self.inner + 2 * self.states

    @property
    def projected(self) -> int:
        """Width of what is made of the input: z, what is convolved, Δ."""
        return self.inner + self.channels + self.heads

    @property
    def remembered(self) -> int:
        """Numbers in the state of a row."""
        return self.inner * self.states + (self.convolution - 1) * self.channels

    def products(self, new: int) -> int:
        """Operations of the linear parts."""
        return 2 * new * self.dim * (self.projected + self.inner)

    def flops(self, new: int) -> int:
        """Operations of the matrix products of a whole pass over `new` positions."""
        width = min(CHUNK, new)
        chunks = -(-new // width) if new else 0
        within = width * (self.states + self.inner)
        return self.products(new) + 2 * chunks * width * (within + 2 * self.inner * self.states)


@dataclass(frozen=True)
class MambaState:
    """What a layer remembers of rows, of constant size; 0 where their document has nothing yet."""

    recent: Float[Tensor, "batch before channels"]
    """The newest inputs of the convolution."""
    sums: Float[Tensor, "batch inner states"]
    """S of all heads."""

    @classmethod
    def zero(cls, config: MambaConfig, batch: int, device: torch.device) -> MambaState:
        """The state of rows that have read nothing."""
        recent = torch.zeros(batch, config.convolution - 1, config.channels, device=device)
        return cls(recent, torch.zeros(batch, config.inner, config.states, device=device))


class Mamba2(nn.Module):
    """The layer, with one group: all heads share B and C."""

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.project = Linear(config.dim, config.projected)
        self.convolution = nn.Conv1d(config.channels, config.channels, config.convolution, groups=config.channels)
        self.step_bias = nn.Parameter(torch.empty(config.heads))
        """Δ is the softplus of what is projected and this."""
        self.log_decay = nn.Parameter(torch.empty(config.heads))
        """The logarithm of -A."""
        self.skip = nn.Parameter(torch.empty(config.heads))
        """D."""
        self.norm = RMSNorm(config.inner)
        self.out = Linear(config.inner, config.dim)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """The numbers of heads, as the paper's code draws them: logarithms of Δ, and A, uniform over their ranges."""
        shares = torch.rand(2, self.config.heads, generator=generator)
        low, high = (math.log(bound) for bound in STEPS)
        step = torch.exp(low + shares[0] * (high - low))
        decay = DECAYS[0] + shares[1] * (DECAYS[1] - DECAYS[0])
        values = {self.step_bias: step + torch.log(-torch.expm1(-step)), self.log_decay: decay.log()}  # softplus⁻¹
        for parameter, value in {**values, self.skip: torch.ones_like(step)}.items():
            first, held = rows_here(parameter)
            held.copy_(value[first : first + len(held)])

    def forward(
        self,
        x: Float[Tensor, "batch new dim"],
        document: Int[Tensor, "batch new"],
        lengths: Int[Tensor, " batch"],
        state: MambaState | None,
    ) -> tuple[Float[Tensor, "batch new dim"], MambaState | None]:
        """Outputs at new positions, of which the first `lengths` of each row are real, and the state after them.

        `document`: documents that started at or before each position; 0 continues the one that was read before.
        """
        if not x.shape[1]:
            return x, state
        projected = self.project(x)
        with torch.autocast(x.device.type, enabled=False):
            mixed, after = self.mix(projected.to(torch.promote_types(x.dtype, torch.float32)), document, lengths, state)
        return self.out(mixed.to(x.dtype)), None if state is None else after

    def mix(
        self, projected: Tensor, document: Tensor, lengths: Tensor, state: MambaState | None
    ) -> tuple[Tensor, MambaState]:
        """All between the two products."""
        config, (batch, new, _) = self.config, projected.shape
        state = state or MambaState.zero(config, batch, projected.device)
        gate, line, step = projected.split([config.inner, config.channels, config.heads], -1)
        line = torch.cat([state.recent.to(line.dtype), line], 1)
        before = config.convolution - 1
        whole = F.pad(document, (before, 0))
        x, b, c = F.silu(convolved(self.convolution, line, whole)).split(
            [config.inner, config.states, config.states], -1
        )
        real = torch.arange(new, device=x.device) < to_device(lengths, x)[:, None]
        step = F.softplus(step + self.step_bias).masked_fill(~real[..., None], 0.0)  # neither decays nor adds
        x = x.unflatten(-1, (config.heads, -1))
        y, sums = scan(x, step, -self.log_decay.exp() * step, b, c, document, state.sums)
        y = (y + self.skip[:, None] * x).flatten(2)
        going = (
            tail(whole, before + lengths, before)
            == at_end(document, lengths, torch.zeros_like(document[:, 0]))[:, None]
        )
        after = MambaState(tail(line, before + lengths, before) * going[..., None], sums)
        return self.norm(y * F.silu(gate)), after


def convolved(
    layer: nn.Conv1d, line: Float[Tensor, "batch slots channels"], document: Int[Tensor, "batch slots"]
) -> Float[Tensor, "batch new channels"]:
    """Weighted sums of each slot and those before it, of the same document; without the slots at which a line begins.

    Written out, as torch's convolution knows no documents.
    """
    reach = layer.weight.shape[-1]
    new = line.shape[1] - reach + 1
    found = layer.bias
    assert found is not None
    for index in range(reach):
        some = slice(index, index + new)
        found = found + layer.weight[:, 0, index] * line[:, some] * (
            document[:, some, None] == document[:, -new:, None]
        )
    return found


def scan(
    x: Float[Tensor, "batch new heads head_dim"],
    step: Float[Tensor, "batch new heads"],
    decay: Float[Tensor, "batch new heads"],
    b: Float[Tensor, "batch new states"],
    c: Float[Tensor, "batch new states"],
    document: Int[Tensor, "batch new"],
    sums: Float[Tensor, "batch inner states"],
) -> tuple[Float[Tensor, "batch new heads head_dim"], Float[Tensor, "batch inner states"]]:
    """S_t C_t of all positions, and the last S; `decay` is Δ A."""
    new, heads = step.shape[1:]
    width = min(CHUNK, new)
    spare = -new % width

    def chunked(part: Tensor) -> Tensor:
        return F.pad(part, (0, 0) * (part.ndim - 2) + (0, spare)).unflatten(1, (-1, width))

    added = chunked(x * step[..., None])
    decay, b, c = chunked(decay).transpose(-1, -2), chunked(b), chunked(c)
    document = torch.cat([document, document[:, -1:].expand(-1, spare)], 1).unflatten(1, (-1, width))
    order = torch.arange(width, device=x.device)
    seen = (document[..., None] == document[..., None, :]) & (order[:, None] >= order)
    weights = between(decay).masked_fill(~seen[:, :, None], -math.inf).exp()  # [batch, chunks, heads, width, width]
    within = ((c @ b.transpose(-1, -2))[:, :, None] * weights) @ added.transpose(2, 3)

    # What each chunk leaves, and what reaches it from those before: nothing where a document starts.
    ending = weights[..., -1, :].transpose(-1, -2)[..., None] * added
    left = ending.flatten(3).transpose(-1, -2) @ b
    last = F.pad(document[:, :-1, -1], (1, 0))
    reached = decay.cumsum(-1).exp() * (document == last[..., None])[:, :, None]  # [batch, chunks, heads, width]
    carried = reached[..., -1].repeat_interleave(x.shape[-1], -1)[..., None]
    before, sums = list[Tensor](), sums.to(x.dtype)
    for chunk in range(carried.shape[1]):
        before.append(sums)
        sums = carried[:, chunk] * sums + left[:, chunk]
    across = (c @ torch.stack(before, 1).transpose(-1, -2)).unflatten(-1, (heads, -1))
    across = across * reached.transpose(-1, -2)[..., None]
    return (within.transpose(2, 3) + across).flatten(1, 2)[:, :new], sums


def between(decay: Float[Tensor, "... width"]) -> Float[Tensor, "... width width"]:
    """Sums of what comes after each second position up to each first one; 0 where there is nothing.

    Added up for each pair: as differences of sums from the start, small ones would be lost behind large ones.
    """
    width = decay.shape[-1]
    order = torch.arange(width, device=decay.device)
    steps = decay[..., None].expand(*decay.shape, width)
    return steps.masked_fill(order[:, None] <= order, 0.0).cumsum(-2)
