"""The checks that each function of bytelm has in the tests: of arguments, results, shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from typechecks import decorated

if TYPE_CHECKING:
    from somewhere import Absent  # type: ignore[import-not-found]


@decorated
def doubled(count: int, *more: int, by: float = 2) -> float | None:
    return "two" if count == 2 else count * by  # type: ignore[return-value]


@decorated
def product(a: Float[Tensor, "rows inner"], b: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    return a @ b if len(a) > 1 else (a @ b).T


@decorated
def total(parts: list[Float[Tensor, " rows"]], first: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    return product(torch.ones(2, 7), torch.ones(7, 3)).sum() + first + parts[0]  # sizes of its own within


@decorated
def counter(start: int) -> Callable[[int], int]:
    @decorated
    def count(by: int) -> int:
        return start + by

    return count


@decorated
@dataclass(frozen=True)
class Pair:
    name: str
    a: Float[Tensor, " rows"]
    b: Float[Tensor, " rows"]


@decorated
def lenient(value: Absent, later: Later) -> None:
    """Of what is imported for type checkers alone nothing is known here."""


class Later: ...


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(jaxtyping.TypeCheckError) as found:
        call()
    return "\n".join([str(found.value), *getattr(found.value, "__notes__", [])])


def test_arguments_and_results() -> None:
    assert doubled(3) == 6 and doubled(3, 4, by=1) == 3
    for call in (lambda: doubled("3"), lambda: doubled(1, "4"), lambda: doubled(1, by="1")):  # type: ignore[arg-type]
        assert "doubled" in refused(call)
    assert "return" in refused(lambda: doubled(2))
    with pytest.raises(TypeError, match="missing 1 required"):
        doubled()  # type: ignore[call-arg]


def test_shapes_within_one_call() -> None:
    assert product(torch.ones(2, 3), torch.ones(3, 4)).shape == (2, 4)
    assert "inner=3" in refused(lambda: product(torch.ones(2, 3), torch.ones(4, 4)))
    assert "columns=4" in refused(lambda: product(torch.ones(1, 3), torch.ones(3, 4)))
    assert total([torch.ones(4)], torch.ones(4)).tolist() == [44] * 4
    assert "rows" in refused(lambda: total([torch.ones(4)], torch.ones(5)))
    assert product(torch.ones(3, 2), torch.ones(2, 1)).shape == (3, 1)  # nothing is left of the calls before


def test_nested_functions_dataclasses_and_later_names() -> None:
    for start in (1, 5):  # of the second one the check is that of the first
        assert counter(start)(2) == start + 2
        refused(lambda start=start: counter(start)("2"))  # type: ignore[arg-type]
    Pair("x", torch.ones(2), torch.ones(2))
    assert "rows=2" in refused(lambda: Pair("x", torch.ones(2), torch.ones(3)))
    lenient("anything", Later())
    refused(lambda: lenient("anything", 1))  # type: ignore[arg-type]
