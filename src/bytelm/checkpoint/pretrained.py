"""A model in the folder that `transformers` and the Hugging Face Hub expect, written and read without either.

    folder/
        config.json             model_type "bytelm", the recipe of the model, its context
        model.safetensors       the weights, their names under "model."; in pieces where transformers wrote a large one
        generation_config.json  the ids that end a text, that pad, and that are never written
        tokenizer_config.json   that bytes are read as they are: bytelm.hf.ByteTokenizer
        README.md               the model card

Such a folder holds one model and no training: a run goes on from its own checkpoints (`checkpoint.store`) only.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
from torch import Tensor

from bytelm.checkpoint import legacy
from bytelm.checkpoint.tensors import Keep, as_it_is
from bytelm.data.files import write_whole
from bytelm.errors import CheckpointError, ResourceError, UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.units import BOS, EOS, PAD, UNWRITTEN, VOCAB, show_bytes, show_count

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CARD = "README.md"
TYPE = "bytelm"
ARCHITECTURE = "BytelmForCausalLM"
PREFIX = "model."

SPECIALS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
GENERATION: dict[str, Any] = {**SPECIALS, "suppress_tokens": list(UNWRITTEN)}
TOKENIZER: dict[str, Any] = {"tokenizer_class": "ByteTokenizer"}

MEASURED = "Held-out bits per byte"
CARD_TEXT = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- bytelm
- byte-level
- {architecture}
---

# A byte-level language model ({architecture})

It models raw bytes: there is no vocabulary file, and any file is valid input.

{table}

```python
import bytelm.hf  # pip install "bytelm[hf]"
from transformers import pipeline
pipeline("text-generation", "path/to/this/folder")("# Monday", max_new_tokens=80)
```

`bytelm.load("path/to/this/folder")` loads it without transformers, and generates faster.
"""


def config(recipe: Mapping[str, Any], context: int) -> dict[str, Any]:
    """The fields of config.json: `recipe` as in checkpoints, `context` in bytes."""
    named = {"architectures": [ARCHITECTURE], "model_type": TYPE, "dtype": "float32"}
    return {**named, "recipe": dict(recipe), "context": context, "vocab_size": VOCAB, **SPECIALS}


def card(recipe: Mapping[str, Any], context: int, model: ByteModel, bits_per_byte: float | None = None) -> str:
    """The model card: what the model is, what is known of it, and how it is loaded."""
    rows = {"Architecture": recipe["model"]["name"]}
    patching, entropy_model, modality = (recipe.get(part) for part in ("patching", "entropy_model", "modality"))
    if model.patcher is not None and isinstance(patching, Mapping):
        rows["Patches"] = str(patching["name"])
        if patching["name"] == "entropy" and isinstance(entropy_model, Mapping):
            rows["Patches"] += f", cut by {entropy_model['name']} entropies"
    rows["Parameters"] = show_count(sum(parameter.numel() for parameter in model.parameters()))
    rows["Context in training"] = show_bytes(context)
    if isinstance(modality, Mapping):
        rows["Its bytes stand for"] = str(modality["name"])
    if bits_per_byte is not None:
        rows[MEASURED] = f"{bits_per_byte:.3f}"
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    return CARD_TEXT.format(architecture=recipe["model"]["name"], table=table)


def unmeasured(text: str) -> str:
    """A card without what was measured."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(f"| {MEASURED} |"))


def refuse_tokens(model: ByteModel) -> None:
    """Raises UsageError for a token model: in this format ids are bytes."""
    if model.tokens is not None:
        raise UsageError(
            f"this model reads {model.vocabulary} tokens, and such a folder holds models of bytes only: "
            "keep it as a run, which bytelm.load reads"
        )


def save(
    folder: Path, model: ByteModel, recipe: Mapping[str, Any], context: int, bits_per_byte: float | None = None
) -> None:
    """Write the folder, which is made where it is missing; files of these names that it holds are replaced.

    Raises UsageError for a token model and ResourceError where the disk refuses.
    """
    refuse_tokens(model)
    if model.content is not None:
        raise UsageError("packed weights cannot be saved: load it without weights and tables, then save it")
    texts = {CONFIG: config(recipe, context), "generation_config.json": GENERATION, "tokenizer_config.json": TOKENIZER}
    tensors = {PREFIX + name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in texts.items():
            write_whole(folder / name, (json.dumps(content, indent=2) + "\n").encode())
        write_whole(folder / CARD, card(recipe, context, model, bits_per_byte).encode())
        aside = folder / f"{WEIGHTS}.tmp"
        safetensors.torch.save_file(tensors, aside, metadata={"format": "pt"})
        aside.replace(folder / WEIGHTS)
    except (OSError, safetensors.SafetensorError) as error:
        needed = sum(tensor.nbytes for tensor in tensors.values())
        raise ResourceError(
            f"cannot write a model of {show_bytes(needed)} to {folder}: {error}: make room or name another folder"
        ) from error


def found(path: Path) -> bool:
    """Whether a directory is such a folder, and not a run (into which someone may have saved one)."""
    return (path / CONFIG).is_file() and not (path / "checkpoints").is_dir()


def read_config(path: Path) -> dict[str, Any]:
    """What config.json says. Raises CheckpointError for a folder of another model, or a damaged one."""
    state = _json(path / CONFIG)
    if state.get("model_type") != TYPE:
        raise CheckpointError(
            f"{path / CONFIG} is of model_type {state.get('model_type')!r}, and bytelm reads {TYPE!r}: "
            "load it with transformers, or `bytelm convert` it"
        )
    if not isinstance(state.get("recipe"), dict) or not isinstance(state.get("context"), int):
        raise CheckpointError(f"{path / CONFIG} lacks the recipe or the context of a model: save the model again")
    return legacy.state(state)


def read_tensors(path: Path, keep: Keep = as_it_is) -> dict[str, Tensor]:
    """The weights by the model's own names, in float32 whatever they were saved in, or what is to `keep` of each.

    Raises CheckpointError where a file is missing or damaged.
    """
    tensors: dict[str, Tensor] = {}
    for file in files(path):
        try:
            tensors |= safetensors.torch.load_file(file)
        except FileNotFoundError:
            raise CheckpointError(f"{path} has no {file.name}: copy or download the whole folder") from None
        except (OSError, safetensors.SafetensorError, KeyError, RuntimeError, TypeError) as error:
            raise CheckpointError(f"{file} cannot be read ({error!r}): copy or download it again") from error
    # A name that is not under the prefix stays as it is: comparing with the model's own names shows it.
    named = {legacy.tensor_name(name.removeprefix(PREFIX)): tensor for name, tensor in tensors.items()}
    return {name: keep(name, t.float() if t.is_floating_point() else t) for name, t in named.items()}


def files(path: Path) -> list[Path]:
    """The files of weights: one, or those that an index names, in this folder and no other. Raises CheckpointError."""
    if (path / WEIGHTS).exists() or not (path / INDEX).exists():
        return [path / WEIGHTS]
    pieces = _json(path / INDEX).get("weight_map")
    if not isinstance(pieces, dict):
        raise CheckpointError(f"{path / INDEX} names no files of weights: copy or download it again")
    return sorted({path / Path(str(piece)).name for piece in cast("dict[str, Any]", pieces).values()})


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object: copy or download it again")
    return cast("dict[str, Any]", content)
