"""Constraints that a request asks for, compiled beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from bytelm.errors import UsageError
from bytelm.generate.constraint import Constraint
from bytelm.serve.schema import ResponseFormat, Shared


async def of(body: Shared) -> Callable[[], Constraint] | None:
    """What makes the constraint of each sequence; None for free output. Raises UsageError, MissingExtraError."""
    asked = body.response_format
    if asked is None or asked.type == "text":
        return None
    return (await asyncio.to_thread(compiled, asked)).constraint


def compiled(asked: ResponseFormat) -> Any:
    """The grammar of a response format."""
    from bytelm.generate import grammar

    if asked.type == "json_object":
        return grammar.json_object()
    if asked.type == "regex":
        return grammar.regex(asked.regex or "")
    if asked.type == "grammar":
        return grammar.lark(asked.grammar or "")
    given = asked.json_schema or {}
    schema = given.get("schema", given)  # OpenAI wraps a schema with its name
    if not isinstance(schema, dict):
        raise UsageError("response_format.json_schema.schema is no JSON object: give a schema")
    return grammar.json_schema(schema)
