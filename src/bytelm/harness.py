"""Byte-level models for the lm-evaluation-harness (EleutherAI): its tasks on our models, with our windows.

    loglikelihood            nats of a continuation after a context, and whether greedy decoding would write it; exact
                             for a token model too, as a model of bytes (`decoding.bytewise`)
    loglikelihood_rolling    nats of a whole document, from its first byte on: what `bytelm eval` measures
    generate_until           what the model writes after a context, up to a stop string

Texts are their UTF-8 bytes. Windows are those of `evaluate.bits`: every byte is scored once, and predicted from at
least half a context where there is that much before it. The harness's own windows lie side by side, so that the first
bytes of each are predicted from nothing. "Tokens" in the harness's settings (max_gen_toks) are bytes.
"""

from __future__ import annotations

import difflib
import logging
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from bytelm.decoding import over_bytes, over_bytes_context
from bytelm.errors import BytelmError, DataError, MissingExtraError, UsageError
from bytelm.evaluate.bits import continuations, measure
from bytelm.generate.prompts import generate
from bytelm.generate.sampling import Sampling
from bytelm.lm import LM

try:
    from lm_eval.api.model import LM as Harnessed
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise MissingExtraError("lm-eval", "eval", "the evaluation harness") from error

R = TypeVar("R")
MOST_BYTES = 256  # default number of bytes to generate for a task
# Settings that bytelm has not got, and the value of each that changes nothing.
NEUTRAL = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1, "length_penalty": 1}
log = logging.getLogger(__name__)


class HarnessLM(Harnessed):
    """A bytelm model in the harness's interface: `lm_eval.simple_evaluate(model=HarnessLM(bytelm.load(run)), ...)`.

    `context` and `stride` are those of `bytelm eval`, for a token model in tokens.
    """

    def __init__(self, lm: LM, context: int | None = None, stride: int | None = None, batch: int = 8) -> None:
        super().__init__()
        self.lm = lm
        self.context = context or lm.context
        self.ignored: set[str] = set()
        self.read = partial(measure, lm.model, context=self.context, stride=stride, batch=batch)
        as_bytes, longest = over_bytes(lm.model), over_bytes_context(lm.model, self.context)
        each = stride and over_bytes_context(lm.model, stride)
        self.continued = partial(continuations, as_bytes, context=longest, stride=each, batch=batch)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of each (context, continuation)."""

        def answer(pairs: Sequence[tuple[Any, Any]]) -> Iterator[tuple[float, bool]]:
            texts = ((encoded(context), encoded(continuation)) for context, continuation in pairs)
            for nats, likeliest in self.continued(texts):
                yield -nats, likeliest

        return self.answered("loglikelihood", requests, answer)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The log-likelihood of each whole text."""

        def answer(texts: Sequence[tuple[Any]]) -> Iterator[float]:
            documents = (("", encoded(text)) for (text,) in texts)
            for document in self.read(documents):
                yield -document.nats

        return self.answered("loglikelihood_rolling", requests, answer)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """What the model writes after each context; greedily unless the task says otherwise."""

        def answer(asked: Sequence[tuple[Any, dict[str, Any]]]) -> Iterator[str]:
            for settings, group in groupby(asked, key=lambda one: one[1]):
                yield from self.written([context for context, _ in group], settings)

        return self.answered("generate_until", requests, answer)

    def written(self, contexts: Sequence[Any], settings: dict[str, Any]) -> Iterator[str]:
        """What is written after each context, side by side. Of a context longer than the model's its end is read."""
        asked = Settings.of(settings)
        for one in asked.ignored - self.ignored:
            log.warning("%s: unsupported generation setting, ignored", one)
        self.ignored |= asked.ignored
        room = max(self.context // 2, self.context - asked.most)  # generation leaves at least half for the context
        prompts = [ending(encoded(context), room) for context in contexts]
        for found in generate(self.lm.model, prompts, max_bytes=asked.most, sampling=asked.sampling, stop=asked.stop):
            yield found.data.decode(errors="replace")

    def answered(self, kind: str, requests: Sequence[Any], answer: Callable[[Sequence[Any]], Iterator[R]]) -> list[R]:
        """Answers in the order of the requests, computed longest first, so that batches have similar lengths."""
        arguments = [tuple(request.args) for request in requests]
        order = sorted(range(len(arguments)), key=lambda i: -sum(len(a) for a in arguments[i] if isinstance(a, str)))
        found: dict[int, R] = {}
        for index, one in zip(order, answer([arguments[i] for i in order]), strict=True):
            found[index] = one
            self.cache_hook.add_partial(kind, arguments[index], one)
        return [found[index] for index in range(len(arguments))]


@dataclass(frozen=True)
class Settings:
    """How a task wants text generated: at most `most` bytes, up to the first of `stop`.

    `ignored` lists unsupported settings, as "name = value".
    """

    most: int
    stop: list[bytes]
    sampling: Sampling
    ignored: frozenset[str]

    @classmethod
    def of(cls, asked: Mapping[str, Any]) -> Settings:
        """A task's generation_kwargs, read as the harness's own models read them. Raises ConfigError.

        A temperature counts only where sampling is on; 0 is greedy. A top_k of 0 (transformers) or -1 (vLLM) is none.
        """
        given = normalize_gen_kwargs({name: value for name, value in asked.items() if value is not None}, MOST_BYTES)
        rest: dict[str, Any] = dict(given)
        most, until = rest.pop("max_gen_toks"), rest.pop("until")
        drawn: dict[str, Any] = {
            name: rest.pop(name) for name in ("temperature", "top_k", "top_p", "min_p") if name in rest
        }
        if drawn.get("top_k") in (0, -1):
            del drawn["top_k"]
        sampled = rest.pop("do_sample") and drawn.setdefault("temperature", 1.0) != 0
        return cls(
            most=most,
            stop=[encoded(text) for text in until if text],
            sampling=Sampling(**drawn) if sampled else Sampling(temperature=0.0),
            ignored=frozenset(f"{name} = {value}" for name, value in rest.items() if NEUTRAL.get(name) != value),
        )


def encoded(text: Any) -> bytes:
    """The bytes of a text as the harness made it. Raises DataError for what is no text, and for a lone surrogate."""
    if isinstance(text, (list, tuple, dict)):
        raise DataError(
            f"a task gives {reprlib.repr(text)} for a text: the harness evaluates the output of a template as "
            'Python if it parses ("[1, 2]"): name the field instead, as in `doc_to_target: text`'
        )
    if not isinstance(text, str):
        raise DataError(
            f"a task gives {reprlib.repr(text)} for a text: datasets reads a JSON column of nothing but numbers or "
            "dates as numbers or times: store it as Parquet, which declares it as text"
        )
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        fault = text[error.start : error.end]
        raise DataError(f"a task's text has {fault!r}, a lone surrogate, which is not valid UTF-8: remove it") from None


def ending(text: bytes, most: int) -> bytes:
    """The last bytes of a text, from the first whole character on."""
    if len(text) <= most:
        return text
    start = len(text) - most
    while start < len(text) and text[start] & 0xC0 == 0x80:  # in the middle of a character
        start += 1
    return text[start:]


def run_tasks(
    lm: LM, names: Sequence[str], include: Path | None, context: int | None = None, stride: int | None = None
) -> dict[str, dict[str, Any]]:
    """Task → metric → value, as the harness gives them.

    `include` is a folder with tasks of one's own, in the harness's YAML. Raises UsageError for a task that the harness
    does not know, and DataError for one whose data or templates it cannot use.
    """
    import datasets.utils.logging as its_log
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    if include is not None and not include.is_dir():
        raise UsageError(f"--include-path {include}: no such folder")
    own = None if include is None else str(include)
    manager = TaskManager(include_path=own, include_defaults=False)
    if any(name not in manager.all_tasks for name in names):
        manager = TaskManager(include_path=own)  # which takes seconds: the harness comes with thousands
    for name in names:
        if name not in manager.all_tasks:
            raise UsageError(missing(name, manager.all_tasks, include))
    model = HarnessLM(lm, context, stride)
    loud = its_log.get_verbosity()
    its_log.set_verbosity(its_log.CRITICAL)  # what it cannot read is reported below, in one line
    try:
        found: Any = simple_evaluate(model=model, tasks=list(names), task_manager=manager, log_samples=False)
    except BytelmError:
        raise
    except Exception as error:  # of the harness, of datasets, of Jinja and whatever else a task may use
        raise DataError(
            f"--tasks {','.join(names)} cannot be run: {reason(error)}: check its YAML and its data"
        ) from error
    finally:
        its_log.set_verbosity(loud)
    return found["results"]


def reason(error: BaseException) -> str:
    """What made another library raise an error: the first cause, in a line."""
    while error.__cause__ is not None:
        error = error.__cause__
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def missing(name: str, known: Sequence[str], include: Path | None) -> str:
    """What to say of a task that is not there: the harness knows thousands, so that all are not shown."""
    if near := difflib.get_close_matches(name, known, n=3):
        return f"no task {name}: did you mean {', '.join(near)}?"
    if include is None:
        return f"no task {name}: name its folder, --include-path"
    return f"no task {name} in --include-path {include}, of which the harness leaves out YAML that it cannot read"
