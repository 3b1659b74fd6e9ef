"""TOML in and out: strict building, errors of one line, layers, and what is written is read back."""

from __future__ import annotations

import math
import string
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, ClassVar, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bytelm import config
from bytelm.config import Chosen, assignments, build, dump_toml, load_toml, merge, preset, preset_names, to_mapping
from bytelm.errors import ConfigError
from bytelm.find import PARTS, SHARED, find, names


@dataclass(frozen=True)
class Gru:
    recurrent: ClassVar[bool] = True  # a fact about the component, not a setting

    dim: int = 8
    heads: int = 2

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ConfigError(f"dim {self.dim} is not a multiple of heads {self.heads}")


@dataclass(frozen=True)
class Lstm:
    layers: int
    window: int | None = 32


@dataclass(frozen=True)
class Train:
    steps: int = 100
    rate: float = 1e-3
    compile: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    order: Literal[1, 2] = 1
    windows: tuple[int, ...] = (4, 8)
    label: str = ""
    warmup: int | None = None


@dataclass(frozen=True)
class Run:
    model: Annotated[Any, Chosen("models")]
    train: Train = field(default_factory=Train)
    patching: Annotated[Any, Chosen("patching")] | None = None


@pytest.fixture(autouse=True)
def two_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two components of our own stand in models/ while a test runs."""
    modules: dict[str, ModuleType] = {}
    for name, component in (("gru", Gru), ("lstm", Lstm)):
        modules[name] = ModuleType(f"bytelm.models.{name}")
        vars(modules[name]).update(globals(), Config=component)  # where the annotations, strings, are looked up
        monkeypatch.setattr(component, "__module__", f"bytelm.models.{name}")
        monkeypatch.setitem(sys.modules, f"bytelm.models.{name}", modules[name])

    def find_ours(floor: str, name: str) -> ModuleType:
        assert floor == "models"
        if name not in modules:
            raise ConfigError(f"unknown models name {name!r}: known: gru, lstm")
        return modules[name]

    monkeypatch.setattr(config, "find", find_ours)
    monkeypatch.setattr(config, "names", lambda floor: ["gru", "lstm"])


def failure(mapping: dict[str, Any], cls: type = Run) -> str:
    with pytest.raises(ConfigError) as caught:
        build(cls, mapping, "x.toml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_build_makes_the_whole_tree() -> None:
    run = build(
        Run,
        {"model": {"name": "gru", "dim": 16}, "train": {"rate": 1, "windows": [2, 3], "warmup": 5}},
        "x.toml",
    )
    assert run == Run(model=Gru(dim=16), train=Train(rate=1.0, windows=(2, 3), warmup=5))
    assert type(run.train.rate) is float
    assert type(run.train.windows) is tuple


def test_the_name_chooses_the_component_and_is_written_back() -> None:
    run = build(Run, {"model": {"name": "lstm", "layers": 3}}, "x.toml")
    assert run.model == Lstm(layers=3)
    assert to_mapping(run)["model"] == {"name": "lstm", "layers": 3, "window": 32}


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    [
        ({"model": {"name": "gru", "dmi": 4}}, "x.toml: unknown key model.dmi: did you mean model.dim?"),
        ({"model": {"name": "gru", "zzz": 4}}, "x.toml: unknown key model.zzz: known: dim, heads"),
        ({"model": {"name": "gur"}}, "x.toml: model: unknown models name 'gur': known: gru, lstm"),
        ({"model": {"dim": 4}}, "x.toml: missing key model.name: known: gru, lstm"),
        ({"model": {"name": 3}}, "x.toml: model.name must be a string, not 3"),
        ({"model": 3}, "x.toml: model must be a table, not 3"),
        ({"model": {"name": "lstm"}}, "x.toml: missing key model.layers"),
        ({}, "x.toml: missing key model"),
        ({"model": {"name": "gru", "dim": 9}}, "x.toml: dim 9 is not a multiple of heads 2"),
        ({"model": {"name": "gru", "dim": 2**63}}, "x.toml: model.dim is beyond the 64 bits of a TOML integer"),
    ],
)
def test_what_is_wrong_with_a_component(mapping: dict[str, Any], sentence: str) -> None:
    assert failure(mapping) == sentence


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("steps", "abc", "steps must be an integer, not 'abc'"),
        ("steps", 1.5, "steps must be an integer, not 1.5"),
        ("steps", True, "steps must be an integer, not True"),
        ("steps", "none", "steps must be an integer, not 'none'"),
        ("steps", {}, "steps must be an integer, not a table"),
        ("rate", True, "rate must be a number, not True"),
        ("rate", 10**400, "rate is beyond the 64 bits of a TOML integer"),
        ("compile", 1, "compile must be true or false, not 1"),
        ("label", ["a"] * 9, "label must be a string, not an array"),
        ("label", 12, "label must be a string, not 12"),
        ("windows", 3, "windows must be an array, not 3"),
        ("windows", [1, 2.5], "windows[1] must be an integer, not 2.5"),
        ("dtype", "bfloat61", "unknown dtype 'bfloat61': did you mean 'bfloat16'?"),
        ("dtype", 16, "dtype must be one of 'float32', 'bfloat16', not 16"),
        ("order", True, "order must be one of 1, 2, not True"),
    ],
)
def test_what_is_wrong_with_a_value(key: str, value: Any, sentence: str) -> None:
    assert failure({key: value}, Train) == f"x.toml: {sentence}"


def test_all_problems_are_told_at_once() -> None:
    sentence = failure({"model": {"name": "gru", "dmi": 1, "heads": "two"}, "train": {"steps": 0.5}, "tarin": {}})
    assert sentence == (
        "x.toml: unknown key tarin: did you mean train?; unknown key model.dmi: did you mean model.dim?; "
        "model.heads must be an integer, not 'two'; train.steps must be an integer, not 0.5"
    )


@pytest.mark.fault("K7")
def test_a_long_value_does_not_make_a_long_line() -> None:
    assert len(failure({"steps": "x" * 10_000}, Train)) < 100


def test_none_has_a_word() -> None:
    assert build(Lstm, {"layers": 1, "window": "none"}, "x.toml").window is None
    assert to_mapping(Lstm(layers=1, window=None))["window"] == "none"
    assert build(Run, {"model": {"name": "gru"}, "patching": "none"}, "x.toml").patching is None


def test_the_key_name_is_reserved() -> None:
    @dataclass(frozen=True)
    class Named:
        name: str = "x"

    with pytest.raises(TypeError, match="reserved"):
        build(Named, {}, "x.toml")


def test_a_field_that_toml_cannot_hold_is_refused() -> None:
    @dataclass(frozen=True)
    class Odd:
        pair: set[int] = field(default_factory=set[int])

    with pytest.raises(TypeError, match="pair"):
        build(Odd, {"pair": [1]}, "x.toml")


# Suites and predictors of memories have no Config.
CONFIGURED = [kind for kind in (*PARTS, *SHARED) if kind not in ("evaluate.robustness", "online.predictors")]


@pytest.mark.parametrize(("floor", "name"), [(floor, name) for floor in CONFIGURED for name in names(floor)])
def test_every_real_component_is_read_back_from_what_it_writes(
    floor: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the real models/ again

    @dataclass(frozen=True)
    class Holder:
        part: Annotated[Any, Chosen(floor)]

    Holder.__annotations__["part"] = Annotated[Any, Chosen(floor)]  # not the string, which no module could resolve
    holder = Holder(part=find(floor, name).Config())
    mapping = tomllib.loads(dump_toml(to_mapping(holder)))
    assert mapping["part"]["name"] == name
    assert build(Holder, mapping, "x.toml") == holder


finite = st.floats(allow_nan=False, allow_infinity=False)
numbers = st.floats(allow_nan=False)  # TOML has infinities; a configuration of ours refuses them
words = st.text(st.characters(exclude_categories=["Cs"]))
runs = st.builds(
    Run,
    model=st.one_of(
        st.builds(Lstm, layers=st.integers(-(2**63) + 1, 2**63 - 1), window=st.none() | st.integers(1, 99)),
        st.integers(1, 9).map(lambda n: Gru(dim=2 * n)),
    ),
    train=st.builds(
        Train,
        steps=st.integers(0, 10**12),
        rate=finite,
        compile=st.booleans(),
        dtype=st.sampled_from(["float32", "bfloat16"]),
        windows=st.lists(st.integers(0, 99)).map(tuple),
        label=words,
        warmup=st.none() | st.integers(0, 9),
    ),
    patching=st.none(),
)


@given(runs)
def test_what_is_written_is_read_back(run: Run) -> None:
    text = dump_toml(to_mapping(run))
    assert build(Run, tomllib.loads(text), "x.toml") == run


leaves = st.one_of(st.integers(), numbers, st.booleans(), words)
tables = st.recursive(
    st.dictionaries(words, leaves | st.lists(leaves | st.lists(leaves))),
    lambda inner: st.dictionaries(words, leaves | inner),
    max_leaves=12,
)


@given(tables)
@example({"a": 1e-7, "b": math.inf, "c": "\x7f\x00\r\n", "d": {}, "e": {"f": {"g": {}}}, "h": [[1], [[2.5, "x"], []]]})
def test_any_mapping_survives_toml(mapping: dict[str, Any]) -> None:
    assert tomllib.loads(dump_toml(mapping)) == mapping


@pytest.mark.fault("K7")
@given(st.dictionaries(st.sampled_from(["steps", "rate", "dtype", "windows", "label", "warmup", "x"]), leaves | tables))
def test_any_mapping_builds_or_is_refused_in_one_line(mapping: dict[str, Any]) -> None:
    try:
        build(Train, mapping, "x.toml")
    except ConfigError as error:
        assert str(error).startswith("x.toml: ")


def test_toml_for_people() -> None:
    assert dump_toml(to_mapping(Run(model=Gru()))) == (
        'patching = "none"\n\n[model]\nname = "gru"\ndim = 8\nheads = 2\n\n[train]\nsteps = 100\nrate = 0.001\n'
        'compile = false\ndtype = "float32"\norder = 1\nwindows = [\n    4,\n    8,\n]\nlabel = ""\nwarmup = "none"\n'
    )


def test_an_undecodable_string_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"path = .a.+udcff.* is not Unicode"):
        dump_toml({"steps": 1, "data": {"path": "a\udcff"}})


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        (b"a = 1\nb =\n", "line 2"),
        (b"\xff", "utf-8"),
        (b"a = " + b"[" * 9999, "deep"),
        (b"a = " + b"1" * 9999, "digits"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path: Path, content: bytes, hint: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=hint) as caught:
        load_toml(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: No such file"):
        load_toml(tmp_path / "none.toml")


def test_merge_goes_table_by_table_and_leaves_its_arguments() -> None:
    base = {"a": {"x": 1, "y": {"z": 2}}, "b": 3}
    assert merge(base, {"a": {"y": {"w": 4}}, "c": 5}) == {"a": {"x": 1, "y": {"z": 2, "w": 4}}, "b": 3, "c": 5}
    assert base == {"a": {"x": 1, "y": {"z": 2}}, "b": 3}


def test_another_component_starts_afresh() -> None:
    base = {"model": {"name": "gru", "dim": 64}, "train": {"steps": 5}}
    assert merge(base, {"model": {"name": "lstm", "layers": 2}})["model"] == {"name": "lstm", "layers": 2}
    assert merge(base, {"model": {"name": "gru", "heads": 4}})["model"] == {"name": "gru", "dim": 64, "heads": 4}
    assert merge(base, {"model": {"heads": 4}})["model"] == {"name": "gru", "dim": 64, "heads": 4}


@given(tables, tables)
def test_merge_keeps_every_key_of_the_upper_layer(base: dict[str, Any], over: dict[str, Any]) -> None:
    assert merge(base, {}) == base
    assert merge({}, over) == over
    assert merge(merge(base, over), over) == merge(base, over)


def test_assignments_make_one_layer_in_any_order() -> None:
    texts = ["model.layers=2", "model.name=lstm", "train.rate=1e-4", "train.label=a b", "train.windows=[1, 2]"]
    layer = assignments(texts, "--set")
    assert layer == {
        "model": {"name": "lstm", "layers": 2},
        "train": {"rate": 1e-4, "label": "a b", "windows": [1, 2]},
    }
    assert assignments(reversed(texts), "--set") == layer
    assert merge({"model": {"name": "gru", "dim": 4}}, layer)["model"] == {"name": "lstm", "layers": 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=3", 3),
        ("a=true", True),
        ("a = 'x'", "x"),
        ("a=x=y", "x=y"),
        ("a=", ""),
        ("a=none", "none"),
        ("a=2026-11-22", "2026-11-22"),
        ("a=1\nb=2", "1\nb=2"),
        ("a=1", 1),
        ("a=inf", float("inf")),
    ],
)
def test_an_assigned_value_is_toml_or_a_string(text: str, value: Any) -> None:
    assert assignments([text], "--set") == {"a": value}


@pytest.mark.parametrize("text", ["a", "=3", "a..b=3", ".a=3"])
def test_an_assignment_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write key=value"):
        assignments([text], "--set")


def test_the_later_assignment_wins() -> None:
    assert assignments(["a.b=1", "a.b=2"], "--set") == {"a": {"b": 2}}
    assert assignments(["a=1", "a.b=2"], "--set") == {"a": {"b": 2}}


def test_presets_are_found_by_name_and_nearest_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.toml").write_text("[train]\nsteps = 7\n")
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(config, "files", lambda package: tmp_path)
    assert preset_names() == ["tiny"]
    assert preset("tiny") == {"train": {"steps": 7}}
    with pytest.raises(ConfigError, match="unknown preset 'tinny': did you mean 'tiny'"):
        preset("tinny")


@pytest.mark.parametrize("letters", [string.printable, "é字🙂\x7f\x00\t\"'\\"])
def test_letters_survive(letters: str) -> None:
    assert tomllib.loads(dump_toml({letters: letters})) == {letters: letters}
