"""The byte stage across patches, where the paper's restarts in each: a windowed Transformer over all bytes.

    ids     BOS a b c | d e f g | h          patches of 4; window of 3
    global     g0     | g1      | g2
    local   ^ a b c   | ^ e f g | ^          the paper's: the byte that starts a patch is in none of its cells
    line    B a b c   | d e f g | h          this one: each byte itself, and its n-grams
                b c     d                    what the place of d sees: the window reaches into the patch before

Each byte adds its slice of the newest global output (eq. 4). In the paper the last bytes of a patch reach the next one
through the global stage alone, as a slice of a vector over whole patches ("patch lag", Scratchpad Patching, arXiv
2605.09630). Here the byte stage sees the last bytes themselves wherever the patches are cut, and the hashed n-grams
that end at them (BLT, arXiv 2412.09871, section 3.2.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bytelm.interfaces.model import Stage
from bytelm.nn.attention import Cache, RowPositions
from bytelm.nn.init_weights import fill, init_weights
from bytelm.nn.ngrams import NgramEmbedding, table_problems
from bytelm.nn.norm import RMSNorm
from bytelm.nn.products import Linear, product
from bytelm.nn.transformer import Stack
from bytelm.patching.layout import Rows
from bytelm.transfer import to_device

if TYPE_CHECKING:
    from bytelm.models.megabyte.model import Config


@dataclass(frozen=True)
class LineState:
    """The state of rows of bytes."""

    bytes: RowPositions
    recent: Int[Tensor, "batch reach"]
    """The ids that later n-grams reach."""
    caches: tuple[Cache, ...]


class Line(nn.Module):
    """A windowed Transformer over bytes that reads the newest output of the stage above."""

    reach = 0

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.size = config.sizes[-1]
        above, dim = config.dims[-2:]
        self.part = -(-above // self.size)  # the paper's D_G
        whole = self.part * self.size == above
        self.narrow = nn.Identity() if whole else Linear(above, self.part * self.size)
        self.condition = Linear(self.part, dim)  # w_GL
        self.embed = NgramEmbedding(dim, config.ngram_sizes, 1, config.ngram_rows, 1 + config.ngram_output)
        self.stack = Stack(config.stack(len(config.sizes)))
        self.norm = RMSNorm(dim)

    def init_weights(self, seed: int) -> None:
        """Initialise, with slices of the output above at the scale of byte vectors."""
        config = self.stack.config
        init_weights(self, max(1, config.layers), seed)
        fill(self.condition.weight, (self.part * config.dim) ** -0.5, torch.Generator().manual_seed(seed))

    def flops(self, ids: int, patches: int) -> int:
        """FLOPs of the matmuls, logits included, for so many ids and outputs of the stage above."""
        known = patches + 1  # and the one before the first
        narrow = 2 * known * self.narrow.weight.numel() if isinstance(self.narrow, nn.Linear) else 0
        linear = 2 * ids * (self.condition.weight.numel() + self.embed.byte.weight.numel())
        return self.stack.config.flops(ids) + narrow + linear

    def stage(self, ids: int) -> Stage:
        """See `ByteModel`. In addition to the stack: byte vectors, rows of tables, slices of the stage above."""
        return Stage("local", self.stack, ids, beside=12 * self.stack.config.dim + 8 * self.embed.lookups)

    def initial_state(self, batch: int, device: torch.device) -> LineState:
        """The initial state."""
        caches = self.stack.initial_state(batch, device)
        return LineState(RowPositions.zero(batch), self.embed.initial_state(batch), caches)

    def forward(
        self,
        rows: Rows,
        read: Int[Tensor, " batch"],
        offset: Int[Tensor, "batch new"],
        above: Float[Tensor, "batch known above"],
        state: LineState,
        keep: bool,
    ) -> tuple[Float[Tensor, "batch new vocab"], LineState | None]:
        """Logits after new ids at `offset` in documents, `read` before them; with `keep`, the state to continue from.

        `above`: the newest output of the stage above, then new ones.
        """
        starts = rows.starts(read)
        hashes = self.embed.hashes_on_host(rows.ids, starts, state.recent)
        x = self.embed(*(to_device(t, self.norm.weight) for t in (rows.ids, starts, state.recent)), hashes)
        x, *beyond = x.split(self.stack.config.dim, -1)
        place = offset % self.size
        newest = ((place == 0) & rows.real).long().cumsum(1)
        index = (torch.arange(len(x))[:, None] * above.shape[1] + newest) * self.size + place
        parts = self.narrow(above).reshape(-1, self.part).index_select(0, to_device(index.flatten(), x))
        x = x + self.condition(parts.view(*index.shape, self.part))
        caches = state.caches if keep else None
        view = self.stack.view(rows.lengths, starts, state.bytes, caches)
        x, caches = self.stack(x, view, caches)
        x = x + beyond[0] if beyond else x
        logits = product(self.norm(x), self.embed.byte.weight)
        if not keep:
            return logits, None
        return logits, LineState(view.after, self.embed.reached(rows, starts, state.recent), caches or ())


def line_problems(config: Config) -> list[str]:
    """What is impossible about the options of this stage, in words."""
    found = table_problems(config.ngram_sizes, config.ngram_rows, config.ngram_output)
    if config.local_window is None and config.ngram_sizes:
        found.append(f"model.ngram_sizes = {list(config.ngram_sizes)}: n-grams need model.local_window; set it")
    if config.local_window is not None and config.reach and len(config.sizes) == 1:
        found.append(
            f"model.reach = {config.reach}: no stage is left inside patches with model.local_window = "
            f"{config.local_window}, which takes its place; leave one of them out"
        )
    return found
