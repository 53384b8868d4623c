"""The cache of what lies elsewhere: bounded, shared, checked, and no harm where it cannot be written."""

import errno
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from quire import files
from quire.data.cache import BlockCache
from quire.data.published import Published
from quire.errors import UserError

pytestmark = pytest.mark.usefixtures("shelf")

BLOCK = 500  # bytes
SMALL = 64 * BLOCK / 1e9  # the least that a cache may have, in gigabytes


def in_cache() -> list[Path]:
    return [path for path in (files.cache_folder() / "elsewhere").rglob("*") if path.is_file()]


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another reader has made room
        return 0


def test_the_cache_stays_below_its_bound_whatever_several_readers_do(book, shelf, monkeypatch):
    address, tokens, bound, sizes = shelf.in_memory(book), shelf.tokens(book), round(SMALL * 1e9), []
    store = BlockCache.store

    def watched(cache, path, data):
        store(cache, path, data)
        sizes.append(sum(map(size_of, in_cache())))

    monkeypatch.setattr(BlockCache, "store", watched)
    readers = [shelf.stream(address, SMALL) for _ in range(3)]

    def read(number: int) -> None:
        generator = random.Random(number)
        for _ in range(150):
            start = generator.randrange(len(tokens) - 100)
            assert np.array_equal(readers[number][start : start + 100], tokens[start : start + 100])

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(read, number) for number in range(3)]:
            done.result()
    assert len(sizes) > 150 and max(sizes) <= bound, "more was read than has room"
    assert max(sizes) > bound / 2, "and what has room is kept"


def test_what_was_used_last_is_kept(book, shelf):
    stream = shelf.stream(shelf.on_web(book), SMALL)
    for start in range(0, len(stream) - 300, 250):
        stream[:10]
        stream[start : start + 10]
    asked = shelf.files["training-00000.bin"].asked
    assert asked.count((0, BLOCK)) == 1, "read again and again, it stays"
    assert not [path for path in in_cache() if path.name == "training-00000.1"], "read once, long ago"
    stream[255]
    assert asked.count((BLOCK, 2 * BLOCK)) == 2


def test_a_cache_too_small_for_anything_is_refused(book, shelf):
    with pytest.raises(UserError, match=r"--cache-gigabytes 1e-05 is too little: give room for 64 blocks, 3.2e-05"):
        shelf.stream(shelf.in_memory(book), 1e-5)


def test_a_block_that_another_process_deletes_is_fetched_again(book, shelf):
    stream, tokens = shelf.stream(shelf.on_web(book)), shelf.tokens(book)
    for _ in range(2):
        assert np.array_equal(stream[5:900], tokens[5:900])
        for path in in_cache():
            path.unlink()
    asked = shelf.files["training-00000.bin"].asked
    assert sorted(asked) == sorted(2 * [(start, start + BLOCK) for start in range(0, 1800, BLOCK)])


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_block_damaged_in_the_cache_is_fetched_again(book, shelf, harm):
    address, tokens = shelf.on_web(book), shelf.tokens(book)
    shelf.stream(address)[:200]
    (kept,) = [path for path in in_cache() if path.name == "training-00000.0"]
    data = bytearray(kept.read_bytes())
    data[7] ^= 1
    kept.write_bytes({"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b""}[harm])
    assert np.array_equal(shelf.stream(address)[:200], tokens[:200]), "as another process reads it"
    assert len(shelf.files["training-00000.bin"].asked) == 2
    assert kept.read_bytes() == book["training-00000.bin"][:BLOCK], "and is whole again"
    shelf.stream(address)[:200]
    assert len(shelf.files["training-00000.bin"].asked) == 2


# ---- where it cannot be written -----------------------------------------------------------------------------------


def test_blocks_that_the_disk_does_not_take_are_held_for_a_while(book, shelf, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("where a folder should be")
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "file"))
    stream, tokens = shelf.stream(shelf.on_web(book)), shelf.tokens(book)
    for _ in range(2):
        stream.fetch([slice(0, 900), slice(300, 1200)])
        assert np.array_equal(stream[:1200], tokens[:1200])
    asked = shelf.files["training-00000.bin"].asked
    assert sorted(asked) == [(start, start + BLOCK) for start in range(0, 2400, BLOCK)], "each once"
    assert np.array_equal(stream[: 70 * BLOCK // 2], tokens[: 70 * BLOCK // 2])
    assert np.array_equal(stream[:9], tokens[:9]) and asked.count((0, BLOCK)) == 2, "64 of them at most"
    assert "".join(capsys.readouterr().err.split()).count("Blockscannotbekept") == 1


@pytest.mark.parametrize("kinds", [{"touch"}, {"touch", "make", "write", "rename", "remove"}])
def test_a_cache_of_another_user_or_mounted_read_only_is_read(book, shelf, monkeypatch, capsys, kinds):
    address, tokens = shelf.on_web(book), shelf.tokens(book)
    shelf.stream(address)[:900]

    def refused(kind: str, path: Path) -> None:
        if kind in kinds and files.cache_folder() in path.parents:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(files, "operation", refused)
    for file in shelf.files.values():
        file.asked.clear()
    found = Published.at(address).prepared(1.0)
    assert np.array_equal(found.training[:900], tokens[:900]) and found.tokenizer.encode("abc")
    assert shelf.files["training-00000.bin"].asked == [] and not capsys.readouterr().err


def test_a_block_that_cannot_be_read_is_fetched_again(book, shelf):
    address, tokens = shelf.on_web(book), shelf.tokens(book)
    shelf.stream(address)[:9]
    (kept,) = in_cache()
    kept.unlink()
    kept.mkdir()
    stream = shelf.stream(address)
    for _ in range(3):
        assert np.array_equal(stream[:9], tokens[:9])
    assert len(shelf.files["training-00000.bin"].asked) == 2


def test_whoever_may_write_to_a_file_can_note_its_use(tmp_path, monkeypatch):
    """The operating system lets others than the owner set a file's times to now, and to nothing else."""
    given = []
    monkeypatch.setattr(os, "utime", lambda path, times=None, *, ns=None: given.append((times, ns)))
    files.touch(tmp_path)
    assert given == [(None, None)]
