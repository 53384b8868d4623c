"""Byte-level BPE in the files of other tools: Hugging Face's tokenizer.json, tiktoken's ranks, GPT-2's vocab.bpe.

tokenizer.json is also how Quire keeps such a tokenizer, with a key of its own, model.quire, that Hugging Face's reader
passes over. Ranks and merges say the same in two ways: a token's rank is the place of the merge that makes it.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quire import files
from quire.errors import UserError, choose
from quire.tokenizers import merges as algorithm
from quire.tokenizers.byte_bpe import ByteBPETokenizer, Triple
from quire.tokenizers.core import IN_CORE
from quire.tokenizers.patterns import HUGGING_FACE
from quire.tokenizers.tokenizer import PADDING, SEPARATOR

END_OF_TEXT = "<|endoftext|>"
ENDS = (SEPARATOR, END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # names of a separator, elsewhere
PADS = (PADDING, "<|pad|>", "<pad>", "[PAD]")

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


def _spelled(token: bytes) -> str:
    return "".join(LETTERS[byte] for byte in token)


def _bytes_of(spelling: str, where: str) -> bytes:
    try:
        return bytes(BYTES[letter] for letter in spelling)
    except KeyError as error:
        raise UserError(f"{where}: the token {spelling!r} is not spelled in GPT-2's letters for bytes.") from error


# ---- Hugging Face's tokenizer.json --------------------------------------------------------------------------------


def to_hugging_face(tokenizer: ByteBPETokenizer) -> dict[str, Any]:
    """The contents of a tokenizer.json that Hugging Face's tokenizers read."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    specials = {number: name for name, number in tokenizer.specials.items()}
    spelled = [_spelled(token) for token in tokenizer.tokens]
    split = {"type": "Split", "pattern": {"Regex": HUGGING_FACE[tokenizer.pattern]}, "behavior": "Isolated"}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **flags} for number, name in sorted(specials.items())],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {**split, "invert": False}, {**byte_level, "use_regex": False},
        ]},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": bool(tokenizer.whole),
            "vocab": {**tokenizer.specials, **{spelling: i for i, spelling in enumerate(spelled) if spelling}},
            "merges": [f"{spelled[left]} {spelled[right]}" for left, right, _ in tokenizer.merges],
            "quire": {
                "pattern": tokenizer.pattern,
                "separator": specials[tokenizer.separator],
                "padding": specials[tokenizer.padding],
            },
        },
    }  # fmt: skip


def write_checked(path: Path, table: dict[str, Any]) -> None:
    """Write what `to_hugging_face` gives, with its CRC-32 as model.quire.crc32."""
    files.write_text(path, _checked(table))


def read_checked(raw: bytes, where: str) -> ByteBPETokenizer:
    """The tokenizer in a Hugging Face file, or in one of ours, where a changed byte is a UserError."""
    table = json.loads(raw)
    if isinstance(table["model"], dict) and (_own(table) or b'"crc32": "' in raw):  # whichever of the words is damaged
        _own(table).pop("crc32", None)
        if _checked(table).encode() != raw:
            raise UserError(f"{where} is damaged: its contents do not match its checksum. Restore it from a copy.")
    return from_hugging_face(table, where)


def _own(table: dict[str, Any]) -> dict[str, Any]:
    model = table.get("model")
    own = model.get("quire") if isinstance(model, dict) else None
    return own if isinstance(own, dict) else {}


def _checked(table: dict[str, Any]) -> str:
    own = {**_own(table), "crc32": files.crc32(json.dumps(table).encode())}
    return json.dumps({**table, "model": {**table["model"], "quire": own}}, indent=1) + "\n"


def from_hugging_face(table: dict[str, Any], where: str = "tokenizer.json") -> ByteBPETokenizer:
    """A tokenizer from the contents of a tokenizer.json, if it holds byte-level BPE; else a UserError says what not."""
    try:
        model, added = table["model"], table.get("added_tokens") or []
        if model.get("type") != "BPE" or model.get("byte_fallback") or model.get("end_of_word_suffix"):
            raise UserError(f"{where} holds a {model.get('type')} tokenizer that is not byte-level BPE.")
        vocabulary = {str(spelling): int(number) for spelling, number in model["vocab"].items()}
        specials = {str(token["content"]): int(token["id"]) for token in added}
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        own = _own(table)
        pattern = own.get("pattern") or _pattern_of(table.get("pre_tokenizer"), where)
        choose(f"The splitting pattern in {where}", pattern, list(IN_CORE))
        if table.get("normalizer"):
            raise UserError(f"{where} changes text before it is split (a normalizer), which Quire does not.")
        numbers = [*vocabulary.values(), *specials.values()]
        if "" in specials:
            raise UserError(f"{where} is damaged: it has a special token without a name.")
        if min(numbers) < 0 or max(numbers) > 4 * len(numbers) + 4096:
            raise UserError(f"{where} is not a tokenizer.json: {len(numbers)} tokens and an id {max(numbers)}.")
        tokens = [b""] * (1 + max(numbers))
        for spelling, number in vocabulary.items():
            if specials.get(spelling) != number:
                tokens[number] = _bytes_of(spelling, where)
        triples = [(vocabulary[left], vocabulary[right], vocabulary[left + right]) for left, right in pairs]
        for left, right, both in triples:
            if not tokens[left] or not tokens[right] or tokens[left] + tokens[right] != tokens[both]:
                raise UserError(f"{where} is damaged: token {both} is not what tokens {left} and {right} make.")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        problem = f"it has no {error}" if isinstance(error, KeyError) else "a part of it is of the wrong kind"
        raise UserError(f"{where} is not a tokenizer.json of byte-level BPE: {problem}.") from error
    whole = {token: number for number, token in enumerate(tokens) if len(token) > 1}
    whole = whole if model.get("ignore_merges") else {}
    return _made(tokens, triples, specials, pattern, whole, where, own.get("separator"), own.get("padding"))


def _pattern_of(pre_tokenizer: Any, where: str) -> str:
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer]) if pre_tokenizer else []
    for step in steps:
        if step["type"] == "ByteLevel" and step.get("use_regex", True) and not step.get("add_prefix_space"):
            return "gpt2"
        if step["type"] == "Split":
            known = {regex: name for name, regex in HUGGING_FACE.items()}
            if (regex := step["pattern"].get("Regex")) in known:
                return known[regex]
    raise UserError(f"{where} splits text in a way that is neither GPT-2's nor cl100k's, which Quire does not know.")


def _made(
    tokens: list[bytes],
    triples: list[Triple],
    specials: dict[str, int],
    pattern: str,
    whole: dict[bytes, int],
    where: str,
    separator: str | None = None,
    padding: str | None = None,
) -> ByteBPETokenizer:
    """The tokenizer, with a separator and a padding token found by their names; padding may be the separator."""
    if {bytes([byte]) for byte in range(256)} - set(tokens):
        raise UserError(f"{where} lacks a token for some byte: it is not byte-level BPE.")
    separator = separator or next((name for name in ENDS if name in specials), None)
    if separator is None:
        specials = {**specials, SEPARATOR: len(tokens)}
        tokens, separator = [*tokens, b""], SEPARATOR
    padding = padding or next((name for name in PADS if name in specials), separator)
    return ByteBPETokenizer(tokens, triples, specials, pattern, separator, padding, whole)


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
        pairs = [(left, right) for left, right in (line.split(" ") for line in lines[1:] if line)]
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
    added: Iterable[dict[str, Any]] = [{"id": vocabulary.get(END_OF_TEXT, len(vocabulary)), "content": END_OF_TEXT}]
    model = {"type": "BPE", "vocab": vocabulary, "merges": [list(pair) for pair in pairs], "quire": {"pattern": "gpt2"}}
    return from_hugging_face({"model": model, "added_tokens": added}, str(path))
