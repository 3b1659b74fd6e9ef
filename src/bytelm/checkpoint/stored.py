"""The weights at any place that models are loaded from, read one by one when needed: see `checkpoint.parts`."""

from __future__ import annotations

from pathlib import Path

from bytelm.checkpoint import pretrained
from bytelm.checkpoint.parts import StoredTensor, in_file, own_tensors


def stored_tensors(checkpoint: Path, *, checked: bool = True) -> dict[str, StoredTensor]:
    """The tensors at a place that `resolve_checkpoint` found, by our names. Raises CheckpointError.

    A file without checksums of all tensors is `checked` as a whole.
    """
    if not pretrained.found(checkpoint):
        return own_tensors(checkpoint, checked=checked)
    found: dict[str, StoredTensor] = {}
    for path in pretrained.files(checkpoint):
        found |= {name.removeprefix(pretrained.PREFIX): t for name, t in in_file(path, None, {}).items()}
    return found
