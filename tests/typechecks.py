"""Arguments and results checked against their annotations, shapes included, at every call of bytelm in a test.

jaxtyping's own decorator checks the same, but binds arguments by `inspect` at every call, checks them again with the
result, keeps sizes of axes also where no array is annotated, and makes the check of a nested function anew whenever the
outer one is called: half of what the tests took.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_args

import jaxtyping
from beartype import BeartypeConf, beartype
from jaxtyping._decorator import _destring_annotation, _make_fn_with_signature
from jaxtyping._import_hook import Typechecker
from jaxtyping._storage import pop_shape_memo, push_shape_memo, shape_str

Function = Callable[..., Any]

# The numeric tower: where a float is wanted an int will do, as type checkers have it and beartype by default has not.
_conf = BeartypeConf(is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError)
_checked: Callable[[Function], Function] = beartype(conf=_conf)


@dataclasses.dataclass(frozen=True)
class Check:
    """Functions that raise `TypeCheckError`, of the arguments and of the result; `axes`: their shapes name axes."""

    arguments: Function
    result: Function
    axes: bool


_checks: dict[Any, Check] = {}  # a nested function is made again and again from one piece of source


def install() -> None:
    """Have the modules of bytelm that are imported from now on check their functions and dataclasses."""
    jaxtyping.install_import_hook("bytelm", f"{__name__}.decorated")
    ours, original = list(Typechecker.lookup.values())[-1], jaxtyping.jaxtyped

    def jaxtyped(*args: Any, **kwargs: Any) -> Any:
        return decorated if kwargs.get("typechecker") is ours else original(*args, **kwargs)

    jaxtyping.jaxtyped = jaxtyped


def decorated(target: Any) -> Any:
    """A function with its check; of a dataclass, `__init__`; any other class as it is."""
    if inspect.isclass(target):
        if dataclasses.is_dataclass(target) and not hasattr(target.__init__, "__wrapped__"):
            target.__init__ = decorated(target.__init__)
        return target
    made: list[Check] = []  # at the first call: most functions are never called in most processes

    @functools.wraps(target)
    def checked(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        check = made[0] if made else _check_of(target, made)
        if not check.axes:
            check.arguments(*args, **kwargs)
            return check.result(target(*args, **kwargs))
        sizes = push_shape_memo({})
        try:
            check.arguments(*args, **kwargs)
            return check.result(target(*args, **kwargs))
        except jaxtyping.TypeCheckError as error:
            error.add_note(f"{target.__qualname__}: {shape_str(sizes)}")
            raise
        finally:
            pop_shape_memo()

    return checked


def _check_of(target: Function, made: list[Check]) -> Check:
    written = target.__annotations__
    key = (target.__module__, target.__code__, tuple(written.items()))
    if not all(hint is None or isinstance(hint, str) for hint in written.values()):
        check = _new_check(target)
    elif key in _checks:
        check = _checks[key]
    else:
        check = _checks[key] = _new_check(target)
    made.append(check)
    return check


def _new_check(target: Function) -> Check:
    # By jaxtyping's own functions, so that what an annotation in quotes means and what it leaves out is the same.
    signature = inspect.signature(target)
    hints = {name: _destring_annotation(p.annotation, target.__globals__) for name, p in signature.parameters.items()}
    given = [p.replace(annotation=hints[name]) for name, p in signature.parameters.items()]
    found = _destring_annotation(signature.return_annotation, target.__globals__)
    place = (target.__name__, target.__qualname__, target.__module__)
    signature = signature.replace(parameters=given, return_annotation=Any)

    def result(value: Any) -> Any:
        return value

    result.__name__, result.__qualname__, result.__module__ = place
    result.__annotations__ = {"return": Any if found is inspect.Signature.empty else found}
    arguments = _checked(_make_fn_with_signature(*place, signature, output=False))
    return Check(arguments, _checked(result), _axes([*hints.values(), found]))


def _axes(hints: Iterable[Any]) -> bool:
    """Whether an array is annotated anywhere in some annotations."""
    return any(
        (inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray))
        or _axes(hint if isinstance(hint, list) else get_args(hint))
        for hint in hints
    )
