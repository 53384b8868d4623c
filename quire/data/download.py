"""A text from an http(s) address, kept in the user's cache."""

import hashlib
import http.client
import ipaddress
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from quire import files
from quire.errors import UserError
from quire.sources import TIMEOUT, Progress, chunks, reason, tls_context

LIMIT = 1 << 30  # bytes of one address


def download(address: str, on_bytes: Progress | None = None) -> bytes:
    """The bytes at an http(s) address, at most LIMIT, downloaded once: later calls read the cached copy.

    The copy is kept with its sha256, and downloaded anew where the two disagree. Raises UserError where the text cannot
    be had, and for any redirect to a private address: whoever trusts that address can name it.
    """
    if address.partition("://")[0].lower() not in ("http", "https"):
        raise UserError(f"{address} is not an http or https address, the only kinds that are downloaded.")
    name = hashlib.sha256(address.encode()).hexdigest()[:32]
    copy = files.cache_folder() / "downloads" / name
    record = copy.with_name(name + ".json")
    if (data := _cached(copy, record)) is not None:
        return data
    try:
        files.write_by(copy, lambda new: _transfer(address, new, on_bytes))
        data = copy.read_bytes()
        files.write_json(record, {"address": address, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})
    except UserError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        remedy = "If a browser can, save it there and name the file."
        raise UserError(f"{address} could not be downloaded: {reason(error)}. {remedy}") from error
    return data


def _cached(copy: Path, record: Path) -> bytes | None:
    try:
        expected, data = files.read_json(record)["sha256"], copy.read_bytes()
    except (OSError, UserError):
        return None
    return data if hashlib.sha256(data).hexdigest() == expected else None


def _transfer(address: str, new: Path, on_bytes: Progress | None) -> None:
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=tls_context()), _PublicRedirects())
    quoted = urllib.parse.quote(address, safe="%/:=&?~#+!$,;'@()*[]")
    request = urllib.request.Request(quoted, headers={"User-Agent": "quire"})
    with opener.open(request, timeout=TIMEOUT) as response, open(new, "wb") as file:
        for piece in chunks(response, LIMIT, on_bytes):
            file.write(piece)


class _PublicRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to public http(s) addresses only: a stranger must not reach into this network through us."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        parts = urllib.parse.urlsplit(newurl)
        if parts.scheme not in ("http", "https") or _is_private(parts.hostname or ""):
            raise UserError(
                f"{req.full_url} redirects to {newurl}, which is not a public http(s) address, and is not followed. "
                "If you trust it, give that address itself."
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_private(host: str) -> bool:
    """Whether a host's name stands for any address that is not on the public internet."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False  # unknown here: the connection fails, or a proxy that knows it is asked
    return any(not ipaddress.ip_address(entry[4][0]).is_global for entry in found)
