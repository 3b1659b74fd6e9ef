"""What a conversion leaves, and the message with which it refuses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bytelm import load
from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import resolve_checkpoint
from bytelm.errors import BytelmError, ConfigError
from bytelm.exchange.convert import convert
from bytelm.models.blt import names
from bytelm.models.blt.formats import hf
from published import ids

META = {
    "local_encoder.embed_tokens": "local_encoder.tok_embeddings",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_norm": "cross_attn_norm_q",
    "k_norm": "cross_attn_norm_kv",
    "q_proj": "wq",
    "k_proj": "wk",
    "v_proj": "wv",
    "o_proj": "wo",
    "patcher.lm_head": "patcher.output",
    "lm_head": "local_decoder.output",
    "patcher.embed_tokens": "patcher.tok_embeddings",
}
"""What Meta calls what transformers calls so: a second witness, since a round trip cannot see two names swapped."""
LARGE = {
    "hidden_size": 1280,
    "num_attention_heads": 20,
    "intermediate_size": 3584,
    "hidden_size_global": 4096,
    "cross_attn_k": 4,
}
PUBLISHED: dict[str, tuple[dict[str, Any], float]] = {
    "1B": ({"encoder_config": {"intermediate_size": 2816}}, 4.53e9),
    "7B": (
        {
            "cross_attn_k": 4,
            "encoder_config": {**LARGE, "num_hidden_layers": 1},
            "decoder_config": {**LARGE, "num_hidden_layers": 6},
            "global_config": {
                "hidden_size": 4096,
                "num_attention_heads": 32,
                "num_hidden_layers": 32,
                "intermediate_size": 11008,
            },
        },
        10.55e9,
    ),
}


def ours(run: Path, texts: list[bytes] | tuple[bytes, ...]) -> Tensor:
    """Our logits."""
    with torch.no_grad():
        return load(run).model(ids(texts))[0]


def held(run: Path) -> dict[str, Tensor]:
    """The tensors of a run as they are stored."""
    return store.read_tensors(store.newest(run), "model")


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether tensors agree in names, dtypes and every bit."""
    return found.keys() == wanted.keys() and all(
        found[name].dtype == wanted[name].dtype and torch.equal(found[name], wanted[name]) for name in wanted
    )


def recipe_of(run: Path) -> dict[str, Any]:
    """What a run's newest checkpoint says its model is made of."""
    return resolve_checkpoint(run)[1]["recipe"]


def download(hub: Path, folder: Path) -> Path:
    """The same in the layout of Meta's download: pickles, with tables of angles in them, entropy model beside."""
    (folder / "blt_1b").mkdir(parents=True)
    shutil.copytree(hub / names.ENTROPY_MODEL, folder / names.ENTROPY_MODEL)
    table = json.loads((hub / "train_args.json").read_text())
    (folder / "blt_1b" / "params.json").write_text(json.dumps(table))
    angles = {
        "rope_embeddings.freqs_cis": torch.zeros(8, 4, 2, 2),
        "local_encoder.rope_embeddings.freqs_cis": torch.zeros(3),
    }
    weights = load_file(hub / hf.WEIGHTS)
    torch.save({"model": {**weights, **angles}}, folder / "blt_1b" / "consolidated.pth")
    pickled = folder / names.ENTROPY_MODEL / "consolidated.pth"
    torch.save({"model": {**torch.load(pickled)["model"], "rope_embeddings.freqs_cis": torch.zeros(9)}}, pickled)
    return folder / "blt_1b"


def refused(
    folder: Path, layout: Any = "hf", error: type[BytelmError] = ConfigError, table: bool = False, **sets: Any
) -> str:
    """The message with which a folder is refused, in one line unless it is a table; no run is left."""
    run = folder.parent / "run"
    with pytest.raises(error) as caught:
        convert(folder, layout, run, sets)
    assert type(caught.value) is error
    assert table or "\n" not in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert not run.exists()
    return str(caught.value)


def spoil(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the weights of a folder in place."""
    weights = load_file(folder / hf.WEIGHTS)
    change(weights)
    save_file(weights, folder / hf.WEIGHTS)
