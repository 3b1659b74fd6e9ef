"""Our BLT against transformers' port with the same random weights: the published architecture, to float32 noise."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from bytelm.models import blt
from bytelm.patching import space
from bytelm.units import BOS

transformers = pytest.importorskip("transformers")

SHAPES = {
    "k·d = global": {"local_dim": 16, "global_dim": 32, "queries": 2, "decoder_layers": 2},
    "k·d ≠ global": {"local_dim": 16, "global_dim": 48, "queries": 2, "decoder_layers": 3},
    "k = 4, one hash of short n-grams": {"local_dim": 16, "global_dim": 32, "queries": 4, "ngram_sizes": (2, 3)},
    "two hash functions": {"local_dim": 16, "global_dim": 32, "ngram_functions": 2, "window": 5},
}


def port(config: blt.Config) -> torch.nn.Module:
    """The same shape in transformers, with random weights."""
    part = {"num_attention_heads": 2, "hidden_size_global": config.global_dim, "cross_attn_k": config.queries}
    ffn = config.local(1).hidden()
    theirs = transformers.BltConfig(
        vocab_size=260,
        patch_in_forward=False,
        cross_attn_k=config.queries,
        encoder_hash_byte_group_vocab=config.ngram_rows,
        encoder_hash_byte_group_size=list(config.ngram_sizes),
        encoder_hash_byte_group_nb_functions=config.ngram_functions,
        local_attention_window_len=config.window,
        encoder_config={"hidden_size": config.local_dim, "num_hidden_layers": 1, "intermediate_size": ffn, **part},
        decoder_config={
            "hidden_size": config.local_dim,
            "num_hidden_layers": config.decoder_layers,
            "intermediate_size": ffn,
            **part,
        },
        global_config={
            "hidden_size": config.global_dim,
            "num_hidden_layers": config.global_layers,
            "num_attention_heads": 2,
            "intermediate_size": config.latent().hidden(),
        },
        patcher_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32},
    )
    theirs.num_hidden_layers = 1  # version 5.23 looks for it and has not got it
    model = transformers.BltForCausalLM(theirs).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.1))
    return model


def carry_over(theirs: dict[str, Tensor], config: blt.Config) -> dict[str, Tensor]:
    """Their weights under our names."""

    def ids_first(table: Tensor) -> Tensor:
        return table[[(ours + 4) % 260 for ours in range(260)]]

    out = {"encoder.embed.byte.weight": ids_first(theirs["model.local_encoder.embed_tokens.weight"])}
    out["encoder.embed.ngram.weight"] = theirs["model.encoder_hash_tok_embedding.weight"]
    out["encoder.split.weight"] = theirs["model.local_encoder.patch_embedding_projection.weight"]
    out["decoder.split.weight"] = theirs["model.local_decoder.patch_embedding_projection.weight"]
    out["decoder.norm.weight"] = theirs["model.local_decoder.norm.weight"]
    out["decoder.head.weight"] = ids_first(theirs["lm_head.weight"])
    if config.queries * config.local_dim != config.global_dim:
        out["widen.weight"] = theirs["model.global_transformer.token_embedding_projection.weight"]
    stacks = (
        ("local_encoder", "encoder.stack", 1),
        ("global_transformer", "latent", config.global_layers),
        ("local_decoder", "decoder.stack", config.decoder_layers),
    )
    for source, target, layers in stacks:
        for layer in range(layers):
            a, b = f"model.{source}.layers.{layer}", f"{target}.blocks.{layer}"
            parts = [theirs[f"{a}.self_attn.{n}_proj.weight"] for n in "qkv"]
            out[f"{b}.attention.qkv.weight"] = torch.cat(parts)
            out[f"{b}.attention.out.weight"] = theirs[f"{a}.self_attn.o_proj.weight"]
            parts = [theirs[f"{a}.mlp.{n}_proj.weight"] for n in ("gate", "up")]
            out[f"{b}.feed_forward.gate_up.weight"] = torch.cat(parts)
            out[f"{b}.feed_forward.down.weight"] = theirs[f"{a}.mlp.down_proj.weight"]
            out[f"{b}.attention_norm.weight"] = theirs[f"{a}.input_layernorm.weight"]
            out[f"{b}.feed_forward_norm.weight"] = theirs[f"{a}.post_attention_layernorm.weight"]
    for source, target, layers in (
        ("local_encoder", "encoder", 1),
        ("local_decoder", "decoder", config.decoder_layers),
    ):
        for layer in range(layers):
            a, b = f"model.{source}.cross_attn_layers.{layer}", f"{target}.cross.{layer}"
            out[f"{b}.query.weight"] = theirs[f"{a}.q_proj.weight"]
            out[f"{b}.key_value.weight"] = torch.cat([theirs[f"{a}.{n}_proj.weight"] for n in "kv"])
            out[f"{b}.out.weight"] = theirs[f"{a}.o_proj.weight"]
            out[f"{b}.query_norm.weight"] = theirs[f"{a}.q_norm.weight"]
            out[f"{b}.key_norm.weight"] = theirs[f"{a}.k_norm.weight"]
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_those_of_transformers(name: str) -> None:
    """Hash, pooling, double residual, rotary pairs, windows, which latent a byte reads: all, or logits differ."""
    torch.manual_seed(0)
    defaults = {"local_heads": 2, "global_heads": 2, "cross_heads": 2, "global_layers": 2, "window": 8}
    shape = {**defaults, "ngram_rows": 101, "ffn_multiple": 16, **SHAPES[name]}
    config = blt.Config(**shape)
    theirs = port(config)
    ours = config.build(space.Config(max_length=None, max_singles=None).build())
    ours.load_state_dict(carry_over(theirs.state_dict(), config))
    ids = torch.tensor([[BOS, *b"The quick brown fox, jumps over\n\x00\xff the lazy dog: d\xc3\xa9j\xc3\xa0 vu"]])
    opens, _ = ours.patcher.extend(ids)
    starts = [0, *(opens[0].nonzero()[:, 0] + 1).tolist()]
    if starts[-1] != ids.shape[1] + 1:
        starts.append(ids.shape[1] + 1)
    lengths = torch.tensor([starts]).diff()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = theirs(input_ids=(ids + 4) % 260, patch_lengths=lengths, use_cache=False).logits
        found, _ = ours(ids)
    wanted = wanted[..., [(i + 4) % 260 for i in range(260)]]
    assert (found - wanted).abs().max() < 1e-4 * wanted.std()
