"""Models of transformers at their edges: ids beyond the model, no limit of positions, answers that change, own code."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bytelm.errors import CheckpointError, DataError, UsageError
from bytelm.hf import foreign, verdict
from bytelm.hf.encoding import TextTokens
from bytelm.hf.foreign import CONTEXT, Foreign, check_causal, check_vocabulary, load_foreign
from bytelm.hf.losses import Edit
from bytelm.hf.proof import prove
from bytelm.hf.verdict import judge_foreign, loss, survey
from bytelm.units import VOCAB
from hf_tokenizers import KINDS, TEXT, llama, saved

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from transformers import AutoTokenizer
    from transformers.utils import logging


def made(folder: Path, kind: str, **how: Any) -> Foreign:
    return load_foreign(saved(folder, KINDS[kind](), **how))[0]


# --- tokens -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["BPE with unknown tokens", "BPE with byte fallback"])
def test_spaces_before_marks_are_not_cleaned_up(kind: str, tmp_path: Path) -> None:
    """What was there is lost neither by the tokenizer nor by tidying what it decodes to."""
    tokenizer = KINDS[kind]()
    tokenizer.clean_up_tokenization_spaces = True
    tokens = load_foreign(saved(tmp_path, tokenizer))[0].tokens
    data = b"the fox , it is . do not n't it 's"
    assert tokens.decode(tokens.encode(data).tolist()) == data.replace(b"'", b"[UNK]" if "unknown" in kind else b"'")


def test_a_bos_that_the_model_has_no_id_for_is_not_what_comes_before(tmp_path: Path) -> None:
    tokenizer = KINDS["byte-level BPE"]()
    width = max(tokenizer.get_vocab().values()) + 1
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    model, _ = load_foreign(saved(tmp_path, tokenizer, llama(width)))
    assert tokenizer.bos_token_id == width == model.tokens.width
    assert model.start.ids == (tokenizer.eos_token_id,) and not model.start.always
    assert len(model.tokens.sizes) == model.vocabulary and judge_foreign(model, [("", b"a")], 8).verdict.bytes == 1


def test_a_model_is_as_wide_as_its_tokenizer_or_wider(tmp_path: Path) -> None:
    tokenizer = KINDS["byte-level BPE"]()
    last = max(tokenizer.get_vocab().values())
    check_vocabulary(TextTokens(tokenizer, last + 1), "this")
    with pytest.raises(CheckpointError, match=f"this has a tokenizer of ids up to {last} .* a model of {last}:"):
        check_vocabulary(TextTokens(tokenizer, last), "this")
    ids = tokenizer(TEXT)["input_ids"]
    assert TextTokens(tokenizer, max(ids) + 1).encode(TEXT.encode()).max() == VOCAB + max(ids)
    with pytest.raises(DataError, match=f"has id {max(ids)}, and the model has {max(ids)} ids: take its tokenizer"):
        TextTokens(tokenizer, max(ids)).encode(TEXT.encode())


def test_unknown_tokens_are_counted(tmp_path: Path) -> None:
    tokens = made(tmp_path, "BPE with unknown tokens").tokens
    text = "the 中 fox 文 and é 中 jumps"
    ids = AutoTokenizer.from_pretrained(tmp_path)(text, add_special_tokens=False)["input_ids"]
    found = survey(tokens, [("", text.encode()), ("", b"the fox")])
    assert found.unknown_tokens == ids.count(tokens.unknown) == 3 and found.special_tokens == 0


def test_losses_are_counted_by_document_and_the_largest_comes_first(tmp_path: Path) -> None:
    tokens = made(tmp_path, "WordPiece, lower case").tokens
    found = survey(
        tokens, [("a.txt", "The fox é".encode()), ("a.txt", "The Dog é é é é é".encode()), ("b.txt", b"fox")]
    )
    sizes = {one.kind: one.bytes for one in found.losses}
    assert sizes["accents"] > sizes["case"] == 3 and next(iter(sizes)) == "accents"
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True) and found.changed == 2
    assert {one.kind: (one.documents, one.places) for one in found.losses}["case"] == (2, 3)
    shown = loss("case", [("a", 0, Edit(0, "b" * 24, "a" * 25))])
    assert shown.example == f"{'a' * 24 + '…'!a} → {'b' * 24!r}" and shown.characters == 25


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_without_a_limit_of_positions(tmp_path: Path) -> None:
    model = made(tmp_path, "bytes")
    for none in (None, -1, 0, "no limit"):
        model.model = Fixed(SimpleNamespace(max_position_embeddings=none))
        assert model.positions is None and model.longest is None
        assert (model.context(), model.context(5000)) == (CONTEXT, 5000)
    nested = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=7))
    for config, positions in ((nested, 7), (SimpleNamespace(max_position_embeddings=9), 9)):
        model.model = Fixed(config)
        assert model.positions == model.longest == positions


class Fixed(torch.nn.Module):
    """In the place of a model: it has a configuration, and reads nothing."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.weight = config, torch.nn.Parameter(torch.zeros(1))

    def forward(self, **_: Any) -> None:
        raise IndexError("index out of range in self")


def test_positions_that_run_out_without_being_declared_are_one_line(tmp_path: Path) -> None:
    model = made(tmp_path, "bytes")
    model.model = Fixed(model.model.config)
    with pytest.raises(UsageError, match="the model cannot read 3 tokens: take a smaller --context"):
        model.called(torch.zeros(1, 3, dtype=torch.long))


def test_a_model_of_few_ids_is_tried_with_those() -> None:
    assert check_causal(llama(5), "this") == 5


def test_flops_are_two_for_each_parameter(tmp_path: Path) -> None:
    model = made(tmp_path, "bytes")
    assert model.flops(10, 0) == 20 * sum(parameter.numel() for parameter in model.model.parameters())


@pytest.mark.parametrize("shown", [False, True])
def test_progress_bars_and_warnings_are_as_they_were(shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    level = logging.get_verbosity()
    before = logging.is_progress_bar_enabled()
    try:
        (logging.enable_progress_bar if shown else logging.disable_progress_bar)()
        with foreign.quietly():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() is shown and logging.get_verbosity() == level
    finally:
        (logging.enable_progress_bar if before else logging.disable_progress_bar)()


@pytest.mark.parametrize("load", [foreign.model_of, foreign.tokenizer_of])
def test_code_in_a_folder_is_not_run(load: Callable[[str, bool], Any], tmp_path: Path) -> None:
    """A file that says that it was run stands for any."""
    folder, mark = tmp_path / "model", tmp_path / "run"
    saved(folder, KINDS["byte-level BPE"]())
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
        "from transformers import LlamaConfig as C, LlamaForCausalLM as M, PreTrainedTokenizerFast as T\n"
    )
    foreign_json = {"config.json": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    foreign_json["tokenizer_config.json"] = {"AutoTokenizer": ["own.T", "own.T"]}  # type: ignore[dict-item]
    for file, table in foreign_json.items():
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace("{", '{"auto_map": ' + str(table).replace("'", '"') + ",", 1))
    try:
        load(str(folder), True)
    except CheckpointError as error:
        assert "\n" not in str(error)
    assert not mark.exists()


# --- figures ----------------------------------------------------------------------------------------------------------


def test_probabilities_that_are_not_finite_on_documents_are_an_error(tmp_path: Path) -> None:
    """Of a token that loading does not try."""
    model = made(tmp_path, "bytes")
    with torch.no_grad():
        model.model.get_input_embeddings().weight[3 + ord("q")] = torch.nan
    assert judge_foreign(model, [("", b"a fox")], 16).verdict.bits > 0
    with pytest.raises(CheckpointError, match="probabilities that are not finite on these documents"):
        judge_foreign(model, [("", b"a quick fox")], 16)


def test_what_is_asked_for_is_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = made(tmp_path, "bytes", positions=100000), list[Any]()
    plain, done = verdict.judge, list[int]()

    def judge(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments[2:4], options))
        return plain(*arguments, **options)

    monkeypatch.setattr(verdict, "judge", judge)
    monkeypatch.setattr(foreign, "AT_ONCE", 5 * model.vocabulary * 64)
    judge_foreign(model, [("", TEXT.encode())], 64, 16, precision="bfloat16", progress=done.append)
    ((windows, options),) = asked
    assert windows == (64, 16) and options == {"precision": "bfloat16", "batch": 5}
    assert sum(done) == len(TEXT.encode())


@pytest.mark.parametrize("turn", [1, -1, 40])
def test_a_model_that_changes_its_answers_does_not_give_bytes_back(
    turn: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is what is read then taken for a code: counts of any size, and an end that comes too early."""
    model, data = made(tmp_path, "bytes"), TEXT[:40].encode()
    called, steps = model.called, list[int]()

    def otherwise(ids: Any, **cache: Any) -> Any:
        found = called(ids, **cache)
        steps.append(bool(cache))
        if sum(steps) > len(data):  # written, and now read
            found.logits = found.logits.roll(turn, -1)
        return found

    monkeypatch.setattr(model, "called", otherwise)
    with pytest.raises(
        CheckpointError, match="40 bytes did not come back: the model does not give the same answer twice"
    ):
        prove(model, [data], 32, 16)


def test_a_proof_counts_tokens_in_the_windows_that_are_measured(tmp_path: Path) -> None:
    model = made(tmp_path, "BPE with byte fallback")
    for stride in (5, 16):
        report = judge_foreign(model, [("", TEXT[:120].encode()), ("", b"a fox")], 16, stride, proved=True)
        assert report.proof is not None and report.proof.tokens == report.survey.tokens
        assert report.proof.bits == pytest.approx(report.verdict.bits + report.survey.extra_bits, rel=1e-6)
