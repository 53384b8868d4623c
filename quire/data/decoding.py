"""Bytes to text, block by block: byte order marks, encodings, line ends, and what is no text at all."""

import codecs
import encodings.aliases
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from quire.errors import UserError, nearest

BLOCK = 1 << 20  # bytes read at once
REACH = 50_000  # bytes on each side of a bad one that tell the likely encoding
_BYTE_ORDER_MARKS = [  # UTF-32 first: its mark begins like UTF-16's
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
]


class NotText(UserError):
    """A file that holds no text: a mistake where it was named by hand, skipped where it was found in a folder."""

    def __init__(self, name: str, reason: str, remedy: str) -> None:
        super().__init__(f"{name} {reason}. {remedy}")
        self.reason = reason


def shown(name: str) -> str:
    """An origin's name as a sentence begins with it."""
    return "Standard input" if name == "-" else name


def unpacked(name: str, file: Any, limit: int) -> Iterator[bytes]:
    """The contents of a gzip file in blocks; UserError where it is damaged or expands to more than `limit` bytes."""
    done = 0
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as unpacking:
            while block := unpacking.read(BLOCK):
                if (done := done + len(block)) > limit:
                    raise OverflowError
                yield block
        return
    except OverflowError:
        problem = f"expands to more than {limit:,} bytes, as no text does. If it is meant, unpack it by hand"
    except EOFError:
        problem = "is cut short. Copy or download it again"
    except (OSError, zlib.error):
        problem = "is damaged, or not gzip. Copy or download it again"
    raise UserError(f"{name} {problem}.")


def decoded(name: str, blocks: Iterable[bytes], encoding: str, errors: str) -> Iterator[str]:
    r"""The text of an origin, in blocks: no byte order mark, line ends \n, no end-of-file mark of DOS.

    Raises NotText for what is binary, and UserError for a byte that is not of the encoding, naming its offset.
    """
    blocks = iter(blocks)
    first = b""
    while len(first) < 5 and (block := next(blocks, b"")):  # 5: the longest of what a file may begin with
        first += block
    mark, encoding = next(((mark, name) for mark, name in _BYTE_ORDER_MARKS if first.startswith(mark)), (b"", encoding))
    canonical = codecs.lookup(encoding).name
    wide = canonical.startswith(("utf-16", "utf-32"))
    decoder = codecs.getincrementaldecoder(encoding)(errors)
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    start, done, before, held = len(mark), 0, b"", ""
    if first.startswith(b"%PDF-"):
        first = b"\0" + first  # as binary as a zero byte
    for block in chain([first], blocks, [b""]):
        _refuse_binary(name, [block], blocks, wide)
        done += len(block)
        try:
            text = decoder.decode(block[start:], not block)
        except UnicodeDecodeError as error:
            offset = done - len(error.object) + error.start  # its object ends where the block does
            around, begins = before + block, done - len(before) - len(block)
            while begins + len(around) <= offset + REACH and (block := next(blocks, b"")):
                around += block
            _refuse_binary(name, [around], blocks, wide)
            _refuse_binary(name, blocks, blocks, wide)
            raise _bad_byte(name, around, offset, begins, encoding) from error
        text = held + line_ends.decode(text, not block)
        held = "\x1a" if text.endswith("\x1a") else ""  # the end-of-file mark, if nothing comes after it
        if text := text.removesuffix("\x1a"):
            yield text if wide or canonical == "utf-8" else without_surrogates(name, text, errors)  # utf-7 spells them
        before, start = (before + block)[-REACH:], 0


def check_encoding(name: str) -> None:
    """Refuse a name that is no text encoding."""
    try:
        b"a".decode(name)
    except UnicodeError:
        return  # known, and one byte is too little for it
    except (LookupError, ValueError) as error:
        known = sorted({alias.replace("_", "-") for pair in encodings.aliases.aliases.items() for alias in pair})
        raise UserError(f"--encoding {name!r} is not a known text encoding.{nearest(name.lower(), known)}") from error


def without_surrogates(where: str, text: str, errors: str) -> str:
    r"""`text`, which JSON or UTF-7 may spell with half a surrogate pair (\ud800), which no encoding can store."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            remedy = "Mend it, or say --encoding-errors replace."
            raise UserError(f"{where}, has half a surrogate pair, which is no character. {remedy}") from error
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _refuse_binary(name: str, blocks: Iterable[bytes], rest: Iterator[bytes], wide: bool) -> None:
    """NotText where `blocks` are binary. What is wrong with the rest of a packed file comes first: read to its end."""
    for block in blocks:
        if not wide and b"\0" in block:
            for _ in rest:
                pass
            remedy = "Save it as plain text first; if it is UTF-16 text, say --encoding utf-16."
            raise NotText(shown(name), "is a binary file, not text", remedy)


def _bad_byte(name: str, data: bytes, offset: int, begins: int, encoding: str) -> UserError:
    """The sentence for the byte at `offset`; `data` are the bytes around it, from offset `begins` on."""
    around = _lines_around(data, offset - begins)
    replaced = around.decode(encoding, "replace")
    odd = replaced.count("\ufffd")
    if sum(character > "\x7f" for character in replaced) > 2 * odd:  # beyond ASCII, most characters are good
        remedy = f"The rest looks like {encoding}, so say --encoding-errors replace; if not, --encoding NAME."
    else:
        likely = _likely_encoding(around)
        name_it = f"--encoding {likely}, which it looks like" if likely else "--encoding NAME, the right one"
        remedy = f"Say {name_it}, or --encoding-errors replace to read past such bytes."
    byte = f"the byte at offset {offset} (0x{data[offset - begins]:02x})"
    return UserError(f"{shown(name)}: {byte} is not valid {encoding}. {remedy}")


def _likely_encoding(data: bytes) -> str | None:
    """What charset-normalizer thinks of the lines that are not ASCII, but cp1252 where it sees that and cp1250.

    It puts cp1250 first for most French, German and Spanish; real cp1250 it seldom takes for cp1252 at all.
    """
    import charset_normalizer

    telling = b"\n".join(line for line in data.split(b"\n") if not line.isascii())
    names = [name for match in charset_normalizer.from_bytes(telling) for name in match.could_be_from_charset]
    return "cp1252" if names[:1] == ["cp1250"] and "cp1252" in names else next(iter(names), None)


def _lines_around(data: bytes, offset: int) -> bytes:
    """Up to REACH bytes on each side of an offset, ending with a line so that no character is cut there."""
    end = offset + REACH
    if end < len(data):
        end = data.rfind(b"\n", offset, end) + 1 or end
    return data[max(0, offset - REACH) : end]
