"""Cost formulas of an architecture: the base of the class `Costs` in its `costs.py`.

FLOPs are of a forward pass, two per multiply-add; see `evaluate.costs` for the conventions.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from bytelm.interfaces.model import ByteModel
from bytelm.nn.transformer import StackConfig
from bytelm.units import VOCAB


class ArchitectureCosts:
    """Costs without a formula: from the matmuls that the model counts itself."""

    def __init__(self, model: ByteModel) -> None:
        self.model: Any = model

    def paper(self, context: int, mean: float) -> float:
        """FLOPs per byte by the formula of the paper, at `mean` bytes per patch or token."""
        return self.model.flops(context, max(1, round(context / mean))) / context

    def read(self, length: int, mean: float) -> float:
        """Bytes of weights and caches read per id after `length`, bfloat16, patches amortised; lookups are free."""
        return 2.0 * weights(self.model)

    def other_operations(self) -> float:
        """FLOPs per id that are not matmuls."""
        return 0.0

    def multiplied_tables(self) -> int:
        """Parameters of embedding tables tied to an output matrix."""
        return 0


def appendix_b(stack: StackConfig, context: float) -> float:
    """FLOPs per position of a Transformer (BLT, App. B): feed-forward, QKVO, attention 4 l h (m + 1) / 2."""
    seen = min(context, stack.attention_window or context)
    return stack.layers * (stack.products(1) + 4 * stack.dim * (seen + 1) / 2)


def output(dim: int, vocabulary: int = VOCAB) -> float:
    """FLOPs of a position's logits (BLT, App. B, "De-Embedding"; the same in Kaplan et al. 2020, Table 1)."""
    return 2 * dim * vocabulary


def kaplan(stack: StackConfig, context: float) -> float:
    """FLOPs per position of a Transformer (Kaplan et al. 2020, Table 1): 2 m + 2 l n_ctx h, m non-embedding."""
    return stack.layers * (stack.products(1) + 2 * stack.heads * stack.head_dim * context)


def weights(*modules: nn.Module) -> int:
    """Weights in the linear layers of modules."""
    return sum(part.weight.numel() for m in modules for part in m.modules() if isinstance(part, nn.Linear))


def cached(stack: StackConfig, seen: float) -> float:
    """Elements of the keys and values of `seen` positions."""
    return 2 * stack.layers * stack.key_heads * stack.head_dim * min(seen, stack.attention_window or seen)
