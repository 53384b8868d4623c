"""Text to documents, block by block: a file, a line, what stands between blank lines or a string of the user's."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from quire.data.decoding import without_surrogates
from quire.errors import UserError, nearest

DOCUMENT_KINDS = ["file", "line", "blank-line"]
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")

Piece = tuple[str, bool]  # some text, and whether its document ends there


def split(blocks: Iterable[str], kind: str) -> Iterator[Piece]:
    """The documents of one text, in pieces; `kind` as --documents says it. Those of only whitespace are among them."""
    if kind == "file":
        yield from ((block, False) for block in blocks)
        yield "", True
    elif kind == "blank-line":
        yield from _between_blank_lines(blocks)
    else:
        separator = "\n" if kind == "line" else kind.replace("\\n", "\n").replace("\\t", "\t")
        yield from _between(blocks, separator)


def _between(blocks: Iterable[str], separator: str) -> Iterator[Piece]:
    """What str.split gives."""
    held = ""
    for block in blocks:
        *whole, last = (held + block).split(separator)
        yield from ((text, True) for text in whole)
        keep = max(0, len(last) - len(separator) + 1)  # the separator may have begun after that
        if keep:
            yield last[:keep], False
        held = last[keep:]
    yield held, True


def _between_blank_lines(blocks: Iterable[str]) -> Iterator[Piece]:
    """What stands between lines of nothing but whitespace, without the line ends around the whole text."""
    held, begun = "", False
    for block in blocks:
        text = held + (block if begun else block.lstrip("\n"))
        begun = begun or bool(text)
        # A separator may go on in the next block: hold back whitespace at the end, from its first line end on.
        visible = len(text.rstrip())
        end = text.find("\n", visible)
        keep = end if end >= 0 else len(text)
        *whole, last = _BLANK_LINES.split(text[:keep])
        yield from ((piece, True) for piece in whole)
        yield last, False
        held = _shortened(text[keep:])
    *whole, last = _BLANK_LINES.split(held.rstrip("\n"))
    yield from ((piece, True) for piece in whole)
    yield last, True


def _shortened(space: str) -> str:
    """Whitespace that begins with a line end and separates in the same way, with at most one blank line more."""
    if space.count("\n") < 4:
        return space
    start, first, *between, last = space.split("\n")
    return "\n".join([start, first, *([" "] if any(between) else []), last])


def records(name: str, blocks: Iterable[str], field: str, errors: str) -> Iterator[str]:
    """The text field of each line of a .jsonl file."""
    for where, record in _objects(name, blocks):
        if field not in record:
            there = ", ".join(record) or "none"
            raise UserError(f"{where}, has no field {field!r} (there: {there}). Say --text-field NAME.")
        value = record[field]
        if not isinstance(value, str):
            raise UserError(f"{where}: the field {field!r} is not a string. Say --text-field NAME.")
        yield without_surrogates(where, value, errors)


def pairs(name: str, blocks: Iterable[str], jsonl: bool, errors: str) -> Iterator[Piece]:
    """Source and target by turns: of each line SOURCE, tab, TARGET, or of each JSON object with those two fields.

    Raises UserError for a line that is not one pair of two texts, naming it. Blank lines are passed over.
    """
    for where, source, target in (_json_pairs if jsonl else _tabbed_pairs)(name, blocks):
        for text, what in ((source, "source"), (target, "target")):
            if not text or text.isspace():
                raise UserError(f"{where}: the {what} is empty. Give it a text, or take the line out.")
            yield without_surrogates(where, text, errors) if jsonl else text, True


def _tabbed_pairs(name: str, blocks: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    for number, line in enumerate(_whole(_between(blocks, "\n")), 1):
        where = f"{name}, line {number}"
        match line.split("\t"):
            case [source, target]:
                yield where, source, target
            case [text] if not text or text.isspace():
                continue
            case [_]:
                raise UserError(f"{where}, has no tab. A line of a file of pairs is: source, tab, target.")
            case parts:
                raise UserError(
                    f"{where}, has {len(parts) - 1} tabs. A line of a file of pairs has one, between source and"
                    ' target; texts with tabs in them go into a .jsonl file: {"source": ..., "target": ...}'
                )


def _json_pairs(name: str, blocks: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    for where, record in _objects(name, blocks):
        for field in ("source", "target"):
            if not isinstance(record.get(field), str):
                problem = "is not a text" if field in record else "is missing"
                raise UserError(f'{where}: {field!r} {problem}. A line of pairs is {{"source": ..., "target": ...}}.')
        yield where, record["source"], record["target"]


def _objects(name: str, blocks: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a .jsonl file but blank ones, with where it is."""
    for number, line in enumerate(_whole(_between(blocks, "\n")), 1):
        if not line or line.isspace():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}, is not JSON. Each line of a .jsonl file is one JSON object.") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}, is not a JSON object. Each line of a .jsonl file is one, with a text in it.")
        yield where, record


def check_kind(documents: str) -> None:
    """Refuse '' and a misspelt kind, such as 'lines'; any other string separates documents."""
    if not documents:
        raise UserError("--documents is empty. Say file, line, blank-line, or the string between documents.")
    hint = nearest(documents, DOCUMENT_KINDS)
    if documents not in DOCUMENT_KINDS and hint and documents.replace("-", "").isalpha():
        raise UserError(f"--documents {documents!r} is neither file, line nor blank-line.{hint}")


def _whole(pieces: Iterable[Piece]) -> Iterator[str]:
    """Each document in one."""
    parts: list[str] = []
    for text, ends in pieces:
        parts.append(text)
        if ends:
            yield "".join(parts)
            parts = []
