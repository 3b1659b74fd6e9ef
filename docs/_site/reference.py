"""Reference pages generated from the program: commands, configuration, presets."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Any

from bytelm.cli import app
from bytelm.config import preset_names, to_mapping
from bytelm.find import find, names
from bytelm.training import settings
from bytelm.training.config import DataConfig, RunConfig, TrainConfig

TABLES = {"models": "model", "patching": "patching", "entropy_models": "entropy_model", "data.modalities": "modality"}
CONTENTS = re.compile(r"## Table of Contents\n.*?(?=\*\*Commands)", re.DOTALL)
EXAMPLES = re.compile(r"(?:^Example: .*\n)+", re.MULTILINE)


def made(page: str) -> str:
    """The generated part of a page; empty for most."""
    makers = {"cli": commands, "configuration": configuration, "presets": presets}
    maker = makers.get(page.removeprefix("reference/").removesuffix(".md"))
    return "" if maker is None else f"\n{maker()}"


def commands() -> str:
    """Every command with its options."""
    text = CONTENTS.sub("", app.generate_docs().removeprefix("# bytelm\n"))
    return EXAMPLES.sub(lambda found: f"```sh\n{found[0].replace('Example: ', '')}```\n", text)


def configuration() -> str:
    """Every table with its keys: type, default and description."""
    parts = [
        f"## The complete configuration\n\n{inspect.getdoc(RunConfig)}\n",
        table("data", DataConfig),
        table("train, entropy_model_train", TrainConfig),
    ]
    for kind, key in TABLES.items():
        for name in names(kind):
            parts.append(table(key, find(kind, name).Config, name))
    return "\n".join(parts)


def table(key: str, config: Any, name: str | None = None) -> str:
    """One table of the configuration."""
    title = f"## [{key}]" if name is None else f'## [{key}] name = "{name}"'
    defaults, rows = to_mapping(config()), ["| key | type | default |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        rows.append(f"| `{field.name}` | `{field.type}` | `{json.dumps(defaults[field.name])}` |")
    return "\n".join([title, "", inspect.getdoc(config) or "", "", *rows, ""])


def presets() -> str:
    """The presets with their sizes."""
    head, lines = settings.table([settings.describe(name) for name in preset_names()])
    rows = [head, ["---"] * len(head), *lines]
    for row in rows[2:]:
        row[0] = f"`{row[0]}`"
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"
