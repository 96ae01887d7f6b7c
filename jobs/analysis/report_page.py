"""report.html: one file with everything in it, which no text of a row can turn into anything but text."""

import base64
import hashlib
import json
from importlib.resources import files
from typing import Any

_UNSAFE = {ord(character): f"\\u{ord(character):04x}" for character in "<>&\u2028\u2029"}
"""Characters that could end a script element, or a line of one, wherever they stand in its JSON."""

_PARTS = ("report.css", "plots.js", "report.js")


def page(data: dict[str, Any]) -> bytes:
    """The whole document. Its script and style are ours and allowed by their hashes; nothing else may load or run.

    `data` stands in it as JSON that the browser does not execute; the script puts texts of it into the page as text.
    """
    folder = files("jobs.analysis") / "report"
    style, plots, report = ((folder / name).read_text(encoding="utf-8") for name in _PARTS)
    script = plots + report
    policy = (
        f"default-src 'none'; script-src {_source(script)}; style-src {_source(style)}; "
        "base-uri 'none'; form-action 'none'"
    )
    content = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_UNSAFE)
    return (
        "<!DOCTYPE html>\n"
        '<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>nanovllm report</title>\n<style>{style}</style>\n</head>\n<body>\n"
        '<main id="report"><noscript>This report draws itself with a script.</noscript></main>\n'
        f'<script type="application/json" id="data">{content}</script>\n'
        f"<script>{script}</script>\n</body>\n</html>\n"
    ).encode()


def _source(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
