"""The weights of cross-attention without positions; who attends to whom is for those to say who call it."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bytelm.nn import fused
from bytelm.nn.norm import RMSNorm
from bytelm.nn.products import Linear


class CrossAttention(nn.Module):
    """Queries and keys of one width, each side normed on its own, no positions, no biases."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)
        self.query = Linear(dim, dim)
        self.key_value = Linear(dim, 2 * dim)
        self.out = Linear(dim, dim)
        self.scale = (dim // heads) ** -0.5

    def project(self, queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[..., heads, head_dim]`."""
        split = (self.heads, -1)
        query = self.query(self.query_norm(queries)).unflatten(-1, split)
        key, value = self.key_value(self.key_norm(keys)).chunk(2, -1)
        return query, key.unflatten(-1, split), value.unflatten(-1, split)

    @staticmethod
    def fast(query: Tensor) -> Callable[..., Tensor] | None:
        """Attention between bytes and the patch each goes with as one pass, where there is a kernel for it."""
        if device := fused.kernels(query):
            return device.cross
        return fused.cross if fused.fits(query) else None


def flops(dim: int, queries: int, keys: int) -> int:
    """Operations of the matrix products of one cross-attention; its scores are no matrix products, but bytes × k."""
    return 2 * dim**2 * (2 * queries + 2 * keys)
