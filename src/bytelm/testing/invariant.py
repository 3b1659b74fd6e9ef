"""The error of a violated invariant, and the comparison that raises it."""

from __future__ import annotations

from typing import Any

from jaxtyping import Shaped
from torch import Tensor, nn

from bytelm.nn.state import map_state
from bytelm.transfer import to_host

EXAMPLES = 4  # sequences that each invariant is checked on by default; the first of them is long


class InvariantError(AssertionError):
    """A model or patcher violates an invariant: which one, whose, where, the difference and the bound."""

    def __init__(self, invariant: str, subject: str, where: str, difference: float, bound: float) -> None:
        super().__init__(
            f"{subject} violates the invariant {invariant!r} at {where}: off by {difference:.3g}, bound {bound:.3g}"
        )
        self.invariant, self.subject, self.where, self.difference, self.bound = (
            invariant,
            subject,
            where,
            difference,
            bound,
        )


def subject(module: nn.Module) -> str:
    """What a module is called in an error, with its patcher where it has one."""
    patcher = getattr(module, "patcher", None)
    name = type(module).__name__
    return name if patcher is None else f"{name}({type(patcher).__name__})"


def agree(
    invariant: str,
    module: nn.Module,
    found: Shaped[Tensor, "time ..."],
    wanted: Shaped[Tensor, "time ..."],
    where: str,
    bound: float = 0.0,
) -> float:
    """The worst difference between two sequences of logits or decisions; raises LawError if it is above `bound`.

    NaN counts as an infinite difference.
    """
    if not len(wanted):
        return 0.0
    found, wanted = to_host(found), to_host(wanted)
    gaps = (found.double() - wanted.double()).abs().nan_to_num(nan=float("inf")).reshape(len(wanted), -1).amax(1)
    worst = float(gaps.max())
    if worst > bound:
        first = int((gaps > bound).nonzero()[0])
        raise InvariantError(invariant, subject(module), f"position {first} of {where}", worst, bound)
    return worst


def agree_states(invariant: str, module: nn.Module, now: Any, then: Any, where: str) -> None:
    """Raises LawError unless two states are bitwise identical."""

    def compare(new: Tensor, old: Tensor) -> Tensor:
        agree(invariant, module, new.flatten(), old.flatten(), f"a tensor of {where}")
        return new

    map_state(compare, now, then)
