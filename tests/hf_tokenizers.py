"""Tokenizers of every kind, made on the spot, each with a tiny causal model of transformers in one folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what these import in turn
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from bytelm.hf.foreign import quietly

TEXT = (
    'the quick brown fox jumps over the lazy dog. a naïve café, déjà vu; she said: "where is it?" and it was there.\n'
    "one two three four five six seven eight nine ten, 1234567890 and more of them than anybody had counted before.\n"
)
PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def trained(vocabulary: int, before: Any, normalizer: Any = None, alphabet: list[str] | None = None) -> dict[str, Any]:
    """A BPE of TEXT, as JSON: vocab and merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = before
    if normalizer is not None:
        made.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet or [], show_progress=False)
    made.train_from_iterator([TEXT], trainer)
    return json.loads(made.to_str())["model"]


def bpe(found: dict[str, Any], first: list[str], **options: Any) -> Tokenizer:
    """A tokenizer of some tokens, and then those of a trained BPE."""
    vocab = {token: i for i, token in enumerate(dict.fromkeys([*first, *found["vocab"]]))}
    return Tokenizer(models.BPE(vocab, [(left, right) for left, right in found["merges"]], **options))


def fast(made: Tokenizer, **specials: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=made, **specials)


def byte_level(normalizer: Any = None, space: bool = False) -> Any:
    """As GPT-2's: any byte is a token, BOS is EOS, and none is added."""
    before = pre_tokenizers.ByteLevel(add_prefix_space=space)
    made = bpe(trained(320, before, alphabet=pre_tokenizers.ByteLevel.alphabet()), ["<|endoftext|>"])
    made.pre_tokenizer, made.decoder = before, decoders.ByteLevel()
    if normalizer is not None:
        made.normalizer = normalizer
    return fast(made, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>")


def byte_fallback() -> Any:
    """As Llama 2's: a space goes in front, bytes stand for unknown characters, and BOS is added."""
    normal = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    words = pre_tokenizers.Split("▁", "merged_with_next")
    found = trained(120, words, normal)
    made = bpe(found, ["<unk>", "<s>", "</s>", *PIECES], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made.normalizer = normal
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unknowns() -> Any:
    """A BPE without bytes: what it has no letter for is unknown."""
    made = bpe(trained(120, pre_tokenizers.Metaspace()), ["[UNK]", "</s>"], unk_token="[UNK]")
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return fast(made, eos_token="</s>", unk_token="[UNK]")


def pieces(first: list[str]) -> list[tuple[str, float]]:
    words = sorted({f"▁{word}" for word in TEXT.split()})
    letters = sorted({*TEXT, *"▁<>/[]0ABCDEFx"} - {" ", "\n"})
    return [(token, 0.0) for token in first] + [(token, -8.0 - len(token) / 4) for token in [*words, *letters]]


def unigram() -> Any:
    """As T5's: NFKC, white space made one space, unknown characters, EOS added."""
    made = Tokenizer(models.Unigram(pieces(["<pad>", "</s>", "<unk>"]), unk_id=2))
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return fast(made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def sentencepiece() -> Any:
    """As Gemma's or Llama's unigrams: a dummy prefix, bytes for what is unknown, BOS added."""
    scored = pieces(["<unk>", "<s>", "</s>"]) + [(piece, -20.0) for piece in PIECES]
    made = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return fast(made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> Any:
    """As BERT's: lower case, no accents, no white space; [CLS] and [SEP] around."""
    words = sorted({*TEXT.lower().replace("ï", "i").replace("é", "e").replace("à", "a").split()})
    letters = sorted({c for c in TEXT.lower() if c.isascii() and not c.isspace()})
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), *words]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    made = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    made.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return fast(made, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def added() -> Any:
    """Byte-level, with a special token added, and one that is not special."""
    made = byte_level()
    made.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    made.add_tokens([AddedToken("<think>", special=False)])
    return made


def nothing_before() -> Any:
    """Byte-level without a BOS or an EOS."""
    made = byte_level().backend_tokenizer
    return fast(made)


KINDS: dict[str, Callable[[], Any]] = {
    "byte-level BPE": byte_level,
    "byte-level BPE, a space added": lambda: byte_level(space=True),
    "BPE with byte fallback": byte_fallback,
    "BPE with unknown tokens": unknowns,
    "unigram, NFKC": unigram,
    "unigram with bytes and a dummy prefix": sentencepiece,
    "WordPiece, lower case": wordpiece,
    "bytes": lambda: ByT5Tokenizer(extra_ids=0),
    "byte-level BPE, line ends normalized": lambda: byte_level(normalizers.Replace("\r\n", "\n")),
    "byte-level BPE, tokens added": added,
    "byte-level BPE, no BOS": nothing_before,
}


def llama(width: int, positions: int = 64, uniform: bool = False) -> Any:
    """A few thousand random parameters; `uniform`: each id has the same probability."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=width, max_position_embeddings=positions, initializer_range=0.5, **shape)
    model = LlamaForCausalLM(config).eval()
    if uniform:
        torch.nn.init.zeros_(model.lm_head.weight)
    return model


def saved(folder: Path, tokenizer: Any, model: Any = None, **how: Any) -> str:
    """A folder of both, as hf:FOLDER. The model is as wide as the tokenizer needs."""
    width = max(tokenizer.get_vocab().values()) + 1
    with quietly():
        (llama(width, **how) if model is None else model).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return f"hf:{folder}"
