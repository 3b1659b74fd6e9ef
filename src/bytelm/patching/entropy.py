"""Patches that start where the next byte is hard to predict: the Byte Latent Transformer's rule (paper, section 2.3).

    H(x_t)     entropy of the entropy model's prediction of byte t, in nats, from the bytes before it
    threshold  byte t opens a patch if H(x_t) > threshold                          (global constraint)
    relative   ... if H(x_t) - H(x_{t-1}) > relative_threshold                    (approximate monotonic constraint)
    both       ... if both hold

An entropy model may be reset at each newline (`entropy_model.reset_newline`), which keeps repetitive text from drifting
into ever longer patches (paper, section 4.4). Entropies are always computed in float32: a boundary is decided once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bytelm.errors import ConfigError
from bytelm.patching.base import Guard, GuardState, Patcher
from bytelm.patching.layout import Rows, at_end


@runtime_checkable
class EntropyModel(Protocol):
    """A model of the next byte, seen only through its uncertainty."""

    def initial_state(self, batch: int) -> Any:
        """The state of rows that have read nothing yet."""
        ...

    def entropies(self, ids: Int[Tensor, "batch new"], state: Any) -> tuple[Float[Tensor, "batch new"], Any]:
        """Entropy in nats of the prediction after each id, float32, on the host; and the state to continue from."""
        ...


@dataclass(frozen=True)
class Config:
    """The thresholds of the `rule` must be set before patches can be cut; `calibrate` finds them.

    `target_mean_length` is the patch size in bytes that calibration aims at; the bounds are those of `Guard`.
    """

    uses_entropy_model: ClassVar[bool] = True

    threshold: float | None = None
    relative_threshold: float | None = None
    target_mean_length: float = 4.5
    rule: str = "threshold"
    max_length: int | None = 32
    max_single_byte_run: int | None = 16

    def __post_init__(self) -> None:
        if self.rule not in ("threshold", "relative", "both"):
            raise ConfigError(f"patching.rule = {self.rule!r}: known: threshold, relative, both")
        if not self.target_mean_length > 1:
            raise ConfigError(f"patching.target_mean_length = {self.target_mean_length}: must be above 1 byte")
        self.guard()

    @classmethod
    def tiny(cls) -> dict[str, Config]:
        """Small shapes that together cover every path of this file, for the invariant tests."""
        return {rule: cls(rule=rule) for rule in ("threshold", "relative", "both")}

    @property
    def calibrated(self) -> bool:
        """Whether the thresholds of the rule are set."""
        return not self.missing()

    def missing(self) -> list[str]:
        """The thresholds that the rule needs and that are not set."""
        needed = {
            "threshold": ("threshold",),
            "relative": ("relative_threshold",),
            "both": ("threshold", "relative_threshold"),
        }[self.rule]
        return [name for name in needed if getattr(self, name) is None]

    def guard(self) -> Guard:
        """The guard of this configuration."""
        return Guard(self.max_length, self.max_single_byte_run)

    def build(self, entropy_model: EntropyModel) -> Entropy:
        """The patcher of this configuration around an entropy model."""
        return Entropy(self, entropy_model)


@dataclass(frozen=True)
class EntropyMemory:
    """The last entropy, the entropy model's state and the guard's."""

    entropy: Float[Tensor, " batch"]
    entropy_model: Any
    guard: GuardState


class Entropy(Patcher):
    """A patch starts where the entropy model's prediction is uncertain."""

    def __init__(self, config: Config, entropy_model: EntropyModel) -> None:
        super().__init__()
        if missing := config.missing():
            raise ConfigError(
                f"patching.{missing[0]} is not set, and rule {config.rule!r} needs it: set it, or calibrate it"
            )
        self.config = config
        self.guard = config.guard()
        self.entropy_model = entropy_model

    def memory(self, batch: int) -> EntropyMemory:
        """No entropy seen: the first id of a document opens a patch anyway."""
        zero = torch.zeros(batch)
        return EntropyMemory(zero, self.entropy_model.initial_state(batch), self.guard.initial_state(batch))

    def propose(
        self, rows: Rows, forced: Bool[Tensor, "batch new"], memory: EntropyMemory
    ) -> tuple[Bool[Tensor, "batch new"], EntropyMemory]:
        """The rule of the configuration under the guard."""
        entropy, entropy_model = self.entropy_model.entropies(rows.ids, memory.entropy_model)
        before = torch.cat([memory.entropy[:, None], entropy], 1)[:, : entropy.shape[1]]
        opens, guard = self.guard.apply(propose(self.config, entropy, before), forced, rows, memory.guard)
        return opens, EntropyMemory(at_end(entropy, rows.lengths, memory.entropy), entropy_model, guard)


def propose(
    config: Config, entropy: Float[Tensor, "batch new"], before: Float[Tensor, "batch new"]
) -> Bool[Tensor, "batch new"]:
    """The rule alone: where the next byte's entropy, and its rise over this byte's, are above their thresholds."""
    opens = torch.ones_like(entropy, dtype=torch.bool)
    if config.rule != "relative" and config.threshold is not None:
        opens &= entropy > config.threshold
    if config.rule != "threshold" and config.relative_threshold is not None:
        opens &= entropy - before > config.relative_threshold
    return opens
