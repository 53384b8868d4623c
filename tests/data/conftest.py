"""A prepared text of small shards in small blocks, for the tests of what lies elsewhere."""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import fsspec
import numpy as np
import pytest

from quire.data import elsewhere, published, shards
from quire.data.prepare import Prepared, prepare
from quire.data.published import Published, publish
from quire.data.shards import TokenStream
from quire.data.spool import Corpus

SIZES = ((shards, "SHARD", 12_000), (shards, "SHORT", 1_000), (published, "BLOCK", 500))


class Ranged:
    """A file on the web server that comes in ranges: from where to where each request asked."""

    def __init__(self, body: bytes) -> None:
        self.body, self.asked, self.fails, self.ranges = body, [], 0, True

    def __call__(self, headers: Mapping[str, str]) -> tuple[int, dict[str, str], bytes]:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", headers.get("Range") or "")
        start, stop = (int(found[1]), int(found[2]) + 1) if found else (0, len(self.body))
        self.asked.append((start, stop))
        if self.fails:
            self.fails -= 1
            return 503, {"Content-Length": "0"}, b""
        if not found or not self.ranges:
            return 200, {"Content-Length": str(len(self.body))}, self.body
        if start >= len(self.body):
            return 416, {"Content-Length": "0"}, b""
        part = self.body[start:stop]
        range_ = f"bytes {start}-{start + len(part) - 1}/{len(self.body)}"
        return 206, {"Content-Length": str(len(part)), "Content-Range": range_}, part


class Shelf:
    """Puts the files of a prepared text where they are fetched from, and finds it there."""

    def __init__(self, server: Any) -> None:
        self.server = server
        self.files: dict[str, Ranged] = {}  # those on the web, by name

    def on_web(self, book: dict[str, bytes], query: str = "") -> str:
        self.files |= {name: Ranged(data) for name, data in book.items()}
        self.server.answers |= {f"/book/{name}{query}": file for name, file in self.files.items()}
        return f"{self.server.address}/book/index.json{query}"

    def in_memory(self, book: dict[str, bytes]) -> str:
        for name, data in book.items():
            fsspec.filesystem("memory").pipe_file(f"/shelf/book/{name}", data)
        return "memory://shelf/book/index.json"

    def stream(self, address: str, gigabytes: float = 1.0) -> TokenStream:
        """As a process would find it."""
        return Published.at(address).training(gigabytes)

    def tokens(self, book: dict[str, bytes], stream: str = "training") -> np.ndarray:
        """The tokens of all shards, put together by hand."""
        names = sorted(name for name in book if name.startswith(stream) and name.endswith(".bin"))
        return np.frombuffer(b"".join(book[name] for name in names), dtype="<u2")


@pytest.fixture
def shelf(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shelf]:
    """Small shards in blocks of 500 bytes, a cache of the test's own, no pause between tries, an empty memory://."""
    for module, name, value in (*SIZES, (elsewhere, "PAUSE", 0)):
        monkeypatch.setattr(module, name, value)
    yield Shelf(server)
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(scope="session")
def prepared() -> Callable[..., Prepared]:
    """Prepares a text that a seed gives, of about so many characters."""

    def make(seed: int = 0, size: int = 60_000) -> Prepared:
        generator = random.Random(seed)
        texts = ["".join(generator.choices("abcdefg \n", k=size // 3)) + "." for _ in range(3)]
        return prepare(Corpus.of(texts), "character")

    return make


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory, prepared: Callable[..., Prepared]) -> dict[str, bytes]:
    """A prepared text: its files by name."""
    folder = tmp_path_factory.mktemp("book")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUIRE_CACHE", str(folder / "cache"))
        for module, name, value in SIZES:
            patch.setattr(module, name, value)
        publish(prepared(), str(folder / "book"))
    found = {path.name: path.read_bytes() for path in (folder / "book").iterdir()}
    assert len([name for name in found if re.fullmatch(r"training-\d{5}\.bin", name)]) >= 4
    return found
