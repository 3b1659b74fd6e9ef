"""Training settings: the tables [train], [entropy_model_train] and [parallel] of a run's configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from bytelm.checkpoint.assemble import Recipe
from bytelm.checkpoint.budget import Budget
from bytelm.config import Chosen
from bytelm.data.mixture import Share, shares_of
from bytelm.data.options import DataConfig
from bytelm.device import AUTO
from bytelm.errors import ConfigError

WIDEST = 64  # processes that weights are sharded over; rings of more wait for each other longer than they send


@dataclass(frozen=True)
class TrainConfig:
    """One run of the training loop. It ends at the first of `steps`, `minutes` and `bytes` that is reached.

    `context_length`: in bytes, also of evaluation. `batch`: sequences per forward pass;
    `gradient_accumulation_steps` forward passes make a step. The learning rate warms up over `warmup_steps`, then falls
    along a line to `min_lr_ratio` of itself; embedding tables use `embedding_lr_scale` times it. `dropout`:
    probability for residual branches and n-grams, for training over several epochs. `precision` "auto" is bfloat16
    with native hardware support. `activation_checkpointing`: of all stages, of those over bytes ("local"), or of the
    one over patches ("global"). `spikes`: whether to "skip" a step whose loss or gradient is far above recent ones
    (`training.spikes`), or to "keep" it. `table_optimizer`: "adam" has a second moment for each number of the n-gram
    tables, "rowwise_adam" one for each row. `tables`: "host" keeps n-gram tables and their moments in main memory when
    the model is on a device. `device`: to train on, the entropy model too, as `bytelm.device` names it.
    `timeout_minutes`: timeout of processes that wait for each other (`training.dist`).
    """

    steps: int | None = None
    minutes: float | None = None
    bytes: int | None = None
    context_length: int = 1024
    batch: int = 16
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-3
    min_lr_ratio: float = 0.0
    embedding_lr_scale: float = 1.0
    warmup_steps: int = 50
    weight_decay: float = 0.1
    dropout: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    spikes: Literal["skip", "keep"] = "skip"
    seed: int = 0
    table_optimizer: Literal["adam", "rowwise_adam"] = "adam"
    tables: Literal["device", "host"] = "device"
    device: str = AUTO
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    activation_checkpointing: Literal[False, True, "local", "global"] = False
    compile: bool = False
    eval_every_minutes: float = 1.0
    eval_bytes: int = 65536
    checkpoint_every_minutes: float = 2.0
    sample_bytes: int = 160
    timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        problems: list[str] = []
        for name in ("context_length", "batch", "gradient_accumulation_steps", "eval_bytes"):
            if getattr(self, name) < 1:
                problems.append(f"train.{name} = {getattr(self, name)}: must be at least 1")
        for name in ("steps", "minutes", "bytes"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems.append(f'train.{name} = {value}: must be above 0, or "none" for no such limit')
        for name in (
            "learning_rate",
            "embedding_lr_scale",
            "max_grad_norm",
            "eval_every_minutes",
            "checkpoint_every_minutes",
            "timeout_minutes",
        ):
            if not getattr(self, name) > 0:
                problems.append(f"train.{name} = {getattr(self, name)}: must be above 0")
        for name in ("beta1", "beta2", "min_lr_ratio", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(f"train.{name} = {getattr(self, name)}: must be at least 0 and below 1")
        for name in ("warmup_steps", "weight_decay", "seed", "sample_bytes"):
            if getattr(self, name) < 0:
                problems.append(f"train.{name} = {getattr(self, name)}: must not be negative")
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def budget(self) -> Budget:
        """When it ends."""
        return Budget(self.steps, self.bytes, self.minutes)

    @property
    def limited(self) -> bool:
        """Whether there is a training budget."""
        return self.budget != Budget()


@dataclass(frozen=True)
class ParallelConfig:
    """How several processes share a training; it may change from session to session.

    Weights, gradients and moments are sharded over `shard` processes, of which there are `replicate` groups (hybrid
    sharded data parallelism, HSDP); "auto" shards over all, from more than `WIDEST` processes on over those of one
    machine. `tables`: rows of n-gram tables are "sharded" over all processes, or "replicated", where the gradients of
    rows are gathered: for small tables. `sync_each_batch` reduces gradients after every micro-batch: with gradient
    accumulation that is more traffic, in less memory. `async_checkpoint` writes checkpoints while the training goes on,
    from a copy in main memory.
    """

    shard: int | Literal["auto"] = AUTO
    replicate: int | Literal["auto"] = AUTO
    tables: Literal["sharded", "replicated"] = "sharded"
    sync_each_batch: bool = False
    async_checkpoint: bool = True

    def __post_init__(self) -> None:
        for name in ("shard", "replicate"):
            value = getattr(self, name)
            if value != AUTO and value < 1:
                raise ConfigError(f'parallel.{name} = {value}: must be at least 1, or "auto"')

    def layout(self, world: int, local: int) -> tuple[int, int]:
        """(replicate, shard) for so many processes, `local` of them on each machine.

        Raises ConfigError if their product is another number.
        """
        replicate, shard = self.replicate, self.shard
        if shard == AUTO and replicate == AUTO:
            shard = world if world <= WIDEST or world % local else local
        if shard == AUTO:
            shard = max(1, world // int(replicate))
        if replicate == AUTO:
            replicate = max(1, world // int(shard))
        if int(replicate) * int(shard) != world:
            raise ConfigError(
                f"parallel.replicate = {replicate} times parallel.shard = {shard} is not the {world} processes there "
                'are: leave one of them "auto"'
            )
        return int(replicate), int(shard)


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run: model, data, and training of the model and its entropy model.

    `init_from`: the run to fine-tune, its entropy model included. `mix`: the sources and their
    weights as in "books=0.5", or "books=0.5@2" for two epochs at most; empty where the data is one source.
    """

    model: Annotated[Any, Chosen("models")]
    patching: Annotated[Any, Chosen("patching")] | None = None
    entropy_model: Annotated[Any, Chosen("entropy_models")] | None = None
    modality: Annotated[Any, Chosen("data.modalities")] | None = None
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    entropy_model_train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=300, context_length=512))
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    init_from: str | None = None
    mix: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self.shares
        recipe = self.recipe  # which refuses invalid combinations
        if not self.train.limited:
            raise ConfigError("no training budget: set steps, minutes or bytes")
        if self.entropy_model_train.device != AUTO:
            raise ConfigError(
                "entropy_model_train.device: the entropy model is trained on the model's device; set train.device"
            )
        if recipe.uses_entropy_model and not self.entropy_model_train.limited:
            raise ConfigError(
                "entropy_model_train has no training budget: set entropy_model_train.steps, minutes or bytes"
            )

    @property
    def shares(self) -> tuple[Share, ...]:
        """The sources of the mixture; none where the data is one source."""
        return shares_of(self.mix)

    @property
    def recipe(self) -> Recipe:
        """What the model is made of."""
        return Recipe(self.model, self.patching, self.entropy_model, self.modality)
