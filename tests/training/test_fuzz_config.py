"""Any configuration either trains a step or is refused in one line that says why: nothing in between."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bytelm.config import build, load_toml, to_mapping
from bytelm.errors import BytelmError, ConfigError
from bytelm.find import find, names
from bytelm.testing.tiny import shapes
from bytelm.training.config import DataConfig, RunConfig, TrainConfig
from bytelm.training.run import train

FLOORS = {"model": "models", "patching": "patching", "entropy_model": "entropy_models"}
# floor: (name, Config, a small shape of it) of each file
SMALL = {
    floor: [
        (name, find(floor, name).Config, to_mapping(small)) for name in names(floor) for _, small in shapes(floor, name)
    ]
    for floor in FLOORS.values()
}
STEP = {
    "steps": 1,
    "context_length": 32,
    "batch": 2,
    "warmup_steps": 1,
    "sample_bytes": 3,
    "eval_bytes": 64,
    "precision": "float32",
}
INTEGERS = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 8, 16, 31, 64])
NUMBERS = st.sampled_from([-1.0, 0.0, 1e-9, 0.01, 0.5, 0.99, 1.0, 3.0, 1e6, float("inf"), float("nan")])
TEXTS = st.sampled_from(["", "none", "text", "a/b", "é", "x" * 200])


def values(kind: Any) -> st.SearchStrategy[Any]:
    """What could be given for a field of this type, good or bad."""
    options = [bare for bare in get_args(kind) if bare is not type(None)] if type(None) in get_args(kind) else [kind]
    bare, optional = options[0], type(None) in get_args(kind)
    if get_origin(bare) is Literal:
        found: st.SearchStrategy[Any] = st.sampled_from(get_args(bare))
    elif get_origin(bare) is tuple:
        found = st.lists(values(get_args(bare)[0]), max_size=3)
    else:
        found = {bool: st.booleans(), int: INTEGERS, float: NUMBERS, str: TEXTS}[bare]
    return st.one_of(found, st.just("none")) if optional else found


@st.composite
def changed(draw: st.DrawFn, table: dict[str, Any], cls: type) -> dict[str, Any]:
    """A table of a configuration with a few fields set to something else."""
    kinds = {name: kind for name, kind in get_type_hints(cls, include_extras=True).items() if name in table}
    kinds = {name: kind for name, kind in kinds.items() if get_origin(kind) is not Annotated}
    picked = draw(st.lists(st.sampled_from(sorted(kinds)), max_size=1)) if kinds else []
    return {**table, **{name: draw(values(kinds[name])) for name in picked}}


@st.composite
def part(draw: st.DrawFn, floor: str) -> dict[str, Any]:
    """A component in one of its small shapes, with a few fields set to something else."""
    name, cls, small = draw(st.sampled_from(SMALL[floor]))
    return {"name": name, **draw(changed(small, cls))}


@st.composite
def runs(draw: st.DrawFn) -> dict[str, Any]:
    """The mapping of a whole run."""
    tables: dict[str, Any] = {"model": draw(part("models"))}
    for key in ("patching", "entropy_model"):
        if draw(st.integers(0, 9)):
            tables[key] = draw(part(FLOORS[key]))
    default = to_mapping(TrainConfig(steps=1))
    # Not compiled: each shape would take a minute, and tests of its own hold compiled to eager.
    tables["train"] = draw(changed({**default, **STEP}, TrainConfig)) | {"steps": 1, "compile": False}
    tables["entropy_model_train"] = {**default, **STEP}
    tables["data"] = draw(changed(to_mapping(DataConfig()), DataConfig))
    return tables


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("notes") / "notes.txt"
    path.write_text("".join(f"line {number} of some notes\n" for number in range(300)))
    return path


def one_step(mapping: dict[str, Any], notes: Path) -> bool:
    """Whether the configuration trains; False where it is refused as it should be."""
    try:
        config = build(RunConfig, mapping, "fuzz")
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith("fuzz: ")
        return False
    folder = Path(tempfile.mkdtemp())
    try:
        result = train([notes], config, folder / "run", quiet=True)
        assert result.progress is not None and result.progress.step == 1
        assert build(RunConfig, load_toml(folder / "run" / "config.toml"), "") == config
    except BytelmError as error:
        assert str(error) and "\n" not in str(error), error
        return False
    finally:
        shutil.rmtree(folder)
    return True


def tried(examples: int, notes: Path) -> None:
    """Try so many configurations, of which some must train and some be refused: else nothing was shown."""
    counts = {True: 0, False: 0}

    @settings(max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(runs())
    def check(mapping: dict[str, Any]) -> None:
        counts[one_step(mapping, notes)] += 1

    check()
    print(f"{counts[True]} configurations trained a step, {counts[False]} were refused")
    assert min(counts.values()) >= examples // 10


@pytest.mark.fault("C2", "K7")
def test_a_configuration_trains_or_is_refused(notes: Path) -> None:
    tried(25, notes)


@pytest.mark.slow
@pytest.mark.fault("C2", "K7")
def test_many_configurations_train_or_are_refused(notes: Path) -> None:
    tried(1500, notes)
