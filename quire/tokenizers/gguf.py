"""The tokenizer of a GGUF file, from its parts and to them, as llama.cpp reads them.

Byte-level BPE is there "gpt2" with the name of a splitting pattern (`pre`); SentencePiece's is "llama". Characters are
written as SentencePiece's pieces of one character each, which are then all there is to find. llama.cpp does not bring
text into Unicode's NFC, as Hugging Face's tokenizers of Qwen2 do.
"""

from collections.abc import Sequence
from typing import Any

from quire.errors import UserError
from quire.tokenizers.byte_bpe import ByteBPETokenizer
from quire.tokenizers.character import CharacterTokenizer
from quire.tokenizers.formats import from_spelled, spelled
from quire.tokenizers.sentencepiece import SPACE, SentencePieceTokenizer, from_pieces
from quire.tokenizers.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # kinds of tokens, as GGUF numbers them

PATTERN_OF = {  # llama.cpp's names, and ours: where several split in the same way, the first is written
    "gpt-2": "gpt2",
    "phi-2": "gpt2",
    "olmo": "gpt2",
    "mpt": "gpt2",
    "jais": "gpt2",
    "dbrx": "cl100k-hf",
    "smaug-bpe": "cl100k-hf",
    "llama-bpe": "cl100k-hf",
    "llama3": "cl100k-hf",
    "llama-v3": "cl100k-hf",
    "falcon3": "cl100k-hf",
    "qwen2": "qwen2",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "smollm": "smollm",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
    "codeshell": "smollm",
    "exaone": "smollm",
}
EVERY_PIECE = ("llama-bpe", "llama3", "llama-v3", "falcon3")  # a piece that is a token is it, whatever the merges say


def from_gguf(
    model: str,
    tokens: Sequence[str],
    token_types: Sequence[int],
    *,
    pre: str = "",
    merges: Sequence[str] = (),
    scores: Sequence[float] = (),
    bos: int | None = None,
    eos: int | None = None,
    pad: int | None = None,
    unknown: int | None = None,
    add_bos: bool | None = None,
    add_space_prefix: bool | None = None,
    where: str = "The GGUF file",
) -> tuple[Tokenizer, list[int]]:
    """The tokenizer of the parts that a GGUF file has under tokenizer.ggml, and the ids that a text begins with.

    `eos` is its separator and `pad` its padding. What is None, or empty, the file does not have; a UserError says what
    in it Quire does not know.
    """
    if model not in ("gpt2", "llama"):
        raise UserError(f"{where} has a tokenizer of kind {model!r}. Those that can be read are gpt2 and llama.")
    if not tokens or len(token_types) not in (0, len(tokens)) or len(scores) not in (0, len(tokens)):
        raise UserError(f"{where} is damaged: {len(tokens)} tokens, {len(token_types)} types and {len(scores)} scores.")
    kinds = list(token_types) or [NORMAL] * len(tokens)
    named = {"beginning": bos, "end": eos, "padding": pad, "unknown": unknown}
    for what, number in named.items():
        if number is not None and not 0 <= number < len(tokens):
            raise UserError(f"{where} is damaged: its token for {what} is {number}, of {len(tokens)} tokens.")
    special = {number for number, kind in enumerate(kinds) if kind in (UNKNOWN, CONTROL, USER_DEFINED)}
    special |= {number for number in named.values() if number is not None}
    specials = {tokens[number]: number for number in sorted(special)}
    try:
        if model == "gpt2":
            made = _byte_level(pre, tokens, kinds, merges, specials, eos, pad, where)
        else:
            made = _sentencepiece(tokens, kinds, scores, specials, eos, pad, unknown, add_space_prefix, where)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        missing = isinstance(error, KeyError)
        problem = f"it merges {error}, which is no token" if missing else "a part of it is of the wrong kind"
        raise UserError(f"{where} has a damaged tokenizer: {problem}.") from error
    begins = (model == "llama" or pre in EVERY_PIECE) if add_bos is None else add_bos
    return made, [bos] if begins and bos is not None else []


def _byte_level(
    pre: str,
    tokens: Sequence[str],
    kinds: list[int],
    merges: Sequence[str],
    specials: dict[str, int],
    eos: int | None,
    pad: int | None,
    where: str,
) -> Tokenizer:
    if pre not in PATTERN_OF:
        known = ", ".join(PATTERN_OF)
        raise UserError(f"{where} splits text as {pre!r}, which Quire does not know. Known are {known}.")
    vocabulary = {token: number for number, token in enumerate(tokens) if kinds[number] != UNUSED}
    if len(vocabulary) != len(tokens) - kinds.count(UNUSED):
        raise UserError(f"{where} is damaged: one of its tokens stands there twice.")
    return from_spelled(
        vocabulary,
        [tuple(pair.split(" ")) for pair in merges],
        specials,
        PATTERN_OF[pre],
        where,
        every_piece=pre in EVERY_PIECE,
        normalization="NFC" if PATTERN_OF[pre] == "qwen2" else "",  # as the models that are split so were trained
        separator=eos,
        padding=pad,
        vocabulary_size=len(tokens),
    )


def _sentencepiece(
    tokens: Sequence[str],
    kinds: list[int],
    scores: Sequence[float],
    specials: dict[str, int],
    eos: int | None,
    pad: int | None,
    unknown: int | None,
    add_space_prefix: bool | None,
    where: str,
) -> Tokenizer:
    if not scores:
        raise UserError(f"{where} is damaged: it has no scores of its tokens, which say how they are merged.")
    unknown = kinds.index(UNKNOWN) if unknown is None and UNKNOWN in kinds else unknown
    return from_pieces(
        ["" if kind == UNUSED else token for token, kind in zip(tokens, kinds)],
        specials,
        where,
        separator=eos,
        padding=pad,
        scores=list(map(float, scores)),
        prefix="never" if add_space_prefix is False else "always",
        unknown_token=None if unknown is None else tokens[unknown],
    )


def to_gguf(tokenizer: Tokenizer, prompt_prefix: Sequence[int] = ()) -> dict[str, Any]:
    """The parts that `from_gguf` takes, by its names; a UserError where llama.cpp has nothing that gives the same ids.

    `prompt_prefix`: the special token that a text begins with, if any.
    """
    if len(prompt_prefix) > 1:
        raise UserError("A GGUF file has room for one token that a text begins with, and this model has several.")
    if isinstance(tokenizer, ByteBPETokenizer):
        parts = _of_byte_level(tokenizer)
    elif isinstance(tokenizer, SentencePieceTokenizer):
        parts = _of_pieces(tokenizer, tokenizer.pieces, _scores(tokenizer), tokenizer.prefix != "never")
    elif isinstance(tokenizer, CharacterTokenizer):
        parts = _of_characters(tokenizer)
    else:
        raise UserError(
            f"A {tokenizer.kind} tokenizer cannot be written to GGUF: llama.cpp has none that splits text so. Train"
            " with --tokenizer byte-bpe or --tokenizer character instead."
        )
    return {
        "merges": [],
        "scores": [],
        **parts,
        "bos": prompt_prefix[0] if prompt_prefix else tokenizer.separator,
        "eos": tokenizer.separator,
        "pad": tokenizer.padding,
        "add_bos": bool(prompt_prefix),
    }


def _listed(tokenizer: Tokenizer, spellings: list[str]) -> dict[str, Any]:
    """Tokens and their kinds; an id without a token gets a name, since no two may be the same."""
    names = {number: name for name, number in tokenizer.specials.items()}
    tokens, kinds = [], []
    for number, spelling in enumerate(spellings):
        special, empty = number in names, not spelling and number not in names
        tokens.append(names[number] if special else f"[PAD{number}]" if empty else spelling)
        kinds.append(CONTROL if special else UNUSED if empty else NORMAL)
    if len(set(tokens)) != len(tokens):
        double = next(token for token in tokens if tokens.count(token) > 1)
        raise UserError(f"The token {double!r} is spelled like another one, which llama.cpp refuses.")
    return {"tokens": tokens, "token_types": kinds}


def _of_byte_level(tokenizer: ByteBPETokenizer) -> dict[str, Any]:
    names = [pre for pre, pattern in PATTERN_OF.items() if pattern == tokenizer.pattern]
    fitting = [pre for pre in names if (pre in EVERY_PIECE) == bool(tokenizer.whole)]
    if not fitting:
        how = f"by the pattern {tokenizer.pattern}" + (" with tokens that no merges make" if tokenizer.whole else "")
        raise UserError(
            f"This tokenizer splits text {how}, which llama.cpp has no name for. Those with one are gpt2, cl100k-hf,"
            " qwen2 and smollm."
        )
    spellings = [spelled(token) for token in tokenizer.tokens]
    merges = [f"{spellings[left]} {spellings[right]}" for left, right, _ in tokenizer.merges]
    return {"model": "gpt2", "pre": fitting[0], "merges": merges, **_listed(tokenizer, spellings)}


def _of_pieces(tokenizer: Tokenizer, pieces: list[str], scores: list[float], prefix: bool) -> dict[str, Any]:
    parts = _listed(tokenizer, pieces)
    byte_ids = tokenizer.byte_ids.values() if isinstance(tokenizer, SentencePieceTokenizer) else ()
    for number in byte_ids:
        parts["token_types"][number] = BYTE
    unknown = getattr(tokenizer, "unknown_token", None)
    if unknown is not None:
        parts["token_types"][tokenizer.specials[unknown]] = UNKNOWN
    return {
        "model": "llama",
        "pre": "default",
        "scores": scores,
        "unknown": None if unknown is None else tokenizer.specials[unknown],
        "add_space_prefix": prefix,
        **parts,
    }


def _of_characters(tokenizer: CharacterTokenizer) -> dict[str, Any]:
    if SPACE in tokenizer.characters:
        raise UserError(
            f"The vocabulary has the character {SPACE} (U+2581), which llama.cpp takes for a space. Train without it,"
            " or with --tokenizer byte-bpe."
        )
    pieces = [*[""] * len(tokenizer.specials), *tokenizer.characters.replace(" ", SPACE)]
    return _of_pieces(tokenizer, pieces, [0.0] * len(pieces), prefix=False)


def _scores(tokenizer: SentencePieceTokenizer) -> list[float]:
    """Scores that give the same merges: the order in which pieces are made, where only that counts."""
    if tokenizer.scores is not None:
        return tokenizer.scores
    order: dict[int, int] = {}
    last = None
    for _, number in sorted(tokenizer.ranks.values()):
        if number != last and number in order:
            break
        order.setdefault(number, len(order))
        last = number
    else:
        if set(tokenizer.ranks) == {pair for pair, _ in tokenizer.splits()}:
            return [-float(order.get(number, len(order))) for number in range(len(tokenizer.pieces))]
    raise UserError(
        "The merges of this tokenizer cannot be said by scores of its pieces, which is how a GGUF file keeps them."
        " Export to Hugging Face's format instead."
    )
