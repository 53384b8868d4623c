"""Reading archives without unpacking them to disk, and refusing those made to do harm."""

import contextlib
import fnmatch
import gzip
import io
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PureWindowsPath
from typing import IO, Any

from quire.errors import UserError

UNPACKED_LIMIT = 1 << 30  # bytes of everything in an archive
IN_MEMORY = 1 << 26  # bytes of an unpacked .tar that are kept in memory; a larger one goes into a nameless file


def open_members(archive: Path, patterns: tuple[str, ...]) -> Iterator[tuple[str, IO[bytes]]]:
    """The members of a zip or .tar.gz archive that match a glob pattern, sorted by name, each open for reading.

    Raises UserError, whatever the patterns, where any member is a link or device, would leave the archive's own
    folder, or makes the whole larger than UNPACKED_LIMIT: before the first member is given.
    """
    with open(archive, "rb") as packed:
        is_zip = packed.read(2) == b"PK"
        packed.seek(0)
        with _zip(packed) if is_zip else _tar(packed) as (entries, opened):
            found, total = [], 0
            for name, size, regular, entry in entries:
                path = PureWindowsPath(name)  # knows both kinds of slash, and drive letters
                if path.anchor or ".." in path.parts:
                    raise UserError(f"The archive is refused: its member {name!r} would leave the archive's folder.")
                if not regular:
                    raise UserError(f"The archive is refused: its member {name!r} is a link or a device.")
                total += size
                if total > UNPACKED_LIMIT:
                    raise _too_large()
                if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                    found.append((name, entry))
            for name, entry in sorted(found, key=lambda pair: pair[0]):
                with opened(entry) as file:
                    yield name, file


def gunzipped(packed: IO[bytes], limit: int) -> Iterator[bytes]:
    """Unpack gzip piece by piece; OverflowError beyond `limit` bytes; OSError, EOFError or zlib.error where damaged."""
    done = 0
    with gzip.GzipFile(fileobj=packed) as file:
        while piece := file.read(1 << 20):
            done += len(piece)
            if done > limit:
                raise OverflowError
            yield piece


def _too_large() -> UserError:
    return UserError(f"The archive is refused: it expands to more than {UNPACKED_LIMIT:,} bytes.")


# Each gives the entries of an archive as (name, bytes, whether a regular file or folder, entry), and opens one.
_Opened = tuple[Iterator[tuple[str, int, bool, Any]], Callable[[Any], IO[bytes]]]


@contextlib.contextmanager
def _zip(packed: IO[bytes]) -> Iterator[_Opened]:
    def regular(entry: zipfile.ZipInfo) -> bool:
        return entry.is_dir() or stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG)

    # An open member gives no more bytes than it announces, though its stream may hold more.
    with zipfile.ZipFile(packed) as zipped:
        entries = ((entry.filename, entry.file_size, regular(entry), entry) for entry in zipped.infolist())
        yield entries, zipped.open


@contextlib.contextmanager
def _tar(packed: IO[bytes]) -> Iterator[_Opened]:
    with tempfile.SpooledTemporaryFile(max_size=IN_MEMORY) as unpacked:
        try:
            for piece in gunzipped(packed, UNPACKED_LIMIT):
                unpacked.write(piece)
        except OverflowError:
            raise _too_large() from None
        unpacked.seek(0)
        with tarfile.open(fileobj=unpacked, mode="r:") as tar:
            entries = ((entry.name, entry.size, entry.isreg() or entry.isdir(), entry) for entry in tar)
            yield entries, lambda entry: tar.extractfile(entry) or io.BytesIO()  # a folder holds nothing
