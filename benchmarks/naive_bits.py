"""Bits per byte as they are often computed, against those of `bytelm eval hf:`: the error of each way, by tokenizer.

    python benchmarks/naive_bits.py TRAIN TEST               files or folders; TEST in documents of --document bytes
    python benchmarks/naive_bits.py TRAIN TEST --json

For each kind of tokenizer (1,024 tokens, trained on TRAIN) a small Llama is trained for --steps steps, and evaluated on
TEST: first in our windows, then in each of these ways. Errors are relative, in percent; below 0 the model looks better.

first left out     `model(ids, labels=ids).loss` of a document has no loss for its first token; all bytes are counted
disjoint windows   the same in windows that do not overlap: the first token of each is left out
mean times tokens  the mean of the losses of these windows times the number of tokens: a shorter window weighs as much
cut to context     what is beyond the context is truncated, and its bytes are counted
specials scored    `tokenizer(text)` with BOS and EOS around; EOS is scored too, in our windows otherwise
stripped lines     each line is a text, stripped, and in windows from its start; the bytes of the file are counted
of decoded text    our bits over the bytes of `tokenizer.decode(tokenizer(text))`: what is lost does not count, and
                   specials do
characters         our bits over characters
at most            what ours are with all that the tokenizer loses coded as well: an upper bound, and no error
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bytelm.data.convert import read
from bytelm.hf.foreign import Foreign, load_foreign, quietly
from bytelm.hf.verdict import judge_foreign
from bytelm.units import LN2, VOCAB

VOCABULARY, CONTEXT, WIDTH = 1024, 128, 96
Documents = list[tuple[str, bytes]]
PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def fast(made: Tokenizer, single: str, specials: dict[str, str]) -> Any:
    """A tokenizer that writes a text as `single` says."""
    named = {token: made.token_to_id(token) for token in dict.fromkeys(specials.values())}
    ends = [(token, symbol) for token, symbol in named.items() if token in single]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=made, **specials)


def byte_level(texts: Sequence[str]) -> Any:
    """As GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            show_progress=False, vocab_size=VOCABULARY, initial_alphabet=alphabet, special_tokens=[end]
        ),
    )
    return fast(made, "$A", {"bos_token": end, "eos_token": end})


def byte_fallback(texts: Sequence[str]) -> Any:
    """As Llama 2's."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=VOCABULARY - 259, limit_alphabet=120, max_token_length=16
    )
    learned.train_from_iterator(texts, trainer)
    found = json.loads(learned.to_str())["model"]
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *PIECES, *found["vocab"]])
    vocab, merges = {token: i for i, token in enumerate(tokens)}, [tuple(pair) for pair in found["merges"]]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return fast(made, "<s> $A", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def unigram(texts: Sequence[str]) -> Any:
    """As T5's: NFKC, white space made one space."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["</s>", "<unk>"]
    made.train_from_iterator(
        texts,
        trainers.UnigramTrainer(show_progress=False, vocab_size=VOCABULARY, special_tokens=specials, unk_token="<unk>"),
    )
    return fast(made, "$A </s>", {"eos_token": "</s>", "unk_token": "<unk>"})


def wordpiece(texts: Sequence[str]) -> Any:
    """As BERT's, without upper case."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(
        show_progress=False, vocab_size=VOCABULARY, special_tokens=specials, limit_alphabet=200
    )
    made.train_from_iterator(texts, trainer)
    return fast(made, "[CLS] $A [SEP]", {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"})


KINDS: dict[str, Callable[[Sequence[str]], Any]] = {
    "byte-level BPE (GPT-2)": byte_level,
    "BPE, byte fallback (Llama 2)": byte_fallback,
    "unigram, NFKC (T5)": unigram,
    "WordPiece, lower case (BERT)": wordpiece,
    "bytes (ByT5)": lambda texts: ByT5Tokenizer(extra_ids=0),
}


def documents(path: str, size: int, most: int) -> Documents:
    """Documents of a file or folder, in parts of about `size` bytes that end at a line."""
    found: Documents = []
    for document in read([path]):
        data = b"".join(bytes(piece) for piece in document.pieces)
        while data and len(found) < most:
            end = data.find(b"\n", size) + 1 or len(data)
            found.append((document.name, data[:end]))
            data = data[end:]
    return found


def trained(tokenizer: Any, data: Documents, steps: int) -> Any:
    """A small Llama, trained on windows of documents with what the tokenizer puts around them."""
    torch.manual_seed(0)
    shape = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
    width = max(tokenizer.get_vocab().values()) + 1
    model = LlamaForCausalLM(LlamaConfig(vocab_size=width, max_position_embeddings=2 * CONTEXT, **shape))
    opening = [symbol for symbol in (tokenizer.bos_token_id, tokenizer.eos_token_id) if symbol is not None][:1]
    rows: list[torch.Tensor] = []
    for _, text in data:
        ids = tokenizer(text.decode(), split_special_tokens=True, verbose=False)["input_ids"]
        ids = ids if ids[:1] == opening else opening + ids
        rows += [row for row in torch.tensor(ids).split(CONTEXT) if len(row) == CONTEXT]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    table = torch.stack(rows)
    for _ in range(steps):
        batch = table[torch.randint(len(table), (16,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def losses(model: Foreign, ids: Sequence[int]) -> torch.Tensor:
    """Nats of all ids but the first, as `labels=ids` has them; `[ids - 1]`."""
    row = torch.tensor([list(ids)])
    logits = model.model(input_ids=row).logits[:, :-1].double()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), row[0, 1:], reduction="none")


def naive(model: Foreign, data: Documents, ours: float) -> dict[str, float]:
    """Bits per byte of each way; `ours`: bits of all documents."""
    tokenizer, bits = model.tokens.tokenizer, dict.fromkeys(WAYS, 0.0)
    means: list[float] = []
    count = tokens = characters = decoded = 0
    for _, raw in data:
        text, ids = raw.decode(), (model.tokens.encode(raw) - VOCAB).tolist()
        full = tokenizer(text, verbose=False)["input_ids"]
        windows = [ids[at : at + CONTEXT] for at in range(0, len(ids), CONTEXT)]
        disjoint = [losses(model, window) for window in windows if len(window) > 1]
        bits["first left out"] -= float(losses(model, [*model.start.ids[:1], *ids[:1]]).sum()) / LN2
        bits["disjoint windows"] += sum(float(window.sum()) for window in disjoint) / LN2
        bits["cut to context"] += float(disjoint[0].sum()) / LN2
        for line in text.splitlines():
            if line.strip():
                own = model.tokens.ids(line.strip())
                for at in range(0, len(own), CONTEXT):
                    row = [*model.start.ids, *own[at : at + CONTEXT]]
                    bits["stripped lines"] += float(losses(model, row).sum()) / LN2
        if full[-1:] != ids[-1:]:
            bits["specials scored"] += float(losses(model, full[-CONTEXT:])[-1]) / LN2
        means += [float(window.mean()) for window in disjoint]
        count, tokens, characters = count + len(raw), tokens + len(ids), characters + len(text)
        decoded += len(tokenizer.decode(full).encode())
    bits["first left out"] += ours
    bits["specials scored"] += ours
    bits["mean times tokens"] = statistics.fmean(means) * tokens / LN2
    found = {way: total / count for way, total in bits.items()}
    return {**found, "of decoded text": ours / decoded, "characters": ours / characters}


WAYS = (
    "first left out",
    "disjoint windows",
    "mean times tokens",
    "cut to context",
    "specials scored",
    "stripped lines",
)


def row_of(kind: str, train: Documents, test: Documents, steps: int) -> dict[str, Any]:
    """One kind of tokenizer: ours, and the errors in percent."""
    tokenizer = KINDS[kind]([data.decode() for _, data in train])
    with tempfile.TemporaryDirectory() as folder, quietly():
        trained(tokenizer, train, steps).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model, _ = load_foreign(folder)
        report = judge_foreign(model, test, CONTEXT)
        ours = report.verdict.bits_per_byte
        found = {**naive(model, test, report.verdict.bits), "at most": report.bound}
    errors = {way: 100 * (bits / ours - 1) for way, bits in found.items()}
    return {"tokenizer": kind, "bits_per_byte": ours, "changed": report.survey.changed, "errors": errors}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--document", type=int, default=2000)
    parser.add_argument("--documents", type=int, default=40)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    train, test = documents(asked.train, 20000, 50), documents(asked.test, asked.document, asked.documents)
    rows = [row_of(kind, train, test, asked.steps) for kind in asked.kinds]
    if asked.json:
        print(json.dumps({"bytes": sum(len(data) for _, data in test), "documents": len(test), "rows": rows}, indent=1))
        return 0
    print("| | " + " | ".join(row["tokenizer"] for row in rows) + " |")
    print("|---" * (len(rows) + 1) + "|")
    print("| bits per byte | " + " | ".join(f"{row['bits_per_byte']:.3f}" for row in rows) + " |")
    for way in rows[0]["errors"]:
        print(f"| {way} | " + " | ".join(f"{row['errors'][way]:+.1f} %" for row in rows) + " |")
    changed = " | ".join(f"{row['changed']} of {len(test)}" for row in rows)
    print(f"| documents that do not come back | {changed} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
