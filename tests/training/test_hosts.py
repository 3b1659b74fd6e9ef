"""Two hosts, as network namespaces that a cable joins: one is cut off in the middle, or lost, and comes back."""

from __future__ import annotations

import subprocess
import uuid
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import worlds
from bytelm.training.run import train
from launches import ALL, Launcher, kill, sessions, step_of, torchrun
from trainings import PLAIN, held, same, tiny

STEPS = 400
SETS = [*PLAIN, "train.batch=4", "train.checkpoint_every_minutes=0.005", "train.timeout_minutes=0.15"]


@dataclass(frozen=True)
class Host:
    """A namespace, its end of the cable, and its address."""

    name: str
    end: str
    address: str

    @property
    def before(self) -> list[str]:
        """What runs a command there."""
        settings = [f"GLOO_SOCKET_IFNAME={self.end}", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"]
        return ["ip", "netns", "exec", self.name, "env", *settings]

    def cable(self, state: str) -> None:
        """Pull it ("down"), or plug it in ("up")."""
        ip("-n", self.name, "link", "set", self.end, state)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Generator[list[Host]]:
    """Skipped where namespaces are not allowed, or iproute2 is not there."""
    tag = uuid.uuid4().hex[:6]
    found = [Host(f"host{number}-{tag}", f"v{number}{tag}", f"10.99.0.{1 + number}") for number in range(2)]
    try:
        for host in found:
            ip("netns", "add", host.name)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces here")
    try:
        ip("link", "add", found[0].end, "netns", found[0].name, "type", "veth", "peer", found[1].end)
        ip("link", "set", found[1].end, "netns", found[1].name)
        for host in found:
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", host.end)
            ip("-n", host.name, "link", "set", "lo", "up")
            host.cable("up")
        yield found
    finally:
        for host in found:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


def trained(corpus: Path, run: Path) -> None:
    train([corpus], tiny(*SETS, steps=STEPS), run, quiet=True)


@contextmanager
def started(host: Host, leader: Host, corpus: Path, run: Path, log: Path) -> Generator[Launcher]:
    """torchrun on a host, with one worker; the leader's keeps the store."""
    options = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "9", "--signals-to-handle", ALL]
    options += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{leader.address}:29400", "--rdzv-id", "notes"]
    options += ["--rdzv-conf", f"is_host={str(host is leader).lower()},join_timeout=120", "--local-addr", host.address]
    sets = [word for setting in SETS for word in ("--set", setting)]
    words = ["train", str(corpus), "--preset", "byte-tiny", "--run", str(run), "--steps", str(STEPS), *sets]
    with torchrun(log, options, words, *host.before) as found:
        yield found


@pytest.mark.slow
@pytest.mark.fault("T8")
@pytest.mark.parametrize("how", ["the cable is pulled", "the host is lost"])
def test_a_host_is_cut_off_and_comes_back(hosts: list[Host], corpus: Path, tmp_path: Path, how: str) -> None:
    run, (first, second) = tmp_path / "run", hosts
    with ExitStack() as stack:
        a = stack.enter_context(started(first, first, corpus, run, tmp_path / "first"))
        b = stack.enter_context(started(second, first, corpus, run, tmp_path / "second"))
        a.until(lambda: step_of(run) > 0 and len(a.workers) == len(b.workers) == 1)
        if how == "the cable is pulled":
            second.cable("down")
            a.until(lambda: "is unresponsive" in a.said)
            second.cable("up")
        else:
            for pid in (b.process.pid, *b.workers.values()):
                kill(pid)
            b.end()
            a.until(lambda: "is unresponsive" in a.said)
            b = stack.enter_context(started(second, first, corpus, run, tmp_path / "second again"))
        a.until(lambda: sessions(run) >= 2)
        assert a.end() == 0, a.said
        assert b.end() == 0, b.said
    worlds.run(2, trained, corpus, tmp_path / "through")
    assert same(held(run), held(tmp_path / "through"))
