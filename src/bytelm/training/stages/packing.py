"""Files → shards: the corpus of a run, of a comparison, or of `bytelm data pack`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bytelm.data import packed
from bytelm.data.corpus import INDEX, SPLITS, Corpus, Index
from bytelm.data.files import aside_of, clear_asides
from bytelm.data.modalities.base import Modality
from bytelm.data.options import DataConfig
from bytelm.data.pack import PARTS
from bytelm.data.pack import pack as pack_files
from bytelm.data.sharing import SharedWork, remove
from bytelm.data.sources import fingerprint
from bytelm.errors import DataError
from bytelm.training.stages.base import Count, Stage
from bytelm.units import show_bytes


@dataclass
class PackingStage(Stage[Corpus]):
    """The corpus of `paths`, without folders `exclude`, or else an existing `pack`.

    A corpus packed from files of other names, sizes or times is packed again aside, and refused where the bytes differ;
    `anew` packs regardless, and leaves the summary to the caller. With `join` the processes that are at it each pack
    the next part.
    """

    name = "packing"
    path: Path
    paths: Sequence[str | Path]
    options: DataConfig
    modality: Modality | None
    exclude: Sequence[Path] = ()
    pack: Path | str | None = None
    anew: bool = False
    join: bool = False
    others: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered once the folder is ready: starts other processes that join."""

    def fingerprint(self) -> str | None:
        """See `Stage`: of files, their names, sizes and times."""
        if self.pack is not None:
            return packed.fingerprint(Corpus.open(self.pack))
        return fingerprint(self.paths, self.exclude)

    def done(self) -> bool:
        """See `Stage`. False too where only the content can tell whether the files are the same: a copy, say."""
        if self.anew or not (self.path / INDEX).exists():
            return False
        if Index.load(self.path).source_fingerprint == self.fingerprint():
            return True
        if self.pack is not None:
            raise self._changed()
        return False

    def _changed(self) -> DataError:
        return DataError(
            f"the data of {self.path.parent} has changed since it was packed: restore the files, or start another run"
        )

    def load(self) -> Corpus:
        """See `Stage`."""
        return Corpus.open(self.path)

    def make(self, count: Count) -> Corpus:
        """See `Stage`. Raises ConfigError if `pack` was packed with other options."""
        if self.pack is not None:
            packed.check_options(Corpus.open(self.pack), self.options, self.modality and self.modality.table)
            return self._linked(self.pack, count)
        if (self.path / INDEX).exists() and not self.anew:
            return self._compared(count)
        options = asdict(self.options)
        return pack_files(
            self.paths,
            self.path,
            modality=self.modality,
            exclude=self.exclude,
            progress=count,
            join=self.join,
            others=self.others,
            **options,
        )

    def _compared(self, count: Count) -> Corpus:
        """The corpus, if the files still pack to the same one, whose fingerprint then is theirs. Raises DataError."""
        kept, aside = Index.load(self.path), aside_of(self.path)
        if not self.join:  # else other processes may be comparing too
            clear_asides(self.path)
        try:
            now = replace(self, path=aside, anew=True, join=False, others=nullcontext).make(count).index
        finally:
            remove(aside)
        if (now.bytes, now.shards, now.documents) != (kept.bytes, kept.shards, kept.documents):
            raise self._changed()
        replace(kept, source_fingerprint=now.source_fingerprint).write(self.path)
        return self.load()

    def _linked(self, pack: Path | str, count: Count) -> Corpus:
        """The corpus of a pack, linked by one of the processes."""
        if not self.join:
            return packed.link_corpus(pack, self.path)
        work = SharedWork(self.path / f"{PARTS}linked", (self.path / INDEX).exists, lambda done: count(0))

        def link(number: int, aside: Path) -> None:
            packed.link_corpus(pack, self.path)
            remove(work.folder)

        work.do("linked", 1, link)
        return self.load()

    def summary(self, result: Corpus) -> list[str]:
        """See `Stage`: the files, what was skipped and converted, and the splits."""
        if self.anew:
            return []
        report = result.source_report
        parts = [f"{report.files} files", *report.losses(), show_bytes(result.total)]
        splits = [f"{show_bytes(result.bytes(split))} {split}" for split in SPLITS]
        lines = [f"{', '.join(parts)}: {', '.join(splits)}", result.index.warning()]
        return [f"data: {line}" for line in lines if line]
