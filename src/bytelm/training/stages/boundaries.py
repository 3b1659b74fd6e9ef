"""The stage that computes the patch boundaries of the corpus."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from bytelm.checkpoint.assemble import Recipe
from bytelm.config import to_mapping
from bytelm.data.boundaries import Boundaries, BoundaryWriter, load_piece, save_piece
from bytelm.data.corpus import Corpus, iterate_documents
from bytelm.data.files import shown
from bytelm.data.sharing import make_in_pieces
from bytelm.errors import ResourceError
from bytelm.evaluate.stream import chunks, device_of, extended
from bytelm.patching.base import Patcher
from bytelm.training.stages.base import Count, Stage
from bytelm.training.stop import StopRequest
from bytelm.units import PAD, show_bytes

AREA = 1 << 16  # ids per batch, padding included
AREA_ON_DEVICE = 1 << 18  # on a GPU, so that it is not launch-bound


class BoundaryStage(Stage[Boundaries]):
    """The boundaries of a corpus; processes that run it at once share the work, and an interrupted one resumes."""

    name = "computing patch boundaries"

    def __init__(self, patcher: Patcher, recipe: Recipe, corpus: Corpus) -> None:
        self.patcher, self.corpus, self.total = patcher, corpus, corpus.total
        self.hash = fingerprint_of(patcher, recipe, corpus)
        self.path = corpus.directory / f"boundaries-{self.hash[:16]}.json"

    def fingerprint(self) -> str:
        """See `Stage`: the rule, every weight of the entropy model, and the bytes."""
        return self.hash

    def load(self) -> Boundaries:
        """See `Stage`."""
        return Boundaries.open(self.corpus.directory, self.hash)

    def make(self, count: Count) -> Boundaries:
        """See `Stage`. The processes that are at it each cut the next piece; what is decided does not depend on who."""

        def make(start: int, stop: int, aside: Path, done: Callable[[int], None]) -> None:
            documents = iterate_documents(self.corpus, start=start, stop=stop)
            save_piece(aside, cut(self.patcher, (document for _, document in documents)), done)

        def join(pieces: list[Path]) -> None:
            with BoundaryWriter(self.corpus.directory, self.hash, self.corpus.total) as writer:
                for piece in pieces:
                    writer.add(*load_piece(piece))
                writer.finish()

        try:
            make_in_pieces(self.corpus, self.path, "boundaries", make, join, count)
        except OSError as error:
            name = shown(str(self.path))
            raise ResourceError(f"cannot record boundaries in {name} ({error.strerror}): free some space") from error
        return self.load()

    def summary(self, result: Boundaries) -> list[str]:
        """See `Stage`."""
        mean = result.total / max(1, result.patches)
        return [f"patches: {result.patches:,} over {show_bytes(result.total)}, {mean:.2f} bytes each"]


def fingerprint_of(patcher: Patcher, recipe: Recipe, corpus: Corpus) -> str:
    """A hash of all inputs of boundaries."""
    digest = hashlib.sha256(corpus.fingerprint.encode())
    digest.update(repr(to_mapping(recipe).get("patching")).encode())
    for key, tensor in patcher.state_dict().items():
        digest.update(key.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cut(patcher: Patcher, documents: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.bool_]]:
    """For each document, whether the byte after each of its bytes starts a patch. Short documents are batched."""
    area = AREA if device_of(patcher).type == "cpu" else AREA_ON_DEVICE
    group: list[NDArray[np.uint8]] = []
    for document in itertools.chain(documents, [None]):
        longest = max((len(d) for d in [*group, *([] if document is None else [document])]), default=0)
        if group and (document is None or (len(group) + 1) * (longest + 1) > area):
            yield from cut_group(patcher, group)
            group = []
        if document is not None:
            group.append(document)


def cut_group(patcher: Patcher, group: list[NDArray[np.uint8]]) -> Iterator[NDArray[np.bool_]]:
    """A batch of documents, one chunk at a time."""
    rows = [list(chunks(document)) for document in group]
    state = patcher.initial_state(len(group))
    found: list[torch.Tensor] = []
    for column in itertools.zip_longest(*rows, fillvalue=torch.zeros(0, dtype=torch.long)):
        StopRequest.check()
        ids = nn.utils.rnn.pad_sequence(list(column), batch_first=True, padding_value=PAD)
        opens, state = extended(patcher, ids, state)
        found.append(opens)
    opens = torch.cat(found, 1).numpy()
    for row, document in zip(opens, group, strict=True):
        yield row[1 : len(document) + 1]
