"""One token a word: short sequences, a large vocabulary, and spelling for what is not in it."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from quire.errors import UserError
from quire.tokenizers.patterns import splitter
from quire.tokenizers.pieces import PieceCounts
from quire.tokenizers.tokenizer import PADDING, SEPARATOR, BytesTokenizer, Unknown, utf8

SPECIALS = (PADDING, SEPARATOR)
FIRST_BYTE = len(SPECIALS)  # ids 2 to 257 are the bytes
FIRST_PIECE = FIRST_BYTE + 256
LARGEST = 1 << 15  # tokens, where no size is given


class WordTokenizer(BytesTokenizer):
    """Words, punctuation and white space as they stand in the text, the most frequent ones.

    A piece outside the vocabulary is spelled by characters, a character outside it by its UTF-8 bytes: nothing is
    ever lost, and nothing is unknown.

    >>> words = WordTokenizer.train(["to be or not to be"])
    >>> [words.name(i) for i in words.encode("to bet")]
    ['to', ' ', 'b', 'e', 't']
    """

    kind = "word"
    padding, separator = range(FIRST_BYTE)

    def __init__(self, pieces: list[str]) -> None:
        assert len(set(pieces)) == len(pieces), "each piece once"
        self.pieces = pieces
        self.tokens = [b"" for _ in SPECIALS] + [bytes([byte]) for byte in range(256)] + [utf8(p) for p in pieces]
        self.vocabulary_size = len(self.tokens)
        self._ids = {piece: number for number, piece in enumerate(pieces, FIRST_PIECE)}

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int = 0) -> "WordTokenizer":
        """Every character, the most frequent first, in up to half of the room; then words that occur more than once."""
        counts = PieceCounts[str]().add(texts, splitter("word").findall).counts
        characters: Counter[str] = Counter()
        for piece, count in counts.items():
            for character in piece:
                characters[character] += count
        room = room_for_pieces(cls.kind, vocabulary_size or LARGEST)
        pieces = ranked(characters)[: max(1, room // 2)]
        spelled = set(pieces)
        words = [word for word in ranked(counts) if word not in spelled and len(word) > 1 and counts[word] > 1]
        return cls(pieces + words[: room - len(pieces)])

    def encode_array(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        ids: list[int] = []
        known = self._ids
        utf8(text)  # what is no character is refused, wherever it stands
        for piece in splitter("word").findall(text):
            if (number := known.get(piece)) is not None:
                ids.append(number)
            else:
                for character in piece:
                    ids += spelled(character, known)
        return np.array(ids, dtype=np.int32)

    def unknown(self, text: str) -> Counter[str]:
        return Counter(piece for piece in splitter("word").findall(text) if piece not in self._ids)

    def grown(self, pieces: Iterable[str]) -> "WordTokenizer":
        """The pieces, and the characters that they are spelled with."""
        new = Counter(pieces)
        wanted = {*new, *(character for piece in new for character in piece)} - set(self.pieces)
        return WordTokenizer([*self.pieces, *sorted(wanted)])

    def to_table(self) -> dict[str, Any]:
        return {"pieces": self.pieces}

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> "WordTokenizer":
        return cls(table["pieces"])


def spelled(character: str, known: dict[str, int]) -> list[int]:
    """The id of a character, or those of its bytes."""
    number = known.get(character)
    return [number] if number is not None else [FIRST_BYTE + byte for byte in character.encode()]


def ranked(counts: Counter[str]) -> list[str]:
    """The most frequent first; those equally frequent in the order of their code points."""
    return sorted(counts, key=lambda piece: (-counts[piece], piece))


def room_for_pieces(kind: str, vocabulary_size: int) -> int:
    """What specials and bytes leave of a vocabulary; a UserError where that is nothing."""
    if vocabulary_size <= FIRST_PIECE:
        raise UserError(
            f"--vocabulary-size {vocabulary_size} is too small for a {kind} tokenizer: {FIRST_PIECE} tokens are the"
            " bytes and the special tokens. Choose a larger one."
        )
    return vocabulary_size - FIRST_PIECE
