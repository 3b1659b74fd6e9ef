"""Generation by transformers' `generate` on our models beside `LM.generate`: milliseconds a byte, in the same run.

    python benchmarks/transformers_generate.py                   about 10M parameters, after 256 bytes
    python benchmarks/transformers_generate.py --run runs/demo   a trained model beside them
    python benchmarks/transformers_generate.py --models megabyte --prompt 2048 --bytes 200 --rounds 9 --sample --json

Models and prompts are those of `generate.py`: random weights, or a run's; greedy (or, with --sample, drawn at
temperature 0.8, where bytes are others). Systems take turns within a round, every other round backwards, and medians
over rounds are given. Greedy bytes must be the same, or the program ends with 1.

lm            `LM.stream`, all that `LM.generate` does included
hf            `generate` of transformers on `BytelmForCausalLM`, which reads with our decoder
forward       the same, reading with the model's forward pass and its state, as it did before
empty         `generate` of transformers on a model that computes nothing: what its loop costs at the least

ms a byte: between two bytes, after the first. first: from the call to the first byte, the prompt's reading included.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from generate import MODELS, SIZES, random_prompts, recipe
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from bytelm.checkpoint.pretrained import GENERATION
from bytelm.config import to_mapping
from bytelm.hf import BytelmForCausalLM
from bytelm.lm import LM, load
from bytelm.machine import processor
from bytelm.units import BOS, BYTES, VOCAB

TEMPERATURE = 0.8


class Empty(PreTrainedModel, GenerationMixin):
    """The same logits for whatever is read."""

    config_class = PreTrainedConfig

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig(vocab_size=VOCAB, num_hidden_layers=1, hidden_size=1, num_attention_heads=1))
        self.logits = torch.nn.Parameter(torch.randn(1, 1, VOCAB, generator=torch.Generator().manual_seed(0)))
        self.generation_config = GenerationConfig.from_dict(GENERATION)
        self.post_init()

    def forward(self, input_ids: Any, past_key_values: Any = None, logits_to_keep: int = 0, **kwargs: Any) -> Any:
        return CausalLMOutputWithPast(None, self.logits, past_key_values)


@dataclass
class Noted:
    """A streamer that notes when each byte is there, and which."""

    data: bytearray = field(default_factory=bytearray)
    times: list[float] = field(default_factory=list)
    prompted: bool = False

    def put(self, ids: torch.Tensor) -> None:
        if self.prompted:
            self.times.append(time.perf_counter())
            self.data.extend(symbol for symbol in ids.flatten().tolist() if symbol < BYTES)
        self.prompted = True

    def end(self) -> None:
        pass


Write = Callable[[bytes, int], Noted]


def lm_writes(lm: LM, sample: bool) -> Write:
    def write(prompt: bytes, count: int) -> Noted:
        noted = Noted()
        for piece in lm.stream(prompt, max_bytes=count, temperature=TEMPERATURE if sample else 0.0, eos=False):
            noted.times += [time.perf_counter()] * len(piece)
            noted.data += piece
        return noted

    return write


def hf_writes(model: Any, sample: bool) -> Write:
    options: dict[str, Any] = {"eos_token_id": None, "suppress_tokens": list(range(BYTES, VOCAB))}
    if sample:
        options |= {"do_sample": True, "temperature": TEMPERATURE, "top_k": 0}

    def write(prompt: bytes, count: int) -> Noted:
        noted = Noted()
        ids = torch.tensor([[BOS, *prompt]])
        model.generate(ids, max_new_tokens=count, streamer=noted, **options)
        return noted

    return write


@dataclass
class Cell:
    """One system writing with one model."""

    model: str
    system: str
    write: Write
    first: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    data: bytes = b""

    def measure(self, prompt: bytes, count: int) -> None:
        began = time.perf_counter()
        noted = self.write(prompt, count)
        self.first.append(noted.times[0] - began)
        self.step.append((noted.times[-1] - noted.times[0]) / (len(noted.times) - 1))
        self.data = bytes(noted.data)


def cells_of(name: str, lm: LM, sample: bool) -> list[Cell]:
    """The systems that write with a model. A hook, which no kernel would call, leads "forward" to the forward pass."""
    forward = copy.deepcopy(BytelmForCausalLM.from_lm(lm))
    forward.model.register_forward_hook(lambda module, given, out: None)
    systems: dict[str, Write] = {
        "lm": lm_writes(lm, sample),
        "hf": hf_writes(BytelmForCausalLM.from_lm(lm), sample),
        "forward": hf_writes(forward, sample),
        "empty": hf_writes(Empty().eval(), sample),
    }
    return [Cell(name, system, write) for system, write in systems.items()]


def models(names: Sequence[str], run: str | None) -> dict[str, LM]:
    found: dict[str, LM] = {}
    for name in names:
        made = recipe(SIZES["10M"], name)
        model = made.build()
        model.init_weights(0)
        found[name] = LM(model.eval(), 4096, None, to_mapping(made))
    return found | ({Path(run).name: load(run)} if run else {})


def main(arguments: Sequence[str] | None = None, given: dict[str, LM] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--run", help="a trained model besides, written after the beginning of this program")
    parser.add_argument("--prompt", type=int, default=256, help="its length in bytes")
    parser.add_argument("--bytes", type=int, default=160, help="to be written")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    lms = given or models([name for name in options.models.split(",") if name], options.run)
    cells = [cell for name, lm in lms.items() for cell in cells_of(name, lm, options.sample)]
    prompt = random_prompts(1, options.prompt)[0]
    if options.run:
        prompt = (Path(__file__).read_bytes() * 99)[: options.prompt]
    warnings.simplefilter("ignore")
    for cell in cells:
        cell.write(prompt[:16], 4)
    for turn in range(options.rounds):
        for cell in cells if turn % 2 == 0 else reversed(cells):
            cell.measure(prompt, options.bytes)
    rows = [row_of({cell.system: cell for cell in cells if cell.model == name}, name) for name in lms]
    same = options.sample or all(row["same_bytes"] for row in rows)
    if options.json:
        print(json.dumps({"processor": processor(), "threads": torch.get_num_threads(), "rows": rows}))
        return 0 if same else 1
    print(f"{processor()}, {torch.get_num_threads()} threads; {options.bytes} bytes after {options.prompt}")
    names = f"{'lm':>8}{'hf':>8}{'forward':>9}{'empty':>8}{'hf / lm':>9}{'forward / lm':>14}"
    print(f"{'ms a byte':<16}{names}  first, ms: lm / hf")
    for row in rows:
        ms, first = row["ms_a_byte"], row["ms_first"]
        times = f"{ms['lm']:>8.3f}{ms['hf']:>8.3f}{ms['forward']:>9.3f}{ms['empty']:>8.3f}"
        ratios = f"{row['ratio']:>9.2f}{row['ratio_forward']:>14.1f}"
        told = "" if same else f"  same bytes: {row['same_bytes']}"
        print(f"{row['model']:<16}{times}{ratios}  {first['lm']:.0f} / {first['hf']:.0f}{told}")
    return 0 if same else 1


def row_of(cells: dict[str, Cell], name: str) -> dict[str, Any]:
    """Medians of a model's systems; ratios are medians over rounds, whose turns lie next to each other."""
    lm, hf, forward = cells["lm"], cells["hf"], cells["forward"]
    return {
        "model": name,
        "ms_a_byte": {system: 1e3 * statistics.median(cell.step) for system, cell in cells.items()},
        "ms_first": {system: 1e3 * statistics.median(cell.first) for system, cell in cells.items()},
        "ratio": statistics.median(b / a for a, b in zip(lm.step, hf.step, strict=True)),
        "ratio_forward": statistics.median(b / a for a, b in zip(lm.step, forward.step, strict=True)),
        "same_bytes": lm.data == hf.data == forward.data,
    }


if __name__ == "__main__":
    sys.exit(main())
