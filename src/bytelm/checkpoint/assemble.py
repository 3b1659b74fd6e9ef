"""Building models from recipes, and loading trained models from runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bytelm.checkpoint import pretrained, store
from bytelm.checkpoint.packed import PATCHER, Tables, Watch, Weights, check_memory, load_packed, load_patcher
from bytelm.checkpoint.tensors import Keep, as_it_is, widened
from bytelm.config import Chosen, build
from bytelm.data.modalities.base import Modality
from bytelm.device import fitting
from bytelm.errors import CheckpointError, ConfigError, UsageError
from bytelm.interfaces.model import ByteModel
from bytelm.patching import entropy
from bytelm.patching.base import Patcher
from bytelm.transfer import HOST

MOST_LAYERS = 4096  # of a model and its entropy model: a bound on what is built before anything is compared


INITIALISERS = frozenset(
    function for name, function in vars(nn.init).items() if name.endswith("_") and callable(function)
)


class Uninitialised(TorchFunctionMode):
    """Leaves out what modules begin with: on the meta device it has no values, and torch imports its compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The tensor as it is, of functions of `nn.init`; all others as they are."""
        kwargs = kwargs or {}
        if func in INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Recipe:
    """The parts of a model: an architecture, its patching scheme, and the entropy model of entropy patching.

    And its modality, if not raw bytes.
    """

    model: Annotated[Any, Chosen("models")]
    patching: Annotated[Any, Chosen("patching")] | None = None
    entropy_model: Annotated[Any, Chosen("entropy_models")] | None = None
    modality: Annotated[Any, Chosen("data.modalities")] | None = None

    def __post_init__(self) -> None:
        if self.model.patched and self.patching is None:
            raise ConfigError("patching is missing: this model reads patches; name a scheme, as in patching.name=space")
        if self.uses_entropy_model and self.entropy_model is None:
            raise ConfigError("the entropy model is missing: entropy patches need one; set entropy_model.name=ngram")
        if (count := layers(self.model) + layers(self.entropy_model)) > MOST_LAYERS:
            raise ConfigError(f"the model would have {count} layers, n-gram tables and filters: {MOST_LAYERS} at most")

    @property
    def uses_entropy_model(self) -> bool:
        """Whether an entropy model is part of the model."""
        return bool(self.model.patched and self.patching is not None and self.patching.uses_entropy_model)

    def draft(self) -> Recipe:
        """The recipe with some thresholds or other where patching is not calibrated yet: to count and time a model."""
        patching = self.patching
        if isinstance(patching, entropy.Config) and not patching.calibrated:
            return replace(self, patching=replace(patching, threshold=0.0, relative_threshold=0.0))
        return self

    def build_for_counting(self) -> ByteModel:
        """The model without memory for its parameters, to be counted; thresholds need not be known yet."""
        return self.draft().build_on_meta()

    def build_on_meta(self, patcher: Patcher | None = None) -> ByteModel:
        """The model without memory for its parameters, which are to be put in; a patcher that is given is as it is.

        Raises as `build` does, and ConfigError where it has more parameters than can be counted.
        """
        try:
            with torch.device("meta"), Uninitialised():
                return self.build(patcher)
        except (RuntimeError, OverflowError, TypeError) as error:  # torch has all three for a size beyond 64 bits
            raise ConfigError(f"no such model can be built: {str(error).splitlines()[0]}") from error

    def build(self, patcher: Patcher | None = None) -> ByteModel:
        """The model around a patcher, its parameters not yet initialised.

        Raises ConfigError for patching not yet calibrated.
        """
        patcher = self.patcher() if patcher is None else patcher
        return self.model.build() if patcher is None else self.model.build(patcher)

    def patcher(self) -> Patcher | None:
        """The patcher with its entropy model; None for a model without one. Raises ConfigError as `assemble` does."""
        if not self.model.patched or self.patching is None:
            return None
        return self.patching.build(
            *([self.entropy_model.build()] if self.uses_entropy_model and self.entropy_model else [])
        )


def layers(part: Any) -> int:
    """The number of layers, n-gram tables and filters of a configuration: the modules of a model."""
    count = 0
    for name, value in vars(part).items() if part is not None else ():
        if name.endswith("layers"):
            count += value if isinstance(value, int) else sum(value)
        elif isinstance(value, tuple):
            count += len(cast("tuple[Any, ...]", value))
    return count


@dataclass(frozen=True)
class Loaded:
    """A trained model, the state of its checkpoint, and its modality (None: raw bytes)."""

    model: ByteModel
    state: dict[str, Any]
    checkpoint: Path
    modality: Modality | None


def load(
    path: str | Path,
    device: torch.device = HOST,
    dtype: torch.dtype | None = None,
    weights: Weights | None = None,
    tables: Tables | None = None,
    watch: Watch | None = None,
) -> Loaded:
    """The newest checkpoint of a run directory, one checkpoint's directory, or a folder of `save_pretrained`.

    Its weights are on `device`, those of the model itself in `dtype` where one is given: see `restore`. On the host,
    `weights` or `tables` load it for inference: see `packed.load_packed`. On another device, `weights` "bf16" is that
    dtype, and with `tables` "memory" n-gram tables stay on the host. `watch`: see `packed.load_packed`.
    Raises CheckpointError, UsageError, and ResourceError where there is no room.
    """
    packs = bool(weights or tables) and device.type == "cpu"
    if packs and dtype is not None:
        raise UsageError(f"dtype {dtype} and packed weights: leave out dtype, or weights and tables")
    if not packs and (weights == "int8" or tables == "mapped"):
        raise UsageError(f'weights="int8" and tables="mapped" are for CPUs, not for {device}: use "bf16" and "memory"')
    if weights is not None and not packs:
        dtype = torch.bfloat16
    return store.settled(Path(path), lambda: load_once(Path(path), device, dtype, packs, weights, tables, watch))


def load_once(
    path: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    packs: bool,
    weights: Weights | None,
    tables: Tables | None,
    watch: Watch | None,
) -> Loaded:
    """See `load`. `packs`: for inference on the host. Raises too where a training removes what is being read."""
    checkpoint, state = resolve_checkpoint(path, closely=not packs)
    recipe = build(Recipe, state["recipe"], str(checkpoint / spec_file(checkpoint)))
    model = recipe.build_on_meta()
    if packs:
        try:
            with fitting(device, f"the model of {checkpoint}", lambda: 'take weights="int8", tables="mapped"'):
                load_packed(model, checkpoint, weights, tables, watch)
        except CheckpointError as error:
            if (good := intact(path)) in (None, checkpoint):
                raise
            raise CheckpointError(f"{error}; the latest intact one is {good}: name it instead") from error
    else:
        if device.type == "cpu":
            check_memory(model, checkpoint, dtype)
        for table in model.lookup_tables():
            table.on_host = tables == "memory"
        restore(model, checkpoint, device, dtype)
    return Loaded(model.eval(), state, checkpoint, recipe.modality.build() if recipe.modality else None)


def intact(run: Path) -> Path | None:
    """The newest checkpoint of a run that verifies, if any."""
    try:
        return store.newest_good(run)[0]
    except CheckpointError:
        return None


def load_patches(path: str | Path, device: torch.device = HOST) -> ByteModel:
    """A model of which only what decides its patches, or tokens, has memory. Raises CheckpointError."""

    def read() -> ByteModel:
        checkpoint, state = resolve_checkpoint(path, closely=False)
        model = build(Recipe, state["recipe"], str(checkpoint / spec_file(checkpoint))).build_on_meta()
        if model.target_patch is not None:  # the whole model decides
            return load(path, device).model
        load_patcher(model, checkpoint)
        return model

    model = store.settled(Path(path), read)
    if model.patcher is not None:
        model.patcher.to(device)
    return model.eval()


def resolve_checkpoint(path: str | Path, *, closely: bool = True) -> tuple[Path, dict[str, Any]]:
    """Where `load` would take weights from, and what is said of them there: a recipe, a context. CheckpointError.

    `closely`: the checksums of whole files are compared; sizes alone otherwise.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"no run at {path}: name a directory that `bytelm train` or `save_pretrained` wrote")
    if pretrained.found(path):
        return path, pretrained.read_config(path)
    if (path / store.MANIFEST).exists():
        checkpoint, state = path, store.read_state(path)
    else:
        checkpoint, state = store.newest_state(path, closely=closely)
    if not isinstance(state.get("recipe"), dict):
        raise CheckpointError(f"{checkpoint / store.STATE} has no recipe: it is not a checkpoint of a trained model")
    if type(state.get("context")) is not int or not 1 <= state["context"] < 1 << 63:
        raise CheckpointError(f"{checkpoint / store.STATE} has no context in bytes: it was not written by bytelm")
    return checkpoint, state


def spec_file(checkpoint: Path) -> str:
    """The file that has the recipe."""
    return pretrained.CONFIG if pretrained.found(checkpoint) else store.STATE


def restore(model: ByteModel, checkpoint: Path, device: torch.device = HOST, dtype: torch.dtype | None = None) -> None:
    """Load the weights into a `blank` model, after comparing names, shapes and types; no second copy in memory.

    16-bit weights are widened to float32, or cast to `dtype`; a patcher and its entropy model stay in float32.
    Each goes to `device` before the next one is read. Raises CheckpointError and ResourceError.
    """

    here = {id(table.weight) for table in model.lookup_tables() if table.on_host}
    staying = {name for name, parameter in model.named_parameters() if id(parameter) in here}

    def wanted(name: str, tensor: Tensor) -> torch.dtype:
        own = tensor.dtype != torch.float32 or name.startswith(PATCHER)
        return tensor.dtype if own else dtype or torch.float32

    def keep(name: str, tensor: Tensor) -> Tensor:
        tensor = widened(name, tensor)
        # An entropy model says itself, when it is moved, what of it stays on the host.
        return tensor.to(HOST if name.startswith(PATCHER) or name in staying else device, wanted(name, tensor))

    with fitting(device, f"the model of {checkpoint}", lambda: "load it in torch.bfloat16, or on the CPU"):
        tensors = weights_of(checkpoint, keep)
        like = {name: tensor.to(wanted(name, tensor)) for name, tensor in model.state_dict().items()}
        store.check_keys(like, tensors, str(checkpoint))
        model.load_state_dict(tensors, assign=True)
        model.to(device)


def weights_of(checkpoint: Path, keep: Keep = as_it_is) -> dict[str, Tensor]:
    """The weights at a place that `resolve_checkpoint` found; those of `save_pretrained` are in float32 always."""
    if pretrained.found(checkpoint):
        return pretrained.read_tensors(checkpoint, keep)
    return store.read_tensors(checkpoint, "model", keep)
