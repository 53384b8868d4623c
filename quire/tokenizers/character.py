"""One token a character: the smallest tokenizer that loses nothing."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from quire.errors import UserError
from quire.tokenizers.tokenizer import PADDING, SEPARATOR, Tokenizer, Unknown

SPECIALS = (PADDING, SEPARATOR)
STAND_INS = "\ufffd?_ "  # what "replace" writes for an unknown character: the first of these that is known


class CharacterTokenizer(Tokenizer):
    """The characters of the training text in the order of their code points, after the two special tokens.

    >>> CharacterTokenizer.train(["banana"]).encode("nab")
    [4, 2, 3]
    """

    kind = "character"
    padding, separator = range(2)

    def __init__(self, characters: str) -> None:
        assert characters and len(set(characters)) == len(characters), "some characters, each once"
        self.characters = characters
        self.vocabulary_size = len(SPECIALS) + len(characters)
        codes = _code_points(characters)
        self._order = np.argsort(codes, kind="stable")
        self._sorted = codes[self._order]

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int = 0) -> "CharacterTokenizer":
        """All the characters there are: a vocabulary size is not for choosing here."""
        inventory: set[str] = set()
        for text in texts:
            inventory.update(text)
        return cls("".join(sorted(inventory)))

    def encode_array(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        codes = _code_points(text)
        places = np.minimum(np.searchsorted(self._sorted, codes), len(self._sorted) - 1)
        known = self._sorted[places] == codes
        ids = (self._order[places] + len(SPECIALS)).astype(np.int32)
        if known.all():
            return ids
        if unknown == "error":
            raise UserError(self._complaint(text, np.flatnonzero(~known)))
        if unknown == "replace" and (stand_in := next((c for c in STAND_INS if c in self.characters), None)):
            ids[~known] = self.characters.index(stand_in) + len(SPECIALS)
            return ids
        return ids[known]

    def _complaint(self, text: str, places: np.ndarray) -> str:
        found: dict[str, int] = {}
        for place in places:
            found.setdefault(text[place], int(place))
        shown = [f"{c!r} (U+{ord(c):04X}) at position {place}" for c, place in list(found.items())[:5]]
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        return (
            f"The model's vocabulary of {len(self.characters)} characters lacks {', '.join(shown)}{more}."
            " Change the text, or choose --unknown skip or --unknown replace."
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        first = len(SPECIALS)
        if any(not 0 <= int(i) < self.vocabulary_size for i in ids):
            raise UserError(f"Ids must be at least 0 and below the vocabulary size {self.vocabulary_size}.")
        return "".join(self.characters[int(i) - first] for i in ids if i >= first)

    def unknown(self, text: str) -> Counter[str]:
        codes, counts = np.unique(_code_points(text), return_counts=True)
        new = ~np.isin(codes, self._sorted)
        return Counter({chr(code): int(count) for code, count in zip(codes[new], counts[new])})

    def grown(self, pieces: Iterable[str]) -> "CharacterTokenizer":
        return CharacterTokenizer(self.characters + "".join(sorted(set(pieces) - set(self.characters))))

    def name(self, token: int) -> str:
        return SPECIALS[token] if token < len(SPECIALS) else self.characters[token - len(SPECIALS)]

    def to_table(self) -> dict[str, Any]:
        return {"characters": list(self.characters)}

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> "CharacterTokenizer":
        return cls("".join(table["characters"]))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
