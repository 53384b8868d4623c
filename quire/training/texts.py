"""A run's text: read and prepared when it begins, found again when it resumes."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from quire import files, processes
from quire.config import Table
from quire.data.documents import Mark
from quire.data.prepare import Prepared, opened, prepare
from quire.data.reading import read
from quire.data.shards import TokenStream
from quire.data.spool import Corpus
from quire.errors import UserError
from quire.progress import bar, say
from quire.run import Run
from quire.tokenizers.auto import choose_for
from quire.training.settings import Settings

AUTO = "auto"  # the tokenizer that suits the text
DEFAULT_CORPUS = "shakespeare"  # where nothing is named
STANDARD_INPUT = "standard-input.txt"  # where a run keeps text that came by a pipe


def given_text(settings: Settings) -> tuple[Settings, bytes | None]:
    """The settings with the built-in corpus where they name nothing, and standard input where a text is called "-"."""
    if not settings.data.named:
        settings = replace(settings, data=replace(settings.data, text=(DEFAULT_CORPUS,)))
    return settings, sys.stdin.buffer.read() if "-" in settings.data.named else None


def load_data(settings: Settings, piped: bytes | None = None) -> tuple[Settings, Prepared, list[Table]]:
    """The settings with the tokenizer that is taken, the prepared text, and where it came from."""
    corpus, held_out = read_texts(settings, piped)
    try:
        settings, prepared = prepared_from(settings, corpus, held_out)
    finally:
        corpus.close()
    return settings, prepared, corpus.origins


def prepared_from(settings: Settings, corpus: Corpus, held_out: Corpus | None) -> tuple[Settings, Prepared]:
    """The settings with the tokenizer that is taken, and a text that was read, prepared."""
    training = settings.training
    if training.tokenizer == AUTO:
        choice = choose_for(corpus.documents.sizes[0])
        size = training.vocabulary_size or choice.vocabulary_size
        say(f"Tokenizer: {choice.kind}, because {choice.why}.")
        training = replace(training, tokenizer=choice.kind, vocabulary_size=size)
    prepared = prepare(corpus, training.tokenizer, held_out, training.vocabulary_size, settings.data.unknown)
    return replace(settings, training=training), prepared


def read_texts(
    settings: Settings, piped: bytes | None = None, left_out: set[Mark] | None = None
) -> tuple[Corpus, Corpus | None]:
    """The text, and that of --validation where one is given; on a resume what was `left_out` for that one's sake."""
    with bar("reading") as show:

        def on_bytes(done: int, total: int | None) -> None:
            show(done / total if total else 0.0, megabytes=f"{done / 1e6:.1f}")

        corpus = read(settings.data.named, settings.data, on_bytes, piped)
        held_out = None
        if settings.data.validation and left_out is None:
            held_out = read([settings.data.validation], settings.data, on_bytes)
    if apart := left_out or (held_out.documents.marks() if held_out is not None else set()):
        count = corpus.leave_out(apart)
        if not len(corpus.documents):
            raise UserError("The text of --validation is the whole training text. Name another one, or leave it out.")
        if count and settings.data.pairs:
            say(f"{count} pair{'s' * (count > 1)} to train on left out: the pairs of --validation have their sources.")
        elif count:
            are = f"{count} document{'s' * (count > 1)}"
            say(f"{are} of the training text left out: the text of --validation has them.")
    for sentence in corpus.attributions:
        say(sentence, "dim")
    if corpus.skipped:
        named = "; ".join(f"{path} {why}" for path, why in corpus.skipped[:5])
        say(f"Skipped {len(corpus.skipped)}: {named}{'; ...' if len(corpus.skipped) > 5 else ''}")
    return corpus, held_out


def find_data(run: Run, settings: Settings, moved: tuple[str, ...]) -> TokenStream:
    """The run's training tokens: those in the cache, or from the text it began with; another text is refused."""
    manifest, kept = run.manifest, run.path / "data" / STANDARD_INPUT
    looked_at = processes.local_rank() > 0  # by the first process of this machine
    if not moved and (looked_at or unchanged(manifest["data"], kept)):
        stream = opened(manifest.get("prepared", ""))
        if stream is not None:
            return stream
    data = replace(settings.data, text=moved or tuple(origin["path"] for origin in manifest["data"]))
    where = f"Say where the text is now: quire resume {run.path} --data PATH"
    piped = kept.read_bytes() if kept.exists() else None
    left_out = {(size, digest) for size, digest in manifest.get("left_out", [])}
    try:
        corpus, _ = read_texts(replace(settings, data=data), piped, left_out)
    except UserError as error:
        raise UserError(f"The training text of {run.path} cannot be read: {error} {where}") from error
    try:
        check_same(run, corpus, data.named, where)
        held_out, policy = kept_validation(run, settings), settings.data.unknown
        tokens = prepare(corpus, run.tokenizer, held_out, unknown=policy, settled=True).training
    finally:
        corpus.close()
    expected = manifest["report"]["tokens"] - manifest["validation"]["tokens"]
    if len(tokens) != expected:
        raise UserError(
            f"This Quire makes {len(tokens):,} tokens of the text of {run.path}, not {expected:,} as when it began:"
            " resume it with the version in its manifest.json."
        )
    return tokens


def unchanged(origins: list[Table], piped: Path) -> bool:
    """Whether every file that a run began with is there as it was. What comes from elsewhere is not asked for again."""
    for origin in origins:
        path = piped if origin["path"] == "-" else Path(origin["path"])
        if path.is_absolute() or origin["path"] == "-":
            try:
                if path.stat().st_size != origin["bytes"] or files.sha256_of(path) != origin["sha256"]:
                    return False
            except OSError:
                return False
    return True


def check_same(run: Run, corpus: Corpus, texts: tuple[str, ...], where: str) -> None:
    """Refuse another text than the run's."""
    before, now = ([origin["sha256"] for origin in found] for found in (run.manifest["data"], corpus.origins))
    if before != now:
        changed = next(
            (new["path"] for old, new in zip(before, corpus.origins, strict=False) if old != new["sha256"]),
            texts[0],
        )
        raise UserError(
            f"{changed} is not the text that {run.path} began with: its contents differ. {where}"
            f" To train its model on another text: quire finetune {run.path} TEXT --run NEW"
        )


def kept_validation(run: Run, settings: Settings) -> Corpus | None:
    """The text of --validation, if one was given, as the run keeps it: the file itself may be gone."""
    if not settings.data.validation:
        return None
    tokens = run.validation_tokens()
    documents = np.split(tokens, np.flatnonzero(tokens == run.tokenizer.separator))[1:]  # it begins with a separator
    return Corpus.of(map(run.tokenizer.decode, documents), group=2 if settings.data.pairs else 1)
