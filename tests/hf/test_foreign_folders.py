"""`bytelm eval hf:FOLDER`: what it prints, our own models read as transformers', and folders of something else."""

from __future__ import annotations

import json
import math
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bytelm.cli import run as cli
from bytelm.device import out_of_memory
from bytelm.errors import BytelmError, ResourceError
from bytelm.evaluate.bits import measure
from bytelm.hf import foreign
from bytelm.hf.encoding import TextTokens
from bytelm.hf.foreign import load_foreign
from hf_models import MODELS
from hf_tokenizers import KINDS, TEXT, llama, saved

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, T5Config
    from transformers import T5ForConditionalGeneration as T5

SMALL: dict[str, Any] = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def said(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert cli(["eval", *arguments]) == code
    out, err = capfd.readouterr()
    assert code or not err, err
    return out if not code else err


def test_eval_prints_what_is_lost_and_the_bound(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = saved(tmp_path / "model", KINDS["WordPiece, lower case"](), uniform=True)
    file = tmp_path / "a.txt"
    file.write_bytes(b"The fox.")
    text = said(capfd, name, str(file), "--prove")
    assert "NOT a code of the files: 1 of 1 documents do not come back" in text and "case: 1 characters" in text
    assert "'T' → 't'" in text and "before every window: [CLS]" in text and "8 bytes were coded in" in text
    found = json.loads(said(capfd, name, str(file), "--json"))
    width = found["vocabulary"]
    assert found["bits_per_byte"] == pytest.approx(3 * math.log2(width) / 8, rel=1e-6)  # the, fox and a full stop
    assert found["bits_per_byte_bound"] == pytest.approx((3 * math.log2(width) + found["extra_bits"]) / 8, rel=1e-6)
    assert (found["tokens"], found["bytes"], found["exact"], found["proof"]) == (3, 8, False, None)
    assert (found["context"], found["stride"]) == (63, 31)
    name = saved(tmp_path / "exact", KINDS["byte-level BPE, no BOS"]())
    text = said(capfd, name, str(file), str(file), "--context", "9", "--stride", "2")
    assert "exact: the tokens give back every byte" in text and "context 9, stride 2" in text
    assert "before a document: nothing, and the first token is one of" in text
    name = saved(tmp_path / "unigram", KINDS["unigram, NFKC"]())
    with pytest.MonkeyPatch.context() as patch:  # as if it read one
        patch.setattr(TextTokens, "ids", lambda self, text: [self.tokenizer.eos_token_id])
        assert "1 tokens are special ones that this tokenizer reads in plain text" in said(capfd, name, str(file))


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("--weights applies to runs only", ["--weights", "int8"]),
        ("--tables applies to runs only", ["--tables", "mapped"]),
        ("--windowing applies to runs only", ["--windowing", "sliding"]),
        ("--bytewise applies to runs only", ["--bytewise"]),
        ("--tasks applies to runs only", ["--tasks", "cloze"]),
        ("--include-path applies to runs only", ["--include-path", "x"]),
        ("positions for 64 tokens: take at most that", ["--context", "65"]),
        ("stride = 65: must be from 1 to the context", ["--stride", "65"]),
    ],
)
def test_options_that_do_not_apply(
    message: str, arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = saved(tmp_path / "model", KINDS["bytes"]())
    (tmp_path / "a.txt").write_text("a")
    assert message in said(capfd, name, str(tmp_path / "a.txt"), *arguments, code=2)


def test_files_that_cannot_be_evaluated(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    name = saved(tmp_path / "model", KINDS["unigram, NFKC"]())
    assert "no test split here: name the files" in said(capfd, name, code=2)
    (tmp_path / "empty").write_bytes(b"")
    said(capfd, name, str(tmp_path / "empty"), code=3)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    error = said(capfd, name, str(tmp_path / "latin"), code=3)
    assert "latin: byte 3 is not UTF-8" in error and error.count("\n") == 1
    assert "--prove applies to hf: models only" in said(capfd, str(tmp_path), "--prove", code=2)


@pytest.mark.parametrize("name", ["transformer (full)", "linear (two heads)", "megabyte (three stages)"])
def test_our_own_model_is_measured_as_it_is(name: str, tmp_path: Path) -> None:
    lm = MODELS[name]
    lm.save_pretrained(tmp_path)
    model, context = load_foreign(f"hf:{tmp_path}")
    assert context == 64
    data = [("", TEXT.encode()), ("", bytes(range(256))), ("", b"")]
    for stride in (32, 64):
        ours = list(measure(lm.model, data, context=64, stride=stride))
        theirs = list(measure(model, data, context=64, stride=stride))
        # Theirs gives a probability to what is never written too, as ours does.
        for one, other in zip(ours, theirs, strict=True):
            assert one.bytes == other.bytes and one.nats == pytest.approx(other.nats, rel=1e-5)


def bert(folder: Path) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertForMaskedLM(BertConfig(**SMALL, **shape)).save_pretrained(folder)


def t5(folder: Path) -> None:
    T5(T5Config(**SMALL, d_model=16, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)).save_pretrained(
        folder
    )


def gpt2(folder: Path) -> Any:
    model = GPT2LMHeadModel(GPT2Config(**SMALL, n_embd=16, n_layer=1, n_head=2, n_positions=32))
    model.save_pretrained(folder)
    return model


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def llama_without_tokenizer(folder: Path) -> None:
    llama(300).save_pretrained(folder)
    without_tokenizer(folder)


def gpt2_without_tokenizer(folder: Path) -> None:
    """For which transformers makes an empty one."""
    gpt2(folder)
    without_tokenizer(folder)


def missing_weights(folder: Path) -> None:
    model = llama(400)
    weights = model.state_dict()
    del weights["model.norm.weight"]
    model.save_pretrained(folder, state_dict=weights)


def nan(folder: Path) -> None:
    model = llama(400)
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    model.save_pretrained(folder)


def pickled(folder: Path) -> None:
    torch.save(llama(400).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def edited(file: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        found = json.loads((folder / file).read_text())
        change(found)
        (folder / file).write_text(json.dumps(found))

    return edit


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, "is not a folder: name the one with the weights"),
    "no tokenizer": (llama_without_tokenizer, "has no tokenizer that can be read"),
    "an empty tokenizer": (gpt2_without_tokenizer, "has no tokenizer: add the files"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be read as a causal language model"),
    "a pickle": (pickled, "cannot be read as a causal language model"),
    "missing weights": (missing_weights, "lacks 1 weights of a causal language model, such as model.norm.weight"),
    "not finite": (nan, "gives probabilities that are not finite"),
    "a masked model": (bert, "is not causal: its predictions depend on the tokens that follow, as those of Bert"),
    "an encoder-decoder": (t5, "cannot be read as a causal language model: Unrecognized configuration class"),
    "a smaller model": (lambda folder: llama(100).save_pretrained(folder), "ids up to 320.* and a model of 100"),
    "unknown architecture": (edited("config.json", lambda it: it.update(model_type="no_such")), "cannot be read as"),
    "own code": (
        edited("config.json", lambda it: it.update(model_type="x", auto_map={"AutoConfig": "c.C"})),
        "cannot be read|no tokenizer that can be read",
    ),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "can(not)? be read"),
    "dropout": (edited("tokenizer.json", lambda it: it["model"].update(dropout=0.1)), "tokenizer with dropout 0.1"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_folder_of_something_else(what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    name = saved(folder, KINDS["byte-level BPE"]())
    change, message = BROKEN[what]
    with foreign.quietly():
        change(folder)
    capfd.readouterr()
    with pytest.raises(BytelmError, match=message) as raised:
        load_foreign(name)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_a_name_without_a_network(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    error = said(capfd, "hf:nobody/no-such-model", __file__, code=4)
    assert "nobody/no-such-model has no tokenizer that can be read" in error and error.count("\n") == 1


def test_a_tokenizer_that_truncates_and_pads_does_not(tmp_path: Path) -> None:
    tokenizer = KINDS["byte-level BPE"]()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=512)
    model, _ = load_foreign(saved(tmp_path, tokenizer))
    assert 5 < len(model.tokens.encode(TEXT.encode())) < 512
    assert model.tokens.decode(model.tokens.encode(TEXT.encode()).tolist()) == TEXT.encode()


def test_memory_that_runs_out_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_foreign(saved(tmp_path, KINDS["bytes"]()))

    def full(*arguments: Any, **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(model, "called", full)
    assert out_of_memory(MemoryError())
    with pytest.raises(ResourceError, match=r"1 windows of 64 ids did not fit into .* take a context of 32"):
        list(measure(model, [("", b"abc")], context=64))
    monkeypatch.setattr(foreign, "model_of", full)
    with pytest.raises(ResourceError, match=r"the model of .* did not fit into"):
        load_foreign(f"hf:{tmp_path}")
