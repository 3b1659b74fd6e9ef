"""Whether a model of `transformers` writes a text after a prompt, greedily.

Tokens are decoded together with those before them: of many tokenizers one alone loses the space that it begins with,
or is a part of a character.
"""

from __future__ import annotations

import numpy as np
import torch

from bytelm.hf.foreign import Foreign
from bytelm.hf.proof import Steps
from bytelm.units import BOS, VOCAB

ALL = 1 << 62  # a window that holds any document
PARTIAL = "\ufffd".encode()  # what some tokenizers decode the first bytes of a character to


@torch.inference_mode()
def writes(model: Foreign, prompt: bytes, wanted: bytes, end: bytes) -> bool | None:
    """Whether it writes `wanted` and then `end`, or the tokenizer's EOS. None for more tokens than it has positions.

    Room is wanted for a token for each byte, so that it does not depend on what the model writes. Specials are not
    written, but for EOS. Raises DataError for a prompt that the tokenizer cannot read.
    """
    tokens, most = model.tokens, len(wanted) + 1
    ids = [BOS, *tokens.encode(prompt).tolist()]
    if model.longest is not None and len(ids) + len(wanted) > model.longest:
        return None
    before, begun, eos = tokens.decode(ids[1:]), len(ids), tokens.tokenizer.eos_token_id
    never = tokens.sizes[VOCAB:] == 0
    if eos is not None and eos < tokens.width:
        never[eos] = False
    steps, written = Steps(model, ALL, ALL), b""
    while len(ids) - begun < most and (wanted + end).startswith(written.rstrip(PARTIAL)):
        symbol = int(np.where(never, -np.inf, steps.after(ids)).argmax())
        if symbol == eos:
            return written == wanted
        ids.append(VOCAB + symbol)
        written = tokens.decode(ids[1:]).removeprefix(before)
        if end in written:
            return written.partition(end)[0] == wanted
    return False
