"""The parameter names of published BLTs, and how their tensors differ from ours.

    ours                          Hugging Face                               Meta
    encoder.embed.byte            model.local_encoder.embed_tokens           local_encoder.tok_embeddings
    latent.blocks.0.attention.qkv model.global_transformer.layers.0          global_transformer.layers.0
                                      .self_attn.{q,k,v}_proj                    .attention.{wq,wk,wv}

Ours are theirs concatenated along the first axis. Their ids are (ours + 4) mod 260, which permutes embedding rows.
Rotary pairs are interleaved in all three, so that nothing else is permuted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bytelm.models.blt import model as blt
from bytelm.nn.ngrams import PUBLISHED_OFFSET

Dialect = Literal["hf", "meta"]
ENTROPY_MODEL = "entropy_model"
"""The prefix given to the names in the file of Meta's entropy model."""

STACKS = {
    "encoder.stack": {"hf": "model.local_encoder", "meta": "local_encoder"},
    "latent": {"hf": "model.global_transformer", "meta": "global_transformer"},
    "decoder.stack": {"hf": "model.local_decoder", "meta": "local_decoder"},
    "patcher.entropy_model.model.stack": {"hf": "model.patcher", "meta": ENTROPY_MODEL},
}
BLOCK = {
    "attention_norm": {"hf": "input_layernorm", "meta": "attention_norm"},
    "attention.qkv": {
        "hf": "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
        "meta": "attention.wq attention.wk attention.wv",
    },
    "attention.out": {"hf": "self_attn.o_proj", "meta": "attention.wo"},
    "feed_forward_norm": {"hf": "post_attention_layernorm", "meta": "ffn_norm"},
    "feed_forward.gate_up": {"hf": "mlp.gate_proj mlp.up_proj", "meta": "feed_forward.w1 feed_forward.w3"},
    "feed_forward.down": {"hf": "mlp.down_proj", "meta": "feed_forward.w2"},
}
CROSS = {
    "query_norm": {"hf": "q_norm", "meta": "cross_attn_norm_q"},
    "key_norm": {"hf": "k_norm", "meta": "cross_attn_norm_kv"},
    "query": {"hf": "q_proj", "meta": "wq"},
    "key_value": {"hf": "k_proj v_proj", "meta": "wk wv"},
    "out": {"hf": "o_proj", "meta": "wo"},
}
ALONE = {
    "encoder.embed.byte": {"hf": "model.local_encoder.embed_tokens", "meta": "local_encoder.tok_embeddings"},
    "encoder.embed.ngram": {"hf": "model.encoder_hash_tok_embedding", "meta": "encoder_hash_tok_embedding"},
    "encoder.split": {
        "hf": "model.local_encoder.patch_embedding_projection",
        "meta": "local_encoder.patch_embedding_projection",
    },
    "widen": {
        "hf": "model.global_transformer.token_embedding_projection",
        "meta": "global_transformer.token_embedding_projection",
    },
    "decoder.split": {
        "hf": "model.local_decoder.patch_embedding_projection",
        "meta": "local_decoder.patch_embedding_projection",
    },
    "decoder.norm": {"hf": "model.local_decoder.norm", "meta": "local_decoder.norm"},
    "decoder.head": {"hf": "lm_head", "meta": "local_decoder.output"},
    "patcher.entropy_model.model.embedding": {
        "hf": "model.patcher.embed_tokens",
        "meta": f"{ENTROPY_MODEL}.tok_embeddings",
    },
    "patcher.entropy_model.model.norm": {"hf": "model.patcher.norm", "meta": f"{ENTROPY_MODEL}.norm"},
    "patcher.entropy_model.model.head": {"hf": "model.patcher.lm_head", "meta": f"{ENTROPY_MODEL}.output"},
}
BY_ID = {
    "encoder.embed.byte",
    "decoder.head",
    "patcher.entropy_model.model.embedding",
    "patcher.entropy_model.model.head",
}


@dataclass(frozen=True)
class Match:
    """One of our tensors, and theirs of which it is the concatenation."""

    ours: str
    theirs: tuple[str, ...]
    by_id: bool
    """Whether its first axis is ids."""

    def join(self, parts: list[Tensor]) -> Tensor:
        """Ours from theirs."""
        joined = torch.cat(parts) if len(parts) > 1 else parts[0]
        return joined.roll(-PUBLISHED_OFFSET, 0) if self.by_id else joined

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Theirs from ours."""
        whole = tensor.roll(PUBLISHED_OFFSET, 0) if self.by_id else tensor
        return dict(zip(self.theirs, whole.chunk(len(self.theirs)), strict=True))


def matches(names: Mapping[str, Tensor], config: blt.Config, dialect: Dialect, layer: int = 0) -> list[Match]:
    """A match for each of our `names`. `layer`: their number of the encoder's first cross-attention."""
    return [match(name, config, dialect, layer) for name in names]


def match(name: str, config: blt.Config, dialect: Dialect, layer: int) -> Match:
    """The match of one of our tensors."""
    part = name.removesuffix(".weight")
    if found := re.fullmatch(r"(.+)\.blocks\.(\d+)\.(.+)", part):
        stack, index, inner = found.groups()
        words = [f"{STACKS[stack][dialect]}.layers.{index}.{word}" for word in BLOCK[inner][dialect].split()]
    elif found := re.fullmatch(r"(encoder|decoder)\.cross\.(\d+)\.(.+)", part):
        side, index, inner = found.groups()
        at = int(index) + (layer if side == "encoder" else 0)
        root = STACKS[f"{side}.stack"][dialect]
        words = [f"{root}.cross_attn_layers.{at}.{word}" for word in CROSS[inner][dialect].split()]
    else:
        words = [ALONE[part][dialect]]
        if part == "encoder.embed.ngram" and dialect == "meta":
            words = [f"{words[0]}.{table}" for table in range(config.ngram_functions * len(config.ngram_sizes))]
    return Match(name, tuple(f"{word}.weight" for word in words), part in BY_ID)
