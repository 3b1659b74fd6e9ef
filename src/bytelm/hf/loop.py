"""Faster replacements for the per-step overhead of `transformers`' `generate`, with the same results.

Its loop asks every logits processor for its signature at every step, looks up anew which ids are suppressed or end a
row, and its outputs check what they are made of. For a small model all that takes as long as reading a byte.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast


class Processors(LogitsProcessorList):
    """Logits processors in turn."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """`scores` `[batch, vocab]` after all of them."""
        if kwargs:
            return super().__call__(input_ids, scores, **kwargs)
        for processor in self:
            scores = processor(input_ids, scores)
        return scores


class Suppressed(SuppressTokensLogitsProcessor):
    """Ids that are never written, as a mask that is made once."""

    def __init__(self, ids: Iterable[int], device: Any = "cpu") -> None:
        super().__init__(ids, device)
        self.mask: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """`scores` `[batch, vocab]` with minus infinity for those ids."""
        if self.mask is None or self.mask.shape[0] != scores.shape[-1] or self.mask.device != scores.device:
            every = torch.arange(scores.shape[-1], device=scores.device)
            self.mask = torch.isin(every, self.suppress_tokens.to(scores.device))
        return scores.masked_fill(self.mask, -torch.inf)


class Criteria(StoppingCriteriaList):
    """What ends a row, any of it."""

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """`[batch]`: whether a row has ended."""
        ended: Any = None
        for each in self:
            if type(each) is MaxLengthCriteria and input_ids.shape[1] < each.max_length:
                continue
            found = each(input_ids, scores, **kwargs)
            ended = found if ended is None else ended | found
        if isinstance(ended, Tensor):
            return ended
        return torch.full((len(input_ids),), bool(ended), device=input_ids.device)


class Ended(EosTokenCriteria):
    """Whether a row ends with one of a few ids."""

    def __init__(self, ids: Tensor) -> None:
        super().__init__(ids)
        self.ends = ids.flatten().tolist()

    def __call__(self, input_ids: Any, scores: Any, new_token_length: int = 1, **kwargs: Any) -> Any:
        """`[batch]`: whether any of the newest ids is one."""
        if len(self.ends) != 1:
            return super().__call__(input_ids, scores, new_token_length, **kwargs)
        return (input_ids[:, -new_token_length:] == self.ends[0]).any(-1)


def quick_processors(found: LogitsProcessorList) -> Processors:
    """The same processors, those of transformers' own that are slow in a faster form."""
    return Processors(
        Suppressed(each.suppress_tokens.tolist(), each.suppress_tokens.device)
        if type(each) is SuppressTokensLogitsProcessor
        else each
        for each in found
    )


def quick_criteria(found: StoppingCriteriaList) -> Criteria:
    """The same for what ends a row."""
    return Criteria(Ended(each.eos_token_id) if type(each) is EosTokenCriteria else each for each in found)


def quick_output(logits: Tensor, cache: Any) -> CausalLMOutputWithPast:
    """`CausalLMOutputWithPast(None, logits, cache)`, put together without its checks."""
    found = CausalLMOutputWithPast.__new__(CausalLMOutputWithPast)
    vars(found).update(loss=None, logits=logits, past_key_values=cache, hidden_states=None, attentions=None)
    OrderedDict.__setitem__(found, "logits", logits)
    OrderedDict.__setitem__(found, "past_key_values", cache)
    return found
