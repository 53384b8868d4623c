"""Files that lie elsewhere, read and written through fsspec."""

import re
import string
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from quire import files
from quire.data.shards import INDEX
from quire.errors import UserError
from quire.sources.transfer import TIMEOUT, public_redirect, tls_context

LARGEST = 1 << 26  # bytes of a file whose size nobody has told: an index of some terabytes of tokens has room
TRIES = 3  # at one read or write
PAUSE = 1.0  # seconds before the second try, twice that before the third
EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
READ_ONLY = ("http", "https")


def is_index(text: str) -> bool:
    """Whether a TEXT argument names the index of a prepared text: by its name alone, wherever it lies."""
    return re.split(r"[/\\]", parted(text)[0])[-1] == INDEX


def scheme_of(address: str) -> str:
    """`s3` of s3://bucket/folder; "" of a folder on this machine."""
    scheme, separator, _ = address.partition("://")
    return scheme.lower() if separator else ""


def parted(address: str) -> tuple[str, str]:
    """An address, and of the web the ?query behind it; a #fragment, which no server is told, is dropped."""
    if scheme_of(address) not in READ_ONLY:
        return address, ""
    place, mark, query = address.partition("#")[0].partition("?")
    return place, mark + query


def local_path(address: str) -> Path | None:
    """The folder or file on this machine that an address names, or None where it lies elsewhere."""
    scheme = scheme_of(address)
    return Path(address.partition("://")[2] if scheme else address) if scheme in ("", "file", "local") else None


# ---- a folder elsewhere -------------------------------------------------------------------------------------------


class Elsewhere:
    """A folder at an address that fsspec knows. What fails there is tried again, and then a UserError."""

    def __init__(self, address: str) -> None:
        """`address`: SCHEME://..., without a file's name; a ?query goes with each file. Nothing is asked for yet."""
        from fsspec import AbstractFileSystem

        place, query = parted(address)
        self.query = quote(query, safe=string.punctuation)  # as it is: it may be signed
        self.address = scheme_of(place) + place[place.index("://") :].rstrip("/")
        self.files, self.root = _file_system(self.address)
        # Where fsspec itself reads parts of files (the Hugging Face hub), it would read 5 MB ahead of each.
        read_ahead = getattr(self.files.cat_file, "__func__", None) is AbstractFileSystem.cat_file
        self._on_web = scheme_of(place) in READ_ONLY  # where an empty file has no range of bytes
        self._exactly: dict[str, Any] = {"cache_type": "none"} if read_ahead else {}

    def read(self, name: str, start: int = 0, stop: int | None = None, crc32: str = "", what: str = "") -> bytes:
        """The first LARGEST bytes of a file, or those from `start` to `stop`, which must have that checksum, if given.

        `what` names those bytes where they are damaged: block 3 of it.
        """
        path, place = self._path(name), f"{self.address}/{name}"

        def once() -> bytes:
            ends = LARGEST if stop is None else stop
            part = {} if stop is None and self._on_web else {"start": start, "end": ends, **self._exactly}
            data = self.files.cat_file(path, **part)
            length = len(data) if stop is None else stop - start
            if len(data) > length:
                raise Damaged(f"{place}: its server sends more than the bytes asked for. It must know byte ranges.")
            if len(data) < length:
                raise Damaged(f"{place} ends before its byte {start + length:,}: it is not as its index says.")
            if crc32 and files.crc32(data) != crc32:
                raise Damaged(f"{place} is damaged: {what or 'it'} does not match its checksum in {INDEX}.")
            return data

        return self._tried(place, "read", once)

    def size(self, name: str) -> int | None:
        """The bytes of a file, None where there is none."""
        path = self._path(name)
        try:
            return self._tried(f"{self.address}/{name}", "read", lambda: int(self.files.info(path)["size"]))
        except Missing:
            return None

    def names(self) -> set[str]:
        """What lies in the folder."""
        self.files.invalidate_cache()
        try:
            found = self._tried(self.address, "read", lambda: self.files.ls(self.root, detail=False))
        except Missing:
            return set()
        return {str(path).rstrip("/").rpartition("/")[2] for path in found}

    def put(self, path: Path, name: str) -> None:
        """Send a file."""
        place = self._path(name)
        self._tried(f"{self.address}/{name}", "written", lambda: self.files.put_file(str(path), place))

    def write(self, name: str, data: bytes) -> None:
        """Send some bytes as a file."""
        place = self._path(name)
        self._tried(f"{self.address}/{name}", "written", lambda: self.files.pipe_file(place, data))

    def remove(self, name: str) -> None:
        """Delete a file."""
        self._tried(f"{self.address}/{name}", "written", lambda: self.files.rm_file(self._path(name)))

    def _path(self, name: str) -> str:
        """What the file system calls a file."""
        return f"{self.root}/{name}{self.query}"

    def _tried(self, place: str, done: str, act: Callable[[], Any]) -> Any:
        """What `act` gives. What goes wrong inside a library, which has errors of many kinds, becomes a sentence."""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                return act()
            except FileNotFoundError as error:
                raise Missing(f"There is no {place}.") from error
            except Exception as error:
                if isinstance(error, UserError) and not isinstance(error, Damaged):
                    raise
                failed = error
        if isinstance(failed, Damaged):
            raise failed
        raise UserError(
            f"{place} could not be {done} in {TRIES} tries: {_reason(failed)}. Try again when it answers."
        ) from failed


class Missing(UserError):
    """A file is not there."""


class Damaged(UserError):
    """A file is not what its index says, or its server sends something else."""


def _file_system(address: str) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path that it has there."""
    scheme = scheme_of(address)
    try:
        import fsspec

        options = _web_options() if scheme in READ_ONLY else {}
        files, root = fsspec.core.url_to_fs(address, **options)
        root = _encoded(root) if scheme in READ_ONLY else root
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        remedy = f"pip install 'quire[{extra}]'" if extra else "install what fsspec asks for"
        raise UserError(f"{address} needs a further package ({error}): {remedy}") from error
    except Exception as error:
        raise UserError(f"{address} cannot be reached: {_reason(error)}.") from error
    return files, str(root).rstrip("/")


def _reason(error: Exception) -> str:
    """What a library says, on one line; of a connection that fails what the operating system says."""
    error = getattr(error, "os_error", error)
    unspoken = "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__
    return " ".join(str(error).split())[:300].rstrip(". ") or unspoken


def _web_options() -> dict[str, Any]:
    """How http is spoken: with an end to waiting and to what comes, through the proxy that is set, and with no redirect
    to what is private, as for downloads."""
    import aiohttp

    class Answer(aiohttp.ClientResponse):
        """Of which no more is read than was asked for, and a byte that tells that there is more."""

        async def read(self) -> bytes:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
            room, parts = int(asked[2]) - int(asked[1]) + 2 if asked else LARGEST, []
            while room and (part := await self.content.read(room)):
                parts.append(part)
                room -= len(part)
            return b"".join(parts)

    async def on_redirect(session: Any, context: Any, redirect: Any) -> None:
        public_redirect(str(redirect.url), str(redirect.response.headers.get("Location", "")))

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(on_redirect)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    client = {"timeout": timeout, "trust_env": True, "trace_configs": [trace], "response_class": Answer}
    return {"client_kwargs": client, "ssl": tls_context(), "skip_instance_cache": True, "encoded": True}


def _encoded(address: str) -> str:
    """An address on the web as it is sent."""
    from yarl import URL

    return str(URL(address))
