"""The programs in benchmarks/: what they print is what they say, on data and models of no size."""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bytelm.checkpoint.assemble import Recipe
from bytelm.config import to_mapping
from bytelm.hf.encoding import TextTokens
from bytelm.hf.foreign import Foreign
from bytelm.models.megabyte import model as megabyte

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def program(name: str) -> Any:
    spec = spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


sys.path.append(str(BENCHMARKS))  # where programs find each other when they are run
ablations, scaling = program("ablations"), program("scaling")
packing, saving = program("packing"), program("saving")
generate, headline, identity = program("generate"), program("headline"), program("identity")
papers, train, converted = program("papers"), program("train"), program("converted")
naive_ways, naive_bits = program("naive_ways"), program("naive_bits")

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
    assert {row["way"] for row in rows if row["model"] == "blt"} > {"batch", "drafts of 8", "forward, cached"}
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
    assert articles.main([*given, "--split", "none"]) == 1
    with pytest.raises(ValueError, match="bytes 0 to 99 of a file of 16"):
        articles.cut(text, head + "test\ta|eng\t0\t99", "test", tmp_path)


class Bigram(torch.nn.Module):
    """Of 512 ids. After <s> 4 of them cost 2 bits each, after </s> 8 of them 3 bits, after anything else all 9 bits."""

    def __init__(self, vocab: dict[str, int]) -> None:
        super().__init__()
        self.config = SimpleNamespace(max_position_embeddings=99)
        table = torch.zeros(512, 512)
        for before, after in (("<s>", ["▁a", "▁", "<0xC3>", "</s>"]), ("</s>", ["▁a", "▁", "<s>", "</s>", *"abcd"])):
            table[vocab[before]] = float("-inf")
            table[vocab[before], [vocab.get(token, 500 + ord(token[0]) % 5) for token in after]] = 0
        self.table = torch.nn.Parameter(table, requires_grad=False)

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture
def case() -> Any:
    """Two documents: ▁a ▁ b ▁ C3 A9, which are 6 bytes, and ▁ b 0A, which are 2; each between <s> and </s>."""
    tokens = ["<unk>", "<s>", "</s>", *naive_bits.PIECES, "▁", "a", "b", "▁a"]
    vocab = {token: symbol for symbol, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    specials = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = naive_bits.fast(made, "<s> $A </s>", specials)
    model = Foreign(Bigram(vocab), TextTokens(tokenizer, 512))
    return naive_ways.Case(model, [("one", "a b é".encode()), ("two", b"b\n")], 4, ratio=0.5)


def test_naive_bits_are_those_that_are_counted_by_hand(case: Any) -> None:
    assert case.ours == pytest.approx([2 + 5 * 9, 2 + 2 * 9]) and (case.bytes, case.tokens) == (8, 9)
    by_hand = {
        "first left out": 7 * 9,
        "without BOS": 7 * 9,
        "BOS twice": 67,
        "EOS for BOS": 2 * 3 + 7 * 9,
        "specials scored": 67 + 2 * 9,
        # <s> ▁a ▁ b ▁, <s> C3 A9 </s> </s>, <s> ▁ b 0A </s>: 12 are predicted, and 9 are tokens
        "padding scored": 9 / 12 * ((2 + 27) + (2 + 9 + 9 + 3) + (2 + 18 + 9)),
        "no overlap": 67,
        "window firsts out": 3 * 9 + 9 + 2 * 9,
        "mean times tokens": 9 * 9,
        # <s> ▁a ▁ b, ▁ b ▁ C3, ▁ C3 A9 and <s> ▁ b 0A: 11 are predicted
        "overlaps twice": 9 / 11 * ((2 + 18) + 27 + 18 + (2 + 18)),
        "cut to context": (2 + 27) + (2 + 18),
        "mean of documents": 8 * (47 / 6 + 20 / 2) / 2,
        "space in front": 67,
        # ▁a ▁ b ▁ and C3 A9 and ▁ b, each after <s>
        "stripped lines": (2 + 27) + (2 + 9) + (2 + 9),
    }
    assert {name: way(case) for name, way in naive_ways.BITS.items()} == pytest.approx(by_hand)


def test_naive_bytes_are_those_that_are_counted_by_hand(case: Any) -> None:
    by_hand = {
        "decoded text": len("<s> a b é</s>".encode()) + len("<s> b\n</s>"),
        "tokens decoded": (1 + 0 + 1 + 0 + 3 + 3) + (0 + 1 + 1),  # half an é is U+FFFD
        "token strings": (4 + 3 + 1 + 3 + 6 + 6) + (3 + 1 + 6),
        "spaces twice": 8 + 3 + 1,
        "other text's ratio": 9 / 0.5,
        "characters": 5 + 2,
    }
    assert {name: way(case) for name, way in naive_ways.BYTES.items()} == pytest.approx(by_hand)
    errors = naive_ways.errors(case)
    assert errors["spaces twice"] == pytest.approx(100 * (8 / 12 - 1))
    assert errors["cut to context"] == pytest.approx(100 * (49 / 67 - 1))
    assert errors["no overlap"] == pytest.approx(0, abs=1e-4)


def test_the_documents_of_naive_bits_are_evenly_spaced(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{n:03}\n\n" for n in range(100)))
    lines = [[data for _, data in naive_bits.documents(str(text), 0, 40, seed)] for seed in (0, 1)]
    assert lines[0] == [b"%03d\n" % n for n in range(0, 100, 10)]
    assert lines[1] == [b"%03d\n" % n for n in range(6, 100, 10)]
    parts = [data for _, data in naive_bits.documents(str(text), 7, 10**6, 0)]
    assert b"".join(parts) == text.read_bytes()[:-1], "all but the last line, which is blank"


@pytest.mark.parametrize("kind", ["BPE, byte fallback (Llama 2)", "bytes (ByT5)"])
def test_naive_bits_end_to_end(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {n} says {n**3}, or naïve.\n" for n in range(300)))
    small = [str(text), str(text), "--steps", "2", "--seeds", "2", "--context", "16", "--vocabulary", "500"]
    small += ["--document", "200", "0", "--bytes", "600", "--kinds", kind]
    assert naive_bits.main([*small, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["seed"], row["document"]) for row in rows] == [(0, 200), (0, 0), (1, 200), (1, 0)]
    assert all(set(row["errors"]) == {*naive_ways.BITS, *naive_ways.BYTES, "at most"} for row in rows)
    assert (rows[0]["errors"]["spaces twice"] is None) == (kind == "bytes (ByT5)")
    assert rows[0]["errors"]["no overlap"] != 0 and rows[0]["changed"] == 0
    assert naive_bits.main(small) == 0
    written = capsys.readouterr().out
    mean = np.mean([row["errors"]["characters"] for row in rows if row["document"] == 200])
    assert f"| characters | {mean:+.1f} ± " in written and written.count("| bits per byte |") == 2
