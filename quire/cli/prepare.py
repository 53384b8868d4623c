"""quire prepare: a text's tokens in a folder of their own, here or elsewhere, to be trained on from anywhere."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes

from quire.cli.flags import Switch, Texts, parse, print_json, program
from quire.cli.train import TextSettings
from quire.data.elsewhere import local_path
from quire.data.published import publish, target_at
from quire.data.reading import DataSettings
from quire.data.shards import INDEX
from quire.errors import UserError
from quire.progress import say
from quire.training.settings import Settings, TrainingSettings
from quire.training.texts import AUTO, given_text, is_prepared, load_data

Address = Annotated[str, tyro.conf.arg(metavar="ADDRESS", help_behavior_hint="(required)")]


@dataclass(frozen=True)
class OwnTextSettings(TextSettings):
    """Which text, and how it is read."""

    text: Texts = ()  # files, folders, globs, http(s) addresses, -, known corpora, hf:OWNER/NAME; none: Shakespeare
    cache_gigabytes: tyro.conf.Suppress[float] = DataSettings.cache_gigabytes  # of no use here: nothing is fetched


@dataclass(frozen=True)
class Arguments:
    """Read TEXT, hold out a part, fit the tokenizer, and write the tokens to ADDRESS: what quire train does first.

    Then `quire train ADDRESS/index.json` trains on them, on any machine, and fetches only what it needs. A call that
    broke off is gone on with by the same call.
    """

    out: Address = ""  # a folder, or an address such as s3://bucket/folder, gs://..., hf://datasets/OWNER/NAME/folder
    tokenizer: str = AUTO  # a kind to fit, auto (what suits the text), or one to use as it is: a path, or the name gpt2
    vocabulary_size: int = 0  # tokens of a tokenizer that is fitted; 0: as its kind sees fit
    json: Switch = False  # print one JSON object on standard output at the end, and nothing else there
    data: OmitArgPrefixes[OwnTextSettings] = field(default_factory=OwnTextSettings)


def run(words: list[str]) -> int:
    """Prepare, write, and say what to do with it."""
    given = parse(Arguments, words, "prepare")
    if not given.out:
        raise UserError("Say where the tokens go: --out FOLDER, or an address such as --out s3://BUCKET/FOLDER.")
    training = TrainingSettings(tokenizer=given.tokenizer, vocabulary_size=given.vocabulary_size)
    settings, piped = given_text(Settings(data=DataSettings(**vars(given.data)), training=training))
    data = settings.data
    if data.pairs and data.text:
        raise UserError(f"TEXT ({data.text[0]}) and --pairs {data.pairs} both name what to prepare. Choose one.")
    if is_prepared(data):
        raise UserError(f"{data.named[0]} is prepared already. To have it elsewhere, copy its folder.")
    out = local_path(given.out)
    for name in (*data.named, data.validation):
        if out is not None and os.path.isdir(name) and out.resolve().is_relative_to(Path(name).resolve()):
            raise UserError(f"--out {given.out} lies in {name}, which is read as text. Name a folder outside of it.")
    target_at(given.out)  # or refused before a long text is read
    _, prepared, _ = load_data(settings, piped)
    say(f"{', '.join(data.named[:3])}: {prepared}")
    found = publish(prepared, given.out, pairs=bool(data.pairs))
    if given.json:
        print_json(found)
        return 0
    say(f"{found['tokens']:,} tokens in {found['shards']} shards, {found['bytes'] / 1e6:,.1f} MB: {found['address']}")
    pairs = "--pairs " * bool(data.pairs)
    say(f"\nNext:  {program()} train {pairs}{found['address']}/{INDEX} --minutes 5")
    return 0
