"""Models of bytes for the lm-evaluation-harness (EleutherAI): its tasks asked of ours, with our windows.

    loglikelihood            nats of a continuation after a context, and whether greedy decoding would write it
    loglikelihood_rolling    nats of a whole document, from its first byte on: what `bytelm eval` measures
    generate_until           what the model writes after a context, up to a stop string

Texts are their UTF-8 bytes. Windows are those of `evaluate.bits`: every byte is scored once, and predicted from at
least half a context where there is that much before it. The harness's own windows lie side by side, so that the first
bytes of each are predicted from nothing. "Tokens" in the harness's settings (max_gen_toks) are bytes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from bytelm.errors import MissingExtraError, UsageError
from bytelm.evaluate.bits import continuations, measure
from bytelm.generate.sampling import Sampling
from bytelm.generate.session import generate
from bytelm.lm import LM

try:
    from lm_eval.api.model import LM as Harnessed
except ImportError as error:
    raise MissingExtraError("lm-eval", "eval", "the evaluation harness") from error

R = TypeVar("R")
MOST_BYTES = 256  # that a task asks to be written, where it does not say


class HarnessLM(Harnessed):
    """A bytelm model as the harness holds it: `lm_eval.simple_evaluate(model=HarnessLM(bytelm.load(run)), ...)`.

    `context` and `stride` are those of `bytelm eval`.
    """

    def __init__(self, lm: LM, context: int | None = None, stride: int | None = None, batch: int = 8) -> None:
        super().__init__()
        self.lm = lm
        self.context = context or lm.context
        self.read = partial(measure, lm.model, context=self.context, stride=stride, batch=batch)
        self.continued = partial(continuations, lm.model, context=self.context, stride=stride, batch=batch)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of each (context, continuation). Raises UsageError for a model of tokens."""

        def answer(pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[float, bool]]:
            texts = ((context.encode(), continuation.encode()) for context, continuation in pairs)
            for nats, likeliest in self.continued(texts):
                yield -nats, likeliest

        return self.answered("loglikelihood", requests, answer)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """The log-likelihood of each whole text."""

        def answer(texts: Sequence[tuple[str]]) -> Iterator[float]:
            documents = (("", text.encode()) for (text,) in texts)
            for document in self.read(documents):
                yield -document.nats

        return self.answered("loglikelihood_rolling", requests, answer)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """What the model writes after each context; greedily unless the task says otherwise."""

        def answer(asked: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[str]:
            for settings, group in groupby(asked, key=lambda one: one[1]):
                yield from self.written([context for context, _ in group], settings)

        return self.answered("generate_until", requests, answer)

    def written(self, contexts: Sequence[str], settings: dict[str, Any]) -> Iterator[str]:
        """What is written after each context, side by side. Of a context longer than the model's its end is read."""
        until = settings.get("until") or []
        stop = [text.encode() for text in ([until] if isinstance(until, str) else until) if text]
        most = MOST_BYTES if settings.get("max_gen_toks") is None else int(settings["max_gen_toks"])
        sampled = bool(settings.get("do_sample")) or float(settings.get("temperature") or 0.0) > 0
        sampling = Sampling(
            temperature=float(settings.get("temperature") or 1.0) if sampled else 0.0,
            top_k=settings.get("top_k") if sampled else None,
            top_p=settings.get("top_p") if sampled else None,
        )
        room = max(self.context // 2, self.context - most)  # what is to be written leaves half to read at the least
        prompts = [ending(context.encode(), room) for context in contexts]
        for found in generate(self.lm.model, prompts, max_bytes=most, sampling=sampling, stop=stop):
            yield found.data.decode(errors="replace")

    def answered(self, kind: str, requests: Sequence[Any], answer: Callable[[Sequence[Any]], Iterator[R]]) -> list[R]:
        """Answers in the order of the requests, of which long ones are asked first: what lies side by side is alike."""
        arguments = [tuple(request.args) for request in requests]
        order = sorted(range(len(arguments)), key=lambda i: -sum(len(a) for a in arguments[i] if isinstance(a, str)))
        found: dict[int, R] = {}
        for index, one in zip(order, answer([arguments[i] for i in order]), strict=True):
            found[index] = one
            self.cache_hook.add_partial(kind, arguments[index], one)
        return [found[index] for index in range(len(arguments))]


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
    """Task → metric → value, as the harness gives them. Raises UsageError for a task that it does not know.

    `include` is a folder with tasks of one's own, in the harness's YAML.
    """
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
            raise UsageError(missing(name, manager.all_tasks))
    model = HarnessLM(lm, context, stride)
    found: Any = simple_evaluate(model=model, tasks=list(names), task_manager=manager, log_samples=False)
    return found["results"]


def missing(name: str, known: Sequence[str]) -> str:
    """What to say of a task that is not there: the harness knows thousands, so that all are not shown."""
    near = difflib.get_close_matches(name, known, n=3)
    return f"no task {name}" + (f": did you mean {', '.join(near)}?" if near else ": name its folder, --include-path")
