"""The windows of a training, and of its validation: of one corpus, or of a mixture of several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bytelm.data.boundaries import Boundaries
from bytelm.data.corpora import Corpora, parts_of
from bytelm.data.corpus import Corpus
from bytelm.data.mixture import HeldOut, Mixture
from bytelm.data.sampler import Sampler, held_out
from bytelm.data.tokens import Source


@dataclass(frozen=True)
class WindowsOf:
    """Windows of `window` predictions of a corpus.

    `sources` are its parts in tokens (default: in bytes), `boundaries` the recorded boundaries of each, if any.
    """

    corpus: Corpus
    window: int
    aligned: bool = False
    sources: Sequence[Source] | None = None
    boundaries: Sequence[Boundaries] = ()

    def training(
        self, batch: int, seed: int, rank: int = 0, world: int = 1, *, limited: bool = True
    ) -> Sampler | Mixture:
        """Those of training, `batch` a step on each of `world` ranks; unless `limited`, for any number of epochs."""
        samplers = [
            Sampler(source, "train", self.window, batch, seed, rank, world, own, self.aligned)
            for source, own in self._parts()
        ]
        if not isinstance(self.corpus, Corpora):
            return samplers[0]
        shares = [share if limited else replace(share, epochs=None) for share in self.corpus.shares]
        return Mixture(shares, samplers, batch, seed, rank, world)

    def held_out(self) -> Sampler | HeldOut | None:
        """Those of validation, the same each time; None where there are none."""
        found = [held_out(source, self.window, own, self.aligned) for source, own in self._parts()]
        if not isinstance(self.corpus, Corpora):
            return found[0]
        held = {
            share.name: (share.weight, windows)
            for share, windows in zip(self.corpus.shares, found, strict=True)
            if windows is not None
        }
        return HeldOut(held) if held else None

    def _parts(self) -> list[tuple[Source, Boundaries | None]]:
        sources = self.sources or parts_of(self.corpus)
        return list(zip(sources, self.boundaries or [None] * len(sources), strict=True))
