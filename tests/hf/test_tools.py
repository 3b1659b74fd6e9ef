"""transformers' and peft's tools on bytelm's models, the page that shows them, and folders without transformers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import bytelm
from bytelm import configure
from bytelm.interfaces.objective import score
from bytelm.training.run import train

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments, pipeline

    import bytelm.hf

from bytelm.hf import BytelmForCausalLM, ByteTokenizer
from hf_models import BLT, MODELS, TEXTS, TOKENIZER, batch, copied, same, saved, wrapped

# peft asks transformers by a name that it has given another.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PAGE = Path(__file__).parents[2] / "docs" / "huggingface.md"


# --- their tools ------------------------------------------------------------------------------------------------------


DATA = b"def main():\n    return 0\n\n" * 12


def learn(model: Any, folder: Path, **options: Any) -> list[float]:
    """Losses of a Trainer on a few hundred bytes."""
    rows = [{"input_ids": TOKENIZER.from_bytes(DATA[start : start + 40])} for start in range(0, len(DATA), 40)]
    arguments = TrainingArguments(
        str(folder), max_steps=16, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, **options,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, train_dataset=rows, data_collator=DataCollatorForLanguageModeling(TOKENIZER, mlm=False)
    )
    trainer.train()
    with torch.no_grad():
        nats, count = score(unwrapped(model).model, trainer.data_collator(rows[:3])["input_ids"])
    assert trainer.evaluate(rows[:3])["eval_loss"] == pytest.approx(float(nats / count))
    trainer.save_model(str(folder / "saved"))
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def unwrapped(model: Any) -> BytelmForCausalLM:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def falls(losses: list[float], to: float) -> bool:
    return sum(losses[-3:]) < to * sum(losses[:3])


@pytest.mark.parametrize("name", [BLT[0], "megabyte (two stages)"])
def test_a_pipeline_writes_what_lm_writes(name: str, tmp_path: Path) -> None:
    write = pipeline("text-generation", saved(name, tmp_path), device="cpu")
    found = write([TEXTS[0], TEXTS[2]], max_new_tokens=15, do_sample=False, batch_size=2)
    ours = MODELS[name].generate([text.encode() for text in (TEXTS[0], TEXTS[2])], max_bytes=15, temperature=0)
    prompts = (TEXTS[0], TEXTS[2])
    assert [row[0]["generated_text"] for row in found] == [
        text + data.decode(errors="replace") for text, data in zip(prompts, ours, strict=True)
    ]


@pytest.mark.parametrize("name", [BLT[0], BLT[2], "megabyte (two stages)"])
def test_trainer_fine_tunes(name: str, tmp_path: Path) -> None:
    hf = copied(name, tmp_path / "one")
    before = MODELS[name].bits(DATA)[0]
    assert falls(learn(hf, tmp_path / "run", **{"activation_checkpointing": True} if name == BLT[2] else {}), to=0.75)
    after = bytelm.load(tmp_path / "run" / "saved")
    assert after.bits(DATA)[0] < 0.75 * before
    ours, theirs = MODELS[name].model.patcher, after.model.patcher
    assert ours is None or (theirs is not None and same(ours.state_dict(), theirs.state_dict()))


def test_plain_torch_fine_tunes(tmp_path: Path) -> None:
    hf = copied(BLT[0], tmp_path).train()
    before = {name: tensor.clone() for name, tensor in hf.model.patcher.state_dict().items()}
    optimizer = torch.optim.AdamW(hf.parameters(), 1e-2)
    ids = torch.tensor([TOKENIZER.from_bytes(DATA[:60])])
    losses: list[float] = []
    for _ in range(12):
        loss = hf(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert falls(losses, to=0.75) and same(before, hf.model.patcher.state_dict())


@pytest.mark.parametrize("name", [BLT[0], "megabyte (two stages)"])
def test_peft_adapts(name: str, tmp_path: Path) -> None:
    base = copied(name, tmp_path / "base")
    kept = r".*\.patcher\..*" if name in BLT else None
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", exclude_modules=kept)
    adapted = get_peft_model(base, lora)
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained and all("lora_" in name and ".patcher." not in name for name in trained)
    assert falls(learn(adapted, tmp_path / "run"), to=0.95)
    adapted.save_pretrained(tmp_path / "lora")
    assert not (tmp_path / "lora" / "model.safetensors").exists()
    back = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    with torch.no_grad():
        wanted = adapted.eval()(**batch()).logits
        torch.testing.assert_close(back(**batch()).logits, wanted)
        assert not torch.allclose(wanted, wrapped(name)(**batch()).logits)
    ids = back.generate(**batch(), max_new_tokens=10)
    merged = back.merge_and_unload()
    ours = merged.lm().generate([text.encode() for text in TEXTS], max_bytes=10, temperature=0)
    assert [TOKENIZER.to_bytes(row[batch()["input_ids"].shape[1] :]) for row in ids] == ours
    merged.save_pretrained(tmp_path / "merged")
    assert same(bytelm.load(tmp_path / "merged").model.state_dict(), merged.model.state_dict())


# --- a run, and the page ----------------------------------------------------------------------------------------------


NANO = [
    "model.local_dim=16",
    "model.local_heads=2",
    "model.cross_heads=2",
    "model.attention_window=16",
    "model.global_dim=32",
]
NANO += ["model.global_heads=2", "model.global_layers=1", "model.ngram_rows=101", "model.ffn_multiple=16"]
NANO += [
    "entropy_model.rows=512",
    "train.context_length=64",
    "train.batch=2",
    "train.sample_bytes=0",
    "train.precision=float32",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and with notes."""
    home = tmp_path_factory.mktemp("home")
    (home / "notes.txt").write_text("".join(f"# Monday {number}\nbytes, or {number**3}?\n" for number in range(40)))
    (home / "notes").mkdir()
    for number in range(30):
        (home / "notes" / f"{number}.txt").write_bytes(DATA + bytes(str(number**9), "ascii"))
    train([home / "notes"], configure("blt-tiny", sets=NANO, steps=3), home / "runs" / "demo", quiet=True)
    return home


def test_a_card_has_what_the_run_measured(home: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (home / "runs/demo/metrics.jsonl").read_text().splitlines()]
    bits = [line["bits_per_byte"] for line in lines if line["kind"] == "validation"][-1]
    lm = bytelm.load(home / "runs/demo")
    assert lm.bits_per_byte == bits
    lm.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"| Held-out bits per byte | {bits:.3f} |" in card and "entropy, cut by ngram entropies" in card
    back = bytelm.load(tmp_path)
    assert back.bits_per_byte is None and back.bits(DATA) == lm.bits(DATA)
    # Whoever fine-tunes in the folder measures anew; a card that someone wrote stays.
    hf = AutoModelForCausalLM.from_pretrained(tmp_path)
    hf.save_pretrained(tmp_path)
    assert "Held-out" not in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(card + "mine")
    hf.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == card + "mine"
    # What is saved into a run is not the run.
    lm.save_pretrained(home / "runs/demo")
    (home / "runs/demo/model.safetensors").unlink()
    assert bytelm.load(home / "runs/demo").bits_per_byte == bits


def test_the_code_of_the_page_runs(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 10 and PAGE.read_text().count("```") == 2 * len(blocks)
    pushed: list[tuple[str, str]] = []
    for part in (BytelmForCausalLM, ByteTokenizer):
        monkeypatch.setattr(part, "push_to_hub", lambda self, repo: pushed.append((type(self).__name__, repo)))
    monkeypatch.chdir(home)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*pin_memory.*", UserWarning)  # Trainer asks for it where there is no GPU
        for block in blocks:
            exec(block, names)
    assert pushed == [("BytelmForCausalLM", "me/notes"), ("ByteTokenizer", "me/notes")]


# --- without transformers ---------------------------------------------------------------------------------------------


def ran(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_a_missing_extra_is_named(package: str) -> None:
    code = f"""
import sys
sys.modules[{package!r}] = None
from bytelm.errors import MissingExtraError
try:
    import bytelm.hf
except MissingExtraError as error:
    print(error)
"""
    assert f"bytelm.hf needs {package}, which is not installed: pip install 'bytelm[hf]'" in ran(code)


def test_folders_need_no_transformers(tmp_path: Path) -> None:
    saved(BLT[0], tmp_path / "one")
    code = f"""
import sys
sys.modules["transformers"] = sys.modules["huggingface_hub"] = None
import bytelm
lm = bytelm.load({str(tmp_path / "one")!r})
lm.save_pretrained({str(tmp_path / "two")!r})
print(bytelm.load({str(tmp_path / "two")!r}).bits(b"abc"))
"""
    assert ran(code) == f"{MODELS[BLT[0]].bits(b'abc')}\n"
