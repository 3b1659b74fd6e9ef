#!/usr/bin/env bash
# A column of strings in JSON lines stays a column of strings, one would think: JSON has no dates.
# datasets (by pyarrow's JSON reader) makes timestamps of it where every string of the column looks like an ISO date,
# so that a line "2024-01-02" comes back as a datetime and prints as "2024-01-02 00:00:00"; "2024-01-02T03:04:05Z"
# loses its T and its Z. One line of another form anywhere in the column, and all are strings again.
# It matters for logs, diaries and test sets: a text that is measured or learnt from is not the text of the file, and
# which one it is hangs on its neighbours. Parquet, or plain text read line by line, keeps the strings.
set -euo pipefail
cd "$(mktemp -d)"
trap 'rm -rf "$PWD"' EXIT
python3 -m venv venv
venv/bin/pip install -q datasets==5.2.0 pyarrow==25.0.0
cat > show.py <<'PY'
import json
import logging

import datasets
import pyarrow

datasets.disable_progress_bars()
logging.disable()
DATES = ["2024-01-02", "2024-01-03"]
TIMES = ["2024-01-02T03:04:05Z", "2024-01-03T03:04:05Z"]


def read(name: str, texts: list[str]) -> datasets.Dataset:
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    return datasets.load_dataset("json", data_files=f"{name}.jsonl", split="train", cache_dir="cache")


print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__)
for name, texts in (("dates", DATES), ("times", TIMES)):
    found = read(name, texts)
    print(repr(texts[0]), "->", found.features["text"], repr(str(found[0]["text"])))
    assert found.features["text"].dtype.startswith("timestamp"), "strings stay strings by now"
    assert str(found[0]["text"]) != texts[0]
mixed = read("mixed", [*DATES, "a line of text"])
print("and with one other line in the file:", mixed.features["text"], repr(mixed[0]["text"]))
assert mixed[0]["text"] == DATES[0]
PY
HF_HUB_OFFLINE=1 HF_HOME="$PWD/home" venv/bin/python show.py
