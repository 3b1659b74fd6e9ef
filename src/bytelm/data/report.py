"""Report of reading documents: what was read, what was skipped and why, and the limit on that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bytelm.data.files import shown
from bytelm.errors import DataError

NAMED = 100  # skipped files that are kept by name: a tree may have millions
EXCLUDED = "excluded"  # why nothing is read where the output goes


@dataclass
class SourceReport:
    """Counts of what was read and skipped."""

    files: int = 0  # regular files found, standard input included
    empty: int = 0  # documents without a byte, which are not given
    bad: int = 0  # lines, rows, images and clips that could not be used
    skipped: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])  # (name, why), the first of them
    reasons: dict[str, int] = field(default_factory=dict[str, int])  # why → how many, of all of them
    converted: dict[str, int] = field(default_factory=dict[str, int])  # "resized" → documents, where a modality did it
    duplicates: int = 0  # documents that are in no split since an equal one comes before, where those are left out

    def skip(self, name: str, reason: str) -> None:
        """Count a skipped file, and why: a few words, and after a colon the details of this one."""
        if len(self.skipped) < NAMED:
            self.skipped.append((shown(name), reason))
        kind = reason.partition(":")[0]
        self.reasons[kind] = self.reasons.get(kind, 0) + 1

    def add(self, other: SourceReport) -> None:
        """Add the counts of a report of further files."""
        self.files += other.files
        self.empty += other.empty
        self.bad += other.bad
        self.duplicates += other.duplicates
        self.skipped = [*self.skipped, *other.skipped][:NAMED]
        for ours, theirs in ((self.reasons, other.reasons), (self.converted, other.converted)):
            for what, count in theirs.items():
                ours[what] = ours.get(what, 0) + count

    @property
    def left_out(self) -> int:
        """The number of items that are in no document."""
        return self.empty + self.bad + sum(self.reasons.values())

    def losses(self) -> list[str]:
        """What is not in the documents: skipped files, the first and why, and lossy conversions."""
        count = sum(self.reasons.values())
        told = [f"{count} skipped ({'the first ' if count > 1 else ''}{': '.join(self.skipped[0])})"] if count else []
        told += [f"{self.empty} empty skipped"] if self.empty else []
        told += [f"{self.bad} damaged skipped"] if self.bad else []
        told += [f"{self.duplicates:,} duplicates left out"] if self.duplicates else []
        return told + [f"{documents} {how}" for how, documents in self.converted.items()]

    def nothing(self, paths: Sequence[str | Path]) -> DataError:
        """The error of `paths` in which there was not a byte."""
        where = ", ".join(shown(str(path)) for path in paths) or "no paths"
        skipped = "".join(f"; skipped {name}: {reason}" for name, reason in self.skipped[:3])
        left = sum(self.reasons.values()) - 3
        more = f" and {left} more" if left > 0 else ""
        return DataError(
            f"no bytes found in {where}, checked {self.files} files{skipped}{more}: name files with content"
        )


class StrictReport(SourceReport):
    """A report for --strict: nothing may be skipped but the output itself."""

    def skip(self, name: str, reason: str) -> None:
        """Raise DataError that names the file."""
        if reason != EXCLUDED:
            raise DataError(
                f"{shown(name)} would be skipped ({reason}), and --strict allows no such file: "
                "remove it, or leave --strict out"
            )
        super().skip(name, reason)


def check_bad(name: str, bad: int, total: int, what: str, max_bad: float) -> None:
    """Raise DataError where more than the fraction `max_bad` of `total` are `bad`; `what` says in which way."""
    if bad > max_bad * total:
        raise DataError(
            f"{name}: {bad} of {total} {what} (limit: data.max_bad = {max_bad:g}): "
            "correct them, or allow more, as in --set data.max_bad=0.01"
        )
