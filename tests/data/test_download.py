"""Texts from http addresses, against a server on this machine that misbehaves in every way it is told to."""

import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire.data import download as downloading
from quire.data.download import download
from quire.data.reading import DataSettings, read
from quire.errors import UserError

Server = http.server.ThreadingHTTPServer
TEXT = "Ein Text für alle.\n".encode() * 30_000


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers PATH with server.answers[PATH]: (status, headers, body)."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        status, headers, body = self.server.answers.get(self.path, (404, {"Content-Length": "0"}, b""))
        self.send_response(status)
        for name, value in {"Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server(("127.0.0.1", 0), Handler)
    server.answers, server.requests = {}, []
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def whole(body: bytes) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Length": str(len(body))}, body


def test_downloaded_once(server):
    server.answers["/a.txt"] = whole(TEXT)
    seen = []
    assert download(server.address + "/a.txt", lambda done, total: seen.append((done, total))) == TEXT
    assert len(seen) > 1 and seen[-1] == (len(TEXT), len(TEXT))
    server.answers.clear()
    assert download(server.address + "/a.txt") == TEXT
    assert server.requests == ["/a.txt"]


def test_addresses_are_told_apart_by_their_query(server):
    server.answers["/?id=1"], server.answers["/?id=2"] = whole(b"one"), whole(b"two")
    assert [download(f"{server.address}/?id={number}") for number in (1, 2, 1)] == [b"one", b"two", b"one"]
    assert len(server.requests) == 2


def test_a_damaged_copy_is_downloaded_anew(server, tmp_path):
    server.answers["/a.txt"] = whole(TEXT)
    download(server.address + "/a.txt")
    copy = next(path for path in (tmp_path / "cache" / "downloads").iterdir() if not path.suffix)
    copy.write_bytes(TEXT[:-1])
    assert download(server.address + "/a.txt") == TEXT
    copy.with_name(copy.name + ".json").write_text("{}")
    assert download(server.address + "/a.txt") == TEXT
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
    assert len(download(server.address + "/a.txt")) == 100_000


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
    monkeypatch.setattr(downloading, "_is_private", lambda host: False)  # there is no public server to ask in a test
    assert download(server.address + "/a.txt") == b"text"


@pytest.mark.parametrize("host", ["8.8.8.8", "2001:4860:4860::8888"])
def test_public_addresses(host):
    assert not downloading._is_private(host)


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
