"""Decoders: incremental generation for a batch of rows (sequences), each with a cached state.

    open_decoder(model, rows=8, capacity=4096) -> Decoder
        read(rows, ids)          logits after each new id, for chunks of prompts and single bytes in one call
        draft(rows, ids)         a cheaper guess, if `drafts`
        rollback(rows, lengths)  back to shorter rows

A model is defined by its forward pass. Decoders compute the same from the same weights, with kernels of our own on the
host or with tensors on a device; an invariant test compares them in float64 (`testing.decoders`, ADR 0006 and 0013).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from bytelm.decoding.bytewise import Bytewise, bytewise, over_bytes, over_bytes_context
from bytelm.decoding.device import Device
from bytelm.decoding.host import Host
from bytelm.decoding.marginal import ByteDecoder
from bytelm.decoding.plain import PlainDecoder
from bytelm.decoding.rounding import rounded
from bytelm.errors import UsageError
from bytelm.find import part_of
from bytelm.interfaces.decoder import Decoder
from bytelm.interfaces.model import ByteModel
from bytelm.native.library import reason
from bytelm.native.packing import KINDS
from bytelm.nn.dtensor import is_dtensor

Quantization = Literal["bf16", "int8"]

STREAMED = 1 << 26  # bytes of weights that exceed the caches of any processor

__all__ = [
    "Decoder",
    "Quantization",
    "bytewise",
    "open_decoder",
    "over_bytes",
    "over_bytes_context",
    "rounded",
    "why_plain",
]


def open_decoder(model: ByteModel, *, rows: int, capacity: int, quantize: Quantization | None = None) -> Decoder:
    """A decoder of `rows` documents of up to `capacity` ids each, BOS included. Raises UsageError.

    `quantize`: linear layers in bfloat16, or in int8 with a scale per row, and caches in bfloat16; the patcher is never
    quantized. The model's weights must not change while the decoder is used.
    """
    if rows < 1 or capacity < 1:
        raise UsageError(f"a decoder of {rows} rows of {capacity} ids: give at least 1 of each")
    if isinstance(model, Bytewise):
        inner = open_decoder(model.model, rows=rows, capacity=capacity, quantize=quantize)
        return ByteDecoder(inner, model.words, capacity)
    if model.content is not None and quantize not in (None, model.quantization):
        own = f'weights = "{model.quantization}"' if model.quantization else "weights as they are in the file"
        raise UsageError(f'quantize = "{quantize}": the model was loaded with {own}: load it with weights="{quantize}"')
    if why_plain(model):
        return PlainDecoder(rounded(model, quantize) if quantize and not model.quantization else model, rows, capacity)
    # Not the patcher's: an entropy model stays in float32 in a bfloat16 model.
    parameter = next(p for name, p in model.named_parameters() if not name.startswith("patcher."))
    if model.content is not None and parameter.dtype == torch.float64:
        raise UsageError(
            "packed weights are computed in float32: for float64 load the model without weights and tables"
        )
    rounding = quantize or model.quantization or ("bf16" if parameter.dtype == torch.bfloat16 else None)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    size = {"bf16": 2, "int8": 1}.get(str(rounding), parameter.element_size())
    if remote(model):
        if quantize == "int8":
            where = model.device.type
            raise UsageError(
                f'quantize = "int8" on {where}: int8 kernels are for CPUs; use "bf16", or the device "cpu"'
            )
        kernels = Device.open(model.device, parameter.dtype == torch.float64, rounding)
    else:
        kernels = Host.open(parameter.dtype == torch.float64, rounding, streamed=linear * size > STREAMED)
    decoder = part_of(model, "decoder")
    assert decoder is not None  # `why_plain`
    return decoder.build(model, kernels, rows, capacity)


def why_plain(model: ByteModel) -> str:
    """Why a model has no fast decoder; empty if it has one."""
    if isinstance(model, Bytewise):
        return why_plain(model.model)
    decoder = part_of(model, "decoder")
    if decoder is None:
        return f"the kernels do not know {type(model).__name__}"
    if why := decoder.build.unsupported(model):
        return why
    if model.device.type == "mps":
        return "the model is on mps, which has no float64 for angles"
    return changed(model) or reason("kernels")


def remote(model: ByteModel) -> bool:
    """Whether a model is on a device."""
    return model.device.type != "cpu"


def changed(model: ByteModel) -> str:
    """What kernels would ignore of a model: submodules, hooks, dtypes, shards; empty if there is nothing."""
    if any(is_dtensor(parameter) for parameter in model.parameters()):
        return "several processes share its weights"
    for name, module in model.named_modules():
        if not type(module).__module__.startswith(("bytelm.", "torch.nn.modules.")):
            return f"the kernels do not know {type(module).__module__}.{type(module).__name__}, which {name} is"
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return f"{name or type(module).__name__} has a hook, which the kernels would not call"
    unknown = {str(parameter.dtype) for parameter in model.parameters()} - {str(dtype) for dtype in KINDS}
    return f"weights are in {unknown.pop()}, which the kernels do not know" if unknown else ""
