"""What a model costs, counted from its shape without training it.

    paper      the formula of the architecture's own paper: attention over the causal half, what surrounds it left out
    executed   everything that a pass here multiplies: masked parts of attention, the entropy model, hash tables
    hnet       ... and the lookup of a byte, or token, as if it were a product with a one-hot vector (as H-Net counts)

All three are operations of a forward pass, two for a multiplication and its addition; a step of training is three times
that. None counts norms, softmax, activations, rotations, residuals or hashing.
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

TOKEN = 3.4  # bytes: the mean token of a vocabulary of 4096 on English novels


@dataclass(frozen=True)
class Costs:
    """What a model costs. FLOPs are of a forward pass, per byte; see the file for the conventions."""

    parameters: int
    """Trained ones, of the model itself: the patcher's entropy model is not among them."""
    tables: int
    """Of them in embedding tables: bytes or tokens, n-grams, learned positions, pads. No output matrix is one."""
    entropy_model: int
    """Parameters of the patcher's scorer."""
    paper: float
    """FLOPs by the formula of the paper, to which the entropy model is free."""
    executed: float
    """FLOPs of all matrix products, the entropy model's too; additions of hash-table rows; BLT's cross-attention."""
    hnet: float
    """FLOPs executed, and those of the input embeddings as products. n-gram tables stay lookups."""
    read: float
    """Bytes of weights and caches read for one more byte, in bfloat16, one row, in the middle of a window."""


def usual_mean(recipe: Recipe) -> float:
    """Bytes of a patch or token where nothing was read yet: what patching is to be calibrated to, or TOKEN."""
    if isinstance(recipe.patching, entropy.Config):
        return recipe.patching.target_mean_length
    return 1.0 if recipe.build_for_counting().tokens is None else TOKEN


def costs(recipe: Recipe, window: int, mean: float = 1.0) -> Costs:
    """The costs of a recipe's model that reads `window` ids in a row, built without memory.

    `mean`: bytes of a patch, or of a token for a model of tokens; models of bytes, and MEGABYTE, which counts its own
    patches, do not look at it. Patching need not be calibrated. Without a formula of an architecture's
    own, FLOPs by the paper are those executed.
    """
    return counted(recipe.build_for_counting(), window, mean)


def counted(model: ByteModel, window: int, mean: float = 1.0) -> Costs:
    """The same of a model that is there."""
    patcher, counts = model.patcher or nn.Identity(), costs_of(model)
    entropy_model = next((part for part in patcher.modules() if isinstance(part, ByteModel)), None)
    scored = sum(p.numel() for p in patcher.parameters())
    tables = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    inputs = sum(m.weight.numel() for m in tables if m.num_embeddings in (VOCAB, model.vocabulary))
    others = {id(m) for m in patcher.modules()}
    own = sum(m.weight.numel() for m in tables if id(m) not in others)

    size = mean if model.vocabulary > VOCAB else 1.0  # bytes of an id
    executed = model.flops(window, max(1, round(window / mean))) / window / size + counts.other_operations()
    read = counts.read(window // 2, mean) / size
    if entropy_model is not None:
        executed += entropy_model.flops(window, 0) / window
        read += 2 * costs_of(entropy_model).read(
            window // 2, 1.0
        )  # in float32 whatever the model is in: a boundary is decided once
    return Costs(
        parameters=sum(p.numel() for p in model.parameters()) - scored,
        tables=own - counts.multiplied_tables(),
        entropy_model=scored,
        paper=counts.paper(window, mean),
        executed=executed,
        hnet=executed + 2 * inputs / size,
        read=read,
    )


def costs_of(model: ByteModel) -> ArchitectureCosts:
    """How an architecture's costs are counted: by its own formulas where it has some."""
    own = part_of(model, "costs")
    return ArchitectureCosts(model) if own is None else own.Costs(model)
