"""lm-eval through the server and through our own model of it: one figure for each task, to the last digit printed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bytelm.lm import load
from serving import RUN, live

pytestmark = pytest.mark.slow  # lm-eval takes seconds to be imported, in a process of its own

YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
target_delimiter: ''
{more}
"""
CHOICES = "output_type: multiple_choice\ndoc_to_choice: '{{[right] + wrong}}'\ndoc_to_target: '{{label}}'\n"
CHOICES += "metric_list: [{metric: acc}, {metric: acc_norm}]"
ROLLING = "rolling"
TASKS = {
    "chosen": f"doc_to_text: q\n{CHOICES}",
    "chosen_after_nothing": f"doc_to_text: ''\n{CHOICES}",
    "continued": "output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: right\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]",
    "generated": "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: whole\n"
    "metric_list: [{metric: exact_match}]\n"
    "generation_kwargs: {until: ['STOP'], max_gen_toks: 20, do_sample: false}",
    ROLLING: "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
    "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]",
}

PROGRAM = """
import json, sys, warnings
warnings.simplefilter("ignore")
import bytelm
from bytelm import hf
from bytelm.harness import HarnessLM
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

run, folder, plain, cases = json.load(sys.stdin)
manager = TaskManager(include_path=folder, include_defaults=False)
found = []
for names, options in cases:
    for model in (HarnessLM(bytelm.load(run), context=1000), LocalCompletionsAPI(**plain, **options)):
        found.append(simple_evaluate(model=model, tasks=names, task_manager=manager))
print(json.dumps([{"results": one["results"], "samples": one["samples"]} for one in found], default=str))
"""


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of each task, and the answer to each sample."""
    shown = {f"{task} {name}": value for task, values in found["results"].items() for name, value in values.items()}
    for task, samples in found["samples"].items():
        for sample in samples:
            for index, answer in enumerate(sample["filtered_resps"]):
                parts = answer if isinstance(answer, list) else [answer]
                shown |= {f"{task} {sample['doc_id']}.{index}.{part}": value for part, value in enumerate(parts)}
    return shown


def test_the_server_gives_the_figures_of_our_own_model(tmp_path: Path) -> None:
    lm = load(RUN)
    lm.save_pretrained(tmp_path / "saved")
    free = lm.generate(b"One of", max_bytes=20, temperature=0.0).decode(errors="replace")
    assert free[0].isascii()
    stop = next(char for char in free[3:] if char.isascii() and char.isprintable() and char not in "'\\ ")
    whole = free.partition(stop)[0]
    rows: list[dict[str, Any]] = [
        {"q": "One of", "right": free[0], "wrong": [" green box", " é"], "label": 0, "text": "The quick\n brown fox"},
        {"q": "déjà", "right": " vu", "wrong": ["字节", " vu vu vu"], "label": 1, "text": "déjà vu"},
        {"q": "1 <bos> + 1 =", "right": "2", "wrong": ["3", "<eos>"], "label": 0, "text": "<bos> two words " * 20},
    ]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = tasks / "rows.jsonl"
    data.write_text("".join(json.dumps({**row, "whole": whole}) + "\n" for row in rows))
    for name, more in TASKS.items():
        (tasks / f"{name}.yaml").write_text(YAML.format(name=name, file=data, more=more.replace("STOP", stop)))
    # Texts as a whole begin with the BOS that the harness puts there itself, others with the tokenizer's.
    tokenizer = {"tokenizer_backend": "huggingface", "tokenizer": str(tmp_path / "saved")}
    cases = [
        ([name for name in TASKS if name != ROLLING], {**tokenizer, "add_bos_token": True}),
        ([ROLLING], tokenizer),
    ]
    with live() as server:
        plain = {"base_url": f"{server.url}/v1/completions", "model": RUN.name, "max_length": 1000}
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            input=json.dumps([str(RUN), str(tasks), plain, cases]),
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = [figures(one) for one in json.loads(done.stdout.splitlines()[-1])]
    for ours, theirs, least in ((*found[:2], 50), (*found[2:], 9)):
        assert ours.keys() == theirs.keys() and len(ours) > least
        for name, value in ours.items():  # the harness prints four decimals; of large figures float32 has seven digits
            exact = not isinstance(value, float)
            assert theirs[name] == (value if exact else pytest.approx(value, rel=2e-6, abs=5e-5)), name
    assert found[0]["continued acc,none"] > 0
    assert found[0]["generated exact_match,none"] > 0
