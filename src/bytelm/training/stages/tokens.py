"""The stages of a model over tokens: train the tokenizer, tokenize the corpus."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bytelm.data.bpe import LEARNT, Bpe
from bytelm.data.corpus import Corpus
from bytelm.data.files import write_whole
from bytelm.data.tokens import TokenCorpus, encoded, opened, table_of
from bytelm.errors import DataError
from bytelm.training.stages.base import Count, Stage, sampled
from bytelm.units import VOCAB, show_bytes

MERGES = "merges.npy"


@dataclass
class TokenizerStage(Stage[Bpe]):
    """A BPE tokenizer of so many ids, trained on the training documents."""

    name = "training BPE tokenizer"
    path: Path
    vocabulary: int
    corpus: Corpus

    def load(self) -> Bpe:
        """See `Stage`."""
        try:
            merges = np.load(self.path, allow_pickle=False)
            if merges.dtype != np.int64 or merges.shape != (self.vocabulary - VOCAB, 2):
                raise ValueError("it is of another vocabulary")
            return Bpe(merges)
        except (ValueError, EOFError, DataError) as error:
            raise DataError(f"{self.path} is damaged ({error}): start another run") from None

    def make(self, count: Count) -> Bpe:
        """See `Stage`."""
        sample = sampled(self.corpus, LEARNT, count)
        tokens = Bpe.learn((document.tobytes() for document in sample), self.vocabulary)
        keep_merges(self.path, tokens)
        return tokens


class TokenStage(Stage[TokenCorpus]):
    """The corpus in tokens; processes that run it at once share the work, and an interrupted one resumes."""

    name = "encoding"

    def __init__(self, corpus: Corpus, tokens: Bpe) -> None:
        self.corpus, self.tokens, self.total = corpus, tokens, corpus.total
        self.path = table_of(corpus, tokens)

    def fingerprint(self) -> str:
        """See `Stage`: the bytes, and the merges."""
        return self.path.stem

    def load(self) -> TokenCorpus:
        """See `Stage`."""
        return opened(self.corpus, self.tokens)

    def make(self, count: Count) -> TokenCorpus:
        """See `Stage`. The processes that are at it each encode the next piece."""
        return encoded(self.corpus, self.tokens, count)

    def summary(self, result: TokenCorpus) -> list[str]:
        """See `Stage`."""
        bytes = self.corpus.total
        return [f"tokens: {result.total:,} over {show_bytes(bytes)}, {bytes / result.total:.2f} bytes each"]


def keep_merges(path: Path, tokens: Bpe) -> None:
    """Write the merges."""
    held = io.BytesIO()
    np.save(held, tokens.merges, allow_pickle=False)
    write_whole(path, held.getvalue())
