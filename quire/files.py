"""The one place that writes files: beside, fsync, checksum, rename.

Every change to the disk announces itself to `operation` first; the fault tests replace that function to fail the
1st, 2nd, 3rd ... change until none fails, as SQLite's tests do.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from quire.errors import UserError


def operation(kind: str, path: Path) -> None:
    """Called before each change to the disk (kind: write, rename, remove, make, touch). Does nothing; tests replace
    it."""


def cache_folder() -> Path:
    """The user's cache folder for Quire: $QUIRE_CACHE, else the platform's usual place."""
    if named := os.environ.get("QUIRE_CACHE"):
        return Path(named)
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = str(Path.home() / "Library" / "Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "quire"


# ---- single files -------------------------------------------------------------------------------------------------


def beside(path: Path) -> Path:
    """Where a file or folder is written before it takes its name."""
    return path.with_name(path.name + ".new")


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Write the whole file or nothing: into NAME.new beside it, fsync, rename."""
    write_by(path, lambda new: _write_and_sync(new, data))


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of the UTF-8 encoding, line ends as they are."""
    write_bytes(path, text.encode("utf-8"))


def write_by(path: Path, writer: Callable[[Path], object], new: Path | None = None, settled: bool = True) -> None:
    """Let `writer(new_path)` produce a file beside `path` (as `new`), then fsync it and rename it into place; what is
    not to be `settled` is renamed at once."""
    new = new or beside(path)
    operation("make", path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        operation("write", path)
        writer(new)
        if settled:
            _sync(new)
        operation("rename", path)
        os.replace(new, path)
    except BaseException:
        with contextlib.suppress(OSError):
            new.unlink(missing_ok=True)
        raise
    if settled:
        _sync(path.parent)


@contextlib.contextmanager
def appending(path: Path) -> Iterator[IO[bytes]]:
    """A file to add bytes to as they come. What is there stays when that breaks off: for what is checked when whole."""
    operation("make", path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    operation("write", path)
    with open(path, "ab") as file:
        yield file


def rename(old: Path, new: Path) -> None:
    """Give a complete file its name, once it has reached the disk."""
    _sync(old)
    operation("rename", new)
    os.replace(old, new)
    _sync(new.parent)


def open_new(path: Path) -> BinaryIO:
    """A file to write a stream into, for what is of no use to anyone after a kill: not waited for, not renamed."""
    operation("write", path)
    return open(path, "w+b")


def write_unsynced(path: Path, data: bytes) -> None:
    """Write the whole file or nothing, of which a power cut may leave anything: for what has a checksum elsewhere and
    can be had again. Several processes may write the same file at once."""
    own = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.new")
    write_by(path, lambda new: new.write_bytes(data), own, settled=False)


def touch(path: Path) -> None:
    """Note that a file was used just now: whoever may write to it can."""
    operation("touch", path)
    os.utime(path)


def append_line(path: Path, line: str, sync: bool = False) -> None:
    """Add one line to a log and hand it to the operating system at once; `sync`: wait until the disk has it."""
    operation("write", path)
    with open(path, "a", encoding="utf-8", newline="\n") as file:
        file.write(line + "\n")
    if sync:
        _sync(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a .jsonl log ([] where there is none); a last line cut short by a kill is dropped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # after the last line end comes nothing, or a torn line
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path} is damaged: line {len(rows) + 1} is not JSON. Delete that line.") from error
    return rows


def remove(path: Path) -> None:
    """Delete a file or a whole folder, if it is there."""
    if not path.exists():
        return
    operation("remove", path)
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write_and_sync(path: Path, data: bytes | memoryview) -> None:
    with open(path, "wb") as file:
        file.write(data)


def settle(path: Path) -> None:
    """Wait until what another library wrote into a file has reached the disk."""
    operation("write", path)
    _sync(path)


def _sync(path: Path) -> None:
    """Wait until a file, or on POSIX a folder's list of names, has reached the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows has no handle on a folder to wait for
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- checksums ----------------------------------------------------------------------------------------------------


def crc32(data: bytes | memoryview) -> str:
    """CRC-32 as eight hexadecimal digits."""
    return f"{zlib.crc32(data):08x}"


def crc32_of(path: Path) -> str:
    """CRC-32 of a file's bytes, read a megabyte at a time."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object that carries its own CRC-32, as the field `crc32`."""
    write_bytes(path, spelled_json(value))


def spelled_json(value: dict[str, Any]) -> bytes:
    """What `write_json` writes."""
    return _checked_json(value).encode()


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote; a changed byte is a UserError naming the file."""
    return parse_json(path.read_bytes(), path)


def parse_json(raw: bytes, path: object) -> dict[str, Any]:
    """`read_json` of a file's bytes, wherever that lies."""
    try:
        value = json.loads(raw)
        del value["crc32"]
        intact = _checked_json(value).encode() == raw
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise UserError(f"{path} is damaged: its contents do not match its checksum. Restore it from a copy.")
    return value


def _checked_json(value: dict[str, Any]) -> str:
    checksum = crc32(json.dumps(value, ensure_ascii=False, allow_nan=True).encode("utf-8", "surrogatepass"))
    return json.dumps({**value, "crc32": checksum}, ensure_ascii=True, indent=1) + "\n"


# ---- folders ------------------------------------------------------------------------------------------------------


def replace_folder(path: Path, writer: Callable[[Path], object]) -> None:
    """Let `writer(new_folder)` fill NAME.new, then: NAME -> NAME.old, NAME.new -> NAME, delete NAME.old.

    Whatever moment the power goes, one complete folder is left, and `complete_folder` finds it.
    """
    new = fresh_folder(path)
    try:
        writer(new)
    except BaseException:
        with contextlib.suppress(OSError):
            shutil.rmtree(new)
        raise
    take_place(path)


def fresh_folder(path: Path) -> Path:
    """NAME.new, empty: what is written there is to become the folder NAME."""
    new = beside(path)
    remove(new)
    operation("make", new)
    new.mkdir(parents=True)
    return new


def take_place(path: Path) -> None:
    """NAME.new, complete, becomes NAME."""
    new, old = beside(path), path.with_name(path.name + ".old")
    _sync(new)
    if path.exists():
        remove(old)
        operation("rename", path)
        os.rename(path, old)
    operation("rename", new)
    os.rename(new, path)
    _sync(path.parent)
    remove(old)


def same_file(old: Path, new: Path) -> None:
    """Give a finished file, which is only ever replaced, a second name; a copy where the file system has no links."""
    operation("write", new)
    try:
        os.link(old, new)
    except OSError:
        try:
            shutil.copyfile(old, new)
            _sync(new)
        except OSError as error:
            if error.filename2 or not error.filename:  # it names both or none where the new one has no room
                error.filename = str(new)
            raise


def complete_folder(path: Path, last_file: str) -> Path | None:
    """The first of NAME, NAME.new, NAME.old that holds `last_file`, the file its writer writes last."""
    for name in (*_names(path), path):  # path again: it may have been renamed into place since the first look
        if (name / last_file).exists():
            return name
    return None


def stamp(path: Path, last_file: str) -> list[tuple[int, int]]:
    """What differs before and after NAME, NAME.new and NAME.old change places."""
    found = []
    for name in _names(path):
        try:
            status = (name / last_file).stat()
            found.append((status.st_ino, status.st_mtime_ns))
        except OSError:
            found.append((0, 0))
    return found


def _names(path: Path) -> tuple[Path, Path, Path]:
    return path, beside(path), path.with_name(path.name + ".old")


def sweep(folder: Path, last_file: str) -> None:
    """Put right what a kill left in `folder`: the complete one of each NAME, NAME.new, NAME.old takes the name."""
    if not folder.exists():
        return
    names = {entry.name.removesuffix(".new").removesuffix(".old") for entry in folder.iterdir()}
    for path in (folder / name for name in sorted(names)):
        found = complete_folder(path, last_file)
        if found is not None and found != path:
            operation("rename", found)
            os.rename(found, path)
        remove(beside(path))
        remove(path.with_name(path.name + ".old"))


@contextlib.contextmanager
def locked(path: Path, sentence: str = "") -> Iterator[None]:
    """Hold the lock file `path` for the length of a block.

    Where another process holds it: fail with `sentence`, or wait if there is none.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=not sentence)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(sentence) from error
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
