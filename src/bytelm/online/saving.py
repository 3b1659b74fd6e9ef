"""Files that are written whole or not at all, from parts that need not be copied into one."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from bytelm.data.files import shown, sync_folder
from bytelm.errors import ResourceError


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """At any instant `path` holds all parts or what it held before. Raises ResourceError where the disk refuses."""
    aside = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with aside.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise ResourceError(
            f"cannot write {shown(str(path))} ({error.strerror}): make room there, or name another place"
        ) from error
