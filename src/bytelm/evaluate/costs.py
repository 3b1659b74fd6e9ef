"""FLOPs and memory traffic of a model, counted from its shape without training it.

    paper      the formula of the architecture's own paper: attention over the causal half, no entropy model
    executed   every matmul that runs: masked parts of attention, the entropy model, hash tables
    hnet       ... and embedding lookups counted as products with one-hot vectors (H-Net's convention)

FLOPs are of a forward pass, two per multiply-add; a training step takes three times as many. None counts norms,
softmax, activations, rotations, residuals or hashing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bytelm.checkpoint.assemble import Recipe
from bytelm.find import part_of
from bytelm.interfaces.costs import ArchitectureCosts
from bytelm.interfaces.model import ByteModel
from bytelm.patching import entropy
from bytelm.units import VOCAB

TOKEN = 3.4  # mean bytes per token of a vocabulary of 4096 on English novels


@dataclass(frozen=True)
class Costs:
    """Costs of a model. FLOPs are of a forward pass, per byte; see the module for the conventions."""

    parameters: int
    """Trainable parameters, without the entropy model."""
    tables: int
    """Of them in embedding tables: bytes or tokens, n-grams, learned positions, pads; not the output matrix."""
    entropy_model: int
    """Parameters of the entropy model."""
    paper: float
    """FLOPs by the formula of the paper, without the entropy model."""
    executed: float
    """FLOPs of all matmuls, entropy model included; additions of hash-table rows; BLT's cross-attention."""
    hnet: float
    """`executed`, and the input embeddings as products; n-gram tables stay lookups."""
    read: float
    """Bytes of weights and caches read per decoded byte, in bfloat16, batch 1, in the middle of a window."""


def usual_mean(recipe: Recipe) -> float:
    """Expected bytes per patch or token before any data was read: the target of calibration or training, or TOKEN."""
    if isinstance(recipe.patching, entropy.Config):
        return recipe.patching.target_mean_length
    model = recipe.build_for_counting()
    return TOKEN if model.tokens is not None else model.target_patch or 1.0


def costs(recipe: Recipe, window: int, mean: float = 1.0) -> Costs:
    """The costs of a recipe's model at a context of `window` ids, built on the meta device.

    `mean`: bytes per patch or token, ignored by models of bytes and by MEGABYTE, whose patches are fixed. Patching need
    not be calibrated. For an architecture without a formula, `paper` equals `executed`.
    """
    return counted(recipe.build_for_counting(), window, mean)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters; see `Costs`."""

    parameters: int
    tables: int
    entropy_model: int


def sizes(model: ByteModel) -> Sizes:
    """The parameters of an existing model, of any kind."""
    patcher = model.patcher or nn.Identity()
    others = {id(part) for part in patcher.modules()}
    own = [m for m in model.modules() if isinstance(m, nn.Embedding) and id(m) not in others]
    scored = sum(p.numel() for p in patcher.parameters())
    return Sizes(
        parameters=sum(p.numel() for p in model.parameters()) - scored,
        tables=sum(m.weight.numel() for m in own) - costs_of(model).multiplied_tables(),
        entropy_model=scored,
    )


def counted(model: ByteModel, window: int, mean: float = 1.0) -> Costs:
    """`costs` of an existing model."""
    patcher, counts = model.patcher or nn.Identity(), costs_of(model)
    entropy_model = next((part for part in patcher.modules() if isinstance(part, ByteModel)), None)
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    inputs = sum(m.weight.numel() for m in tables if m.num_embeddings in (VOCAB, model.vocabulary))

    size = mean if model.vocabulary > VOCAB else 1.0  # bytes of an id
    executed = (model.flops(window, max(1, round(window / mean))) / window + counts.other_operations()) / size
    read = counts.read(window // 2, mean) / size
    if entropy_model is not None:
        executed += entropy_model.flops(window, 0) / window
        read += 2 * costs_of(entropy_model).read(
            window // 2, 1.0
        )  # in float32 whatever the dtype of the model: boundaries do not depend on it
    return Costs(
        **vars(sizes(model)),
        paper=counts.paper(window, mean),
        executed=executed,
        hnet=executed + 2 * inputs / size,
        read=read,
    )


def costs_of(model: ByteModel) -> ArchitectureCosts:
    """The cost formulas of an architecture: its own, or the default."""
    own = part_of(model, "costs")
    return ArchitectureCosts(model) if own is None else own.Costs(model)
