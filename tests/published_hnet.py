"""H-Net checkpoints as published: random weights under the public code's names, and what its networks compute of them.

The computation is position by position and in float64, from the names alone, so that it shares nothing with ours. It
was compared with the public code itself (docs/decisions/0029).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

HEAD = 64  # numbers in a head of a state


def options(
    layout: list[Any], dims: list[int], ffn: list[int], rotary: list[int], windows: list[int]
) -> dict[str, Any]:
    """The JSON of a model with four heads and small states."""
    return {
        "arch_layout": layout,
        "d_model": dims,
        "d_intermediate": ffn,
        "vocab_size": 256,
        "ssm_cfg": {"chunk_size": 256, "d_conv": 4, "d_state": 6, "expand": 2},
        "attn_cfg": {"num_heads": [4] * len(dims), "rotary_emb_dim": rotary, "window_size": windows},
        "tie_embeddings": False,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "one stage": options(["m2", ["T2"], "m1t1"], [32, 64], [0, 100], [4, 6], [1023, -1]),
    "two stages": options(
        ["m1", ["T1m2", ["T2"], "m2T1"], "m1"], [32, 32, 64], [0, 90, 200], [2, 4, 16], [1023, 5, -1]
    ),
    "two stages, every kind of layer": options(
        ["m1t1M1", ["T1m1", ["t1M1"], "M1T1"], "m1T1"], [32, 64, 96], [7, 130, 256], [8, 0, 6], [3, 4, 6]
    ),
}


def tensors(config: dict[str, Any], device: str = "cpu", half: bool = False) -> dict[str, Tensor]:
    """Random weights of a shape, all of which matter; `half`: of the kinds that the public code makes of them."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, Tensor] = {}

    def put(name: str, *shape: int, base: float = 0.0, single: bool = False) -> None:
        spread = 0.3 if len(shape) == 1 else shape[-1] ** -0.5
        value = torch.empty(shape, device=device) if device == "meta" else torch.randn(shape, generator=generator)
        found[name] = (base + spread * value).to(torch.bfloat16 if half and not single else torch.float32)

    def network(name: str, layers: str, level: int) -> None:
        dim, ssm, wide = config["d_model"][level], config["ssm_cfg"], -(-config["d_intermediate"][level] // 128) * 128
        inner = ssm["expand"] * dim
        channels, heads = inner + 2 * ssm["d_state"], inner // HEAD
        for number, kind in enumerate(letters(layers)):
            layer = f"{name}.layers.{number}"
            put(f"{layer}.norm1.weight", dim, base=1)
            if kind in "mM":
                put(f"{layer}.mixer.in_proj.weight", inner + channels + heads, dim)
                put(f"{layer}.mixer.conv1d.weight", channels, 1, ssm["d_conv"])
                put(f"{layer}.mixer.conv1d.bias", channels)
                put(f"{layer}.mixer.dt_bias", heads, base=-1)
                put(f"{layer}.mixer.A_log", heads, base=1)
                put(f"{layer}.mixer.D", heads, base=1, single=True)
                put(f"{layer}.mixer.norm.weight", inner, base=1)
                put(f"{layer}.mixer.out_proj.weight", dim, inner)
            else:
                put(f"{layer}.mixer.Wqkv.weight", 3 * dim, dim)
                put(f"{layer}.mixer.out_proj.weight", dim, dim)
            if kind.isupper():
                put(f"{layer}.norm2.weight", dim, base=1)
                put(f"{layer}.mlp.fc1.weight", 2 * wide, dim)
                put(f"{layer}.mlp.fc2.weight", dim, wide)
        put(f"{name}.rmsnorm.weight", dim, base=1)

    def stage(name: str, layout: list[Any], level: int) -> None:
        dims = config["d_model"]
        if level and dims[level] > dims[level - 1]:
            put(f"{name}.pad_dimension", dims[level] - dims[level - 1])
        if len(layout) == 1:
            return network(f"{name}.main_network", layout[0], level)
        network(f"{name}.encoder", layout[0], level)
        for part in ("q", "k"):
            put(f"{name}.routing_module.{part}_proj_layer.weight", dims[level], dims[level])
        put(f"{name}.residual_proj.weight", dims[level], dims[level], single=True)
        put(f"{name}.residual_proj.bias", dims[level], single=True)
        stage(f"{name}.main_network", layout[1], level + 1)
        return network(f"{name}.decoder", layout[2], level)

    put("embeddings.weight", 256, config["d_model"][0])
    stage("backbone", config["arch_layout"], 0)
    put("lm_head.weight", 256, config["d_model"][0])
    return found


def letters(layers: str) -> str:
    """A letter for each layer."""
    return "".join(kind * int(count) for kind, count in re.findall(r"([mMtT])(\d+)", layers))


def published(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], name: str = "hnet") -> Path:
    """The two files of a checkpoint; the one of weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(config))
    torch.save(weights, folder / f"{name}.pt")
    return folder / f"{name}.pt"


class Reference:
    """What the public code computes of one document's ids: logits of all 256."""

    def __init__(self, config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        self.config = config
        self.weights = {name: weight.double() for name, weight in weights.items()}

    def logits(self, ids: list[int]) -> Tensor:
        """After each id."""
        x = self.stage(self.weights["embeddings.weight"][ids], "backbone", self.config["arch_layout"], 0)
        return x @ self.weights["lm_head.weight"].T

    def stage(self, x: Tensor, name: str, layout: list[Any], level: int) -> Tensor:
        """A stage, or the innermost network."""
        w, outer = self.weights, x.shape[1]
        if (pad := w.get(f"{name}.pad_dimension")) is not None:
            x = torch.cat([x, pad.expand(len(x), -1)], 1)
        if len(layout) == 1:
            return self.network(x, f"{name}.main_network", layout[0], level)[:, :outer]
        x = self.network(x, f"{name}.encoder", layout[0], level)
        query, key = (F.normalize(x @ w[f"{name}.routing_module.{p}_proj_layer.weight"].T, dim=-1) for p in "qk")
        chance = torch.cat([torch.ones(1).double(), (1 - (query[:-1] * key[1:]).sum(-1)) / 2])
        opens = chance > 0.5
        inner = self.stage(x[opens], f"{name}.main_network", layout[1], level + 1)
        newest, found = torch.zeros_like(x[0]), list[Tensor]()
        for t, chunk in enumerate((opens.cumsum(0) - 1).tolist()):
            if opens[t]:
                share = chance[t].clamp(1e-4, 1 - 1e-4)
                newest = share * inner[chunk] + (1 - share) * newest
            found.append(newest)
        x = torch.stack(found) + x @ w[f"{name}.residual_proj.weight"].T + w[f"{name}.residual_proj.bias"]
        return self.network(x, f"{name}.decoder", layout[2], level)[:, :outer]

    def network(self, x: Tensor, name: str, layers: str, level: int) -> Tensor:
        """Layers, and the norm at their end."""
        w = self.weights
        for number, kind in enumerate(letters(layers)):
            layer = f"{name}.layers.{number}"
            mixer = self.mamba if kind in "mM" else self.attention
            x = x + mixer(normed(x, w[f"{layer}.norm1.weight"]), f"{layer}.mixer", level)
            if kind.isupper():
                up, gate = (normed(x, w[f"{layer}.norm2.weight"]) @ w[f"{layer}.mlp.fc1.weight"].T).chunk(2, -1)
                x = x + (F.silu(gate) * up) @ w[f"{layer}.mlp.fc2.weight"].T
        return normed(x, w[f"{name}.rmsnorm.weight"])

    def attention(self, x: Tensor, name: str, level: int) -> Tensor:
        """Windowed attention; the halves of the first numbers of a head are turned against each other."""
        settings = self.config["attn_cfg"]
        heads, turned, window = (settings[key][level] for key in ("num_heads", "rotary_emb_dim", "window_size"))
        q, k, v = (x @ self.weights[f"{name}.Wqkv.weight"].T).view(len(x), 3, heads, -1).unbind(1)
        half = turned // 2
        angles = torch.arange(len(x))[:, None, None] * 10_000.0 ** (-torch.arange(half).double() / max(1, half))
        cos, sin = angles.cos(), angles.sin()

        def turn(y: Tensor) -> Tensor:
            one, two = y[..., :half], y[..., half:turned]
            return torch.cat([one * cos - two * sin, one * sin + two * cos, y[..., turned:]], -1)

        scores = torch.einsum("thd,shd->hts", turn(q), turn(k)) / math.sqrt(q.shape[-1])
        ago = torch.arange(len(x))[:, None] - torch.arange(len(x))
        seen = (ago >= 0) & ((ago <= window) | (window < 0))
        mixed = torch.einsum("hts,shd->thd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)
        return mixed.flatten(1) @ self.weights[f"{name}.out_proj.weight"].T

    def mamba(self, x: Tensor, name: str, level: int) -> Tensor:
        """The recurrence of Mamba-2, its parts in the order in which the projection has them."""
        w = {key.removeprefix(f"{name}."): tensor for key, tensor in self.weights.items() if key.startswith(f"{name}.")}
        inner, states = w["norm.weight"].numel(), self.config["ssm_cfg"]["d_state"]
        z, line, step = (x @ w["in_proj.weight"].T).split([inner, inner + 2 * states, inner // HEAD], -1)
        taps = w["conv1d.weight"][:, 0]
        padded = F.pad(line, (0, 0, taps.shape[1] - 1, 0))
        line = F.silu(sum(padded[i : i + len(x)] * taps[:, i] for i in range(taps.shape[1])) + w["conv1d.bias"])
        value, b, c = line.split([inner, states, states], -1)
        value, step = value.view(len(x), -1, HEAD), F.softplus(step + w["dt_bias"])
        state, found = value.new_zeros(*value.shape[1:], states), list[Tensor]()
        for t in range(len(x)):
            kept = torch.exp(-step[t] * w["A_log"].exp())[:, None, None]
            state = kept * state + (step[t][:, None] * value[t])[..., None] * b[t]
            found.append(state @ c[t] + w["D"][:, None] * value[t])
        y = torch.stack(found).flatten(1) * F.silu(z)
        return normed(y, w["norm.weight"]) @ w["out_proj.weight"].T


def normed(x: Tensor, weight: Tensor) -> Tensor:
    """RMS norm."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
