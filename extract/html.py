"""Pages that are one file and load nothing: escaping, data and a security policy for what is put into a template."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from importlib.resources import files

from whisper_at_cli import __version__


def escape(value: object) -> str:
    """Text for an element or a quoted attribute."""
    return html.escape(str(value), quote=True)


def to_json(value: object, *, indent: int | None = None) -> str:
    """Strict JSON: NaN and infinities, which it does not have, are null; NumPy's numbers are numbers."""
    separators = (",", ":") if indent is None else None
    return json.dumps(_finite(value), ensure_ascii=False, allow_nan=False, indent=indent, separators=separators)


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def data_block(name: str, value: object) -> str:
    """A script element that holds data, for a page's own script to read; nothing in it can end it."""
    text = to_json(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<script type="application/json" id="{escape(name)}">{text}</script>'


def template(package: str, name: str) -> str:
    """A file from the folder `templates` of a room."""
    return files(package).joinpath("templates", name).read_text(encoding="utf-8")


def fill(text: str, parts: dict[str, str]) -> str:
    """Puts parts of HTML at the places that are marked {{name}}. A part is not searched for places."""
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], text)


def document(*, title: str, body: str, style: str, script: str, media: bool = False) -> str:
    """A whole page. Its policy lets this style and this script run and nothing be fetched, but audio with `media`."""
    style, script = f"\n{style}", f"\n{script}"
    policy = [
        "default-src 'none'", f"script-src '{_digest(script)}'", f"style-src '{_digest(style)}'", "img-src data:",
        "base-uri 'none'", "form-action 'none'",
    ]  # fmt: skip
    if media:
        policy.append("media-src 'self' data: blob: file:")
    return fill(
        template("whisper_at_cli.extract", "document.html"),
        {
            "title": escape(title), "policy": escape("; ".join(policy)), "style": style, "body": body,
            "script": script, "version": escape(__version__),
        },
    )  # fmt: skip


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
