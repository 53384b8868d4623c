"""Hugging Face's tokenizer.json: byte-level BPE, SentencePiece's BPE and characters, read and written.

It is also how Quire keeps byte-level BPE, with a key of its own, model.quire, that Hugging Face's reader passes over.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from quire import files
from quire.errors import UserError, choose
from quire.tokenizers.byte_bpe import ByteBPETokenizer
from quire.tokenizers.character import CharacterTokenizer
from quire.tokenizers.core import IN_CORE
from quire.tokenizers.formats import Which, from_spelled, spelled
from quire.tokenizers.patterns import HUGGING_FACE
from quire.tokenizers.sentencepiece import SPACE, Prefix, SentencePieceTokenizer, from_pieces
from quire.tokenizers.tokenizer import PADDING, SEPARATOR, Tokenizer

Table = dict[str, Any]

# ---- writing ------------------------------------------------------------------------------------------------------


def to_hugging_face(tokenizer: Tokenizer, prompt_prefix: Sequence[int] = ()) -> Table:
    """The contents of a tokenizer.json that Hugging Face's tokenizers read, and that gives the same ids.

    `prompt_prefix`: ids of special tokens that a text begins with there. A UserError where there is no such file for
    this kind of tokenizer.
    """
    for kind, write in WRITERS.items():
        if isinstance(tokenizer, kind):
            return {**write(tokenizer), "post_processor": _template(tokenizer, prompt_prefix)}
    raise UserError(
        f"A {tokenizer.kind} tokenizer cannot be written for other programs: none of them splits text so. Train with"
        " --tokenizer byte-bpe or --tokenizer character instead."
    )


def _file(tokenizer: Tokenizer, normalizer: Any, split: Any, decoder: Any, model: Table) -> Table:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    named = sorted((number, name) for name, number in tokenizer.specials.items())
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": number, "content": name, **flags} for number, name in named],
        "normalizer": normalizer,
        "pre_tokenizer": split,
        "post_processor": None,
        "decoder": decoder,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            **model,
        },
    }


def _of_byte_level(tokenizer: ByteBPETokenizer) -> Table:
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    names = {number: name for name, number in tokenizer.specials.items()}
    spellings = [spelled(token) for token in tokenizer.tokens]
    steps: list[Table]
    if tokenizer.pattern == "smollm":
        steps = [{"type": "Digits", "individual_digits": True}, {**byte_level, "use_regex": True}]
    else:
        apart = {"type": "Split", "pattern": {"Regex": HUGGING_FACE[tokenizer.pattern]}, "behavior": "Isolated"}
        steps = [{**apart, "invert": False}, {**byte_level, "use_regex": False}]
    own: Table = {
        "pattern": tokenizer.pattern,
        "separator": names[tokenizer.separator],
        "padding": names[tokenizer.padding],
    }
    if not tokenizer.tokens[-1] and tokenizer.vocabulary_size - 1 not in names:  # ids without a token at the end
        own["vocabulary_size"] = tokenizer.vocabulary_size
    model = {
        "ignore_merges": bool(tokenizer.whole),
        "vocab": {**tokenizer.specials, **{spelling: i for i, spelling in enumerate(spellings) if spelling}},
        "merges": [f"{spellings[left]} {spellings[right]}" for left, right, _ in tokenizer.merges],
        "quire": own,
    }
    normalizer = {"type": tokenizer.normalization} if tokenizer.normalization else None
    return _file(
        tokenizer, normalizer, {"type": "Sequence", "pretokenizers": steps}, {**byte_level, "use_regex": False}, model
    )


def _of_characters(tokenizer: CharacterTokenizer) -> Table:
    """BPE without merges, nothing split before it: each character is its own token; others are passed over."""
    first = len(tokenizer.specials)
    vocabulary = {character: first + number for number, character in enumerate(tokenizer.characters)}
    return _file(tokenizer, None, None, {"type": "Fuse"}, {"vocab": {**tokenizer.specials, **vocabulary}, "merges": []})


def _of_sentencepiece(tokenizer: SentencePieceTokenizer) -> Table:
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    schemes = {"missing": "always", "first": "first"}
    normalizer: Table | None = None
    split = None
    if tokenizer.prefix == "always":
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    elif tokenizer.prefix == "never":
        normalizer = replace
    else:
        scheme = schemes[tokenizer.prefix]
        split = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    steps: list[Table] = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "}]
    steps += [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if tokenizer.prefix != "never":
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    pieces = tokenizer.pieces
    pairs = sorted(tokenizer.ranks, key=lambda pair: (tokenizer.ranks[pair][0], pair))
    model = {
        "unk_token": tokenizer.unknown_token,
        "fuse_unk": tokenizer.fuse_unknown,
        "byte_fallback": True,
        "vocab": {piece: number for number, piece in enumerate(pieces) if piece},
        "merges": [[pieces[left], pieces[right]] for left, right in pairs],
    }
    return _file(tokenizer, normalizer, split, {"type": "Sequence", "decoders": steps}, model)


WRITERS: dict[type[Tokenizer], Callable[[Any], Table]] = {
    ByteBPETokenizer: _of_byte_level,
    CharacterTokenizer: _of_characters,
    SentencePieceTokenizer: _of_sentencepiece,
}


def _template(tokenizer: Tokenizer, prefix: Sequence[int]) -> Table | None:
    if not prefix:
        return None
    names = {number: name for name, number in tokenizer.specials.items()}
    specials = {names[number]: {"id": names[number], "ids": [number], "tokens": [names[number]]} for number in prefix}
    before = [{"SpecialToken": {"id": names[number], "type_id": 0}} for number in prefix]
    text, other = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [*before, text],
        "pair": [*before, text, other],
        "special_tokens": specials,
    }


def write_checked(path: Path, table: Table) -> None:
    """Write what `to_hugging_face` gives, with its CRC-32 as model.quire.crc32."""
    files.write_text(path, _checked({**table, "model": {"quire": {}, **table["model"]}}))


# ---- reading ------------------------------------------------------------------------------------------------------


def read_hugging_face(
    path: Path, separator: Which = None, padding: Which = None, vocabulary_size: int = 0
) -> tuple[Tokenizer, list[int]]:
    """The tokenizer of a tokenizer.json, or of the folder that has one, and the ids that a text begins with there.

    As for `from_hugging_face`.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        raw = file.read_bytes()
        table = json.loads(raw)
    except OSError as error:
        raise UserError(f"There is no tokenizer.json at {path}, which the model's tokenizer is read from.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged: it is not JSON.") from error
    if not isinstance(table, dict) or "model" not in table:
        raise UserError(f"{file} is not a tokenizer.json of Hugging Face's.")
    return read_checked(raw, str(file), separator, padding, vocabulary_size), prompt_prefix(table, str(file))


def read_checked(
    raw: bytes, where: str, separator: Which = None, padding: Which = None, vocabulary_size: int = 0
) -> Tokenizer:
    """The tokenizer in a Hugging Face file, or in one of ours, where a changed byte is a UserError."""
    table = json.loads(raw)
    if isinstance(table["model"], dict) and (_own(table) or b'"crc32": "' in raw):  # whichever of the words is damaged
        _own(table).pop("crc32", None)
        if _checked(table).encode() != raw:
            raise UserError(f"{where} is damaged: its contents do not match its checksum. Restore it from a copy.")
    return from_hugging_face(table, where, separator, padding, vocabulary_size)


def _own(table: Table) -> Table:
    model = table.get("model")
    own = model.get("quire") if isinstance(model, dict) else None
    return own if isinstance(own, dict) else {}


def _checked(table: Table) -> str:
    def with_own(own: Table) -> Table:
        return {**table, "model": {**table["model"], "quire": own}}

    checksum = files.crc32(json.dumps(with_own(_own(table))).encode())
    return json.dumps(with_own({**_own(table), "crc32": checksum}), indent=1) + "\n"


def from_hugging_face(
    table: Table,
    where: str = "tokenizer.json",
    separator: Which = None,
    padding: Which = None,
    vocabulary_size: int = 0,
) -> Tokenizer:
    """A tokenizer from the contents of a tokenizer.json; a UserError says what in it Quire does not know.

    `separator` and `padding` are the names or ids of tokens, as a model's config.json names them (eos_token_id); None:
    found by their usual names. `vocabulary_size`: at least so many ids, as the model's embedding may have.
    """
    try:
        model = table["model"]
        if model.get("type") != "BPE" or model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"):
            raise UserError(f"{where} holds a {model.get('type')} tokenizer that is not byte-level BPE.")
        vocabulary = {str(spelling): int(number) for spelling, number in model["vocab"].items()}
        specials = {str(token["content"]): int(token["id"]) for token in table.get("added_tokens") or []}
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        if _is_of_characters(table):
            return _characters(vocabulary, specials, where)
        if model.get("byte_fallback") or _with(table, "Metaspace") or _with(table, "Prepend"):
            return _sentencepiece(table, vocabulary, pairs, specials, where, separator, padding, vocabulary_size)
        own = _own(table)
        return from_spelled(
            vocabulary,
            pairs,
            specials,
            choose(f"The splitting pattern in {where}", own.get("pattern") or _pattern(table, where), list(IN_CORE)),
            where,
            every_piece=bool(model.get("ignore_merges")),
            normalization=_normalization(table, where),
            separator=own.get("separator") if separator is None else separator,
            padding=own.get("padding") if padding is None else padding,
            vocabulary_size=vocabulary_size or own.get("vocabulary_size", 0),
        )
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        if isinstance(error, UserError):
            raise
        problem = f"it has no {error}" if isinstance(error, KeyError) else "a part of it is of the wrong kind"
        raise UserError(f"{where} is not a tokenizer.json that can be read: {problem}.") from error


def from_byte_level(table: Table) -> ByteBPETokenizer:
    """The byte-level BPE that `to_hugging_face` described."""
    tokenizer = from_hugging_face(table)
    assert isinstance(tokenizer, ByteBPETokenizer)
    return tokenizer


def _steps(part: Any, name: str) -> list[Table]:
    """The steps of a part of the file: those of a sequence, or the one that it is."""
    if not part:
        return []
    return part[name] if part["type"] == "Sequence" else [part]


def _with(table: Table, kind: str) -> bool:
    steps = _steps(table.get("normalizer"), "normalizers") + _steps(table.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == kind for step in steps)


# ---- byte-level BPE ----


def _normalization(table: Table, where: str) -> Literal["", "NFC"]:
    steps = _steps(table.get("normalizer"), "normalizers")
    if [step["type"] for step in steps] not in ([], ["NFC"]):
        kinds = ", ".join(str(step["type"]) for step in steps)
        raise UserError(f"{where} changes text before it is split (a normalizer: {kinds}), which Quire does not.")
    return "NFC" if steps else ""


def _pattern(table: Table, where: str) -> str:
    """The name of the pattern by which text is split: in one step, or each digit apart and then the rest."""
    steps = _steps(table.get("pre_tokenizer"), "pretokenizers")
    kinds = [step["type"] for step in steps]
    last = steps[-1] if kinds and kinds[-1] == "ByteLevel" else {"add_prefix_space": True}
    if not last.get("add_prefix_space"):
        regex = last.get("use_regex", True)
        if regex and kinds == ["ByteLevel"]:
            return "gpt2"
        if regex and kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if not regex and kinds == ["Split", "ByteLevel"]:
            apart = (steps[0]["behavior"], bool(steps[0].get("invert")))
            known = {regex: name for name, regex in HUGGING_FACE.items()}
            if apart in (("Isolated", False), ("Removed", True)) and steps[0]["pattern"].get("Regex") in known:
                return known[steps[0]["pattern"]["Regex"]]
    raise UserError(
        f"{where} splits text in a way that is neither GPT-2's nor cl100k's, Qwen2's or SmolLM's, which Quire does not"
        " know."
    )


# ---- characters ----


def _is_of_characters(table: Table) -> bool:
    steps = _steps(table.get("decoder"), "decoders")
    plain = not table.get("pre_tokenizer") and not table.get("normalizer") and not table["model"].get("byte_fallback")
    return plain and table["model"]["merges"] == [] and [step["type"] for step in steps] == ["Fuse"]


def _characters(vocabulary: dict[str, int], specials: dict[str, int], where: str) -> CharacterTokenizer:
    characters = sorted(set(vocabulary) - set(specials), key=vocabulary.__getitem__)
    ids = [vocabulary[character] for character in characters]
    if not characters or specials != {PADDING: 0, SEPARATOR: 1} or ids != list(range(2, 2 + len(characters))):
        raise UserError(f"{where} has characters as tokens, but not as Quire writes them: its special tokens differ.")
    if any(len(character) != 1 for character in characters):
        raise UserError(f"{where} has no merges, but tokens of several characters, which nothing makes.")
    return CharacterTokenizer("".join(characters))


# ---- SentencePiece's BPE ----


def _sentencepiece(
    table: Table,
    vocabulary: dict[str, int],
    pairs: list[tuple[str, ...]],
    specials: dict[str, int],
    where: str,
    separator: Which,
    padding: Which,
    vocabulary_size: int,
) -> SentencePieceTokenizer:
    model, numbers = table["model"], [*vocabulary.values(), *specials.values()]
    if min(numbers) < 0 or max(numbers) > 4 * len(numbers) + 4096:
        raise UserError(f"{where} is not a tokenizer: it has {len(numbers)} tokens and an id {max(numbers)}.")
    if model.get("ignore_merges"):
        raise UserError(f"{where} has SentencePiece's tokens with ignore_merges, which Quire does not know.")
    pieces = [""] * (1 + max(numbers))
    for piece, number in [*vocabulary.items(), *specials.items()]:
        pieces[number] = piece
    if len({*vocabulary, *specials}) != sum(map(bool, pieces)):
        raise UserError(f"{where} is damaged: two of its tokens have the same id.")
    if (unknown_token := model.get("unk_token")) is not None:
        specials = {**specials, unknown_token: vocabulary[unknown_token]}
    taken = set(specials.values())
    merges = [(vocabulary[left], vocabulary[right]) for left, right in pairs]
    if any({left, right, vocabulary[pieces[left] + pieces[right]]} & taken for left, right in merges):
        raise UserError(f"{where} is damaged: it merges a special token.")
    return from_pieces(
        pieces,
        specials,
        where,
        separator=separator,
        padding=padding,
        vocabulary_size=vocabulary_size,
        merges=merges,
        prefix=_prefix(table, where),
        unknown_token=unknown_token,
        fuse_unknown=bool(model.get("fuse_unk")),
    )


def _prefix(table: Table, where: str) -> Prefix:
    """When a space is put before a text, from the two places where that may be said."""
    changes = _steps(table.get("normalizer"), "normalizers")
    before = [step["type"] for step in changes]
    steps = _steps(table.get("pre_tokenizer"), "pretokenizers")
    wanted: Table = {"Prepend": {"prepend": SPACE}, "Replace": {"pattern": {"String": " "}, "content": SPACE}}
    if all({**step, **wanted.get(step["type"], {})} == step for step in changes):
        if before == ["Prepend", "Replace"] and not steps:
            return "always"
        if before == ["Replace"] and not steps:
            return "never"
        if not before and [step["type"] for step in steps] == ["Metaspace"] and steps[0]["replacement"] == SPACE:
            scheme = steps[0].get("prepend_scheme", "always")
            if steps[0].get("split") is False and scheme in ("never", "always", "first"):
                return {"never": "never", "always": "missing", "first": "first"}[scheme]  # type: ignore[return-value]
    raise UserError(f"{where} prepares text for SentencePiece's tokens in a way that Quire does not know.")


# ---- what a text begins with ----


def prompt_prefix(table: Table, where: str = "tokenizer.json") -> list[int]:
    """The ids that Hugging Face's tokenizer puts before every text (a BOS token), or none."""
    try:
        for step in _steps(table.get("post_processor"), "processors"):
            if step["type"] == "TemplateProcessing":
                ids: list[int] = []
                for item in step["single"]:
                    if "Sequence" in item:
                        return ids
                    ids += map(int, step["special_tokens"][item["SpecialToken"]["id"]]["ids"])
        return []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} is not a tokenizer.json that can be read: its post_processor is damaged.") from error
