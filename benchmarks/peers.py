"""The peers of `generate.py`: a plain Transformer with a cache, and published implementations of others.

Each is a `Writer`, and the shapes are those of our models' configurations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bytelm.units import BOS, VOCAB

# (prompts, number of bytes) -> one item per step, when all rows have one more byte.
Writer = Callable[[Sequence[bytes], int], Iterator[None]]


def parameters(model: nn.Module) -> int:
    """Parameters without tables of which a step reads few rows."""
    tables = ("ngram", "hash_tok", "position")
    return sum(p.numel() for name, p in model.named_parameters() if not any(table in name for table in tables))


class PlainBlock(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(dim, bias=False), nn.LayerNorm(dim, bias=False)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim, bias=False), nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, at: int, keys: Tensor, values: Tensor) -> Tensor:
        new = x.shape[1]
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        keys[:, :, at : at + new] = k
        values[:, :, at : at + new] = v
        seen = keys[:, :, : at + new], values[:, :, : at + new]
        mixed = F.scaled_dot_product_attention(q, *seen, is_causal=new > 1)  # more than one: a prompt, from nothing
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Plain(nn.Module):
    """A Transformer over bytes as in nanoGPT: learned positions, LayerNorm, GELU, tied embeddings."""

    def __init__(self, dim: int, layers: int, heads: int, capacity: int) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCAB, dim), nn.Embedding(capacity, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, bias=False)

    @torch.inference_mode()
    def forward(self, ids: Tensor, at: int, caches: Tensor) -> Tensor:
        """The most likely ids after `ids`, which start at position `at`."""
        x = self.embedding(ids) + self.position.weight[at : at + ids.shape[1]]
        for block, (keys, values) in zip(self.blocks, caches, strict=True):
            x = block(x, at, keys, values)
        return F.linear(self.norm(x[:, -1:]), self.embedding.weight).argmax(-1)

    def write(self, prompts: Sequence[bytes], count: int) -> Iterator[None]:
        ids, at = begun(prompts), 0
        dim, heads = self.norm.normalized_shape[0], self.blocks[0].heads
        caches = torch.empty(len(self.blocks), 2, len(ids), heads, ids.shape[1] + count, dim // heads)
        for _ in range(count):
            ids, at = self(ids, at, caches), at + ids.shape[1]
            yield


def plain_logits(model: Plain, ids: Tensor) -> Tensor:
    """Logits of all positions at once, without a cache."""
    x = model.embedding(ids) + model.position.weight[: ids.shape[1]]
    for block in model.blocks:
        qkv = block.qkv(block.attention_norm(x)).unflatten(-1, (3, block.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.out(mixed.transpose(1, 2).flatten(2))
        x = x + block.down(F.gelu(block.up(block.norm(x))))
    return F.linear(model.norm(x), model.embedding.weight)


def begun(prompts: Sequence[bytes]) -> Tensor:
    return torch.tensor([[BOS, *prompt] for prompt in prompts])


def again(model: nn.Module, newest: Callable[[Tensor], Tensor]) -> Writer:
    """Generation that processes the prefix again for each byte; `newest` returns its last logits."""

    def write(prompts: Sequence[bytes], count: int) -> Iterator[None]:
        ids = begun(prompts).to(next(model.parameters()).device)
        for _ in range(count):
            with torch.inference_mode():
                ids = torch.cat([ids, newest(ids).argmax(-1, keepdim=True)], 1)
            yield

    return write


def transformers_blt(config: Any, patch: int) -> tuple[nn.Module, Writer]:
    """transformers' BLT at our shape, with patches of `patch` bytes. Raises ImportError."""
    import transformers

    def part(dim: int, layers: int, heads: int, hidden: int) -> dict[str, int]:
        own = {"hidden_size": dim, "num_hidden_layers": layers, "num_attention_heads": heads}
        return {**own, "intermediate_size": hidden, "hidden_size_global": config.global_dim}

    local = config.local_dim, config.local_heads, config.encoder().hidden()
    theirs = transformers.BltConfig(
        vocab_size=VOCAB,
        patch_in_forward=False,
        cross_attn_k=config.queries,
        encoder_hash_byte_group_vocab=config.ngram_rows,
        encoder_hash_byte_group_size=list(config.ngram_sizes),
        encoder_hash_byte_group_nb_functions=config.ngram_functions,
        local_attention_window_len=config.attention_window,
        encoder_config={**part(local[0], config.encoder_layers, *local[1:]), "cross_attn_k": config.queries},
        decoder_config={**part(local[0], config.decoder_layers, *local[1:]), "cross_attn_k": config.queries},
        global_config=part(config.global_dim, config.global_layers, config.global_heads, config.latent().hidden()),
    )
    theirs.num_hidden_layers = 1  # version 5.23 reads it, but does not define it
    model = transformers.BltForCausalLM(theirs).eval()

    def newest(ids: Tensor) -> Tensor:
        bounds = torch.tensor([0, *range(1, ids.shape[1] + 1, patch), ids.shape[1] + 1])
        lengths = bounds.diff().expand(len(ids), -1).to(ids.device)
        return model(input_ids=ids, patch_lengths=lengths, use_cache=False, logits_to_keep=1).logits[:, -1]

    return model, again(model, newest)


def megabyte_pytorch(config: Any) -> tuple[nn.Module, Writer]:
    """MEGABYTE-pytorch's at nearly our shape. Raises ImportError."""
    from MEGABYTE_pytorch import MEGABYTE

    goal = parameters(config.build())
    shape = {"dim": config.dims, "depth": config.layers, "max_seq_len": (1 << 20, *config.sizes)}
    head = config.dims[-1] // config.heads[-1]

    def shaped(heads: int) -> nn.Module:
        return MEGABYTE(num_tokens=VOCAB, **shape, heads=heads, dim_head=head, flash_attn=True)

    model = min(map(shaped, range(config.heads[-1], config.heads[0] + 1)), key=lambda m: abs(parameters(m) - goal))

    def newest(ids: Tensor) -> Tensor:
        return model(ids)[:, -1]

    return model.eval(), again(model, newest)
