"""The spool: text being read goes to disk at once, normalised, with an index of its documents and a digest of all.

It lies in a folder of the user's cache for as long as it is needed, and is swept by a later call after a kill.
"""

import contextlib
import hashlib
import os
import secrets
import shutil
import weakref
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quire import files
from quire.data.documents import BLOCK, Documents, Mark
from quire.data.splitting import Piece
from quire.errors import UserError

TEXT, INDEX = "text.txt", "documents.bin"


@dataclass
class Tally:
    """How far a spool is written: documents, bytes, and the digests of the text and of the documents' sizes."""

    documents: int = 0
    bytes: int = 0
    text: Any = field(default_factory=hashlib.sha256)
    sizes: Any = field(default_factory=hashlib.sha256)

    def copy(self) -> "Tally":
        """The same, to go back to."""
        return Tally(self.documents, self.bytes, self.text.copy(), self.sizes.copy())


class Spool:
    """A text file and its index, written document by document. Documents of nothing but whitespace are dropped."""

    def __init__(self) -> None:
        self.folder, delete = _new_folder()
        self.close = weakref.finalize(self, delete)
        self._text = files.open_new(self.folder / TEXT)
        self._index = files.open_new(self.folder / INDEX)
        self.tally = Tally()
        self._begun: tuple[Tally, int, bool] | None = None  # of the document in hand: before it, characters, visible

    def add(self, texts: Iterable[str]) -> None:
        """Whole documents."""
        rows, encoded, start = array("q"), [], self.tally.bytes
        for text in texts:
            if text and not text.isspace():
                encoded.append(data := text.encode())
                rows.extend((start, len(data), len(text)))
                start += len(data)
        self._write(b"".join(encoded))
        self._enter(rows)

    def add_pieces(self, pieces: Iterable[Piece]) -> None:
        """Documents in pieces."""
        whole: list[str] = []
        held = 0
        for text, ends in pieces:
            single = ends and self._begun is None
            if single:
                whole.append(text)
                held += len(text) + 100  # a string's own size
            if not single or held > BLOCK:
                self.add(whole)
                whole, held = [], 0
            if not single:
                self._extend(text, ends)
        self.add(whole)

    def _extend(self, text: str, ends: bool) -> None:
        before, characters, visible = self._begun or (self.tally.copy(), 0, False)
        self._write(text.encode())
        characters, visible = characters + len(text), visible or bool(text and not text.isspace())
        self._begun = None if ends else (before, characters, visible)
        if ends and visible:
            self._enter(array("q", (before.bytes, self.tally.bytes - before.bytes, characters)))
        elif ends:
            self.back_to(before)

    def _write(self, data: bytes) -> None:
        self._text.write(data)
        self.tally.text.update(data)
        self.tally.bytes += len(data)

    def _enter(self, rows: "array[int]") -> None:
        self._index.write(rows.tobytes())
        self.tally.sizes.update(rows.tobytes())
        self.tally.documents += len(rows) // 3

    def back_to(self, tally: Tally) -> None:
        """Forget what has been written since."""
        self._begun = None
        if tally.bytes < self.tally.bytes:
            self._text.seek(tally.bytes)
            self._text.truncate()
        if tally.documents < self.tally.documents:
            self._index.seek(24 * tally.documents)
            self._index.truncate()
        self.tally = tally.copy()

    def finish(self) -> Documents:
        """Close the files and give what they hold."""
        self._text.close()
        self._index.close()
        return Documents(self.folder / TEXT, self.folder / INDEX, 0, self.tally.documents, self)

    def digest(self) -> str:
        """A hash of the documents, whatever files they came from."""
        return hashlib.sha256(self.tally.text.digest() + self.tally.sizes.digest()).hexdigest()


@dataclass
class Corpus:
    """Documents on disk, and where they came from. `close` deletes them; so does the end of the process."""

    documents: Documents
    digest: str  # of the documents
    # For each file, address, standard input ("-") or corpus: its absolute path, address or name as "path", and the
    # "sha256" and number of "bytes" of the file or archive as stored, before unpacking.
    origins: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # in folders and globs: (path, "is a binary file")
    attributions: list[str] = field(default_factory=list)  # to be shown to the user
    arguments: list[tuple[str, int, int]] = field(default_factory=list)  # each TEXT: first document, and past the last
    left_out: set[Mark] = field(default_factory=set)  # documents taken out again, because they are held out

    @classmethod
    def of(cls, documents: Iterable[str], group: int = 1) -> "Corpus":
        """A corpus of strings."""
        spool = Spool()
        spool.add_pieces((text, True) for text in documents)
        return cls(replace(spool.finish(), group=group), spool.digest())

    def close(self) -> None:
        """Delete the spooled text."""
        self.documents.owner.close()

    def leave_out(self, held_out: set[Mark]) -> int:
        """Take out the documents (of pairs: the pairs) that are marked as held out; gives how many those were."""
        before = self.documents.index
        index = before.with_name(before.name + ".left")
        self.documents, gone, self.left_out = self.documents.without(held_out, index)
        if len(gone):
            self.digest = hashlib.sha256(f"{self.digest} without {sorted(self.left_out)}".encode()).hexdigest()
            left = gone.searchsorted  # how many of them come before a document
            self.arguments = [(name, a - int(left(a)), b - int(left(b))) for name, a, b in self.arguments]
        return len(gone) // self.documents.group


def _new_folder() -> tuple[Path, Any]:
    """A folder of this process's own in the cache, and the function that deletes it; sweeps what killed calls left."""
    place = files.cache_folder() / "spool"
    if place.exists():
        for name in {entry.name.removesuffix(".lock") for entry in place.iterdir()}:
            with contextlib.suppress(UserError, OSError), files.locked(place / f"{name}.lock", "in use"):
                shutil.rmtree(place / name, ignore_errors=True)
    path = place / f"{os.getpid()}-{secrets.token_hex(4)}"
    held = contextlib.ExitStack()
    held.enter_context(files.locked(path.with_name(path.name + ".lock"), f"{path} is in use."))
    files.operation("make", path)
    path.mkdir()
    owner = os.getpid()

    def delete() -> None:
        if os.getpid() == owner:  # not in a forked child
            shutil.rmtree(path, ignore_errors=True)
            held.close()

    return path, delete
