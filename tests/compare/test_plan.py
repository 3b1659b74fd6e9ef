"""Who takes part in a comparison, and what a budget gives each: the same for all."""

from __future__ import annotations

import math
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.cli.comparing import BUDGETS
from bytelm.compare import prepare
from bytelm.compare.candidates import (
    DEFAULT,
    DEPTH_OFFSETS,
    DEPTH_PENALTY,
    WIDTHS,
    candidate,
    candidates,
    nearest,
    usual,
)
from bytelm.compare.plan import (
    EPOCHS,
    OFF,
    ONCE,
    RATIO,
    STEP,
    WINDOW,
    Budget,
    built,
    check_memory,
    most_bytes,
    window_of,
)
from bytelm.compare.prepare import ComparisonSpec, Place
from bytelm.compare.run import cell_of
from bytelm.errors import ConfigError, ResourceError, UsageError
from bytelm.evaluate.costs import costs
from bytelm.interfaces.sizes import READ, ROWS
from bytelm.training.config import RunConfig
from bytelm.training.settings import modality_table
from comparisons import MEANS, Sized, sized

# ---- who takes part


def test_names_carry_numbers_or_have_their_own() -> None:
    found = [(one.name, one.number, one.tokens) for one in candidates("blt, byte-window:7,bpe:300,linear")]
    assert found == [("blt", 5, False), ("byte-window:7", 7, False), ("bpe:300", 300, True), ("linear", 0, False)]
    assert candidate("bpe:300").tables(64, 0)["model"]["vocabulary"] == 300
    assert candidate("blt:7").tables(64, 0)["patching"]["target_mean_length"] == 7
    assert candidate("megabyte:4").tables(64, 0)["model"]["sizes"] == [4]


def test_families_over_the_same_tokens_share_their_file_and_others_have_none(tmp_path: Path) -> None:
    spec = ComparisonSpec(["-"], "bpe:300", "flops", (1e12,))
    place = Place(spec, tmp_path, {})
    names = ("bpe:300", "bpe-ngrams:300", "bpe:300@60", "byte-window:300", "bpe:301")
    files = [cell_of(spec, place, name, 0, 1.0, tmp_path, tmp_path, quiet=True).files for name in names]
    assert files[0] == files[1] == files[2] == {"merges.npy": tmp_path / "bpe-300.merges.npy"}
    assert files[3] == {} and files[4] == {"merges.npy": tmp_path / "bpe-301.merges.npy"}


UNKNOWN = [("byte,megabite", "did you mean 'megabyte'"), ("", "unknown model ''"), ("space:4", "space takes no number")]
UNKNOWN += [("bpe:260", "at least 261"), ("megabyte:1", "at least 2"), ("byte-window:0", "at least 1")]
UNKNOWN += [("blt:4.5", "an integer"), ("blt:", "an integer"), ("byte,blt:5,byte", "byte twice")]
UNKNOWN += [("blt,blt:5", "twice")]


@pytest.mark.parametrize(("names", "said"), UNKNOWN)
def test_a_model_that_cannot_be_had_is_told(names: str, said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        candidates(names)


@given(st.floats(3, 11), st.floats(0, 1))
@settings(max_examples=30)
def test_the_nearest_shape_is_the_nearest_of_all(power: float, linear: float) -> None:
    def cost(width: int, depth_offset: int) -> float:
        return (
            24.0 * (usual(width) + depth_offset) * width**2 + linear * 1e5 * (usual(width) + depth_offset) + 520 * width
        )

    def apart(size: tuple[int, int]) -> float:
        return abs(math.log(cost(*size) / 10**power)) + DEPTH_PENALTY * size[1] ** 2

    shapes = [
        (width, depth_offset)
        for width, depth_offset in product(WIDTHS, DEPTH_OFFSETS)
        if usual(width) + depth_offset > 1
    ]
    assert apart(nearest(cost, 10**power)) == pytest.approx(min(map(apart, shapes)))


@pytest.mark.parametrize("modality", [None, "image:8", "audio:16k"])
def test_every_model_can_be_had_in_every_size(modality: str | None) -> None:
    table = modality_table(modality) if modality else None
    others = ["blt-no-ngrams:3", "megabyte:5", "megabyte-across:5", "perceiver:2000", "byte-window:1", "bpe:261"]
    for name in [*DEFAULT.split(","), *others]:
        for width, depth_offset in [(32, 0), (48, 2), (80, -1), (208, 1)]:
            tables = candidate(name).tables(width, depth_offset) | ({"modality": table} if table else {})
            config = built(tables, steps=1, context_length=window_of(table))
            assert costs(config.recipe, config.train.context_length, 3.0).executed > 0


# ---- what a budget gives each


def test_the_same_operations_for_all() -> None:
    amount, spent = BUDGETS["flops"], list[float]()
    for name in DEFAULT.split(","):
        model = sized(name, Budget("flops", amount))
        config = model.run(0)
        counted = costs(config.recipe, config.train.context_length, model.mean)
        assert counted == model.costs and config.train.bytes == model.bytes
        assert abs(3 * counted.executed * model.bytes - amount) <= 3 * counted.executed
        spent.append(counted.executed)
    goal, read = Budget("flops", amount).goal(10**9)
    assert 3 * goal * read == pytest.approx(amount) and read == pytest.approx(RATIO * goal / 2)
    assert max(spent) / min(spent) < OFF and all(1 / OFF < cost / goal < OFF for cost in spent)


def test_the_same_bytes_and_parameters_for_all() -> None:
    amount = BUDGETS["bytes"]
    models = [sized(name, Budget("bytes", amount)) for name in DEFAULT.split(",")]
    assert {model.bytes for model in models} == {amount}
    own = [model.costs.parameters - model.costs.tables for model in models]
    assert max(own) / min(own) < OFF and all(1 / OFF < count * RATIO / amount < OFF for count in own)


def test_the_same_seconds_for_all() -> None:
    model = sized("blt", Budget("time", 90.0, rate=1e11))
    assert (model.run(0).train.minutes, model.run(0).train.bytes, model.bytes) == (1.5, None, None)
    assert model.costs == sized("blt", Budget("flops", 9e12)).costs


def test_tables_grow_with_what_is_read_and_memory_with_tables() -> None:
    for name in ("blt", "space"):
        one = candidate(name)
        rows = [one.tables(64, 0, bytes)["model"]["ngram_rows"] for bytes in (0, 4e5, 1e6, 1e12)]
        assert rows[0] == ROWS[0] < rows[1] < rows[2] < rows[3] == ROWS[1]
        assert 0.7 < 4e5 / READ / rows[1] < 1.42 and 0.7 < 1e6 / READ / rows[2] < 1.42
        found = sized(name, Budget("flops", 1e13))
        assert found.run(0).model.ngram_rows == ROWS[1]
        assert found.memory > 4 * 2 * found.costs.tables  # in float32, with a moment
    assert "ngram_rows" not in candidate("blt-no-ngrams").tables(64, 0, 1e12)["model"]


def test_little_data_is_not_read_more_often_than_is_worth_it() -> None:
    budget = Budget("flops", 1e13)
    goal, read = budget.goal(EPOCHS * 10**6)
    assert read == EPOCHS * 10**6 and 3 * goal * read == pytest.approx(1e13) and goal > budget.goal(10**9)[0]
    assert Budget("bytes", 1e8).goal(10**6)[1] == 1e8
    for name, epochs in (("byte-window", EPOCHS), ("byte-window-ngrams", ONCE), ("blt", ONCE)):
        learnt = sized(name, budget, 2 * 10**6).run(0).train.bytes or 0
        assert epochs / OFF < learnt / 2e6 < epochs * OFF


@pytest.mark.parametrize(
    ("name", "match", "amount", "size"),
    [
        ("byte-window", "flops", 1e9, 10**9),
        ("byte-window", "flops", 2e10, 40_000),  # so little data that it would be read more than EPOCHS times
        ("byte-window", "flops", 1e19, 10**5),
        ("space", "bytes", 1e6, 10**9),
    ],
)
def test_a_budget_that_suits_no_shape_names_one_that_does(name: str, match: Any, amount: float, size: int) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: .* or leave it out of --models$") as refused:
        sized(name, Budget(match, amount), size)
    said = re.search(r"nearest shape has ([\d.]+)([KB]): give (\w+) --budget \(([^ ]+) suits it", str(refused.value))
    assert said is not None
    suits = Budget(match, float(said[4]))
    assert said[3] == ("more" if suits.amount > amount else "less")
    assert suits.goal(most_bytes(candidate(name), size))[0] == pytest.approx(
        float(said[1]) * {"K": 1e3, "B": 1e9}[said[2]], rel=0.1
    )
    sized(name, suits, size)


def test_little_data_does_not_make_the_look_at_the_machine_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def timed(config: RunConfig, mean: float) -> float:
        seen.append(costs(config.recipe, config.train.context_length, mean).executed)
        return 1e5

    monkeypatch.setattr(prepare, "bytes_per_second", timed)
    for size in (1 << 17, 1 << 30):
        assert prepare.rate_of(Sized(size), prepare.ComparisonSpec(["-"], "byte", "time", (60.0,))) == 3e5 * seen[-1]
    assert max(seen) < 1e7, "a step of the probe would take minutes"


def test_a_document_of_one_size_is_read_in_a_row() -> None:
    windows = {"dna": WINDOW, "image:8": 8 * 8 * 3 + 1, "image:64:grey": 64 * 64 + 1, "image:128": WINDOW}
    assert {text: window_of(modality_table(text)) for text in windows} == windows and window_of(None) == WINDOW
    for name, text, window in [("byte-window", "image:8", 193), ("bpe", None, round(WINDOW / 3))]:
        train = sized(name, Budget("flops", 1e13), table=modality_table(text) if text else None).run(0).train
        bytes = train.context_length * train.batch * (MEANS["bpe"] if name == "bpe" else 1)
        assert train.context_length == window and bytes == pytest.approx(STEP, rel=0.05)


def test_memory_is_asked_for_before_it_is_missing() -> None:
    model = sized("byte-window", Budget("flops", 1e13))
    assert model.memory > 12 * model.costs.parameters  # weights, and two moments, in float32
    check_memory(model, model.memory)
    with pytest.raises(ResourceError, match=r"byte-window: a step takes .* less --budget"):
        check_memory(model, model.memory - 1)
