"""One self-contained HTML page: a template with its data inside, so that it needs no network, library or server."""

import html
import json
import re
from pathlib import Path
from typing import Any

from quire import files


def write_page(path: Path, template: str, title: str, data: dict[str, Any]) -> None:
    """Write `template`, a file of this folder, with __TITLE__ replaced by the title and __DATA__ by the data as JSON.

    A script that the template names by `src` stands in the page itself. Text of any kind goes in as JSON without a
    "<", and comes out of it as text alone.
    """
    # Where JSON stands in a script element, "<" could end it; elsewhere in JSON it cannot occur but in a string.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    folder = Path(__file__).parent

    def script(found: re.Match[str]) -> str:
        return f"<script>\n{(folder / found[1]).read_text(encoding='utf-8')}</script>"

    page = re.sub(r'<script src="(\w+\.js)"></script>', script, (folder / template).read_text(encoding="utf-8"))
    before, after = page.split("__DATA__")
    files.write_text(path, before.replace("__TITLE__", html.escape(title)) + text + after)
