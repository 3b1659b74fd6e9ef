"""The texts of files as tokens of a tokenizer of `transformers`, and what is known of those tokens.

    own id = VOCAB + theirs, so that PAD, BOS and EOS are what they are everywhere else

Text is encoded as text: without special tokens added, and what looks like one in a file is not read as one. Bytes that
are not UTF-8 are coded one by one where each byte is a token: by tokenizers of bytes, and in the alphabet of GPT-2.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from transformers import ByT5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bytelm.errors import DataError
from bytelm.exchange.files import first_line
from bytelm.hf.tokenizer import ByteTokenizer
from bytelm.units import BYTES, VOCAB

UNREADABLE = re.compile("([\udc80-\udcff]+)")  # bytes that are no text, as `surrogateescape` decodes them
_PIECE = re.compile("<0x([0-9A-F]{2})>")


@dataclass(frozen=True)
class Start:
    """What comes before the first token of a document, as the tokenizer has it."""

    ids: tuple[int, ...]
    """Theirs; if there are none, the first token is predicted uniformly."""
    always: bool
    """Whether it comes before every window, as the tokenizer puts it before every text."""


class TextTokens:
    """The tokens of a tokenizer. Ids are own ids."""

    def __init__(self, tokenizer: Any, width: int) -> None:
        """`width`: the ids that the model has a probability for."""
        self.tokenizer = tokenizer
        self.width = width
        self.vocabulary = VOCAB + width
        self.bytes_of = byte_table(tokenizer)
        """The bytes of each id of theirs, where a document's are its tokens' one after another; None elsewhere."""
        self.ids_of = None if self.bytes_of is None else single_bytes(self.bytes_of)
        """Their id of each byte; None where some have none."""
        self.sizes = self.measured()
        """Number of bytes of each id in the middle of a text, `[vocabulary]`: 0 for a special."""

    def encode(self, data: bytes) -> NDArray[np.int64]:
        """The ids of a document, `[tokens]`. Raises DataError for bytes that the tokenizer cannot read."""
        if self.ids_of is not None and isinstance(self.tokenizer, ByteTokenizer | ByT5Tokenizer):
            return VOCAB + self.ids_of[np.frombuffer(data, np.uint8)]
        text = data.decode(errors="surrogateescape")
        found: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        for part in UNREADABLE.split(text):
            if not part:
                continue
            raw = part.encode(errors="surrogateescape")
            if not UNREADABLE.match(part):
                found.append(np.array(self.ids(part), np.int64))
            elif self.ids_of is not None:
                found.append(self.ids_of[np.frombuffer(raw, np.uint8)])
            else:
                at = len(text[: text.index(part)].encode(errors="surrogateescape"))
                raise DataError(f"byte {at} is not UTF-8, and this tokenizer reads text alone: convert it to UTF-8")
        ids = np.concatenate(found)
        if len(ids) and ids.max() >= self.width:
            name = self.tokenizer.convert_ids_to_tokens(int(ids.max()))
            raise DataError(
                f"token {name!r} has id {ids.max()}, and the model has {self.width} ids: take its tokenizer"
            )
        return VOCAB + ids

    def ids(self, text: str) -> list[int]:
        """Their ids of a text, no special one added, and none for what looks like one. Raises DataError."""
        try:
            found = self.tokenizer(
                text,
                add_special_tokens=False,
                split_special_tokens=True,
                truncation=False,
                padding=False,
                return_attention_mask=False,
                verbose=False,
            )
        except Exception as error:  # tokenizers raises nothing else
            raise DataError(f"the tokenizer cannot encode this text: {first_line(error)}") from error
        return cast("list[int]", found["input_ids"])

    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids decode to, specials by their names: not always those that were encoded."""
        theirs = [int(symbol) - VOCAB for symbol in ids]
        if self.bytes_of is not None:
            # A model may have more ids than its tokenizer: nothing is written for those, as by other tokenizers.
            return b"".join(self.bytes_of.get(symbol, b"") for symbol in theirs)
        text = self.tokenizer.decode(theirs, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text.encode(errors="surrogateescape")

    def measured(self) -> NDArray[np.int64]:
        """See `sizes`."""
        sizes = np.zeros(self.vocabulary, np.int64)
        for token, symbol in self.tokenizer.get_vocab().items():
            if 0 <= symbol < self.width and symbol not in self.specials:
                sizes[VOCAB + symbol] = len(self.bytes_of[symbol]) if self.bytes_of is not None else length(token)
        return sizes

    @cached_property
    def specials(self) -> frozenset[int]:
        """Their ids that stand for no text."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset(self.tokenizer.all_special_ids) | {symbol for symbol, token in added.items() if token.special}

    @property
    def unknown(self) -> int | None:
        """Their id of what is in no other token."""
        return self.tokenizer.unk_token_id

    @cached_property
    def start(self) -> Start:
        """What comes before a document: what the tokenizer puts there, else its BOS, else its EOS, as GPT-2 has it."""
        plain, full = self.ids("a"), cast("list[int]", self.tokenizer("a")["input_ids"])
        before = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), 0)
        if before:
            # Our own models read windows from anywhere, and are evaluated so.
            return Start(tuple(full[:before]), not isinstance(self.tokenizer, ByteTokenizer))
        found = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        return Start(tuple(symbol for symbol in found if symbol is not None and symbol < self.width)[:1], False)


def length(token: str) -> int:
    """The bytes that a token stands for, as most tokenizers write it."""
    if _PIECE.fullmatch(token):
        return 1
    return len(token.removeprefix("##").replace("\u2581", " ").encode(errors="surrogatepass"))


def byte_table(tokenizer: Any) -> dict[int, bytes] | None:
    """The bytes of each id of tokenizers that decode by joining them: those of bytes, and in the alphabet of GPT-2."""
    if isinstance(tokenizer, ByteTokenizer):
        return {byte: bytes((byte,)) for byte in range(BYTES)} | dict.fromkeys(range(BYTES, VOCAB), b"")
    added = {symbol: token.content.encode() for symbol, token in tokenizer.added_tokens_decoder.items()}
    if isinstance(tokenizer, ByT5Tokenizer):
        return {byte + tokenizer.offset: bytes((byte,)) for byte in range(BYTES)} | added
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "decoder", None)).__name__ != "ByteLevel":
        return None
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    table: dict[int, bytes] = {}
    for token, symbol in tokenizer.get_vocab().items():
        known = all(letter in letters for letter in token)
        table[symbol] = bytes(letters[letter] for letter in token) if known else token.encode()
    return table | added


def single_bytes(table: dict[int, bytes]) -> NDArray[np.int64] | None:
    """The id of each byte `[256]`; None where some have none."""
    ids = {data[0]: symbol for symbol, data in table.items() if len(data) == 1}
    return np.array([ids[byte] for byte in range(BYTES)]) if len(ids) == BYTES else None
