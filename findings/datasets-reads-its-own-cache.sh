#!/usr/bin/env bash
# One would guess that load_dataset refuses, or reads as load_from_disk does, a folder that save_to_disk wrote.
# Of one Dataset it refuses. Of a DatasetDict it works, and gives other rows: load_from_disk reads the files that
# state.json names, load_dataset every .arrow file that is there, and map() after load_from_disk has put
# cache-….arrow beside the data. So rows come twice, once mapped and once not, without a warning.
# And the name of a folder is a pattern to it: where a folder "run[1]" is there, load_dataset("./run[1]") reads the
# folder run1 instead.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HUB_OFFLINE=1 HF_DATASETS_CACHE="$folder/cache" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import pathlib

import datasets

datasets.disable_progress_bars()
print("datasets", datasets.__version__)
rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
datasets.DatasetDict({"train": rows}).save_to_disk("saved")
loaded = datasets.load_from_disk("saved")["train"]
loaded.map(lambda row: {"text": row["text"].upper()})
after = [row["text"] for row in datasets.load_dataset("./saved", split="train", streaming=True)]
print("load_from_disk:", loaded["text"][:], "load_dataset:", after)
assert loaded["text"][:] == ["a", "b"] and sorted(after) == ["A", "B", "a", "b"], "the behaviour changed"

for name in ("run1", "run[1]"):
    pathlib.Path(name).mkdir()
    pathlib.Path(name, "train.jsonl").write_text('{"text": "%s"}\n' % name)
found = [row["text"] for row in datasets.load_dataset("./run[1]", split="train", streaming=True)]
print("./run[1]:", found)
assert found == ["run1"], "the behaviour changed"
PYTHON
