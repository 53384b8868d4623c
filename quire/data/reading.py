"""TEXT arguments to documents: files, folders, globs, addresses, standard input and known corpora."""

import glob
import hashlib
import io
import os
import stat
import sys
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

from quire import files
from quire.data.corpora import CORPORA, HubDataset
from quire.data.decoding import BLOCK, NotText, check_encoding, decoded, shown, unpacked
from quire.data.download import download
from quire.data.elsewhere import is_index
from quire.data.hub import hub_documents, is_hub
from quire.data.parquet import parquet_documents
from quire.data.published import is_marked, is_published
from quire.data.shards import INDEX
from quire.data.splitting import check_kind, pairs, records, split
from quire.data.spool import Corpus, Spool
from quire.data.tasks import TASKS
from quire.data.token_files import is_text, token_documents
from quire.data.vocabulary import Policy
from quire.errors import UserError, nearest
from quire.sources import Progress, texts

_TEXT_SUFFIXES = (  # of what is read inside folders; a file named by hand may have any name
    ".txt .text .md .markdown .rst .org .adoc .tex .log .srt .vtt .csv .tsv .jsonl .json .xml .html .htm .css "
    ".yaml .yml .toml .ini .cfg .py .pyi .js .mjs .jsx .ts .tsx .java .kt .scala .clj .c .h .cc .cpp .cxx .hpp .cu "
    ".cs .fs .go .rs .swift .m .rb .php .pl .lua .r .jl .hs .ml .ex .exs .erl .el .lisp .scm .sh .bash .zsh .fish .ps1 "
    ".bat .sql .asm .s .f90 .pas .d .nim .zig .dart .vue .cmake .mk .proto .parquet"
)
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
UNPACKED_LIMIT = 1 << 24  # bytes a .gz file may always expand to, and
UNPACKED_RATIO = 200  # beyond them times its own size (text: 3 to 20; a bomb: 1,000)

IS_RUN, IS_PREPARED = "is a run of Quire", "is a prepared text"


@dataclass(frozen=True)
class DataSettings:
    """Which text a model is trained on, and how it is read."""

    text: tuple[str, ...] = ()  # files, folders, globs, http(s) addresses, -, corpora, hf:OWNER/NAME; an index.json
    pairs: str = ""  # instead of TEXT, a file of lines SOURCE tab TARGET, a .jsonl with these fields, or a task's name
    validation: str = ""  # a text held out whole, to measure on, instead of a part of the training text
    documents: str = "file"  # what one document is: file, line, blank-line, or a string that separates (\n: a line end)
    text_field: str = "text"  # the field of a .jsonl line, .parquet or hf: row that holds its text, a document each
    encoding: str = "utf-8"  # how files are encoded; a byte order mark at a file's beginning overrides it
    encoding_errors: Literal["strict", "replace"] = "strict"  # bytes that are not text: stop, or replace them by U+FFFD
    unknown: Policy = "error"  # what a given tokenizer lacks: refuse, skip, replace, or grow its vocabulary by it
    cache_gigabytes: float = 10.0  # of a prepared text that lies elsewhere, how much is kept on this machine at most

    @property
    def named(self) -> tuple[str, ...]:
        """What is read: the texts, or the file of pairs."""
        return self.text or ((self.pairs,) if self.pairs else ())


def read(
    texts: Iterable[str], settings: DataSettings, on_progress: Progress | None = None, piped: bytes | None = None
) -> Corpus:
    r"""Read TEXT arguments, in the order given, folders and globs sorted by path.

    Text is kept as it is, but for a byte order mark and documents of nothing but whitespace, which are dropped, and
    line ends: \r\n and \r become \n. `on_progress` is told of bytes downloaded and read; `piped` stands in for
    standard input.

    Where the settings have pairs, what the arguments name is read as such: source and target by turns.

    Raises UserError for what cannot be read.
    """
    reader = _Reader(settings, on_progress, piped)
    for text in texts:
        try:
            reader.add(text)
        except MemoryError as error:
            raise UserError(f"{text} does not fit into this machine's memory. Train on a part of it.") from error
    return reader.corpus()


class _Reader:
    """Reads one TEXT after another into a spool."""

    def __init__(self, settings: DataSettings, on_progress: Progress | None, piped: bytes | None = None) -> None:
        check_encoding(settings.encoding)
        check_kind(settings.documents)
        self.settings = settings
        self.on_progress = on_progress
        self.piped = piped
        self.spool = Spool()
        self.origins: list[dict[str, Any]] = []
        self.known: set[str] = set()  # their paths
        self.skipped: list[tuple[str, str]] = []
        self.attributions: list[str] = []
        self.arguments: list[tuple[str, int, int]] = []

    def corpus(self) -> Corpus:
        """All that was read."""
        found = (self.origins, self.skipped, self.attributions, self.arguments)
        documents = replace(self.spool.finish(), group=2 if self.settings.pairs else 1)
        return Corpus(documents, self.spool.digest(), *found)

    def add(self, text: str) -> None:
        """Read one TEXT, whatever it names."""
        first = self.spool.tally.documents
        self.done, self.total = 0, 0  # bytes of the files that it names
        if self.settings.pairs and (is_hub(text) or text.lower().endswith((".parquet", ".bin"))):
            raise UserError(f"Pairs are read from .tsv and .jsonl files, not from {text}. Write them as one of those.")
        if is_index(text):
            raise UserError(
                f"{text} names a prepared text, which stands alone, to be trained on: quire train {text}"
                " If it is a text itself, give it another name."
            )
        if text == "-":
            self.add_file("-", sys.stdin.buffer if self.piped is None else io.BytesIO(self.piped))
        elif is_hub(text):
            self.add_documents(*hub_documents(text, self.settings.text_field, self.on_progress))
        elif "://" in text:
            self.add_path(text, str(download(text, self.on_progress)))
        elif os.path.isdir(text) and _stands_alone(text) == IS_RUN:
            raise UserError(f"{text} is a run, not a text. To train it further: quire resume {text} --minutes 5")
        elif os.path.isdir(text) and _stands_alone(text) == IS_PREPARED:
            index = f"{'--pairs ' * bool(self.settings.pairs)}{text.rstrip('/')}/{INDEX}"
            raise UserError(f"{text} holds a prepared text, which stands alone, to be trained on: quire train {index}")
        elif os.path.isdir(text):
            self.add_found(text, self.files_below(text))
        elif os.path.exists(text):
            self.total = _size(text)
            self.add_path(os.path.abspath(text), text)
        elif text in TASKS and self.settings.pairs:
            self.add_task(text)
        elif text in CORPORA and not self.settings.pairs:
            self.add_corpus(text)
        elif glob.has_magic(text):
            self.add_found(text, self.files_matching(text))
        elif self.settings.pairs:
            hint = nearest(text, list(TASKS))
            raise UserError(f"There is no file of pairs named {text!r}.{hint} Known tasks: {', '.join(TASKS)}.")
        else:
            raise UserError(
                f"There is no file, folder or corpus named {text!r}.{nearest(text, list(CORPORA))} "
                f"Known corpora: {', '.join(CORPORA)}."
            )
        self.arguments.append((text, first, self.spool.tally.documents))

    def add_documents(self, origin: dict[str, Any], documents: Iterable[str]) -> None:
        """Read documents that come one by one, as they are, but for line ends.

        `origin` has the "path" at first; its "sha256" and "bytes" may be filled in while the documents come.
        """
        if self.is_known(origin["path"]):
            return
        with self.one_origin(origin, "holds no text"):
            ends = (text.replace("\r\n", "\n").replace("\r", "\n") for text in documents)
            self.spool.add_pieces((text, True) for text in ends)

    def add_corpus(self, name: str) -> None:
        """Read a corpus of sources.py."""
        source = CORPORA[name]
        if isinstance(source, HubDataset):
            self.add_documents(*hub_documents(source.address, "text", self.on_progress, called=name))
        elif not self.is_known(name):
            with self.one_origin({"path": name, "sha256": source.sha256, "bytes": source.size}):
                for member, data in texts(source, self.on_progress):
                    text = decoded(member, [data], "utf-8", self.settings.encoding_errors)
                    self.spool.add_pieces(split(text, self.settings.documents))
        if source.attribution not in self.attributions:
            self.attributions.append(source.attribution)

    def add_task(self, name: str) -> None:
        """Make the pairs of a task."""
        documents = [text for pair in TASKS[name].pairs() for text in pair]
        data = "\n".join(documents).encode()
        origin = {"path": name, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        self.add_documents(origin, documents)

    def add_found(self, text: str, found: Iterable[str]) -> None:
        """Read those files of a folder or glob that hold text."""
        documents, skipped = self.spool.tally.documents, len(self.skipped)
        paths = list(found)
        self.total = sum(map(_size, paths))
        for path in paths:
            try:
                self.add_path(os.path.abspath(path), path)
            except NotText as error:
                self.skipped.append((path, error.reason))
        if self.spool.tally.documents == documents:
            passed = [f"{path} {why}" for path, why in self.skipped[skipped:]]
            because = f" ({len(passed)} skipped: {passed[0]}{', ...' if passed[1:] else ''})" if passed else ""
            raise UserError(f"{text} holds no text{because}. Name a file, or a folder with .txt files in it.")

    def add_path(self, name: str, path: str) -> None:
        """Read a file on disk; `name` is its path or the address that it came from."""
        suffix = PurePosixPath(urllib.parse.urlsplit(name).path if "://" in name else name.lower()).suffix
        with _opened(path) as file:
            if suffix == ".parquet":
                documents = parquet_documents(name, Path(path), self.settings.text_field)
            elif suffix == ".bin" and not is_text(Path(path)):
                documents = token_documents(name, Path(path))
            else:
                return self.add_file(name, file, _size(path))
        self.add_documents({"path": name, "sha256": files.sha256_of(Path(path)), "bytes": _size(path)}, documents)

    def add_file(self, name: str, file: BinaryIO, size: int | None = None) -> None:
        """Read an open file, or what can be read like one; its name says whether it is packed, and of what kind."""
        if self.is_known(name):
            return
        origin: dict[str, Any] = {"path": name}
        path = PurePosixPath(urllib.parse.urlsplit(name).path if "://" in name else name.lower())
        stored = _Stored(name, file, self.progress)
        with self.one_origin(origin):
            blocks: Iterator[bytes] = iter(lambda: stored.read(BLOCK), b"")
            if path.suffix == ".gz":
                size = len(file.getbuffer()) if isinstance(file, io.BytesIO) else size or 0
                limit = max(UNPACKED_LIMIT, UNPACKED_RATIO * size)
                blocks, path = unpacked(name, stored, limit) if size else blocks, path.with_suffix("")
            first = next(blocks, b"")
            if is_marked(first):
                remedy = "Name it where its files lie: quire train ADDRESS/index.json"
                raise NotText(shown(name), "is the index of a prepared text, no text itself", remedy)
            text = decoded(name, chain([first], blocks), self.settings.encoding, self.settings.encoding_errors)
            try:
                if self.settings.pairs:
                    self.spool.add_pieces(pairs(name, text, path.suffix == ".jsonl", self.settings.encoding_errors))
                elif path.suffix == ".jsonl":
                    lines = records(name, text, self.settings.text_field, self.settings.encoding_errors)
                    self.spool.add_pieces((line, True) for line in lines)
                else:
                    self.spool.add_pieces(split(text, self.settings.documents))
            except UserError:
                for _ in text:
                    pass  # it may turn out to be no text at all, which is to be said first
                raise
            if not stored.bytes:
                raise NotText(shown(name), "is empty", "Give a text to train on.")
            origin |= {"sha256": stored.sha256.hexdigest(), "bytes": stored.bytes}

    def is_known(self, name: str) -> bool:
        """Whether an origin has been read before; it is noted as skipped."""
        if known := name in self.known:
            self.skipped.append((name, "was named twice"))
        return known

    @contextmanager
    def one_origin(self, origin: dict[str, Any], nothing: str = "holds nothing but whitespace") -> Iterator[None]:
        """Within, the text of one origin is read: all of it, or nothing where that fails."""
        name, before = origin["path"], self.spool.tally.copy()
        try:
            yield
            if self.spool.tally.documents == before.documents:
                raise NotText(shown(name), nothing, "Give a text to train on.")
        except BaseException:
            self.spool.back_to(before)
            raise
        self.origins.append(origin)
        self.known.add(name)

    def progress(self, size: int) -> None:
        """So many more bytes of the files are read."""
        self.done += size
        if self.on_progress and self.total:
            self.on_progress(self.done, self.total)

    def files_below(self, folder: str) -> Iterator[str]:
        """The files of a folder and its subfolders that have the name of a text, sorted by path."""
        paths = []

        def unreadable(error: OSError) -> None:
            self.skipped.append((error.filename, f"cannot be read ({error.strerror})"))

        for parent, folders, names in os.walk(folder, onerror=unreadable):
            for name in list(folders):
                if reason := _why_not_enter(path := os.path.join(parent, name)):
                    folders.remove(name)
                    self.skipped.append((path, reason))
            paths += [os.path.join(parent, name) for name in names]
        for path in sorted(paths):
            name = os.path.basename(path).lower()
            if name.startswith("."):
                self.skipped.append((path, "is a hidden file"))
            elif Path(name.removesuffix(".gz")).suffix not in TEXT_SUFFIXES:
                self.skipped.append((path, "is not named like a text"))
            else:
                yield path

    def files_matching(self, pattern: str) -> list[str]:
        """The files that match a glob, and those of matching folders, once each, sorted by path."""
        paths: set[str] = set()
        for match in glob.glob(pattern, recursive=True):
            if not os.path.isdir(match):
                if is_published(Path(match).parent):
                    self.skipped.append((match, "is a part of a prepared text"))
                else:
                    paths.add(match)
            elif "**" in pattern:  # which matches the files below by itself
                continue
            elif reason := _stands_alone(match):
                self.skipped.append((match, reason))
            else:
                paths.update(self.files_below(match))
        return sorted(paths)


def _why_not_enter(folder: str) -> str:
    if os.path.basename(folder).startswith("."):
        return "is a hidden folder"
    if os.path.islink(folder):
        return "is a link to a folder"
    return _stands_alone(folder)


def _stands_alone(folder: str) -> str:
    is_run = all(
        os.path.exists(os.path.join(folder, name)) for name in ("config.toml", "manifest.json", "tokenizer.json")
    )
    return IS_RUN if is_run else IS_PREPARED if is_published(Path(folder)) else ""


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def _opened(path: str) -> BinaryIO:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            remedy = f"To train on what it gives: cat {path} | quire train -"
            raise NotText(path, "is a pipe or a device, not a file", remedy)
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(name: str, error: OSError) -> NotText:
    return NotText(shown(name), f"cannot be read ({error.strerror})", "Check its permissions.")


class _Stored:
    """A file as it is stored, hashed and counted while it is read."""

    def __init__(self, name: str, file: Any, on_bytes: Callable[[int], object]) -> None:
        self.name, self.file, self.on_bytes = name, file, on_bytes
        self.sha256, self.bytes = hashlib.sha256(), 0

    def read(self, size: int = -1) -> bytes:
        """The next bytes."""
        try:
            data = self.file.read(size)
        except OSError as error:
            raise _unreadable(self.name, error) from error
        self.sha256.update(data)
        self.bytes += len(data)
        self.on_bytes(len(data))
        return data
