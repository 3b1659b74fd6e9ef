"""What sharing a training over processes takes: memory held, bytes and rows sent, and whether the steps are the same.

    python benchmarks/scale.py                                   blt-tiny and a MEGABYTE, by 1, 2 and 4 processes
    python benchmarks/scale.py --worlds 1,2 --steps 5 --json
    python benchmarks/scale.py --set model.ngram_rows=65536      settings of the BLT

memory    bytes of weights, gradients and moments that the fullest process holds, over those of one process alone
dense     bytes that a process sends in a step for what FSDP2 gathers and reduces, over its theory: each unit gathered
          for the pass and for the way back and its gradient reduced once, (n - 1) / n of it each time; the root, which
          stays gathered, once less
rows      rows of tables that were sent, both ways, over the different rows that the processes looked up
nats      the largest relative difference of a step's loss from that of one process

Counted by PyTorch's dispatcher, as rings send: nothing here depends on the speed of the machine. Seconds of a step are
medians of all steps but the first; processes share the cores, so that they are no ratio to expect of a network.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import socket
import statistics
import time
from pathlib import Path
from typing import Any

FIXED = 5  # bytes of a patch
LIMITS = {"memory": 0.30, "dense": 1.2, "rows": 2.2}


def configured(name: str, sets: list[str], steps: int) -> Any:
    """The configuration of a preset, in float32, eight rows of 512 bytes a step."""
    from bytelm.training.settings import configure

    shape = ["train.batch=8", "train.context_length=512", "train.precision=float32", "train.spikes=keep"]
    return configure(name, None, [*shape, *(sets if name.startswith("blt") else [])], steps=steps)


def trainer(config: Any, dist: Any) -> Any:
    """A training of windows of random bytes."""
    import torch

    from bytelm.checkpoint.assemble import Recipe
    from bytelm.data.sampler import Batch
    from bytelm.patching import fixed
    from bytelm.training.journal import Journal
    from bytelm.training.loop import Trainer
    from bytelm.training.parallelize import parallelize

    recipe = Recipe(config.model, fixed.Config(size=FIXED)) if config.model.patched else Recipe(config.model)
    rows, length = config.train.batch // dist.world, config.train.context_length

    class Windows:
        windows = 1

        def batch(self, step: int) -> Batch:
            ids = torch.randint(97, 105, (rows * dist.world, length + 1), generator=torch.Generator().manual_seed(step))
            ids[:, 0] = 256
            opens = (torch.arange(length + 1) % FIXED == 0).expand(rows, -1)
            own = ids[dist.rank * rows : (dist.rank + 1) * rows]
            return Batch(own.numpy(), opens.numpy() if config.model.patched else None)

        def epoch_of(self, step: int) -> int:
            return 0

    if dist.world == 1:
        model = recipe.build()
    else:
        model = recipe.build_on_meta(recipe.patcher())
        parallelize(model, dist, config.parallel, torch.device("cpu"))
    model.init_weights(0)
    journal = Journal(None, quiet=True, mute=True)
    windows: Any = Windows()
    return Trainer(model, config.train, windows, Path(), journal, dist=dist, parallel=config.parallel)


def held(made: Any) -> int:
    """Bytes of weights, gradients and moments that this process holds of what is trained."""
    import torch

    from bytelm.nn.sharded import rows_here

    found = 0
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            leaf = made.optimizer.held.get(id(parameter), parameter)
            gradient = leaf.grad
            if gradient is not None and gradient.is_sparse:
                found += gradient._indices().nbytes
                gradient = gradient._values()
            moments = (x for x in made.optimizer.moments(parameter).values() if isinstance(x, torch.Tensor))
            found += sum(rows_here(x)[1].nbytes for x in (leaf, gradient, *moments) if x is not None)
    return found


def counter() -> Any:
    """A mode of the dispatcher that counts the bytes of collectives by their names."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.bytes: dict[str, int] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._overloadpacket.__name__ if func.namespace == "c10d" else ""
            if name == "_allgather_base_":
                self.bytes["gathered"] = self.bytes.get("gathered", 0) + args[0].nbytes
            elif name == "_reduce_scatter_base_":
                self.bytes["reduced"] = self.bytes.get("reduced", 0) + args[1].nbytes
            return func(*args, **(kwargs or {}))

    return Counter()


def theory(model: Any, world: int) -> float:
    """Bytes that FSDP has a process send in a step: what is dense is gathered twice and reduced once."""
    units = {id(p): p for unit in model.units() for p in unit.parameters()}
    tables = {id(table.weight) for table in model.lookup_tables()}
    root = [p for p in model.parameters() if p.requires_grad and id(p) not in units and id(p) not in tables]
    sizes = 3 * sum(4 * p.numel() for p in units.values()) + 2 * sum(4 * p.numel() for p in root)
    return sizes * (world - 1) / world


def measured(rank: int, world: int, port: int, name: str, sets: list[str], steps: int, there: Any) -> None:
    """Send what this process found."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    import torch

    from bytelm.training.dist import init_distributed

    torch.set_num_threads(1)
    config = configured(name, sets, steps)
    with init_distributed(5.0) as dist:
        made, nats, most, seconds = trainer(config, dist), list[float](), list[int](), list[float]()
        skip, zero = made.skip_reason, made.optimizer.zero_grad
        made.skip_reason = lambda a, b, c: (nats.append(a), skip(a, b, c))[1]
        made.optimizer.zero_grad = lambda: (most.append(held(made)), zero())[1]
        made.model.train()
        sent = counter()
        for step in range(steps):
            began = time.perf_counter()
            if step == steps - 1:
                with sent:
                    made.step()
            else:
                made.step()
                seconds.append(time.perf_counter() - began)
        exchanged = [table.rows_over.exchanged for table in made.model.lookup_tables() if table.rows_over is not None]
        dense = sum(sent.bytes.values()) * (world - 1) / world
        there.send(
            {
                "nats": nats,
                "held": max(most),
                "dense": dense / max(1.0, theory(made.model, world)),
                "looked_up": sum(each.looked_up for each in exchanged),
                "received": sum(each.received for each in exchanged),
                "seconds": statistics.median(seconds[1:] or seconds),
            }
        )


def shared(world: int, name: str, sets: list[str], steps: int) -> list[dict[str, Any]]:
    """What each of so many processes found."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(world):
        here, there = context.Pipe(duplex=False)
        processes.append(context.Process(target=measured, args=(rank, world, port, name, sets, steps, there)))
        processes[-1].start()
        there.close()
        pipes.append(here)
    found = [here.recv() for here in pipes]
    for process in processes:
        process.join()
    return found


def compared(world: int, found: list[dict[str, Any]], alone: dict[str, Any]) -> dict[str, Any]:
    """The ratios of a world to one process."""
    rows = sum(each["looked_up"] for each in found)
    apart = [abs(a / b - 1) for each in found for a, b in zip(each["nats"], alone["nats"], strict=True)]
    return {
        "world": world,
        "memory": max(each["held"] for each in found) / alone["held"],
        "dense": max(each["dense"] for each in found),
        "rows": sum(each["received"] for each in found) / rows if rows else None,
        "nats": max(apart),
        "seconds": max(each["seconds"] for each in found),
    }


def main() -> None:
    """Measure, and print a table."""
    from bytelm.machine import processor

    options = argparse.ArgumentParser(description="What sharing a training over processes takes.")
    options.add_argument("--worlds", default="1,2,4")
    options.add_argument("--steps", type=int, default=4)
    options.add_argument("--set", action="append", default=["model.ngram_rows=32768"])
    options.add_argument("--json", action="store_true")
    asked = options.parse_args()
    worlds, results = [int(world) for world in asked.worlds.split(",")], []
    for name in ("blt-tiny", "megabyte-tiny"):
        (alone,) = shared(1, name, asked.set, asked.steps)
        for world in worlds:
            found = [alone] if world == 1 else shared(world, name, asked.set, asked.steps)
            results.append({"model": name, **compared(world, found, alone)})
    if asked.json:
        print(json.dumps({"processor": processor(), "limits": LIMITS, "results": results}, indent=1))
        return
    print(f"{processor()}; limits: {', '.join(f'{key} {value}' for key, value in LIMITS.items())}")
    print(f"{'model':16} {'processes':>9} {'memory':>7} {'dense':>6} {'rows':>5} {'nats':>8} {'s a step':>8}")
    for each in results:
        rows = "" if each["rows"] is None else f"{each['rows']:.2f}"
        line = f"{each['model']:16} {each['world']:>9} {each['memory']:>7.3f} {each['dense']:>6.2f} {rows:>5}"
        print(f"{line} {each['nats']:>8.1e} {each['seconds']:>8.3f}")


if __name__ == "__main__":
    main()
