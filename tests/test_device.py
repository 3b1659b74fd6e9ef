"""Where things are computed: names of devices, what is put there, and what is said when it is full."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bytelm
from bytelm import device
from bytelm.checkpoint import assemble, store
from bytelm.cli import app, doctor
from bytelm.cli import run as cli
from bytelm.config import load_toml
from bytelm.decoding.plain import PlainDecoder
from bytelm.errors import ConfigError, ResourceError, UsageError
from bytelm.evaluate import stream
from bytelm.evaluate.bits import measure
from bytelm.evaluate.calibrate import calibrate
from bytelm.generate import prompts
from bytelm.interfaces.model import ByteModel
from bytelm.models.transformer.entropy_model import TransformerEntropyModel
from bytelm.models.transformer.model import ByteTransformer
from bytelm.nn import fused, runs
from bytelm.patching.base import Patcher
from bytelm.patching.entropy import Entropy
from bytelm.testing import UniformModel
from bytelm.testing.pretend import moved, pretend
from bytelm.training.loop import Trainer
from bytelm.training.run import train
from bytelm.training.settings import configure
from bytelm.training.stages import boundaries
from small import BLT, TRAINED

TINY = [*BLT, "entropy_model.name=transformer", *TRAINED]
META = torch.device("meta")  # a device without memory, for what is to be put elsewhere
NVIDIA = "nvidia-smi"
ELSEWHERE = {
    "doctor",
    "data",
    "compress",
    "decompress",
    "prime",
    "costs",
    "convert",
    "export",
}  # verbs that take no device


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "notes.txt"
    path.write_text("".join(f"line {number} of some notes\n" for number in range(2000)))
    return path


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("run") / "run"
    train([text], configure(sets=TINY, steps=2), home, quiet=True)
    return home


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """Two GPUs as far as names go; the devices that were made current."""
    made: list[torch.device] = []
    planted: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "set_device": made.append,
    }
    for name, value in planted.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.delenv(device.LOCAL_RANK, raising=False)
    monkeypatch.delenv(device.VARIABLE, raising=False)
    yield made


# --- names ---


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "meta", "gpu", "mps:1", ""])
def test_a_device_that_is_not_there_is_named_beside_those_that_are(name: str) -> None:
    with pytest.raises(UsageError, match=rf"^no device {name} here: take one of cpu.*, or auto$"):
        device.resolve(name)


@pytest.mark.parametrize(
    ("name", "variable", "rank", "found"),
    [
        ("auto", None, None, "cuda:0"),
        ("auto", "cpu", None, "cpu"),
        ("auto", "", None, "cuda:0"),
        ("cuda", "cpu", None, "cuda:0"),
        ("auto", None, "1", "cuda:1"),
        ("cuda", None, "1", "cuda:1"),
        ("cuda:0", None, "1", "cuda:0"),
        ("cpu", None, "1", "cpu"),
    ],
)
def test_auto_is_the_variable_or_the_gpu_of_this_process(
    cards: list[torch.device],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    variable: str | None,
    rank: str | None,
    found: str,
) -> None:
    for key, value in ((device.VARIABLE, variable), (device.LOCAL_RANK, rank)):
        if value is not None:
            monkeypatch.setenv(key, value)
    assert device.resolve(name) == torch.device(found) and not cards
    assert device.use(name) == torch.device(found)
    assert cards == [torch.device(found)] * found.startswith("cuda")


def test_a_process_without_a_gpu_of_its_own_is_told_how_many_there_are(
    cards: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(device.LOCAL_RANK, "2")
    with pytest.raises(UsageError, match=r"process 2 .* there are 2: start as many processes as GPUs"):
        device.resolve()


def test_without_a_gpu_auto_is_the_cpu_even_where_apples_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(device.VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert device.resolve() == torch.device("cpu") and device.resolve("mps") == torch.device("mps")


def test_every_verb_that_computes_takes_a_device() -> None:
    verbs = {name: app[name] for name in app if not name.startswith("-")}
    assert verbs.keys() > ELSEWHERE
    for name, verb in verbs.items():
        if name in ELSEWHERE or not verb.default_command or verb.default_command.__module__.startswith("cyclopts"):
            continue
        options = {option for argument in verb.assemble_argument_collection() for option in argument.names}
        assert "--device" in options, name


@pytest.mark.parametrize(
    "words",
    [
        ["train", "{text}", "--run", "{new}"],
        ["train", "{text}", "--run", "{new}", "--dry-run"],
        ["demo", "--run", "{new}"],
        ["eval", "{run}", "{text}"],
        ["generate", "{run}", "a"],
        ["patches", "{run}", "a"],
        ["calibrate", "{run}", "4"],
        ["presets"],
        ["report", "{run}"],
        ["compare", "{text}", "--run", "{new}"],
    ],
    ids=lambda words: " ".join(words),
)
def test_a_verb_refuses_a_device_that_is_not_there(
    words: list[str], run: Path, text: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = [word.format(text=text, run=run, new=tmp_path / "new") for word in words]
    assert cli([*given, "--device", "cuda:7"]) == 2
    out, err = capfd.readouterr()
    assert err == "bytelm: usage: no device cuda:7 here: take one of cpu, or auto\n" and not out
    assert not (tmp_path / "new").exists()


def test_the_variable_is_the_option(
    run: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BYTELM_DEVICE", "cuda:7")
    assert cli(["generate", str(run), "a", "--quiet"]) == 2
    assert "no device cuda:7 here" in capfd.readouterr().err
    assert cli(["generate", str(run), "a", "--quiet", "--max-bytes", "1", "--device", "cpu"]) == 0


# --- what is put there ---


def test_a_model_is_loaded_onto_its_device_piece_by_piece(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = assemble.load(run, META)
    assert all(tensor.is_meta for tensor in loaded.model.state_dict().values())
    assert all(tensor.device.type == "cpu" for tensor in bytelm.load(run).model.state_dict().values())
    seen: list[str] = []

    def keep(name: str, tensor: torch.Tensor) -> torch.Tensor:
        seen.append(name)
        return tensor.to(META)

    kept = store.read_tensors(loaded.checkpoint, "model", keep)
    assert seen == list(kept) and all(tensor.is_meta for tensor in kept.values())


def test_a_model_is_loaded_in_the_wanted_dtype_and_its_entropy_model_stays_in_float32(
    run: Path, tmp_path: Path
) -> None:
    half, whole = bytelm.load(run, dtype=torch.bfloat16), bytelm.load(run)
    half.model.requires_grad_(False)
    wanted = whole.model.state_dict()
    for name, tensor in half.model.state_dict().items():
        own = torch.float32 if name.startswith("patcher.") else torch.bfloat16
        assert tensor.dtype == own and torch.equal(tensor, wanted[name].to(own)), name
    assert any(name.startswith("patcher.") for name in wanted)
    assert half.bits(b"line 7 of some notes")[0] == pytest.approx(whole.bits(b"line 7 of some notes")[0], rel=0.02)
    with pytest.raises(UsageError, match=r"^dtype torch.int8: weights can be torch.float32, "):
        bytelm.load(run, dtype=torch.int8)
    whole.save_pretrained(tmp_path / "folder")
    again = bytelm.load(tmp_path / "folder", dtype=torch.bfloat16).model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in half.model.state_dict().items())


def test_the_entropy_model_and_the_model_are_put_where_the_training_is(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[type, Any]] = []
    theirs = nn.Module.to

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        moved.append((type(self), *args))
        return theirs(self, *args, **kwargs)

    def fit(self: Trainer) -> Any:
        assert moved, "nothing was moved before the training"
        return SimpleNamespace(signal=None, progress=None)

    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(Trainer, "fit", fit)
    train([text], configure(sets=TINY, steps=1), tmp_path / "run", quiet=True)
    kinds = [kind.__name__ for kind, where in moved if where == torch.device("cpu")]
    # The entropy model to be trained, and to be asked; the patcher around it, which cuts before there is a model.
    assert kinds == ["ByteTransformer", "ByteTransformer", "Entropy", "BLT"]


def test_where_a_run_is_trained_is_kept_and_may_change(text: Path, tmp_path: Path) -> None:
    words = ["train", str(text), "--run", str(tmp_path / "run"), "--steps", "1", "--quiet"]
    words += [word for setting in TINY for word in ("--set", setting)]
    assert cli(words) == 0
    assert load_toml(tmp_path / "run" / "config.toml")["train"]["device"] == "auto"
    assert cli([*words, "--device", "cpu"]) == 0
    assert load_toml(tmp_path / "run" / "config.toml")["train"]["device"] == "cpu"
    with pytest.raises(
        ConfigError, match=r"entropy_model_train\.device: the entropy model is trained on the model's device"
    ):
        configure(sets=[*TINY, "entropy_model_train.device=cpu"], steps=1)


def test_what_is_compressed_is_compressed_on_the_cpu() -> None:
    with pytest.raises(UsageError, match=r'^the model is on meta, .*: load it with device="cpu"$'):
        bytelm.LM(FarModel(), 64).compress(b"abc")


class FarModel(UniformModel):
    """A model on another device."""

    @property
    def device(self) -> torch.device:
        return META


def test_patches_are_cut_and_calibrated_on_a_device_as_on_the_cpu(run: Path, text: Path) -> None:
    """Documents side by side: one wait a call, of the scorer's entropies."""
    model = assemble.load(run).model
    data = np.frombuffer(text.read_bytes(), np.uint8)
    documents = [data[:9000], data[9000:9100], data[20000:20003]]
    here = model.patcher
    assert isinstance(here, Entropy)
    wanted = [opens.tolist() for opens in boundaries.cut(here, iter(documents))]
    cuts = calibrate(here.config, here.entropy_model, documents)
    with pretend() as seen:
        far = moved(model).patcher
        assert isinstance(far, Entropy) and stream.device_of(far).type == "meta"
        assert [opens.tolist() for opens in boundaries.cut(far, iter(documents))] == wanted
        assert sum(seen.fetches.values()) == 2  # chunks of the longest
        assert calibrate(here.config, far.entropy_model, documents).threshold == pytest.approx(cuts.threshold, abs=1e-5)
    assert sum(map(sum, wanted)) > 100


# --- memory ---


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has a total capacity of")


@pytest.mark.parametrize(
    ("where", "what", "suggest_fit"),
    [
        ("model", "a step", "--set train.batch=1 takes "),
        ("entropy_model", "a step of the entropy model", "--set entropy_model_train.batch=1"),
    ],
)
def test_a_step_that_does_not_fit_is_one_line_with_the_knob_to_turn(
    where: str,
    what: str,
    suggest_fit: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    theirs = Trainer.fit

    def fit(self: Trainer) -> Any:
        scores = isinstance(self.model, ByteTransformer)
        return full() if scores == (where == "entropy_model") else theirs(self)

    monkeypatch.setattr(Trainer, "fit", fit)
    words = ["train", str(text), "--run", str(tmp_path / "run"), "--steps", "1", "--quiet", "--device", "cpu"]
    words += [word for setting in TINY for word in ("--set", setting)]
    assert cli(words) == 5
    err = capfd.readouterr().err
    assert re.fullmatch(rf"bytelm: resource: {what} did not fit into cpu's .*B of memory: {suggest_fit}.*\n", err)


def test_a_model_that_does_not_fit_is_one_line(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ByteModel, "to", full)
    with pytest.raises(
        ResourceError, match=r"^the model of .*step-\d+ did not fit into cpu's .*: load it in .*bfloat16"
    ):
        bytelm.load(run)


def test_windows_and_rows_that_do_not_fit_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UniformModel, "forward", full)
    with pytest.raises(ResourceError, match=r"^1 windows of 64 ids did not fit into .*: take a context of 32, or "):
        list(measure(UniformModel(), [("a", b"abc")], context=64))
    with pytest.raises(ResourceError, match=r"^2 sequences of up to 9 ids did not fit into .*: give fewer prompts, "):
        prompts.generate(UniformModel(), [b"abc", b"abcd"], max_bytes=4)


def test_fewer_rows_are_opened_where_a_device_has_no_room_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 2

    def opened(model: ByteModel, *, rows: int, capacity: int, quantize: None) -> PlainDecoder:
        return full() if rows > most else PlainDecoder(model, rows, capacity)

    monkeypatch.setattr(prompts, "open_decoder", opened)
    assert len(prompts.generate(UniformModel(), [b"a"] * 5, max_bytes=2)) == 5
    most = 0
    with pytest.raises(ResourceError, match="no memory for a sequence of 4 ids"):
        prompts.generate(UniformModel(), [b"a"], max_bytes=2)


def test_what_is_cut_into_patches_is_read_in_halves_where_it_does_not_fit(
    run: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patcher = assemble.load(run).model.patcher
    assert patcher is not None
    data = text.read_bytes()[:9000]
    wanted = [opens for _, opens in stream.decisions(patcher, data)]
    theirs, sizes = Patcher.extend, list[int]()

    def small(self: Patcher, ids: torch.Tensor, state: Any = None) -> Any:
        sizes.append(ids.shape[1])
        return full() if ids.shape[1] > 3000 else theirs(self, ids, state)

    monkeypatch.setattr(Patcher, "extend", small)
    found = [opens for _, opens in stream.decisions(patcher, data)]
    assert sizes == [8192, 4096, 2048, 2048, 4096, 2048, 2048, 809]
    for a, b in zip(found, wanted, strict=True):
        assert a is not None and b is not None and torch.equal(a, b)
    monkeypatch.setattr(Patcher, "extend", full)
    with pytest.raises(torch.OutOfMemoryError):
        list(stream.decisions(patcher, data[:3]))


def test_a_gpu_cuts_more_at_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patcher = assemble.load(run).model.patcher
    assert patcher is not None
    groups: list[int] = []
    monkeypatch.setattr(boundaries, "cut_group", lambda patcher, group: groups.append(len(group)) or iter(group))
    documents = [torch.zeros(8191, dtype=torch.uint8).numpy()] * 40
    for where, expected in ((torch.device("cpu"), [8] * 5), (META, [32, 8])):
        groups.clear()
        monkeypatch.setattr(boundaries, "device_of", lambda _, where=where: where)
        assert len(list(boundaries.cut(patcher, iter(documents)))) == 40 and groups == expected


# --- float32 ---

PRECISIONS: list[dict[str, Any]] = [
    {},
    {"word": "high"},
    {"word": "medium"},
    {"word": "highest", "cuda": "tf32"},  # which torch calls a mix, and has no word for
    {"word": "high", "cuda": "ieee", "cpu": "tf32"},
]


@pytest.mark.parametrize("asked", PRECISIONS, ids=str)
def test_entropies_are_computed_in_float32_whatever_was_allowed(asked: dict[str, Any]) -> None:
    backends: Any = torch.backends
    cuda, cpu = backends.cuda.matmul, backends.mkldnn.matmul
    entropy_model = TransformerEntropyModel(bytelm_entropy_model())
    entropy_model.model.init_weights(0)
    seen: list[tuple[str, str]] = []
    entropy_model.model.head.register_forward_pre_hook(
        lambda *_: seen.append((cuda.fp32_precision, cpu.fp32_precision))
    )
    before = torch.get_float32_matmul_precision(), cuda.fp32_precision, cpu.fp32_precision
    try:
        torch.set_float32_matmul_precision(asked.get("word", "highest"))
        cuda.fp32_precision = asked.get("cuda", cuda.fp32_precision)
        cpu.fp32_precision = asked.get("cpu", cpu.fp32_precision)
        set_to = cuda.fp32_precision, cpu.fp32_precision
        entropy_model.entropies(torch.tensor([[1, 2, 3]]), entropy_model.initial_state(1))
        assert (cuda.fp32_precision, cpu.fp32_precision) == set_to
        assert seen and {precision for pair in seen for precision in pair} <= {"none", "ieee"}
    finally:
        torch.set_float32_matmul_precision(before[0])
        cuda.fp32_precision, cpu.fp32_precision = before[1:]


def bytelm_entropy_model() -> Any:
    from bytelm.models.transformer import entropy_model as transformer

    return transformer.Config(layers=1, dim=16, heads=2, attention_window=16)


# --- the doctor ---


def test_the_doctor_says_of_each_gpu_what_it_can(
    cards: list[torch.device], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    current: list[int] = []
    planted: dict[str, Any] = {
        "mem_get_info": lambda card: (60 << 30, 80 << 30),
        "get_device_name": lambda card: f"Planted {card.index}",
        "get_device_capability": lambda card: (7 + card.index, 5),
        "is_bf16_supported": lambda including_emulation: including_emulation or current[-1] == 1,
    }
    for name, value in planted.items():
        monkeypatch.setattr(torch.cuda, name, value)

    class Current:
        def __init__(self, card: torch.device) -> None:
            current.append(card.index)

        def __enter__(self) -> None: ...

        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", Current)
    which = shutil.which
    monkeypatch.setattr(doctor.shutil, "which", lambda tool: which(tool) if tool != NVIDIA else f"/planted/{tool}")
    answer, theirs = subprocess.CompletedProcess([], 0, stdout="580.65.06\n580.65.06\n"), subprocess.run

    def run(command: list[str], **more: Any) -> Any:  # a compiler may be asked for kernels meanwhile
        return answer if command[0] == f"/planted/{NVIDIA}" else theirs(command, **more)

    monkeypatch.setattr(doctor.subprocess, "run", run)
    monkeypatch.setattr(runs, "present", lambda device: True)
    monkeypatch.setattr(fused, "triton_kernels", lambda: None)
    assert cli(["doctor", "--json"]) == 0
    told = {what: line["found"] for what, line in json.loads(capfd.readouterr().out).items() if "found" in line}
    size = "64.4 GB free of 85.9 GB"
    assert told["cuda:0"] == f"Planted 0, capability 7.5, no bfloat16: float32 is used, {size}"
    assert told["cuda:1"] == f"Planted 1, capability 8.5, bfloat16, {size}"
    assert told["GPU kernels"] == "variable-length attention, plain torch"
    assert "driver 580.65.06, Triton " in told["CUDA"] and told["CUDA"].endswith("float32 matmuls in float32")


def test_the_doctor_works_in_a_source_tree_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    theirs = doctor.version

    def version(package: str) -> str:
        if package == "bytelm":
            raise doctor.PackageNotFoundError(package)
        return theirs(package)

    def requires(package: str) -> list[str]:
        raise doctor.PackageNotFoundError(package)

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor, "requires", requires)
    assert cli(["doctor"]) == 0
    out = capfd.readouterr().out
    assert "extras     unknown: bytelm runs from a source tree: pip install -e . in it\n" in out
    assert "Ready." in out and cli(["doctor", "--json"]) == 0
