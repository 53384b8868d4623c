"""TEXT arguments to documents: files, folders, globs, addresses, standard input and known corpora."""

import codecs
import dataclasses
import encodings.aliases
import glob
import hashlib
import json
import os
import re
import stat
import sys
import urllib.parse
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from quire import files
from quire.data.corpora import CORPORA, HubDataset
from quire.data.download import download
from quire.data.hub import hub_documents, is_hub
from quire.data.parquet import parquet_documents
from quire.data.token_files import is_text, token_documents
from quire.errors import UserError, nearest
from quire.sources import Progress, texts
from quire.sources.archives import gunzip

_TEXT_SUFFIXES = (  # of what is read inside folders; a file named by hand may have any name
    ".txt .text .md .markdown .rst .org .adoc .tex .log .srt .vtt .csv .tsv .jsonl .json .xml .html .htm .css "
    ".yaml .yml .toml .ini .cfg .py .pyi .js .mjs .jsx .ts .tsx .java .kt .scala .clj .c .h .cc .cpp .cxx .hpp .cu "
    ".cs .fs .go .rs .swift .m .rb .php .pl .lua .r .jl .hs .ml .ex .exs .erl .el .lisp .scm .sh .bash .zsh .fish .ps1 "
    ".bat .sql .asm .s .f90 .pas .d .nim .zig .dart .vue .cmake .mk .proto .parquet"
)
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
UNPACKED_LIMIT = 1 << 24  # bytes a .gz file may always expand to, and
UNPACKED_RATIO = 200  # beyond them times its own size (text: 3 to 20; a bomb: 1,000)

IS_RUN = "is a run of Quire"
DOCUMENT_KINDS = ["file", "line", "blank-line"]
_BYTE_ORDER_MARKS = [  # UTF-32 first: its mark begins like UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
]


@dataclass(frozen=True)
class DataSettings:
    """Which text a model is trained on, and how it is read."""

    text: tuple[str, ...] = ()  # files, folders, globs, http(s) addresses, -, known corpora, hf:OWNER/NAME
    validation: str = ""  # a text held out whole, to measure on, instead of a part of the training text
    documents: str = "file"  # what one document is: file, line, blank-line, or a string that separates (\n: a line end)
    text_field: str = "text"  # the field of a .jsonl line, .parquet or hf: row that holds its text, a document each
    encoding: str = "utf-8"  # how files are encoded; a byte order mark at a file's beginning overrides it
    encoding_errors: Literal["strict", "replace"] = "strict"  # bytes that are not text: stop, or replace them by U+FFFD


@dataclass
class Corpus:
    """Documents, and where they came from."""

    documents: list[str] = field(default_factory=list)
    # For each file, address, standard input ("-") or corpus: its absolute path, address or name as "path", and the
    # "sha256" and number of "bytes" of the file or archive as stored, before unpacking.
    origins: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)  # in folders and globs: (path, "is a binary file")
    attributions: list[str] = field(default_factory=list)  # to be shown to the user


def read(
    texts: Iterable[str], settings: DataSettings, on_progress: Progress | None = None, piped: bytes | None = None
) -> Corpus:
    r"""Read TEXT arguments, in the order given, folders and globs sorted by path.

    Text is kept as it is, but for a byte order mark and documents of nothing but whitespace, which are dropped, and
    line ends: \r\n and \r become \n. `on_progress` is told of bytes downloaded; `piped` stands in for standard input.

    Raises UserError for what cannot be read.
    """
    reader = _Reader(settings, on_progress, piped)
    for text in texts:
        try:
            reader.add(text)
        except MemoryError as error:
            raise UserError(f"{text} does not fit into this machine's memory. Train on a part of it.") from error
    return reader.corpus


class _NotText(UserError):
    """A file that holds no text: a mistake where it was named by hand, skipped where it was found in a folder."""

    def __init__(self, name: str, reason: str, remedy: str) -> None:
        super().__init__(f"{name} {reason}. {remedy}")
        self.reason = reason


class _Reader:
    def __init__(self, settings: DataSettings, on_progress: Progress | None, piped: bytes | None = None) -> None:
        _check_encoding(settings.encoding)
        _check_kind(settings.documents)
        self.settings = settings
        self.on_progress = on_progress
        self.piped = piped
        self.corpus = Corpus()
        self.separator = settings.documents.replace("\\n", "\n").replace("\\t", "\t")

    def add(self, text: str) -> None:
        if text == "-":
            self.add_bytes("-", sys.stdin.buffer.read() if self.piped is None else self.piped)
        elif is_hub(text):
            self._add_documents(*hub_documents(text, self.settings.text_field, self.on_progress))
        elif "://" in text:
            self.add_file(text, download(text, self.on_progress))
        elif os.path.isdir(text) and _why_not_enter(text) == IS_RUN:
            raise UserError(f"{text} is a run, not a text. To train it further: quire resume {text} --minutes 5")
        elif os.path.isdir(text):
            self.add_found(text, self.files_below(text))
        elif os.path.exists(text):
            self.add_file(os.path.abspath(text), Path(text))
        elif text in CORPORA:
            self.add_corpus(text)
        elif glob.has_magic(text):
            self.add_found(text, self.files_matching(text))
        else:
            raise UserError(
                f"There is no file, folder or corpus named {text!r}.{nearest(text, list(CORPORA))} "
                f"Known corpora: {', '.join(CORPORA)}."
            )

    def add_corpus(self, name: str) -> None:
        source = CORPORA[name]
        if isinstance(source, HubDataset):
            self._add_documents(*hub_documents(source.address, "text", self.on_progress, called=name))
        else:
            utf8 = dataclasses.replace(self.settings, encoding="utf-8")
            for member, data in texts(source, self.on_progress):
                self.corpus.documents += self.split(_decode(member, data, utf8))
            self.corpus.origins.append({"path": name, "sha256": source.sha256, "bytes": source.size})
        if source.attribution not in self.corpus.attributions:
            self.corpus.attributions.append(source.attribution)

    def add_found(self, text: str, paths: Iterable[str]) -> None:
        """Add those files of a folder or glob that hold text."""
        documents, skipped = len(self.corpus.documents), len(self.corpus.skipped)
        for path in paths:
            try:
                self.add_file(os.path.abspath(path), Path(path))
            except _NotText as error:
                self.corpus.skipped.append((path, error.reason))
        if len(self.corpus.documents) == documents:
            passed = [f"{path} {why}" for path, why in self.corpus.skipped[skipped:]]
            because = f" ({len(passed)} skipped: {passed[0]}{', ...' if passed[1:] else ''})" if passed else ""
            raise UserError(f"{text} holds no text{because}. Name a file, or a folder with .txt files in it.")

    def add_file(self, name: str, path: Path) -> None:
        """Add a file by its kind; `name` is its path or address."""
        suffix = PurePosixPath(urllib.parse.urlsplit(name).path if "://" in name else name.lower()).suffix
        if suffix not in (".parquet", ".bin") or not os.path.isfile(path):
            return self.add_bytes(name, _read_file(path))
        try:
            if suffix == ".bin" and is_text(path):
                return self.add_bytes(name, _read_file(path))
            origin = {"path": name, "sha256": files.sha256_of(path), "bytes": path.stat().st_size}
        except OSError as error:
            raise _NotText(name, f"cannot be read ({error.strerror})", "Check its permissions.") from error
        if suffix == ".parquet":
            self._add_documents(origin, parquet_documents(name, path, self.settings.text_field))
        else:
            self._add_documents(origin, token_documents(name, path))

    def _add_documents(self, origin: dict[str, Any], documents: Iterator[str]) -> None:
        """Add documents that are separate already. What `origin` lacks is there once the last has been read."""
        name = origin["path"]
        if any(known["path"] == name for known in self.corpus.origins):
            self.corpus.skipped.append((name, "was named twice"))
            return
        before = len(self.corpus.documents)
        self.corpus.documents += (document for document in documents if document and not document.isspace())
        if len(self.corpus.documents) == before:
            raise _NotText(name, "holds no text", "Give a text to train on.")
        self.corpus.origins.append(origin)

    def add_bytes(self, name: str, data: bytes) -> None:
        if any(known["path"] == name for known in self.corpus.origins):
            self.corpus.skipped.append((name, "was named twice"))
            return
        origin = {"path": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        if not data:
            raise _NotText(_shown(name), "is empty", "Give a text to train on.")
        path = PurePosixPath(urllib.parse.urlsplit(name).path if "://" in name else name.lower())
        if path.suffix == ".gz":
            data, path = _unpack(name, data), path.with_suffix("")
        decoded = _decode(name, data, self.settings)
        documents = _records(name, decoded, self.settings) if path.suffix == ".jsonl" else self.split(decoded)
        if not documents:
            raise _NotText(_shown(name), "holds nothing but whitespace", "Give a text to train on.")
        self.corpus.documents += documents
        self.corpus.origins.append(origin)

    def split(self, text: str) -> list[str]:
        """The documents of one text, without those of nothing but whitespace."""
        if self.settings.documents == "file":
            pieces = [text]
        elif self.settings.documents == "line":
            pieces = text.split("\n")
        elif self.settings.documents == "blank-line":
            pieces = re.split(r"\n(?:[^\S\n]*\n)+", text.strip("\n"))
        else:
            pieces = text.split(self.separator)
        return [piece for piece in pieces if piece and not piece.isspace()]

    def files_below(self, folder: str) -> Iterator[str]:
        """The files of a folder and its subfolders that have the name of a text, sorted by path."""
        paths = []

        def unreadable(error: OSError) -> None:
            self.corpus.skipped.append((error.filename, f"cannot be read ({error.strerror})"))

        for parent, folders, names in os.walk(folder, onerror=unreadable):
            for name in list(folders):
                if reason := _why_not_enter(path := os.path.join(parent, name)):
                    folders.remove(name)
                    self.corpus.skipped.append((path, reason))
            paths += [os.path.join(parent, name) for name in names]
        for path in sorted(paths):
            name = os.path.basename(path).lower()
            if name.startswith("."):
                self.corpus.skipped.append((path, "is a hidden file"))
            elif Path(name.removesuffix(".gz")).suffix not in TEXT_SUFFIXES:
                self.corpus.skipped.append((path, "is not named like a text"))
            else:
                yield path

    def files_matching(self, pattern: str) -> list[str]:
        """The files that match a glob, and those of matching folders, once each, sorted by path."""
        paths: set[str] = set()
        for match in glob.glob(pattern, recursive=True):
            if not os.path.isdir(match):
                paths.add(match)
            elif "**" not in pattern:  # which matches the files below by itself
                paths.update(self.files_below(match))
        return sorted(paths)


def _why_not_enter(folder: str) -> str:
    if os.path.basename(folder).startswith("."):
        return "is a hidden folder"
    if os.path.islink(folder):
        return "is a link to a folder"
    is_run = all(
        os.path.exists(os.path.join(folder, name)) for name in ("config.toml", "manifest.json", "tokenizer.json")
    )
    return IS_RUN if is_run else ""


def _shown(name: str) -> str:
    return "Standard input" if name == "-" else name


def _read_file(path: str | Path) -> bytes:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            remedy = f"To train on what it gives: cat {path} | quire train -"
            raise _NotText(str(path), "is a pipe or a device, not a file", remedy)
        return Path(path).read_bytes()
    except OSError as error:
        raise _NotText(str(path), f"cannot be read ({error.strerror})", "Check its permissions.") from error


def _unpack(name: str, data: bytes) -> bytes:
    limit = max(UNPACKED_LIMIT, UNPACKED_RATIO * len(data))
    try:
        return gunzip(data, limit)
    except OverflowError:
        problem = f"expands to more than {limit:,} bytes, as no text does. If it is meant, unpack it by hand"
    except EOFError:
        problem = "is cut short. Copy or download it again"
    except (OSError, zlib.error):
        problem = "is damaged, or not gzip. Copy or download it again"
    raise UserError(f"{name} {problem}.")


def _decode(name: str, data: bytes, settings: DataSettings) -> str:
    """Bytes to text: no byte order mark, line ends \\n, no end-of-file mark of DOS."""
    encoding, start = settings.encoding, 0
    for mark, marked in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            encoding, start = marked, len(mark)
            break
    wide = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    if not wide and (b"\0" in data or data.startswith(b"%PDF-")):
        remedy = "Save it as plain text first; if it is UTF-16 text, say --encoding utf-16."
        raise _NotText(_shown(name), "is a binary file, not text", remedy)
    try:
        text = str(memoryview(data)[start:], encoding, settings.encoding_errors)
    except UnicodeDecodeError as error:
        raise _bad_byte(name, data, start + error.start, encoding) from error
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.removesuffix("\x1a")


def _bad_byte(name: str, data: bytes, offset: int, encoding: str) -> UserError:
    around = _lines_around(data, offset)
    replaced = around.decode(encoding, "replace")
    odd = replaced.count("\ufffd")
    if sum(character > "\x7f" for character in replaced) > 2 * odd:  # beyond ASCII, most characters are good
        remedy = f"The rest looks like {encoding}, so say --encoding-errors replace; if not, --encoding NAME."
    else:
        likely = _likely_encoding(around)
        name_it = f"--encoding {likely}, which it looks like" if likely else "--encoding NAME, the right one"
        remedy = f"Say {name_it}, or --encoding-errors replace to read past such bytes."
    byte = f"the byte at offset {offset} (0x{data[offset]:02x})"
    return UserError(f"{_shown(name)}: {byte} is not valid {encoding}. {remedy}")


def _likely_encoding(data: bytes) -> str | None:
    """What charset-normalizer thinks of the lines that are not ASCII, but cp1252 where it sees that and cp1250.

    It puts cp1250 first for most French, German and Spanish; real cp1250 it seldom takes for cp1252 at all.
    """
    import charset_normalizer

    telling = b"\n".join(line for line in data.split(b"\n") if not line.isascii())
    names = [name for match in charset_normalizer.from_bytes(telling) for name in match.could_be_from_charset]
    return "cp1252" if names[:1] == ["cp1250"] and "cp1252" in names else next(iter(names), None)


def _lines_around(data: bytes, offset: int, reach: int = 50_000) -> bytes:
    """Up to `reach` bytes on each side of an offset, ending with a line so that no character is cut there."""
    end = offset + reach
    if end < len(data):
        end = data.rfind(b"\n", offset, end) + 1 or end
    return data[max(0, offset - reach) : end]


def _check_kind(documents: str) -> None:
    """Refuse '' and a misspelt kind, such as 'lines'; any other string separates documents."""
    if not documents:
        raise UserError("--documents is empty. Say file, line, blank-line, or the string between documents.")
    hint = nearest(documents, DOCUMENT_KINDS)
    if documents not in DOCUMENT_KINDS and hint and documents.replace("-", "").isalpha():
        raise UserError(f"--documents {documents!r} is neither file, line nor blank-line.{hint}")


def _check_encoding(name: str) -> None:
    try:
        b"a".decode(name)
    except UnicodeError:
        return  # known, and one byte is too little for it
    except (LookupError, ValueError) as error:
        known = sorted({alias.replace("_", "-") for pair in encodings.aliases.aliases.items() for alias in pair})
        raise UserError(f"--encoding {name!r} is not a known text encoding.{nearest(name.lower(), known)}") from error


def _records(name: str, text: str, settings: DataSettings) -> list[str]:
    """The text field of each line of a .jsonl file."""
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, is not JSON. Each line of a .jsonl file is one JSON object.") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}, is not a JSON object. Each line of a .jsonl file is one, with a text in it.")
        if settings.text_field not in record:
            there = ", ".join(record) or "none"
            raise UserError(f"{where}, has no field {settings.text_field!r} (there: {there}). Say --text-field NAME.")
        value = record[settings.text_field]
        if not isinstance(value, str):
            raise UserError(f"{where}: the field {settings.text_field!r} is not a string. Say --text-field NAME.")
        documents.append(_without_surrogates(where, value, settings.encoding_errors))
    return [document for document in documents if document and not document.isspace()]


def _without_surrogates(where: str, text: str, errors: str) -> str:
    r"""`text`, whose JSON may spell half of a surrogate pair (\ud800), which no encoding can store."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            remedy = "Mend it, or say --encoding-errors replace."
            raise UserError(f"{where}, has half a surrogate pair, which is no character. {remedy}") from error
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
