"""A trained model, as a user holds it: generate, measure, and see how it cuts text into patches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm.checkpoint import assemble, pretrained
from bytelm.checkpoint.metrics import METRICS, read_history
from bytelm.compress.stream import compress, decompress
from bytelm.data.modalities.base import Modality
from bytelm.decoding import Weights
from bytelm.device import resolve
from bytelm.errors import UsageError
from bytelm.evaluate.bits import logprobs, measure
from bytelm.evaluate.meter import Meter
from bytelm.evaluate.patches import patch_view
from bytelm.generate.sampling import Sampling
from bytelm.generate.session import generate, stream
from bytelm.models.base import ByteModel
from bytelm.models.inference import Mode, for_generating
from bytelm.units import LN2

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Options(TypedDict, total=False):
    """How to generate; whatever is left out has the value in brackets.

    `max_bytes` (256): at the most. `temperature` (0.8; 0 is greedy), `top_k`, `top_p`, `min_p` (None): `Sampling`.
    `seed` (0): the same one writes the same bytes. `stop` (): end before any of these. `utf8` (False): valid UTF-8.
    `eos` (True): the model may end the document; without it there are always `max_bytes` bytes, as an image needs.
    `weights` (None): "bf16" or "int8" rounds linear layers for speed; see `decoding.open_decoder`.
    """

    max_bytes: int
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    seed: int
    stop: Sequence[bytes]
    utf8: bool
    eos: bool
    weights: Weights | None


def split(options: Options) -> dict[str, Any]:
    """The options as `generate.session` takes them: those of sampling as one."""
    given: dict[str, Any] = dict(options)
    chosen = {field.name: given.pop(field.name) for field in fields(Sampling) if field.name in given}
    return given | {"sampling": Sampling(**chosen)}


class LM:
    """What `bytelm.load` returns. `model` is the plain `nn.Module`: `lm.model(ids, state)`, `lm.model.begin(batch)`."""

    def __init__(
        self,
        model: ByteModel,
        context: int,
        modality: Modality | None = None,
        recipe: Mapping[str, Any] | None = None,
        bits_per_byte: float | None = None,
    ) -> None:
        self.model = model
        self.context = context
        """Bytes that the model was trained to read in a row: the window of measurements."""
        self.modality = modality
        """What the bytes stand for, where they are not just those of files: it encodes files and decodes documents."""
        self.recipe = recipe
        """How the model is built, as checkpoints say it; None for a model that did not come from one."""
        self.bits_per_byte = bits_per_byte
        """What its training last measured on held-out bytes; None where that is not known."""

    def reading(self, mode: Mode) -> LM:
        """The same model, read in another way when it generates: "basic", "sliding", "strided" or "both".

        Sliding goes on for ever in windows of `context`; strided reads twice, from two offsets (MEGABYTE, 2.3.3).
        Raises UsageError for a model that cannot be read so.
        """
        return LM(for_generating(self.model, mode, self.context), self.context, self.modality)

    def known_recipe(self) -> Mapping[str, Any]:
        """The recipe. Raises UsageError where there is none: the model was made by hand, or is read in another mode."""
        if self.recipe is None:
            raise UsageError("nothing says how this model is built: take the LM that bytelm.load gives, as it gives it")
        return self.recipe

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as Hugging Face's `transformers` and `bytelm.load` read it, with a model card.

        Raises UsageError for a model of tokens or without a recipe, ResourceError where the disk refuses.
        """
        pretrained.save(Path(folder), self.model, self.known_recipe(), self.context, self.bits_per_byte)

    @overload
    def generate(self, prompt: bytes, **options: Unpack[Options]) -> bytes: ...

    @overload
    def generate(self, prompt: list[bytes], **options: Unpack[Options]) -> list[bytes]: ...

    def generate(self, prompt: bytes | list[bytes], **options: Unpack[Options]) -> bytes | list[bytes]:
        """What the model writes after a prompt, or after each of several, without the prompts.

        Raises UsageError and ConfigError for options outside their limits; see `Options`.
        """
        prompts = prompt if isinstance(prompt, list) else [prompt]
        texts = [generation.data for generation in generate(self.model, prompts, **split(options))]
        return texts if isinstance(prompt, list) else texts[0]

    def stream(self, prompt: bytes, **options: Unpack[Options]) -> Iterator[bytes]:
        """The same bytes as `generate`, each as soon as it is decided."""
        return stream(self.model, prompt, **split(options))

    def bits(self, data: bytes) -> tuple[float, int]:
        """The bits that `data` costs as one document, and its bytes: every byte is scored once."""
        meter = Meter.of(measure(self.model, [("", data)], context=self.context))
        return meter.nats / LN2, meter.bytes

    def logprobs(self, prefix: bytes, continuation: bytes) -> NDArray[np.float64]:
        """The log-probability of each byte of `continuation` after `prefix`, in nats: one (negative) number a byte."""
        return logprobs(self.model, prefix, continuation)

    def compress(self, data: bytes) -> bytes:
        """`data` in about as many bits as `bits` says. Raises UsageError for a model of tokens, or on a GPU."""
        return compress(self.model, data, self.context)

    def decompress(self, packed: bytes) -> bytes:
        """What was given to `compress`, of the same model and on the same machine. Raises DataError."""
        return decompress(self.model, packed)

    def patches(self, data: bytes) -> list[bytes]:
        """`data` cut into the patches that the model reads it in. Raises UsageError for a model without patches."""
        opens = patch_view(self.model, data).opens
        return [data[a:b] for a, b in pairwise([*np.flatnonzero(opens).tolist(), len(data)])]


def load(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LM:
    """The trained model of a run directory, of one checkpoint in it, or of a folder that `save_pretrained` wrote.

    It is on the CPU unless `device` says "auto" (the GPU where there is one), "cuda", "cuda:1" or "mps": there it
    compresses, and writes the same bytes in any company; and a library takes no GPU unasked, as in `transformers`.
    With `dtype` its weights are torch.bfloat16, say; its scorer's are float32 always.
    Raises CheckpointError, UsageError for a device that is not there, and ResourceError where it has no room.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype}: weights can be {', '.join(map(str, DTYPES))}")
    loaded = assemble.load(path, resolve(device), dtype)
    state, run = loaded.state, loaded.checkpoint.parent.parent
    lines = read_history(run / METRICS) if "step" in state else []
    measured = [line for line in lines if line.get("kind") == "validation"]
    bits = [line["bits_per_byte"] for line in measured if line["step"] <= state["step"]]
    return LM(loaded.model, int(state["context"]), loaded.modality, state["recipe"], bits[-1] if bits else None)
