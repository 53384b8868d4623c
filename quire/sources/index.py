"""The package index: archives are found as pip would find them, but pip does not download them.

pip would run a source package's build code.
"""

import ast
import html.parser
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
import urllib.request
from base64 import b64encode
from pathlib import Path

from quire.sources.transfer import TIMEOUT, Progress, chunks, tls_context, transfer

PAGE_LIMIT = 64 << 20  # bytes of a package's page on the index


def pip_settings() -> dict[str, str]:
    """What pip is configured with, by option name: its files, then its environment variables."""
    settings = {}
    for section in ("global", "download"):
        for line in _pip("config", "list").splitlines():
            key, _, value = line.partition("=")
            if key.startswith(section + "."):
                settings[key.removeprefix(section + ".")] = str(ast.literal_eval(value))
    for key, value in os.environ.items():
        if key.upper().startswith("PIP_"):
            settings[key[4:].lower().replace("_", "-")] = value
    return settings


def index_addresses(settings: dict[str, str]) -> list[str]:
    """The package indexes that pip would ask, in its order; the default is read from pip's own help."""
    if settings.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        return []
    main = settings.get("index-url")
    if not main:
        described = re.search(r"--index-url.*?\(default:?\s+(\S+?)\)", _pip("download", "--help"), re.DOTALL)
        main = described[1] if described else ""
    return [*main.split(), *settings.get("extra-index-url", "").split()]


def _pip(*arguments: str) -> str:
    """What pip prints, or '' where there is no pip."""
    program = shutil.which("pip")
    own = [sys.executable, "-P", "-m", "pip"]  # -P: not what lies in the current folder
    environment = {**os.environ, "COLUMNS": "1000", "NO_COLOR": "1"}  # so that no address is broken over lines
    for command in (own, [program]) if program else (own,):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
        if done.returncode == 0:
            return done.stdout
    return ""


def transfer_package(
    index: str, package: str, filename: str, size: int, certificates: str | None, part: Path, on_bytes: Progress | None
) -> None:
    """Bring a file of a package, of at most `size` bytes, from one index into the file `part`."""
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=tls_context(certificates)))
    page_address = f"{bare(index).rstrip('/')}/{package}/"
    if page_address.startswith("file:"):
        page_address += "index.html"
    with opener.open(_request(page_address, index), timeout=TIMEOUT) as response:
        page = b"".join(chunks(response, PAGE_LIMIT))
        links = _links(page.decode(), response.headers.get_content_type())
        page_address = response.geturl()
    if filename not in links:
        raise OSError(f"it has no {filename}")
    address = urllib.parse.urljoin(page_address, links[filename])
    transfer(opener, _request(address, index), part, size, on_bytes)


def _links(page: str, content_type: str) -> dict[str, str]:
    """File name -> address, of a package's page on an index (JSON as in PEP 691, HTML as in PEP 503)."""
    if content_type.endswith("json"):
        return {file["filename"]: file["url"] for file in json.loads(page)["files"]}
    parser = _Anchors()
    parser.feed(page)
    return {urllib.parse.unquote(urllib.parse.urlsplit(link).path.rpartition("/")[2]): link for link in parser.links}


class _Anchors(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.links += [value for name, value in attributes if tag == "a" and name == "href" and value]


def bare(address: str) -> str:
    """An address without the name and password that may stand before its host."""
    parts = urllib.parse.urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _request(address: str, index: str) -> urllib.request.Request:
    """A request for a page or file of an index, with the index's password where it goes to the same host."""
    formats = "application/vnd.pypi.simple.v1+json, text/html;q=0.5, */*;q=0.1"
    request = urllib.request.Request(address, headers={"Accept": formats})
    login, _, host = urllib.parse.urlsplit(index).netloc.rpartition("@")
    if login and urllib.parse.urlsplit(address).netloc == host:
        token = b64encode(urllib.parse.unquote(login).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    return request
