"""Answers: chunks of bytes as the JSON that clients read. Text keeps its characters whole, `bytes_b64` is exact."""

from __future__ import annotations

import base64
import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bytelm.generate.request import Chunk, Request, Score
from bytelm.units import BOS, BYTES, EOS, PAD

NAMES = [
    *(chr(byte) if byte < 128 else f"bytes:\\x{byte:02x}" for byte in range(BYTES)),
    "<pad>",
    "<bos>",
    "<eos>",
    "<reserved>",
]
"""How an id is named where JSON wants a string: a byte of a longer character alone is no text."""


def text_decoder() -> codecs.IncrementalDecoder:
    """Decodes bytes as they come: an unfinished character is held back, invalid bytes become U+FFFD."""
    return codecs.getincrementaldecoder("utf-8")("replace")


def base64_of(data: bytes) -> str:
    """Bytes as base64."""
    return base64.b64encode(data).decode()


def text_of(prompt: bytes | tuple[int, ...]) -> bytes:
    """The bytes of a prompt, specials left out."""
    return prompt if isinstance(prompt, bytes) else bytes(symbol for symbol in prompt if symbol < BYTES)


@dataclass
class Logprobs:
    """Log-probabilities in the form of /v1/completions; each list has an entry for each id."""

    offset: int = 0
    """Characters of text before the next id."""
    decoder: codecs.IncrementalDecoder = field(default_factory=text_decoder)

    def of(self, scores: Sequence[tuple[int, Score | None]], best: bool) -> dict[str, Any]:
        """Ids with their scores: None for one that nothing comes before. `best`: whether the best are shown."""
        offsets: list[int] = []
        for symbol, _ in scores:
            offsets.append(self.offset)
            self.offset += len(self.decoder.decode(bytes([symbol]))) if symbol < BYTES else 0
        return {
            "tokens": [NAMES[symbol] for symbol, _ in scores],
            "token_logprobs": [score and score.logprob for _, score in scores],
            "top_logprobs": [score and _named(score) for _, score in scores] if best else None,
            "text_offset": offsets,
            "bytes": [symbol if symbol < BYTES else None for symbol, _ in scores],
        }

    def skip(self, data: bytes) -> None:
        """Count text whose ids are not shown."""
        self.offset += len(self.decoder.decode(data))


def _named(score: Score) -> dict[str, float]:
    """The best ids by name, and the one that came, which may be one more."""
    return {NAMES[symbol]: nats for symbol, nats in (dict(score.top) | {score.id: score.logprob}).items()}


def chat_logprobs(scores: Sequence[Score]) -> dict[str, Any]:
    """Log-probabilities in the form of /v1/chat/completions."""

    def one(symbol: int, nats: float) -> dict[str, Any]:
        return {"token": NAMES[symbol], "logprob": nats, "bytes": [symbol] if symbol < BYTES else None}

    return {
        "content": [one(s.id, s.logprob) | {"top_logprobs": [one(*pair) for pair in s.top]} for s in scores],
        "refusal": None,
    }


class Choice:
    """One sequence of an answer, as its chunks come in."""

    def __init__(self, index: int, request: Request, echo: bool, chat: bool) -> None:
        self.index, self.request, self.echo, self.chat = index, request, echo, chat
        self.decoder = text_decoder()
        self.logprobs = Logprobs()
        self.generated = 0
        """Bytes."""
        self.prompt_scores: list[Score] = []
        self.echoed = not echo
        self.ended: Chunk | None = None
        prompt = text_of(request.prompt)
        if not echo:
            self.logprobs.skip(prompt)

    def piece(self, chunks: Sequence[Chunk]) -> dict[str, Any] | None:
        """What new chunks add, as an entry of `choices`; None for nothing to be shown yet."""
        scores: list[tuple[int, Score | None]] = []
        data = b"".join(chunk.data for chunk in chunks)
        self.generated += len(data)
        self.prompt_scores += [score for chunk in chunks for score in chunk.prompt_scores]
        self.ended = next((chunk for chunk in chunks if chunk.reason), None)
        if not self.echoed:
            if not (data or self.ended):
                return None  # the prompt is shown whole, with its scores
            data = text_of(self.request.prompt) + data
            scores += self.echo_scores()
            self.echoed = True
        scores += [(score.id, score) for chunk in chunks for score in chunk.scores]
        if not (data or scores or self.ended):
            return None
        text = self.decoder.decode(data, final=self.ended is not None)
        reason = self.ended and {"eos": "stop", "error": "error"}.get(str(self.ended.reason), self.ended.reason)
        body = {"index": self.index, **self.texted(text), "finish_reason": reason, "bytes_b64": base64_of(data)}
        return body | {"logprobs": self.shown(scores)}

    def texted(self, text: str) -> dict[str, Any]:
        """The text in its place."""
        return {"delta": {"content": text}} if self.chat else {"text": text}

    def shown(self, scores: list[tuple[int, Score | None]]) -> dict[str, Any] | None:
        """Log-probabilities in the form of the endpoint; None if they were not asked for."""
        if self.request.logprobs is None:
            return None
        if self.chat:
            return chat_logprobs([score for _, score in scores if score])
        return self.logprobs.of(scores, bool(self.request.logprobs))

    def echo_scores(self) -> list[tuple[int, Score | None]]:
        """The prompt's ids with their scores. Nothing comes before the first, but for bytes the BOS."""
        if not self.request.score_prompt:
            return []
        prompt = self.request.prompt
        found: list[tuple[int, Score | None]] = [(score.id, score) for score in self.prompt_scores]
        return found if isinstance(prompt, bytes) else [*((symbol, None) for symbol in prompt[:1]), *found]


def merged(pieces: Sequence[dict[str, Any]], chat: bool) -> dict[str, Any]:
    """The pieces of a choice as one: what is not streamed."""
    last = pieces[-1]
    found = {"index": last["index"], "finish_reason": last["finish_reason"]}
    text = "".join(piece["delta"]["content"] if chat else piece["text"] for piece in pieces)
    data = b"".join(base64.b64decode(piece["bytes_b64"]) for piece in pieces)
    scored = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
    logprobs: dict[str, Any] | None = None
    if scored:
        logprobs = {
            name: [entry for one in scored for entry in one[name]] if scored[0][name] is not None else None
            for name in scored[0]
        }
    content = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    return found | content | {"bytes_b64": base64_of(data), "logprobs": logprobs}


def usage(choices: Sequence[Choice], reused: Sequence[int], prompts: int) -> dict[str, Any]:
    """Lengths in bytes; a prompt counts once, however many answers it has."""
    each = len(choices) // max(1, prompts)
    given = sum(len(choice.request.prompt) for choice in choices[::each])
    written = sum(choice.generated for choice in choices)
    return {
        "prompt_tokens": given,
        "completion_tokens": written,
        "total_tokens": given + written,
        "prompt_tokens_details": {"cached_tokens": sum(reused[::each])},
    }


SPECIALS = {"\ufdd0bos": BOS, "\ufdd0eos": EOS, "\ufdd0pad": PAD}
"""Names of special ids for clients that want a text for each. No text has them: they begin with a noncharacter."""
