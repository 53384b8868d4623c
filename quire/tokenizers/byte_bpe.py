"""Byte-pair encoding of bytes (GPT-2, Radford et al. 2019): any text, any bytes, and nothing unknown.

The 256 bytes are the first tokens; merges of pairs, learned within the pieces of a splitting pattern, make the rest.
"""

import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from quire.errors import UserError, choose
from quire.tokenizers import core
from quire.tokenizers.tokenizer import PADDING, SEPARATOR, BytesTokenizer, Unknown, utf8

SMALLEST, LARGEST = 512, 1 << 15  # tokens, where no size is given

Triple = tuple[int, int, int]  # the ids of two tokens that are merged, and of what they become


def suggested_size(size: int) -> int:
    """A vocabulary size for a text of `size` bytes: it grows as the root, 2,048 for a megabyte, by powers of two."""
    wanted = 2048 * (size / 1e6) ** 0.5
    return int(min(LARGEST, max(SMALLEST, 2 ** round(np.log2(max(wanted, 1))))))


class ByteBPETokenizer(BytesTokenizer):
    """Tokens of one or more bytes.

    `tokens` are the bytes of each id (b"" for special ids and gaps), `merges` triples of ids in the order in which
    they apply, `whole` tokens for pieces that equal them, whatever the merges say (some published vocabularies have
    tokens that no merges make). With `normalization` "NFC" text is brought into that form of Unicode before it is
    split, as Qwen2 was trained. A published vocabulary may lack tokens for bytes that its training text did not have;
    text with such a byte is refused, or goes without it (unknown="skip").

    >>> small = ByteBPETokenizer.train(["banana bandana"], vocabulary_size=260)
    >>> [small.name(i) for i in small.encode("banana")]
    ['b', 'an', 'ana']
    """

    kind = "byte-bpe"

    def __init__(
        self,
        tokens: list[bytes],
        merges: list[Triple],
        specials: dict[str, int],
        pattern: str = "gpt2",
        separator: str = SEPARATOR,
        padding: str = PADDING,
        whole: dict[bytes, int] | None = None,
        normalization: Literal["", "NFC"] = "",
    ) -> None:
        self.tokens, self.merges, self.pattern, self.whole = tokens, merges, pattern, whole or {}
        self._specials, self.normalization = specials, normalization
        self.vocabulary_size = len(tokens)
        self.separator, self.padding = specials[separator], specials[padding]
        self._encoder = core.Encoder(tokens, merges, self.whole, pattern)
        self.missing = [byte for byte, number in enumerate(self._encoder.byte_ids) if number == self._encoder.nothing]

    @property
    def specials(self) -> dict[str, int]:
        return self._specials

    @classmethod
    def train(
        cls, texts: Iterable[str], vocabulary_size: int = 0, pattern: str = "gpt2", threads: int = 0
    ) -> "ByteBPETokenizer":
        """Merges of the pairs that occur most often, of equally frequent ones the smallest pair of ids.

        0: a vocabulary that suits the length of the text. Fewer tokens where no pair occurs twice.
        """
        choose("--pattern", pattern, list(core.IN_CORE))
        if vocabulary_size and vocabulary_size < 258:
            raise UserError(
                f"--vocabulary-size {vocabulary_size} is too small for a byte-bpe tokenizer: the bytes and the special"
                " tokens are 258."
            )
        size = 0

        def encoded() -> Iterable[bytes]:
            nonlocal size
            for text in texts:
                data = utf8(text)
                size += len(data)
                yield data

        pairs = core.learn(encoded(), pattern, (vocabulary_size or LARGEST) - 258, threads)
        if not vocabulary_size:
            pairs = pairs[: suggested_size(size) - 258]
        return from_merges(pairs, pattern)

    def encode_array(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        return self._ids(utf8(text), unknown)

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """The ids of any bytes, int32: what is not UTF-8 is split byte by byte, and comes back as it was."""
        return self._ids(data, "error")

    def _ids(self, data: bytes, unknown: Unknown) -> np.ndarray:
        if self.normalization == "NFC" and not data.isascii():
            text = unicodedata.normalize("NFC", data.decode("utf-8", "surrogateescape"))
            data = text.encode("utf-8", "surrogateescape")
        ids = self._encoder.encode(data)
        if not self.missing or not (nothing := ids == self._encoder.nothing).any():
            return ids
        if unknown == "error":
            byte = next(byte for byte in data if byte in self.missing)
            raise UserError(
                f"The tokenizer has no token for the byte {byte:#04x}, which stands in the text. Take it out, or choose"
                " --unknown skip."
            )
        return ids[~nothing]

    def unknown(self, text: str) -> Counter[str]:
        missing = set(self.missing)
        if not missing:
            return Counter()
        counts = Counter(text)
        return Counter({each: count for each, count in counts.items() if missing & set(utf8(each))})

    def to_table(self) -> dict[str, Any]:
        from quire.tokenizers.hugging_face import to_hugging_face

        return to_hugging_face(self)

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> "ByteBPETokenizer":
        from quire.tokenizers.hugging_face import from_byte_level

        return from_byte_level(table)

    def save(self, path: Path) -> None:
        """Write tokenizer.json as Hugging Face's tokenizers read it, with a checksum in it."""
        from quire.tokenizers.hugging_face import write_checked

        write_checked(path, self.to_table())


def from_merges(pairs: Iterable[tuple[int, int]], pattern: str) -> ByteBPETokenizer:
    """Token i is byte i, token 256 + i is what merge i makes, and padding and separator are the last two."""
    tokens = [bytes([byte]) for byte in range(256)]
    triples = []
    for left, right in pairs:
        triples.append((left, right, len(tokens)))
        tokens.append(tokens[left] + tokens[right])
    specials = {PADDING: len(tokens), SEPARATOR: len(tokens) + 1}
    return ByteBPETokenizer([*tokens, b"", b""], triples, specials, pattern)
