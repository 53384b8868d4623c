"""Files that lie elsewhere, read and written through fsspec, and a bounded cache of the blocks that were read.

A file is read in blocks of a fixed size, each by its byte range, and only those that are asked for. Every block has a
CRC-32, which is checked when it comes and when a process first reads it from the cache: a damaged one in the cache is
fetched again, a damaged one at its source is refused by name.
"""

import contextlib
import re
import threading
import time
import zlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quire import files
from quire.data.shards import INDEX
from quire.errors import UserError
from quire.sources.transfer import TIMEOUT, public_redirect, tls_context

TRIES = 3  # at one read or write
PAUSE = 1.0  # seconds before the second try, twice that before the third
FEWEST = 64  # blocks that the cache has room for at least
ROOM = 1 / 8  # of the cache: what is kept free when it is looked through, for all processes that write meanwhile
LOOKED_THROUGH = 1 / 256  # of the cache: a process looks it through whenever it has written so much
EXTRAS = {"http": "http", "https": "http", "s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
READ_ONLY = ("http", "https")


def is_index(text: str) -> bool:
    """Whether a TEXT argument names the index of a prepared text: by its name alone, wherever it lies."""
    return re.split(r"[/\\]", text)[-1] == INDEX


def scheme_of(address: str) -> str:
    """`s3` of s3://bucket/folder; "" of a folder on this machine."""
    scheme, separator, _ = address.partition("://")
    return scheme.lower() if separator else ""


def local_path(address: str) -> Path | None:
    """The folder or file on this machine that an address names, or None where it lies elsewhere."""
    scheme = scheme_of(address)
    return Path(address.partition("://")[2] if scheme else address) if scheme in ("", "file", "local") else None


# ---- a folder elsewhere -------------------------------------------------------------------------------------------


class Elsewhere:
    """A folder at an address that fsspec knows. What fails there is tried again, and then a UserError."""

    def __init__(self, address: str) -> None:
        """`address`: SCHEME://..., without a file's name. Nothing is asked for yet."""
        from fsspec import AbstractFileSystem

        self.address = address.rstrip("/")
        self.files, self.root = _file_system(self.address)
        # Where fsspec itself reads parts of files (the Hugging Face hub), it would read 5 MB ahead of each.
        read_ahead = getattr(self.files.cat_file, "__func__", None) is AbstractFileSystem.cat_file
        self._exactly: dict[str, Any] = {"cache_type": "none"} if read_ahead else {}

    def read(self, name: str, start: int = 0, stop: int | None = None, crc32: str = "", what: str = "") -> bytes:
        """A file, or the bytes from `start` to `stop` of it, which must have that checksum, if one is given.

        `what` names those bytes where they are damaged: block 3 of it.
        """
        path, place = f"{self.root}/{name}", f"{self.address}/{name}"

        def once() -> bytes:
            part = {} if stop is None else {"start": start, "end": stop, **self._exactly}
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
        path = f"{self.root}/{name}"
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
        place = f"{self.root}/{name}"
        self._tried(f"{self.address}/{name}", "written", lambda: self.files.put_file(str(path), place))

    def write(self, name: str, data: bytes) -> None:
        """Send some bytes as a file."""
        place = f"{self.root}/{name}"
        self._tried(f"{self.address}/{name}", "written", lambda: self.files.pipe_file(place, data))

    def remove(self, name: str) -> None:
        """Delete a file."""
        self._tried(f"{self.address}/{name}", "written", lambda: self.files.rm_file(f"{self.root}/{name}"))

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
            f"{place} could not be {done} in {TRIES} tries: {_reason(failed)}. Once it answers again, the same command"
            " goes on, or of a run that has begun: quire resume RUN"
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
    return " ".join(str(error).split())[:300].rstrip(". ") or type(error).__name__


def _web_options() -> dict[str, Any]:
    """How http is spoken: with an end to waiting, through the proxy that is set, and with no redirect to what is
    private, as for downloads."""
    import aiohttp

    async def on_redirect(session: Any, context: Any, redirect: Any) -> None:
        public_redirect(str(redirect.url), str(redirect.response.headers.get("Location", "")))

    trace = aiohttp.TraceConfig()
    trace.on_request_redirect.append(on_redirect)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
    client = {"timeout": timeout, "trust_env": True, "trace_configs": [trace]}
    return {"client_kwargs": client, "ssl": tls_context(), "skip_instance_cache": True}


# ---- the cache ----------------------------------------------------------------------------------------------------


class BlockCache:
    """Blocks of files in the user's cache folder; beyond its bound those not used for longest are deleted.

    Up to 30 processes may share it (of a bound below 256 blocks fewer): each looks it through whenever it has written
    1/256 of the bound, and then leaves an eighth free for what the others write until they look.
    """

    def __init__(self, gigabytes: float, block_bytes: int) -> None:
        self.folder = files.cache_folder() / "elsewhere"
        self.bound = round(gigabytes * 1e9) if 0 <= gigabytes < float("inf") else 0
        if self.bound < FEWEST * block_bytes:
            raise UserError(
                f"--cache-gigabytes {gigabytes:g} is too little: give room for {FEWEST} blocks,"
                f" {FEWEST * block_bytes / 1e9:.2g} at least."
            )
        self._checked: set[Path] = set()  # blocks that this process has compared with their checksums
        self._written: int | None = None  # bytes since it was looked through; None: it was not yet
        self._lock = threading.Lock()

    def read(self, path: Path, start: int, stop: int, length: int, crc32: str) -> bytes | None:
        """Bytes of a block, None where it is not there or is damaged."""
        try:
            if path in self._checked:
                with open(path, "rb") as file:
                    file.seek(start)
                    part = file.read(stop - start)
            else:
                data = path.read_bytes()
                if len(data) != length or files.crc32(data) != crc32:
                    return None
                self._checked.add(path)
                part = data[start:stop]
            files.touch(path)
        except FileNotFoundError:  # another process made room
            return None
        return part if len(part) == stop - start else None

    def store(self, path: Path, data: bytes) -> None:
        """Keep a block that has been compared with its checksum."""
        self._make_room(len(data))
        try:
            files.write_unsynced(path, data)
        except PermissionError:
            if not path.exists():  # else, on Windows, another process has just stored it and reads it
                raise
        self._checked.add(path)

    def _make_room(self, size: int) -> None:
        with self._lock:
            if self._written is None or self._written + size > LOOKED_THROUGH * self.bound:
                self._look_through(round((1 - ROOM) * self.bound) - size)
                self._written = 0
            self._written += size

    def _look_through(self, room: int) -> None:
        """Delete the blocks not used for longest, until the others fit the room."""
        found = []
        for path in self.folder.rglob("*"):
            with contextlib.suppress(OSError):  # gone meanwhile
                status = path.stat()
                if path.is_file():
                    found.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= room:
                return
            with contextlib.suppress(OSError):  # gone meanwhile; or, on Windows, being read
                files.remove(path)
            total -= size


# ---- tokens in blocks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BlockedFile:
    """A file elsewhere, its size, and the CRC-32 of each of its blocks, eight hexadecimal digits each."""

    place: Elsewhere
    name: str
    size: int
    block_bytes: int
    checksums: str
    cache: BlockCache
    kept: Path  # what its blocks are called in the cache, without their numbers

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` to `stop`."""
        parts = []
        for number in self.blocks(start, stop):
            begins, length = number * self.block_bytes, self.length(number)
            low, high = max(0, start - begins), min(stop - begins, length)
            part = self.cache.read(self.path(number), low, high, length, self.checksum(number))
            parts.append(self.fetch(number)[low:high] if part is None else part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def blocks(self, start: int, stop: int) -> range:
        """The numbers of the blocks in which these bytes lie."""
        return range(start // self.block_bytes, -(-stop // self.block_bytes)) if start < stop else range(0)

    def length(self, number: int) -> int:
        """The bytes of a block: the last one may be shorter."""
        return min(self.block_bytes, self.size - number * self.block_bytes)

    def checksum(self, number: int) -> str:
        """The CRC-32 that a block must have."""
        return self.checksums[8 * number : 8 * number + 8]

    def path(self, number: int) -> Path:
        """Where the cache keeps a block."""
        return self.kept.with_name(f"{self.kept.name}.{number}")

    def fetch(self, number: int) -> bytes:
        """A block from its source, into the cache too."""
        start = number * self.block_bytes
        stop = start + self.length(number)
        what = f"block {number} of it (bytes {start:,} to {stop:,})"
        data = self.place.read(self.name, start, stop, self.checksum(number), what)
        self.cache.store(self.path(number), data)
        return data


class FetchedTokens:
    """The tokens of a file elsewhere, or a span of them: a part of a TokenStream, fetched as it is sliced."""

    def __init__(self, file: BlockedFile, dtype: np.dtype[Any], start: int = 0, stop: int | None = None) -> None:
        """`start` and `stop` in tokens of the file."""
        self.file, self.dtype, self.start = file, dtype, start
        self.stop = file.size // dtype.itemsize if stop is None else stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, place: slice) -> np.ndarray:
        start, stop, _ = place.indices(len(self))
        return np.frombuffer(self.file.read(*self._bytes(start, max(start, stop))), dtype=self.dtype)

    def _bytes(self, start: int, stop: int) -> tuple[int, int]:
        return (self.start + start) * self.dtype.itemsize, (self.start + stop) * self.dtype.itemsize

    def span(self, start: int, stop: int) -> "FetchedTokens":
        """The tokens from `start` to `stop`, of which nothing is fetched yet."""
        return FetchedTokens(self.file, self.dtype, self.start + start, self.start + stop)

    def missing(self, start: int, stop: int) -> dict[Hashable, Callable[[], object]]:
        """What fetches each block of these tokens that is not in the cache, by the block's path there."""
        numbers = self.file.blocks(*self._bytes(start, stop))
        paths = {number: self.file.path(number) for number in numbers}
        return {path: _fetching(self.file, number) for number, path in paths.items() if not path.exists()}


def _fetching(file: BlockedFile, number: int) -> Callable[[], object]:
    return lambda: file.fetch(number)


def checksums(path: Path, block_bytes: int) -> tuple[str, str]:
    """The CRC-32 of a file, and of all its blocks one after the other."""
    whole, found = 0, []
    with open(path, "rb") as file:
        while block := file.read(block_bytes):
            whole = zlib.crc32(block, whole)
            found.append(files.crc32(block))
    return f"{whole:08x}", "".join(found)
