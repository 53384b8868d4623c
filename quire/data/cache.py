"""Tokens that lie elsewhere, in blocks, and a bounded cache of the blocks that were read.

A file is read in blocks of a fixed size, each by its byte range, and only those that are asked for. Every block has a
CRC-32, which is checked when it comes and when a process first reads it from the cache: a damaged one in the cache is
fetched again, a damaged one at its source is refused by name.
"""

import contextlib
import os
import threading
import zlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from quire import files
from quire.data.elsewhere import Elsewhere
from quire.data.shards import INDEX
from quire.errors import UserError
from quire.progress import say

FEWEST = 64  # blocks that the cache has room for at least, and as many in memory where the disk takes none
ROOM = 1 / 8  # of the cache: what is kept free when it is looked through, for all processes that write meanwhile
LOOKED_THROUGH = 1 / 256  # of the cache: a process looks it through whenever it has written so much


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
        self._held: dict[Path, bytes] = {}  # blocks that the disk did not take, the newest last
        self._told = False  # that there are such blocks
        self._written: int | None = None  # bytes since it was looked through; None: it was not yet
        self._lock = threading.Lock()

    def has(self, path: Path) -> bool:
        """Whether a block is there, damaged or not."""
        return path in self._held or os.path.exists(path)

    def read(self, path: Path, start: int, stop: int, length: int, crc32: str) -> bytes | None:
        """Bytes of a block, None where it is not there or is damaged."""
        if (held := self._held.get(path)) is not None:
            return held[start:stop]
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
        except OSError:  # another process made room, or it cannot be read
            return None
        with contextlib.suppress(OSError):  # it is another user's, or nothing can be written there
            files.touch(path)
        return part if len(part) == stop - start else None

    def store(self, path: Path, data: bytes) -> None:
        """Keep a block that has been compared with its checksum: in memory, for a while, where the disk takes none."""
        try:
            self._make_room(len(data))
            files.write_unsynced(path, data)
        except OSError as error:
            self._hold(path, data, error)
        else:
            self._checked.add(path)

    def _hold(self, path: Path, data: bytes, error: OSError) -> None:
        with self._lock:
            self._held.pop(path, None)
            if len(self._held) == FEWEST:
                del self._held[next(iter(self._held))]
            self._held[path] = data
            if self._told or os.path.exists(path):  # on Windows: another process has just stored it and reads it
                return
            self._told = True
        say(
            f"Blocks cannot be kept in {self.folder} ({error.strerror or error}), and are fetched whenever they are"
            " needed. Make room there, name another folder in QUIRE_CACHE, or take less with --cache-gigabytes."
        )

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
        """A block from its source, into the cache too; a UserError, to one who trains, where it cannot be had."""
        start = number * self.block_bytes
        stop = start + self.length(number)
        what = f"block {number} of it (bytes {start:,} to {stop:,})"
        try:
            data = self.place.read(self.name, start, stop, self.checksum(number), what)
        except UserError as error:
            moved = f"where the text has moved, with --data ADDRESS/{INDEX}"
            raise UserError(f"{error} A run that has begun goes on with quire resume RUN; {moved}.") from error
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
        file, numbers = self.file, self.file.blocks(*self._bytes(start, stop))
        return {
            file.path(number): partial(file.fetch, number)
            for number in numbers
            if not file.cache.has(file.path(number))
        }


def checksums(path: Path, block_bytes: int) -> tuple[str, str]:
    """The CRC-32 of a file, and of all its blocks one after the other."""
    whole, found = 0, []
    with open(path, "rb") as file:
        while block := file.read(block_bytes):
            whole = zlib.crc32(block, whole)
            found.append(files.crc32(block))
    return f"{whole:08x}", "".join(found)
