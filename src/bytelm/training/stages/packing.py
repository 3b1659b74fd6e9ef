"""Files → shards: the corpus of a run, of a comparison, or of `bytelm data pack`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from bytelm.data import packed
from bytelm.data.corpus import INDEX, SPLITS, Corpus, Index
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

    A corpus packed from other files is refused; `anew` packs regardless, and leaves the summary to the caller. With
    `join` the processes that are at it each pack the next part.
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
        """See `Stage`."""
        if self.anew or not (self.path / INDEX).exists():
            return False
        if Index.load(self.path).source_fingerprint != self.fingerprint():
            raise DataError(
                f"the data of {self.path.parent} has changed since it was packed: restore the files, or "
                "start another run"
            )
        return True

    def load(self) -> Corpus:
        """See `Stage`."""
        return Corpus.open(self.path)

    def make(self, count: Count) -> Corpus:
        """See `Stage`. Raises ConfigError if `pack` was packed with other options."""
        if self.pack is not None:
            packed.check_options(Corpus.open(self.pack), self.options, self.modality and self.modality.table)
            return self._linked(self.pack, count)
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
