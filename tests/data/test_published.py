"""How a prepared text gets elsewhere: the index last, nothing sent twice, nothing else written over."""

import errno
import itertools
import json
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from quire import files
from quire.data import published
from quire.data.elsewhere import Elsewhere
from quire.data.published import Published, publish
from quire.errors import UserError

ADDRESS = "memory://shelf/book"
pytestmark = pytest.mark.usefixtures("shelf")


def there() -> dict[str, bytes]:
    """The files in memory://, by name."""
    return {path.rpartition("/")[2]: file.getvalue() for path, file in fsspec.filesystem("memory").store.items()}


def test_an_upload_that_is_killed_anywhere_is_gone_on_with(prepared, monkeypatch):
    """The 1st, 2nd, 3rd ... write dies half done; the next call ends it, and sends nothing whole a second time."""
    text, put, write, sent = prepared(), Elsewhere.put, Elsewhere.write, []
    publish(text, ADDRESS)
    whole = there()
    for number in itertools.count():
        fsspec.filesystem("memory").store.clear()
        sent.clear()

        def dying(place, name, data, number=number):
            if len(sent) == number:
                write(place, name, data[: len(data) // 2])
                raise KeyboardInterrupt
            sent.append(name)
            write(place, name, data)

        with monkeypatch.context() as patch:
            patch.setattr(Elsewhere, "write", dying)
            patch.setattr(Elsewhere, "put", lambda place, path, name: dying(place, name, path.read_bytes()))
            try:
                publish(text, ADDRESS)
                break
            except KeyboardInterrupt:
                pass
        left, sent[:] = there(), []
        assert left.get("index.json") != whole["index.json"], "it comes last"
        with monkeypatch.context() as patch:
            patch.setattr(Elsewhere, "put", lambda place, path, name: (sent.append(name), put(place, path, name)))
            publish(text, ADDRESS)
        assert there() == whole
        assert set(sent) == {name for name in whole if left.get(name) != whole[name]} - {"index.json"}
    assert number == len(whole) + 1 > 10


def test_the_index_is_the_same_wherever_and_whenever_it_is_made(prepared, tmp_path, monkeypatch):
    publish(prepared(), ADDRESS)
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "another"))
    publish(prepared(), str(tmp_path / "folder"))
    assert there() == {path.name: path.read_bytes() for path in (tmp_path / "folder").iterdir()}


def test_a_second_call_mends_what_was_damaged_and_tells_what_there_is(prepared):
    first = publish(prepared(), ADDRESS)
    whole = there()
    damaged = bytearray(whole["training-00001.bin"])
    damaged[5] ^= 1
    fsspec.filesystem("memory").pipe_file("/shelf/book/training-00001.bin", bytes(damaged))
    assert publish(prepared(), ADDRESS) == first and there() == whole
    tokens = sum(len(data) for name, data in whole.items() if name.endswith(".bin")) // 2
    shards = sum(name.endswith(".bin") for name in whole)
    assert first == {"address": ADDRESS, "shards": shards, "tokens": tokens, "bytes": sum(map(len, whole.values()))}


def test_the_index_says_what_the_files_are(book):
    """Checked by other means: zlib over the files, block by block."""
    from zlib import crc32

    index = json.loads(book["index.json"])
    for shard in index["training"] + index["validation"]:
        for end, checksum in shard["crc32"].items():
            assert crc32(book[shard["name"] + end]) == int(checksum, 16)
        data, starts = book[f"{shard['name']}.bin"], np.frombuffer(book[f"{shard['name']}.starts"], "<i8")
        blocks = [f"{crc32(data[at : at + 500]):08x}" for at in range(0, len(data), 500)]
        assert shard["blocks"] == "".join(blocks) and shard["tokens"] == len(data) // 2
        assert len(starts) == shard["documents"]


@pytest.mark.parametrize("address", [ADDRESS, "folder"])
def test_nothing_else_is_written_over(prepared, tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    one, other = prepared(1, 3000), prepared(2, 3000)
    publish(one, address)
    place = published.folder_at(address)
    before = {name: place.read(name) for name in place.names()}
    with pytest.raises(
        UserError, match=rf"{address} holds another index.json, which is not written over. Name an empt"
    ):
        publish(other, address)
    place.remove("index.json")
    with pytest.raises(UserError, match=r"holds a tokenizer.json already, which is not written over"):
        publish(other, address)
    place.write("unfinished.json", files.spelled_json({"sha256": "of another"}))
    with pytest.raises(UserError, match=r"holds the beginning of another prepared text"):
        publish(one, address)
    place.remove("unfinished.json")
    place.write("index.json", before["index.json"])
    assert {name: place.read(name) for name in place.names()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: the disk that is always full")
def test_a_full_disk_is_named_and_not_the_cache_that_is_copied(tmp_path):
    (tmp_path / "old").write_bytes(b"tokens")
    with pytest.raises(OSError) as full:
        files.same_file(tmp_path / "old", Path("/dev/full"))
    assert (full.value.errno, full.value.filename) == (errno.ENOSPC, "/dev/full")
    with pytest.raises(FileNotFoundError) as gone:
        files.same_file(tmp_path / "gone", tmp_path / "new")
    assert gone.value.filename == str(tmp_path / "gone")


def test_a_store_that_takes_nothing(prepared, monkeypatch):
    def busy(self, *arguments, **how):
        raise OSError("busy")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", busy)
    with pytest.raises(
        UserError, match=r"unfinished.json could not be written in 3 tries: busy. Try again when it ans"
    ) as said:
        publish(prepared(1, 3000), ADDRESS)
    assert "RUN" not in str(said.value), "there is none"


def test_addresses_that_cannot_be(prepared, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    for address, says in (("https://host/book", r"https://host/book can only be read"),
                          (str(tmp_path / "file"), r"file is a file. Name a folder"),
                          ("s3x://bucket", r"s3x://bucket cannot be reached: Protocol not known: s3x")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            publish(prepared(1, 3000), address)
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(UserError, match=r"needs a further package .*: pip install 'quire\[http\]'"):
        Published.at("http://127.0.0.1:9/index.json")
