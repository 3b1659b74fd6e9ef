"""Calibration: the thresholds for a target mean patch length, from a sample of documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bytelm.errors import ConfigError, DataError
from bytelm.evaluate.stream import chunks, entropies
from bytelm.patching.entropy import Config, EntropyModel
from bytelm.units import BYTES, PAD

AREA = 1 << 20  # ids, padding included, that are cut at once
STEPS = 32  # quantiles between opening nothing and opening everything, before bisection


def calibrate(
    config: Config,
    entropy_model: EntropyModel,
    sample: Sequence[NDArray[np.uint8]],
    progress: Callable[[int], None] | None = None,
) -> Config:
    """`config` with the thresholds of its rule set so that the sample's patches have its mean length.

    A rule needs a cut: so many of the sample's entropies, sorted, lie below it (for rule "relative", of the rises; for
    "both", the same number of each). The search goes down by quantiles to the first at which patches are short enough,
    then bisects, and judges each cut by what the patcher itself makes of the sample. It comes within 1% of the size,
    unless the bounds of the guard or equal entropies rule that out: then it comes near, and `realised` says how near.
    `progress` is called with the number of bytes the entropy model has read.

    Raises DataError if no document of the sample has 2 bytes, ConfigError for a size that `max_length` forbids.
    """
    if config.max_length is not None and config.target_mean_length > config.max_length:
        raise ConfigError(
            f"patching.target_mean_length = {config.target_mean_length}: no patch is longer than "
            f"max_length = {config.max_length}; lower it or raise max_length"
        )
    documents = _Sample.of(entropy_model, sample, progress)
    count = len(documents.entropies)
    tried: dict[int, tuple[float, Config]] = {}

    def size(rank: int) -> float:
        if rank not in tried:
            candidate = documents.cut(config, rank)
            tried[rank] = documents.mean_length(candidate), candidate
        return tried[rank][0]

    wanted, low, high = config.target_mean_length, count, count
    # Not bisection from end to end: where openings are many, the guard drops most of them, and patches are long again.
    while low and size(low) > wanted:
        low, high = max(0, low - max(1, count // STEPS)), low
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if size(middle) > wanted else (middle, high)
    size(low)
    return min(tried.values(), key=lambda result: abs(result[0] - wanted))[1]


@dataclass(frozen=True)
class _Recorded:
    """An entropy model that repeats what another one found for the same ids, read in one piece."""

    values: Float[Tensor, "batch new"]

    def initial_state(self, batch: int) -> None:
        """Nothing to remember."""

    def entropies(self, ids: Int[Tensor, "batch new"], state: None) -> tuple[Float[Tensor, "batch new"], None]:
        """What was found."""
        return self.values, None


@dataclass(frozen=True)
class _Sample:
    """Documents, and the entropies that all candidates are tried on; a batch has documents of like length."""

    batches: list[tuple[Tensor, _Recorded]]
    entropies: Float[Tensor, " time"]
    """Sorted, of the bytes that a rule decides about: all but the first of each document."""
    rises: Float[Tensor, " time"]
    """Sorted, of the same bytes over those before them."""

    @classmethod
    def of(
        cls,
        entropy_model: EntropyModel,
        sample: Sequence[NDArray[np.uint8]],
        progress: Callable[[int], None] | None = None,
    ) -> _Sample:
        """Ask the entropy model, once."""
        documents = sorted((document for document in sample if len(document)), key=len)
        if not documents or len(documents[-1]) < 2:
            raise DataError("no document of the sample has 2 bytes: to calibrate on it, give it more")
        ids = [torch.cat(list(chunks(document))) for document in documents]
        values: list[Tensor] = []
        read = 0
        for document in documents:
            values.append(torch.cat(list(entropies(entropy_model, document))))
            read += len(document)
            if progress:
                progress(read)
        batches = [
            (
                pad_sequence(ids[rows], batch_first=True, padding_value=PAD),
                _Recorded(pad_sequence(values[rows], batch_first=True)),
            )
            for rows in _grouped([len(row) for row in ids])
        ]
        # The last value is about a byte that is not there.
        inner = torch.cat([row[1:-1] for row in values])
        rises = torch.cat([row[1:-1] - row[:-2] for row in values])
        return cls(batches, inner.sort().values, rises.sort().values)

    def cut(self, config: Config, rank: int) -> Config:
        """The configuration whose rule has `rank` of the sorted values below its cut."""
        threshold, relative_threshold = _between(self.entropies, rank), _between(self.rises, rank)
        return replace(
            config,
            threshold=config.threshold if config.rule == "relative" else threshold,
            relative_threshold=config.relative_threshold if config.rule == "threshold" else relative_threshold,
        )

    def mean_length(self, config: Config) -> float:
        """Bytes over patches that have bytes, as the patcher of this configuration cuts the sample."""
        bytes, patches = 0, 0
        for ids, recorded in self.batches:
            opens, _ = config.build(recorded).extend(ids)
            real = ids[:, 1:] < BYTES
            bytes += int(real.sum())
            patches += int((opens[:, :-1] & real).sum())
        return bytes / patches


def _grouped(lengths: list[int]) -> Iterator[slice]:
    """Neighbours among rows of rising length whose padded area is at most AREA."""
    start = 0
    for row, length in enumerate(lengths):
        if row > start and (row + 1 - start) * length > AREA:
            yield slice(start, row)
            start = row
    yield slice(start, len(lengths))


def _between(values: Float[Tensor, " time"], rank: int) -> float:
    """A cut above the first `rank` sorted values: amid its neighbours, so that noise carries none of them across."""
    padded = torch.cat([values[:1] - 1, values, values[-1:] + 1])
    return float((padded[rank] + padded[rank + 1]) / 2)
