"""A text from an http(s) address, kept in the user's cache."""

import contextlib
import hashlib
import http.client
from pathlib import Path

from quire import files
from quire.errors import UserError
from quire.sources.transfer import Progress, finish, forget, reason, transfer_address

LIMIT = 1 << 30  # bytes of one address


def download(address: str, on_bytes: Progress | None = None) -> Path:
    """The file at an http(s) address, at most LIMIT bytes, downloaded once: later calls find the cached copy.

    The sha256 of the first download is recorded beside the copy. A copy that no longer agrees with it is downloaded
    anew, and what then comes must agree with it too. Raises UserError where the text cannot be had or has changed, and
    for any redirect to a private address: whoever trusts that address can name it.
    """
    if address.partition("://")[0].lower() not in ("http", "https"):
        raise UserError(
            f"{address} is not an http or https address, the only kinds that a text is read from. Other places"
            " can hold prepared text: quire prepare FILE --out ADDRESS, then quire train ADDRESS/index.json."
        )
    record = _record(address)
    copy, part = record.with_suffix(""), record.with_suffix(".part")
    if _is_whole(copy, record):
        return copy
    try:
        with files.locked(record.with_suffix(".lock")):
            if _is_whole(copy, record):  # another process brought it while this one waited
                return copy
            transfer_address(address, part, LIMIT, on_bytes)
            found = {"address": address, "sha256": files.sha256_of(part), "bytes": part.stat().st_size}
            if _first_sha256(record) not in ("", found["sha256"]):
                forget(part)
                raise UserError(
                    f"{address} gives other bytes than when it was first downloaded, by their sha256."
                    f" If that is as it should be, delete {record} and try again."
                )
            finish(part, copy)
            files.write_json(record, found)
    except UserError:
        raise
    except (OSError, http.client.HTTPException, ValueError) as error:
        remedy = "If a browser can, save it there and name the file."
        raise UserError(f"{address} could not be downloaded: {reason(error)}. {remedy}") from error
    return copy


def check_first(name: str, sha256: str) -> None:
    """Record the sha256 of what is read as it streams in, at its first reading; a UserError where it has changed."""
    record = _record(name)
    if _first_sha256(record) not in ("", sha256):
        raise UserError(
            f"{name} gives another text than when it was first read, by its sha256."
            f" If that is as it should be, delete {record} and try again."
        )
    with contextlib.suppress(OSError):  # a cache that cannot be written costs this check, not the text
        files.write_json(record, {"address": name, "sha256": sha256})


def _record(address: str) -> Path:
    """Where the sha256 of what an address gave at first is kept."""
    return files.cache_folder() / "downloads" / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}.json"


def _is_whole(copy: Path, record: Path) -> bool:
    return copy.exists() and files.sha256_of(copy) == _first_sha256(record)


def _first_sha256(record: Path) -> str:
    """The sha256 of the first download; '' where there is no record of it."""
    with contextlib.suppress(OSError, UserError):
        return str(files.read_json(record).get("sha256", ""))
    return ""
