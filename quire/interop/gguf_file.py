"""The container of llama.cpp's models: metadata by key, and tensors by name.

magic "GGUF", version, counts; key, type and value of each entry; name, shape, type and offset of each tensor; then the
tensors' bytes (the layout is described in docs/gguf.md of the ggml project). Read here with every length checked
against the file before it is believed: the gguf package's own reader maps the file and trusts it, and a flipped bit in
a length may keep it busy for hours.
"""

import math
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from quire.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}  # types, to struct
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4


class Entry(NamedTuple):
    """A tensor as the header lists it: `shape` as in torch, the last one running fastest."""

    shape: tuple[int, ...]
    kind: int  # a GGMLQuantizationType
    start: int  # byte in the file
    size: int  # bytes


class GGUFFile:
    """The metadata and the tensors of a GGUF file, which may lie on the disk or in memory.

    `where` names it in sentences. What is no such file, cut off or damaged is a UserError.
    """

    def __init__(self, data: bytes | mmap.mmap, where: str) -> None:
        self.data, self.where = data, where
        try:
            self._read_header()
        except (_Damaged, UnicodeDecodeError) as error:
            raise self.damaged(str(error)) from error

    @classmethod
    def open(cls, path: Path) -> "GGUFFile":
        """The file at a path, mapped into memory, not read."""
        with open(path, "rb") as file:
            if path.stat().st_size == 0:
                raise UserError(f"{path} is empty.")
            return cls(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), str(path))

    def damaged(self, why: str) -> UserError:
        """The sentence for a file that contradicts itself."""
        return UserError(f"{self.where} is cut off or damaged: {why}. Fetch it anew.")

    def _read_header(self) -> None:
        cursor = _Cursor(memoryview(self.data))
        if bytes(cursor.take(4)) != MAGIC:
            raise UserError(f"{self.where} is no GGUF file: it does not begin with the letters GGUF.")
        version = cursor.number("I")
        if version not in VERSIONS:
            what = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise UserError(f"{self.where} is a {what} GGUF file. Quire reads little-endian ones of versions 2 and 3.")
        tensors, entries = cursor.number("Q"), cursor.number("Q")
        self.metadata: dict[str, Any] = {}
        for _ in range(cursor.fitting(entries, 13)):
            key = cursor.text()
            self.metadata[key] = cursor.value(cursor.number("I"))
        listed = [self._listed(cursor) for _ in range(cursor.fitting(tensors, 24))]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise _Damaged(f"its alignment is {alignment!r}")
        start = -(-cursor.at // alignment) * alignment
        self.tensors: dict[str, Entry] = {}
        for name, shape, kind, offset in listed:
            entry = Entry(shape, kind, start + offset, self._size(name, shape, kind))
            if entry.start + entry.size > len(self.data):
                raise _Damaged(f"its tensor {name} ends behind the file's end")
            self.tensors[name] = entry

    @staticmethod
    def _listed(cursor: "_Cursor") -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = cursor.text(), cursor.number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise _Damaged(f"its tensor {name!r} has {dimensions} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dimensions))[::-1]
        return name, shape, cursor.number("I"), cursor.number("Q")

    def _size(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        """Bytes of a tensor: rows come in blocks of so many numbers, in so many bytes."""
        sizes = package().GGML_QUANT_SIZES
        if kind not in sizes:
            raise _Damaged(f"its tensor {name} is of a type unknown here, {kind}")
        block, size = sizes[kind]
        if shape[-1] % block or 0 in shape:
            raise _Damaged(f"its tensor {name} has rows of {shape[-1]} numbers, in blocks of {block}")
        return math.prod(shape) // block * size

    def tensor(self, name: str) -> Tensor:
        """A tensor in float32, dequantized by the gguf package."""
        entry, gguf = self.tensors[name], package()
        kind = gguf.GGMLQuantizationType(entry.kind)
        raw = np.frombuffer(self.data, np.uint8, entry.size, entry.start)
        try:
            numbers = gguf.quants.dequantize(raw.reshape(*entry.shape[:-1], -1), kind)
        except NotImplementedError as error:
            raise UserError(f"{self.where} has weights of type {kind.name}, which cannot be read here.") from error
        return torch.from_numpy(np.array(numbers, np.float32).reshape(entry.shape))

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The metadata under a key; one missing without a default, or of another type, is a UserError naming it."""
        value = self.metadata.get(key, default)
        if value is None:
            raise UserError(f"{self.where} is incomplete: its metadata lacks {key}.")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self.where} is damaged, or of a kind unknown here: its {key} is {str(value)[:60]}.")
        return value


class _Damaged(Exception):
    """A header that contradicts itself or the file's length; it becomes a UserError."""


class _Cursor:
    """Reads one thing after the other, and never past the end."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise _Damaged(f"at byte {self.at:,} of {len(self.data):,} its header goes on behind the file's end")
        self.at += size
        return self.data[self.at - size : self.at]

    def fitting(self, count: int, size: int) -> int:
        """`count`, if so many things of at least `size` bytes are left."""
        if count * size > len(self.data) - self.at:
            raise _Damaged(f"at byte {self.at:,} its header announces {count:,} entries, more than fit into the file")
        return count

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return str(self.take(self.number("Q")), "utf-8")

    def value(self, kind: int) -> Any:
        if kind != ARRAY:
            return self._reader(kind)()
        kind, count = self.number("I"), self.number("Q")
        if kind in NUMBERS:
            size = struct.calcsize("<" + NUMBERS[kind])
            return np.frombuffer(self.take(self.fitting(count, size) * size), "<" + NUMBERS[kind]).tolist()
        read = self._reader(kind)
        return [read() for _ in range(self.fitting(count, 8))]

    def _reader(self, kind: int) -> Callable[[], Any]:
        if kind == STRING:
            return self.text
        if kind not in NUMBERS:
            raise _Damaged(f"at byte {self.at:,} its header has a value of type {kind}, which is unknown here")
        return lambda: self.number(NUMBERS[kind])


def package() -> Any:
    """The gguf package; a UserError says how to install it."""
    try:
        import gguf
        import gguf.quants
    except ImportError as error:
        raise UserError('GGUF files need the package gguf: pip install "quire[gguf]"') from error
    return gguf
