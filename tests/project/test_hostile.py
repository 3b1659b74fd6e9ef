"""Configurations, states and weights made to hurt: refused in a line, in bounded memory, before anything is built."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bytelm.checkpoint import manifest, store
from bytelm.checkpoint.assemble import MOST_LAYERS, Recipe, load
from bytelm.cli import run as cli
from bytelm.config import build, load_toml
from bytelm.errors import BytelmError, CheckpointError, ConfigError
from bytelm.training.run import train
from bytelm.training.settings import configure
from small import BLT, TRAINED

RUN = Path(__file__).parents[1] / "golden" / "format-2"
CHECKPOINT = RUN / "checkpoints" / "step-00000003"
HUGE = 10**9
VALUES: list[Any] = [HUGE, 2**62, -1, 0, 1.5, float("inf"), float("nan"), "../../etc/passwd", "a/b", "", None, True]
VALUES += [[], [HUGE], [HUGE, HUGE, HUGE], list(range(2, 20_000)), {}, {"name": "../blt"}, {"name": {"name": "blt"}}]

# What a process of its own with little memory left makes of hostile files, one a line; it must come to an end.
BOUNDED = """
import json, resource, signal, sys
from pathlib import Path
import bytelm, torch
from bytelm.checkpoint.assemble import load
from bytelm.cli import run
from bytelm.errors import BytelmError
load(sys.argv[1])  # what is imported once is no part of it
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), used + (400 << 20)))
signal.alarm(100)
for folder in sys.argv[2:]:
    try:
        load(folder)
        print("loaded", flush=True)
    except BytelmError as error:
        print(str(error).replace(chr(10), " ")[:300], flush=True)
"""


def sealed(folder: Path, state: bytes | None = None, weights: bytes | None = None) -> Path:
    """A copy of the golden run with another state or weights, and a manifest that fits them."""
    path = folder / "checkpoints" / CHECKPOINT.name
    path.mkdir(parents=True)
    for name, data in (("state.json", state), ("model.safetensors", weights)):
        (path / name).write_bytes((CHECKPOINT / name).read_bytes() if data is None else data)
    body: dict[str, Any] = {"format": store.FORMAT, "bytelm": "0", "step": 3, "files": {}}
    for name in ("state.json", "model.safetensors"):
        data = (path / name).read_bytes()
        body["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "MANIFEST.json").write_text(json.dumps({**body, "sha256": manifest.digest(body)}))
    return folder


def state_with(where: list[str], value: Any) -> bytes:
    """The state of the golden run with one value changed."""
    state = json.loads((CHECKPOINT / "state.json").read_text())
    table = state
    for key in where[:-1]:
        table = table[key]
    table[where[-1]] = value
    return json.dumps(state).encode()


def bounded(*folders: Path) -> list[str]:
    """What loading each came to, in a process that may take 400 MB more than it has."""
    words = [sys.executable, "-c", BOUNDED, str(RUN), *map(str, folders)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


LARGE = [
    ("model", "local_dim"),
    ("model", "global_dim"),
    ("model", "global_layers"),
    ("model", "encoder_layers"),
    ("model", "ngram_rows"),
    ("model", "attention_window"),
    ("model", "queries"),
    ("model", "ffn_multiple"),
    ("patching", "max_length"),
    ("entropy_model", "rows"),
]
ENDLESS = b'{"a":{"dtype":"F32","shape":[1000000000,1000000000],"data_offsets":[0,4000000000000000000]}}'


@pytest.mark.fault("K6", "K7")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux's /proc")
def test_a_hostile_checkpoint_takes_little_memory_and_time(tmp_path: Path) -> None:
    """Sizes that no memory holds, in the state and in the header of the weights, and files that go on and on."""
    folders = [
        sealed(tmp_path / f"{'.'.join(key)}={value}", state_with(["recipe", *key], value))
        for key in LARGE
        for value in (HUGE, 2**62)
    ]
    weights = (CHECKPOINT / "model.safetensors").read_bytes()
    folders.append(sealed(tmp_path / "header", weights=len(ENDLESS).to_bytes(8, "little") + ENDLESS + weights))
    folders.append(sealed(tmp_path / "long header", weights=(1 << 62).to_bytes(8, "little") + weights))
    others = {
        "vocabulary": {"model": {"name": "transformer", "vocabulary": HUGE}},
        "layers": {"model": {"name": "megabyte", "layers": [HUGE, HUGE]}},
        "more layers": {"model": {"name": "megabyte_pytorch", "layers": [HUGE, 1]}},
        "stages": {"model": {"name": "megabyte", **dict.fromkeys(("sizes", "dims", "heads", "layers"), [2] * 20_000)}},
        "filters": {"model": {"name": "megabyte", "filters": [3] * 100_000}},
        "perceiver": {"model": {"name": "perceiver", "layers": HUGE, "latents": 2**62}},
        "linear": {"model": {"name": "linear", "dim": 2**40, "heads": 1}},
        "deep": {"model": json.loads("[" * 500 + "]" * 500)},
    }
    folders += [sealed(tmp_path / name, state_with(["recipe"], recipe)) for name, recipe in others.items()]
    for name in ("state.json", "MANIFEST.json", "model.safetensors"):
        folder = sealed(tmp_path / f"sparse {name}")
        os.truncate(folder / "checkpoints" / CHECKPOINT.name / name, 1 << 40)
        folders.append(folder)
    ends = bounded(*folders)
    assert len(ends) == len(folders)
    loaded = [folder.name for folder, end in zip(folders, ends, strict=True) if end == "loaded"]
    # What no weight depends on is no size: a window that sees everything, patches as long as they come.
    assert set(loaded) <= {
        f"{key}={v}" for key in ("model.attention_window", "patching.max_length") for v in (HUGE, 2**62)
    }


PATHS = [
    ["recipe"],
    *(["recipe", part] for part in ("model", "patching", "entropy_model", "modality")),
    *(
        ["recipe", "model", key]
        for key in ("name", "local_dim", "global_heads", "ngram_sizes", "theta", "attention_window")
    ),
    *(["recipe", "patching", key] for key in ("name", "threshold", "rule", "max_length", "max_single_byte_run")),
    *(["recipe", "entropy_model", key] for key in ("name", "order", "rows", "reset_newline")),
    ["context"],
]


@pytest.mark.fault("K7")
@settings(max_examples=60)
@given(where=st.sampled_from(PATHS), value=st.sampled_from(VALUES) | st.integers() | st.text(max_size=5))
def test_any_value_in_a_state_is_read_or_refused_in_our_words(
    tmp_path_factory: pytest.TempPathFactory, where: list[str], value: Any
) -> None:
    folder = sealed(tmp_path_factory.mktemp("state") / "run", state_with(where, value))
    try:
        load(folder)
    except BytelmError as error:
        assert str(error)


@pytest.mark.fault("K7")
@pytest.mark.parametrize("key", ["step", "bytes", "seconds", "skipped", "spikes"])
def test_a_hostile_state_is_not_gone_on_from(key: str, tmp_path: Path) -> None:
    from bytelm.checkpoint.metrics import METRICS
    from bytelm.data.sampler import Sampler
    from bytelm.training.journal import Journal
    from bytelm.training.loop import Trainer

    run = sealed(tmp_path / "run", state_with([key], "many"))
    model = load(RUN).model
    trainer = Trainer(
        model, configure("demo").train, Sampler.__new__(Sampler), run, Journal(tmp_path / METRICS, quiet=True)
    )
    with pytest.raises(CheckpointError):
        trainer.resume()


HOSTILE = {
    "layers": "[model]\nname = 'transformer'\nlayers = 1000000000\n",
    "stages": "[model]\nname = 'megabyte'\nlayers = [1000000000, 1000000000]\n",
    "vocabulary": "[model]\nname = 'transformer'\nvocabulary = 1000000000\n",
    "heads": "[model]\nname = 'transformer'\ndim = 1000000000\nheads = 7\n",
    "beyond 64 bits": f"[model]\nname = 'transformer'\ndim = {10**30}\n",
    "a path for a name": "[model]\nname = '../../checkpoint/store'\n",
    "a name with a slash": "[model]\nname = 'a/b'\n",
    "deep": "a = " + "[" * 100_000,
    "an endless file": "#" + "x" * (1 << 21),
    "a start elsewhere": "start = '../../etc'\n",
}


@pytest.mark.fault("K7")
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_configuration_is_one_line_and_nothing_is_built(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Given with --config, and lying in a run as its own."""
    (tmp_path / "data.txt").write_text("some text\n" * 50)
    for place in ("given", "run"):
        run = tmp_path / place / "run"
        run.mkdir(parents=True)
        file = run / "config.toml" if place == "run" else tmp_path / "x.toml"
        file.write_text(HOSTILE[kind])
        words = ["train", str(tmp_path / "data.txt"), "--run", str(run), "--steps", "1", "--quiet"]
        code = cli([*words, *(["--config", str(file)] if place == "given" else ["--preset", "byte-tiny"])])
        line = capfd.readouterr().err.strip()
        assert code in (2, 4) and line.startswith(("bytelm: config: ", "bytelm: checkpoint: ")) and "\n" not in line
        assert not (run / "checkpoints").exists() and len(line) < 2000


def test_the_bound_of_layers_is_above_what_any_model_has() -> None:
    table = load_toml(Path(sys.modules["bytelm"].__file__ or "").with_name("presets") / "blt-8b.toml")
    config = build(Recipe, {key: table[key] for key in ("model", "patching", "entropy_model")}, "preset")
    assert config.model.global_layers < MOST_LAYERS // 10
    with pytest.raises(ConfigError, match="4097 layers"):
        build(Recipe, {"model": {"name": "transformer", "layers": MOST_LAYERS + 1}}, "x")


# --- the scorer of the patches ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("corpus") / "a.txt"
    file.write_text("".join(f"{i} times {i % 7} is {i * (i % 7)}\n" for i in range(200)))
    return file


@pytest.mark.fault("K8")
def test_another_entropy_model_is_refused_and_a_missing_one_is_made_again(corpus: Path, tmp_path: Path) -> None:
    """Patches in training are those that the model's own scorer cuts, or there is no training."""
    run, home = tmp_path / "run", tmp_path / "run" / "entropy_model"
    config, longer = (configure("demo", sets=[*BLT, *TRAINED], steps=steps) for steps in (1, 2))
    train([corpus], config, run, quiet=True)
    shutil.copytree(home, tmp_path / "kept")
    path = store.newest(home)
    tensors, state = (
        {group: store.read_tensors(path, group) for group in ("model", "optimizer")},
        store.read_state(path),
    )
    tensors["model"] = {name: tensor + 1 for name, tensor in tensors["model"].items()}
    store.save(home, state["step"], tensors, state)
    with pytest.raises(CheckpointError, match=r"another entropy model than that in .*restore it"):
        train([corpus], longer, run, quiet=True)
    assert store.read_state(store.newest(run))["step"] == 1
    shutil.rmtree(home)  # it is trained again, on the same bytes from the same seed
    assert train([corpus], longer, run, quiet=True).progress is not None
    for one, other in zip(*(sorted(h.rglob("model.safetensors")) for h in (home, tmp_path / "kept")), strict=True):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.fault("K8")
def test_weights_without_their_entropy_model_or_of_another_kind_are_a_table(tmp_path: Path) -> None:
    """What was taken out of the weights is named, and so is what they lack where the recipe has another scorer."""
    tensors = store.read_tensors(CHECKPOINT, "model")
    left = {name: tensor for name, tensor in tensors.items() if not name.startswith("patcher.")}
    path = store.save(tmp_path, 3, {"model": left}, store.read_state(CHECKPOINT))
    with pytest.raises(CheckpointError, match=r"missing +patcher\.entropy_model\.tables"):
        load(path)
    other = sealed(tmp_path / "other", state_with(["recipe", "entropy_model"], {"name": "transformer", "layers": 1}))
    with pytest.raises(CheckpointError, match=r"missing +patcher\.entropy_model\.model"):
        load(other)
    gone = sealed(tmp_path / "gone", state_with(["recipe", "entropy_model"], "none"))
    with pytest.raises(ConfigError, match=r"entropy model is missing.*entropy_model\.name=ngram"):
        load(gone)
