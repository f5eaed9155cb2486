"""The page at `/`: one file that needs no network; its policy allows no script but its own, by hash."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources

_SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
_STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)


@dataclass(frozen=True)
class Page:
    html: str
    headers: dict[str, str]


def load_page() -> Page:
    html = (resources.files("vtengine.server") / "page.html").read_text(encoding="utf-8")
    scripts, styles = (" ".join(f"'{_hash(text)}'" for text in kind.findall(html)) for kind in (_SCRIPT, _STYLE))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return Page(html, headers)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
