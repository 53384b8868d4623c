"""Texts from .bin files of GPT-2's tokens, as nanoGPT prepares them: uint16, little-endian, 50256 between documents."""

import codecs
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quire.errors import UserError
from quire.tokenizers import load_tokenizer

END_OF_TEXT = 50256  # the largest id, too
BLOCK = 1 << 20  # ids read at once
_CONTROL = frozenset(range(32)) - {9, 10, 12, 13}


def is_text(path: Path) -> bool:
    """Whether a file begins like UTF-8 text, whatever its name says: tokens soon have a byte that no text has."""
    with open(path, "rb") as file:
        beginning = file.read(1 << 16)
    try:
        codecs.getincrementaldecoder("utf-8")().decode(beginning)
    except UnicodeDecodeError:
        return False
    return not _CONTROL.intersection(beginning)


def token_documents(name: str, path: Path) -> Iterator[str]:
    """The documents of a file of GPT-2 tokens, as text. Their tokens are theirs again with `--tokenizer gpt2`.

    Raises UserError where the file cannot be one.
    """
    remedy = "A .bin file is read as GPT-2's tokens, as nanoGPT writes them (uint16); name the text itself instead."
    if path.stat().st_size % 2:
        raise UserError(f"{name} has an odd number of bytes, so it holds no tokens of two bytes each. {remedy}")
    ids = np.memmap(path, dtype="<u2", mode="r")
    if ids[:BLOCK].max() < 256:
        raise UserError(f"{name} holds no id above 255, so its tokens are not GPT-2's but perhaps characters. {remedy}")
    tokenizer = load_tokenizer("gpt2")
    document: list[np.ndarray] = []
    for start in range(0, len(ids), BLOCK):
        block = np.asarray(ids[start : start + BLOCK], dtype=np.int32)
        if (largest := int(block.max())) > END_OF_TEXT:
            raise UserError(f"{name} holds the id {largest}, which GPT-2 does not have. {remedy}")
        *ended, rest = np.split(block, np.flatnonzero(block == END_OF_TEXT))
        for part in ended:
            yield tokenizer.decode(_without_mark(np.concatenate([*document, part])))
            document = []
        document.append(rest)
    yield tokenizer.decode(_without_mark(np.concatenate(document)))


def _without_mark(document: np.ndarray) -> np.ndarray:
    return document[document != END_OF_TEXT]
