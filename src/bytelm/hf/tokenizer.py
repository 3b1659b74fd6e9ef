"""The byte tokenizer for `transformers`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bytelm.errors import UsageError
from bytelm.units import BOS, BYTES, EOS, PAD, RESERVED

SPECIALS = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<reserved>": RESERVED}
VOCABULARY = {token: byte for byte, token in bytes_to_unicode().items()} | SPECIALS
NAMES = sorted(VOCABULARY, key=lambda token: VOCABULARY[token])
SHOWN = [bytes([byte]) for byte in range(BYTES)] + [name.encode() for name in NAMES[BYTES:]]


class ByteTokenizer(PreTrainedTokenizer):
    """Ids 0..255 are the bytes of UTF-8; a BOS goes in front, no EOS behind, and shorter rows are padded on the left.

    No text is ever read as a special id, also one that has "<bos>" in it. `decode` writes specials by their names, as
    tools expect that look for them, and leaves them out with `skip_special_tokens`: every text then comes back as it
    was. Bytes that are no text go through `from_bytes` and `to_bytes`, which lose nothing; `decode` shows what is not
    UTF-8 as U+FFFD, so that its result can be printed. In a text that is encoded, lone surrogates stand for single
    bytes as in `data.decode(errors="surrogateescape")`: so a pipeline, which takes texts, takes any bytes.
    """

    vocab_files_names: dict[str, str] = {}  # noqa: RUF012  # transformers' own declaration is no ClassVar
    model_input_names: list[str] = ["input_ids", "attention_mask"]  # noqa: RUF012
    padding_side = "left"

    def __init__(self, **kwargs: Any) -> None:
        named = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
        fixed = {"special_tokens_pattern": "bos", "split_special_tokens": True}
        super().__init__(**{**kwargs, **named, **fixed})

    @property
    def vocab_size(self) -> int:
        """256 bytes and four specials."""
        return len(VOCABULARY)

    @property
    def backend_tokenizer(self) -> Tokenizer:
        """The same bytes as a tokenizer of `tokenizers`, which transformers uses to decode tokens.

        It finds a ByteLevel decoder there, and so compares `stop_strings` by bytes: a token may be part of a character.
        """
        return _byte_level()

    def get_vocab(self) -> dict[str, int]:
        """Ids by their symbols: bytes in the ByteLevel alphabet of GPT-2."""
        return dict(VOCABULARY)

    def from_bytes(self, data: bytes) -> list[int]:
        """The ids of any bytes, BOS in front: what `encode` gives for a text of these bytes."""
        return [BOS, *data]

    def to_bytes(self, ids: Tensor | Iterable[int]) -> bytes:
        """The bytes of the ids of one sequence, without specials."""
        return bytes(symbol for symbol in checked(ids.tolist() if isinstance(ids, Tensor) else ids) if symbol < BYTES)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        try:
            return [NAMES[byte] for byte in text.encode(errors="surrogateescape")]
        except UnicodeEncodeError as error:
            raise UsageError(f"{text[error.start : error.end]!r} is not text: pass bytes to from_bytes") from None

    def _add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        for token in map(str, new_tokens):
            if token not in VOCABULARY:
                raise UsageError(f"{token!r} cannot be added: a byte-level model has exactly {len(VOCABULARY)} ids")
        return super()._add_tokens(new_tokens, special_tokens)

    def _convert_token_to_id(self, token: str) -> int | None:
        return VOCABULARY.get(token)  # tools expect None for a token that does not exist

    def _convert_id_to_token(self, index: int) -> str:
        return NAMES[index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens, specials by their names."""
        return self._decode([VOCABULARY[token] for token in tokens])

    def _decode(self, token_ids: int | list[int], skip_special_tokens: bool = False, *args: Any, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        data = self.to_bytes(ids) if skip_special_tokens else b"".join(SHOWN[symbol] for symbol in checked(ids))
        return data.decode(errors="replace")

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """There is none."""
        return ()


def checked(ids: Iterable[int]) -> Iterator[int]:
    """The same ids. Raises UsageError for an undefined one."""
    for symbol in ids:
        if not 0 <= symbol < len(VOCABULARY):
            raise UsageError(
                f"{symbol} is not an id (0 to {len(VOCABULARY) - 1}): remove masked positions, then decode"
            )
        yield symbol


@cache
def _byte_level() -> Tokenizer:
    byte_level = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    byte_level.decoder = decoders.ByteLevel()
    return byte_level
