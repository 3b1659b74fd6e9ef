"""Writing with the same weights: a peer's model, and what `bytelm convert` makes of it.

    python benchmarks/converted.py                     BLT of transformers, MEGABYTE of MEGABYTE-pytorch
    python benchmarks/converted.py --prompts 256,2048 --bytes 16 --rounds 5 --json

The peer's weights are random, saved as its users save them, converted, and loaded from the run. Both go on greedily
after the same prompts, in float32, and must write the same bytes, or the program ends with 1. Each takes its turn
within a round, every other round backwards; medians over rounds. transformers' model is asked without a cache, because
with one its logits are wrong, and MEGABYTE-pytorch has none. The threshold of entropy is the median over a prompt, so
that patches are short. BLT has about 10M parameters without tables, MEGABYTE the shape of its project's README.

ms a byte: between two bytes, after the first. first: from the call to the first byte, the prompt's reading included.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers import parameters

from bytelm.exchange.convert import convert
from bytelm.lm import load
from bytelm.units import show_count

Write = Callable[[bytes, int], Iterator[int]]  # prompt, number -> bytes, each as it is there
MEGABYTE_SHAPE = {"dim": (512, 256), "depth": (6, 4), "max_seq_len": (1024, 4), "heads": 8, "dim_head": 64}
LOCAL, LATENT, ENTROPY_MODEL = (192, 3), (384, 6), (128, 4)  # widths and heads
WORDS = b"the of and to a in that it is was I for on you he be with as by at have are this not but had his they".split()


def text(length: int) -> bytes:
    """Words in random order."""
    draw = random.Random(length)
    return b" ".join(draw.choice(WORDS) for _ in range(length))[:length]


def transformers_blt(folder: Path) -> tuple[int, Write]:
    """transformers' BLT with random weights, saved to `folder`: its parameters, and how it writes."""
    import transformers

    def part(width: tuple[int, int], layers: int, **more: Any) -> dict[str, Any]:
        dim, heads = width
        hidden = -(-int(8 * dim / 3) // 64) * 64
        sizes = {"hidden_size": dim, "num_attention_heads": heads, "intermediate_size": hidden}
        return {**sizes, "num_hidden_layers": layers, "hidden_size_global": LATENT[0], **more}

    config = transformers.BltConfig(
        encoder_hash_byte_group_vocab=8192,
        encoder_config=part(LOCAL, 1),
        decoder_config=part(LOCAL, 4),
        global_config=part(LATENT, 4),
        patcher_config=part(ENTROPY_MODEL, 4),
    )
    config.num_hidden_layers = 1  # version 5.23 looks for it and has not got it
    model = transformers.BltForCausalLM(config).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) * (2 * weight.shape[-1] ** -0.5) if weight.ndim > 1 else weight)
        entropies, _, _ = model.model.patcher(
            torch.tensor([[1, *(b + 4 for b in text(256))]]), patch_size=4, threshold=0.0
        )
    config.patching_threshold = float(entropies.median())
    model.save_pretrained(folder)

    def write(prompt: bytes, count: int) -> Iterator[int]:
        # One at a time, as `generate` does it in its loop; a call of its own for each would cost it more.
        ids = torch.tensor([[1, *(byte + 4 for byte in prompt)]])
        for _ in range(count):
            with torch.inference_mode():
                newest = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
            ids = torch.cat([ids, newest[4:].argmax()[None, None] + 4], 1)
            yield int(ids[0, -1]) - 4

    return parameters(model), write


def megabyte_pytorch(folder: Path) -> tuple[int, Write]:
    """MEGABYTE-pytorch's with random weights, saved to `folder`: its parameters, and how it writes."""
    from MEGABYTE_pytorch import MEGABYTE

    torch.manual_seed(0)
    model = MEGABYTE(num_tokens=256, **MEGABYTE_SHAPE, flash_attn=True).eval()
    folder.mkdir()
    torch.save(model.state_dict(), folder / "model.pt")

    def write(prompt: bytes, count: int) -> Iterator[int]:
        ids = torch.tensor([[*prompt]])
        for _ in range(count):
            with torch.inference_mode():
                ids = torch.cat([ids, model(ids)[:, -1].argmax(-1, keepdim=True)], 1)
            yield int(ids[0, -1])

    return parameters(model), write


def converted(system: str, folder: Path, run: Path) -> Write:
    """The same weights with us."""
    if system == "transformers":
        convert(folder, "hf", run, {})
    else:
        convert(folder, "megabyte", run, {"heads": 8, "dim_head": 64, "max_seq_len": [1024, 4]})
    model = load(run)

    def write(prompt: bytes, count: int) -> Iterator[int]:
        for piece in model.stream(prompt, max_bytes=count, temperature=0.0, eos=False):
            yield from piece

    return write


@dataclass
class Cell:
    """One writer after a prompt of one length."""

    system: str
    prompt: int
    write: Write
    first: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    wrote: bytes = b""

    def measure(self, count: int) -> None:
        began = time.perf_counter()
        found = self.write(text(self.prompt), count)
        wrote = [next(found)]
        first = time.perf_counter()
        wrote.extend(found)
        self.first.append(first - began)
        self.step.append((time.perf_counter() - first) / (count - 1))
        self.wrote = bytes(wrote)


def rows_of(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """A row a length of prompt: ours beside the peer's."""
    rows: list[dict[str, Any]] = []
    for theirs, ours in zip(cells[::2], cells[1::2], strict=True):
        row: dict[str, Any] = {"peer": theirs.system, "prompt": ours.prompt, "same_bytes": theirs.wrote == ours.wrote}
        for name, cell in (("theirs", theirs), ("ours", ours)):
            row[f"{name}_ms_a_byte"] = 1e3 * statistics.median(cell.step)
            row[f"{name}_ms_first"] = 1e3 * statistics.median(cell.first)
        row["ratio"] = row["theirs_ms_a_byte"] / row["ours_ms_a_byte"]
        row["ratio_first"] = row["theirs_ms_first"] / row["ours_ms_first"]
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", default="256,1024,2048", help="their lengths in bytes")
    parser.add_argument("--bytes", type=int, default=16, help="to be written after each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    cells, counts = list[Cell](), dict[str, int]()
    for system, make in (("transformers", transformers_blt), ("MEGABYTE-pytorch", megabyte_pytorch)):
        with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts[system], theirs = make(Path(name) / "theirs")
            ours = converted(system, Path(name) / "theirs", Path(name) / "run")
        for prompt in map(int, options.prompts.split(",")):
            cells += [Cell(system, prompt, theirs), Cell("bytelm", prompt, ours)]
        for cell in cells[-2:]:
            list(cell.write(text(64), 4))
    for turn in range(options.rounds):
        for cell in cells if turn % 2 == 0 else reversed(cells):
            cell.measure(options.bytes)
    rows = rows_of(cells)
    if options.json:
        print(json.dumps({"parameters": counts, "bytes": options.bytes, "rows": rows}))
    else:
        sizes = ", ".join(f"{system} {show_count(count)}" for system, count in counts.items())
        print(f"parameters without tables: {sizes}; {options.bytes} bytes after each prompt")
        print(f"{'peer':<18}{'prompt':>7}{'ms a byte':>20}{'ratio':>8}{'first, ms':>20}{'ratio':>8}  same bytes")
        for row in rows:
            step = f"{row['theirs_ms_a_byte']:.1f} / {row['ours_ms_a_byte']:.2f}"
            first = f"{row['theirs_ms_first']:.0f} / {row['ours_ms_first']:.1f}"
            same = "yes" if row["same_bytes"] else "NO"
            print(
                f"{row['peer']:<18}{row['prompt']:>7}{step:>20}{row['ratio']:>8.1f}{first:>20}"
                f"{row['ratio_first']:>8.1f}  {same}"
            )
    return 0 if all(row["same_bytes"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
