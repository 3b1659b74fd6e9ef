"""The cost of a training step by sequence length, up to 1.2 million bytes.

    python benchmarks/scaling.py                   MEGABYTE with P ~ T^(1/3) and a byte Transformer, both fitted
    python benchmarks/scaling.py --json
    python benchmarks/scaling.py --preset megabyte-image640-125m-83m --bytes 1228800      one step of a preset

A step is forward, backward and AdamW on one sequence. Each length runs in a separate process, for its peak memory
(resident, weights and libraries included); lengths go up and down in turn, and medians are fitted. The paper claims
(section 3.1) that attention costs O(T^(4/3)) at P = T^(1/3): the exponent fitted to step times should be at most 4/3.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

LENGTHS = (8_192, 24_576, 98_304, 393_216, 1_228_800)
PLAIN_LENGTHS = (2_048, 4_096, 8_192, 16_384)
LIMIT = 4 / 3


def megabyte(length: int) -> dict[str, Any]:
    patch = round(length ** (1 / 3))
    shape = {"sizes": [patch], "dims": [256, 128], "layers": [4, 2], "heads": [4, 2]}
    return {"name": "megabyte", **shape}


def transformer(length: int) -> dict[str, Any]:
    return {"name": "transformer", "dim": 128, "layers": 4, "heads": 2}


def step(model_config: dict[str, Any], length: int, repeats: int) -> dict[str, Any]:
    """Seconds of each step (without the first of several), and the peak memory of this process in GiB."""
    import torch

    from bytelm.checkpoint.assemble import Recipe
    from bytelm.config import build
    from bytelm.interfaces.objective import score
    from bytelm.nn.transformer import Stack
    from bytelm.training.loop import fast_on_cpu
    from bytelm.training.memory import give_back_large_blocks
    from bytelm.units import BOS

    give_back_large_blocks()
    model = build(Recipe, {"model": model_config}, "benchmark").build()
    model.init_weights(0)
    for module in model.modules():
        if isinstance(module, Stack):
            module.recompute = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 256, (1, length + 1), generator=torch.Generator().manual_seed(0))
    ids[0, 0] = BOS
    fast = fast_on_cpu()
    seconds: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            nats, _ = score(model, ids)
        (nats / length).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        assert nats.isfinite()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)  # KiB on Linux
    parameters = sum(p.numel() for p in model.parameters())
    return {"seconds": seconds[1:] or seconds, "peak_gib": peak, "parameters": parameters}


def measured(model: dict[str, Any], length: int) -> dict[str, Any]:
    """`step` in a separate process."""
    repeats = 1 if length > 300_000 else 3
    child = [sys.executable, __file__, "--child", json.dumps([model, length, repeats])]
    return json.loads(subprocess.run(child, check=True, stdout=subprocess.PIPE).stdout)


def table(shape: Any, lengths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """One row per length: bytes, median seconds per step, largest peak."""
    runs: dict[int, list[dict[str, Any]]] = {length: [] for length in lengths}
    for turn in range(rounds):
        for length in lengths if turn % 2 == 0 else lengths[::-1]:
            runs[length].append(measured(shape(length), length))
            print(f"  {length:>9,} bytes: {statistics.median(runs[length][-1]['seconds']):.2f} s", file=sys.stderr)
    return [
        {
            "bytes": length,
            "seconds": statistics.median(s for run in found for s in run["seconds"]),
            "peak_gib": max(run["peak_gib"] for run in found),
        }
        for length, found in runs.items()
    ]


def exponent(rows: list[dict[str, Any]]) -> float:
    """The exponent of seconds over bytes, by least squares of logarithms."""
    xs, ys = [math.log(row["bytes"]) for row in rows], [math.log(row["seconds"]) for row in rows]
    return statistics.linear_regression(xs, ys).slope


def show(name: str, rows: list[dict[str, Any]]) -> None:
    print(f"{name}: seconds ~ bytes^{exponent(rows):.3f}")
    for row in rows:
        speed = row["bytes"] / row["seconds"] / 1000
        print(f"  {row['bytes']:>9,} bytes  {row['seconds']:>8.2f} s  {speed:>6.2f} kB/s  {row['peak_gib']:>5.2f} GiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--preset", help="one step of a preset's model instead")
    parser.add_argument("--bytes", type=int, default=LENGTHS[-1])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(step(*json.loads(options.child))))
        return
    if options.preset:
        from bytelm.config import preset

        found = measured(preset(options.preset)["model"], options.bytes)
        row = {"bytes": options.bytes, "seconds": statistics.median(found["seconds"]), "peak_gib": found["peak_gib"]}
        print(json.dumps({"preset": options.preset, "parameters": found["parameters"], **row}))
        return
    rows = table(megabyte, LENGTHS, options.rounds)
    plain = table(transformer, PLAIN_LENGTHS, options.rounds)
    if options.json:
        found = {"exponent": exponent(rows), "rows": rows, "limit": LIMIT}
        print(json.dumps({**found, "byte_transformer": {"exponent": exponent(plain), "rows": plain}}))
        return
    show(f"MEGABYTE, P = T^(1/3) (at most {LIMIT:.3f} by the paper)", rows)
    show("byte Transformer, full attention", plain)


if __name__ == "__main__":
    main()
