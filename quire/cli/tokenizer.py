"""quire tokenizer: train one, encode and decode with one, compare several on a text."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from quire.cli.flags import Switch, Texts, parse, print_json
from quire.data.prepare import counted, note_size
from quire.errors import UserError, choose
from quire.progress import bar, say
from quire.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer
from quire.tokenizers.tokenizer import BytesTokenizer, Special, Unknown

HELP = """usage: quire tokenizer train KIND TEXT ... --out FILE      fit a tokenizer of KIND to a text
       quire tokenizer encode TOKENIZER FILE              a file's tokens as ids (--json: {"ids": [...]})
       quire tokenizer decode TOKENIZER IDS.json          ids as the text they stand for, byte for byte
       quire tokenizer compare TEXT ...                   how tokenizers fare on a text of yours

KIND is character, word, bpe or byte-bpe. TOKENIZER is a run directory, a tokenizer.json (Quire's, or Hugging Face's
of byte-level BPE), a rank file (NAME.tiktoken), GPT-2's vocab.bpe or a known name (gpt2). --help after one of the
four tells more.
"""

Kind = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(TOKENIZERS)}}}")]]
Named = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="TOKENIZER")]]
File = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="FILE")]]
Several = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...", help_behavior_hint="(default: every kind)")]


@dataclass(frozen=True)
class TrainArguments:
    """Fit a tokenizer to TEXT, all of it, and write it to a file."""

    kind: Kind  # character, word, bpe or byte-bpe
    text: Texts = ()  # files, folders, globs, addresses or corpora
    out: str = "tokenizer.json"  # the file to write; NAME.PATTERN.tiktoken: a rank file (byte-bpe)
    vocabulary_size: int = 0  # tokens; 0: as the kind sees fit
    pattern: str = "gpt2"  # byte-bpe: how text is split: gpt2, cl100k, cl100k-hf, qwen2 or smollm
    rule: str = "subword-nmt"  # bpe: how pairs are chosen and words end: subword-nmt or published
    documents: str = "file"  # what one document is: file, line, blank-line, or a string that separates
    encoding: str = "utf-8"  # how TEXT is encoded
    json: Switch = False  # print one JSON object: kind, vocabulary_size and out


@dataclass(frozen=True)
class EncodeArguments:
    """Print the tokens of a file as ids. Bytes and line ends are kept as they are."""

    tokenizer: Named  # a run directory, a tokenizer file or a known name
    file: File  # the file; - is standard input
    special: Special = "text"  # what looks like a special token is plain text, the special token, or an error
    unknown: Unknown = "error"  # characters that it lacks: refuse, skip or replace them
    json: Switch = False  # print one JSON object: ids


@dataclass(frozen=True)
class DecodeArguments:
    """Print the text of ids, byte for byte; special tokens have none."""

    tokenizer: Named  # a run directory, a tokenizer file or a known name
    file: File  # ids as `encode` writes them: numbers, or a JSON object with "ids"; - is standard input
    json: Switch = False  # print one JSON object: text


@dataclass(frozen=True)
class CompareArguments:
    """Compare tokenizers on TEXT: kinds are fitted to its first nine tenths, and all are measured on the last."""

    text: Texts = ()  # files, folders, globs, addresses or corpora
    tokenizers: Several = ()  # kinds to fit, run directories, tokenizer files or known names
    vocabulary_size: int = 4096  # tokens of those that are fitted; character takes what there is
    sentence: str = ""  # shown as each tokenizer splits it; without it the first long line that is measured
    documents: str = "file"  # what one document is: file, line, blank-line, or a string that separates
    encoding: str = "utf-8"  # how TEXT is encoded
    json: Switch = False  # print one JSON object on standard output


def run(words: list[str]) -> int:
    """Do what the first word says."""
    if not words or words[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if words else 2
    action = choose("What to do with a tokenizer,", words[0], list(ACTIONS))
    kind, do = ACTIONS[action]
    return do(parse(kind, words[1:], f"tokenizer {action}"))


def train(given: TrainArguments) -> int:
    """Fit and write."""
    kind = TOKENIZERS[choose("The tokenizer kind", given.kind, list(TOKENIZERS))]
    own = {"byte-bpe": {"pattern": given.pattern}, "bpe": {"rule": given.rule}}.get(given.kind, {})
    out = free_file(given.out)
    documents = read_texts(given.text, given.documents, given.encoding)
    with bar("fitting the tokenizer") as show:
        texts = counted(documents.texts(), documents.sizes[1], show)
        tokenizer = kind.train(texts, given.vocabulary_size, **own)
    note_size(tokenizer, given.vocabulary_size)
    save(tokenizer, out)
    if given.json:
        print_json({"kind": given.kind, "vocabulary_size": tokenizer.vocabulary_size, "out": given.out})
    else:
        say(
            f"{given.out}: {given.kind}, {tokenizer.vocabulary_size:,} tokens. Use: quire train --tokenizer {given.out}"
        )
    return 0


def free_file(name: str) -> Path:
    """The file to write, if nothing is lost by that."""
    path = Path(name)
    if name == "-" or path.is_dir():
        raise UserError(f"{name} is no file to write a tokenizer to. Name one with --out.")
    if path.exists():
        raise UserError(f"{name} exists already. Name another file with --out, or delete it first.")
    return path


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizer in the form that the file's name asks for."""
    if path.suffix != ".tiktoken":
        tokenizer.save(path)
        return
    from quire.tokenizers.byte_bpe import ByteBPETokenizer
    from quire.tokenizers.formats import write_ranks

    if not isinstance(tokenizer, ByteBPETokenizer):
        raise UserError(f"{path}: only a byte-bpe tokenizer can be written as ranks. Name a file that ends in .json.")
    write_ranks(tokenizer, path)


def encode(given: EncodeArguments) -> int:
    """Print ids."""
    tokenizer, data = load_tokenizer(given.tokenizer), read_bytes(given.file)
    if given.special == "text" and hasattr(tokenizer, "encode_bytes"):
        ids = tokenizer.encode_bytes(data).tolist()
    else:
        ids = tokenizer.encode(as_text(data, given.file), given.unknown, given.special)
    if given.json:
        print_json({"ids": ids})
    else:
        print(*ids)
    return 0


def decode(given: DecodeArguments) -> int:
    """Print text."""
    tokenizer, data = load_tokenizer(given.tokenizer), read_bytes(given.file)
    try:
        words = data.split()
        found = list(map(int, words)) if words and all(map(bytes.isdigit, words)) else json.loads(data)
        ids = found["ids"] if isinstance(found, dict) else found
        if not isinstance(ids, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ValueError
    except (ValueError, KeyError, RecursionError) as error:
        raise UserError(
            f'{given.file} does not hold ids: whole numbers, a JSON list of them, or {{"ids": [...]}}.'
        ) from error
    if given.json:
        print_json({"text": tokenizer.decode(ids)})
        return 0
    bare = tokenizer.decode_bytes(ids) if isinstance(tokenizer, BytesTokenizer) else tokenizer.decode(ids).encode()
    sys.stdout.flush()
    sys.stdout.buffer.write(bare)
    sys.stdout.buffer.flush()
    return 0


def compare(given: CompareArguments) -> int:
    """Fit, measure, and show."""
    from quire.tokenizers.compare import compare, parts

    texts = list(read_texts(given.text, given.documents, given.encoding))
    fitted, measured = nine_tenths(texts)
    tokenizers, rows = {}, []
    with bar("comparing") as progress:
        names = given.tokenizers or tuple(TOKENIZERS)
        for number, name in enumerate(names):
            progress(number / len(names), tokenizer=name)
            kind = TOKENIZERS.get(name)
            tokenizers[name] = kind.train(fitted, given.vocabulary_size) if kind else load_tokenizer(name)
            rows.append(compare(name, tokenizers[name], measured))
    sentence = given.sentence or next((line for text in measured for line in text.split("\n") if len(line) > 20), "")
    split = {name: parts(tokenizer, sentence[:120]) for name, tokenizer in tokenizers.items()}
    if given.json:
        print_json({"tokenizers": [asdict(row) for row in rows], "sentence": sentence[:120], "split": split})
    else:
        show(rows, split)
    return 0


def nine_tenths(texts: list[str]) -> tuple[list[str], list[str]]:
    """The first nine tenths of the characters, and the rest."""
    fitted: list[str] = []
    left = int(sum(map(len, texts)) * 0.9)
    for index, text in enumerate(texts):
        if len(text) > left and (left or fitted):
            return [*fitted, text[:left]], [text[left:], *texts[index + 1 :]]
        fitted.append(text)
        left -= len(text)
    raise UserError("The text is too short to compare anything on.")


def show(rows: list[Any], split: dict[str, list[str]]) -> None:
    """A table of the figures, one of the scripts where there are several, and the split sentence in colours."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    table = Table(box=None, header_style="bold")
    names = ("tokenizer", "vocabulary", "tokens", "bytes/token", "used", "unknown", "MB/s")
    for name in names:
        table.add_column(name, justify="left" if name == "tokenizer" else "right", overflow="fold")
    for row in rows:
        table.add_row(
            row.tokenizer,
            f"{row.vocabulary_size:,}",
            f"{row.tokens:,}",
            f"{row.bytes_per_token:.2f}",
            f"{row.vocabulary_used:.0%}",
            f"{row.unknown:,}",
            f"{row.megabytes_per_second:.1f}",
        )
    console.print(table)
    if len(scripts := list(rows[0].scripts)) > 1:
        by_script = Table(box=None, header_style="bold", title="bytes/token by script", title_justify="left")
        for name in ("tokenizer", *scripts[:8]):
            by_script.add_column(name, justify="left" if name == "tokenizer" else "right")
        for row in rows:
            by_script.add_row(row.tokenizer, *(f"{row.scripts[script]:.2f}" for script in scripts[:8]))
        console.print(by_script)
    colours = ("black on cyan", "black on yellow", "black on green", "black on magenta")
    width = max(map(len, split))
    if not any(split.values()):
        return  # there was no line to show
    for name, pieces in split.items():
        line = Text(f"{name:{width}}  ")
        for index, piece in enumerate(pieces):
            shown = piece.replace("\n", "\\n").replace("\t", "\\t")
            if console.is_terminal:
                line.append(shown, colours[index % len(colours)])
            else:
                line.append(shown + "|")
        console.print(line)


def read_texts(texts: tuple[str, ...], documents: str, encoding: str) -> Any:
    """The documents of TEXT."""
    from quire.data.reading import DataSettings, read

    if not texts:
        raise UserError("Name a TEXT: files, folders, globs, addresses or corpora.")
    return read(texts, DataSettings(text=texts, documents=documents, encoding=encoding)).documents


def read_bytes(name: str) -> bytes:
    """A file's bytes, or standard input's."""
    if name == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}).") from error


def as_text(data: bytes, name: str) -> str:
    """UTF-8 bytes as text, line ends and all."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{name} is not UTF-8 text (at byte {error.start}), and this tokenizer takes only that."
        ) from error


ACTIONS: dict[str, tuple[type, Callable[[Any], int]]] = {
    "train": (TrainArguments, train),
    "encode": (EncodeArguments, encode),
    "decode": (DecodeArguments, decode),
    "compare": (CompareArguments, compare),
}
