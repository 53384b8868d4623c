"""Texts from .bin files of GPT-2's tokens, as nanoGPT prepares them: uint16, little-endian, 50256 between documents."""

import codecs
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from quire.errors import UserError
from quire.tokenizers import load_tokenizer

END_OF_TEXT = 50256  # the largest id, too
BLOCK = 1 << 20  # ids read at once
_REMEDY = "A .bin file is read as GPT-2's tokens, as nanoGPT writes them (uint16); name the text itself instead."
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
    if path.stat().st_size % 2:
        raise UserError(f"{name} has an odd number of bytes, so it holds no tokens of two bytes each. {_REMEDY}")
    ids = np.memmap(path, dtype="<u2", mode="r")
    _check_range(name, beginning := ids[:BLOCK])
    if beginning.max() < 256:
        raise UserError(f"{name} holds no id above 255: its tokens are not GPT-2's but perhaps characters. {_REMEDY}")
    tokenizer = load_tokenizer("gpt2")
    document: list[np.ndarray] = []
    for start in range(0, len(ids), BLOCK):
        block = np.asarray(ids[start : start + BLOCK], dtype=np.int32)
        _check_range(name, block)
        *ended, rest = np.split(block, np.flatnonzero(block == END_OF_TEXT))
        for part in ended:
            yield tokenizer.decode(_without_mark(np.concatenate([*document, part])))
            document = []
        document.append(rest)
    yield tokenizer.decode(_without_mark(np.concatenate(document)))


def _check_range(name: str, ids: np.ndarray) -> None:
    if (largest := int(ids.max())) > END_OF_TEXT:
        raise UserError(f"{name} holds the id {largest}, which GPT-2 does not have. {_REMEDY}")


def _without_mark(document: np.ndarray) -> np.ndarray:
    return document[document != END_OF_TEXT]
