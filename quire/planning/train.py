"""Training by plan: where only the minutes are given, the recipe is chosen for text, machine and time."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quire.config import Table
from quire.planning.plan import Chosen, asked, follow
from quire.planning.recipes import EXPORTABLE, FAMILIES
from quire.progress import say
from quire.run import Run, refuse_existing
from quire.training.begin import NewRun, begin_run
from quire.training.settings import Settings
from quire.training.texts import is_prepared
from quire.training.threads import in_words
from quire.training.train import new_run


def train(
    *texts: str,
    run: str | Path | None = None,
    preset: str = "",
    fastest: bool = False,
    model: Table | None = None,
    data: Table | None = None,
    **training: Any,
) -> Run:
    """Train a model on `texts` (files, folders, globs, addresses, corpus names; none: the built-in corpus).

    `model`, `data` and the other keywords are fields of the model's settings, DataSettings and TrainingSettings:
    `quire.train("book.txt", minutes=5, model={"layers": 6})`. They go over those of the preset or, where `minutes` are
    given and neither a preset nor a kind of model, over the planner's recipe; `fastest` takes one with n-grams beside
    the network. Raises UserError for a mistake in any of them.
    """
    began = time.time()
    build, wanted = asked(texts, preset, fastest, model, data, training)
    return train_planned(build, wanted, Path(run) if run is not None else None, began)


def train_planned(build: Callable[[Table], Settings], wanted: str, path: Path | None, began: float) -> Run:
    """Train what the planner chooses of the `wanted` family, and say what that was; where none is wanted, with the
    settings as they were given. The minutes count from `began`, a time.time()."""
    settings = build({})

    def make() -> NewRun:
        if not wanted:
            return new_run(settings, path)
        if path is not None:
            refuse_existing(path)
        found = follow(build, wanted, began)
        say(choice(found, wanted))
        return new_run(found.settings, path, found.loaded)

    return begin_run(make, settings, path, began)


def choice(found: Chosen, wanted: str) -> str:
    """What the planner chose, in words."""
    settings = found.settings
    model, training = settings.model, settings.training
    changed = ", with the tokenizer of the text" if is_prepared(settings.data) else ", changed by flags"
    changed = "" if found.recipe else changed
    layers = getattr(model, "layers", 0)
    shape = f"{layers} layer{'s' * (layers != 1)} of {getattr(model, 'embedding_size', '?')}"
    lines = [
        f"By plan{changed}: {FAMILIES[wanted]}, {shape}, context {model.context_length}, in batches of"
        f" {training.batch_size} at rate {training.learning_rate:g}, tokenizer {training.tokenizer}. All of it is in"
        " the run's config.toml."
    ]
    if found.speed:
        lines.append(f"Measured: {1000 * found.speed.step_seconds:.0f} ms a step with {in_words(found.speed.threads)}.")
    if found.share < 1:
        lines.append(
            f"It trains for {training.minutes:.3g} of the {training.minutes / found.share:.3g} minutes: longer, it"
            " would learn so short a text by heart, and do worse on any other."
        )
    if wanted == EXPORTABLE:
        lines.append("With --fastest it would have n-grams beside it: usually a lower loss, but only Quire loads it.")
    return "\n".join(lines)
