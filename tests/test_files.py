"""Files are written whole or not at all, whatever moment writing fails, and damage is noticed."""

import errno
import json
import os
import subprocess
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire import files
from quire.errors import UserError


class Failure(OSError):
    """A change to the disk that fails."""


class failing:
    """Within, the change `number` (from 0) fails; `failed` says whether there was one."""

    def __init__(self, number):
        self.number, self.failed, self.seen = number, False, []

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(files, "operation", self.operation)
        return self

    def operation(self, kind, path):
        self.seen.append((kind, path.name))
        if len(self.seen) == self.number + 1:
            self.failed = True
            raise Failure(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def __exit__(self, kind, error, trace):
        self.patch.undo()
        return kind is Failure


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---- single files -------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "below" / "a.txt"
    files.write_text(path, "old\r\nü")
    assert path.read_bytes() == "old\r\nü".encode()
    number = 0
    while True:
        with failing(number) as disk:
            files.write_text(path, "new")
        if not disk.failed:
            break
        assert path.read_text("utf-8") == "old\nü" and names(path.parent) == ["a.txt"]
        number += 1
    assert number == len(disk.seen) >= 3
    assert path.read_text() == "new" and names(path.parent) == ["a.txt"]


def test_a_writer_that_breaks_off_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def writer(new):
        new.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_by(path, writer)
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


def test_what_is_renamed_has_reached_the_disk_before(tmp_path, monkeypatch):
    events = []
    sync, replace = files._sync, os.replace
    monkeypatch.setattr(files, "_sync", lambda path: events.append(f"sync {path.name}") or sync(path))
    monkeypatch.setattr(os, "replace", lambda old, new: events.append(f"rename {old.name}") or replace(old, new))
    files.write_text(tmp_path / "a.txt", "text")
    assert events == ["sync a.txt.new", "rename a.txt.new", f"sync {tmp_path.name}"]


def test_lines_are_read_back_but_for_one_that_was_cut_short(tmp_path):
    path = tmp_path / "log.jsonl"
    assert files.read_lines(path) == []
    for number in range(3):
        files.append_line(path, json.dumps({"n": number, "text": "ä\n"}))
    rows = [{"n": n, "text": "ä\n"} for n in range(3)]
    assert files.read_lines(path) == rows
    whole = path.read_bytes()
    for end in range(whole.rfind(b"\n", 0, -1) + 1, len(whole)):
        path.write_bytes(whole[:end])
        assert files.read_lines(path) == rows[:2]
    path.write_bytes(whole[:5] + b"\n" + whole[5:])
    with pytest.raises(UserError, match=r"log\.jsonl is damaged: line 1 is not JSON"):
        files.read_lines(path)


def test_remove_takes_files_folders_and_what_is_not_there(tmp_path):
    (tmp_path / "folder" / "below").mkdir(parents=True)
    (tmp_path / "folder" / "below" / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    for name in ("folder", "b", "absent"):
        files.remove(tmp_path / name)
    assert names(tmp_path) == []


# ---- checksums ----------------------------------------------------------------------------------------------------


@given(st.binary(max_size=3000))
def test_crc32_is_the_one_everybody_uses(data):
    import binascii

    assert files.crc32(data) == f"{binascii.crc32(data):08x}"


def test_crc32_of_a_file_is_that_of_its_bytes(tmp_path):
    data = os.urandom((1 << 20) + 77)
    (tmp_path / "a").write_bytes(data)
    assert files.crc32_of(tmp_path / "a") == files.crc32(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=5).filter(lambda key: key != "crc32"), JSON, max_size=4))
def test_any_object_comes_back_as_it_was(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "a.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


def test_json_that_was_changed_in_any_bit_or_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "a.json"
    value = {"text": 'ä"\\', "a": [1, 2.5, None, True], "b": {"c": -0.0, "d": 1e300}}
    files.write_json(path, value)
    data = path.read_bytes()
    changed = [data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :] for i in range(len(data)) for bit in range(8)]
    for damaged in [*changed, *(data[:end] for end in range(len(data))), data + b" ", b"[]\n", b"3\n", b"[" * 99999]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.json is damaged"):
            files.read_json(path)


# ---- folders ------------------------------------------------------------------------------------------------------


def fill(version):
    def writer(new):
        for name in ("a", "b", "last"):
            files.write_text(new / name, version)

    return writer


def version_of(folder):
    found = files.complete_folder(folder, "last")
    versions = {(found / name).read_text() for name in ("a", "b", "last")}
    assert len(versions) == 1, "a mixture of two versions"
    return versions.pop()


@pytest.mark.parametrize("caught", [True, False], ids=["the program goes on", "the program dies"])
def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, caught, monkeypatch):
    if not caught:  # nothing that runs after the failure may be needed
        monkeypatch.setattr(files.shutil, "rmtree", lambda path, **options: None)
    folder = tmp_path / "folder"
    files.replace_folder(folder, fill("0"))
    number = 0
    while True:
        with failing(number) as disk:
            files.replace_folder(folder, fill(str(number + 1)))
        if not disk.failed:
            break
        assert version_of(folder) in (str(number), str(number + 1))
        monkeypatch.undo()
        files.sweep(tmp_path, "last")
        assert names(tmp_path) == ["folder"] and version_of(folder) in (str(number), str(number + 1))
        files.replace_folder(folder, fill(str(number + 1)))
        if not caught:
            monkeypatch.setattr(files.shutil, "rmtree", lambda path, **options: None)
        number += 1
    assert number >= 12  # make, 3 x (make, write, rename), two renames, remove


def test_a_folder_has_reached_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    files.replace_folder(tmp_path / "folder", fill("1"))
    events = []
    sync, rename, remove = files._sync, os.rename, files.remove
    monkeypatch.setattr(files, "_sync", lambda path: events.append(f"sync {path.name}") or sync(path))
    monkeypatch.setattr(os, "rename", lambda old, new: events.append(f"rename {old.name}") or rename(old, new))
    monkeypatch.setattr(files, "remove", lambda path: events.append(f"remove {path.name}") or remove(path))
    files.replace_folder(tmp_path / "folder", fill("2"))
    last = {event: place for place, event in enumerate(events)}
    order = ["sync last.new", "sync folder.new", "rename folder", "rename folder.new", f"sync {tmp_path.name}"]
    assert sorted([*order, "remove folder.old"], key=last.__getitem__) == [*order, "remove folder.old"]


def test_a_folder_is_replaced_over_what_a_kill_left(tmp_path):
    folder = tmp_path / "folder"
    files.replace_folder(folder, fill("1"))
    (tmp_path / "folder.new").mkdir()
    (tmp_path / "folder.new" / "a").write_text("half")
    (tmp_path / "folder.old").mkdir()
    files.replace_folder(folder, fill("2"))
    assert names(tmp_path) == ["folder"] and version_of(folder) == "2"


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        ({"folder": "1"}, "1"),
        ({"folder": "1", "folder.new": None}, "1"),  # killed while writing
        ({"folder": "1", "folder.new": "2"}, "1"),  # before the renames
        ({"folder.old": "1", "folder.new": "2"}, "2"),  # between them
        ({"folder": "2", "folder.old": "1"}, "2"),  # after them
        ({"folder": "2", "folder.old": None}, "2"),  # while deleting
        ({"folder.new": None}, None),  # the very first save
        ({"folder.new": "1"}, "1"),
        ({"folder.old": "1"}, "1"),
    ],
)
def test_sweep_keeps_one_whole_folder(tmp_path, left, kept):
    for name, version in left.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("half")
        if version:
            fill(version)(tmp_path / name)
    assert (files.complete_folder(tmp_path / "folder", "last") is None) == (kept is None)
    files.sweep(tmp_path, "last")
    assert names(tmp_path) == (["folder"] if kept else [])
    assert kept is None or version_of(tmp_path / "folder") == kept


def test_a_sweep_of_what_is_not_there(tmp_path):
    files.sweep(tmp_path / "absent", "last")
    assert names(tmp_path) == []


def test_the_stamp_changes_with_every_replacement(tmp_path):
    stamps = []
    for version in range(5):
        files.replace_folder(tmp_path / "folder", fill(str(version)))
        stamps.append(files.stamp(tmp_path / "folder", "last"))
        assert files.stamp(tmp_path / "folder", "last") == stamps[-1]
    assert len({str(stamp) for stamp in stamps}) == 5


# ---- locks --------------------------------------------------------------------------------------------------------


def test_a_lock_is_held_once_and_leaves_nothing(tmp_path):
    path = tmp_path / "below" / ".lock"
    with files.locked(path, "taken"):
        with pytest.raises(UserError, match="taken"), files.locked(path, "taken"):
            pass
        assert path.exists()  # the one who was refused has not taken it away
    with files.locked(path, "taken"):
        pass
    assert names(path.parent) == []


def test_a_lock_whose_holder_was_killed_is_free(tmp_path):
    path = tmp_path / ".lock"
    held = "import os, sys; from pathlib import Path; from quire import files;"
    held += "lock = files.locked(Path(sys.argv[1]), 'x'); lock.__enter__(); os._exit(1)"
    assert subprocess.run([sys.executable, "-c", held, str(path)]).returncode == 1
    assert path.exists()
    with files.locked(path, "taken"):
        pass
    assert names(tmp_path) == []


def test_without_a_sentence_a_lock_is_waited_for(tmp_path):
    order = []

    def second():
        with files.locked(tmp_path / ".lock"):
            order.append("second")

    with files.locked(tmp_path / ".lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# ---- the cache ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"QUIRE_CACHE": "/q"}, "/q"),
        ("linux", {"XDG_CACHE_HOME": "/x"}, "/x/quire"),
        ("linux", {}, "/the/home/.cache/quire"),
        ("darwin", {}, "/the/home/Library/Caches/quire"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/quire"),
    ],
)
def test_the_cache_is_where_the_platform_keeps_caches(monkeypatch, platform, environment, expected):
    for name in ("QUIRE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "/the/home", "USERPROFILE": "/the/home", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(files.sys, "platform", platform)
    assert files.cache_folder().as_posix() == expected
