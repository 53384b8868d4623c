"""What every tokenizer can do, however it splits text."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from quire import files

Unknown = Literal["error", "skip", "replace"]

SEPARATOR, PADDING = "<|separator|>", "<|padding|>"


class Tokenizer:
    """Text to ids and back. Ids below `vocabulary_size`; the specials are ids that no text encodes to.

    `separator` stands between documents, `padding` fills short rows of a batch and is never trained on or sampled.
    """

    kind: ClassVar[str]
    vocabulary_size: int
    separator: int
    padding: int

    @classmethod
    def train(cls, texts: Iterable[str]) -> "Tokenizer":
        """A tokenizer fitted to `texts`."""
        raise NotImplementedError

    def encode_array(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        """The ids of `text`, int32; characters outside the vocabulary raise, are left out, or get a stand-in."""
        raise NotImplementedError

    def encode(self, text: str, unknown: Unknown = "error") -> list[int]:
        """The ids of `text`."""
        return self.encode_array(text, unknown).tolist()

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; special tokens have none."""
        raise NotImplementedError

    def decoder(self) -> "Decoder":
        """A decoder for a stream of ids, which shows no half a character."""
        return Decoder(self)

    def name(self, token: int) -> str:
        """How to show one token to a person."""
        raise NotImplementedError

    def batch(self, texts: Sequence[str], side: Literal["left", "right"] = "right") -> tuple[np.ndarray, np.ndarray]:
        """The texts as ids (B, T), the short ones padded on that side, and the attention mask, True on real tokens."""
        rows = [self.encode_array(text) for text in texts]
        width = max((len(row) for row in rows), default=0)
        ids = np.full((len(rows), width), self.padding, dtype=np.int64)
        mask = np.zeros((len(rows), width), dtype=bool)
        for index, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[index, place] = row
            mask[index, place] = True
        return ids, mask

    def to_table(self) -> dict[str, Any]:
        """All that `from_table` needs, as plain JSON values, without `kind`."""
        raise NotImplementedError

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> "Tokenizer":
        """The tokenizer that `to_table` described."""
        raise NotImplementedError

    def save(self, path: Path) -> None:
        """Write tokenizer.json, with a checksum."""
        files.write_json(path, {"kind": self.kind, **self.to_table()})


class Decoder:
    """Decodes ids one by one, where every token is one or more whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def push(self, token: int) -> str:
        """The text that can be shown now that `token` has come."""
        return self.tokenizer.decode([token])
