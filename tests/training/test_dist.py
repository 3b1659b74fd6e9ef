"""Several processes share a training: the same data, the same losses, and nobody waits for ever for a lost one."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import worlds
from bytelm.checkpoint import store
from bytelm.checkpoint.metrics import METRICS, read_metrics
from bytelm.errors import ConfigError, TrainingError
from bytelm.training import dist
from bytelm.training.dist import DistContext, init_distributed
from bytelm.training.run import train
from bytelm.training.settings import configure
from small import BLT, TRAINED

TINY = [*(setting for setting in BLT if "entropy_model" not in setting), "entropy_model.rows=512", *TRAINED]
SETS = [*TINY, "train.batch=4", "train.gradient_accumulation_steps=2", "train.spikes=keep"]


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("notes") / "notes.txt"
    path.write_text("".join(f"line {number} of some notes\n" for number in range(3000)))
    return path


def command(notes: Path, run: Path, steps: int, *more: str) -> list[str]:
    sets = [word for setting in (*SETS, *more) for word in ("--set", setting)]
    return [sys.executable, "-m", "bytelm", "train", str(notes), "--run", str(run), "--steps", str(steps), *sets]


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nobody_is_left() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


def launch(words: list[str], world: int) -> list[subprocess.Popen[str]]:
    """As many processes as torchrun would start, by its variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    there = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(words, env={**os.environ, **there, "RANK": str(rank)}, **pipes) for rank in range(world)
    ]
    STARTED.extend(processes)
    return processes


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit code and standard error of each."""
    errors = [process.communicate(timeout=200)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def losses(run: Path) -> dict[int, float]:
    lines = [line for line in read_metrics(run / METRICS) if line["kind"] == "train"]
    return {line["step"]: line["bits_per_byte"] for line in lines}


def weights(run: Path) -> dict[str, torch.Tensor]:
    return store.read_tensors(store.newest(run), "model")


@pytest.mark.fault("T7")
@pytest.mark.slow
def test_one_process_two_and_one_again_learn_as_one_does(notes: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    for steps, world in ((2, 1), (4, 2), (6, 1)):  # the rate follows from how many steps there will be
        train([notes], configure("blt-tiny", sets=SETS, steps=steps), alone, quiet=True)
        for code, error in end(launch(command(notes, shared, steps), world)):
            assert code == 0, error
        assert store.read_state(store.newest(shared))["world"] == world
    a, b = store.read_state(store.newest(alone)), store.read_state(store.newest(shared))
    assert (a["step"], a["bytes"], a["skipped"]) == (b["step"], b["bytes"], b["skipped"]) == (6, a["bytes"], 0)
    for name, tensor in weights(alone).items():
        torch.testing.assert_close(weights(shared)[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    told, own = losses(shared), losses(alone)
    common = told.keys() & own.keys()
    assert 6 in common and all(told[step] == pytest.approx(own[step], abs=1e-5) for step in common)


TABLES = """
from contextlib import nullcontext
import torch
from bytelm.nn.ngrams import NgramEmbedding
from bytelm.testing import UniformModel
from bytelm.testing.pretend import moved, near, pretend
from bytelm.training.config import TrainConfig
from bytelm.training.optimise import Optimizer
from bytelm.training.dist import SINGLE_PROCESS, init_distributed
from bytelm.transfer import to_device, to_host

torch.manual_seed(0)
class OneTable(UniformModel):
    def __init__(self):
        super().__init__()
        self.embed = NgramEmbedding(8, (3, 5), 1, 9)

    def lookup_tables(self):
        return [self.embed]

model = OneTable()
index, slopes = torch.randint(0, 9, (7, 2)) + torch.tensor([0, 9]), torch.randn(7, 8)
share = {0: slice(0, 5), 1: slice(5, 7)}
with pretend():
    tables = []
    for world in (1, 2):
        where = moved(model)
        far = where.embed
        weight = far.get_submodule("ngram").get_parameter("weight")
        with init_distributed(0.5) if world == 2 else nullcontext() as dist:
            optimizer = Optimizer(where, TrainConfig(steps=1), dist or SINGLE_PROCESS)
            part = share[dist.rank] if dist else slice(None)
            far.looked_up(to_device(index[part], weight)).backward(to_device(slopes[part], weight))
            if dist:
                optimizer.share()
                assert [len(x) for x in (*optimizer.kept[0].index, *optimizer.kept[0].gradients)] == [7, 7]
            norm = optimizer.norm()
        optimizer.step(0.01)
        tables.append((float(to_host(norm)), near(weight.detach())))
(norm, alone), (other, shared) = tables
assert abs(norm - other) < 1e-6 * norm, (norm, other)
torch.testing.assert_close(alone, shared, rtol=1e-6, atol=1e-6)
"""


def test_what_each_process_read_of_a_table_on_a_device_moves_that_of_all() -> None:
    """One of them reads more than the other."""
    for code, error in end(launch([sys.executable, "-c", TABLES], 2)):
        assert code == 0, error


@pytest.mark.fault("T8")
@pytest.mark.parametrize(
    ("lost", "how"),
    [
        pytest.param(1, signal.SIGKILL, id="the second is killed", marks=pytest.mark.slow),
        pytest.param(0, signal.SIGSTOP, id="the first hangs"),
        pytest.param(0, signal.SIGKILL, id="the first is killed", marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, id="the second hangs", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_lost_is_named_and_the_same_command_goes_on(
    notes: Path, tmp_path: Path, lost: int, how: signal.Signals
) -> None:
    run = tmp_path / "run"
    words = command(notes, run, 100_000, "train.checkpoint_every_minutes=1e-9", "train.timeout_minutes=0.1")
    processes = launch(words, 2)
    deadline = time.monotonic() + 120
    while len(store.checkpoints(run)) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    processes[lost].send_signal(how)
    other = processes[1 - lost]
    error = other.communicate(timeout=120)[1]
    assert other.returncode == 6, error
    assert f"bytelm: training: process {lost} of 2 is unresponsive" in error.splitlines()[-1]
    processes[lost].kill()
    processes[lost].communicate()
    step = store.read_state(store.newest_good(run)[0])["step"]
    assert step >= 1
    for code, told in end(launch(command(notes, run, step + 2), 2)):
        assert code == 0, told
    assert store.read_state(store.newest(run))["step"] == step + 2


def told(lost: int, preparing: bool) -> str:
    """What a process says of the one that is killed while all add numbers, or wait for the first one's files."""
    with init_distributed(0.5) as team:
        team.total(1.0)
        if team.rank == lost:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(TrainingError) as error:
            while True:
                team.main_process_first(lambda: None) if preparing else team.total(1.0)
        return str(error.value)


@pytest.mark.fault("T8")
@pytest.mark.parametrize(("lost", "preparing"), [(3, False), (0, False), (0, True)])
def test_all_name_the_one_that_is_lost_and_nobody_else(lost: int, preparing: bool) -> None:
    """Also those that hear of it last, as they wait for one that has heard."""
    with worlds.started(4, told, lost, preparing) as processes:
        others = [process for rank, process in enumerate(processes) if rank != lost]
        found = worlds.results(others)
    assert {line.split(" is ")[0] for line in found} == {f"process {lost} of 4"}, found


ADDED = """
import torch
from bytelm.training.dist import init_distributed

ROWS = [[2, 0, 2], [3]]  # that each process looked up, one of them twice

def table(rows):
    ids, slopes = torch.tensor([rows]), torch.arange(1.0, 1 + len(rows))[:, None].expand(-1, 2)
    return torch.sparse_coo_tensor(ids, slopes.clone(), (5, 2), check_invariants=True)

with init_distributed(1.0) as team:
    found = team.add_sparse(table(ROWS[team.rank]))
    assert found.is_coalesced() and found._indices().tolist() == [[0, 2, 3]]
    assert torch.equal(found.to_dense(), sum(table(rows).to_dense() for rows in ROWS))
    assert team.everyones(torch.full((2 * team.rank, 1), 7)).tolist() == [[7], [7]]
"""


def test_sparse_gradients_are_brought_together_and_added() -> None:
    """NCCL adds none: their rows, of which every process has another number, travel padded."""
    for code, error in end(launch([sys.executable, "-c", ADDED], 2)):
        assert code == 0 and not error, error


@pytest.mark.parametrize(("where", "backends"), [("cpu", "gloo"), ("cuda:1", "cpu:gloo,cuda:nccl")])
def test_a_team_on_gpus_adds_gradients_there_and_the_few_numbers_of_the_host_on_the_host(
    where: str, backends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    added: list[torch.Tensor] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "")  # so that it is put back
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING")
    monkeypatch.setattr(dist.dist, "init_process_group", lambda backend, **_: asked.append(backend))
    monkeypatch.setattr(dist.dist.distributed_c10d, "_get_default_store", lambda: None)
    monkeypatch.setattr(dist.dist, "all_reduce", lambda tensor, how: added.append(tensor))
    monkeypatch.setattr(dist.dist, "get_backend", lambda: backends)
    monkeypatch.setattr(dist.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(dist.dist, "new_group", lambda **_: None)
    monkeypatch.setattr(dist.DistContext, "broadcast", lambda found, value: value)
    with dist.init_distributed(1.0, torch.device(where)) as found:
        assert (
            found.total(1.0, 2.0) == [1.0, 2.0]
            and found.longest(3.0) == 3.0
            and found.agreed(None, True) == (None, [True])
        )
    assert asked == [backends] and len(added) == 3
    assert all(tensor.device.type == "cpu" for tensor in added)
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "2"  # a process that waits for a lost one is not ended


@pytest.mark.fault("T3")
@pytest.mark.parametrize(
    "heard",
    [pytest.param(0, id="the first"), pytest.param(1, id="the second", marks=pytest.mark.slow)],
)
def test_a_signal_to_one_stops_all_at_the_same_step(notes: Path, tmp_path: Path, heard: int) -> None:
    run = tmp_path / "run"
    processes = launch(command(notes, run, 100_000), 2)
    deadline = time.monotonic() + 120
    while not losses(run) and time.monotonic() < deadline:
        time.sleep(0.1)
    processes[heard].send_signal(signal.SIGTERM)
    ended = end(processes)
    assert [code for code, _ in ended] == [143, 143], ended
    step = store.read_state(store.newest(run))["step"]
    assert step >= 1 and f"saved step {step} in" in ended[0][1]


def torchrun(notes: Path, run: Path, *options: str, steps: int = 100_000) -> subprocess.Popen[str]:
    """Two processes under torchrun, which have taken a step; all of them write to its standard error."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *options]
    words = [*launcher, "-m", "--", *command(notes, run, steps, "train.minutes=2")[2:]]  # which orphans stop at, too
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    STARTED.append(process)
    deadline = time.monotonic() + 120
    while not losses(run) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    return process


@pytest.mark.parametrize(
    ("options", "code"),
    [
        pytest.param([], -signal.SIGUSR1, id="which dies of it and leaves orphans", marks=pytest.mark.slow),
        pytest.param(
            ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"], 1, id="passed on", marks=pytest.mark.slow
        ),
    ],
)
def test_a_signal_to_torchrun_saves_and_ends_its_processes(
    notes: Path, tmp_path: Path, options: list[str], code: int
) -> None:
    """What Slurm does to the launcher ahead of the end. The pipe is closed only when all processes have ended."""
    run = tmp_path / "run"
    process = torchrun(notes, run, *options)
    process.send_signal(signal.SIGUSR1)
    error = process.communicate(timeout=120)[1]
    step = store.read_state(store.newest(run))["step"]
    assert process.returncode == code and step >= 1 and f"saved step {step} in {run}" in error, error


@pytest.mark.slow
@pytest.mark.fault("T7")
def test_torchrun_itself(notes: Path, tmp_path: Path) -> None:
    process = torchrun(notes, tmp_path / "run", steps=3)
    assert process.wait(120) == 0
    assert store.read_state(store.newest(tmp_path / "run"))["world"] == 2


@pytest.mark.slow
def test_torchrun_makes_1_of_every_exit_code(notes: Path, tmp_path: Path) -> None:
    process = torchrun(notes.parent / "nothing", tmp_path / "run")
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "bytelm: data: " in error and re.search(r"exitcode *: 3", error), error


def test_rows_are_shared_out_or_refused() -> None:
    assert [DistContext(1, world).rows(12) for world in (2, 3, 4)] == [6, 4, 3]
    with pytest.raises(ConfigError, match=r"train\.batch = 12 cannot be shared by 5 processes: take a multiple"):
        DistContext(0, 5).rows(12)
