"""The chat page at `/`: one document without anything from elsewhere, so that it works without the internet.

The page's policy lets it run its own script and talk to its own server only.
"""

from __future__ import annotations

import base64
import hashlib
import html
from importlib import resources

__all__ = ["PAGE_HEADERS", "page"]

_TEMPLATE = resources.files("serving.language").joinpath("page.html").read_text(encoding="utf-8")


def _digest(tag: str) -> str:
    """The policy's name for the one inline element of this tag."""
    text = _TEMPLATE.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


PAGE_HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_digest('script')}; style-src {_digest('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


def page(model: str, digest: str) -> str:
    """The document for a model.

    Args:
        model: its name in the API.
        digest: of the artifact.
    """
    return _TEMPLATE.replace("@MODEL@", html.escape(model)).replace("@DIGEST@", html.escape(digest))
