"""Decoder of BLT: the latent model runs when a patch is complete; bytes cross-attend to the newest latent."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from bytelm.interfaces.decoder import Backend, Decoder, Ints, NewTokens, Reals, Wanted, fetched
from bytelm.models.blt import device_decoder, host_decoder
from bytelm.models.blt.boundaries import Patches, known
from bytelm.models.blt.model import BLT
from bytelm.nn.cross import CrossAttention
from bytelm.nn.norm import EPS


class BLTDecoder(Decoder):
    """See `Decoder`."""

    drafts = True
    prefills = True

    @staticmethod
    def unsupported(model: BLT) -> str:
        """See `Decoder`."""
        if known(model.cutter):
            return ""
        return f"the kernels do not know the patching of {type(model.patcher).__name__}, or its entropy model"

    def __init__(self, model: BLT, kernels: Backend, rows: int, capacity: int) -> None:
        super().__init__(rows, capacity, kernels)
        config, self.kernels = model.config, kernels
        parts: Any = device_decoder if kernels.on_device else host_decoder
        self.attention_window = config.attention_window
        # Boundaries are decided in float32 whatever the dtype of the weights, as in training.
        self.patches = Patches(model.patcher, kernels.precise(), self.ids)  # pyright: ignore[reportArgumentType]
        held = min(capacity, (self.patches.longest or capacity) + self.chunk)
        local = min(capacity, config.attention_window + self.chunk)
        encoder, decoder = model.encoder, model.decoder
        self.byte = kernels.table(encoder.embed.byte.weight)
        self.ngrams = kernels.hashed(encoder.embed, self.ids) if encoder.embed.ngram else None
        self.encoder = kernels.layers(encoder.stack, rows, local, kept=encoder.crossed, kept_slots=held)
        self.pool = parts.Pool(kernels, model, self.encoder.kept, held)
        self.widen = kernels.matrix(model.widen.weight) if isinstance(model.widen, nn.Linear) else None
        self.latents = kernels.layers(model.latent, rows, capacity)
        self.split = kernels.matrix(decoder.split.weight)
        cross = [layer for layer in decoder.cross if isinstance(layer, CrossAttention)]
        self.decoder = kernels.layers(
            decoder.stack, rows, local, cross=cross, parts=config.queries, patches=self.chunk + 2
        )
        self.norm, self.head = kernels.vector(decoder.norm.weight), kernels.matrix(decoder.head.weight)

    def logits_after(self, new: NewTokens) -> Any:
        """See `Decoder`."""
        return self.wanted_logits(new, None)

    def wanted_logits(self, new: NewTokens, wanted: Wanted | None) -> Any:
        """See `Decoder`."""
        if self.kernels.on_device:  # the encoder runs there while the host waits for the entropy model
            x, beyond = self.encoded(new)
            self.patches.decide(new)
        else:  # the disk gets rows of tables while the entropy model runs
            self.prefetch(new)
            self.patches.decide(new)
            x, beyond = self.encoded(new)
        closed = self.patches.closed[new.row, new.position]
        before = np.maximum(new.position - 1, 0)
        whole = (closed > self.patches.closed[new.row, before]) | (new.position == 0)
        if whole.any():
            self.latent_step(new.row[whole], closed[whole] - 1, self.begun(new, before)[whole], new.position[whole])
        return self.bytes(x, beyond, new, closed, wanted)

    def prefetch(self, new: NewTokens) -> None:
        """Have rows of tables ready for `encoded`, where they are in a file on the host."""
        if self.ngrams:
            self.ngrams.prefetch(new)

    def encoded(self, new: NewTokens) -> tuple[Any, Any]:
        """The local encoder, and what n-grams add to the output, or None."""
        x, beyond = self.embedded(new)
        return self.encoder.run(x, new.row, new.position, np.zeros_like(new.row)), beyond

    def begun(self, new: NewTokens, before: Ints) -> Ints:
        """Where the patch of each new id starts."""
        return np.where(new.position > 0, self.patches.first[new.row, before], 0)

    def latent_step(self, row: Ints, patch: Ints, first: Ints, last: Ints) -> None:
        """One latent step per completed patch."""
        x = self.pool.patches(row, first, last)
        if self.widen:
            x = self.kernels.linear(self.widen, x)
        x = self.latents.run(x, row, patch, np.zeros_like(row))
        self.decoder.hold(self.kernels.linear(self.split, x), row, patch)

    def embedded(self, new: NewTokens) -> tuple[Any, Any]:
        """Embeddings of bytes and their n-grams, and what n-grams add to the output, or None."""
        x = self.kernels.embed(self.byte, new.ids)
        return self.ngrams.added(x, new) if self.ngrams else (x, None)

    def bytes(self, x: Any, beyond: Any, new: NewTokens, closed: Ints, wanted: Wanted | None = None) -> Any:
        """The local decoder; each byte reads the newest complete patch. `beyond`: see `embedded`."""
        x = self.decoder.run(x, new.row, new.position, np.zeros_like(new.row), closed - 1, wanted)
        if beyond is not None:
            x = x + (beyond if wanted is None else beyond[wanted])
        return self.kernels.linear(self.head, x, self.norm, EPS)

    def draft(self, rows: Ints, ids: Ints) -> Reals:
        """See `Decoder`: the local models continue from the newest latent (BLT-S of Fast BLT), one id per row."""
        new = self.append(rows, ids)
        self.patches.stay(new)
        self.prefetch(new)
        return fetched(self.bytes(*self.encoded(new), new, self.patches.closed[new.row, new.position]))

    @property
    def row_bytes(self) -> int:
        """See `Decoder`."""
        return self.patches.row_bytes + sum(part.row_bytes for part in (self.encoder, self.latents, self.decoder))

    def traffic(self, length: int) -> float:
        """See `Decoder`; with the mean patch length of the rows so far."""
        read = int(self.lengths.sum())
        opened = sum(int(self.patches.closed[row, n - 1]) for row, n in enumerate(self.lengths) if n)
        size = read / opened if opened else float(self.patches.longest or 4)
        seen = min(length, self.attention_window)
        cached = seen * (self.encoder.slot_bytes + self.decoder.slot_bytes)
        cached += length / size / size * self.latents.slot_bytes
        entropy_model = self.patches.entropy_model.traffic(length) if self.patches.entropy_model else 0.0
        bytewise = self.encoder.weight_bytes + self.decoder.weight_bytes + self.head.bytes
        widen = self.widen.bytes if self.widen else 0
        patchwise = self.latents.weight_bytes + self.split.bytes + self.decoder.cross_bytes + self.pool.bytes + widen
        return entropy_model + bytewise + patchwise / size + self.rows * cached


build = BLTDecoder
