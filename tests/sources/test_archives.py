"""Archives made to do harm, and ordinary ones."""

import contextlib
import io
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.errors import UserError
from quire.sources import archives
from quire.sources.archives import open_members


def read_members(archive: Path, patterns: tuple[str, ...]) -> list[tuple[str, bytes]]:
    return [(name, file.read()) for name, file in open_members(archive, patterns)]


def tar_gz(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name) if isinstance(name, str) else name
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def wheel(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in members:
            zipped.writestr(name, data)
    return packed.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def zip_link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = 0o120777 << 16
    return entry


def announcing_16_gigabytes() -> bytes:
    entry = tarfile.TarInfo("a.txt")
    entry.size = 1 << 34
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        tar.addfile(entry)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("archive", "match"),
    [
        (tar_gz(("../a.txt", b"x")), "would leave"),
        (tar_gz(("texts/../../a.txt", b"x")), "would leave"),
        (tar_gz(("/a.txt", b"x")), "would leave"),
        (tar_gz(("C:\\a.txt", b"x")), "would leave"),
        (tar_gz(("..\\a.txt", b"x")), "would leave"),
        (tar_gz((special("a.txt", tarfile.SYMTYPE, "/etc/passwd"), b"")), "link or a device"),
        (tar_gz((special("a.txt", tarfile.LNKTYPE, "b.txt"), b"")), "link or a device"),
        (tar_gz((special("a.txt", tarfile.CHRTYPE), b"")), "link or a device"),
        (tar_gz((special("a.txt", tarfile.FIFOTYPE), b"")), "link or a device"),
        (announcing_16_gigabytes(), "expands to more than"),
        (wheel(("../a.txt", b"x")), "would leave"),
        (wheel(("/a.txt", b"x")), "would leave"),
        (wheel(("C:/a.txt", b"x")), "would leave"),
        (wheel((zip_link("a.txt"), b"/etc/passwd")), "link or a device"),
    ],
    ids=lambda value: value if isinstance(value, str) else "archive",  # its bytes hold the time
)
def test_evil_members_are_refused_though_not_asked_for(archive, match, tmp_path):
    (path := tmp_path / "archive").write_bytes(archive)
    for patterns in (("*.txt",), ("other",)):
        with pytest.raises(UserError, match=match):
            read_members(path, patterns)


@pytest.mark.parametrize("pack", [tar_gz, wheel])
def test_bombs_are_refused(pack, monkeypatch, tmp_path):
    path = tmp_path / "archive"
    monkeypatch.setattr(archives, "UNPACKED_LIMIT", 100_000)
    halves = [("a.txt", bytes(60_000)), ("b.txt", bytes(60_000))]
    path.write_bytes(pack(halves[0]))
    assert read_members(path, ("a.txt",)) == halves[:1]
    path.write_bytes(pack(*halves))
    with pytest.raises(UserError, match="expands to more than 100,000 bytes"):
        read_members(path, ("a.txt",))


NAMES = st.lists(st.text("ab.", min_size=1, max_size=3).filter(lambda part: part.strip(".")), min_size=1, max_size=3)


@given(st.dictionaries(NAMES.map("/".join), st.binary(max_size=50), max_size=5), st.sampled_from([tar_gz, wheel]))
def test_every_ordinary_member_is_read(contents, pack):
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder, "archive")).write_bytes(pack(*contents.items()))
        assert read_members(path, ("*",)) == sorted(contents.items())


def test_a_zip_that_holds_more_than_it_announces(tmp_path):
    """The directory of the archive says 10 bytes, its stream has a million: no more than 10 are given."""
    packed = bytearray(wheel(("a.txt", bytes(1_000_000))))
    place = packed.rindex(b"PK\x01\x02") + 24  # the unpacked size in the central directory
    packed[place : place + 4] = (10).to_bytes(4, "little")
    (path := tmp_path / "a.zip").write_bytes(packed)
    for _, file in open_members(path, ("*",)):
        with contextlib.suppress(zipfile.BadZipFile):  # its checksum is not that of the first 10 bytes
            assert len(file.read()) <= 10


@pytest.mark.parametrize("pack", [tar_gz, wheel])
def test_members_are_read_as_streams(pack, tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "IN_MEMORY", 1_000)  # so that the .tar goes into a nameless file
    line = b"An owl and no more.\n"
    (path := tmp_path / "archive").write_bytes(pack(("b.txt", line * 9_000), ("a.txt", line)))
    sizes = {name: sum(len(row) for row in file) for name, file in open_members(path, ("*.txt",))}
    assert list(sizes.items()) == [("a.txt", 20), ("b.txt", 180_000)]
    assert [path.name for path in tmp_path.iterdir()] == ["archive"]
