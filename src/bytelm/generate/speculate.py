"""Self-speculative decoding: the local model drafts, one full pass verifies (Fast BLT's BLT-S), if that is faster.

Drafting is lossless: a draft is accepted as far as it equals what the full model samples with the same noise.
So the draft length is chosen from measured throughput.
"""

from __future__ import annotations

from dataclasses import dataclass

from bytelm.threads import ThroughputTuner

LENGTHS = (0, 4, 8)  # draft lengths in bytes; 0: no drafting


@dataclass
class Speculation(ThroughputTuner):
    """How many bytes to draft."""

    options: tuple[int, ...] = LENGTHS
    drafted: int = 0
    accepted: int = 0
    """Accepted draft bytes."""
