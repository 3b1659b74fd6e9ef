"""What `generate` of `transformers` does at every step besides reading, done faster with the same results.

Its loop asks every logits processor for its signature at every step, and looks up anew which ids are suppressed or end
a row. For a model of a few million parameters that takes as long as reading a byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.stopping_criteria import EosTokenCriteria, StoppingCriteriaList


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


def quick_criteria(found: StoppingCriteriaList) -> StoppingCriteriaList:
    """The same for what ends a row."""
    return StoppingCriteriaList(
        Ended(each.eos_token_id) if type(each) is EosTokenCriteria else each for each in found
    )
