"""The evaluation harness asks, our windows answer: every byte once, the figures of `bytelm eval`."""

from __future__ import annotations

import copy
import json
import re
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
from bytelm.decoding import bytewise
from bytelm.errors import ConfigError, DataError
from bytelm.evaluate.bits import measure, nats_of_document
from bytelm.evaluate.meter import Meter
from bytelm.generate.sampling import Sampling
from bytelm.interfaces.model import ByteModel
from bytelm.lm import LM
from bytelm.models.transformer import model as transformer
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

PAGE = Path(__file__).parents[1] / "docs" / "evaluating.md"
TEXTS = ["The quick brown fox jumps over the lazy dog. " * 9, "déjà vu 字节 \x00", "", "x", "A line\nand another\n" * 5]


class OverBytes(UniformModel):
    """Every byte as likely as every other, and nothing else ever."""

    def forward(self, ids: Tensor, state: None = None, boundaries: Tensor | None = None) -> tuple[Tensor, None]:
        logits, _ = super().forward(ids)
        return torch.cat([logits[..., :BYTES], torch.full_like(logits[..., BYTES:], float("-inf"))], -1), None


@pytest.fixture(scope="module")
def lm() -> LM:
    model = transformer.Config(layers=2, dim=16, heads=2, ffn_multiple=16).build()
    model.init_weights(3)
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


SETTINGS: list[tuple[dict[str, Any], int, Sampling]] = [
    ({}, 256, Sampling(0.0)),
    ({"max_gen_toks": 7, "max_new_tokens": 8}, 7, Sampling(0.0)),
    ({"max_new_tokens": 8, "max_tokens": 9}, 8, Sampling(0.0)),
    ({"max_tokens": 9, "temperature": None, "until": None}, 9, Sampling(0.0)),
    ({"max_completion_tokens": 5}, 5, Sampling(0.0)),
    ({"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 0.9}, 256, Sampling(0.0)),
    ({"do_sample": False, "temperature": 0, "top_k": 0, "top_p": 0}, 256, Sampling(0.0)),
    ({"do_sample": True}, 256, Sampling(1.0)),
    ({"do_sample": True, "temperature": 0}, 256, Sampling(0.0)),
    ({"do_sample": True, "temperature": 0.0, "top_p": 0}, 256, Sampling(0.0)),
    ({"do_sample": True, "temperature": 0.2, "top_p": 0.95}, 256, Sampling(0.2, top_p=0.95)),
    ({"temperature": 0.7}, 256, Sampling(0.7)),
    ({"temperature": 0.7, "top_k": 0, "min_p": 0.1}, 256, Sampling(0.7, min_p=0.1)),
    ({"temperature": 1, "top_k": -1, "top_p": 1}, 256, Sampling(1.0, top_p=1)),
    ({"temperature": 1, "top_k": 5, "num_beams": 1, "repetition_penalty": 1.0}, 256, Sampling(1.0, top_k=5)),
]


@pytest.mark.parametrize(("settings", "most", "sampling"), SETTINGS, ids=[str(case[0]) for case in SETTINGS])
def test_settings_are_those_of_the_task(
    lm: LM, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], most: int, sampling: Sampling
) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(harness, "generate", lambda *_, **settings: [seen.append(settings)][:0])
    model = HarnessLM(lm)
    list(model.written(["a"], {"until": ["", "é"], **settings}))
    assert seen == [
        {"max_bytes": most, "sampling": sampling, "stop": ["é".encode()] if "until" not in settings else []}
    ]
    assert not model.ignored


def test_settings_that_cannot_be_kept_are_told_once(lm: LM, caplog: pytest.LogCaptureFixture) -> None:
    settings = {"num_beams": 10, "repetition_penalty": 1.2, "max_gen_toks": 2}
    HarnessLM(lm).generate_until(asked("generate_until", ("a", settings), ("bb", {"max_gen_toks": 1}), ("c", settings)))
    told = [record.getMessage() for record in caplog.records if record.name == harness.__name__]
    assert sorted(line.partition(":")[0] for line in told) == ["num_beams = 10", "repetition_penalty = 1.2"]
    with pytest.raises(ConfigError, match=r"top_p 2 is not in"):
        HarnessLM(lm).generate_until(asked("generate_until", ("a", {"temperature": 1, "top_p": 2})))


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


def test_a_model_of_tokens_is_asked_for_bytes_after_bytes() -> None:
    model = next(model for _, model in tiny_models() if model.tokens is not None).eval()
    asking, pairs = HarnessLM(LM(model, context=64)), [("the ca", "t"), ("the ", "cat "), ("", "on"), ("a" * 90, "bc")]
    found = asking.loglikelihood(asked("loglikelihood", *pairs))
    for (nats, _), (context, continuation) in zip(found, pairs, strict=True):
        exact = nats_of_document(bytewise(model), (context + continuation).encode(), context=128)
        assert nats == pytest.approx(-exact[len(context) :].sum(), rel=1e-6)
    (nats,) = asking.loglikelihood_rolling(asked("loglikelihood_rolling", ("text",)))
    (measured,) = measure(model, [("", b"text")], context=64)  # a whole text in tokens, as `bytelm eval` has it
    assert nats == pytest.approx(-measured.nats, rel=1e-6)


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
        + "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: text\n"
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


YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
{more}
"""


def written(folder: Path, name: str, rows: list[dict[str, Any]], more: str) -> str:
    """A task of one's own in a folder; its name."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / f"{name}.yaml").write_text(YAML.format(name=name, file=folder / f"{name}.jsonl", more=more))
    return name


QUESTIONS = [
    {"q": "The quick", "right": " brown fox", "wrong": [" green box", " é"], "label": 0},
    {"q": "déjà", "right": " vu", "wrong": ["字节", " vu vu vu"], "label": 1},
    {"q": "1 <bos> + 1 =", "right": "2", "wrong": ["3", "<eos>"], "label": 0},
]
CHOICES = "output_type: multiple_choice\ndoc_to_choice: '{{[right] + wrong}}'\ndoc_to_target: '{{label}}'\n"
CHOICES += "target_delimiter: ''\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n"
TASKS = {
    "rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: right\n"
    "metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}, {metric: word_perplexity}]",
    "continued": "output_type: loglikelihood\ndoc_to_text: q\ndoc_to_target: right\ntarget_delimiter: ''\n"
    "metric_list: [{metric: perplexity}, {metric: acc}]",
    "chosen": f"doc_to_text: q\n{CHOICES}",
    "chosen_after_nothing": f"doc_to_text: ''\n{CHOICES}",
    "generated": "output_type: generate_until\ndoc_to_text: q\ndoc_to_target: right\n"
    "metric_list: [{metric: exact_match}]\n"
    "generation_kwargs: {until: ['STOP', 'é'], max_new_tokens: 20, do_sample: false, temperature: 1.0}",
}
"""What tasks consist of, and whether a BOS is there: before a context, before nothing, before a text with its name."""


KINDS = ["letters", "blt (last layer crossed) on entropy (threshold) of a Transformer"]


@pytest.mark.parametrize("name", KINDS)
def test_the_harnesss_own_model_gives_our_figures(lm: LM, name: str, tmp_path: Path) -> None:
    """Of each sample too: what is scored, and what is written up to a stop string."""
    from lm_eval.models.huggingface import HFLM

    from bytelm import hf  # so that transformers knows the folder

    assert hf
    model = lm.model if name == "letters" else dict(tiny_models())[name].eval()
    patcher = model.patcher
    entropy_model = getattr(patcher, "entropy_model", None)
    ours = LM(
        model,
        64,
        None,
        to_mapping(Recipe(model.config, patcher and patcher.config, entropy_model and entropy_model.config)),
    )
    ours.save_pretrained(tmp_path / "saved")
    free = ours.generate(b"The quick", max_bytes=20, temperature=0.0)
    stop = free[4:6].decode(errors="ignore") or "zz"
    names = [written(tmp_path / "tasks", task, QUESTIONS, more.replace("STOP", stop)) for task, more in TASKS.items()]
    own = HFLM(str(tmp_path / "saved"), device="cpu", batch_size=2)
    assert own.max_length == ours.context
    found, theirs = (figures(model, names, tmp_path / "tasks") for model in (HarnessLM(ours), own))
    assert found.keys() == theirs.keys() and len(found) > 40
    for key, value in found.items():
        assert theirs[key] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), key
    if name == "letters":
        assert found["generated", 0, 0, 0] == free[: free.index(stop.encode())].decode()


def figures(model: Any, names: list[str], folder: Path) -> dict[Any, Any]:
    """Every metric of each task, and every answer to each of its requests."""
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: Any = simple_evaluate(model=model, tasks=names, task_manager=manager, bootstrap_iters=0)
    metrics = {(name, key): found["results"][name][key] for name in names for key in found["results"][name]}
    answers = {
        (name, sample["doc_id"], number, part): value
        for name in names
        for sample in found["samples"][name]
        for number, ((answer,),) in enumerate(zip(sample["resps"], strict=True))
        for part, value in enumerate(answer if isinstance(answer, tuple) else (answer,))
    }
    return {key: value for key, value in (metrics | answers).items() if value != "N/A"}


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_what_is_no_text_is_refused_by_name(lm: LM, kind: str) -> None:
    for text, said in (
        ("a\ud800b", r"'\\ud800', a lone surrogate"),
        ([1, 2], r"\[1, 2\] for a text"),
        (7, "7 for a text"),
    ):
        for arguments in [(text, "x"), ("x", text)] if kind == "loglikelihood" else [(text, {"until": []})]:
            with pytest.raises(DataError, match=said):
                getattr(HarnessLM(lm), kind)(asked(kind, arguments[:1] if "rolling" in kind else arguments))


# ---- the page


def paged(folder: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The task of docs/evaluating.md on lines of JSON, and a run to ask, in a folder that we then are in."""
    found = re.search(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert found
    (folder / "my-tasks").mkdir()
    (folder / "my-tasks" / "my_lines.yaml").write_text(found[1])
    (folder / "lines.jsonl").write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.chdir(folder)
    return trained(folder)


LITERAL = [
    "[1, 2, 3]",
    "['a', \"b\"]",
    "[not python]",
    "12",
    "{}",
    "(1, 2)",
    "None",
    "{{text}}",
    "[]",
    "  padded ",
    "déjà",
]


def test_the_task_of_the_page_measures_the_lines_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that are Python, or a template: the figure is that of eval on the same texts."""
    run = paged(tmp_path, [json.dumps({"text": text}) for text in LITERAL], monkeypatch)
    assert cli(["eval", str(run), "--tasks", "my_lines", "--include-path", "my-tasks", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["my_lines"]["bits_per_byte,none"]
    assert cli(["eval", str(run), "lines.jsonl", "--json"]) == 0
    assert found == pytest.approx(json.loads(capsys.readouterr().out)["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize(
    ("change", "lines", "said"),
    [
        ("", ['{"text": "a"}', '{"text": "\\ud800"}'], "surrogate pair in string is invalid. in row 1"),
        ("", ['{"text": '], "JSON parse error"),
        ('doc_to_target: "{{text + 1}}"', ['{"text": "a"}'], "TypeError: can only concatenate"),
        ("", ['{"text": "2024-01-01"}'], ", 1, 1, 0, 0) for a text: datasets reads"),
        ("", ['{"text": 5}'], "gives 5 for a text: datasets reads"),
        ('doc_to_target: "{{text}}"', ['{"text": "[1, 2, 3]"}'], "gives [1, 2, 3] for a text: the harness evaluates"),
        ('doc_to_target: "{{text"', ['{"text": "a"}'], "TemplateSyntaxError"),
        ("output_type: rolling", ['{"text": "a"}'], "rolling"),
    ],
)
def test_what_is_wrong_with_a_task_is_told_in_a_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: str,
    lines: list[str],
    said: str,
) -> None:
    run = paged(tmp_path, lines, monkeypatch)
    task = Path("my-tasks/my_lines.yaml")
    if change:
        task.write_text(re.sub(rf"(?m)^{change.partition(':')[0]}:.*", lambda _: change, task.read_text()))
    assert cli(["eval", str(run), "--tasks", "my_lines", "--include-path", "my-tasks"]) == 3
    told = capsys.readouterr().err.splitlines()
    assert said in told[-1] and told[-1].startswith("bytelm: data: ")
    assert not any("Traceback" in line or "Failed to load" in line for line in told)


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
        pytest.param(
            ["--tasks", "zzzz_qqqq"],
            "of which the harness leaves out YAML that it cannot read",
            marks=pytest.mark.slow,  # the harness reads its thousands of tasks
        ),
        (["--tasks", "bytelm_lines", "FILE"], "leave out FILE"),
        (["--tasks", "bytelm_lines", "--precision", "bfloat16"], "--precision applies to files only"),
        (["--tasks", "bytelm_lines", "--windowing", "basic"], "--windowing applies to files only"),
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
    model = recipe.build()
    model.init_weights(0)
    (tmp_path / "run").mkdir()
    store.save(tmp_path / "run", 0, {"model": model.state_dict()}, {"recipe": to_mapping(recipe), "context": 32})
    return tmp_path / "run"
