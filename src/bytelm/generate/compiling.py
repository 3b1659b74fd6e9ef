"""Grammars compiled by llguidance, over single bytes, within limits.

Run as a program it compiles the grammar on its standard input, and says what is wrong with it in one line. Some short
grammars overflow llguidance's stack, which ends the process, or keep it busy for minutes, which nothing interrupts: so
`generate.grammar` tries each in a process of its own first. It imports neither torch nor bytelm: it starts in 0.1 s.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

SPECIALS = (b"<pad>", b"<bos>", b"<eos>", b"<reserved>")  # ids 256 to 259, as in `bytelm.units`
EOS = 258
CPU_SECONDS = 2
MEMORY = 1 << 30  # bytes of address space
STACK = 2 << 20  # bytes: a quarter of what a thread of the server has
# Of a step, some ms each, and of the memory of a row (a state takes about 0.5 kB). They do not depend on the machine.
LIMITS = LLParserLimits(
    max_items_in_row=1000,
    step_max_items=20_000,
    max_lexer_states=100_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class _Bytes:
    """What llguidance asks of a tokenizer: here an id is a byte."""

    eos_token_id = EOS
    bos_token_id = 257
    tokens: Sequence[bytes] = (*(bytes([byte]) for byte in range(256)), *SPECIALS)
    special_token_ids = (256, 257, 258, 259)

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()), n_vocab=256 + len(SPECIALS), slices=[])


def compiled(grammar: str) -> LLMatcher:
    """The matcher of a grammar, before its first byte. Raises ValueError for one that cannot be used, in one line."""
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0, limits=LIMITS)
    mask = b"" if matcher.is_error() else matcher.compute_bitmask()  # which finds more errors
    if matcher.is_error() or not (any(mask[:32]) or matcher.is_accepting()):
        raise ValueError(shortened(matcher.get_error()))
    return matcher


def shortened(message: str) -> str:
    """A message of llguidance in one line, without its excerpt of a grammar that nobody wrote."""
    if "NoExtension" in message or not message:
        return "no text satisfies it"
    lines = [line.strip() for line in message.splitlines()]
    said = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    return said.split("(in regex): ")[-1][:200]


def limit() -> None:
    """Limit this process, where the system can, and let others go first."""
    try:
        import resource

        os.nice(10)
    except ImportError:  # Windows
        return
    for what, most in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_STACK, STACK),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    limit()
    try:
        compiled(sys.stdin.buffer.read().decode())
    except ValueError as wrong:
        print(wrong)
