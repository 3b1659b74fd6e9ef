"""Bits per byte as they are often computed, against those of `bytelm eval hf:`: the error of each way, by tokenizer.

    python benchmarks/naive_bits.py TRAIN TEST                          files or folders of UTF-8
    python benchmarks/naive_bits.py TRAIN TEST --vocabulary 8192        as many tokens, for texts of many characters
    python benchmarks/naive_bits.py TRAIN TEST --document 2000 0        parts of 2,000 bytes, and single lines
    python benchmarks/naive_bits.py TRAIN TEST --json

For each kind of tokenizer and each seed a small Llama is trained for --steps steps on 1.5 MB of TRAIN, with a tokenizer
trained on the same text, and evaluated on documents of TEST: first in our windows, then in each of the ways that
`naive_ways.py` describes. Errors are relative, in percent, as mean and standard deviation over seeds; below 0 the model
looks better than it is. A seed draws other parts of TRAIN and TEST, other weights and other windows.

The last rows are no errors: `at most` is what ours are with all that the tokenizer loses coded as well, an upper bound.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
from naive_ways import BITS, BYTES, Case, Documents, errors
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bytelm.data.convert import read
from bytelm.hf.foreign import load_foreign, quietly
from bytelm.hf.verdict import judge_foreign

WIDTH, BATCH = 96, 8
PART, PARTS = 2000, 750  # bytes of a document that is trained on, and their number
PIECES = [f"<0x{byte:02X}>" for byte in range(256)]


def fast(made: Tokenizer, single: str, specials: dict[str, str]) -> Any:
    """A tokenizer that writes a text as `single` says."""
    named = {token: made.token_to_id(token) for token in dict.fromkeys(specials.values())}
    ends = [(token, symbol) for token, symbol in named.items() if token in single]
    made.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=made, **specials)


def byte_level(texts: Sequence[str], size: int) -> Any:
    """As GPT-2's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, end = pre_tokenizers.ByteLevel.alphabet(), "<|endoftext|>"
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(show_progress=False, vocab_size=size, initial_alphabet=alphabet, special_tokens=[end]),
    )
    return fast(made, "$A", {"bos_token": end, "eos_token": end})


def byte_fallback(texts: Sequence[str], size: int) -> Any:
    """As Llama 2's: characters without a token are bytes."""
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        show_progress=False, vocab_size=size - 259, limit_alphabet=size // 8, max_token_length=16
    )
    learned.train_from_iterator(texts, trainer)
    found = json.loads(learned.to_str())["model"]
    tokens = dict.fromkeys(["<unk>", "<s>", "</s>", *PIECES, *found["vocab"]])
    vocab, merges = {token: i for i, token in enumerate(tokens)}, [tuple(pair) for pair in found["merges"]]
    made = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return fast(made, "<s> $A", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def unigram(texts: Sequence[str], size: int) -> Any:
    """As T5's: NFKC, white space made one space."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    specials = ["</s>", "<unk>"]
    made.train_from_iterator(
        texts,
        trainers.UnigramTrainer(show_progress=False, vocab_size=size, special_tokens=specials, unk_token="<unk>"),
    )
    return fast(made, "$A </s>", {"eos_token": "</s>", "unk_token": "<unk>"})


def wordpiece(texts: Sequence[str], size: int) -> Any:
    """As BERT's, without upper case."""
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    specials = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(
        show_progress=False, vocab_size=size, special_tokens=specials, limit_alphabet=size // 4
    )
    made.train_from_iterator(texts, trainer)
    return fast(made, "[CLS] $A [SEP]", {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"})


KINDS: dict[str, Callable[[Sequence[str], int], Any]] = {
    "byte-level BPE (GPT-2)": byte_level,
    "BPE, byte fallback (Llama 2)": byte_fallback,
    "unigram, NFKC (T5)": unigram,
    "WordPiece, lower case (BERT)": wordpiece,
    "bytes (ByT5)": lambda texts, size: ByT5Tokenizer(extra_ids=0),
}


def documents(path: str, size: int, most: int, seed: int) -> Documents:
    """About `most` bytes of files or a folder: parts of `size` bytes and more that end at a line, evenly spaced.

    A `size` of 0 gives lines. Parts without a letter are left out, and a seed takes others.
    """
    found: Documents = []
    for document in read([path]):
        data, at = b"".join(bytes(piece) for piece in document.pieces), 0
        while at < len(data):
            end = data.find(b"\n", at + size) + 1 or len(data)
            if data[at:end].strip():
                found.append((document.name, data[at:end]))
            at = end
    if not found:
        return []
    mean = statistics.fmean(len(data) for _, data in found)
    count = min(len(found), max(1, round(most / mean)))
    shift = seed * (math.sqrt(5) - 1) / 2 % 1
    return [found[int((at + shift) * len(found) / count)] for at in range(count)]


def packed(tokenizer: Any, data: Documents) -> tuple[torch.Tensor, int]:
    """What the tokenizer makes of documents, each between its specials, one after another; and tokens without those."""
    ids: list[int] = []
    count = 0
    opening, end = (tokenizer.bos_token_id, tokenizer.cls_token_id), (tokenizer.eos_token_id, tokenizer.sep_token_id)
    before, after = ([symbol for symbol in some if symbol is not None][:1] for some in (opening, end))
    before = [] if before == after else before  # GPT-2's separates documents
    ids += after
    for _, text in data:
        own = tokenizer(text.decode(), add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
        ids += [*before, *own, *after]
        count += len(own)
    return torch.tensor(ids), count


def trained(width: int, stream: torch.Tensor, steps: int, context: int, seed: int) -> Any:
    """A small Llama of `width` ids, trained on windows of a stream."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "vocab_size": width, "max_position_embeddings": 2 * context}
    model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(steps):
        begins = torch.randint(len(stream) - context, (BATCH,))
        batch = torch.stack([stream[at : at + context] for at in begins.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def rows_of(kind: str, asked: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """One kind of tokenizer, one seed: ours and the errors in percent, for each size of documents."""
    train = documents(asked.train, PART, PART * PARTS, seed)
    tokenizer = KINDS[kind]([data.decode() for _, data in train], asked.vocabulary)
    stream, count = packed(tokenizer, train)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, quietly():
        width = max(tokenizer.get_vocab().values()) + 1
        trained(width, stream, asked.steps, asked.context, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        model, _ = load_foreign(folder)
        for size in asked.document:
            data = documents(asked.test, size, asked.bytes, seed)
            report = judge_foreign(model, data, asked.context)
            ours = report.verdict.bits_per_byte
            found = errors(Case(model, data, asked.context, count / sum(len(text) for _, text in train)))
            found["at most"] = 100 * (report.bound / ours - 1)
            row = {"tokenizer": kind, "seed": seed, "document": size, "documents": len(data)}
            row |= {"bytes": report.verdict.bytes, "tokens": report.survey.tokens, "bits_per_byte": ours}
            rows.append(row | {"changed": report.survey.changed, "errors": found})
    return rows


def spread(found: Sequence[float | None], digits: int, sign: str = "") -> str:
    """Mean and standard deviation; a dash for what some do not have."""
    values = [value for value in found if value is not None]
    if len(values) < len(found):
        return "–"
    mean = f"{statistics.fmean(values):{sign}.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of a table in Markdown of the rows of one size of documents: errors in percent."""
    kinds = list(dict.fromkeys(row["tokenizer"] for row in rows))
    of = [[row for row in rows if row["tokenizer"] == kind] for kind in kinds]

    def line(name: str, cells: Sequence[str]) -> str:
        return f"| {name} | " + " | ".join(cells) + " |"

    lines = [line("", kinds), "|---" * (len(kinds) + 1) + "|"]
    lines.append(line("bits per byte", [spread([row["bits_per_byte"] for row in some], 3) for some in of]))
    for way in (*BITS, *BYTES, "at most"):
        lines.append(line(way, [spread([row["errors"][way] for row in some], 1, "+") for some in of]))
    per_token = [spread([row["bytes"] / row["tokens"] for row in some], 2) for some in of]
    lines.append(line("bytes per token", per_token))
    changed = [f"{sum(row['changed'] for row in some)} of {sum(row['documents'] for row in some)}" for some in of]
    return [*lines, line("documents that do not come back", changed)]


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train")
    parser.add_argument("test")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens, specials included")
    parser.add_argument("--context", type=int, default=128, help="tokens of a window, in training and evaluation")
    parser.add_argument("--document", type=int, nargs="+", default=[2000], help="bytes of a test document; 0: a line")
    parser.add_argument("--bytes", type=int, default=120_000, help="bytes to evaluate on")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--json", action="store_true", help="a line of JSON for each model and size of documents")
    asked = parser.parse_args(words)
    rows: list[dict[str, Any]] = []
    for seed in range(asked.seeds):
        for kind in asked.kinds:
            rows += rows_of(kind, asked, seed)
            if asked.json:
                print("\n".join(map(json.dumps, rows[-len(asked.document) :])), flush=True)
    if asked.json:
        return 0
    for size in asked.document:
        some = [row for row in rows if row["document"] == size]
        counts = sorted({row["documents"] for row in some})
        print(f"\n{' or '.join(map(str, counts))} documents of {f'{size} bytes and more' if size else 'one line'}\n")
        print("\n".join(table(some)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
