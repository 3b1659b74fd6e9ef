"""Names that begin with "hf:", of datasets and of models of transformers: a folder, or OWNER/NAME on the hub."""

from __future__ import annotations

PREFIX = "hf:"


def after_prefix(name: str) -> str | None:
    """What follows "hf:"; None for a name that does not begin so. A file whose name does is written ./hf:…"""
    return name.removeprefix(PREFIX) if name.startswith(PREFIX) else None
