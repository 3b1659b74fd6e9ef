"""Models of transformers that write bytes, and what they write."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor

from bytelm.decoding import why_plain
from bytelm.testing import tiny_models
from hf_models import TEXTS, TOKENIZER, lm_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from bytelm.hf import BytelmForCausalLM

# Of its own: tests of hf_models' round theirs, and train them.
MODELS = {name: lm_of(model) for name, model in tiny_models() if model.tokens is None}
PROMPTS = [text.encode() for text in TEXTS]
FAST = [name for name, lm in MODELS.items() if not why_plain(lm.model)]
PLAIN = "linear (two heads)"
BLT = next((name for name in FAST if "entropy" in name), PLAIN)
KINDS = [BLT, "megabyte (two stages)", "perceiver (blocks of 5)", "transformer (windowed)"]


def wrapped(name: str = BLT) -> BytelmForCausalLM:
    """A model of its own, whose weights a test may change."""
    return copy.deepcopy(BytelmForCausalLM.from_lm(MODELS[name]))


def batch(texts: list[str] = TEXTS) -> dict[str, Tensor]:
    return dict(TOKENIZER(texts, return_tensors="pt", padding=True))


def one(text: str = "abcabcabcabc") -> dict[str, Tensor]:
    return batch([text])


def written(hf: Any, **options: Any) -> Tensor:
    return hf.generate(**{**batch(), "max_new_tokens": 12, **options})


@contextmanager
def forwards(hf: BytelmForCausalLM) -> Iterator[list[int]]:
    """The widths of what the model's own forward pass reads meanwhile. No hook: a hook would be called by no kernel."""
    seen: list[int] = []
    kind = type(hf.model)
    whole = kind.forward

    def noted(self: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(ids.shape[1])
        return whole(self, ids, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", noted)
        yield seen
