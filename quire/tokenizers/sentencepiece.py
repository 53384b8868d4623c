"""SentencePiece's byte-pair encoding (Kudo and Richardson 2018), as Llama 1 and 2, Mistral and TinyLlama use it.

Spaces are written U+2581 and belong to the pieces; there is no other splitting. Characters that have no piece are
spelled by tokens for their bytes. It is read from models made elsewhere, and cannot be fitted here.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from quire.errors import UserError
from quire.tokenizers import merges as algorithm
from quire.tokenizers.tokenizer import BytesDecoder, BytesTokenizer, Decoder, Unknown, utf8

SPACE = "\u2581"  # what stands for a space in a piece
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
CACHED = 1 << 16  # words whose ids are kept

Prefix = Literal["never", "always", "missing", "first"]


class SentencePieceTokenizer(BytesTokenizer):
    """Pieces that are merged from characters, the best one first, of equal ones the leftmost.

    `pieces` are spelled with U+2581 for a space, a byte as <0x0A>, "" for an id without a token; those named in
    `specials` no text encodes to. Which merge is best say either `scores` of the pieces (any two neighbours that make a
    piece are merged, the highest score first) or `merges`, pairs of ids in the order in which they apply.

    `prefix`: a space is put before a text "never", "always", where it does not begin with one ("missing"), or the same
    but not after a special token ("first"). Decoding takes it away again. `unknown_token` stands for a character that
    has neither a piece nor tokens for its bytes; `fuse_unknown`: one for several in a row.
    """

    kind: ClassVar[str] = "sentencepiece"

    def __init__(
        self,
        pieces: list[str],
        specials: dict[str, int],
        separator: str,
        padding: str,
        *,
        scores: list[float] | None = None,
        merges: list[tuple[int, int]] | None = None,
        prefix: Prefix = "always",
        unknown_token: str | None = None,
        fuse_unknown: bool = True,
    ) -> None:
        assert (scores is None) != (merges is None), "scores or merges"
        self.pieces, self.scores, self.merges, self.prefix = pieces, scores, merges, prefix
        self._specials, self.unknown_token, self.fuse_unknown = specials, unknown_token, fuse_unknown
        self.vocabulary_size = len(pieces)
        self.separator, self.padding = specials[separator], specials[padding]
        self.tokens, self.ids, self.byte_ids = [b""] * len(pieces), {}, {}
        special = set(specials.values())
        for number, piece in enumerate(pieces):
            if number in special or not piece:
                continue
            if found := _BYTE.fullmatch(piece):
                self.tokens[number] = bytes([int(found[1], 16)])
                self.byte_ids[self.tokens[number][0]] = number
            else:
                self.tokens[number] = piece.replace(SPACE, " ").encode()
                self.ids[piece] = number
        # Where no piece has a space after something else, no merge reaches across such a place: words go one by one.
        apart = not any(SPACE in piece.lstrip(SPACE) for piece in self.ids)
        self._words = re.compile(f"{SPACE}*+[^{SPACE}]++|{SPACE}++" if apart else r"(?s:.+)")
        self._cache: dict[str, list[int]] = {}

    @property
    def specials(self) -> dict[str, int]:
        return self._specials

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int = 0) -> "SentencePieceTokenizer":
        raise UserError("A sentencepiece tokenizer comes with an imported model and cannot be fitted; choose byte-bpe.")

    @cached_property
    def ranks(self) -> dict[tuple[int, int], tuple[int, int]]:
        """Each pair of ids that is merged: its rank, the lowest first, and the id of what it becomes."""
        if self.merges is not None:
            made = {(left, right): self.ids[self.pieces[left] + self.pieces[right]] for left, right in self.merges}
            return {pair: (rank, made[pair]) for rank, pair in enumerate(self.merges)}
        assert self.scores is not None
        order = {score: rank for rank, score in enumerate(sorted(set(self.scores), reverse=True))}
        return {pair: (order[self.scores[number]], number) for pair, number in self.splits()}

    def splits(self) -> Iterable[tuple[tuple[int, int], int]]:
        """All pairs of ids that make a piece together, with the id of that piece."""
        for piece, number in self.ids.items():
            for cut in range(1, len(piece)):
                left, right = self.ids.get(piece[:cut]), self.ids.get(piece[cut:])
                if left is not None and right is not None:
                    yield (left, right), number

    # ---- text to ids ----

    def encode_array(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        return self._encode(text, unknown, self.prefix != "never")

    def encode_more(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        return self._encode(text, unknown, prefixed=False)

    def _encode_after_special(self, text: str, unknown: Unknown) -> np.ndarray:
        return self._encode(text, unknown, self.prefix not in ("never", "first"))

    def _encode(self, text: str, unknown: Unknown, prefixed: bool) -> np.ndarray:
        utf8(text)
        text = text.replace(" ", SPACE)
        if prefixed and text and (self.prefix == "always" or text[0] != SPACE):
            text = SPACE + text
        found = [number for word in self._words.findall(text) for number in self._encode_word(word)]
        ids = np.array(found, dtype=np.int32)
        return ids if not (nothing := ids < 0).any() else self._without_unknown(ids, nothing, text, unknown)

    def _encode_word(self, word: str) -> list[int]:
        """The ids of a word; -1 for a character that has none."""
        if (known := self._cache.get(word)) is not None:
            return known
        row: list[int] = []
        for character in word:
            row += [self.ids[character]] if character in self.ids else self._spelled(character)
        ids = algorithm.apply(row, self.ranks)
        if len(word) <= algorithm.SHORT:
            if len(self._cache) >= CACHED:
                self._cache.clear()
            self._cache[word] = ids
        return ids

    def _spelled(self, character: str) -> list[int]:
        data = character.encode()
        return [self.byte_ids[byte] for byte in data] if all(byte in self.byte_ids for byte in data) else [-1]

    def _without_unknown(self, ids: np.ndarray, nothing: np.ndarray, text: str, unknown: Unknown) -> np.ndarray:
        if unknown == "error":
            shown = ", ".join(f"{character!r} (U+{ord(character):04X})" for character in list(self.unknown(text))[:5])
            raise UserError(
                f"The model's vocabulary lacks {shown}. Change the text, or choose --unknown skip or --unknown replace."
            )
        if unknown == "skip" or self.unknown_token is None:
            return ids[~nothing]
        again = np.concatenate([[False], nothing[1:] & nothing[:-1]]) & self.fuse_unknown
        return np.where(nothing, self.specials[self.unknown_token], ids).astype(np.int32)[~again]

    def unknown(self, text: str) -> Counter[str]:
        counts = Counter(text.replace(" ", SPACE))
        lacking = {each for each in counts if each not in self.ids and self._spelled(each) == [-1]}
        return Counter({each: count for each, count in counts.items() if each in lacking})

    # ---- ids to text ----

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of `ids`, without the space that was put before the text; special tokens have none."""
        data = super().decode_bytes(ids)
        return data.removeprefix(b" ") if self.prefix != "never" else data

    def decoder(self, after: Sequence[int] = ()) -> Decoder:
        return SentencePieceDecoder(self, starts=self.prefix != "never" and not any(self.tokens[i] for i in after))

    # ---- in files ----

    def to_table(self) -> dict[str, Any]:
        names = {number: name for name, number in self.specials.items()}
        return {
            "pieces": self.pieces,
            "scores": self.scores,
            "merges": None if self.merges is None else [list(pair) for pair in self.merges],
            "prefix": self.prefix,
            "specials": self.specials,
            "separator": names[self.separator],
            "padding": names[self.padding],
            "unknown_token": self.unknown_token,
            "fuse_unknown": self.fuse_unknown,
        }

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> "SentencePieceTokenizer":
        pairs = None if table["merges"] is None else [(left, right) for left, right in table["merges"]]
        rest = {name: table[name] for name in ("scores", "prefix", "unknown_token", "fuse_unknown")}
        parts = (table[name] for name in ("pieces", "specials", "separator", "padding"))
        return cls(*parts, merges=pairs, **rest)


class SentencePieceDecoder(BytesDecoder):
    """Leaves out the space before the first word, where the stream is the beginning of a text."""

    def __init__(self, tokenizer: SentencePieceTokenizer, starts: bool) -> None:
        super().__init__(tokenizer)
        self.tokens, self.starts = tokenizer.tokens, starts

    def push(self, token: int) -> str:
        data = BytesTokenizer.decode_bytes(self.tokenizer, [token])  # type: ignore[arg-type]
        if self.starts and data:
            data, self.starts = data.removeprefix(b" "), False
        return self.held.decode(data)


def from_pieces(
    pieces: list[str],
    specials: dict[str, int],
    where: str,
    *,
    separator: str | int | None = None,
    padding: str | int | None = None,
    vocabulary_size: int = 0,
    **rest: Any,
) -> SentencePieceTokenizer:
    """A tokenizer from the parts of a file made elsewhere; `rest` as for SentencePieceTokenizer.

    `separator` and `padding` are names or ids (None: found by their usual names, padding else as the separator);
    `vocabulary_size`: at least so many ids. A UserError says what is wrong with the parts.
    """
    if 0 < vocabulary_size < len(pieces):
        raise UserError(f"{where} has {len(pieces)} pieces, but a vocabulary of {vocabulary_size} was asked for.")
    pieces = [*pieces, *[""] * (vocabulary_size - len(pieces))]
    usual = ("</s>", "<eos>", "<|endoftext|>", "<|im_end|>", "<|separator|>")
    separator = next((name for name in usual if name in specials), None) if separator is None else separator
    if separator is None:
        raise UserError(f"{where} has no token that ends a text. Say which one does, by its name or id.")
    if padding is None:
        padding = next((name for name in ("<pad>", "<|padding|>") if name in specials), separator)
    names = []
    for which in (separator, padding):
        known = isinstance(which, str) or 0 <= which < len(pieces)
        name = which if isinstance(which, str) else pieces[which] if known else ""
        if name not in pieces or not name:
            raise UserError(f"{where} has no token {which!r}.")
        specials = {**specials, name: pieces.index(name)}
        names.append(name)
    special = set(specials.values())
    text = [piece for number, piece in enumerate(pieces) if piece and number not in special]
    if len(set(text)) != len(text):
        double = next(piece for piece, count in Counter(text).items() if count > 1)
        raise UserError(f"{where} is damaged: its piece {double!r} stands there twice.")
    scores = rest.get("scores")
    if scores is not None and not np.isfinite(scores := [*scores, *[0.0] * (len(pieces) - len(scores))]).all():
        raise UserError(f"{where} is damaged: a score is not a number.")
    return SentencePieceTokenizer(pieces, specials, *names, **{**rest, "scores": scores})
