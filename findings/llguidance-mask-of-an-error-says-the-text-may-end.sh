#!/usr/bin/env bash
# A matcher of llguidance that has met an error (a token that the grammar does not allow, a limit that was reached)
# raises nothing. Its next mask is not empty, either: it allows one token, the end of the text. A loop that takes the
# allowed token and stops there has, by its own measure, a text that ended as its grammar wants, cut anywhere:
# here {"a": of an object whose closing brace is missing. is_error() says so, and is_accepting() that nothing is complete.
# Why it matters: a server that trusts the mask answers "finish_reason": "stop" with half a JSON. Ask is_accepting()
# before an end is believed, and is_error() after every token.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q llguidance==1.9.1 numpy==2.4.6
cat > show.py <<'PY'
from importlib.metadata import version

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

END = 256


class Bytes:
    eos_token_id = bos_token_id = END
    tokens = [bytes([byte]) for byte in range(256)] + [b"</s>"]
    special_token_ids = [END]

    def __call__(self, text):
        return list(text.encode() if isinstance(text, str) else text)


tokenizer = LLTokenizer(TokenizerWrapper(Bytes()), n_vocab=257)
schema = '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}'
matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema))


def allowed():
    bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
    return np.flatnonzero(bits[:257]).tolist()


fine = [matcher.consume_token(byte) for byte in b'{"a":']
before, end = END in allowed(), matcher.is_accepting()
wrong = matcher.consume_token(ord("x"))
after = allowed()
print(f"llguidance {version('llguidance')}, after {{\"a\": may the text end? {before}; complete: {end}")
print(f"consume_token('x') gives {wrong}; allowed now: {after} (the end is {END})")
print(f"is_error {matcher.is_error()}, is_accepting {matcher.is_accepting()}")
seen = (all(fine), before, bool(wrong), after, matcher.is_error(), matcher.is_accepting())
raise SystemExit(0 if seen == (True, False, False, [END], True, False) else 1)
PY
venv/bin/python show.py
