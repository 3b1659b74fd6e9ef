"""What the costs of an architecture are counted from: its `costs.py`, if it has one, has a class `Costs` over this one.

FLOPs are of a forward pass, two for a multiplication and its addition; see `evaluate.costs` for the conventions.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bytelm.interfaces.model import ByteModel
from bytelm.nn.transformer import StackConfig
from bytelm.units import VOCAB


class ArchitectureCosts:
    """The costs of a model that nobody has written a formula for: those of the products that it counts itself."""

    def __init__(self, model: ByteModel) -> None:
        self.model: Any = model

    def paper(self, context: int, mean: float) -> float:
        """FLOPs per byte by the formula of the architecture's paper, `mean` bytes in a patch or token."""
        return self.model.flops(context, max(1, round(context / mean))) / context

    def read(self, length: int, mean: float) -> float:
        """Bytes of weights and caches read for one more id after `length`, in bfloat16; for a patch, its share of them.

        Embedding tables, where a row is read, are free.
        """
        return 2.0 * weights(self.model)

    def other_operations(self) -> float:
        """Operations per byte that are no matrix products."""
        return 0.0

    def multiplied_tables(self) -> int:
        """Numbers in embedding tables that are an output matrix too."""
        return 0


def appendix_b(stack: StackConfig, context: float) -> float:
    """A position of a Transformer (BLT, App. B): feed-forward, QKVO, and attention 4 l h (m + 1) / 2."""
    seen = min(context, stack.attention_window or context)
    return stack.layers * (stack.products(1) + 4 * stack.dim * (seen + 1) / 2)


def output(dim: int, vocabulary: int = VOCAB) -> float:
    """The logits of a position (BLT, App. B, "De-Embedding"; the same in Kaplan et al. 2020, Table 1)."""
    return 2 * dim * vocabulary


def kaplan(stack: StackConfig, context: float) -> float:
    """A position of a Transformer (Kaplan et al. 2020, Table 1): 2 m + 2 l n_ctx h, m without embeddings."""
    return stack.layers * (stack.products(1) + 2 * stack.heads * stack.head_dim * context)


def weights(*modules: nn.Module) -> int:
    """Numbers in the linear layers of modules."""
    return sum(part.weight.numel() for m in modules for part in m.modules() if isinstance(part, nn.Linear))


def cached(stack: StackConfig, seen: float) -> float:
    """Numbers in the keys and values of what a position sees."""
    return 2 * stack.layers * stack.key_heads * stack.head_dim * min(seen, stack.attention_window or seen)
