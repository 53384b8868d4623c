"""Prepared text that lies elsewhere: what is fetched, kept, checked and refused."""

import json
import random
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest

from quire import files
from quire.data.batches import Batches, Cursor, cut
from quire.data.elsewhere import BlockCache
from quire.data.published import Published
from quire.data.shards import TokenStream
from quire.errors import UserError

pytestmark = pytest.mark.usefixtures("shelf")

BLOCK = 500  # bytes
SMALL = 64 * BLOCK / 1e9  # the least that a cache may have, in gigabytes
ADDRESS = "memory://shelf/book"


def tokens_of(book: dict[str, bytes], stream: str = "training") -> np.ndarray:
    """The tokens of all shards, put together by hand."""
    names = sorted(name for name in book if name.startswith(stream) and name.endswith(".bin"))
    return np.frombuffer(b"".join(book[name] for name in names), dtype="<u2")


def in_memory(book: dict[str, bytes]) -> str:
    for name, data in book.items():
        fsspec.filesystem("memory").pipe_file(f"/shelf/book/{name}", data)
    return f"{ADDRESS}/index.json"


def stream_at(address: str, gigabytes: float = 1.0) -> TokenStream:
    """As a process would find it."""
    return Published.at(address).training(gigabytes)


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


def on_web(server, book: dict[str, bytes]) -> str:
    for name, data in book.items():
        server.answers[f"/book/{name}"] = Ranged(data)
    return f"{server.address}/book/index.json"


# ---- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "web", "folder"])
def test_slices_and_spans_are_those_of_the_whole(book, server, tmp_path, where):
    tokens = tokens_of(book)
    if where == "folder":
        (tmp_path / "here").mkdir()
        for name, data in book.items():
            (tmp_path / "here" / name).write_bytes(data)
    places = {"memory": in_memory, "web": lambda book: on_web(server, book), "folder": lambda _: ""}
    stream = stream_at(places[where](book) or str(tmp_path / "here" / "index.json"))
    assert len(stream) == len(tokens) and stream.dtype == tokens.dtype
    generator = random.Random(1)
    for _ in range(60):
        start = generator.randrange(len(tokens))
        stop = min(len(tokens), start + generator.choice([0, 1, 7, 300, 9_000]))
        assert np.array_equal(stream[start:stop], tokens[start:stop])
        part, low = stream.span(start, stop), generator.randrange(-3, 400)
        assert len(part) == stop - start and part.dtype == tokens.dtype
        assert np.array_equal(part[low : low + 50], tokens[start:stop][low : low + 50])
    assert np.array_equal(np.asarray(stream), tokens) and list(stream.span(90, 99)) == list(tokens[90:99])
    assert stream[-1] == tokens[-1]
    found = Published.at(places[where](book) or str(tmp_path / "here" / "index.json")).prepared(1.0)
    assert np.array_equal(found.validation[:], tokens_of(book, "validation"))


def test_a_reader_fetches_the_blocks_of_its_rows_and_no_others(book, server):
    """As of two processes the first, which takes the first half of the rows of each batch."""
    address, context, batch, steps = on_web(server, book), 40, 6, 12
    stream, tokens = stream_at(address), tokens_of(book)
    assert all(not file.asked for name, file in ranged(server).items() if name.endswith(".bin"))
    whole, cursor, wanted = Batches(tokens, context, seed=3), Cursor(), set()
    _, order = whole.epoch(0)
    for _ in range(steps):
        rows = [slice(int(n) * context, min((int(n) + 1) * context, len(tokens) - 1))
                for n in order[cursor.position : cursor.position + batch // 2]]  # fmt: skip
        mine, theirs = cut(stream, rows, context), whole.take(cursor, batch)
        assert mine.inputs.equal(theirs.inputs[: batch // 2]) and mine.targets.equal(theirs.targets[: batch // 2])
        for row in rows:
            wanted |= blocks_of(book, 2 * row.start, 2 * (row.stop + 1))
    asked = {(name, start // BLOCK) for name, file in ranged(server).items() for start, _ in file.asked
             if name.startswith("training")}  # fmt: skip
    assert asked == wanted
    every = sum(-(-len(data) // BLOCK) for name, data in book.items() if re.fullmatch(r"training-\d+\.bin", name))
    assert len(wanted) < every / 2
    requests = [
        request for name, file in ranged(server).items() if name.startswith("training") for request in file.asked
    ]
    assert len(requests) == len(wanted), "each once"
    assert all(stop - start <= BLOCK for start, stop in requests)


def ranged(server) -> dict[str, Ranged]:
    return {path.removeprefix("/book/"): file for path, file in server.answers.items()}


def blocks_of(book: dict[str, bytes], start: int, stop: int) -> set[tuple[str, int]]:
    """File and number of each block in which bytes of the whole stream lie, byte by byte."""
    found, begins = set(), 0
    for name in sorted(name for name in book if re.fullmatch(r"training-\d+\.bin", name)):
        found |= {(name, at // BLOCK) for at in range(len(book[name])) if start <= begins + at < stop}
        begins += len(book[name])
    return found


# ---- the cache ----------------------------------------------------------------------------------------------------


def in_cache() -> list[Path]:
    return [path for path in (files.cache_folder() / "elsewhere").rglob("*") if path.is_file()]


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another reader has made room
        return 0


def test_the_cache_stays_below_its_bound_whatever_several_readers_do(book, monkeypatch):
    address, tokens, bound, sizes = in_memory(book), tokens_of(book), round(SMALL * 1e9), []
    store = BlockCache.store

    def watched(cache, path, data):
        store(cache, path, data)
        sizes.append(sum(map(size_of, in_cache())))

    monkeypatch.setattr(BlockCache, "store", watched)
    readers = [stream_at(address, SMALL) for _ in range(3)]

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


def test_what_was_used_last_is_kept(book, server):
    stream = stream_at(on_web(server, book), SMALL)
    for start in range(0, len(stream) - 300, 250):
        stream[:10]
        stream[start : start + 10]
    asked = ranged(server)["training-00000.bin"].asked
    assert asked.count((0, BLOCK)) == 1, "read again and again, it stays"
    assert not [path for path in in_cache() if path.name == "training-00000.1"], "read once, long ago"
    stream[255]
    assert asked.count((BLOCK, 2 * BLOCK)) == 2


def test_a_cache_too_small_for_anything_is_refused(book):
    with pytest.raises(UserError, match=r"--cache-gigabytes 1e-05 is too little: give room for 64 blocks, 3.2e-05"):
        stream_at(in_memory(book), 1e-5)


def test_a_block_that_another_process_deletes_is_fetched_again(book, server):
    stream, tokens = stream_at(on_web(server, book)), tokens_of(book)
    for _ in range(2):
        assert np.array_equal(stream[5:900], tokens[5:900])
        for path in in_cache():
            path.unlink()
    asked = ranged(server)["training-00000.bin"].asked
    assert sorted(asked) == sorted(2 * [(start, start + BLOCK) for start in range(0, 1800, BLOCK)])


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_block_damaged_in_the_cache_is_fetched_again(book, server, harm):
    address, tokens = on_web(server, book), tokens_of(book)
    stream_at(address)[:200]
    (kept,) = [path for path in in_cache() if path.name == "training-00000.0"]
    data = bytearray(kept.read_bytes())
    data[7] ^= 1
    kept.write_bytes({"flip": bytes(data), "cut": bytes(data[:-1]), "empty": b""}[harm])
    assert np.array_equal(stream_at(address)[:200], tokens[:200]), "as another process reads it"
    assert len(ranged(server)["training-00000.bin"].asked) == 2
    assert kept.read_bytes() == book["training-00000.bin"][:BLOCK], "and is whole again"
    stream_at(address)[:200]
    assert len(ranged(server)["training-00000.bin"].asked) == 2


def test_a_store_whose_files_have_versions(book, monkeypatch):
    """s3fs takes the version of a file where others take the first byte."""
    kind = type(fsspec.filesystem("memory"))
    cat_file = kind.cat_file

    def versioned(self, path, version_id=None, start=None, end=None):
        assert version_id is None
        return cat_file(self, path, start, end)

    monkeypatch.setattr(kind, "cat_file", versioned)
    assert np.array_equal(stream_at(in_memory(book))[300:900], tokens_of(book)[300:900])


def test_a_store_that_fsspec_itself_reads_parts_of(book):
    """As that of the Hugging Face hub: it would read five million bytes ahead."""
    asked = []

    class File(fsspec.spec.AbstractBufferedFile):
        def _fetch_range(self, start, end):
            asked.append((self.path.rpartition("/")[2], start, end))
            return book[self.path.rpartition("/")[2]][start:end]

    class Hub(fsspec.AbstractFileSystem):
        protocol = "hub"

        def info(self, path, **how):
            return {"name": path, "size": len(book[path.rpartition("/")[2]]), "type": "file"}

        def _open(self, path, mode="rb", **how):
            return File(self, path, mode, **how)

    fsspec.register_implementation("hub", Hub, clobber=True)
    assert np.array_equal(stream_at("hub://book/index.json")[300:900], tokens_of(book)[300:900])
    assert [(start, end) for name, start, end in asked if name == "training-00000.bin"] == [
        (start, start + BLOCK) for start in (500, 1000, 1500)
    ]


# ---- what goes wrong there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [10, 3 * BLOCK + 10, 1000 * BLOCK])
def test_what_is_damaged_at_its_source_is_refused_by_name(book, server, ends):
    """A flipped bit in block 3, a file that ends before it or in it: whatever does not hold it is read all the same."""
    data = bytearray(book["training-00001.bin"])
    data[3 * BLOCK + 20] ^= 1
    stream, tokens = stream_at(on_web(server, {**book, "training-00001.bin": bytes(data[:ends])})), tokens_of(book)
    before = len(book["training-00000.bin"]) // 2
    assert np.array_equal(stream[:before], tokens[:before])
    place = before + (3 * BLOCK + 20) // 2
    says = "block 3 of it .bytes 1,500 to 2,000. does not match its checksum" if ends > 4 * BLOCK else (
        "ends before its byte 2,000" if ends > 3 * BLOCK else "could not be read in 3 tries: 416")  # fmt: skip
    with pytest.raises(UserError, match=rf"{server.address}/book/training-00001.bin.*{says}"):
        stream[place : place + 1]
    assert len(ranged(server)["training-00001.bin"].asked) == 3


def test_a_busy_server_is_asked_again_and_a_silent_one_named(book, server):
    stream, tokens = stream_at(on_web(server, book)), tokens_of(book)
    file = ranged(server)["training-00000.bin"]
    file.fails = 2
    assert np.array_equal(stream[:9], tokens[:9]) and len(file.asked) == 3
    file.fails = 6  # of two blocks
    with pytest.raises(UserError, match=r"training-00000.bin could not be read in 3 tries: 503.*quire resume RUN"):
        stream.fetch([slice(900, 910), slice(2000, 2010)])
    server.shutdown()
    server.server_close()
    with pytest.raises(
        UserError, match=r"127.0.0.1:\d+/book/training-00001.bin could not be read in 3 tries: .*Connect"
    ):
        stream[len(book["training-00000.bin"]) // 2 + 1]
    assert np.array_equal(stream[:9], tokens[:9]), "what is here is read on"


def test_a_server_without_ranges_and_one_that_leads_into_this_network(book, server):
    address = on_web(server, book)
    ranged(server)["training-00000.bin"].ranges = False
    with pytest.raises(UserError, match=r"training-00000.bin: its server sends more than the bytes asked for"):
        stream_at(address)[:9]
    server.answers["/moved/index.json"] = (302, {"Location": address, "Content-Length": "0"}, b"")
    with pytest.raises(UserError, match=r"redirects to .*not a public http\(s\) address"):
        Published.at(f"{server.address}/moved/index.json")


NO_INDEX = r"is not the index of a prepared text, or it is damaged"
FLIPPED = r"index.json is damaged: its contents do not match its checksum"


@pytest.mark.parametrize(
    "raw, says",
    [
        (None, r"There is no memory://shelf/book/index.json"),
        (b"", NO_INDEX), (b"<html>", NO_INDEX), (b"[1]", NO_INDEX), (b'{"pages": 3}', NO_INDEX), (b"\xff\0", NO_INDEX),
        (b"[" * 99_999, NO_INDEX),
        (lambda raw: raw[:-9], NO_INDEX),
        (lambda raw: raw.replace(b'"block_bytes": 500', b'"block_bytes": 501'), FLIPPED),
        (lambda raw: files.spelled_json({**json.loads(raw), "quire_tokens": 2}), r"of the format 2, and this Quire"),
    ],
)  # fmt: skip
def test_what_is_no_index_is_refused(book, raw, says):
    address = in_memory(book)
    fsspec.filesystem("memory").rm_file("/shelf/book/index.json")
    if raw is not None:
        data = raw(book["index.json"]) if callable(raw) else raw
        fsspec.filesystem("memory").pipe_file("/shelf/book/index.json", data)
    with pytest.raises(UserError, match=says):
        Published.at(address)


def test_a_damaged_folder_on_this_machine_is_refused_by_name(book, tmp_path):
    for name, data in book.items():
        (tmp_path / name).write_bytes(data)
    for name in ("training-00001.bin", "training-00000.starts", "validation-00000.bin", "tokenizer.json"):
        data = bytearray(book[name])
        data[-2] ^= 4
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{name.partition('.')[0]}.*does not match its checksum"):
            Published.at(str(tmp_path / "index.json")).prepared(1.0)
        (tmp_path / name).write_bytes(book[name])
    Published.at(f"file://{tmp_path}/index.json").prepared(1.0)
