"""quire finetune: a run's model, trained on other text in a new run."""

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import OmitArgPrefixes

from quire.cli.ending import show_ending
from quire.cli.flags import RunPath, Switch, Texts, parse
from quire.cli.main import BEGAN
from quire.cli.train import StagedSettings, TextSettings
from quire.data.reading import DataSettings
from quire.errors import UserError
from quire.run import Run
from quire.training.finetune import finetune_run, inherited
from quire.training.settings import Settings, TrainingSettings, typed


@dataclass(frozen=True)
class NewTextSettings(TextSettings):
    """Which text, and how it is read."""

    text: Texts = ()  # files, folders, globs, http(s) addresses, known corpora or hf:OWNER/NAME


@dataclass(frozen=True)
class Arguments:
    """Train the model of RUN on other TEXT, in a new run: its weights and its tokenizer, all else begins afresh.

    The settings are RUN's, with a quarter of its learning rates: `quire finetune RUN --help` shows them.
    """

    base: RunPath  # the run whose model is taken; it stays as it is
    run: str = ""  # the new run directory; without it runs/NAME after the first text
    context_length: int = 0  # tokens the new run reads at once; 0: as RUN, but at most 512 of an imported model
    json: Switch = False  # print one JSON object on standard output at the end, and nothing else there
    training: OmitArgPrefixes[StagedSettings] = field(default_factory=StagedSettings)
    data: OmitArgPrefixes[NewTextSettings] = field(default_factory=NewTextSettings)


def run(words: list[str]) -> int:
    """Parse, train, and show what came of it. RUN comes first: its settings are what the flags change."""
    if not words or words[0] in ("-h", "--help"):
        parse(Arguments, words or ["--help"], "finetune")
    if words[0].startswith("-"):
        raise UserError("Name the run first: quire finetune RUN TEXT ... --run NEW")
    base = Run(words[0])
    start = typed(inherited(base))
    text = NewTextSettings(**vars(start.data))
    default = Arguments(base=words[0], training=StagedSettings(**vars(start.training)), data=text)
    given = parse(Arguments, words, "finetune", default)
    settings = Settings(DataSettings(**vars(given.data)), start.model, TrainingSettings(**vars(given.training)))
    path = Path(given.run) if given.run else None
    trained = finetune_run(base, settings, path, BEGAN, given.context_length)
    return show_ending(trained, given.json)
