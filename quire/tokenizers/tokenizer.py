"""What every tokenizer can do, however it splits text."""

import codecs
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from quire import files
from quire.errors import UserError

Unknown = Literal["error", "skip", "replace"]
Special = Literal["error", "text", "token"]

SEPARATOR, PADDING = "<|separator|>", "<|padding|>"

SIGNS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})

LONGEST_STRETCH = 1 << 24  # characters; a stretch without any place to cut is cut here all the same
_CUT = re.compile(r"(?<=\S)(?= )|(?<=\S\n)(?=\S)")


def cut_place(text: str) -> int:
    """The last place where `text` can be cut so that both parts, encoded apart, give the ids of the whole; 0: none.

    Before a space that follows a visible character, or after a single line end between two such: no tokenizer here
    joins what stands on the two sides, and none looks across. A text is read in blocks that end at such places.
    """
    reach = 256
    while True:
        start = max(0, len(text) - reach)
        places = [found.start() for found in _CUT.finditer(text, start)]
        if places and places[-1]:
            return places[-1]
        if start == 0:
            return LONGEST_STRETCH if len(text) > LONGEST_STRETCH else 0
        reach *= 16


class Tokenizer:
    """Text to ids and back. Ids below `vocabulary_size`; the specials are ids that no text encodes to.

    `separator` stands between documents, `padding` fills short rows of a batch and is never trained on or sampled;
    `specials` are the names of these two, and of any others, with their ids.
    """

    kind: ClassVar[str]
    vocabulary_size: int
    separator: int
    padding: int

    @property
    def specials(self) -> dict[str, int]:
        """Special tokens by name."""
        return {PADDING: self.padding, SEPARATOR: self.separator}

    def reserved(self) -> set[int]:
        """The ids that no text encodes to: the specials, and gaps in a vocabulary that was made elsewhere."""
        return set(self.specials.values())

    @classmethod
    def train(cls, texts: Iterable[str], vocabulary_size: int = 0) -> "Tokenizer":
        """A tokenizer fitted to `texts`, read once, with at most `vocabulary_size` tokens (0: as the kind sees fit).

        A text may come in blocks that end at a `cut_place`.
        """
        raise NotImplementedError

    def encode_array(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        """The ids of `text`, int32; characters outside the vocabulary raise, are left out, or get a stand-in.

        Whatever looks like a special token is plain text here.
        """
        raise NotImplementedError

    def encode(self, text: str, unknown: Unknown = "error", special: Special = "error") -> list[int]:
        """The ids of `text`.

        What looks like a special token is an error, plain text ("text"), or becomes the special ("token"), as said in
        `special`; where two of them overlap, the one that begins first, and of those the longest, is meant.
        """
        if special == "text" or not (found := self._special_pattern().search(text)):
            return self.encode_array(text, unknown).tolist()
        if special == "error":
            raise UserError(
                f"The text contains {found[0]!r}, which looks like a special token. Say special='text' to encode it as"
                " any other text, or special='token' to get the special itself."
            )
        ids: list[int] = []
        for index, part in enumerate(self._special_pattern().split(text)):  # text, special, text, special ... text
            if index % 2:
                ids.append(self.specials[part])
            else:
                ids += (self._encode_after_special if index else self.encode_array)(part, unknown).tolist()
        return ids

    def encode_more(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        """The ids of a text that goes on where another one was cut, at a `cut_place`."""
        return self.encode_array(text, unknown)

    def _encode_after_special(self, text: str, unknown: Unknown) -> np.ndarray:
        return self.encode_array(text, unknown)

    def _special_pattern(self) -> re.Pattern[str]:
        names = sorted(self.specials, key=len, reverse=True)  # the longest wins
        return re.compile("(" + "|".join(map(re.escape, names)) + ")")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`; special tokens have none."""
        raise NotImplementedError

    def decoder(self, after: Sequence[int] = ()) -> "Decoder":
        """A decoder for a stream of ids that follow those of `after`; it shows no half a character."""
        return Decoder(self)

    def name(self, token: int) -> str:
        """How to show one token to a person."""
        raise NotImplementedError

    def unknown(self, text: str) -> Counter[str]:
        """What of `text` has no token of its own, with counts: characters, or words where those are the tokens."""
        return Counter()

    def grown(self, pieces: Iterable[str]) -> "Tokenizer":
        """This tokenizer with tokens for such pieces behind its own, whose ids stay; itself where it needs none."""
        return self

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
    """Decodes ids one by one. This one serves where every token is one or more whole characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def push(self, token: int) -> str:
        """The text that can be shown now that `token` has come."""
        return self.tokenizer.decode([token])

    def finish(self) -> str:
        """What was held back, now that no more tokens come."""
        return ""


class BytesTokenizer(Tokenizer):
    """A tokenizer whose tokens stand for bytes: what they decode to is those bytes, one after the other, as UTF-8.

    `tokens` are the bytes of each id; none (b"") for special tokens.
    """

    tokens: list[bytes]

    def reserved(self) -> set[int]:
        return {number for number, token in enumerate(self.tokens) if not token}

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The bytes of `ids`; special tokens have none."""
        ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        if ids and not (min(ids) >= 0 and max(ids) < self.vocabulary_size):
            raise UserError(f"Ids must be at least 0 and below the vocabulary size {self.vocabulary_size}.")
        return b"".join(map(self.tokens.__getitem__, ids))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decoder(self, after: Sequence[int] = ()) -> Decoder:
        return BytesDecoder(self)

    def name(self, token: int) -> str:
        special = {number: name for name, number in self.specials.items()}.get(token)
        return special if special is not None else self.tokens[token].decode("utf-8", "backslashreplace")


class BytesDecoder(Decoder):
    """Holds bytes back until they make a character: a stream never shows half of one."""

    def __init__(self, tokenizer: BytesTokenizer) -> None:
        super().__init__(tokenizer)
        self.bytes_of = tokenizer.decode_bytes
        self.held = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self.held.decode(self.bytes_of([token]))

    def finish(self) -> str:
        return self.held.decode(b"", final=True)


def utf8(text: str) -> bytes:
    """The UTF-8 bytes of a text; half of a surrogate pair, which is no character, is a UserError."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"The text has half a surrogate pair (U+{ord(text[error.start]):04X}) at position {error.start}, which is"
            " no character. Take it out."
        ) from error


def visible(text: str) -> str:
    """A token's text with white space as signs, and other characters that do not print as their escapes; ∅ for none."""
    shown = text.translate(SIGNS)
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in shown) or "∅"
