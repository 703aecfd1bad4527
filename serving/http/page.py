"""Web pages of one document each: nothing comes from elsewhere, so they work without the internet.

The policy admits the page's own style and script by their digests, its own server, and nothing else.
"""

from __future__ import annotations

import base64
import hashlib

__all__ = ["page_headers"]


def page_headers(html: str, *, images: str = "data:", cache: str = "no-store") -> dict[str, str]:
    """The headers of a page.

    Args:
        html: with one inline `<style>` and one inline `<script>`.
        images: sources that pictures may come from.
        cache: the value of Cache-Control.
    """

    def digest(tag: str) -> str:
        text = html.split(f"<{tag}>", 1)[1].split(f"</{tag}>", 1)[0]
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; img-src {images}; "
            "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": cache,
    }  # fmt: skip
