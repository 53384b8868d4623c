"""One download into a file: capped, told of as it goes, and resumed where it broke off."""

import contextlib
import http.client
import ipaddress
import re
import socket
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quire import files
from quire.errors import UserError

Progress = Callable[[int, int | None], None]  # called with the bytes so far, and the bytes in all where known

TIMEOUT = 30  # seconds without an answer from the other side
ATTEMPTS = 5  # at one download, as long as what fails may pass
PAUSE = 1.0  # seconds before the second attempt, twice that before the third ...
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that is busy rather than unwilling


class BrokenOff(OSError):
    """The body ended before its announced length."""


class TooLarge(OSError):
    """There is more than may be downloaded."""


def transfer(
    opener: urllib.request.OpenerDirector,
    request: urllib.request.Request,
    part: Path,
    limit: int,
    on_bytes: Progress | None = None,
) -> None:
    """Bring what `request` asks for, at most `limit` bytes, into the file `part`.

    A part that an earlier, broken transfer of the same address left is gone on with (Range and If-Range, RFC 9110
    section 13.1.5), if the server can do that and its file is still the same; otherwise it begins anew. What breaks off
    is tried again, up to ATTEMPTS times in all. Raises OSError, http.client.HTTPException or ValueError; `part` then
    stays for the next call where it can be resumed, and is gone where it cannot.
    """
    for attempt in range(ATTEMPTS):
        before = _size(part)
        try:
            return _transfer_once(opener, request, part, limit, on_bytes)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if isinstance(error, TooLarge) or not _resumable(part, request.full_url):
                forget(part)
            if attempt + 1 == ATTEMPTS or not _may_pass(error, attempt > 0 or _size(part) > before):
                raise
        time.sleep(PAUSE * 2**attempt)


def forget(part: Path) -> None:
    """Remove a partial download and its record."""
    files.remove(part)
    files.remove(_record(part))


def finish(part: Path, path: Path) -> None:
    """Give a complete download its name."""
    files.rename(part, path)
    files.remove(_record(part))


def _transfer_once(
    opener: urllib.request.OpenerDirector,
    request: urllib.request.Request,
    part: Path,
    limit: int,
    on_bytes: Progress | None,
) -> None:
    validator = _resumable(part, request.full_url)
    done = _size(part) if validator else 0
    for name, value in (("Range", f"bytes={done}-"), ("If-range", validator)):
        if done:
            request.add_header(name, value)
        else:
            request.remove_header(name)
    try:
        response = opener.open(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416 and done:  # there is nothing from there on: what is here is not the beginning of it
            forget(part)
            return _transfer_once(opener, request, part, limit, on_bytes)
        raise
    with response:
        if response.status == 206:
            begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range") or "")
            same = _validator(response.headers) in ("", validator)
            if not (done and same and begins and int(begins[1]) == done):
                forget(part)
                raise BrokenOff("its server sent another part of the file than was asked for")
        else:
            done = 0
            forget(part)
            if strong := _validator(response.headers):
                files.write_json(_record(part), {"address": request.full_url, "validator": strong})
        with files.appending(part) as file:
            for piece in chunks(response, limit, on_bytes, done):
                file.write(piece)


def _size(part: Path) -> int:
    with contextlib.suppress(OSError):
        return part.stat().st_size
    return 0


def _record(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _resumable(part: Path, address: str) -> str:
    """The validator by which a server knows the file that `part` is the beginning of; '' where there is none."""
    if not _size(part):
        return ""
    try:
        record = files.read_json(_record(part))
    except (OSError, UserError):
        return ""
    return record["validator"] if record["address"] == address else ""


def _validator(headers: Any) -> str:
    """What tells versions of a file apart; a weak ETag (W/...) does not promise the same bytes."""
    tag = headers.get("ETag") or ""
    return tag if tag.startswith('"') else headers.get("Last-Modified") or ""


def _may_pass(error: Exception, began: bool) -> bool:
    """Whether a failure is worth another attempt: a break, a busy server; no connection only once there was one."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in _PASSING
    if isinstance(error, urllib.error.URLError):
        return began
    return isinstance(error, (BrokenOff, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)) and (
        not isinstance(error, http.client.InvalidURL)
    )


def chunks(response: Any, limit: int, on_bytes: Progress | None = None, done: int = 0) -> Iterator[bytes]:
    """The body of a response piece by piece; TooLarge beyond `limit` bytes, BrokenOff where it ends before its length.

    `done` bytes of the whole were there before.
    """
    length = response.headers.get("Content-Length") or ""
    total = done + int(length) if length.isdigit() else None
    too_large = TooLarge(f"it is larger than the {limit:,} bytes allowed")
    if total is not None and total > limit:
        raise too_large
    while piece := response.read(1 << 18):
        done += len(piece)
        if done > limit:
            raise too_large
        if on_bytes:
            on_bytes(done, total)
        yield piece
    if total is not None and done < total:
        raise BrokenOff(f"the transfer broke off after {done:,} of {total:,} bytes")


def reason(error: Exception) -> str:
    """Why a download failed, in a few words."""
    if isinstance(error, urllib.error.HTTPError):
        first_line = str(error.reason).partition("\n")[0]
        return f"{error.code} {first_line}"
    return str(error.reason if isinstance(error, urllib.error.URLError) else error) or type(error).__name__


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


# ---- addresses on the web -----------------------------------------------------------------------------------------


def transfer_address(address: str, part: Path, limit: int, on_bytes: Progress | None = None) -> None:
    """`transfer` of an http(s) address. A redirect to an address that is not public is a UserError."""
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=tls_context()), _PublicRedirects())
    quoted = urllib.parse.quote(address, safe="%/:=&?~#+!$,;'@()*[]")
    transfer(opener, urllib.request.Request(quoted, headers={"User-Agent": "quire"}), part, limit, on_bytes)


class _PublicRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to public http(s) addresses only: a stranger must not reach into this network through us."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        public_redirect(req.full_url, newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def public_redirect(address: str, target: str) -> None:
    """Refuse a redirect to what is not a public http(s) address."""
    parts = urllib.parse.urlsplit(urllib.parse.urljoin(address, target))
    if parts.scheme not in ("http", "https") or is_private(parts.hostname or ""):
        raise UserError(
            f"{address} redirects to {target}, which is not a public http(s) address, and is not followed. "
            "If you trust it, give that address itself."
        )


def is_private(host: str) -> bool:
    """Whether a host's name stands for any address that is not on the public internet."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False  # unknown here: the connection fails, or a proxy that knows it is asked
    return any(not ipaddress.ip_address(entry[4][0]).is_global for entry in found)
