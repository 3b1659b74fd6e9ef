"""The programs in benchmarks/: what they print is what they say, on data and models of no size."""

from __future__ import annotations

import json
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def program(name: str) -> Any:
    spec = spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


ablations, scaling = program("ablations"), program("scaling")

TINY = ablations.Shape((16, 8), (2, 1), (1, 2), patch=8, reach=2, window=32, batch=2)
PICTURES = ablations.Shape(
    (16, 8), (2, 1), (1, 2), patch=12, reach=2, window=49, batch=2, ratios=(), blind=2,
    modality={"name": "image", "width": 4, "height": 4, "block": 2},
)  # fmt: skip
VARIANTS = ["full", "another seed", "no local", "no global", "neither", "no cross", "cnn", "P / 2", "P x 2"]


def test_the_slope_of_a_power_law_is_its_exponent() -> None:
    rows = [{"bytes": length, "seconds": 3e-6 * length**1.25} for length in scaling.LENGTHS]
    assert scaling.exponent(rows) == pytest.approx(1.25)


def test_the_ablations_end_to_end_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, picture = tmp_path / "text.txt", tmp_path / "ablations.svg"
    text.write_bytes(bytes(np.random.default_rng(0).integers(97, 123, 20_000, dtype=np.uint8)))
    given = ["--text", str(text), "--bytes", "300", "--runs", str(tmp_path / "runs"), "--only", "text", "--json"]

    def rows(*more: str) -> list[dict[str, Any]]:
        assert ablations.main([*given, *more], {"text": TINY}, held=1024) == 0
        return json.loads(capsys.readouterr().out)["rows"]

    found = rows("--svg", str(picture))
    models, modes = [row for row in found if "variant" in row], [row for row in found if "mode" in row]
    assert [row["variant"] for row in models] == VARIANTS
    assert [row["mode"] for row in modes] == ["basic", "sliding", "strided", "both"]
    assert {row["bytes"] for row in models if row["variant"] != "another seed"} == {models[0]["bytes"]}
    assert models[0]["ratio"] == 1 and modes[0]["bits_per_byte"] == models[0]["bits_per_byte"]
    assert [len(row["by_place"]) for row in models] == [row["patch"] for row in models]
    assert all(np.mean(row["by_place"]) == pytest.approx(row["bits_per_byte"]) for row in models)
    assert models[2]["paper"] == pytest.approx(1.263 / 0.6871) and models[6]["agrees"] is None
    assert len(ElementTree.fromstring(picture.read_text()).findall("{http://www.w3.org/2000/svg}svg")) == 2
    assert rows() == found, "seconds too: a finished run is not trained again"
    assert ablations.main([*given, "--limit", "5000"], {"text": TINY}, held=1024) == 2
    assert "another --runs" in capsys.readouterr().err


def test_layers_bring_operations_as_near_as_they_can() -> None:
    for shape in (TINY, *ablations.SHAPES.values()):
        goal = ablations.flops(shape.mapping(), shape.window)
        for variant in ablations.variants(shape):
            if variant.free is None:
                continue
            model = shape.mapping() | variant.model
            layers = ablations.matched(model, variant.free, goal, shape.window)
            away = []
            for more in (-1, 0, 1):
                other = [count + more * (stage == variant.free) for stage, count in enumerate(layers)]
                cost = ablations.flops(model | {"layers": other}, shape.window) if min(other) >= 0 else goal * 9
                away.append(abs(cost - goal) if other[variant.free] else goal * 9)
            assert away[1] == min(away), variant.name


@pytest.mark.parametrize("limit", [600, 1 << 40])
def test_what_is_held_out_is_not_learnt_and_no_pixel_is_parted(limit: int) -> None:
    whole = np.arange(3 * 700, dtype=np.uint16).astype(np.uint8).tobytes()
    learnt, held_out = ablations.divided(whole, 3, limit, 300)
    size = len(whole) // ablations.PARTS // 3 * 3
    for part, (a, b) in enumerate(zip(learnt, held_out, strict=True)):
        assert len(a) % 3 == len(b) % 3 == 0 and len(a) + len(b) <= size
        assert whole[part * size :].startswith(a) and whole[: (part + 1) * size].endswith(b)
    with pytest.raises(ablations.DataError, match="too few"):
        ablations.divided(whole[:300], 3, limit, 300)


def test_orders_of_pixels_are_measured_on_the_same_pixels(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (80, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    found = ablations.slices("images", PICTURES, [tmp_path / "images.npy"], tmp_path / "runs", 16 * 96, 16 * 96)
    by_order = {}
    for variant in ablations.variants(PICTURES):
        config = ablations.config_of(PICTURES, variant, 100, 0)
        by_order[config.modality.block] = [data for _, data in ablations.documents_of(config, found)]
    assert set(by_order) == {1, 2} and by_order[1] != by_order[2]
    assert [sorted(data) for data in by_order[1]] == [sorted(data) for data in by_order[2]]
    held_out = np.frombuffer(b"".join(by_order[1]), np.uint8).reshape(-1, 4, 4, 3)
    assert (held_out == images.reshape(16, 5, 4, 4, 3)[:, 3:].reshape(-1, 4, 4, 3)).all()
    assert (np.load(found.train) == images.reshape(16, 5, 4, 4, 3)[:, :2].reshape(-1, 4, 4, 3)).all()


@pytest.mark.slow
def test_a_step_on_a_million_bytes_fits_in_eight_gibibytes() -> None:
    """One picture of 640 x 640 pixels in patches of 192 bytes: forward, backward and optimizer, in its own process."""
    model = {**scaling.megabyte(1_228_800), "sizes": [192], "reach": 16}
    found = scaling.measured(model, 1_228_800)
    assert found["peak_gib"] < 8
