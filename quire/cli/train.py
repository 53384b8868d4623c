"""quire train: from TEXT to a run."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro
from tyro.conf import FlagConversionOff, OmitArgPrefixes

from quire.cli.ending import show_ending
from quire.cli.flags import Switch, Texts, parse, value_of
from quire.cli.main import BEGAN
from quire.config import PRESETS, Table, merged
from quire.data.reading import DataSettings
from quire.models import ModelSettings
from quire.planning.recipes import FASTEST, family
from quire.planning.train import train_planned
from quire.training.settings import LENGTHS, Settings, TrainingSettings, layered, typed
from quire.training.texts import OWN, with_its_tokenizer

T = TypeVar("T")

Stages = Annotated[tuple[str, ...], tyro.conf.arg(metavar="STAGE ...", help_behavior_hint="")]
Preset = Annotated[str, tyro.conf.arg(metavar=f"{{{','.join(PRESETS)}}}")]


@dataclass(frozen=True)
class TextSettings(DataSettings):
    """Which text, and how it is read."""

    text: Texts = ()  # files, folders, globs, addresses, -, corpora, hf:OWNER/NAME; an index.json; none: Shakespeare


@dataclass(frozen=True)
class StagedSettings(TrainingSettings):
    """How it is trained."""

    curriculum: Stages = ()  # stages SHARE:CONTEXT or SHARE:CONTEXT:TEXT, for example 1:64 3:256


@dataclass(frozen=True)
class Arguments:
    """Train a model on TEXT and write it into a run directory. Flags over --config over --preset."""

    run: str = ""  # the run directory; without it runs/NAME after the first text
    preset: Preset = "default"  # where settings start from; without it and --steps, the planner chooses them
    config: str = ""  # a TOML file over the preset, for example another run's config.toml
    fastest: Switch = False  # a recipe with n-grams beside the network: usually a lower loss; only Quire can load it
    json: Switch = False  # print one JSON object on standard output at the end, and nothing else there
    training: OmitArgPrefixes[StagedSettings] = field(default_factory=StagedSettings)
    data: OmitArgPrefixes[TextSettings] = field(default_factory=TextSettings)
    model: FlagConversionOff[ModelSettings] = field(default_factory=ModelSettings)


def run(words: list[str]) -> int:
    """Parse, plan where only the time is given, train, and show what came of it."""
    given = arguments(Arguments, words, "train")
    path = Path(given.run) if given.run else None

    def build(recipe: Table) -> Settings:
        return settings_of(arguments(Arguments, words, "train", recipe) if recipe else given, words)

    trained = train_planned(build, wanted_family(words, given), path, BEGAN)
    return show_ending(trained, given.json)


def arguments(kind: type[T], words: list[str], command: str, recipe: Table | None = None) -> T:
    """The flags over what stands below them: a preset, a configuration file and a recipe."""
    # What flags change is known only after the layers below them are: preset, configuration file, model kind.
    preset, config = value_of(words, "--preset") or "default", value_of(words, "--config") or ""
    model = value_of(words, "--model.kind") or (FASTEST if "--fastest" in words and not named_by(words) else None)
    table = layered(preset, config, merged(recipe or {}, {"model": {"kind": model}} if model else {}))
    if any(value_of(words, f"--{name}") for name in LENGTHS):  # the length given by flag is the only one
        table["training"] = {**table.get("training", {}), **dict.fromkeys(LENGTHS, 0)}
    base = typed(table)
    text = TextSettings(**vars(base.data))
    training = StagedSettings(**vars(base.training))
    default = kind(preset=preset, config=config, training=training, data=text, model=base.model)  # type: ignore[call-arg]
    return parse(kind, words, command, default)


def settings_of(given: Any, words: list[str]) -> Settings:
    """The finished settings of a command's flags."""
    settings = Settings(DataSettings(**vars(given.data)), given.model, TrainingSettings(**vars(given.training)))
    flags = [name for name in OWN if value_of(words, f"--{name.replace('_', '-')}") is not None]
    return with_its_tokenizer(settings, flags)


def wanted_family(words: list[str], given: Any) -> str:
    """The family of recipes to choose from; "" where something but the time says what to train."""
    return family(named_by(words), given.fastest, given.training, given.data)


def named_by(words: list[str]) -> str:
    """The flag that says what to train, or ""."""
    return next((flag for flag in ("--preset", "--config", "--model.kind") if value_of(words, flag)), "")
