"""Byte-level BPE in the files of other tools: tiktoken's ranks, GPT-2's vocab.bpe, and what all such files share.

Ranks and merges say the same in two ways: a token's rank is the place of the merge that makes it. Hugging Face's
tokenizer.json is in hugging_face.py, the parts of a GGUF file in gguf.py.
"""

import base64
import binascii
import hashlib
import json
from pathlib import Path
from typing import Literal

from quire import files
from quire.errors import UserError, choose
from quire.tokenizers import merges as algorithm
from quire.tokenizers.byte_bpe import ByteBPETokenizer, Triple
from quire.tokenizers.core import IN_CORE
from quire.tokenizers.tokenizer import PADDING, SEPARATOR

END_OF_TEXT = "<|endoftext|>"
ENDS = (  # names of a separator, elsewhere
    SEPARATOR, END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]", "<|im_end|>", "<|eot_id|>",
)  # fmt: skip
PADS = (PADDING, "<|pad|>", "<pad>", "[PAD]")

Which = str | int | None  # a token, by its name or its id; None: found by its usual names

GPT2_SPECIALS = {END_OF_TEXT: 50256}
KNOWN_RANKS = {  # rank files say neither pattern nor specials: these are known by their sha256
    "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7": (
        "cl100k",
        {
            END_OF_TEXT: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
    ),
}


def byte_letters() -> list[str]:
    """GPT-2's letter for each byte: printable ones of Latin-1 stand for themselves, U+0100 and on for the rest."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


LETTERS = byte_letters()
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}


def spelled(token: bytes) -> str:
    """A token in GPT-2's letters."""
    return "".join(LETTERS[byte] for byte in token)


def _bytes_of(spelling: str, where: str) -> bytes:
    try:
        return bytes(BYTES[letter] for letter in spelling)
    except KeyError as error:
        raise UserError(f"{where}: the token {spelling!r} is not spelled in GPT-2's letters for bytes.") from error


# ---- the tokenizer of all of them ---------------------------------------------------------------------------------


def from_spelled(
    vocabulary: dict[str, int],
    pairs: list[tuple[str, ...]],
    specials: dict[str, int],
    pattern: str,
    where: str,
    *,
    every_piece: bool = False,
    normalization: Literal["", "NFC"] = "",
    separator: Which = None,
    padding: Which = None,
    vocabulary_size: int = 0,
) -> ByteBPETokenizer:
    """A tokenizer from tokens spelled in GPT-2's letters, the pairs of them that are merged, and special tokens.

    `every_piece`: a piece that equals a token is that token, whatever the merges say. `separator` and `padding` are
    the names or ids of tokens (None: found by their usual names); such a token becomes special if it is not.
    `vocabulary_size`: at least so many ids, those without a token never encoded to. Raises UserError, and KeyError,
    TypeError or ValueError where the parts are not of the kind they should be.
    """
    specials = dict(specials)
    names = {number: name for name, number in [*vocabulary.items(), *specials.items()]}
    separator, padding = (_promoted(which, names, vocabulary, specials, where) for which in (separator, padding))
    numbers = [*vocabulary.values(), *specials.values()]
    if "" in specials:
        raise UserError(f"{where} is damaged: it has a special token without a name.")
    if min(numbers) < 0 or max(numbers) > 4 * len(numbers) + 4096:
        raise UserError(f"{where} is not a tokenizer: it has {len(numbers)} tokens and an id {max(numbers)}.")
    if 0 < vocabulary_size <= max(numbers):
        raise UserError(f"{where} has an id {max(numbers)}, but a vocabulary of {vocabulary_size} was asked for.")
    if len(set(numbers)) != len({*vocabulary, *specials}):
        raise UserError(f"{where} is damaged: two of its tokens have the same id, or a special token has two.")
    tokens = [b""] * max(vocabulary_size, 1 + max(numbers))
    for spelling, number in vocabulary.items():
        if spelling not in specials:
            tokens[number] = _bytes_of(spelling, where)
    triples = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in pairs]
    for left, right, both in triples:
        if not tokens[left] or not tokens[right] or tokens[left] + tokens[right] != tokens[both]:
            raise UserError(f"{where} is damaged: token {both} is not what tokens {left} and {right} make.")
    whole = {token: number for number, token in enumerate(tokens) if len(token) > 1} if every_piece else {}
    if separator is None and vocabulary_size and not any(name in specials for name in ENDS):
        raise UserError(f"{where} has no token that ends a text. Say which one does, by its name or id.")
    return _made(tokens, triples, specials, pattern, whole, where, separator, padding, normalization)


def _promoted(
    which: Which, names: dict[int, str], vocabulary: dict[str, int], specials: dict[str, int], where: str
) -> str | None:
    """The name of a token given by name or id, which is special from now on."""
    if which is None:
        return None
    name = names.get(which) if isinstance(which, int) else which
    number = None if name is None else specials.get(name, vocabulary.get(name))
    if name is None or number is None:
        raise UserError(f"{where} has no token {which!r}.")
    specials[name] = number
    return name


def _made(
    tokens: list[bytes],
    triples: list[Triple],
    specials: dict[str, int],
    pattern: str,
    whole: dict[bytes, int],
    where: str,
    separator: str | None = None,
    padding: str | None = None,
    normalization: Literal["", "NFC"] = "",
) -> ByteBPETokenizer:
    """The tokenizer, with a separator and a padding token found by their names; padding may be the separator."""
    if {bytes([byte]) for byte in range(ord(" "), ord("~") + 1)} - set(tokens):
        raise UserError(f"{where} lacks a token for some byte: it is not byte-level BPE.")
    separator = separator or next((name for name in ENDS if name in specials), None)
    if separator is None:
        specials = {**specials, SEPARATOR: len(tokens)}
        tokens, separator = [*tokens, b""], SEPARATOR
    padding = padding or next((name for name in PADS if name in specials), separator)
    return ByteBPETokenizer(tokens, triples, specials, pattern, separator, padding, whole, normalization)


# ---- tiktoken's ranks ---------------------------------------------------------------------------------------------


def read_ranks(path: Path) -> ByteBPETokenizer:
    """A tokenizer from a tiktoken rank file: a line for each token, its bytes in base64 and its rank.

    Such a file says neither how text is split nor which special tokens there are. Of published files Quire knows both,
    by their sha256; of others the name says how text is split: NAME.gpt2.tiktoken.
    """
    data = path.read_bytes()
    named = Path(path.stem).suffix.removeprefix(".")
    pattern, specials = KNOWN_RANKS.get(hashlib.sha256(data).hexdigest(), (named, {}))
    if pattern not in IN_CORE:
        names = " or ".join(f"{path.stem}.{name}.tiktoken" for name in IN_CORE)
        raise UserError(f"{path} does not say how its text is split. Let its name say it: rename it to {names}.")
    return from_ranks(parse_ranks(data, str(path)), pattern, specials, str(path))


def parse_ranks(data: bytes, where: str) -> dict[bytes, int]:
    """The ranks in the bytes of a rank file; a UserError names the line that is none."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(f"{where}, line {number}, is not a token in base64 and its rank.") from error
    if len(set(ranks.values())) != len(ranks) or min(ranks.values(), default=-1) < 0:
        raise UserError(f"{where} is not a list of ranks: some rank is negative, or stands twice, or there is none.")
    return ranks


def from_ranks(
    ranks: dict[bytes, int], pattern: str, specials: dict[str, int], where: str = "The list of ranks"
) -> ByteBPETokenizer:
    """A tokenizer whose ids are the ranks.

    The merge that makes a token joins the two parts that the merges before it leave of it.
    """
    choose("--pattern", pattern, list(IN_CORE))
    if max(ranks.values()) > 4 * len(ranks) + 4096:
        raise UserError(f"{where} is not a list of ranks: it has {len(ranks)} tokens and a rank {max(ranks.values())}.")
    tokens = [b""] * (1 + max([*ranks.values(), *specials.values()]))
    for token, rank in ranks.items():
        tokens[rank] = token
    so_far: dict[tuple[int, int], tuple[int, int]] = {}
    triples, whole = [], {}
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) == 1:
            continue
        try:
            parts = algorithm.apply([ranks[bytes([byte])] for byte in token], so_far)
        except KeyError as error:
            raise UserError(f"{where} lacks a token for some byte: it is not byte-level BPE.") from error
        if len(parts) == 2:
            triples.append((parts[0], parts[1], ranks[token]))
            so_far[parts[0], parts[1]] = (len(so_far), ranks[token])
        else:
            whole[token] = ranks[token]
    return _made(tokens, triples, dict(specials), pattern, whole, where)


def write_ranks(tokenizer: ByteBPETokenizer, path: Path) -> None:
    """Write a tiktoken rank file. It holds no special tokens, and not how text is split."""
    lines = [b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokenizer.tokens) if token]
    files.write_bytes(path, b"".join(lines))


# ---- GPT-2's own files --------------------------------------------------------------------------------------------


def read_gpt2(path: Path) -> ByteBPETokenizer:
    """A tokenizer from GPT-2's vocab.bpe, with the ids of its encoder.json where that lies beside it.

    Without one the ids are what they are in every GPT-2: the bytes in the order of their letters, then the merges.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        pairs: list[tuple[str, ...]] = [tuple(line.split(" ")) for line in lines[1:] if line]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError
    except ValueError as error:
        raise UserError(f"{path} is not a vocab.bpe: after its first line each line is a pair of tokens.") from error
    beside = path.with_name(path.name.replace("vocab.bpe", "encoder.json"))
    if beside != path and beside.is_file():
        try:
            vocabulary = {str(k): int(v) for k, v in json.loads(beside.read_text(encoding="utf-8")).items()}
        except (ValueError, AttributeError, TypeError, OverflowError) as error:
            raise UserError(f"{beside} is not GPT-2's encoder.json: tokens and their ids.") from error
    else:
        order = sorted(range(256), key=lambda byte: (LETTERS[byte] != chr(byte), byte))
        spellings = [LETTERS[byte] for byte in order] + [left + right for left, right in pairs] + [END_OF_TEXT]
        vocabulary = {spelling: number for number, spelling in enumerate(spellings)}
    end = {END_OF_TEXT: vocabulary.get(END_OF_TEXT, len(vocabulary))}
    try:
        return from_spelled(vocabulary, pairs, end, "gpt2", str(path))
    except KeyError as error:
        raise UserError(f"{path} is not a vocab.bpe: it merges {error}, which is no token.") from error
