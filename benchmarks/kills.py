"""Processes of a training are killed again and again, half of the times inside a save, and another number goes on.

    python benchmarks/kills.py                     100 kills of runs by 2 and 4 processes, gone on with by 1, 2, 3 or 4
    python benchmarks/kills.py --kills 20 --seed 1 --json

Each time the run is started with another number of processes, and after some steps either one of them is killed, which
the others have to notice and end, or all are at once, as when a machine is lost. After each kill: the newest published
checkpoint is sound and no older than the newest that was seen; at the end: every step was taken once, its data in the
order of a run that nobody disturbed, and the weights are those of that run within rounding.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH = 12  # rows, for 1, 2, 3 and 4 processes
SETS = [
    *("model.local_dim=32", "model.local_heads=2", "model.global_dim=32", "model.global_heads=2", "model.queries=1"),
    *("model.global_layers=1", "model.decoder_layers=1", "model.cross_heads=2", "model.ngram_rows=211"),
    *("patching.name=space", f"train.batch={BATCH}", "train.context_length=64", "train.precision=float32"),
    *("train.sample_bytes=0", "train.eval_bytes=512", "train.learning_rate=1e-4", "train.spikes=keep"),
    # A rate that hardly depends on how many steps there will be.
    *("train.min_lr_ratio=0.999999", "train.warmup_steps=1"),
    *("train.checkpoint_every_minutes=0.005", "train.eval_every_minutes=100", "train.timeout_minutes=0.5"),
]
PATIENCE = 120.0  # seconds for processes to end


def trained(rank: int, world: int, port: int, notes: Path, run: Path, steps: int) -> None:
    """Train in this process, one of `world`."""
    ranks = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1"})
    import torch

    from bytelm.errors import BytelmError
    from bytelm.training.run import train
    from bytelm.training.settings import configure

    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        train([notes], configure("blt-tiny", sets=SETS, steps=steps), run, quiet=True)
    except BytelmError as error:
        sys.exit(error.exit_code)


def started(world: int, notes: Path, run: Path, steps: int) -> list[Any]:
    """Processes that train."""
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=trained, args=(rank, world, port, notes, run, steps)) for rank in range(world)]
    for process in processes:
        process.start()
    return processes


def saved(run: Path) -> int:
    """The step of the newest checkpoint that was published."""
    from bytelm.checkpoint import store

    with contextlib.suppress(OSError):
        return max((int(path.name[5:13]) for path in store.checkpoints(run)), default=0)
    return 0


def saving(run: Path) -> set[str]:
    """The saves under way, and what is left of those that were killed."""
    return {path.name for path in (run / "checkpoints").glob("*.tmp-*")}


def disturbed(chance: random.Random, world: int, notes: Path, run: Path, steps: int) -> dict[str, Any]:
    """Start, kill, and say what was seen; killed: None if the run ended before."""
    processes = started(world, notes, run, steps)
    before, inside, left = saved(run), chance.random() < 0.5, saving(run)
    deadline = time.monotonic() + PATIENCE
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if (saving(run) - left) if inside else saved(run) > before:
            break
        time.sleep(0.002)
    time.sleep(chance.random() * (0.02 if inside else 0.5))
    seen = saved(run)
    if not all(process.is_alive() for process in processes):
        for process in processes:
            process.join(PATIENCE)
        return {"world": world, "killed": None, "codes": [process.exitcode for process in processes]}
    one = chance.random() < 0.25
    which = [chance.randrange(world)] if one else list(range(world))
    within = bool(saving(run) - left)
    for rank in which:
        os.kill(processes[rank].pid, signal.SIGKILL)
    for process in processes:
        process.join(PATIENCE)
        process.kill()
    codes = [process.exitcode for process in processes]
    return {"world": world, "killed": which, "within": within, "seen": seen, "codes": codes}


def sound(run: Path, seen: int) -> str:
    """What is wrong with the checkpoints of a run; nothing should be."""
    from bytelm.checkpoint import store
    from bytelm.errors import CheckpointError

    try:
        path, passed_over = store.newest_good(run)
    except CheckpointError as error:
        return "" if seen == 0 else str(error)
    if passed_over:
        return passed_over[0]
    return "" if store.read_state(path)["step"] >= seen else f"{path.name} is older than step {seen}, which was seen"


def compared(alone: Path, run: Path) -> dict[str, Any]:
    """A run that was disturbed and one that was not."""
    from bytelm.checkpoint import store
    from bytelm.checkpoint.metrics import METRICS, read_metrics

    a, b = (store.read_tensors(store.newest(path), "model") for path in (alone, run))
    apart = max(float((a[name] - b[name]).abs().max()) for name in a if a[name].is_floating_point())
    bytes = [
        {line["step"]: line["bytes"] for line in read_metrics(path / METRICS) if line["kind"] == "train"}
        for path in (alone, run)
    ]
    common = bytes[0].keys() & bytes[1].keys()
    steps = [line["step"] for line in read_metrics(run / METRICS) if line["kind"] == "train"]
    states = [store.read_state(store.newest(path)) for path in (alone, run)]
    return {
        "apart": apart,
        "same_bytes": all(bytes[0][step] == bytes[1][step] for step in common) and bool(common),
        "in_order": steps == sorted(set(steps)),
        "state": all(states[0][key] == states[1][key] for key in ("step", "bytes", "skipped")),
    }


def main() -> int:
    """Kill, compare, and print."""
    options = argparse.ArgumentParser(description="Processes of a training are killed, and others go on.")
    options.add_argument("--kills", type=int, default=100)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--json", action="store_true")
    asked = options.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch.distributed.fsdp", "bytelm.training.run"])
    chance, kills, faults = random.Random(asked.seed), list[dict[str, Any]](), list[str]()
    with tempfile.TemporaryDirectory() as folder:
        notes, alone, run = (Path(folder) / name for name in ("notes.txt", "alone", "run"))
        notes.write_text("".join(f"line {number} of some notes\n" for number in range(2000)))
        while len(kills) < asked.kills:
            # Half of them are of 2 and of 4; those in between show that any number goes on.
            world = chance.choice([2, 4]) if len(kills) % 2 == 0 else chance.choice([1, 2, 3, 4])
            found = disturbed(chance, world, notes, run, 1_000_000)
            if found["killed"] is None:
                faults.append(f"{found['world']} processes ended by themselves: {found['codes']}")
                break
            kills.append(found)
            others = [code for rank, code in enumerate(found["codes"]) if rank not in found["killed"]]
            if any(code != 6 for code in others):
                faults.append(f"of {found['world']} processes those left ended with {others}, not 6")
            if wrong := sound(run, found["seen"]):
                faults.append(wrong)
            print(f"\r{len(kills)} kills, step {saved(run)}", end="", file=sys.stderr, flush=True)
        last = saved(run) + 3
        for where, world in ((run, 2), (alone, 1)):
            for process in (ended := started(world, notes, where, last)):
                process.join()
            if any(process.exitcode for process in ended):
                faults.append(f"{where.name} ended with {[process.exitcode for process in ended]}")
        result = {
            "kills": len(kills),
            "within a save": sum(each["within"] for each in kills),
            "one process": sum(len(each["killed"]) < each["world"] for each in kills),
            "steps": last,
            "faults": faults,
            **({} if faults else compared(alone, run)),
        }
    print(file=sys.stderr)
    print(
        json.dumps(result, indent=1) if asked.json else "\n".join(f"{key:14} {value}" for key, value in result.items())
    )
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
