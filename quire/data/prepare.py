"""From TEXT to token streams: what is held out, the tokenizer, the tokens, and a report of it all.

A stream is [separator] document [separator] document ...; the first separator is context only, never a target, so
that one document gives the plain loss that other tools report.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quire import files
from quire.data.reading import Corpus
from quire.errors import UserError
from quire.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer

HELD_OUT_CHARACTERS = 256_000  # at most, by default
HELD_OUT_SHARE = 0.1
WHOLE_DOCUMENTS = 20  # from this many on, whole documents are held out
FORMAT = 3  # of what is kept in the cache; another one is another name there
STREAMS = ("training.bin", "validation.bin")
FEWEST_HELD_OUT = 50  # tokens; a loss over fewer says little


@dataclass
class Prepared:
    """Token streams and what is known of them; `validation_bytes` are the UTF-8 bytes of the held-out text."""

    tokenizer: Tokenizer
    training: np.ndarray
    validation: np.ndarray
    validation_bytes: int
    report: dict[str, Any]

    def __str__(self) -> str:
        r = self.report
        return (
            f"{r['documents']:,} document{'s' * (r['documents'] != 1)}, {r['characters']:,} characters,"
            f" {r['tokens']:,} tokens, vocabulary {r['vocabulary']:,} ({r['tokenizer']});"
            f" {r['held_out']:.1%} held out ({len(self.validation) - 1:,} tokens, {r['held_out_as']})"
        )


def split(documents: list[str]) -> tuple[list[str], list[str], str]:
    """Training documents, held-out documents, and how they were chosen (as docs/guide.md says).

    Whole documents (the last ones, up to a tenth and about 256,000 characters, at least one) where there are at
    least 20 and none exceeds a tenth of the text; otherwise the last tenth of the characters, at most 256,000.
    """
    total = sum(map(len, documents))
    room = min(total * HELD_OUT_SHARE, HELD_OUT_CHARACTERS)
    if len(documents) >= WHOLE_DOCUMENTS and max(map(len, documents)) <= total * HELD_OUT_SHARE:
        count, taken = 1, len(documents[-1])
        while taken + len(documents[-count - 1]) <= room:
            count, taken = count + 1, taken + len(documents[-count - 1])
        return documents[:-count], documents[-count:], f"the last {count} documents"
    training, missing = list(documents), int(room)
    validation: list[str] = []
    while missing > 0:
        last = training.pop()
        keep = max(0, len(last) - missing)
        validation.insert(0, last[keep:])
        missing -= len(last) - keep
        if keep:
            training.append(last[:keep])
    return training, validation, f"the last {room / total:.0%} of the text" if total else ""


def prepare(corpus: Corpus, tokenizer_name: str, validation: Corpus | None = None) -> Prepared:
    """Split, fit the tokenizer and encode; done once for each content and tokenizer (kept in the cache).

    `tokenizer_name` is a kind in TOKENIZERS, or the path of a tokenizer to use as it is.
    """
    ready = TOKENIZERS.get(tokenizer_name) or load_tokenizer(tokenizer_name)
    key = _key(corpus, tokenizer_name if isinstance(ready, type) else ready.to_table(), validation)
    folder = files.cache_folder() / "tokens" / key
    with files.locked(folder.with_name(f"{key}.lock")):
        if not _is_whole(folder):
            documents = len(corpus.documents)
            if validation is None:
                texts, held_out, how = split(corpus.documents)
            else:
                texts, held_out, how = corpus.documents, validation.documents, "the validation text"
                documents += len(held_out)
            _check_sizes(texts, held_out, named=validation is not None)
            # An inventory of characters may see the whole text; what counts or merges must not.
            tokenizer = ready.train(texts + held_out) if isinstance(ready, type) else ready
            _write(folder, tokenizer, texts, held_out, how, documents)
    return _open(folder)


def _write(folder: Path, tokenizer: Tokenizer, texts: list[str], held_out: list[str], how: str, documents: int) -> None:
    training, validation = stream(tokenizer, texts), stream(tokenizer, held_out)
    characters, aside = sum(map(len, texts)), sum(map(len, held_out))
    report = {
        "documents": documents,
        "characters": characters + aside,
        "tokens": len(training) + len(validation),
        "vocabulary": tokenizer.vocabulary_size,
        "tokenizer": tokenizer.kind,
        "held_out": aside / (characters + aside),
        "held_out_as": how,
        "training_documents": len(texts),
        "validation_bytes": sum(len(text.encode()) for text in held_out),
    }

    def write(new: Path) -> None:
        tokenizer.save(new / "tokenizer.json")
        for name, tokens in zip(STREAMS, (training, validation), strict=True):
            files.write_bytes(new / name, tokens.tobytes())
        checksums = {name: files.crc32_of(new / name) for name in STREAMS}
        files.write_json(new / "report.json", {**report, "checksums": checksums})

    files.replace_folder(folder, write)


def _is_whole(folder: Path) -> bool:
    """Whether what is prepared is there, and no bit of it has changed."""
    try:
        checksums = files.read_json(folder / "report.json")["checksums"]
        return all(files.crc32_of(folder / name) == checksums[name] for name in STREAMS)
    except (OSError, UserError):
        return False


def _open(folder: Path) -> Prepared:
    report = files.read_json(folder / "report.json")
    training, validation = (np.memmap(folder / name, dtype="<i4", mode="r") for name in STREAMS)
    return Prepared(load_tokenizer(folder / "tokenizer.json"), training, validation, report["validation_bytes"], report)


def stream(tokenizer: Tokenizer, documents: list[str]) -> np.ndarray:
    """[separator] document [separator] document ..., int32."""
    separator = np.array([tokenizer.separator], dtype=np.int32)
    return np.concatenate([part for text in documents for part in (separator, tokenizer.encode_array(text))])


def _key(corpus: Corpus, tokenizer: Any, validation: Corpus | None) -> str:
    """A name for what is prepared: from the documents themselves, since the same file can be read in several ways."""
    contents = [None if part is None else _digest(part.documents) for part in (corpus, validation)]
    return hashlib.sha256(json.dumps([FORMAT, contents, tokenizer], sort_keys=True).encode()).hexdigest()[:32]


def _digest(documents: list[str]) -> str:
    digest = hashlib.sha256()
    for text in documents:
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _check_sizes(texts: list[str], held_out: list[str], named: bool) -> None:
    characters = sum(map(len, texts)) + (0 if named else sum(map(len, held_out)))
    enough = int(FEWEST_HELD_OUT / HELD_OUT_SHARE)
    if not characters:
        raise UserError("There is no text to train on. Give a file with at least some hundred characters.")
    if not named and characters < enough:
        raise UserError(
            f"The text has {characters} characters: too short to hold out a tenth that means anything."
            f" Give at least {enough}, or a separate --validation FILE."
        )
    if sum(map(len, held_out)) < FEWEST_HELD_OUT:
        raise UserError(f"The held-out text has fewer than {FEWEST_HELD_OUT} characters: too few to measure a loss on.")
