"""What several processes saved, read by one: whole or in part, as a model, by its rows, converted; and damaged."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

import bytelm
import shardings
import worlds
from bytelm.checkpoint import manifest, parts, sharded, store
from bytelm.checkpoint.assemble import Recipe
from bytelm.checkpoint.parts import own_tensors
from bytelm.config import to_mapping
from bytelm.errors import CheckpointError
from bytelm.exchange.convert import convert, export
from bytelm.models.blt.model import Config as BLT
from bytelm.models.transformer.entropy_model import Config as EntropyModel
from bytelm.native import library
from bytelm.patching import entropy
from checkpoints import write_manifest

SMALL = replace(BLT.tiny()["last layer crossed"], ffn_dims=(24, 40, 56))
RECIPE = Recipe(
    SMALL, entropy.Config(threshold=5.5, max_length=None, max_single_byte_run=None), EntropyModel(1, 32, 2, 8)
)
TEXT = "Grüße: the quick brown fox, the quick brown dog.\n".encode() * 3


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Step 7 of the test runs, saved by three processes."""
    run = tmp_path_factory.mktemp("saved")
    worlds.run(3, shardings.steps, run, [7])
    return run / "checkpoints" / "step-00000007"


@pytest.fixture
def path(saved: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "run" / "checkpoints" / saved.name))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs of the same model: saved by one process, and loaded from there and saved by three."""
    one, three = (tmp_path_factory.mktemp(name) for name in ("one", "three"))
    model = RECIPE.build()
    model.init_weights(0)
    model.patcher.entropy_model.model.init_weights(1)  # pyright: ignore
    torch.nn.init.normal_(model.patcher.entropy_model.model.head.weight, 0, 0.2)  # pyright: ignore
    moments = {f"{name}/exp_avg": tensor + 1 for name, tensor in model.named_parameters()}
    moments |= {f"{name}/step": torch.tensor(3.0) for name, _ in model.named_parameters()}
    state = {"recipe": to_mapping(RECIPE), "context": 64}
    source = store.save(one, 3, {"model": model.state_dict(), "optimizer": moments}, state)
    worlds.run(3, shardings.resaved, source, three)
    return one, three


def test_one_process_goes_on_and_back(models: tuple[Path, Path], tmp_path: Path) -> None:
    one, three = (store.newest(run) for run in models)
    assert sorted(file.name for file in three.glob("*0002*")) == [
        *("model-00002.json", "model-00002.safetensors", "optimizer-00002.json", "optimizer-00002.safetensors"),
    ]
    tensors = {group: store.read_tensors(three, group) for group in ("model", "optimizer")}
    back = store.save(tmp_path, 3, tensors, store.read_state(three))
    assert {file.name: file.read_bytes() for file in back.iterdir()} == {
        file.name: file.read_bytes() for file in one.iterdir()
    }


def test_a_model_computes_the_same(models: tuple[Path, Path], tmp_path: Path) -> None:
    one, three = (bytelm.load(run) for run in models)
    assert one.generate(TEXT, max_bytes=20) == three.generate(TEXT, max_bytes=20)
    for (name, a), b in zip(one.model.state_dict().items(), three.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.skipif(library.library("kernels") is None, reason="there are no kernels")
@pytest.mark.parametrize("tables", ["mapped", "memory"])
def test_packed_weights_and_rows_of_several_files(models: tuple[Path, Path], tables: Any, tmp_path: Path) -> None:
    run = Path(shutil.copytree(models[1], tmp_path / "run"))
    one, three = (bytelm.load(where, weights="bf16", tables=tables) for where in (models[0], run))
    assert one.model.content is not None and three.model.content is not None
    assert one.model.content() == three.model.content()
    shutil.rmtree(run)  # by a training that goes on
    assert one.generate(TEXT, max_bytes=20) == three.generate(TEXT, max_bytes=20)


def test_it_is_converted_and_exported(models: tuple[Path, Path], tmp_path: Path) -> None:
    for number, run in enumerate(models):
        convert(run, "bytelm", tmp_path / str(number), {}, weights="int8")
        export(run, "hf", tmp_path / f"hf{number}", {})
    for name in ("{}/checkpoints/step-00000000/model.safetensors", "hf{}/model.safetensors"):
        assert (tmp_path / name.format(0)).read_bytes() == (tmp_path / name.format(1)).read_bytes()


def test_a_laptop_needs_the_files_of_the_model_alone(models: tuple[Path, Path], tmp_path: Path) -> None:
    path = shutil.copytree(store.newest(models[1]), tmp_path / "copy", ignore=shutil.ignore_patterns("optimizer-*"))
    assert bytelm.load(path).generate(TEXT, max_bytes=5) == bytelm.load(models[0]).generate(TEXT, max_bytes=5)
    with pytest.raises(CheckpointError, match=r"optimizer-0000\d\..* is missing"):
        store.verify(Path(path))


def test_the_library_and_the_index_are_enough(saved: Path) -> None:
    for group, wanted in shardings.whole(7).items():
        found = {name: torch.empty_like(tensor) for name, tensor in wanted.items()}
        for index in saved.glob(f"{group}-*.json"):
            with safetensors.safe_open(index.with_suffix(".safetensors"), "pt") as file:
                for name, part in json.loads(index.read_text())["tensors"].items():
                    assert group == "optimizer" or name == "none" or math.prod(part["shape"])
                    box = tuple(slice(at, at + n) for at, n in zip(part["offsets"], part["shape"], strict=True))
                    found[name][box] = file.get_tensor(name)
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_tensor_is_read_some_rows_at_a_time(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PIECE", 13)
    target = {group: {n: torch.zeros_like(t) for n, t in m.items()} for group, m in shardings.whole(7).items()}
    sharded.load(saved, target)
    assert shardings.same(target, shardings.whole(7))
    for name, tensor in own_tensors(saved).items():
        assert torch.equal(torch.cat(list(tensor.pieces())), shardings.whole(7)["model"][name])
        whole = shardings.whole(7)["model"][name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert tensor.digest() == hashlib.sha256(whole).hexdigest()
    with pytest.raises(CheckpointError, match=r'columns of .* is not cut by rows: load it with tables="memory"'):
        own_tensors(saved)["columns"].opened_for_rows()


def test_a_subset_of_the_groups_reads_no_other(path: Path) -> None:
    for file in path.glob("optimizer-*"):
        file.unlink()
    target = {"model": {name: torch.zeros_like(t) for name, t in shardings.whole(7)["model"].items()}}
    sharded.load(path, target)
    assert shardings.same(target, shardings.whole(7))


@pytest.mark.fault("K4")
@pytest.mark.parametrize("form", ["format-1", "format-2", "format-3"])
def test_checkpoints_of_every_format_are_loaded(form: str) -> None:
    path = store.newest(Path(__file__).parents[1] / "golden" / form)
    wanted = {group: store.read_tensors(path, group) for group in ("model", "optimizer")}
    target = {group: {name: torch.zeros_like(t) for name, t in members.items()} for group, members in wanted.items()}
    sharded.load(path, target)
    assert shardings.same(target, wanted)


@pytest.mark.fault("K5")
def test_nothing_is_unpickled(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something is unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, never)
    target = {group: {n: torch.zeros_like(t) for n, t in m.items()} for group, m in shardings.whole(7).items()}
    sharded.load(saved, target)
    assert shardings.same(target, shardings.whole(7)) and store.read_tensors(saved, "model")
    store.verify(saved)


# ---- damage ----


def reads(path: Path) -> list[Callable[[], Any]]:
    """All that reads a checkpoint, closely."""
    target = {group: {n: torch.zeros_like(t) for n, t in m.items()} for group, m in shardings.whole(7).items()}
    return [
        lambda: store.verify(path),
        lambda: sharded.load(path, target),
        lambda: [store.read_tensors(path, group) for group in target],
    ]


@pytest.mark.fault("K1")
def test_a_flipped_byte_in_any_file_is_named(path: Path) -> None:
    for file in sorted(path.iterdir()):
        raw = file.read_bytes()
        file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))  # the last one is a tensor's, or closes the JSON
        for number, read in enumerate(reads(path)):
            if file.name != store.STATE or number == 0:
                with pytest.raises(CheckpointError, match=re.escape(file.name)):
                    read()
        file.write_bytes(raw)
    for read in reads(path):
        read()


@pytest.mark.fault("K1")
@pytest.mark.parametrize("closely", [True, False])
def test_missing_short_and_extra_files_are_named(path: Path, closely: bool) -> None:
    for file in sorted(path.iterdir()):
        raw = file.read_bytes()
        for damage in (file.unlink, lambda file=file, raw=raw: file.write_bytes(raw[:-1])):
            damage()
            if file.name != store.MANIFEST:
                with pytest.raises(CheckpointError, match=re.escape(file.name)):
                    store.newest(path.parent.parent, closely=closely)
            if file.name not in (store.MANIFEST, store.STATE):
                for read in reads(path)[1:]:
                    with pytest.raises(CheckpointError, match=re.escape(file.name)):
                        read()
        file.write_bytes(raw)
    (path / "model-00003.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"model-00003\.json is not listed"):
        store.verify(path, closely=closely)
    (path / "model-00003.json").unlink()
    store.verify(path)


@pytest.mark.fault("K1")
def test_processes_look_together_for_what_to_go_on_from(path: Path) -> None:
    """Each file is read by one of them, and what it finds is told to all."""
    older = path.with_name("step-00000003")
    shutil.copytree(path, older)
    assert worlds.run(3, shardings.good, path.parent.parent) == [(path.name, [])] * 3
    for file in ("model-00000.safetensors", "optimizer-00002.json", "state.json"):
        raw = bytearray((path / file).read_bytes())
        raw[-1] ^= 1
        shutil.copytree(older, path, dirs_exist_ok=True)
        (path / file).write_bytes(raw)
        one, *others = worlds.run(3, shardings.good, path.parent.parent)
        assert one[0] == older.name and others == [one] * 2
        assert one[1] == [f"{path / file} is damaged: its checksum is not that in MANIFEST.json"]
    shutil.rmtree(older)
    said = worlds.run(3, shardings.good, path.parent.parent)
    assert said[0].startswith(f"no intact checkpoint in {path.parent.parent}: retrain") and said == said[:1] * 3


@pytest.mark.fault("K1")
def test_a_file_of_another_save_is_named(path: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    worlds.run(3, shardings.steps, tmp_path / "other", [8])
    for file in (tmp_path / "other" / "checkpoints" / "step-00000008").iterdir():
        raw = (path / file.name).read_bytes()
        if raw != file.read_bytes():
            shutil.copy(file, path)
            with pytest.raises(CheckpointError, match=r"step-00000007"):
                store.verify(path)
            if file.name != store.STATE:
                with pytest.raises(CheckpointError, match=r"step-00000007"):
                    reads(path)[1]()
            (path / file.name).write_bytes(raw)


@pytest.mark.fault("K2")
def test_other_names_shapes_and_dtypes_are_a_table(saved: Path) -> None:
    model = {name: torch.zeros_like(tensor) for name, tensor in shardings.whole(7)["model"].items()}
    model |= {"rows": torch.zeros(10, 4), "few": torch.zeros(2, 5), "more": torch.zeros(1)}
    del model["bits"]
    with pytest.raises(CheckpointError) as caught:
        sharded.load(saved, {"model": model})
    head, *rows = str(caught.value).splitlines()
    assert head == f"{saved} does not hold the weights of this model:"
    assert [" ".join(row.split()) for row in rows] == [
        "unexpected bits bool [9]",
        "dtype few bfloat16 [2, 5], not float32 [2, 5]",
        "missing more float32 [1]",
        "shape rows float32 [10, 3], not float32 [10, 4]",
    ]
    with pytest.raises(ValueError, match=r"model/a cannot be in a checkpoint: torch\.float32 on meta"):
        sharded.load(saved, {"model": {"a": torch.empty(3, device="meta")}})
    with pytest.raises(CheckpointError, match=r"has no another\.safetensors"):
        sharded.load(saved, {"another": {}})


HOSTILE: dict[str, tuple[Any, str]] = {
    "no table": ([], "it names no tensors"),
    "no part": ({"rows": 3}, "'rows' is not described"),
    "dtype": ({"dtype": "F77"}, "'rows' is not described"),
    "negative": ({"offsets": [-1, 0]}, r"'rows' is \[4, 3\] at \[-1, 0\]"),
    "float": ({"shape": [4.0, 3]}, r"'rows' is \[4.0, 3\]"),
    "dimensions": ({"offsets": [0]}, "'rows' is"),
    "huge": ({"whole": [2**40, 2**40]}, "'rows' is"),
    "outside": ({"offsets": [8, 0]}, "outside of"),
    "behind the end": ({"start": 10**9}, "ends behind the end of model-00001.safetensors"),
    "another whole": ({"whole": [11, 3]}, "before"),
    "twice": ({"offsets": [0, 0]}, "the parts of 'rows' are not the whole of it"),
    "empty": ({"shape": [0, 3]}, "the parts of 'rows' are not the whole of it"),
}


@pytest.mark.fault("K6")
@pytest.mark.parametrize("kind", HOSTILE)
def test_an_index_made_to_hurt_is_an_error(path: Path, kind: str) -> None:
    change, said = HOSTILE[kind]
    index = path / "model-00001.json"
    listed = json.loads(index.read_text())["tensors"]
    if not isinstance(change, dict):
        listed = change
    elif "rows" in change:
        listed |= change
    else:
        listed["rows"] |= change
    index.write_text(json.dumps({"tensors": listed}))
    body = json.loads((path / store.MANIFEST).read_text())
    del body["sha256"]
    body["files"][index.name] = {
        "size": index.stat().st_size,
        "sha256": hashlib.sha256(index.read_bytes()).hexdigest(),
    }
    write_manifest(path, body)
    store.verify(path)
    for read in reads(path)[1:]:
        with pytest.raises(CheckpointError, match=said) as caught:
            read()
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_one_process_writes_format_2_and_several_format_3(saved: Path, models: tuple[Path, Path]) -> None:
    forms = [json.loads((path / store.MANIFEST).read_text())["format"] for path in (store.newest(models[0]), saved)]
    assert forms == [store.FORMAT, manifest.SHARDED] == [2, 3]
