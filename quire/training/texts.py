"""A run's text: read and prepared when it begins, found again when it resumes."""

import sys
from collections.abc import Container
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from quire import files
from quire.config import Table
from quire.data.documents import Mark
from quire.data.elsewhere import is_index
from quire.data.prepare import Prepared, opened, prepare, spelled
from quire.data.published import Published
from quire.data.reading import DataSettings, read
from quire.data.shards import INDEX, TokenStream
from quire.data.spool import Corpus
from quire.errors import UserError
from quire.progress import bar, say
from quire.run import Run
from quire.tokenizers import TOKENIZERS, load_tokenizer
from quire.tokenizers.auto import choose_for
from quire.training.settings import Settings

AUTO = "auto"  # the tokenizer that suits the text
DEFAULT_CORPUS = "shakespeare"  # where nothing is named
OWN = {"tokenizer": AUTO, "vocabulary_size": 0}  # what a prepared text has of itself
STANDARD_INPUT = "standard-input.txt"  # where a run keeps text that came by a pipe


def given_text(settings: Settings) -> tuple[Settings, bytes | None]:
    """The settings with the built-in corpus where they name nothing, and standard input where a text is called "-"."""
    if not settings.data.named:
        settings = replace(settings, data=replace(settings.data, text=(DEFAULT_CORPUS,)))
    return settings, sys.stdin.buffer.read() if "-" in settings.data.named else None


def load_data(settings: Settings, piped: bytes | None = None) -> tuple[Settings, Prepared, list[Table]]:
    """The settings with the tokenizer that is taken, the prepared text, and where it came from."""
    text = open_text(settings, piped)
    try:
        settings, prepared = text.prepared(settings)
    finally:
        text.close()
    return settings, prepared, text.origins


def open_text(settings: Settings, piped: bytes | None = None) -> "ReadText | PreparedText":
    """The text that the settings name: read, or found where it lies prepared."""
    return PreparedText(settings.data) if is_prepared(settings.data) else ReadText(*read_texts(settings, piped))


@dataclass(frozen=True)
class ReadText:
    """A text that was read, and that of --validation where one is given."""

    corpus: Corpus
    held_out: Corpus | None = None
    fixed: tuple[str, ...] = ()  # the settings that it has of itself

    @property
    def origins(self) -> list[Table]:
        """Where it came from, as a run's manifest has it."""
        return self.corpus.origins

    @property
    def size(self) -> int:
        """Its UTF-8 bytes."""
        return self.corpus.documents.sizes[0]

    def close(self) -> None:
        """Delete what was written of it."""
        self.corpus.close()

    def prepared(self, settings: Settings) -> tuple[Settings, Prepared]:
        """The settings with the tokenizer that is taken, and the tokens that it makes."""
        training = settings.training
        if training.tokenizer == AUTO:
            choice = choose_for(self.size)
            size = training.vocabulary_size or choice.vocabulary_size
            say(f"Tokenizer: {choice.kind}, because {choice.why}.")
            training = replace(training, tokenizer=choice.kind, vocabulary_size=size)
        wanted, size, unknown = training.tokenizer, training.vocabulary_size, settings.data.unknown
        prepared = prepare(self.corpus, wanted, self.held_out, size, unknown)
        return replace(settings, training=training), prepared


# ---- prepared before, by quire prepare ----------------------------------------------------------------------------


def is_prepared(data: DataSettings) -> bool:
    """Whether the settings name a prepared text: one address or path of an index.json, and nothing else."""
    return len(data.named) == 1 and is_index(data.named[0])


def with_its_tokenizer(settings: Settings, given: Container[str]) -> Settings:
    """The settings with the tokenizer of a prepared text, unless one is `given` by flag, which is to be compared."""
    if not is_prepared(settings.data):
        return settings
    own = {name: value for name, value in OWN.items() if name not in given}
    return replace(settings, training=replace(settings.training, **own))  # type: ignore[arg-type]


class PreparedText:
    """A prepared text, found by its index. It has a tokenizer and a held-out part already."""

    fixed = tuple(OWN)  # the settings that it has of itself

    def __init__(self, data: DataSettings) -> None:
        """Find it; a UserError where it is not there, or not what the settings want."""
        (self.name,) = data.named
        for field in fields(DataSettings):
            if field.name not in ("text", "pairs", "cache_gigabytes") and getattr(data, field.name) != field.default:
                flag = f"--{field.name.replace('_', '-')}"
                raise UserError(f"{self.name} is prepared already: {flag} was for quire prepare. Leave it out.")
        self.found = Published.at(self.name)
        if data.pairs and not self.found.index["pairs"]:
            raise UserError(f"{self.name} holds a text, not pairs. Name it without --pairs: quire train {self.name}")
        if not data.pairs and self.found.index["pairs"]:
            raise UserError(f"{self.name} holds pairs. Name it so: quire train --pairs {self.name}")
        self.origins: list[Table] = [self.found.origin]
        self.size = self.found.size

    def close(self) -> None:
        """Nothing was written."""

    def prepared(self, settings: Settings) -> tuple[Settings, Prepared]:
        """The settings with the tokenizer that made the tokens, and these; a UserError where another one is wanted."""
        tokenizer, training = self.found.tokenizer, settings.training
        wanted, size, own = training.tokenizer, training.vocabulary_size, tokenizer.vocabulary_size
        fitted = wanted == AUTO or wanted in TOKENIZERS  # of others the size is theirs
        same = wanted in (AUTO, tokenizer.kind) if fitted else spelled(load_tokenizer(wanted)) == spelled(tokenizer)
        if not same or (fitted and size not in (0, own)):
            asked = f"--tokenizer {wanted}" if not same else f"--vocabulary-size {size}"
            raise UserError(
                f"{self.name} was prepared with a tokenizer of its own ({tokenizer.kind}, {own:,} tokens), which is not"
                f" {asked}. Leave that out, or prepare the text with it: quire prepare TEXT {asked} --out FOLDER"
            )
        training = replace(training, tokenizer=tokenizer.kind, vocabulary_size=own)
        return replace(settings, training=training), self.found.prepared(settings.data.cache_gigabytes)


def find_prepared(run: Run, settings: Settings, moved: tuple[str, ...], looked_at: bool) -> TokenStream:
    """The training tokens of a run on a prepared text, which may have moved; another one is refused."""
    (origin,) = run.manifest["data"]
    address = moved[0] if moved else origin["path"]
    where = f"Say where it is now: quire resume {run.path} --data ADDRESS/{INDEX}"
    try:
        found = Published.at(address)
        if found.sha256 == origin["sha256"]:
            return found.training(settings.data.cache_gigabytes, looked_at)
    except UserError as error:
        raise UserError(f"The prepared text of {run.path} cannot be read: {error} {where}") from error
    raise UserError(
        f"{address} is not the prepared text that {run.path} began with: its contents differ. {where}"
        f" To train its model on another text: quire finetune {run.path} TEXT --run NEW"
    )


# ---- read ---------------------------------------------------------------------------------------------------------


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


def find_data(run: Run, settings: Settings, moved: tuple[str, ...], looked_at: bool = False) -> TokenStream:
    """The run's training tokens: those in the cache, or from the text it began with; another text is refused.

    What another process has just `looked_at` is taken as it is: each is to read only its part.
    """
    manifest, kept = run.manifest, run.path / "data" / STANDARD_INPUT
    if is_prepared(settings.data):
        return find_prepared(run, settings, moved, looked_at)
    if looked_at or (not moved and unchanged(manifest["data"], kept)):
        stream = opened(manifest.get("prepared", ""), looked_at)
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
