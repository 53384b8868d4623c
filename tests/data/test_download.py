"""Texts from http addresses, against a server on this machine that misbehaves in every way it is told to."""

import gzip
import hashlib
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quire import files
from quire.data import download as downloading
from quire.data.download import download
from quire.data.reading import DataSettings, read
from quire.errors import UserError
from quire.sources import transfer

TEXT = "Ein Text für alle.\n".encode() * 30_000


def whole(body: bytes) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Length": str(len(body))}, body


def test_downloaded_once(server):
    server.answers["/a.txt"] = whole(TEXT)
    seen = []
    assert download(server.address + "/a.txt", lambda done, total: seen.append((done, total))).read_bytes() == TEXT
    assert len(seen) > 1 and seen[-1] == (len(TEXT), len(TEXT))
    server.answers.clear()
    assert download(server.address + "/a.txt").read_bytes() == TEXT
    assert server.requests == ["/a.txt"]


def test_addresses_are_told_apart_by_their_query(server):
    server.answers["/?id=1"], server.answers["/?id=2"] = whole(b"one"), whole(b"two")
    assert [download(f"{server.address}/?id={number}").read_bytes() for number in (1, 2, 1)] == [b"one", b"two", b"one"]
    assert len(server.requests) == 2


def test_a_damaged_copy_is_downloaded_anew(server, tmp_path):
    server.answers["/a.txt"] = whole(TEXT)
    download(server.address + "/a.txt")
    copy = next(path for path in (tmp_path / "cache" / "downloads").iterdir() if not path.suffix)
    copy.write_bytes(TEXT[:-1])
    assert download(server.address + "/a.txt").read_bytes() == TEXT
    copy.with_name(copy.name + ".json").write_text("{}")
    assert download(server.address + "/a.txt").read_bytes() == TEXT
    assert len(server.requests) == 3


def test_as_a_corpus(server):
    packed = gzip.compress(b'{"text": "one"}\n{"text": "two"}\n')
    server.answers["/data/b%20c.jsonl.gz?raw=1"] = whole(packed)
    address = server.address + "/data/b c.jsonl.gz?raw=1"
    corpus = read([address], DataSettings())
    assert list(corpus.documents) == ["one", "two"]
    expected = {"path": address, "sha256": hashlib.sha256(packed).hexdigest(), "bytes": len(packed)}
    assert corpus.origins == [expected]


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        ((404, {"Content-Length": "0"}, b""), "404 Not Found"),
        ((500, {"Content-Length": "0"}, b""), "500 Internal"),
        ((200, {"Content-Length": str(1 << 40)}, b""), "larger than the 1,073,741,824 bytes"),
        ((200, {"Content-Length": "1000"}, b"x" * 999), "broke off after 999 of 1,000 bytes"),
        ((200, {"Transfer-Encoding": "chunked"}, b"5\r\nhello\r\n"), "could not be downloaded: IncompleteRead"),
        ((302, {"Location": "/loop"}, b""), "not a public"),
    ],
)
def test_failures_leave_nothing_behind(server, tmp_path, answer, match):
    server.answers["/loop"] = answer
    with pytest.raises(UserError, match=match):
        download(server.address + "/loop")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_too_large_without_a_length(server, monkeypatch):
    monkeypatch.setattr(downloading, "LIMIT", 100_000)
    server.answers["/a.txt"] = (200, {}, bytes(100_001))
    with pytest.raises(UserError, match="larger than the 100,000 bytes"):
        download(server.address + "/a.txt")
    server.answers["/a.txt"] = (200, {}, bytes(100_000))
    assert download(server.address + "/a.txt").stat().st_size == 100_000


@pytest.mark.parametrize(
    "target",
    [
        "http://127.0.0.1:{port}/secret",
        "http://localhost:{port}/secret",
        "http://[::1]:{port}/secret",
        "http://[::ffff:127.0.0.1]:{port}/secret",
        "http://2130706433:{port}/secret",  # 127.0.0.1 as one number
        "http://0.0.0.0:{port}/secret",
        "http://10.1.2.3/",
        "http://172.16.0.1/",
        "http://192.168.1.1/",
        "http://169.254.169.254/latest/meta-data",
        "http://[fe80::1]/",
        "http://[fd00::1]/",
        "/secret",
        "file:///etc/passwd",
        "ftp://example.org/a.txt",
    ],
)
@pytest.mark.parametrize("status", [302, 308])
def test_redirects_that_leave_the_public_web_are_refused(server, target, status):
    server.answers["/secret"] = whole(b"secret")
    location = target.format(port=server.server_port)
    server.answers["/a.txt"] = (status, {"Location": location, "Content-Length": "0"}, b"")
    with pytest.raises(UserError, match=r"redirects to .* not a public http|Redirection to url .* is not allowed"):
        download(server.address + "/a.txt")
    assert server.requests == ["/a.txt"]


def test_a_redirect_to_a_public_address_is_followed(server, monkeypatch):
    server.answers["/a.txt"] = (302, {"Location": "/b.txt", "Content-Length": "0"}, b"")
    server.answers["/b.txt"] = whole(b"text")
    monkeypatch.setattr(transfer, "is_private", lambda host: False)  # there is no public server to ask in a test
    assert download(server.address + "/a.txt").read_bytes() == b"text"


@pytest.mark.parametrize("host", ["8.8.8.8", "2001:4860:4860::8888"])
def test_public_addresses(host):
    assert not transfer.is_private(host)


@pytest.mark.parametrize(
    ("address", "match"),
    [
        ("ftp://example.org/a.txt", "not an http or https address"),
        ("file:///etc/passwd", "not an http or https address"),
        ("http://127.0.0.1:9/a.txt", "could not be downloaded: .*refused"),
        ("http://[::1/a.txt", "could not be downloaded: Invalid IPv6 URL"),
        ("http://", "could not be downloaded: no host given"),
        ("http://127.0.0.1:port/", "could not be downloaded: nonnumeric port"),
    ],
)
def test_addresses_that_cannot_be(server, address, match):
    with pytest.raises(UserError, match=match):
        download(address)


def test_a_cache_that_cannot_be_written(server, tmp_path):
    server.answers["/a.txt"] = whole(b"text")
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"could not be downloaded: .*(Not a directory|exists|cannot find)"):
        download(server.address + "/a.txt")


# ---- resuming -----------------------------------------------------------------------------------------------------


def test_what_breaks_off_is_gone_on_with(server):
    body = server.serve("/a.txt", TEXT, breaks=[100_000, 350_001])
    seen = []
    assert download(server.address + "/a.txt", lambda done, total: seen.append((done, total))).read_bytes() == TEXT
    assert body.asked == ["", "bytes=100000-", "bytes=350001-"]
    assert [done for done, _ in seen] == sorted(done for done, _ in seen) and {total for _, total in seen} == {
        len(TEXT)
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, len(TEXT) - 1), max_size=3), st.booleans(), st.sampled_from(['"one"', 'W/"one"', ""]))
def test_wherever_it_breaks_off_and_whatever_the_server_can(server, breaks, ranges, tag):
    name = f"/{len(server.requests)}.txt"
    server.serve(name, TEXT, tag=tag, breaks=breaks, ranges=ranges)
    assert download(server.address + name).read_bytes() == TEXT


def test_the_next_call_goes_on(server, tmp_path):
    body = server.serve("/a.txt", TEXT, breaks=[200_000, *[200_001] * 9])
    with pytest.raises(UserError, match="broke off after 200,001 of 600,000 bytes"):
        download(server.address + "/a.txt")
    assert body.asked == ["", *["bytes=200000-"], *["bytes=200001-"] * 3]
    body.breaks, body.sent = [], 0
    assert download(server.address + "/a.txt").read_bytes() == TEXT
    assert body.sent == len(TEXT) - 200_001
    names = [path.suffix for path in (tmp_path / "cache" / "downloads").iterdir()]
    assert sorted(names) == ["", ".json"]  # no part, no lock


@pytest.mark.parametrize("tag", ['"two"', '"one"'], ids=["told by its tag", "told by nothing"])
@pytest.mark.parametrize("obeys", [True, False], ids=["with If-Range", "without"])
def test_a_file_that_changed_in_between_is_fetched_from_its_beginning(server, tag, obeys):
    """Whoever serves another file under the same tag, and heeds no If-Range, cannot be found out."""
    server.serve("/a.txt", TEXT, breaks=[200_000] * 9)
    with pytest.raises(UserError, match="broke off"):
        download(server.address + "/a.txt")
    other = TEXT.upper()
    server.serve("/a.txt", other, tag=tag, obeys=obeys)
    found = download(server.address + "/a.txt").read_bytes()
    assert found == (other if tag == '"two"' else TEXT[:200_000] + other[200_000:])


@pytest.mark.parametrize("status", [416, 206])
def test_a_server_that_answers_the_range_with_something_else(server, status):
    body = server.serve("/a.txt", TEXT, breaks=[200_000] * 9)
    with pytest.raises(UserError, match="broke off"):
        download(server.address + "/a.txt")
    body.breaks = []

    def answer(headers):
        if "Range" not in headers:
            return body(headers)
        return status, {"Content-Range": "bytes 0-99/600000", "ETag": '"one"', "Content-Length": "100"}, TEXT[:100]

    server.answers["/a.txt"] = answer
    assert download(server.address + "/a.txt").read_bytes() == TEXT


def test_a_busy_server_is_asked_again_and_an_unwilling_one_is_not(server):
    busy = iter([503, 429, 500])
    body = server.serve("/a.txt", TEXT)
    server.answers["/a.txt"] = lambda headers: next(
        ((code, {"Content-Length": "0"}, b"") for code in busy), body(headers)
    )
    assert download(server.address + "/a.txt").read_bytes() == TEXT
    assert len(server.requests) == 4
    with pytest.raises(UserError, match="404"):
        download(server.address + "/b.txt")
    assert server.requests[4:] == ["/b.txt"]


def test_too_large_as_a_whole_though_the_rest_is_not(server, tmp_path, monkeypatch):
    body = server.serve("/a.txt", TEXT, breaks=[500_000] * 9)
    with pytest.raises(UserError, match="broke off"):
        download(server.address + "/a.txt")
    body.breaks = []
    monkeypatch.setattr(downloading, "LIMIT", 510_000)
    with pytest.raises(UserError, match="larger than the 510,000 bytes"):
        download(server.address + "/a.txt")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_other_bytes_than_the_first_time_are_refused(server, tmp_path):
    server.answers["/a.txt"] = whole(TEXT)
    copy = download(server.address + "/a.txt")
    copy.unlink()
    server.answers["/a.txt"] = whole(TEXT.upper())
    for _ in range(2):
        with pytest.raises(UserError, match=r"other bytes than when it was first downloaded.*delete .*\.json and"):
            download(server.address + "/a.txt")
        assert not copy.exists()
    record = copy.with_name(copy.name + ".json")
    assert files.read_json(record)["sha256"] == hashlib.sha256(TEXT).hexdigest()
    record.unlink()
    assert download(server.address + "/a.txt").read_bytes() == TEXT.upper()


def test_two_at_once_download_once(server):
    server.answers["/a.txt"] = whole(TEXT)
    found = []
    threads = [threading.Thread(target=lambda: found.append(download(server.address + "/a.txt"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and {path.read_bytes() for path in found} == {TEXT}
    assert server.requests == ["/a.txt"]
