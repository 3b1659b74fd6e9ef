"""The page of the server: one document that holds its style and its script, and asks the API of its own origin only."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

STYLE = '<link rel="stylesheet" href="page.css">'
SCRIPT = '<script type="module" src="page.js"></script>'


@dataclass(frozen=True)
class Document:
    """The bytes of the page, and the Content-Security-Policy that it is to be sent with."""

    body: bytes
    policy: str


@cache
def document() -> Document:
    """The page, read from the package once.

    The policy allows this very script and style, requests to the page's own origin, and pictures and sounds that the
    script made; nothing can be made into HTML (trusted types).
    """
    folder = files("bytelm.serve") / "page"
    page, style, script = (
        (folder / name).read_text(encoding="utf-8") for name in ("index.html", "page.css", "page.js")
    )
    body = page.replace(STYLE, f"<style>{style}</style>").replace(SCRIPT, f'<script type="module">{script}</script>')
    policy = (
        "default-src 'none'",
        f"script-src {_digest(script)}",
        f"style-src {_digest(style)}",
        "connect-src 'self'",
        "img-src blob: data:",
        "media-src blob:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
    return Document(body.encode(), "; ".join(policy))


def _digest(text: str) -> str:
    """What a policy calls an inline element of this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
