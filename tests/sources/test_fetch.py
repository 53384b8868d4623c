"""The table of archives and the safe fetch, against a package index served from this machine."""

import dataclasses
import hashlib
import http.server
import io
import json
import os
import subprocess
import tarfile
import threading
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest

from quire import files, sources
from quire.errors import UserError
from quire.sources import SOURCES, Source, fetch, transfer
from quire.sources import index as package_index
from quire.sources.index import index_addresses, pip_settings

SHARED = Path(__file__).parents[3] / "shared" / "data"
USERS_CACHE = files.cache_folder() / "archives"  # before any test names another


def tar_gz(*members: tuple[str | tarfile.TarInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in members:
            entry = tarfile.TarInfo(name) if isinstance(name, str) else name
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


ARCHIVE = tar_gz(
    ("poems-1.0/texts/b.txt", b"second"), ("poems-1.0/texts/a.txt", "fïrst".encode()), ("setup.py", b"1/0")
)
POEMS = Source(
    name="poems",
    package="poems",
    version="1.0",
    filename="poems-1.0.tar.gz",
    size=len(ARCHIVE),
    sha256=hashlib.sha256(ARCHIVE).hexdigest(),
    members=("poems-1.0/texts/*.txt",),
    description="",
    licence="",
    attribution="",
)
TEXTS = [("poems-1.0/texts/a.txt", "fïrst".encode()), ("poems-1.0/texts/b.txt", b"second")]


class Index(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; remembers (path, Authorization) of each request; wants `server.password` where that is set."""

    index_pages = ("index.json", "index.html")

    def guess_type(self, path: str) -> str:
        return {".json": "application/vnd.pypi.simple.v1+json", ".html": "text/html"}.get(Path(path).suffix, "a/b")

    def do_GET(self) -> None:
        authorization = self.headers["Authorization"]
        self.server.requests.append((self.path, authorization))
        if (moved := self.server.moved).get(self.path):
            self.send_response(302)
            self.send_header("Location", moved[self.path])
            self.end_headers()
        elif self.server.password not in (None, authorization):
            self.send_error(401)
        else:
            for page in self.index_pages:
                if self.path.endswith("/") and Path(self.translate_path(self.path), page).exists():
                    self.path += page
            super().do_GET()

    def log_message(self, *arguments: object) -> None:
        pass


def served(folder: Path) -> http.server.ThreadingHTTPServer:
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: Index(*arguments, directory=str(folder))
    )
    server.requests, server.password, server.moved = [], None, {}
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.ThreadingHTTPServer]:
    """A package index with poems-1.0.tar.gz (HTML), the only one that pip's settings name; an empty cache."""
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    # A third of a second each; a test below runs the real pip.
    monkeypatch.setattr(package_index, "_pip", lambda *arguments: "")
    monkeypatch.setattr(transfer, "PAUSE", 0)
    page = tmp_path / "simple" / "poems" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text(
        '<!DOCTYPE html><html><body><a href="../../files/poems-0.9.tar.gz">poems-0.9.tar.gz</a>'
        '<a data-requires-python="&gt;=3" href="../../files/poems-1.0.tar.gz#sha256=00">poems-1.0.tar.gz</a></body>'
    )
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "poems-1.0.tar.gz").write_bytes(ARCHIVE)
    server = served(tmp_path)
    monkeypatch.setenv("PIP_INDEX_URL", server.address + "/simple")
    yield server
    server.shutdown()
    server.server_close()


def test_fetched_once_then_read_from_the_cache(index, tmp_path):
    seen = []
    assert fetch(POEMS, lambda done, total: seen.append((done, total))) == TEXTS
    assert seen[-1] == (len(ARCHIVE), len(ARCHIVE))
    assert [path for path, _ in index.requests] == ["/simple/poems/", "/files/poems-1.0.tar.gz"]
    assert fetch(POEMS) == TEXTS
    assert len(index.requests) == 2
    assert [path.name for path in (tmp_path / "cache").rglob("*.*")] == ["poems-1.0.tar.gz"]  # nothing unpacked


def test_json_index(index, tmp_path):
    page = {"files": [{"filename": "poems-1.0.tar.gz", "url": "../../files/poems-1.0.tar.gz", "hashes": {}}]}
    (tmp_path / "simple" / "poems" / "index.json").write_text(json.dumps(page))
    (tmp_path / "simple" / "poems" / "index.html").unlink()
    assert fetch(POEMS) == TEXTS


def test_a_damaged_cached_copy_is_fetched_anew(index, tmp_path):
    fetch(POEMS)
    cached = tmp_path / "cache" / "archives" / "poems-1.0.tar.gz"
    cached.write_bytes(ARCHIVE[:50] + b"x" + ARCHIVE[51:])
    assert fetch(POEMS) == TEXTS
    assert cached.read_bytes() == ARCHIVE
    assert len(index.requests) == 4


def test_the_next_index_is_asked(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", index.address + "/absent")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", (tmp_path / "simple").as_uri())
    assert fetch(POEMS) == TEXTS


def test_other_bytes_are_refused(index, tmp_path):
    (tmp_path / "files" / "poems-1.0.tar.gz").write_bytes(ARCHIVE[:-1] + b"x")
    with pytest.raises(UserError, match="not the one known here, by its sha256"):
        fetch(POEMS)
    assert not list((tmp_path / "cache").rglob("*.*"))


def test_no_more_than_the_pinned_size_is_downloaded(index, tmp_path):
    (tmp_path / "files" / "poems-1.0.tar.gz").write_bytes(ARCHIVE + b"x")
    with pytest.raises(UserError, match=f"larger than the {len(ARCHIVE):,} bytes allowed"):
        fetch(POEMS)


@pytest.mark.parametrize(
    ("setting", "value", "match"),
    [
        ("PIP_INDEX_URL", "http://127.0.0.1:9/simple", "refused"),
        ("PIP_INDEX_URL", "{address}/absent", "404"),
        ("PIP_INDEX_URL", "not an address", "unknown url type"),
        ("PIP_NO_INDEX", "1", "no package index is configured"),
        ("PIP_CERT", "/nowhere/ca.pem", "No such file"),
    ],
)
def test_out_of_reach(index, monkeypatch, setting, value, match):
    monkeypatch.setenv(setting, value.format(address=index.address))
    with pytest.raises(UserError, match=rf"(?s)'poems' is not on this machine.*{match}.*quire train YOUR\.txt$"):
        fetch(POEMS)


def test_a_release_that_is_gone(index):
    with pytest.raises(UserError, match=r"it has no poems-2\.0\.tar\.gz"):
        fetch(dataclasses.replace(POEMS, filename="poems-2.0.tar.gz"))


def test_a_cache_that_cannot_be_written_costs_nothing(index, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert fetch(POEMS) == TEXTS


def test_the_index_password_goes_to_the_index_only(index, tmp_path, monkeypatch):
    elsewhere = served(tmp_path)
    index.password = "Basic bWU6cHcg"  # me:pw and a space, in base 64
    index.moved = {"/files/poems-1.0.tar.gz": elsewhere.address + "/files/poems-1.0.tar.gz"}
    monkeypatch.setenv("PIP_INDEX_URL", index.address.replace("://", "://me:pw%20@") + "/simple")
    assert fetch(POEMS) == TEXTS
    assert index.requests[0][1] == index.password
    assert elsewhere.requests == [("/files/poems-1.0.tar.gz", None)]
    index.password = "Basic other"
    (tmp_path / "cache" / "archives" / "poems-1.0.tar.gz").unlink()
    with pytest.raises(UserError, match="401") as failed:
        fetch(POEMS)
    assert "pw" not in str(failed.value)
    elsewhere.shutdown()
    elsewhere.server_close()


def test_text_inside_a_python_file_is_read_not_run(index, tmp_path):
    program = 'raise SystemExit\nbible = Bible("""\nIn the \\"beginning\\" \\u2014 café""", {"more": """no"""})'
    packed = tar_gz(("bible/text.py", program.encode()))
    (tmp_path / "files" / "poems-1.0.tar.gz").write_bytes(packed)
    source = dataclasses.replace(
        SOURCES["king-james"],
        package="poems",
        filename="poems-1.0.tar.gz",
        size=len(packed),
        sha256=hashlib.sha256(packed).hexdigest(),
        members=("bible/*.py",),
    )
    assert fetch(source) == [("bible/text.py", '\nIn the "beginning" — café'.encode())]


# ---- pip's settings -----------------------------------------------------------------------------------------------


def test_the_indexes_are_pips_own(tmp_path, monkeypatch):
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    configured = tmp_path / "pip.conf"
    monkeypatch.setenv("PIP_CONFIG_FILE", str(configured))
    configured.write_text("[global]\nindex-url = http://one.example/simple\ncert = /a.pem\n[download]\ncert = /b.pem\n")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "http://two.example/simple http://three.example/simple")
    settings = pip_settings()
    expected = ["http://one.example/simple", "http://two.example/simple", "http://three.example/simple"]
    assert index_addresses(settings) == expected
    assert settings["cert"] == "/b.pem"


def test_the_default_index_is_the_one_pip_reports(monkeypatch):
    models = pytest.importorskip("pip._internal.models.index", reason="pip keeps its default elsewhere")
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert index_addresses({}) == [models.PyPI.simple_url]


def test_a_python_without_pip(monkeypatch):
    failing = subprocess.CompletedProcess((), 1, stdout="", stderr="No module named pip")
    monkeypatch.setattr(package_index.subprocess, "run", lambda *command, **options: failing)
    assert index_addresses({"index-url": "http://one.example/simple"}) == ["http://one.example/simple"]
    assert index_addresses({}) == []


# ---- archives on the web ------------------------------------------------------------------------------------------


def on_the_web(server, *names: str, archive: bytes = ARCHIVE) -> Source:
    return dataclasses.replace(
        POEMS,
        package="",
        addresses=tuple(server.address + name for name in names),
        size=len(archive),
        sha256=hashlib.sha256(archive).hexdigest(),
    )


def test_the_first_address_that_has_the_archive(server):
    server.answers["/other.gz"] = 200, {"Content-Length": str(len(ARCHIVE))}, ARCHIVE[:-1] + b"x"
    server.answers["/large.gz"] = 200, {}, ARCHIVE + b"x"
    server.serve("/good.gz", ARCHIVE, breaks=[100, 150])
    source = on_the_web(server, "/gone.gz", "/other.gz", "/large.gz", "/good.gz", "/never.gz")
    for _ in range(2):
        assert fetch(source) == TEXTS
    assert server.requests == ["/gone.gz", "/other.gz", "/large.gz", *["/good.gz"] * 3]
    assert sources.cached(source) and not sources.cached(dataclasses.replace(source, size=1))


def test_no_address_has_it(server, tmp_path):
    server.answers["/other.gz"] = 200, {"Content-Length": str(len(ARCHIVE))}, ARCHIVE[:-1] + b"x"
    server.answers["/away.gz"] = 302, {"Location": "http://10.1.2.3/", "Content-Length": "0"}, b""
    source = on_the_web(server, "/gone.gz", "/other.gz", "/away.gz")
    said = "404 Not Found; .*not the one known here, by its sha256; .*not a public http"
    with pytest.raises(UserError, match=rf"'poems' is not on this machine.*{said}"):
        fetch(source)
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    with pytest.raises(UserError, match=r"(?<!text )'poems' names is not.*Try again when online\.$"):
        fetch(dataclasses.replace(source, is_text=False))


def test_a_broken_download_is_gone_on_with_by_the_next_call(server):
    served = server.serve("/a.gz", ARCHIVE, breaks=[90] * 9)
    source = on_the_web(server, "/a.gz")
    with pytest.raises(UserError, match="broke off after 90 of"):
        fetch(source)
    served.breaks, served.sent = [], 0
    assert fetch(source) == TEXTS
    assert served.sent == len(ARCHIVE) - 90


def test_a_member_of_several_texts(server):
    packed = tar_gz(("poems-1.0/texts/a.txt", b"one\ntwo\n"))
    server.serve("/a.gz", packed)
    source = dataclasses.replace(on_the_web(server, "/a.gz", archive=packed), extract=iter)
    assert fetch(source) == [("poems-1.0/texts/a.txt", b"one\n"), ("poems-1.0/texts/a.txt", b"two\n")]


# ---- the pins -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "documents", "characters"),
    [
        ("shakespeare", 42, 5_057_198),
        ("tiny-shakespeare", 1, 1_115_394),
        ("king-james", 1, 4_181_902),
        ("paradise-lost", 1, 465_072),
        ("enwik8", 1, 99_621_832),
        ("text8", 1, 74_090_640),
        ("wikitext-validation", 60, 0),
        ("wikitext-test", 60, 0),
    ],
)
def test_pinned_archives_hold_the_text_they_promise(name, documents, characters, tmp_path, monkeypatch):
    source = SOURCES[name]
    if not (USERS_CACHE / source.filename).exists():
        pytest.skip(f"{source.filename} has not been downloaded on this machine")
    monkeypatch.setenv("QUIRE_CACHE", str(USERS_CACHE.parent))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    texts = [data.decode() for _, data in fetch(source)]
    assert (len(texts), characters and sum(map(len, texts))) == (documents, characters)
    if name == "text8":  # what the published filter itself makes of enwik8
        assert texts[0].startswith(
            " anarchism originated as a term of abuse first used against early working class radi"
        )
        assert hashlib.md5(texts[0].encode()).hexdigest() == "a328a210892a7f06037570808ebd63f7"
    if name == "tiny-shakespeare" and (SHARED / "tinyshakespeare.txt").exists():
        assert texts[0].encode() == (SHARED / "tinyshakespeare.txt").read_bytes()


def test_the_ranks_of_gpt2_are_those_of_its_merges(monkeypatch):
    """vocab.bpe gives them too: the 256 bytes, printable ones first, then what each merge makes."""
    source, merges = SOURCES["gpt2-ranks"], SHARED / "gpt2_vocab.bpe"
    if not (USERS_CACHE / source.filename).exists() or not merges.exists():
        pytest.skip(f"{source.filename} or {merges.name} is not on this machine")
    monkeypatch.setenv("QUIRE_CACHE", str(USERS_CACHE.parent))
    ((_, table),) = fetch(source)
    ranks = {b64decode(token): int(rank) for token, rank in (line.split() for line in table.splitlines())}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    order = printable + [byte for byte in range(256) if byte not in printable]
    spelled = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(order[188:])}
    lines = merges.read_text(encoding="utf-8").splitlines()[1:]
    tokens = [bytes([byte]) for byte in order]
    tokens += [bytes(spelled[character] for character in line.replace(" ", "")) for line in lines]
    assert ranks == {token: rank for rank, token in enumerate(tokens)}
    assert len(ranks) == 50_256
