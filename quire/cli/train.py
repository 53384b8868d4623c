"""quire train: from TEXT to a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import FlagConversionOff, OmitArgPrefixes

from quire.cli.ending import show_ending
from quire.cli.flags import Switch, Texts, parse, value_of
from quire.cli.main import BEGAN
from quire.config import PRESETS
from quire.data.reading import DataSettings
from quire.models import ModelSettings
from quire.training.settings import LENGTHS, Settings, TrainingSettings, layered, typed
from quire.training.train import train_run

Stages = Annotated[tuple[str, ...], tyro.conf.arg(metavar="STAGE ...", help_behavior_hint="")]
Preset = Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(PRESETS)}}}")]


@dataclass(frozen=True)
class TextSettings(DataSettings):
    """Which text, and how it is read."""

    text: Texts = ()  # files, folders, globs, http(s) addresses, -, known corpora, hf:OWNER/NAME; none: Shakespeare


@dataclass(frozen=True)
class StagedSettings(TrainingSettings):
    """How it is trained."""

    curriculum: Stages = ()  # stages SHARE:CONTEXT or SHARE:CONTEXT:TEXT, for example 1:64 3:256


@dataclass(frozen=True)
class Arguments:
    """Train a model on TEXT and write it into a run directory. Flags over --config over --preset."""

    run: str = ""  # the run directory; without it runs/NAME after the first text
    preset: Preset = "default"  # where the settings start from; the defaults shown here are this preset's
    config: str = ""  # a TOML file over the preset, for example another run's config.toml
    json: Switch = False  # print one JSON object on standard output at the end, and nothing else there
    training: OmitArgPrefixes[StagedSettings] = field(default_factory=StagedSettings)
    data: OmitArgPrefixes[TextSettings] = field(default_factory=TextSettings)
    model: FlagConversionOff[ModelSettings] = field(default_factory=ModelSettings)


def run(words: list[str]) -> int:
    """Parse, train, and show what came of it."""
    # What flags change is known only after the layers below them are: preset, configuration file, model kind.
    preset, config = value_of(words, "--preset") or "default", value_of(words, "--config") or ""
    kind = value_of(words, "--model.kind")
    table = layered(preset, config, {"model": {"kind": kind}} if kind else {})
    if any(value_of(words, f"--{name}") for name in LENGTHS):  # the length given by flag is the only one
        table["training"] = {**table.get("training", {}), **dict.fromkeys(LENGTHS, 0)}
    base = typed(table)
    text = TextSettings(**vars(base.data))
    recipe = StagedSettings(**vars(base.training))
    default = Arguments(preset=preset, config=config, training=recipe, data=text, model=base.model)
    given = parse(Arguments, words, "train", default)
    settings = Settings(DataSettings(**vars(given.data)), given.model, TrainingSettings(**vars(given.training)))
    trained = train_run(settings, Path(given.run) if given.run else None, BEGAN)
    return show_ending(trained, given.json)
