"""Conversations as bytes: a template makes the prompt of messages.

The default, for models that were trained on plain text (there is no special id in it; any model can read it):

    System: Be brief.⏎⏎User: Hello⏎⏎Assistant: Hi.⏎⏎User: How are you?⏎⏎Assistant:␠

A model that was trained on another form of conversation needs its template: `--chat-template FILE`, in Jinja, which is
given `messages`, a list of mappings with `role` and `content`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bytelm.errors import DataError, UsageError
from bytelm.serve.schema import Message, encoded

DEFAULT = "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}Assistant: "
STOP = b"\n\nUser:"
"""What ends an answer by the default template, beside EOS."""


class Template:
    """Makes prompts of conversations."""

    def __init__(self, source: str | None = None) -> None:
        self.stop = (STOP,) if source is None else ()
        environment = ImmutableSandboxedEnvironment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
        self.template = environment.from_string(DEFAULT if source is None else source)

    @classmethod
    def read(cls, path: Path | None) -> Template:
        """The template of a file, or the default. Raises DataError for one that cannot be read or parsed."""
        try:
            return cls(None if path is None else path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"chat template {path}: {error}") from None
        except jinja2.TemplateError as error:
            raise DataError(f"chat template {path}: {error}: it is no Jinja") from None

    def prompt(self, messages: Sequence[Message]) -> bytes:
        """The prompt of a conversation. Raises UsageError for messages that the template cannot take."""
        given = [{"role": message.role, "content": message.text} for message in messages]
        try:
            return encoded("messages", self.template.render(messages=given))
        except jinja2.TemplateError as error:
            raise UsageError(f"messages do not fit the chat template: {error}") from None
