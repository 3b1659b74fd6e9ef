"""Trees of frozen dataclasses from TOML and back: every component owns its Config, and this file knows none of them.

    preset ──┐
    x.toml ──┼─ merge ─▶ mapping ─ build ─▶ dataclasses ─ to_mapping ─▶ mapping ─ dump_toml ─▶ config.toml
    --set  ──┘

    @dataclass(frozen=True)
    class RunConfig:
        model: Annotated[Any, Chosen("models")]   # [model] name = "blt", and the keys of bytelm.models.blt.model.Config
        steps: int = 1000

Two words are reserved. The key `name` stands in chosen tables only, where it selects the component. TOML has no null,
so in a field that may be None the string "none" is None.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, is_dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from bytelm.errors import ConfigError
from bytelm.find import find, name_of, names, unknown

T = TypeVar("T")
MOST = 1 << 20  # bytes of a configuration file

_SCALARS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


@dataclass(frozen=True)
class Chosen:
    """Marks a field whose table's `name` selects the module of `kind` whose Config the rest of the table builds."""

    kind: str


# --- mapping -> dataclasses -------------------------------------------------------------------------------------------


def build(cls: type[T], mapping: Mapping[str, Any], source: str) -> T:
    """A frozen dataclass, and the ones inside it, from a mapping as TOML gives it.

    Raises ConfigError, one line that opens with `source` and names every unknown, missing and mistyped key, or else
    the impossible combinations that the dataclasses themselves refuse.
    """
    try:
        return _table(cls, mapping, "")
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def _table(cls: type[T], mapping: Any, key: str) -> T:
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{key} must be a table, not {_show(mapping)}")
    kinds = _kinds(cls)
    problems = [_unknown_key(_dotted(key, name), kinds) for name in mapping if name not in kinds]
    values: dict[str, Any] = {}
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]  # T is a dataclass
        if field.name in mapping:
            try:
                values[field.name] = _value(kinds[field.name], mapping[field.name], _dotted(key, field.name))
            except ConfigError as error:
                problems.append(str(error))
        elif field.default is MISSING and field.default_factory is MISSING:
            problems.append(f"missing key {_dotted(key, field.name)}")
    if problems:
        raise ConfigError("; ".join(problems))
    return cls(**values)  # whose __post_init__ may refuse the combination


def _value(kind: Any, value: Any, key: str) -> Any:
    """`value` as the annotation `kind` wants it."""
    bare = _without_none(kind)
    if bare is not kind and (value is None or value == "none"):
        return None
    if isinstance(value, str) and value in _words(kind):
        return value
    if type(value) is int and value.bit_length() > 63:
        raise ConfigError(f"{key} is beyond the 64 bits of a TOML integer")
    origin, args = get_origin(bare), get_args(bare)
    if origin is Annotated:
        return _chosen(args[1], value, key)
    if origin is Literal:
        return _literal(args, value, key)
    if origin is tuple and args[1:] == (Ellipsis,):
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{key} must be an array, not {_show(value)}")
        return tuple(_value(args[0], item, f"{key}[{index}]") for index, item in enumerate(value))
    if is_dataclass(bare) and isinstance(bare, type):
        return _table(bare, value, key)
    if bare not in _SCALARS:
        raise TypeError(f"{key}: a config field cannot be {kind}")
    if bare is float and type(value) is int:
        return float(value)
    if bare is float and type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{key} must be finite, not {value}")
    if type(value) is not bare:  # not isinstance: bool is a subclass of int
        raise ConfigError(f"{key} must be {_SCALARS[bare]}, not {_show(value)}")
    return value


def _chosen(choice: Chosen, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{key} must be a table, not {_show(value)}")
    table = dict(value)
    name = table.pop("name", None)
    if name is None:
        raise ConfigError(f"missing key {key}.name: known: {', '.join(names(choice.kind))}")
    if not isinstance(name, str):
        raise ConfigError(f"{key}.name must be a string, not {_show(name)}")
    try:
        module = find(choice.kind, name)
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from None
    return _table(module.Config, table, key)


def _literal(words: tuple[Any, ...], value: Any, key: str) -> Any:
    if any(type(value) is type(word) and value == word for word in words):
        return value
    if isinstance(value, str):
        raise ConfigError(unknown(key, value, [str(word) for word in words]))
    raise ConfigError(f"{key} must be one of {', '.join(map(repr, words))}, not {_show(value)}")


def _kinds(cls: type) -> dict[str, Any]:
    """Field name → annotation."""
    hints = get_type_hints(cls, include_extras=True)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    if "name" in kinds:
        raise TypeError(f"{cls.__qualname__}.name: the key `name` is reserved for chosen tables")
    return kinds


def _without_none(kind: Any) -> Any:
    """X of `X | None` and of `X | Literal["auto"]`; any other annotation as it is."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    (bare,) = (arg for arg in get_args(kind) if arg is not NoneType and get_origin(arg) is not Literal)
    return bare


def _words(kind: Any) -> tuple[Any, ...]:
    """The words of `X | Literal[...]`, which a value may be instead of an X."""
    arms = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    return tuple(word for arm in arms if get_origin(arm) is Literal for word in get_args(arm))


def _dotted(table: str, name: str) -> str:
    return f"{table}.{name}" if table else name


def _unknown_key(key: str, known: Iterable[str]) -> str:
    table, _, name = key.rpartition(".")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {_dotted(table, near[0])}?" if near else f"known: {', '.join(known)}"
    return f"unknown key {key}: {hint}"


def _show(value: Any) -> str:
    """A value in an error message: short, whatever a hostile file holds."""
    if isinstance(value, Mapping):
        return "a table"
    return "an array" if isinstance(value, (list, tuple)) else reprlib.repr(value)


# --- dataclasses -> mapping -> TOML -----------------------------------------------------------------------------------


def to_mapping(config: Any) -> dict[str, Any]:
    """What `build` makes `config` from: every field, defaults included, so that a later default changes no old run."""
    return {name: _plain(kind, getattr(config, name)) for name, kind in _kinds(type(config)).items()}


def _plain(kind: Any, value: Any) -> Any:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return list(value)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    if not is_dataclass(value):
        return value
    if get_origin(_without_none(kind)) is not Annotated:
        return to_mapping(value)
    return {"name": name_of(value), **to_mapping(value)}


def dump_toml(mapping: Mapping[str, Any]) -> str:
    """TOML text of tables, integers, floats, booleans, strings and arrays of those: `tomllib.loads` gives it back.

    Raises ConfigError for a string that is no Unicode text (an undecodable file name), which TOML cannot hold.
    """
    text = tomli_w.dumps(mapping)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = text[text.rfind("\n", 0, error.start) + 1 :].partition("\n")[0]
        raise ConfigError(f"{line!a} is not Unicode text, so no TOML file can hold it") from None
    return text


# --- layers: presets, files, --set ------------------------------------------------------------------------------------


def load_toml(path: Path | Traversable) -> dict[str, Any]:
    """The mapping in a TOML file. Raises ConfigError that names the file and, for bad TOML, the line."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST + 1)
        if len(text) > MOST:
            raise ConfigError(f"{path}: longer than {MOST} bytes, which no configuration is")
        return tomllib.loads(text.decode())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except ValueError as error:  # bad TOML, bad UTF-8, a number of thousands of digits
        raise ConfigError(f"{path}: {error}") from None


def preset_names() -> list[str]:
    """The presets that come with bytelm, sorted."""
    return sorted(p.name.removesuffix(".toml") for p in files("bytelm.presets").iterdir() if p.name.endswith(".toml"))


def preset(name: str) -> dict[str, Any]:
    """The configuration of one preset. Raises ConfigError with the nearest spelling."""
    return {key: table for key, table in _preset_file(name).items() if key != "preset"}


def nominal_size(name: str) -> str | None:
    """What a preset's paper calls its size, where that is not what its parameters count to."""
    return _preset_file(name).get("preset", {}).get("nominal")


def _preset_file(name: str) -> dict[str, Any]:
    known = preset_names()
    if name not in known:
        raise ConfigError(unknown("preset", name, known))
    return load_toml(files("bytelm.presets") / f"{name}.toml")


def assignments(texts: Iterable[str], source: str) -> dict[str, Any]:
    """The mapping of `--set a.b=c` arguments, in order. c is a TOML value, or else the string it is.

    All of them make one mapping, to be merged once, so that the order of `--set model.name=…` among them is free.
    """
    mapping: dict[str, Any] = {}
    for text in texts:
        dotted, equals, value = text.partition("=")
        path = [part.strip() for part in dotted.split(".")]
        if not equals or not all(path):
            raise ConfigError(f"{source} {text}: write key=value, as in {source} train.steps=100")
        layer: Any = _parsed(value.strip())
        for part in reversed(path):
            layer = {part: layer}
        mapping = merge(mapping, layer)
    return mapping


def _parsed(text: str) -> Any:
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    # A newline in the text can make further keys, and TOML has dates, which no field wants.
    return parsed["value"] if len(parsed) == 1 and isinstance(parsed["value"], (*_SCALARS, list, dict)) else text


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the keys of `over`, table by table. A table that changes its `name` starts afresh.

    Its old keys belong to another component, which the new one would refuse or, worse, read in another sense.
    """
    if "name" in base and "name" in over and base["name"] != over["name"]:
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
