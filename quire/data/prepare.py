"""From TEXT to token streams: what is held out, the tokenizer, the tokens, and a report of it all.

A stream is [separator] document [separator] document ...; the first separator is context only, never a target, so
that one document gives the plain loss that other tools report.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from quire import files
from quire.data import shards
from quire.data.documents import BYTES, CHARACTERS, START, Documents, Mark
from quire.data.encode import STEP, Job, encode_shards
from quire.data.shards import FINISHED, INDEX, STREAMS, Shard, TokenStream, token_type
from quire.data.spool import Corpus
from quire.data.vocabulary import Policy, adapted
from quire.errors import UserError
from quire.progress import Update, bar, say
from quire.tokenizers import TOKENIZERS, Tokenizer, load_tokenizer
from quire.tokenizers.tokenizer import Unknown

HELD_OUT_CHARACTERS = 256_000  # at most, by default
HELD_OUT_SHARE = 0.1
WHOLE_DOCUMENTS = 20  # from this many on, whole documents are held out
FORMAT = 5  # of the files in the cache
FEWEST_HELD_OUT = 50  # tokens; a loss over fewer says little


@dataclass
class Prepared:
    """Token streams and what is known of them; `validation_bytes` are the UTF-8 bytes of the held-out text.

    `ranges`: where in the training stream each TEXT argument lies, [start, end).
    """

    tokenizer: Tokenizer
    training: TokenStream
    validation: TokenStream
    validation_bytes: int
    report: dict[str, Any]
    key: str = ""  # its name in the cache
    left_out: set[Mark] = field(default_factory=set)  # documents of the training text that the held-out text has
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __str__(self) -> str:
        r = self.report
        return (
            f"{r['documents']:,} {r['unit']}{'s' * (r['documents'] != 1)}, {r['characters']:,} characters,"
            f" {r['tokens']:,} tokens, vocabulary {r['vocabulary']:,} ({r['tokenizer']});"
            f" {r['held_out']:.1%} held out ({len(self.validation) - 1:,} tokens, {r['held_out_as']})"
        )


def split(documents: Documents) -> tuple[Documents, Documents, str]:
    """Training documents, held-out documents, and how they were chosen (as docs/guide.md says).

    Whole documents (the last ones, up to a tenth and about 256,000 characters, at least one) where there are at
    least 20 and none exceeds a tenth of the text; otherwise the last tenth of the characters, at most 256,000. Of
    pairs always whole ones, and what has a source of theirs is not trained on.
    """
    group = documents.group
    _, total, longest = documents.sizes
    room = min(total * HELD_OUT_SHARE, HELD_OUT_CHARACTERS)
    first = max(0, len(documents) - HELD_OUT_CHARACTERS - 2) // group * group  # a document has at least one character
    rows = documents.rows(first, len(documents))
    if group > 1 or (len(documents) >= WHOLE_DOCUMENTS and longest <= total * HELD_OUT_SHARE):
        taken = np.cumsum(rows[:, CHARACTERS].reshape(-1, group).sum(1)[::-1])
        count = max(1, int(np.searchsorted(taken, room, side="right")))
        training, held_out = documents[: -count * group], documents[-count * group :]
        if group > 1:
            training, _, _ = training.without(held_out.marks(), documents.text.parent / "training.bin")
        unit = "pair" if group > 1 else "document"
        return training, held_out, f"the last {unit}" if count == 1 else f"the last {count} {unit}s"
    missing, last = int(room), len(documents)
    aside: list[np.ndarray] = []
    cut = np.empty((0, 3), dtype=np.int64)  # what is left for training of the document that is cut
    while missing > 0:
        last -= 1
        row = rows[last - first]
        if row[CHARACTERS] > missing:
            size = documents.characters_at_the_end(row.tolist(), missing)
            cut = np.array([[row[START], row[BYTES] - size, row[CHARACTERS] - missing]])
            row = np.array([cut[0, START] + cut[0, BYTES], size, missing])
        aside.append(row)
        missing -= int(row[CHARACTERS])
    folder = documents.text.parent
    kept = documents[:last]
    training = kept.listed(folder / "training.bin", chain((part for _, part in kept.chunks()), [cut]))
    held_out = documents.listed(folder / "validation.bin", reversed(aside))
    return (
        training,
        held_out,
        f"the last {room / total:.{0 if room > total / 100 else 1}%} of the text" if total else "",
    )


def prepare(
    corpus: Corpus,
    wanted: str | Tokenizer,
    validation: Corpus | None = None,
    vocabulary_size: int = 0,
    unknown: Policy = "error",
    settled: bool = False,
) -> Prepared:
    """Split, fit the tokenizer and encode; done once for each content and tokenizer (kept in the cache).

    `wanted` is a kind in TOKENIZERS to fit, or a tokenizer, or its path or name, to use as it is; `unknown` says what
    becomes of what such a one lacks, unless that is `settled` already. A call that was killed is gone on with: finished
    shards are not done again.
    """
    ready = wanted if isinstance(wanted, Tokenizer) else None if wanted in TOKENIZERS else load_tokenizer(wanted)
    if validation is None:
        training, held_out, how = split(corpus.documents)
        if len(corpus.documents) > len(held_out) and not len(training):
            raise UserError("No pair is left to train on: every source is that of a pair held out. Give other pairs.")
    else:
        training, held_out, how = corpus.documents, validation.documents, "the validation text"
    _check_sizes(training, held_out, named=validation is not None)
    if ready is not None and not settled:
        ready = adapted(ready, training, held_out, unknown)
    content = [code(type(ready) if ready else TOKENIZERS[str(wanted)]), corpus.digest, validation and validation.digest]
    tokenizer = ready or fitted(str(wanted), vocabulary_size, training, held_out, content)
    spelling = spelled(tokenizer)
    policy: Unknown = "error" if unknown == "grow" else unknown  # it has grown
    key = _key([*content, spelling, policy])
    folder = folder_of(key)
    with files.locked(folder.with_name(f"{key}.lock")):
        index = _whole(folder)
        if index is None:
            about = {
                "unit": "pair" if training.group > 1 else "document",
                "documents": (len(corpus.documents) + (len(held_out) if validation else 0)) // training.group,
                "held_out_as": how,
                "training_documents": len(training),
            }
            head = {"format": FORMAT, "content": _key(content), "tokenizer": _key(spelling), "report": about}
            index = _encode(folder, head, tokenizer, (training, held_out), policy)
    found = _prepared(key, index, tokenizer)
    if not found.validation_bytes:
        raise UserError(
            "Nothing of the held-out text is left that the tokenizer knows: no loss can be measured on it."
            " Give another --validation FILE, or another --tokenizer."
        )
    found.left_out = corpus.left_out
    for name, first, last in corpus.arguments:
        start, end = (shards.start_of(folder, index["training"], document) for document in (first, last))
        if start < end:
            found.ranges.setdefault(name, (start, end))
    return found


def opened(key: str, looked_at: bool = False) -> TokenStream | None:
    """The training tokens that were prepared under `key`, if they are in the cache and intact.

    Where another process has just `looked_at` them, they are taken as they are.
    """
    folder = folder_of(key)
    index = _whole(folder, looked_at) if key else None
    return None if index is None else shards.opened(folder, index[STREAMS[0]], index["dtype"])


def prepared_by_another(key: str) -> Prepared | None:
    """What another process has just prepared under `key`, if the cache has it: taken as it is, without its ranges."""
    folder = folder_of(key)
    index = _whole(folder, looked_at=True) if key else None
    return None if index is None else _prepared(key, index, load_tokenizer(folder / "tokenizer.json"))


def _prepared(key: str, index: Any, tokenizer: Tokenizer) -> Prepared:
    training, validation = (shards.opened(folder_of(key), index[name], index["dtype"]) for name in STREAMS)
    report = index["report"]
    return Prepared(tokenizer, training, validation, report["validation_bytes"], report, key)


def spelled(tokenizer: Tokenizer) -> dict[str, Any]:
    """All that a tokenizer is: two of the same spelling make the same tokens."""
    return {"kind": tokenizer.kind, **tokenizer.to_table()}


def folder_of(key: str) -> Path:
    """Where the cache has, or would have, what is prepared under `key`."""
    return files.cache_folder() / "tokens" / key


def code(kind: type[Tokenizer]) -> str:
    """A name for the code that decides which tokens a text becomes: an edited tokenizer is another one."""
    here = Path(__file__).parent
    paths = {*here.glob("*.py"), *(here.parent / "tokenizers").glob("*.py"), *(here.parent / "tokenizers").glob("*.c")}
    own = getattr(sys.modules.get(kind.__module__), "__file__", None)
    paths |= {Path(own)} if own and Path(own).is_file() else set()
    digest = hashlib.sha256(kind.__qualname__.encode())
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def fitted(kind: str, vocabulary_size: int, training: Documents, held_out: Documents, content: Any) -> Tokenizer:
    """The tokenizer of a kind for a text; fitted once, and kept in the cache."""
    # An inventory of characters may see the whole text; what counts or merges must not.
    parts = [training, held_out] if kind == "character" else [training]
    key = _key([kind, vocabulary_size, content])
    path = files.cache_folder() / "tokenizers" / f"{key}.json"
    with files.locked(path.with_name(f"{key}.lock")):
        try:
            return load_tokenizer(path)
        except UserError:  # not there, or damaged
            with bar("fitting the tokenizer") as show:
                total = sum(part.sizes[1] for part in parts)
                texts = counted(chain.from_iterable(part.texts() for part in parts), total, show)
                tokenizer = TOKENIZERS[kind].train(texts, vocabulary_size)
            tokenizer.save(path)
            note_size(tokenizer, vocabulary_size)
    return tokenizer


def note_size(tokenizer: Tokenizer, wanted: int) -> None:
    """Say where a tokenizer has not the size that was asked for, and why."""
    if wanted and tokenizer.vocabulary_size != wanted:
        why = "it takes every character there is" if tokenizer.kind == "character" else "the text gives no more"
        say(f"The vocabulary has {tokenizer.vocabulary_size:,} tokens, not {wanted:,}: {why}.")


def counted(texts: Iterable[str], total: int, show: Update) -> Iterator[str]:
    """The same texts, shown on a bar as they go by."""
    done = shown = 0
    for text in texts:
        yield text
        done += len(text)
        if done - shown >= STEP:
            show(done / total, megabytes=f"{done / 1e6:.1f}")
            shown = done


def _encode(
    folder: Path, head: dict[str, Any], tokenizer: Tokenizer, parts: tuple[Documents, Documents], unknown: Unknown
) -> Any:
    """Write the shards that are not there yet, and then the index."""
    saved = folder / "tokenizer.json"
    there = shards.finished(folder)
    files.remove(folder / INDEX)
    tokenizer.save(saved)
    jobs: list[Job] = []
    for name, documents in zip(STREAMS, parts, strict=True):
        where: Job = {"text": str(documents.text), "index": str(documents.index), "folder": str(folder)}
        where |= {"first": documents.first, "last": documents.last, "unknown": unknown}
        for number, (begin, end) in enumerate(shards.plan(documents, shards.SHARD)):
            jobs.append({**where, "name": f"{name}-{number:05}", "begin": list(begin), "end": list(end)})
    waiting = [job for job in jobs if there.get(job["name"], {}).get("text") != [job["begin"], job["end"]]]
    names = {job["name"] for job in waiting}
    there = {name: shard for name, shard in there.items() if name not in names}
    files.write_text(folder / FINISHED, "".join(json.dumps(shard) + "\n" for shard in there.values()))
    total = sum(part.sizes[1] for part in parts)
    done = total * len(there) // len(jobs)

    def on_text(characters: int) -> None:
        nonlocal done
        done += characters
        show(done / total, megabytes=f"{done / 1e6:.1f}")

    def on_shard(shard: Shard) -> None:
        there[shard["name"]] = shard
        files.append_line(folder / FINISHED, json.dumps(shard))

    with bar("encoding") as show:
        encode_shards(tokenizer, saved, waiting, on_text, on_shard)
    (_, characters, _), (_, aside, _) = (part.sizes for part in parts)
    found = {name: [there[job["name"]] for job in jobs if job["name"].startswith(name)] for name in STREAMS}
    report = head["report"] | {
        "characters": characters + aside,
        "tokens": sum(shard["tokens"] for shard in there.values()),
        "vocabulary": tokenizer.vocabulary_size,
        "tokenizer": tokenizer.kind,
        "held_out": aside / (characters + aside),
        "validation_bytes": sum(shard["bytes"] for shard in found[STREAMS[1]]),  # of what is encoded of it
    }
    index = {**head, "report": report, "dtype": token_type(tokenizer.vocabulary_size).str, **found}
    files.write_json(folder / INDEX, index)
    files.remove(folder / FINISHED)
    return index


def _whole(folder: Path, looked_at: bool = False) -> Any:
    """The index of what is prepared, if all of that is there and no bit of it has changed; else None.

    What another process has `looked_at` is taken as it is.
    """
    try:
        index = files.read_json(folder / INDEX)
    except (OSError, UserError):
        return None
    every = (shard for name in STREAMS for shard in index[name])
    return index if looked_at or all(shards.intact(folder, shard) for shard in every) else None


def _key(value: Any) -> str:
    """A name for anything that JSON can spell."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _check_sizes(training: Documents, held_out: Documents, named: bool) -> None:
    aside = held_out.sizes[1]
    characters = training.sizes[1] + (0 if named else aside)
    enough = int(FEWEST_HELD_OUT / HELD_OUT_SHARE)
    if not characters:
        raise UserError("There is no text to train on. Give a file with at least some hundred characters.")
    if not named and characters < enough:
        raise UserError(
            f"The text has {characters} characters: too short to hold out a tenth that means anything."
            f" Give at least {enough}, or a separate --validation FILE."
        )
    if aside < FEWEST_HELD_OUT:
        raise UserError(f"The held-out text has fewer than {FEWEST_HELD_OUT} characters: too few to measure a loss on.")
