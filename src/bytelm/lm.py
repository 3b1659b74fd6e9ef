"""The user interface of a trained model: generate, evaluate, show patches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack, overload

import numpy as np
import torch
from numpy.typing import NDArray

from bytelm.checkpoint import assemble, pretrained
from bytelm.checkpoint.metrics import METRICS, read_history
from bytelm.checkpoint.packed import TABLES, WEIGHTS, Tables, Watch, Weights
from bytelm.compress.stream import compress, decompress
from bytelm.data.modalities.base import Modality
from bytelm.decoding import Quantization, over_bytes
from bytelm.device import resolve
from bytelm.errors import UsageError
from bytelm.evaluate.bits import logprobs, measure
from bytelm.evaluate.dynamic import Dynamic
from bytelm.evaluate.meter import Meter
from bytelm.evaluate.patches import patch_view
from bytelm.evaluate.windowing import Mode, for_generating
from bytelm.generate.prompts import generate, stream
from bytelm.generate.sampling import Sampling
from bytelm.interfaces.model import ByteModel
from bytelm.online.memory import Memory
from bytelm.units import LN2

if TYPE_CHECKING:
    pass

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Options(TypedDict, total=False):
    """Generation options, with defaults in brackets.

    `max_bytes` (256): maximum length. `temperature` (0.8; 0 is greedy), `top_k`, `top_p`, `min_p` (None): `Sampling`.
    `seed` (0): the same seed generates the same bytes. `stop` (): stop sequences. `utf8` (False): valid UTF-8 only.
    `eos` (True): the model may end the document; otherwise exactly `max_bytes` bytes, as an image needs.
    `quantize` (None): "bf16" or "int8" quantizes linear layers for speed; see `decoding.open_decoder`.
    `online` (None): a memory (`bytelm.online.memory`), of which a copy learns the prompt and what follows, and predicts
    beside the model. `read_before` (None): opens one that only guesses ahead of a slow model: the
    same bytes, sooner.
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
    quantize: Quantization | None
    online: Memory | None
    read_before: Callable[[], Memory] | None


def split(options: Options) -> dict[str, Any]:
    """The options as `generate.prompts` takes them: those of sampling as one."""
    given: dict[str, Any] = dict(options)
    chosen = {field.name: given.pop(field.name) for field in fields(Sampling) if field.name in given}
    return given | {"sampling": Sampling(**chosen)}


def bytes_of(given: object, name: str = "data") -> bytes:
    """What holds bytes, such as a bytearray, as bytes. Raises UsageError for anything else, such as text."""
    try:
        return given if isinstance(given, bytes) else bytes(memoryview(given))  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise UsageError(f"{name} is of type {type(given).__name__}: give bytes, as text.encode() makes them") from None


class LM:
    """What `bytelm.load` returns.

    `model` is the plain `nn.Module`: `lm.model(ids, state)`, `lm.model.initial_state(batch)`.
    """

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
        """The training context length in bytes: the window length of evaluation."""
        self.modality = modality
        """The modality: it encodes files and decodes documents; None for raw bytes."""
        self.recipe = recipe
        """How to build the model, as stored in checkpoints; None for a model that was not loaded from one."""
        self.bits_per_byte = bits_per_byte
        """The last validation of its training; None if unknown."""

    def with_windowing(self, mode: Mode) -> LM:
        """The same model with another windowing in generation: "basic", "sliding", "strided" or "both".

        Sliding continues without limit in windows of `context`; strided makes two offset passes (MEGABYTE, 2.3.3).
        Raises UsageError for a model that does not support it.
        """
        return LM(for_generating(self.model, mode, self.context), self.context, self.modality)

    def known_recipe(self) -> Mapping[str, Any]:
        """The recipe. Raises UsageError if there is none: a manually built model, or another windowing."""
        if self.recipe is None:
            raise UsageError("this LM has no recipe: use the unmodified LM that bytelm.load returns")
        return self.recipe

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model in the format of Hugging Face's `transformers`, with a model card; `bytelm.load` reads it.

        Raises UsageError for a token model or without a recipe, ResourceError if it cannot be written.
        """
        pretrained.save(Path(folder), self.model, self.known_recipe(), self.context, self.bits_per_byte)

    @overload
    def generate(self, prompt: bytes, **options: Unpack[Options]) -> bytes: ...

    @overload
    def generate(self, prompt: list[bytes], **options: Unpack[Options]) -> list[bytes]: ...

    def generate(self, prompt: bytes | list[bytes], **options: Unpack[Options]) -> bytes | list[bytes]:
        """What the model generates after a prompt, or after each of several, without the prompts.

        Raises UsageError and ConfigError for options outside their limits; see `Options`.
        """
        prompts = [bytes_of(one, "prompt") for one in (prompt if isinstance(prompt, list) else [prompt])]
        texts = [generation.data for generation in generate(self.model, prompts, **split(options))]
        return texts if isinstance(prompt, list) else texts[0]

    def stream(self, prompt: bytes, **options: Unpack[Options]) -> Iterator[bytes]:
        """The same bytes as `generate`, each as soon as it is decided."""
        return stream(self.model, bytes_of(prompt, "prompt"), **split(options))

    def bits(self, data: bytes, online: Memory | None = None, dynamic: Dynamic | None = None) -> tuple[float, int]:
        """(bits, bytes) of `data` as one document: every byte is scored once.

        `online`: a memory that learns `data` beside the model, which stays as it is (`bytelm.online.memory`); the bits
        are then of both. `dynamic`: a copy of the model whose weights learn `data` and give the bits in its place
        (`bytelm.evaluate.dynamic`). Raises UsageError for a token model with a memory, or a copy of another model.
        """
        found = list(measure(self.model, [("", bytes_of(data))], context=self.context, memory=online, dynamic=dynamic))
        meter = Meter.of(found)
        nats = meter.nats if online is None else sum(document.online or 0.0 for document in found)
        return nats / LN2, meter.bytes

    def logprobs(self, prefix: bytes, continuation: bytes) -> NDArray[np.float64]:
        """The log-probability of each byte of `continuation` after `prefix`, in nats `[bytes]`.

        Exact for a token model too, which costs about a step per byte; see `decoding.bytewise`.
        """
        given = bytes_of(prefix, "prefix"), bytes_of(continuation, "continuation")
        return logprobs(over_bytes(self.model), *given)

    def compress(self, data: bytes, online: Memory | None = None, streams: int | None = None) -> bytes:
        """`data`, losslessly compressed to about `bits(data, online)`; `online` learns it.

        `streams`: parts that are read side by side, by default 8 of long data, and 1 with a memory, of which each has
        a copy. Raises UsageError for a token model, or on a GPU.
        """
        return compress(self.model, bytes_of(data), self.context, memory=online, streams=streams)

    def decompress(self, packed: bytes, online: Memory | None = None) -> bytes:
        """The input of `compress`, with the same model in the same precision, and the same memory. Raises DataError."""
        return decompress(self.model, bytes_of(packed, "packed"), memory=online)

    def patches(self, data: bytes) -> list[bytes]:
        """The patches of `data`. Raises UsageError for a model without patches."""
        data = bytes_of(data)
        opens = patch_view(self.model, data).opens
        return [data[a:b] for a, b in pairwise([*np.flatnonzero(opens).tolist(), len(data)])]


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
    tables: Tables | None = None,
    *,
    watch: Watch | None = None,
) -> LM:
    """The trained model of a run directory, of one checkpoint in it, or of a folder that `save_pretrained` wrote.

    `device`: the CPU by default, where decoding is batch-invariant and compression possible; or "auto" (a GPU if there
    is one), "cuda", "cuda:1", "mps". `dtype`: of the weights, such as torch.bfloat16; the entropy model stays float32.

    For inference on a CPU in little memory (docs/weights.md): `weights`, "bf16" or "int8" (with a scale per row), packs
    linear layers once, straight from the file; the entropy model is computed in float32 always. `tables`: n-gram tables
    in "memory", in the precision of the file; or "mapped": their rows are read from the file when they are needed.
    `watch`: see `checkpoint.packed.load_packed`.

    Raises CheckpointError, UsageError for an unavailable device or unknown option, ResourceError for too little memory.
    """
    for name, given, known in (("weights", weights, WEIGHTS), ("tables", tables, TABLES)):
        if given not in (None, *known):
            raise UsageError(f"{name} {given!r}: give {' or '.join(map(repr, known))}, or leave it out")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype}: weights can be {', '.join(map(str, DTYPES))}")
    loaded = assemble.load(path, resolve(device), dtype, weights, tables, watch)
    state, run = loaded.state, loaded.checkpoint.parent.parent
    lines = read_history(run / METRICS) if "step" in state else []
    measured = [line for line in lines if line.get("kind") == "validation"]
    bits = [line["bits_per_byte"] for line in measured if line["step"] <= state["step"]]
    return LM(loaded.model, int(state["context"]), loaded.modality, state["recipe"], bits[-1] if bits else None)
