"""Which tokenizer suits a text: what `--tokenizer auto` takes."""

from typing import NamedTuple

from quire.tokenizers.byte_bpe import suggested_size

FEW_BYTES = 300_000  # below, the parts of words occur too seldom to be learned


class Choice(NamedTuple):
    """A kind of tokenizer, a vocabulary size, and the reason."""

    kind: str
    vocabulary_size: int
    why: str


def choose_for(size: int) -> Choice:
    """The choice for a text of `size` UTF-8 bytes."""
    if size < FEW_BYTES:
        why = f"the text has {size / 1e3:,.0f} kB, too few for tokens larger than characters to be seen often"
        return Choice("character", 0, why)
    vocabulary_size = suggested_size(size)
    why = f"in a text of {size / 1e6:,.1f} MB, {vocabulary_size:,} parts of words are each seen often enough"
    return Choice("byte-bpe", vocabulary_size, why)
