"""Prepared text in a folder of its own, on this machine or elsewhere: `quire prepare` writes it, training reads it.

    index.json              as below; written last, so that a folder which has it is whole
    tokenizer.json          as in a run
    training-00000.bin      tokens (see shards.py), and training-00000.starts, where its documents begin
    validation-00000.bin    ... the same for the held-out text

index.json has the FORMAT, whether these are pairs, block_bytes, dtype, the report of the preparation, `ranges` (where
each TEXT lies in the training tokens, if there are several), the tokenizer's size and CRC-32, and of each shard name,
tokens, documents, bytes of text, the CRC-32 of its files, and `blocks`: the CRC-32 of each block of its tokens.
"""

import contextlib
import hashlib
import json
import os
import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from quire import files
from quire.data import shards
from quire.data.cache import BlockCache, BlockedFile, FetchedTokens, checksums
from quire.data.elsewhere import LARGEST, READ_ONLY, Elsewhere, is_index, local_path, parted, scheme_of
from quire.data.prepare import Prepared, folder_of
from quire.data.shards import INDEX, STREAMS, Shard, TokenStream
from quire.errors import UserError
from quire.progress import bar
from quire.tokenizers import Tokenizer, load_tokenizer

MARK, FORMAT = "quire_tokens", 1  # the index's first key, and its value
BLOCK = 1 << 20  # bytes that are fetched at once
TOKENIZER, BEGUN = "tokenizer.json", "unfinished.json"  # BEGUN: there until the index is, with its sha256

Index = dict[str, Any]
SHARD = {
    "name": str,
    "tokens": int,
    "documents": int,
    "bytes": int,
    "blocks": str,
    "crc32": {".bin": str, ".starts": str},
}
SHAPE = {  # of an index: what is read of it
    "pairs": bool,
    "block_bytes": int,
    "dtype": str,
    "report": {
        **dict.fromkeys(("documents", "characters", "tokens", "vocabulary", "validation_bytes"), int),
        **dict.fromkeys(("unit", "tokenizer", "held_out_as"), str),
        "held_out": float,
    },
    "ranges": dict,
    "tokenizer": {"bytes": int, "crc32": str},
    **{name: [SHARD] for name in STREAMS},
}
DTYPES = ("<u2", "<u4")


class Folder:
    """A folder on this machine, with the methods of Elsewhere."""

    def __init__(self, path: Path) -> None:
        self.path, self.address = path, str(path)

    def read(self, name: str, start: int = 0, stop: int | None = None, crc32: str = "", what: str = "") -> bytes:
        """The first LARGEST bytes of a file, or a part of it, which must have that checksum, if one is given."""
        try:
            with open(self.path / name, "rb") as file:
                file.seek(start)
                data = file.read(LARGEST if stop is None else stop - start)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(f"There is no {self.path / name}.") from error
        if crc32 and files.crc32(data) != crc32:
            raise UserError(f"{self.path / name} is damaged: it does not match its checksum in {INDEX}.")
        return data

    def size(self, name: str) -> int | None:
        """The bytes of a file, None where there is none."""
        path = self.path / name
        return path.stat().st_size if path.exists() else None

    def names(self) -> set[str]:
        """What lies in the folder."""
        there = next(place for place in (self.path, *self.path.parents) if place.exists())
        if not there.is_dir():
            raise UserError(f"{there} is a file. Name a folder.")
        return {path.name for path in self.path.iterdir()} if self.path.exists() else set()

    def put(self, path: Path, name: str) -> None:
        """Give a file a second name here, or copy it."""
        files.remove(self.path / name)
        files.same_file(path, self.path / name)

    def write(self, name: str, data: bytes) -> None:
        """Write some bytes as a file."""
        files.write_bytes(self.path / name, data)

    def remove(self, name: str) -> None:
        """Delete a file."""
        files.remove(self.path / name)


def folder_at(address: str) -> Folder | Elsewhere:
    """The folder that an address or a path names."""
    path = local_path(address)
    return Elsewhere(address) if path is None else Folder(path)


# ---- reading ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A prepared text that was found; `raw` is its index as it lies there."""

    folder: Folder | Elsewhere
    raw: bytes
    index: Index

    @classmethod
    def at(cls, address: str) -> "Published":
        """The one whose folder, or index.json, has that address or path; nothing but the index is read yet."""
        place, query = parted(address)
        place = place.removesuffix(INDEX) if is_index(place) else place
        folder = folder_at((place.rstrip("/\\") or ".") + query)
        raw = folder.read(INDEX)
        return cls(folder, raw, parsed(raw, f"{folder.address}/{INDEX}"))

    @property
    def origin(self) -> dict[str, Any]:
        """Where it came from, as a run's manifest has it."""
        if isinstance(self.folder, Folder):
            path = f"{os.path.abspath(self.folder.path)}/{INDEX}"
        else:
            path = f"{self.folder.address}/{INDEX}{self.folder.query}"
        return {"path": path, "bytes": len(self.raw), "sha256": self.sha256}

    @cached_property
    def sha256(self) -> str:
        """Of the index, and so of all that it has checksums of."""
        return hashlib.sha256(self.raw).hexdigest()

    @property
    def size(self) -> int:
        """UTF-8 bytes of the text, the held-out part among them."""
        return sum(shard["bytes"] for name in STREAMS for shard in self.index[name])

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens."""
        about = self.index["tokenizer"]
        data = self.folder.read(TOKENIZER, 0, about["bytes"], about["crc32"])
        if isinstance(self.folder, Folder):
            return load_tokenizer(self.folder.path / TOKENIZER)
        with TemporaryDirectory() as folder:
            path = Path(folder) / TOKENIZER
            files.write_unsynced(path, data)
            return load_tokenizer(path)

    def training(self, cache_gigabytes: float, looked_at: bool = False) -> TokenStream:
        """The training tokens: mapped on this machine, after a look at their checksums unless another process has just
        `looked_at` them; elsewhere fetched as they are sliced, by way of a cache of so many gigabytes."""
        found, dtype = self.index[STREAMS[0]], np.dtype(self.index["dtype"])
        if isinstance(self.folder, Folder):
            if not looked_at:
                look(self.folder.path, found)
            return shards.opened(self.folder.path, found, dtype)
        cache, block = BlockCache(cache_gigabytes, self.index["block_bytes"]), self.index["block_bytes"]
        parts = []
        for number, shard in enumerate(found):
            name, size = f"{shard['name']}.bin", shard["tokens"] * dtype.itemsize
            kept = cache.folder / self.sha256[:32] / f"{STREAMS[0]}-{number:05}"
            file = BlockedFile(self.folder, name, size, block, shard["blocks"], cache, kept)
            parts.append(FetchedTokens(file, dtype))
        return TokenStream(parts)

    def prepared(self, cache_gigabytes: float) -> Prepared:
        """All of it, the held-out tokens in memory."""
        found, report = self.index, self.index["report"]
        parts = []
        for shard in found[STREAMS[1]]:
            size = shard["tokens"] * np.dtype(found["dtype"]).itemsize
            data = self.folder.read(f"{shard['name']}.bin", 0, size, shard["crc32"][".bin"]) if size else b""
            parts.append(np.frombuffer(data, dtype=found["dtype"]))
        ranges = {name: (start, end) for name, (start, end) in found["ranges"].items()}
        streams = self.training(cache_gigabytes), TokenStream(parts)
        return Prepared(self.tokenizer, *streams, report["validation_bytes"], report, ranges=ranges)


def look(folder: Path, found: list[Shard]) -> None:
    """Refuse shards on this machine that are not as the index says."""
    for shard in found:
        if not shards.intact(folder, shard):
            name = folder / shard["name"]
            raise UserError(
                f"{name}.bin or {name}.starts is missing or damaged: it does not match its checksum in {INDEX}."
                f" Write it again: quire prepare TEXT --out {folder}"
            )


def is_published(folder: Path) -> bool:
    """Whether a folder on this machine is that of a prepared text."""
    if not all(os.path.isfile(folder / name) for name in (INDEX, TOKENIZER)):
        return False
    with contextlib.suppress(OSError), open(folder / INDEX, "rb") as file:
        return is_marked(file.read(64))
    return False


def is_marked(beginning: bytes) -> bool:
    """Whether a file that begins so is the index of a prepared text, whatever it is called."""
    return bool(re.match(rf'\s*{{\s*"{MARK}"'.encode(), beginning))


def parsed(raw: bytes, name: str) -> Index:
    """An index from its bytes; a UserError where they are none, or of another format, or damaged."""
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        found = None
    no_index = UserError(
        f"{name} is not the index of a prepared text, or it is damaged. To write one: quire prepare TEXT --out"
        " FOLDER; to train on a JSON file as a text, give it another name."
    )
    if not isinstance(found, dict) or MARK not in found:
        raise no_index
    if found[MARK] != FORMAT:
        raise UserError(
            f"{name} is of the format {found[MARK]!r}, and this Quire reads format {FORMAT}. Prepare the text anew with"
            " this Quire, or use the one that wrote it."
        )
    found = files.parse_json(raw, name)
    if not has_shape(found, SHAPE) or found["block_bytes"] < 1 or found["dtype"] not in DTYPES:
        raise no_index
    if any(not has_shape(span, [int]) or len(span) != 2 for span in found["ranges"].values()):
        raise no_index
    for shard in (shard for name in STREAMS for shard in found[name]):
        size = shard["tokens"] * np.dtype(found["dtype"]).itemsize
        if size < 0 or len(shard["blocks"]) != 8 * -(-size // found["block_bytes"]):
            raise no_index
    return found


def has_shape(value: Any, shape: Any) -> bool:
    """Whether a value that came as JSON has the keys of a shape, and what they hold is of its types; there may be
    more."""
    if isinstance(shape, dict):
        return isinstance(value, dict) and all(key in value and has_shape(value[key], shape[key]) for key in shape)
    if isinstance(shape, list):
        return isinstance(value, list) and all(has_shape(item, shape[0]) for item in value)
    return isinstance(value, shape)


# ---- writing ------------------------------------------------------------------------------------------------------


def target_at(address: str) -> Folder | Elsewhere:
    """The folder at an address, to be written into, after a look into it; a UserError where there can be none."""
    if scheme_of(address) in READ_ONLY:
        raise UserError(
            f"{address} can only be read. Write to a folder or, for example, s3://BUCKET/FOLDER, and let a web server"
            " show that."
        )
    target = folder_at(address.rstrip("/\\"))
    target.names()
    return target


def publish(prepared: Prepared, address: str, pairs: bool = False) -> dict[str, Any]:
    """Write a prepared text into the folder at an address or path; gives {"address", "shards", "tokens", "bytes"}.

    The index comes last. What is there already, with the right size and checksum, is not sent again, so that a second
    call goes on with what the first one began. A UserError where something else lies there.
    """
    source, target = folder_of(prepared.key), target_at(address)
    index = index_of(prepared, source, pairs)
    raw = files.spelled_json(index)
    every = [shard for name in STREAMS for shard in index[name]]
    wanted = [(TOKENIZER, index["tokenizer"]["bytes"], index["tokenizer"]["crc32"])]
    for shard in every:
        sizes = {".bin": shard["tokens"] * np.dtype(index["dtype"]).itemsize, ".starts": 8 * shard["documents"]}
        wanted += [(shard["name"] + end, size, shard["crc32"][end]) for end, size in sizes.items()]
    there = target.names()
    begin(target, there, raw, {name for name, _, _ in wanted})
    total, done = sum(size for _, size, _ in wanted), 0
    with bar("writing") as show:
        for name, size, crc32 in wanted:
            if name not in there or not intact(target, name, size, crc32):
                target.put(source / name, name)
            done += size
            show(done / total, megabytes=f"{done / 1e6:.1f}")
    if INDEX not in there or target.read(INDEX) != raw:  # half of one, of a call that was killed just then
        target.write(INDEX, raw)
    if BEGUN in target.names():
        target.remove(BEGUN)
    tokens = sum(shard["tokens"] for shard in every)
    return {"address": target.address, "shards": len(every), "tokens": tokens, "bytes": total + len(raw)}


def begin(target: Folder | Elsewhere, there: set[str], raw: bytes, names: set[str]) -> None:
    """Claim the folder for one prepared text; a UserError where `there` lies another, or part of one, or other files of
    these `names`."""
    mine, remedy = files.spelled_json({"sha256": hashlib.sha256(raw).hexdigest()}), "Name an empty folder with --out."
    if BEGUN in there and target.read(BEGUN) == mine:
        return
    if INDEX in there:
        if target.read(INDEX) != raw:
            raise UserError(f"{target.address} holds another {INDEX}, which is not written over. {remedy}")
        return
    if taken := sorted(names & there):
        what = "the beginning of another prepared text" if BEGUN in there else f"a {taken[0]} already"
        raise UserError(f"{target.address} holds {what}, which is not written over. {remedy}")
    target.write(BEGUN, mine)


def intact(target: Folder | Elsewhere, name: str, size: int, crc32: str) -> bool:
    """Whether a file is there whole: its size, and then, read back, its checksum."""
    if target.size(name) != size:
        return False
    value = 0
    for start in range(0, size, BLOCK):
        value = zlib.crc32(target.read(name, start, min(size, start + BLOCK)), value)
    return f"{value:08x}" == crc32


def index_of(prepared: Prepared, source: Path, pairs: bool) -> Index:
    """The index of what the cache has prepared: the same of the same tokens, wherever and whenever they were made."""
    own = files.read_json(source / INDEX)
    streams: dict[str, list[Shard]] = {}
    for name in STREAMS:
        streams[name] = []
        for shard in own[name]:
            whole, blocks = checksums(source / f"{shard['name']}.bin", BLOCK)
            assert whole == shard["crc32"][".bin"], "it was compared when it was prepared"
            kept = {key: value for key, value in shard.items() if key != "text"}
            streams[name].append({**kept, "blocks": blocks})
    tokenizer = (source / TOKENIZER).read_bytes()
    return {
        MARK: FORMAT,
        "pairs": pairs,
        "block_bytes": BLOCK,
        "dtype": own["dtype"],
        "report": own["report"],
        "ranges": prepared.ranges if len(prepared.ranges) > 1 else {},
        "tokenizer": {"bytes": len(tokenizer), "crc32": files.crc32(tokenizer)},
        **streams,
    }
