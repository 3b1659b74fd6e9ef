"""`bytelm eval hf:MODEL`: models of transformers, in windows of their own tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from bytelm.cli.common import counter, print_json, print_verdict
from bytelm.errors import UsageError

if TYPE_CHECKING:
    from bytelm.hf.verdict import ForeignReport


def evaluate_foreign(
    name: str,
    documents: Callable[[], Sequence[tuple[str, bytes]]] | None,
    context: int | None,
    stride: int | None,
    precision: Literal["float32", "bfloat16"],
    prove: bool,
    device: str,
    quiet: bool,
    json: bool,
    **other: Any,
) -> int:
    """Print the bits per byte of a model of transformers on documents. Raises UsageError for any `other` option."""
    for option, given in other.items():
        if given is not None:
            raise UsageError(f"--{option} applies to runs only: leave it out with {name}")
    if documents is None:
        raise UsageError(f"{name} has no test split here: name the files to evaluate it on")
    from bytelm.device import use
    from bytelm.hf.foreign import load_foreign
    from bytelm.hf.verdict import judge_foreign

    model, _ = load_foreign(name, use(device))
    window, found = model.context(context), documents()
    progress = counter("evaluating", sum(len(data) for _, data in found), quiet or json)
    report = judge_foreign(model, found, window, stride, proved=prove, precision=precision, progress=progress)
    if json:
        print_json(report.mapping())
    else:
        print_report(report)
    return 0


def print_report(report: ForeignReport) -> None:
    """The verdict, and under it what was lost of the files."""
    verdict, survey = report.verdict, report.survey
    print_verdict(verdict)
    start = " ".join(report.start) or f"nothing, and the first token is one of {report.vocabulary:,}"
    print(
        f"{report.tokenizer}: {survey.tokens:,} tokens, {verdict.bytes / max(1, survey.tokens):.2f} bytes per token; "
        f"context and stride are in tokens; before {'every window' if report.every_window else 'a document'}: {start}"
    )
    if survey.special_tokens:
        print(f"{survey.special_tokens:,} tokens are special ones that this tokenizer reads in plain text")
    lost = survey.lines(verdict.documents, report.bound, verdict.unit)
    print("\n".join(lost or ["exact: the tokens give back every byte of the files"]))
    if report.proof is not None:
        proof = report.proof
        print(
            f"proved: {proof.bytes:,} bytes were coded in {proof.coded_bits:,} bits (measured: {proof.bits:,.1f}), "
            "decoded, and came back byte for byte"
        )
    sys.stdout.flush()
