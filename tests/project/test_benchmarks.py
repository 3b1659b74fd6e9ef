"""The programs in benchmarks/: what they print is what they say, on data and models of no size."""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from bytelm.checkpoint.assemble import Recipe
from bytelm.compare import plan
from bytelm.config import to_mapping
from bytelm.models.megabyte import model as megabyte
from programs import BENCHMARKS, program

ablations, scaling = program("ablations"), program("scaling")
packing, saving = program("packing"), program("saving")
generate, headline, identity = program("generate"), program("headline"), program("identity")
papers, train, converted = program("papers"), program("train"), program("converted")
robustness = program("robustness")

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


def test_a_save_in_the_background_misses_its_target(capsys: pytest.CaptureFixture[str]) -> None:
    options = argparse.Namespace(json=True, processes=2, megabytes=1)
    rows = [{"plain": 1.0, "blocked": b, "whole": 1.0, "busy": 1.0, "slower": 1.0} for b in (0.05, 0.09, 0.9)]
    assert saving.told(rows, options) == 0
    assert json.loads(capsys.readouterr().out)["ratio"] == 0.09
    assert saving.told(rows[1:] + rows[2:], options) == 1


def test_packing_is_measured_by_one_and_by_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packing, "generated", lambda folder, total, document: packing.text(folder, document, 1))
    monkeypatch.setattr(packing, "FILE", 60_000)
    words = ["--workers", "1", "2", "--rounds", "1", "--part", "2e4", "--document", "3000", "--folder", str(tmp_path)]
    assert packing.main(words) == 0
    said = capsys.readouterr().out
    assert "the same bytes" in said and said.count("MB/s") == 2 and "2: median" in said and not [*tmp_path.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "words"), [("scale", "--worlds 1,2 --steps 2"), ("kills", "--kills 2")])
def test_what_several_processes_do_is_measured(name: str, words: str) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), *words.split(), "--json"]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    if name == "scale":
        assert [row["world"] for row in found["results"]] == [1, 2, 1, 2]
        assert all(row["memory"] <= 0.51 and row["nats"] < 1e-6 for row in found["results"] if row["world"] == 2)
    else:
        assert found["kills"] == 2 and not found["faults"]


@pytest.mark.slow
def test_saving_is_measured() -> None:
    command = [sys.executable, str(BENCHMARKS / "saving.py"), "--megabytes", "1", "--rounds", "1", "--json"]
    found = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=False).stdout)
    assert found["processes"] == 2 and 0 < found["blocked"] < found["whole"]


@pytest.mark.slow
def test_a_step_on_a_million_bytes_fits_in_eight_gibibytes() -> None:
    """One picture of 640 x 640 pixels in patches of 192 bytes: forward, backward and optimizer, in its own process."""
    model = {**scaling.megabyte(1_228_800), "sizes": [192], "reach": 16}
    found = scaling.measured(model, 1_228_800)
    assert found["peak_gib"] < 8


SMALL: dict[str, dict[str, Any]] = {
    "blt": {"local_dim": 32, "local_heads": 2, "cross_heads": 2, "decoder_layers": 1, "ngram_rows": 64}
    | {"global_dim": 64, "global_heads": 2, "global_layers": 1, "attention_window": 16},
    "megabyte": {"sizes": [4], "dims": [32, 16], "layers": [1, 1], "heads": [2, 1]},
    "transformer": {"dim": 32, "layers": 1, "heads": 2},
}


def test_generation_beside_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = "blt,megabyte-int8,transformer-window"
    words = ["--rounds", "1", "--prompts", "9,40", "--batches", "1,2", "--bytes", "5", "--models", models]
    picture = tmp_path / "generation.svg"
    assert generate.main([*words, "--json", "--svg", str(picture)], {"small": SMALL}) == 0
    assert len(ElementTree.fromstring(picture.read_text()).findall("{http://www.w3.org/2000/svg}svg")) == 2
    rows = json.loads(capsys.readouterr().out)["rows"]
    keys = ["system", "model", "size", "batch", "prompt", "bytes_per_s", "ms_first_byte", "floor_share"]
    assert all(list(row) == keys for row in rows)
    ours = [row for row in rows if row["system"] == "bytelm"]
    assert len(ours) == 12 and all(row["floor_share"] > 0 and row["bytes_per_s"] > 0 for row in ours)
    assert {row["system"] for row in rows} >= {"bytelm", "plain", "transformers"}
    for more, head in ([], "ratios of bytes/s"), (["--curve"], "ms per byte"), (["--profile"], "functions"):
        assert generate.main([*words, *more, "--peers", "none"], {"small": SMALL}) == 0
        assert head in capsys.readouterr().out


@pytest.mark.slow
def test_training_beside_plain_torch(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--rounds", "1", "--models", "blt", "--peers", "plain"]
    assert train.main(words, {"small": SMALL}, [("small", 64)]) == 0
    assert "blt / plain, small, 64 bytes:" in capsys.readouterr().out


@pytest.mark.slow
def test_training_beside_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes, groups = {"small": SMALL}, [("small", 64)]
    picture = tmp_path / "training.svg"
    assert train.main(["--rounds", "1", "--json", "--profile", "--svg", str(picture)], sizes, groups) == 0
    assert len(ElementTree.fromstring(picture.read_text()).findall("{http://www.w3.org/2000/svg}svg")) == 1
    rows = json.loads(capsys.readouterr().out)["rows"]
    keys = ["system", "model", "size", "sequence", "bytes_per_s", "matmul_share", "peak_gib"]
    assert all(list(row)[:7] == keys and row["bytes_per_s"] > 0 and row["matmul_share"] > 0 for row in rows)
    ours = [row for row in rows if row["system"] == "bytelm"]
    assert [row["model"] for row in ours] == ["blt", "megabyte", "transformer", "transformer-window"]
    assert all(sum(row["profile"].values()) == pytest.approx(1) for row in ours)
    assert {row["system"] for row in rows} >= {"bytelm", "plain", "transformers"}


def test_what_a_step_needs_has_no_masked_pairs_in_it() -> None:
    """A Transformer's layers, its head, and of attention 4 × width for each pair that is seen; three times over."""
    for window, seen in ((None, 100 * 101 // 2), (16, 16 * 17 // 2 + 84 * 16)):
        model = train.recipe(
            {"transformer": {**SMALL["transformer"], "attention_window": window or "none"}}, "transformer"
        ).build()
        hidden = model.stack.config.hidden()
        layer = 2 * 100 * (4 * 32**2 + 3 * 32 * hidden) + 4 * 32 * seen
        assert train.needed(model, 100) == 3 * (layer + 2 * 100 * 32 * 260)


def test_the_headline_pair(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headline, "ROOF", 1 << 16)
    pair = {"plain": {"name": "transformer", **SMALL["transformer"]}, "ours": {"name": "megabyte", **SMALL["megabyte"]}}
    words = ["--rounds", "1", "--batches", "1,2", "--whole", "20"]
    assert headline.main([*words, "--json"], pair, steps=2) == 0
    found = json.loads(capsys.readouterr().out)
    rows, ratios = found["rows"], found["ratios"]
    assert [row["context"] for row in rows if row["batch"] == 2] == [1024, 1024, 8192, 8192]
    assert all(row["bytes_per_s"] == pytest.approx(1e3 * row["batch"] / row["ms"]) for row in rows)
    moved = {(row["model"], row["context"]): row["mb"] for row in rows if row["batch"] == 1}
    assert ratios["context 8192, batch 1"]["moved"] == pytest.approx(moved["plain", 8192] / moved["ours", 8192])
    assert ratios["whole generation of 8192 bytes"]["moved"] > ratios["context 1024, batch 1"]["moved"]
    assert headline.main(words, pair, steps=2) == 0
    assert "20 bytes in a row" in capsys.readouterr().out


def test_ways_to_generate_are_compared(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(identity.generate.SIZES, "small", SMALL)
    monkeypatch.setattr(identity, "compiled", lambda model: model)
    words = ["--size", "small", "--models", "blt,transformer-window", "--bytes", "30"]
    assert identity.main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {row["way"] for row in rows if row["model"] == "blt"} > {
        *("batch", "local drafts of 8", "memory drafts of 12", "forward, cached")
    }
    assert all(row["same"] and row["bytes"] == 150 for row in rows)

    after = identity.PlainDecoder.logits_after
    monkeypatch.setattr(identity.PlainDecoder, "logits_after", lambda self, new: -after(self, new))
    assert identity.main(words) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if "forward, cached" in line]
    assert len(told) == 2 and all("byte 0 after" in line and "divides two bytes" in line for line in told)


# --- the papers' tables -----------------------------------------------------------------------------------------------


def compared(budget: float, **bits: float) -> dict[str, Any]:
    """What a comparison found, as far as these tables look."""
    models = [{"model": name.replace("_", "-"), "bits_per_byte": b} for name, b in bits.items()]
    return {"budget": budget, "models": models}


def test_ratios_stand_beside_those_of_the_papers() -> None:
    found = compared(1e12, megabyte=2.0, byte=2.2, byte_window=1.9, blt=1.5)
    rows = {row[1]: row[2:] for row in papers.ratios("latex", found)}
    assert rows["byte / megabyte"] == ["1.100", "1.204", "yes", "1.106", "yes"]
    assert rows["byte-window / megabyte"] == ["0.950", "–", "–", "0.995", "yes"]
    assert "blt / megabyte" not in rows  # neither paper has it
    assert {row[1]: row[6] for row in papers.ratios("books", found)}["byte-window / megabyte"] == "no"


def test_the_better_one_of_a_kind_counts() -> None:
    found = {"models": [{"model": f"bpe:{ids}", "bits_per_byte": bits} for ids, bits in ((1024, 2.2), (4096, 2.1))]}
    assert papers.best_of(found) == {"bpe": 2.1}


def test_a_trend_says_how_far_each_is_from_tokens() -> None:
    budgets = {1e12: compared(1e12, blt=2.0, bpe=2.25), 1e13: compared(1e13, blt=1.9, bpe=1.95, byte=2.5)}
    lines = papers.trend(budgets).splitlines()
    assert lines[0] == "| model | 1e12 | 1e13 |"
    assert lines[2] == "| blt | 2.000 (-0.250) | 1.900 (-0.050) |"
    assert lines[4] == "| byte | – | 2.500 (+0.550) |"
    drawn = ElementTree.fromstring(papers.picture({"books": budgets}))
    assert len(drawn.findall(".//{*}polyline")) == 2  # byte had one budget


@pytest.mark.slow
def test_the_papers_program_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    for name, size in (("train", 90_000), ("test", 8_000)):
        (tmp_path / f"{name}.txt").write_bytes(bytes(generator.integers(97, 101, size, dtype=np.uint8)))
    corpus = papers.Corpus("train.txt", "test.txt", "PG-19", "byte-window:32,megabyte:4")
    monkeypatch.setattr(papers, "CORPORA", {"books": corpus})
    given = ["--data", str(tmp_path), "--runs", str(tmp_path / "runs"), "--budget", "1.5e11", "--only", "books"]
    assert papers.main(given) == 0
    found = capsys.readouterr().out
    assert "### books, 1.5e11 FLOPs" in found
    assert "| books | byte-window / megabyte |" in found
    assert (tmp_path / "runs" / "books-1.5e11" / "picture.svg").exists()
    with pytest.raises(SystemExit):
        papers.main(["--data", str(tmp_path), "--only", "poems"])


@pytest.mark.filterwarnings("ignore")
def test_the_same_weights_write_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("MEGABYTE_pytorch")
    assert converted.main(["--prompts", "16,40", "--bytes", "3", "--rounds", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["peer"], row["prompt"]) for row in found["rows"]] == [
        (peer, prompt) for peer in ("transformers", "MEGABYTE-pytorch") for prompt in (16, 40)
    ]
    for row in found["rows"]:
        assert row["same_bytes"] and row["ratio"] == row["theirs_ms_a_byte"] / row["ours_ms_a_byte"]
    other = converted.Cell("bytelm", 16, lambda prompt, count: iter(range(count)), [0.1], [0.1], b"x")
    same = converted.Cell("transformers", 16, other.write, [0.1], [0.1], b"y")
    assert not converted.rows_of([same, other])[0]["same_bytes"]


def test_generation_under_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    beside = program("transformers_generate")
    made = Recipe(megabyte.Config.tiny()["two stages"])
    model = made.build()
    model.init_weights(0)
    lms = {"megabyte": beside.LM(model.eval(), 64, None, to_mapping(made))}
    given = ["--prompt", "12", "--bytes", "9", "--rounds", "2"]
    assert beside.main([*given, "--json"], lms) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["same_bytes"] and row["ms_a_byte"].keys() == {"lm", "hf", "forward", "empty"} and row["ratio"] > 0
    assert beside.main([*given, "--sample"], lms) == 0
    assert "threads; 9 bytes after 12" in capsys.readouterr().out
    cells = {name: beside.Cell("x", name, None, [1.0], [1.0], name.encode()) for name in row["ms_a_byte"]}
    assert not beside.row_of(cells, "x")["same_bytes"]


def test_known_bytes_are_scored_beside_peers(capsys: pytest.CaptureFixture[str]) -> None:
    beside = program("evaluate")
    given = ["--bytes", "90", "--peer-bytes", "90", "--context", "20", "--rounds", "2"]
    assert beside.main([*given, "--json"], SMALL) == 0
    found = json.loads(capsys.readouterr().out)
    tasks = {(row["model"], row["task"]) for row in found["rows"] if row["system"] == "bytelm"}
    assert tasks == {(model, task) for model in beside.MODELS for task in beside.TASKS}
    assert all(row["bytes_per_s"] > 0 for row in found["rows"])
    assert found["ratios"].keys() > {"blt eval / forward", "megabyte compress / plain"}
    assert found["apart"].keys() == {f"{model}, forward" for model in beside.MODELS}
    assert beside.main([*given, "--models", "megabyte", "--peers", "none"], SMALL) == 0
    assert "windows of 20 bytes" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_the_same_weights_score_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On windows that end within patches, and one that is shorter."""
    pytest.importorskip("transformers")
    beside = program("evaluate")
    given = ["--bytes", "90", "--peer-bytes", "90", "--context", "32", "--rounds", "1", "--models", "blt", "--json"]
    assert beside.main([*given, "--peers", "transformers"]) == 0
    assert json.loads(capsys.readouterr().out)["apart"]["blt, transformers"] < beside.CLOSE
    monkeypatch.setattr(beside, "PATCH", 6)  # of both: the first patch of a window is another
    assert beside.main([*given, "--peers", "transformers"]) == 0
    evaluated = beside.evaluated
    monkeypatch.setattr(beside, "evaluated", lambda lm: lambda data: 1.01 * evaluated(lm)(data))
    assert beside.main([*given, "--peers", "transformers"]) == 1


def test_a_corpus_is_cut_into_a_folder_of_articles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    articles, text = program("articles"), b"one, eins, deux" + b"\xff"
    head = "split\tname\toffset\tlength\n"
    lines = ["test\ta/1|eng|2\t0\t3", "test\ta/1|por-BR|2\t5\t4", "train\t2|eng|2\t0\t3", "test\t..|fra|1\t11\t5"]
    (tmp_path / "text.xz").write_bytes(lzma.compress(text))
    (tmp_path / "index.tsv").write_text(head + "\n".join(lines))
    given = [str(tmp_path / name) for name in ("text.xz", "index.tsv", "out")]
    assert articles.main(given) == 0 and "3 articles" in capsys.readouterr().out
    found = {path.relative_to(tmp_path / "out").as_posix(): path.read_bytes() for path in tmp_path.glob("out/*/*")}
    assert found == {"eng/a_1.txt": b"one", "por-BR/a_1.txt": b"eins", "fra/.txt": b"deux\xff"}
    assert articles.cut(text, head + "\n".join(lines), "test", tmp_path / "one", most=1) == 2
    assert {path.parts[-2:] for path in tmp_path.glob("one/*/*")} == {("eng", "a_1.txt"), ("por-BR", "a_1.txt")}
    assert articles.main([*given, "--split", "none"]) == 1
    with pytest.raises(ValueError, match="bytes 0 to 99 of a file of 16"):
        articles.cut(text, head + "test\ta|eng\t0\t99", "test", tmp_path)


# --- what tokens break ------------------------------------------------------------------------------------------------


def suites(**rows: dict[str, tuple[float, ...]]) -> dict[str, Any]:
    """Results of `bytelm robust` with a suite `noise` of these rows: {run: difference}."""
    found = [
        {"row": row, "figures": {run: {"difference": {"value": value}} for run, value in figures.items()}}
        for row, figures in rows.items()
    ]
    return {"suites": {"noise": {"rows": found}}}


def test_figures_are_means_over_seeds() -> None:
    runs = {"blt": ["runs/blt-0", "runs/blt-1"], "bpe:300": ["runs/bpe-300-0", "runs/bpe-300-1"]}
    values = {"blt-0": 0.1, "blt-1": 0.3, "bpe-300-0": 0.5, "bpe-300-1": 0.5, "bpe-300-0, naive": 9.0}
    found = robustness.means(suites(drops=values), "noise", "difference", runs)
    assert found == {
        "drops": {
            "blt": {"mean": pytest.approx(0.2), "spread": pytest.approx(0.1)},
            "bpe:300": {"mean": 0.5, "spread": 0.0},
            "bpe:300, naive": {"mean": 9.0, "spread": 0.0},
        }
    }
    assert robustness.means(suites(drops=values), "noise", "accuracy", runs) == {}
    assert robustness.means(suites(drops=values), "blimp", "accuracy", runs) == {}
    row = robustness.shown("noise", found).splitlines()[2]
    assert row == "| drops | 0.200 ± 0.100 | 0.500 ± 0.000 | 9.000 ± 0.000 |"


def test_signs_are_those_of_what_blt_does_better() -> None:
    def cells(blt: float, bpe: float, spread: float = 0.0) -> dict[str, Any]:
        both = {"blt": {"mean": blt, "spread": spread}, "bpe:9": {"mean": bpe, "spread": 0.0}}
        return both | {"bpe:9, naive": {"mean": 99.0, "spread": 0.0}}

    lost = {"drops 10 %": cells(0.2, 0.5), "upper case": cells(0.7, 0.5), "random case": cells(0.4, 0.5, 0.2)}
    right = {"CUTE spell": cells(0.9, 0.5), "CUTE del_word_rand": cells(0.9, 0.5), "CUTE spell, generated": cells(1, 0)}
    found = list(robustness.signs(lost, right, {"short words": cells(0.25, 0.35)}))
    assert found == [
        ["noise: drops", "bpe:9", "+2.9 points", "+0.3 bits/byte lost", "yes"],
        ["noise: random case", "bpe:9", "+8.9 points", "+0.1 bits/byte lost", "unsure"],
        ["noise: upper case", "bpe:9", "+2.9 points", "-0.2 bits/byte lost", "no"],
        ["CUTE spell", "bpe:9", "+98.8 points", "+40 points", "yes"],
        ["CUTE del_word_rand", "bpe:9", "-19.4 points", "+40 points", "no"],
        ["phonemes: short words", "bpe:9", "+1.2 points", "-10 points", "no"],
    ]


def test_a_corpus_takes_whole_documents_until_it_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(robustness, "SHORTEST", 3)
    monkeypatch.setattr(robustness, "LONGEST", 5)
    documents = [("a", "grün weiß".encode()), ("b", b"two"), ("c", b"three"), ("d", b"four")]
    found = [json.loads(line)["text"] for line in robustness.lines(documents, 12)]
    assert found == ["grün", "two", "thre"]


@pytest.mark.slow
def test_what_tokens_break_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    words = [bytes(generator.integers(97, 107, size, dtype=np.uint8)) for size in generator.integers(3, 8, 300)]
    for split, size in (("train", 120_000), ("test", 30_000)):
        text = b" ".join(words[place] for place in generator.zipf(1.5, size // 5) % 300)[:size]
        (tmp_path / f"{split}.txt").write_bytes(text)
    rows = ["split\tname\toffset\tlength", "train\ta|eng\t0\t100000", "train\tb|eng\t100000\t20000"]
    rows += [f"test\t{name}|{code}\t{at}\t5000" for at, name, code in [
        (0, "a", "eng"), (5000, "a", "deu"), (10000, "b", "eng"), (15000, "b", "deu")]]  # fmt: skip
    (tmp_path / "index.tsv").write_text("\n".join(rows))
    corpus = ("{}.txt", "index.tsv", 1.2e5, 2e4)
    monkeypatch.setattr(robustness, "CORPORA", {name: corpus for name in ("books", "languages")})
    given = ["--data", str(tmp_path), "--run", str(tmp_path / "run"), "--models", "byte-window:32,bpe:300", "--taught",
             "byte-window:32", "--budget", "3e10", "--seeds", "2", "--amount", "3"]  # fmt: skip
    monkeypatch.setattr(plan, "RATIO", 3)  # the smallest shape, which this budget trains on a tenth of what suits it
    assert robustness.main(given) == 0
    found = capsys.readouterr().out
    for title in (
        "noise, English books",
        "scripts, 36 languages",
        "characters, after a curriculum",
        "Signs of the BLT",
    ):
        assert f"### {title}" in found
    assert ElementTree.parse(tmp_path / "run" / "robustness.svg").getroot().tag.endswith("svg")
    assert robustness.main(given) == 0 and found.endswith(capsys.readouterr().out)  # answers are kept
