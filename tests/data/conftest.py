"""A prepared text of small shards in small blocks, for the tests of what lies elsewhere."""

import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest

from quire.data import elsewhere, published, shards
from quire.data.prepare import Prepared, prepare
from quire.data.published import publish
from quire.data.spool import Corpus

SIZES = ((shards, "SHARD", 12_000), (shards, "SHORT", 1_000), (published, "BLOCK", 500))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Small shards in blocks of 500 bytes, a cache of the test's own, no pause between tries, an empty memory://."""
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    for module, name, value in (*SIZES, (elsewhere, "PAUSE", 0)):
        monkeypatch.setattr(module, name, value)
    yield tmp_path
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
