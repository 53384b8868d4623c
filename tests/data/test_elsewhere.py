"""Prepared text that lies elsewhere: what is fetched, kept, checked and refused."""

import contextlib
import json
import random
import re
import threading

import fsspec
import numpy as np
import pytest

from quire import files
from quire.data import elsewhere, published
from quire.data.batches import Batches, Cursor, cut
from quire.data.published import Published
from quire.errors import UserError

pytestmark = pytest.mark.usefixtures("shelf")

BLOCK = 500  # bytes
NO_INDEX = r"is not the index of a prepared text, or it is damaged"
SMALL = 64 * BLOCK / 1e9  # the least that a cache may have, in gigabytes
ADDRESS = "memory://shelf/book"


# ---- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "web", "folder"])
def test_slices_and_spans_are_those_of_the_whole(book, shelf, tmp_path, where):
    tokens = shelf.tokens(book)
    if where == "folder":
        (tmp_path / "here").mkdir()
        for name, data in book.items():
            (tmp_path / "here" / name).write_bytes(data)
    places = {"memory": shelf.in_memory, "web": shelf.on_web, "folder": lambda _: ""}
    stream = shelf.stream(places[where](book) or str(tmp_path / "here" / "index.json"))
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
    assert np.array_equal(found.validation[:], shelf.tokens(book, "validation"))


def test_a_reader_fetches_the_blocks_of_its_rows_and_no_others(book, shelf):
    """As of two processes the first, which takes the first half of the rows of each batch."""
    address, context, batch, steps = shelf.on_web(book), 40, 6, 12
    stream, tokens = shelf.stream(address), shelf.tokens(book)
    assert all(not file.asked for name, file in shelf.files.items() if name.endswith(".bin"))
    whole, cursor, wanted = Batches(tokens, context, seed=3), Cursor(), set()
    _, order = whole.epoch(0)
    for _ in range(steps):
        rows = [slice(int(n) * context, min((int(n) + 1) * context, len(tokens) - 1))
                for n in order[cursor.position : cursor.position + batch // 2]]  # fmt: skip
        mine, theirs = cut(stream, rows, context), whole.take(cursor, batch)
        assert mine.inputs.equal(theirs.inputs[: batch // 2]) and mine.targets.equal(theirs.targets[: batch // 2])
        for row in rows:
            wanted |= blocks_of(book, 2 * row.start, 2 * (row.stop + 1))
    asked = {(name, start // BLOCK) for name, file in shelf.files.items() for start, _ in file.asked
             if name.startswith("training")}  # fmt: skip
    assert asked == wanted
    every = sum(-(-len(data) // BLOCK) for name, data in book.items() if re.fullmatch(r"training-\d+\.bin", name))
    assert len(wanted) < every / 2
    requests = [request for name, file in shelf.files.items() if name.startswith("training") for request in file.asked]
    assert len(requests) == len(wanted), "each once"
    assert all(stop - start <= BLOCK for start, stop in requests)


def blocks_of(book: dict[str, bytes], start: int, stop: int) -> set[tuple[str, int]]:
    """File and number of each block in which bytes of the whole stream lie, byte by byte."""
    found, begins = set(), 0
    for name in sorted(name for name in book if re.fullmatch(r"training-\d+\.bin", name)):
        found |= {(name, at // BLOCK) for at in range(len(book[name])) if start <= begins + at < stop}
        begins += len(book[name])
    return found


@pytest.mark.parametrize("where", ["memory", "web", "folder"])
def test_no_more_is_read_of_a_file_than_an_index_can_have(book, shelf, tmp_path, monkeypatch, where):
    (tmp_path / "index.json").write_bytes(book["index.json"])
    address = {"memory": shelf.in_memory, "web": shelf.on_web, "folder": lambda _: str(tmp_path)}[where](book)
    for room, fits in ((len(book["index.json"]), True), (len(book["index.json"]) - 2, False)):
        for module in (elsewhere, published):
            monkeypatch.setattr(module, "LARGEST", room)
        with contextlib.nullcontext() if fits else pytest.raises(UserError, match=NO_INDEX):
            assert Published.at(address).raw == book["index.json"]


def test_of_a_shard_without_tokens_nothing_is_asked(book, shelf):
    """A store need not know a range without bytes."""
    index = json.loads(book["index.json"])
    del index["crc32"]
    index["validation"].append({"name": "validation-00001", "tokens": 0, "documents": 0, "bytes": 0, "blocks": "",
                                "crc32": {".bin": "00000000", ".starts": "00000000"}})  # fmt: skip
    found = Published.at(shelf.in_memory({**book, "index.json": files.spelled_json(index)})).prepared(1.0)
    assert np.array_equal(found.validation[:], shelf.tokens(book, "validation"))


def test_a_server_that_sends_without_an_end_is_cut_off(book, shelf, server, monkeypatch):
    stream, sent = shelf.stream(shelf.on_web(book)), []

    class Endless(server.RequestHandlerClass):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            for _ in range(1000):  # sixty-five million bytes, if they are taken
                self.wfile.write(b"[" * 65536)
                sent.append(65536)

    server.RequestHandlerClass = Endless
    monkeypatch.setattr(server, "handle_error", lambda *whoever: None)
    monkeypatch.setattr(elsewhere, "LARGEST", 1 << 20)
    with pytest.raises(UserError, match=NO_INDEX):
        Published.at(f"{server.address}/book/index.json")
    with pytest.raises(UserError, match=r"training-00000.bin: its server sends more than the bytes asked for"):
        stream[:9]
    assert sum(sent) < 40e6, "of four requests"


def test_the_query_of_an_address_goes_with_every_file(book, shelf, server):
    """As the signature of a folder on the web does; a fragment is no server's business."""
    address = shelf.on_web(book, "?key=a%2Fb&until=9")
    for spelled in (address, f"{address}#top", f"HTTP{address[4:]}"):
        found = Published.at(spelled).prepared(1.0)
        assert np.array_equal(found.training[5:900], shelf.tokens(book)[5:900])
        assert np.array_equal(found.validation[:], shelf.tokens(book, "validation"))
        assert Published.at(spelled).origin["path"] == address
        files.remove(files.cache_folder())
    assert len(server.requests) > 9 and all(path.endswith("?key=a%2Fb&until=9") for path in server.requests)


# ---- stores of other kinds ----------------------------------------------------------------------------------------


def test_a_store_whose_files_have_versions(book, shelf, monkeypatch):
    """s3fs takes the version of a file where others take the first byte."""
    kind = type(fsspec.filesystem("memory"))
    cat_file = kind.cat_file

    def versioned(self, path, version_id=None, start=None, end=None):
        assert version_id is None
        return cat_file(self, path, start, end)

    monkeypatch.setattr(kind, "cat_file", versioned)
    assert np.array_equal(shelf.stream(shelf.in_memory(book))[300:900], shelf.tokens(book)[300:900])


def test_a_store_that_fsspec_itself_reads_parts_of(book, shelf):
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
    assert np.array_equal(shelf.stream("hub://book/index.json")[300:900], shelf.tokens(book)[300:900])
    assert [(start, end) for name, start, end in asked if name == "training-00000.bin"] == [
        (start, start + BLOCK) for start in (500, 1000, 1500)
    ]


# ---- what goes wrong there ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [10, 3 * BLOCK + 10, 1000 * BLOCK])
def test_what_is_damaged_at_its_source_is_refused_by_name(book, shelf, server, ends):
    """A flipped bit in block 3, a file that ends before it or in it: whatever does not hold it is read all the same."""
    data = bytearray(book["training-00001.bin"])
    data[3 * BLOCK + 20] ^= 1
    stream, tokens = shelf.stream(shelf.on_web({**book, "training-00001.bin": bytes(data[:ends])})), shelf.tokens(book)
    before = len(book["training-00000.bin"]) // 2
    assert np.array_equal(stream[:before], tokens[:before])
    place = before + (3 * BLOCK + 20) // 2
    says = "block 3 of it .bytes 1,500 to 2,000. does not match its checksum" if ends > 4 * BLOCK else (
        "ends before its byte 2,000" if ends > 3 * BLOCK else "could not be read in 3 tries: 416")  # fmt: skip
    with pytest.raises(UserError, match=rf"{server.address}/book/training-00001.bin.*{says}"):
        stream[place : place + 1]
    assert len(shelf.files["training-00001.bin"].asked) == 3


def test_a_busy_server_is_asked_again_and_a_silent_one_named(book, shelf, server):
    stream, tokens = shelf.stream(shelf.on_web(book)), shelf.tokens(book)
    file = shelf.files["training-00000.bin"]
    file.fails = 2
    assert np.array_equal(stream[:9], tokens[:9]) and len(file.asked) == 3
    file.fails = 6  # of two blocks
    with pytest.raises(
        UserError, match=r"training-00000.bin could not be read in 3 tries: 503.* with quire resume RUN"
    ):
        stream.fetch([slice(900, 910), slice(2000, 2010)])
    server.shutdown()
    server.server_close()
    with pytest.raises(
        UserError, match=r"127.0.0.1:\d+/book/training-00001.bin could not be read in 3 tries: .*Connect"
    ):
        stream[len(book["training-00000.bin"]) // 2 + 1]
    assert np.array_equal(stream[:9], tokens[:9]), "what is here is read on"


def test_a_server_that_says_nothing(book, shelf, server, monkeypatch):
    done = threading.Event()
    monkeypatch.setattr(elsewhere, "TIMEOUT", 0.1)
    server.answers["/book/index.json"] = lambda headers: (done.wait(30), {}, b"")
    with pytest.raises(UserError, match=r"index.json could not be read in 3 tries: no answer in time. Try again"):
        Published.at(f"{server.address}/book/index.json")
    done.set()


def test_a_server_without_ranges_and_one_that_leads_into_this_network(book, shelf, server):
    address = shelf.on_web(book)
    shelf.files["training-00000.bin"].ranges = False
    with pytest.raises(UserError, match=r"training-00000.bin: its server sends more than the bytes asked for"):
        shelf.stream(address)[:9]
    server.answers["/moved/index.json"] = (302, {"Location": address, "Content-Length": "0"}, b"")
    with pytest.raises(UserError, match=r"redirects to .*not a public http\(s\) address"):
        Published.at(f"{server.address}/moved/index.json")


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
def test_what_is_no_index_is_refused(book, shelf, raw, says):
    address = shelf.in_memory(book)
    fsspec.filesystem("memory").rm_file("/shelf/book/index.json")
    if raw is not None:
        data = raw(book["index.json"]) if callable(raw) else raw
        fsspec.filesystem("memory").pipe_file("/shelf/book/index.json", data)
    with pytest.raises(UserError, match=says):
        Published.at(address)


def test_an_index_that_lacks_something_is_refused(book):
    """Its checksum is right: another program may have written it so."""
    index = json.loads(book["index.json"])
    shard = index["training"][0]
    wrong = [{key: value for key, value in index.items() if key != gone} for gone in index if gone != "crc32"]
    wrong += [{**index, "training": [{k: v for k, v in shard.items() if k != gone}]} for gone in shard]
    wrong += [{**index, "block_bytes": 0}, {**index, "dtype": "<f8"}, {**index, "ranges": {"a": [1]}},
              {**index, "report": {}}, {**index, "validation": {}}, {**index, "tokenizer": {"bytes": "9"}},
              {**index, "training": [{**shard, "blocks": shard["blocks"][:-8]}]},
              {**index, "training": [{**shard, "tokens": -1, "blocks": ""}]}]  # fmt: skip
    assert len(wrong) > 20
    for value in wrong:
        raw = files.spelled_json({key: value for key, value in value.items() if key != "crc32"})
        with pytest.raises(UserError, match=NO_INDEX):
            published.parsed(raw, "index.json")


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
