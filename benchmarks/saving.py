"""How long a checkpoint keeps several processes from training: saved in the foreground, and in the background.

    python benchmarks/saving.py                                       two processes, 200 MB of weights and moments
    python benchmarks/saving.py --megabytes 1000 --rounds 5 --json
    python benchmarks/saving.py --folder /scratch                     the disk that is written to

plain     `checkpoint.sharded.save`: until the checkpoint is published
blocked   `AsyncSaver.save`: until what is held has been copied, and training may go on
whole     the same until the checkpoint is published, if nothing else is done meanwhile
busy      the same while the processes multiply matrices; slower: how much longer a product takes then

Of each round the time of the slowest process counts; the order changes from round to round, and the first round, in
which memory is allocated, is left out. Medians. The target: blocked is at most 10 % of plain.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGET = 0.10
LAYERS = 24
FOUND = "found.json"


def tensors(mesh: Any, size: int) -> dict[str, dict[str, Any]]:
    """About `size` bytes of float32: weights by rows over a mesh, and two moments of each."""
    import torch
    from torch.distributed.tensor import Shard, distribute_tensor

    rows = max(mesh.size(), size // (3 * LAYERS * 4 * 1024))

    def one() -> Any:
        return distribute_tensor(torch.randn(rows, 1024), mesh, [Shard(0)], src_data_rank=None)

    names = [f"blocks.{layer}.weight" for layer in range(LAYERS)]
    moments = {f"{name}/{moment}": one() for name in names for moment in ("exp_avg", "exp_avg_sq")}
    moments |= {f"{name}/step": torch.tensor(1.0) for name in names}
    return {"model": {name: one() for name in names}, "optimizer": moments}


def measured(rank: int, world: int, port: int, run: Path, size: int, rounds: int) -> None:
    """Write the seconds of each round and kind to `FOUND`."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from bytelm.checkpoint import sharded

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    held, saves = tensors(DeviceMesh("cpu", torch.arange(world)), size), dist.new_group()
    saver, step, a = sharded.AsyncSaver(saves), 0, torch.randn(512, 512)

    def products(until: Any) -> float:
        """Seconds of a product, the mean of as many as there is time for."""
        began, count = time.perf_counter(), 0
        while count < 20 or not until():
            torch.mm(a, a)
            count += 1
        return (time.perf_counter() - began) / count

    def plain() -> dict[str, float]:
        began = time.perf_counter()
        sharded.save(run, step, held, {}, saves)
        return {"plain": time.perf_counter() - began}

    def background() -> dict[str, float]:
        began = time.perf_counter()
        saver.save(run, step, held, {})
        blocked = time.perf_counter() - began
        saver.wait()
        return {"blocked": blocked, "whole": time.perf_counter() - began}

    def busy() -> dict[str, float]:
        alone = products(lambda: True)
        began = time.perf_counter()
        saver.save(run, step, held, {})
        beside = products(saver.done)
        saver.wait()
        return {"busy": time.perf_counter() - began, "slower": beside / alone}

    rows: list[dict[str, float]] = []
    for turn in range(rounds + 1):
        row: dict[str, float] = {}
        for work in (plain, background, busy) if turn % 2 else (busy, background, plain):
            step += 1
            dist.barrier()
            row |= work()
        slowest = torch.tensor(list(dict(sorted(row.items())).values()), dtype=torch.float64)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        rows.append(dict(zip(sorted(row), slowest.tolist(), strict=True)))
    dist.destroy_process_group()
    if rank == 0:
        (run / FOUND).write_text(json.dumps(rows[1:]))


def main(arguments: list[str] | None = None) -> int:
    from torch.multiprocessing.spawn import spawn

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: a temporary folder)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(dir=options.folder) as run:
        given = (options.processes, port, Path(run), int(options.megabytes * 1e6), options.rounds)
        spawn(measured, given, options.processes)
        rows = json.loads((Path(run) / FOUND).read_text())
    return told(rows, options)


def told(rows: list[dict[str, float]], options: argparse.Namespace) -> int:
    """Print the medians; 1 where the target is missed."""
    from bytelm.machine import processor

    medians = {name: statistics.median(row[name] for row in rows) for name in sorted(rows[0])}
    ratio = statistics.median(row["blocked"] / row["plain"] for row in rows)
    said = {"processor": processor(), "processes": options.processes, "megabytes": options.megabytes}
    if options.json:
        print(json.dumps({**said, "rounds": len(rows), "ratio": ratio, "target": TARGET, **medians}))
    else:
        print(f"{said['processor']}; {options.processes} processes, {options.megabytes:g} MB, {len(rows)} rounds")
        for name in ("plain", "blocked", "whole", "busy"):
            print(f"  {name:8} {medians[name]:7.3f} s")
        print(f"  slower   {medians['slower']:7.2f} times")
        print(f"blocked / plain: {ratio:.3f} (at most {TARGET})")
    return int(ratio > TARGET)


if __name__ == "__main__":
    sys.exit(main())
