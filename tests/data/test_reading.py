"""TEXT arguments: what becomes of every kind of file, and the sentence for every mistake."""

import gzip
import hashlib
import io
import json
import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quire.data import reading
from quire.data.reading import DataSettings, read
from quire.errors import UserError
from quire.sources import SOURCES

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and an empty cache."""
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documents(*texts: str, **settings: object) -> list[str]:
    return list(read(texts, DataSettings(**settings)).documents)


def write(name: str, data: bytes | str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(data.encode() if isinstance(data, str) else data)
    return name


# ---- where text comes from ----------------------------------------------------------------------------------------


def test_a_file_and_its_origin(here):
    data = "Grüße\n".encode()
    write("a.xyz", data)  # named by hand, any name is a text's
    corpus = read(["a.xyz"], DataSettings())
    origin = {"path": str(here / "a.xyz"), "sha256": hashlib.sha256(data).hexdigest(), "bytes": 7 + 1}
    assert list(corpus.documents) == ["Grüße\n"]
    assert (corpus.origins, corpus.skipped, corpus.attributions) == ([origin], [], [])
    assert corpus.arguments == [("a.xyz", 0, 1)]


def test_a_folder_is_read_in_order_and_what_is_skipped_is_named():
    write("d/b.txt", "b")
    write("d/a/z.md", "az")
    write("d/a.py", "apy")
    write("d/c.jsonl.gz", gzip.compress(b'{"text": "c1"}\n\n{"text": "c2"}', mtime=0))
    write("d/photo.jpg", b"\xff\xd8")
    write("d/photo.txt", b"\x89PNG\0")
    write("d/paper.txt", b"%PDF-1.4 ...")
    write("d/empty.txt", b"")
    write("d/blank.txt", b" \n\n")
    write("d/.git/config.txt", "hidden")
    write("d/.hidden.txt", "hidden")
    for name in ("config.toml", "manifest.json", "tokenizer.json"):
        write(f"d/runs/one/{name}", "{}")
    os.mkfifo("d/pipe.txt") if hasattr(os, "mkfifo") else write("d/pipe.txt", b"")
    corpus = read(["d"], DataSettings())
    assert list(corpus.documents) == ["apy", "az", "b", "c1", "c2"]
    assert [Path(origin["path"]).name for origin in corpus.origins] == ["a.py", "z.md", "b.txt", "c.jsonl.gz"]
    skipped = {Path(path).name: reason for path, reason in corpus.skipped}
    assert len(skipped) == len(corpus.skipped) == 9
    assert skipped.pop("pipe.txt") in ("is a pipe or a device, not a file", "is empty")
    assert skipped == {
        ".git": "is a hidden folder",
        ".hidden.txt": "is a hidden file",
        "blank.txt": "holds nothing but whitespace",
        "empty.txt": "is empty",
        "one": "is a run of Quire",
        "paper.txt": "is a binary file, not text",
        "photo.jpg": "is not named like a text",
        "photo.txt": "is a binary file, not text",
    }


@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need rights there")
def test_links_to_folders_are_not_followed():
    write("d/a.txt", "a")
    os.symlink("..", "d/up")
    os.symlink("nowhere", "d/broken.txt")
    corpus = read(["d"], DataSettings())
    assert list(corpus.documents) == ["a"]
    assert dict(corpus.skipped) == {
        "d/up": "is a link to a folder",
        "d/broken.txt": "cannot be read (No such file or directory)",
    }


def test_globs_match_files_and_folders_once():
    write("d/b.txt", "b")
    write("d/a.log", "a")
    write("d/image.png", b"\0")
    write("d/e/deep.txt", "deep")
    assert documents("d/*.txt") == ["b"]
    assert documents("d/[ab].*") == ["a", "b"]
    assert documents("d/*") == ["a", "b", "deep"]
    assert documents("d/**") == ["a", "b", "deep"]
    assert [reason for _, reason in read(["d/*.*"], DataSettings()).skipped] == ["is a binary file, not text"]
    assert documents(write("notes[1].txt", "a name, not a pattern")) == ["a name, not a pattern"]


def test_arguments_keep_their_order():
    assert documents(write("b.txt", "b"), write("a.txt", "a")) == ["b", "a"]


def test_a_text_named_twice_is_read_once():
    corpus = read([write("b.txt", "b"), "b.txt"], DataSettings())
    assert list(corpus.documents) == ["b"]
    assert corpus.skipped == [(os.path.abspath("b.txt"), "was named twice")]


def test_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("ä\r\n".encode()), encoding="ascii"))
    corpus = read(["-"], DataSettings())
    assert list(corpus.documents) == ["ä\n"]
    assert corpus.origins[0]["path"] == "-" and corpus.origins[0]["bytes"] == 4


def test_a_known_corpus_unless_a_file_has_its_name(monkeypatch):
    monkeypatch.setattr(reading, "texts", lambda source, on_bytes: [("a", "é".encode()), ("b", b"two\x1a")])
    corpus = read(["paradise-lost", "shakespeare"], DataSettings(encoding="latin-1"))
    assert list(corpus.documents) == ["é", "two"] * 2
    source = SOURCES["paradise-lost"]
    assert corpus.origins[0] == {"path": "paradise-lost", "sha256": source.sha256, "bytes": source.size}
    assert corpus.attributions == [source.attribution]  # both are from one package
    write("shakespeare", "mine")
    assert documents("shakespeare") == ["mine"]


# ---- bytes to text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(encoding):
    assert documents(write("a.txt", "naïve 文".encode(encoding))) == ["naïve 文"]
    assert documents("a.txt", encoding="cp1252") == ["naïve 文"]


@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-32-be"])
def test_big_endian_byte_order_marks(encoding):
    assert documents(write("a.txt", "\ufeffnaïve 文".encode(encoding))) == ["naïve 文"]


def test_a_named_encoding():
    assert documents(write("a.txt", "naïve".encode("latin-1")), encoding="latin-1") == ["naïve"]
    assert documents(write("a.txt", "naïve".encode("utf-16-le")), encoding="UTF-16LE") == ["naïve"]


def test_line_ends():
    assert documents(write("a.txt", "dos\r\nmac\runix\n\r\n")) == ["dos\nmac\nunix\n\n"]


def test_bad_bytes_can_be_replaced():
    assert documents(write("a.txt", b"na\xefve"), encoding_errors="replace") == ["na\ufffdve"]


RUSSIAN = "Все счастливые семьи похожи друг на друга, каждая несчастливая семья несчастлива по-своему.\n" * 20


@pytest.mark.parametrize(
    ("data", "offset", "match"),
    [
        (RUSSIAN.encode("cp1251"), 0, "Say --encoding cp1251, which it looks like"),
        (b"\xef\xbb\xbf" + RUSSIAN.encode() + b"\xff", 3 + len(RUSSIAN.encode()), "--encoding-errors replace; if not"),
        (RUSSIAN.encode("utf-16") + b"x", 2 * len(RUSSIAN) + 2, "utf-16-le.*--encoding-errors replace"),
        (("道可道，非常道。名可名，非常名。\n" * 3000).encode("gb18030"), 0, "--encoding gb18030"),
        (b"x\n" * 100_000 + RUSSIAN.encode("cp1251"), 200_000, "--encoding cp1251"),
    ],
)
def test_a_bad_byte_is_named_with_its_offset_and_remedies(data, offset, match):
    byte = data[offset]
    with pytest.raises(
        UserError, match=rf"a\.txt: the byte at offset {offset} \(0x{byte:02x}\) is not valid .*{match}"
    ):
        documents(write("a.txt", data))


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Le garçon était fâché. L'été dernier, à Orléans, j'ai rêvé d'une forêt où naît l'œuvre.", "cp1252"),
        ("Schöne Grüße aus München, wo die Straße über die Brücke führt.", "latin-1"),
        ("El niño comió mañana la piña; ¿qué pasó después? ¡Ánimo, señor!", "latin-1"),
        ("“It was the best of times,” he said — it’s not so bad.", "cp1252"),
        ("Příliš žluťoučký kůň úpěl ďábelské ódy. Když jsem byl malý, chodil jsem do školy.", "cp1250"),
        ("Zażółć gęślą jaźń. Wczoraj byłem w mieście i piłem wodę.", "cp1250"),
        (RUSSIAN, "koi8-r"),
        ("Καλημέρα κόσμε, πώς είσαι σήμερα;", "cp1253"),
        ("吾輩は猫である。名前はまだ無い。どこで生れたか頓と見当がつかぬ。", "shift_jis"),
        ("道可道，非常道。名可名，非常名。无名天地之始。", "gb18030"),
    ],
)
def test_the_encoding_said_to_be_likely_reads_the_text(text, encoding):
    with pytest.raises(UserError) as failed:
        documents(write("a.txt", text.encode(encoding) + b"\nplain\n"))
    likely = str(failed.value).partition("--encoding ")[2].partition(",")[0]
    assert documents("a.txt", encoding=likely) == [text + "\nplain\n"]


# ---- text to documents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("file", ["\none\n two\n\n \t\n\nthree\n"]),
        ("line", ["one", " two", "three"]),
        ("blank-line", ["one\n two", "three"]),
        (r"\n two", ["\none", "\n\n \t\n\nthree\n"]),
        (r"\t", ["\none\n two\n\n ", "\n\nthree\n"]),
        ("e\n", ["\non", " two\n\n \t\n\nthre"]),
    ],
)
def test_kinds_of_document(kind, expected):
    assert documents(write("a.txt", "\none\n two\n\n \t\n\nthree\n"), documents=kind) == expected


@given(st.text(st.characters(exclude_characters="\r\x1a\ufeff\0", exclude_categories=["Cs"])))
def test_any_text_is_read_as_it_was_written(text):
    Path("a.txt").write_bytes(text.encode())
    if text.strip() and not text.startswith("%PDF-"):
        assert documents("a.txt") == [text]
    else:
        with pytest.raises(UserError):
            documents("a.txt")


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1), st.booleans())
def test_jsonl_gives_one_document_a_line(texts, escaped):
    lines = [json.dumps({"id": 1, "body": text}, ensure_ascii=escaped) + "\r\n" for text in texts]
    Path("a.jsonl").write_bytes("".join(lines).encode())
    kept = [text for text in texts if text.strip()]
    if kept:
        assert documents("a.jsonl", text_field="body", documents="line") == kept
    else:
        with pytest.raises(UserError, match="nothing but whitespace"):
            documents("a.jsonl", text_field="body")


def test_half_a_surrogate_pair_in_jsonl():
    write("a.jsonl", '{"text": "\\ud83d\\ude00"}\n{"text": "a\\ud83d"}')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2, has half a surrogate pair"):
        documents("a.jsonl")
    assert documents("a.jsonl", encoding_errors="replace") == ["😀", "a\ufffd"]


# ---- mistakes -----------------------------------------------------------------------------------------------------

DAMAGED = bytearray(gzip.compress(os.urandom(5000)))
DAMAGED[2500] ^= 1


@pytest.mark.parametrize(
    ("name", "data", "match"),
    [
        ("a.txt", b"", r"a\.txt is empty\. Give a text"),
        ("a.txt", b" \n\t\r\n", r"a\.txt holds nothing but whitespace"),
        ("a.txt", b"\xef\xbb\xbf", "holds nothing but whitespace"),
        ("a.png", b"\x89PNG\r\n\x1a\n\0\0", r"a\.png is a binary file, not text\. Save it as plain text"),
        ("a.pdf", b"%PDF-1.7\n", "is a binary file"),
        ("a.txt", "text".encode("utf-16-le"), "is a binary file.*--encoding utf-16"),
        ("a.txt.gz", gzip.compress(b"", mtime=0), "holds nothing but whitespace"),
        ("a.txt.gz", gzip.compress(b"some text", mtime=0)[:-3], r"a\.txt\.gz is cut short"),
        ("a.txt.gz", b"some text", "is damaged, or not gzip"),
        ("a.txt.gz", bytes(DAMAGED), "is damaged, or not gzip"),
        ("a.txt.gz", gzip.compress(b"text", mtime=0) + b"more", "is damaged, or not gzip"),
        ("a.txt.gz", gzip.compress(bytes((1 << 24) + 1)), "expands to more than 16,777,216 bytes"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"a\.jsonl, line 2, is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1, is not JSON"),
        ("a.jsonl", b'\n["text"]', "line 2, is not a JSON object"),
        ("a.jsonl", b'{"body": "a", "id": 3}', r"no field 'text' \(there: body, id\)\. Say --text-field"),
        ("a.jsonl", b"{}", r"no field 'text' \(there: none\)"),
        ("a.jsonl", b'{"text": 3}', "the field 'text' is not a string"),
        ("a.jsonl", b'{"text": ""}', "holds nothing but whitespace"),
    ],
)
def test_a_file_that_cannot_be_read(name, data, match):
    with pytest.raises(UserError, match=match):
        documents(write(name, data))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"encoding": "latin1x"}, r"--encoding 'latin1x' is not a known text encoding\. Did you mean latin1\?"),
        ({"encoding": "hex"}, "'hex' is not a known text encoding"),
        ({"encoding": "a\0b"}, "is not a known text encoding"),
        ({"encoding": ""}, "--encoding '' is not a known text encoding"),
        ({"documents": ""}, "--documents is empty"),
        ({"documents": "lines"}, r"--documents 'lines' is neither file, line nor blank-line\. Did you mean line\?"),
    ],
)
def test_a_setting_that_cannot_be(settings, match):
    with pytest.raises(UserError, match=match):
        documents(write("a.txt", "text"), **settings)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("absent.txt", r"no file, folder or corpus named 'absent\.txt'\. Known corpora: shakespeare, tiny-shakespeare"),
        ("shakespear", r"named 'shakespear'\. Did you mean shakespeare\?"),
        ("", "named ''"),
        ("a\0b", "no file, folder or corpus"),
        ("a poem given as an argument " * 500, "no file, folder or corpus"),
        ("*.txt", r"^\*\.txt holds no text\. Name a file"),
        ("ftp://example.org/a.txt", "not an http or https address"),
    ],
)
def test_an_argument_that_names_nothing(text, match):
    with pytest.raises(UserError, match=match):
        documents(text)


def test_a_folder_without_text():
    Path("d").mkdir()
    with pytest.raises(UserError, match=r"^d holds no text\. Name a file, or a folder with"):
        documents("d")
    write("d/a.jpg", b"\xff")
    write("d/b.txt", b"")
    with pytest.raises(UserError, match=r"^d holds no text \(2 skipped: d.a\.jpg is not named like a text, \.\.\.\)"):
        documents("d")


def test_empty_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    with pytest.raises(UserError, match=r"^Standard input is empty"):
        documents("-")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_pipes_and_devices():
    os.mkfifo("pipe")
    for path in ("pipe", os.devnull):
        with pytest.raises(UserError, match=rf"{path} is a pipe or a device.* cat {path} \| quire train -"):
            documents(path)


def test_permission_denied():
    os.chmod(write("a.txt", "text"), 0)
    if os.access("a.txt", os.R_OK):
        pytest.skip("nothing is forbidden to this user")
    with pytest.raises(UserError, match=r"a\.txt cannot be read \(Permission denied\)"):
        documents("a.txt")
    Path("d").mkdir(mode=0)
    with pytest.raises(UserError, match=r"d holds no text \(1 skipped: d cannot be read \(Permission denied\)\)"):
        documents("d")


@pytest.mark.skipif(sys.platform != "linux", reason="needs a file that fails while it is read")
def test_a_read_that_fails():
    with pytest.raises(UserError, match=r"/proc/self/mem cannot be read \(Input/output error\)"):
        documents("/proc/self/mem")


def test_out_of_memory(monkeypatch):
    def too_large(path: str) -> None:
        raise MemoryError

    monkeypatch.setattr(reading, "_opened", too_large)
    with pytest.raises(UserError, match=r"a\.txt does not fit into this machine's memory"):
        documents(write("a.txt", "text"))


# ---- real texts ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (SHARED / "names.txt").exists(), reason="../shared/data is absent")
def test_real_texts():
    names = documents(str(SHARED / "names.txt"), documents="line")
    assert len(names) == 32_033 and names[0] == "emma"
    assert len(documents(str(SHARED / "lambada_test.jsonl"))) == 5_153
    verne = documents(str(SHARED / "jules_verne_4M.txt"))
    assert len(verne) == 1 and verne[0].encode() == (SHARED / "jules_verne_4M.txt").read_bytes().replace(b"\r\n", b"\n")
