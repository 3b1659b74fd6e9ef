"""The evaluation harness asks, our windows answer: every byte once, the figures of `bytelm eval`."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bytelm.checkpoint import store
from bytelm.checkpoint.assemble import Recipe
from bytelm.cli import run as cli
from bytelm.config import to_mapping
from bytelm.errors import UsageError
from bytelm.evaluate.bits import measure, nats_of_document
from bytelm.evaluate.meter import Meter
from bytelm.lm import LM
from bytelm.models import transformer
from bytelm.models.base import ByteModel
from bytelm.testing import UniformModel, tiny_models
from bytelm.units import BYTES, LN2, PAD

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from bytelm import harness
    from bytelm.harness import HarnessLM, run_tasks

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 9, "déjà vu 字节 \x00", "", "x", "A line\nand another\n" * 5]


class OverBytes(UniformModel):
    """Every byte as likely as every other, and nothing else ever."""

    def forward(self, ids: Tensor, state: None = None, boundaries: Tensor | None = None) -> tuple[Tensor, None]:
        logits, _ = super().forward(ids)
        return torch.cat([logits[..., :BYTES], torch.full_like(logits[..., BYTES:], float("-inf"))], -1), None


@pytest.fixture(scope="module")
def lm() -> LM:
    model = transformer.Config(layers=2, dim=16, heads=2, ffn_multiple=16).build()
    model.initialise(3)
    with torch.no_grad():  # the likeliest byte is a small letter
        model.head.weight[: ord("a")] = model.head.weight[ord("z") + 1 :] = 0.0
    return LM(model.eval(), context=64)


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, index) for index, one in enumerate(arguments)]


@pytest.mark.fault("M4")
def test_a_uniform_model_scores_8_bits_per_byte() -> None:
    model = HarnessLM(LM(OverBytes(), context=16))
    found = model.loglikelihood_rolling(asked("loglikelihood_rolling", *((text,) for text in TEXTS)))
    for text, nats in zip(TEXTS, found, strict=True):
        assert -nats / LN2 == pytest.approx(8.0 * len(text.encode()), rel=1e-6)


MODELS = [(name, model.eval()) for name, model in tiny_models() if model.tokens is None][::5]


@pytest.mark.fault("M4")
@pytest.mark.parametrize(("name", "model"), MODELS)
def test_rolling_is_what_eval_measures(name: str, model: ByteModel) -> None:
    found = HarnessLM(LM(model, context=32)).loglikelihood_rolling(asked("loglikelihood_rolling", *zip(TEXTS)))
    wanted = [d.nats for d in measure(model, [("", text.encode()) for text in TEXTS], context=32)]
    assert [-nats for nats in found] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.fault("M4")
@pytest.mark.parametrize(("name", "model"), MODELS)
def test_a_continuation_costs_what_its_bytes_cost(name: str, model: ByteModel) -> None:
    lm = LM(model, context=1000)
    pairs = [("The quick", " brown fox"), ("", "from nothing"), ("é", "à\x00字"), ("nothing more", "")]
    found = HarnessLM(lm, batch=3).loglikelihood(asked("loglikelihood", *pairs))
    for (context, continuation), (nats, _) in zip(pairs, found, strict=True):
        wanted = lm.logprobs(context.encode(), continuation.encode()).sum()
        assert nats == pytest.approx(float(wanted), rel=1e-4, abs=1e-6)


def test_long_contexts_are_read_in_windows(lm: LM) -> None:
    """As one document: what the whole costs less what the beginning costs in the same windows."""
    context, continuation = TEXTS[0], " and a great deal more of it, over several windows" * 3
    ((nats, _),) = HarnessLM(lm).loglikelihood(asked("loglikelihood", (context, continuation)))
    terms = nats_of_document(lm.model, (context + continuation).encode(), context=64)
    assert -nats == pytest.approx(terms[len(context.encode()) :].sum(), rel=1e-5)


def test_greedy_is_what_the_model_would_write(lm: LM) -> None:
    prompt = "The quick"
    written = lm.generate(prompt.encode(), max_bytes=40, temperature=0.0).decode("latin-1")
    assert written.isascii()
    plain = written[:6]
    wrong = plain[:-1] + chr(ord(plain[-1]) ^ 1)
    answers = HarnessLM(lm).loglikelihood(asked("loglikelihood", (prompt, plain), (prompt, wrong), (prompt, plain[:1])))
    assert [greedy for _, greedy in answers] == [True, False, True]
    head = copy.deepcopy(lm.model.head)
    with torch.no_grad():  # a PAD would be likelier still, but is never written
        head.weight[PAD] = 2 * head.weight[ord(plain[0])]
    other = copy.copy(lm.model)
    other._modules = {**lm.model._modules, "head": head}
    ((_, greedy),) = HarnessLM(LM(other, 64)).loglikelihood(asked("loglikelihood", (prompt, plain[:1])))
    assert greedy


def test_generation_stops_where_it_is_told(lm: LM) -> None:
    free = lm.generate(b"The quick", max_bytes=12, temperature=0.0)
    settings: list[dict[str, Any]] = [
        {"until": [], "max_gen_toks": 12},
        {"until": [free[4:6].decode()], "max_gen_toks": 12},
        {"until": free[5:3:-1].decode(), "max_gen_toks": 5, "do_sample": False},
    ]
    found = HarnessLM(lm).generate_until(asked("generate_until", *(("The quick", one) for one in settings)))
    assert found == [free.decode(), free[: free.index(free[4:6])].decode(), free[:5].decode()]


def test_of_a_long_context_the_end_is_read(lm: LM) -> None:
    (found,) = HarnessLM(lm).generate_until(asked("generate_until", (TEXTS[0], {"max_gen_toks": 10})))
    end = TEXTS[0].encode()[-54:]
    assert found.encode() == lm.generate(end, max_bytes=10, temperature=0.0).decode(errors="replace").encode()


@pytest.mark.parametrize(("most", "read"), [(10, 54), (32, 32), (256, 32), (None, 32), (0, 64)])
def test_what_is_to_be_written_leaves_half_a_context_to_read(
    lm: LM, monkeypatch: pytest.MonkeyPatch, most: int | None, read: int
) -> None:
    seen: list[tuple[list[bytes], int]] = []

    def record(model: ByteModel, prompts: list[bytes], max_bytes: int, **_: Any) -> list[Any]:
        seen.append((prompts, max_bytes))
        return []

    monkeypatch.setattr(harness, "generate", record)
    list(HarnessLM(lm).written([TEXTS[0], "é" * 100, "short"], {"max_gen_toks": most}))
    ((prompts, count),) = seen
    assert prompts == [TEXTS[0].encode()[-read:], ("é" * (read // 2)).encode(), b"short"]
    assert count == (256 if most is None else most)
    assert harness.ending("aéé".encode(), 3) == "é".encode()


def test_requests_of_several_settings_keep_their_order(lm: LM) -> None:
    asked_for = [(text, {"max_gen_toks": most}) for most in (3, 5) for text in ("x", "The quick brown", "yy", "zzz")]
    mixed = [asked_for[i] for i in (0, 4, 1, 5, 6, 2, 7, 3)]
    found = HarnessLM(lm).generate_until(asked("generate_until", *mixed))
    for (text, settings), written in zip(mixed, found, strict=True):
        assert written.encode() == lm.generate(text.encode(), max_bytes=settings["max_gen_toks"], temperature=0.0)


def test_a_model_of_tokens_is_measured_whole() -> None:
    model = next(model for _, model in tiny_models() if model.tokens is not None)
    with pytest.raises(UsageError, match="reads tokens"):
        HarnessLM(LM(model.eval(), context=64)).loglikelihood(asked("loglikelihood", ("a", "b")))
    (nats,) = HarnessLM(LM(model.eval(), context=64)).loglikelihood_rolling(asked("loglikelihood_rolling", ("text",)))
    assert nats < 0


# ---- tasks


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with two tasks: perplexity of lines, and a choice between two words."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    lines = [{"text": text} for text in TEXTS if text]
    choices = [{"context": "The quick brown", "choices": [" fox", " cat"], "label": n % 2} for n in range(4)]
    for name, rows in (("lines", lines), ("choices", choices)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {file}\n"
    (folder / "lines.yaml").write_text(
        "task: bytelm_lines\n"
        + common.format(file=folder / "lines.jsonl")
        + "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
        + "metric_list:\n  - metric: bits_per_byte\n"
    )
    (folder / "choices.yaml").write_text(
        "task: bytelm_choices\n"
        + common.format(file=folder / "choices.jsonl")
        + "output_type: multiple_choice\ndoc_to_text: '{{context}}'\ndoc_to_choice: '{{choices}}'\n"
        + "doc_to_target: '{{label}}'\ntarget_delimiter: ''\nmetric_list:\n  - metric: acc\n"
    )
    return folder


@pytest.mark.fault("M4")
def test_the_harness_and_eval_give_one_figure(lm: LM, tasks: Path) -> None:
    found = run_tasks(lm, ["bytelm_lines", "bytelm_choices"], tasks)
    documents = [("", text.encode()) for text in TEXTS if text]
    meter = Meter.of(measure(lm.model, documents, context=lm.context))
    assert found["bytelm_lines"]["bits_per_byte,none"] == pytest.approx(meter.nats / LN2 / meter.bytes, rel=1e-6)
    assert found["bytelm_choices"]["acc,none"] == 0.5  # one of the two is likelier each time, and right half the time


def test_the_harness_can_be_asked_from_its_own_side(lm: LM, tasks: Path) -> None:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(model=HarnessLM(lm), tasks=["bytelm_choices"], task_manager=manager, log_samples=False)
    assert found["results"]["bytelm_choices"]["acc,none"] == 0.5


def test_the_command(tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path)
    asked_for = ["eval", str(run), "--tasks", "bytelm_lines", "--include-path", str(tasks)]
    assert cli([*asked_for, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert 0 < shown["bytelm_lines"]["bits_per_byte,none"] < 16
    assert cli(asked_for) == 0
    assert "bits_per_byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "bytelm_linse"], "no task bytelm_linse: did you mean bytelm_lines"),
        (["--tasks", "zzzz_qqqq"], "--include-path"),
        (["--tasks", "bytelm_lines", "FILE"], "leave out FILE"),
        (["--tasks", "bytelm_lines", "--weights", "int8"], "--weights is for measuring files"),
        (["--tasks", "bytelm_lines", "--inference", "basic"], "--inference is for measuring files"),
    ],
)
def test_what_cannot_be_asked(
    tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert cli(["eval", str(trained(tmp_path)), *words, "--include-path", str(tasks)]) == 2
    assert said in capsys.readouterr().err
    assert cli(["eval", str(tmp_path / "run"), "--include-path", str(tasks)]) == 2
    assert "--include-path is for --tasks" in capsys.readouterr().err
    assert cli(["eval", str(tmp_path / "run"), "--tasks", "a", "--include-path", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err


def trained(tmp_path: Path) -> Path:
    """A run of a model that has learnt nothing."""
    recipe = Recipe(transformer.Config(layers=1, dim=16, heads=2, ffn_multiple=16))
    model = recipe.assemble()
    model.initialise(0)
    (tmp_path / "run").mkdir()
    store.save(tmp_path / "run", 0, {"model": model.state_dict()}, {"recipe": to_mapping(recipe), "context": 32})
    return tmp_path / "run"
