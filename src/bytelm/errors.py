"""Every error bytelm raises for a reason a user can act on, each with its code and its exit code.

BytelmError                error       1   the root: one line that names the thing, the value, the limit and the way out
├── UsageError             usage       2   an argument or option that cannot be used as given
│   ├── ConfigError        config      2   a configuration key, value or combination
│   └── MissingExtraError  extra       2   an optional dependency that is not installed
├── DataError              data        3   input files, packed shards, recorded boundaries
├── CheckpointError        checkpoint  4   a run or checkpoint that is missing, damaged or of another shape
├── ResourceError          resource    5   disk, memory, a directory in use
└── TrainingError          training    6   a training that cannot go on (non-finite loss or gradient)

The command line prints `bytelm: CODE: message`; docs/troubleshooting.md has a part for each code.
"""

from __future__ import annotations


class BytelmError(Exception):
    """The root of the tree above. `str(error)` is one line, fit to be shown to a user without a traceback."""

    code = "error"
    exit_code = 1


class UsageError(BytelmError):
    """An argument or option that cannot be used as given."""

    code = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """A configuration key, value or combination that cannot be used."""

    code = "config"


class MissingExtraError(UsageError):
    """An optional dependency that is not installed."""

    code = "extra"

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs {package}, which is not installed: pip install 'bytelm[{extra}]'")


class DataError(BytelmError):
    """Input files, packed shards or recorded boundaries that cannot be used."""

    code = "data"
    exit_code = 3


class CheckpointError(BytelmError):
    """A run or checkpoint that is missing, damaged or of another shape."""

    code = "checkpoint"
    exit_code = 4


class ResourceError(BytelmError):
    """Disk, memory or a directory that is not to be had."""

    code = "resource"
    exit_code = 5


class TrainingError(BytelmError):
    """A training that cannot continue."""

    code = "training"
    exit_code = 6


class DivergenceError(TrainingError):
    """A training whose loss or gradient is no longer finite."""
