"""A plan: what a training would take and give, for this text, on this machine, in this time.

Chosen by the table of recipes, measured on real steps of the model chosen, predicted by what the sweep came to.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from quire.config import Table, merged, to_table
from quire.data.prepare import Prepared
from quire.devices import choose_device, memory_limit, usable_cores
from quire.errors import UserError
from quire.planning.cost import Cost, cost_of
from quire.planning.machine import Speed, measured
from quire.planning.measure import Measure, measure
from quire.planning.recipes import EXPORTABLE, FASTEST, Choice, Prediction, chosen, family, predicted, table
from quire.training.clock import EXIT_SECONDS, default_interval, evaluations, seconds_beside
from quire.training.curriculum import shortened
from quire.training.settings import LENGTHS, Settings, TrainingSettings, layered, typed
from quire.training.texts import given_text, open_text, with_its_tokenizer
from quire.training.train import Loaded, check_pairs, fitted

MINUTES = 2.5  # where nothing says how long
MEASURING_SECONDS, MEASURING_SHARE = 3.0, 0.03  # steps are measured for so long, or for this share of the time
UNMEASURED_MINUTES = 1.0  # below, a training that follows the plan measures nothing, and the table decides alone
START_SECONDS = 3.0  # until the first step
LARGE_STEP = 1e11  # arithmetic of a step from which a part of it is measured, and the whole follows
PROGRAM_BYTES = 350_000_000  # of the process itself, with torch
LONGER, GPU = 10, 20  # what-ifs: times the time; times the speed, a GPU beside a few cores on models so small


@dataclass(frozen=True)
class Chosen:
    """Settings fitted to a text, the text itself, and what was measured; `recipe` is "" where it is none's.

    The settings have a `share` of the minutes that were given."""

    settings: Settings
    loaded: Loaded
    recipe: str
    share: float
    speed: Speed | None


@dataclass(frozen=True)
class Plan:
    """All that `quire plan` says; times in seconds, memory in bytes. What cannot be told is None."""

    text: str
    bytes: int  # of the text to train on
    counted: list[float]  # bits per byte of the held-out text by counted n-grams, orders 2 to 6
    recipe: str
    kind: str
    tokenizer: str
    vocabulary_size: int
    model: dict[str, int]
    parameters: dict[str, int]
    batch_size: int
    context_length: int
    learning_rate: float
    matrix_learning_rate: float | None
    steps: int
    epochs: float
    tokens: int
    flops_per_token: int
    memory: dict[str, int]
    memory_limit: int
    device: str
    threads: int
    step_seconds: float
    estimated: bool  # from one window of a step too large to be measured
    contention: str | None  # a sentence where other programs compute on this machine
    seconds: float
    minutes: float  # that there are for it; 0: its length is not in minutes
    share: float  # of the minutes that were given: more would be learning the text by heart
    prediction: Prediction | None
    longer: dict[str, Any] | None  # with ten times the time
    gpu: dict[str, Any] | None  # with a GPU, assumed to be so many times as fast
    fastest: dict[str, Any] | None  # with n-grams beside it


def plan(
    *texts: str,
    minutes: float = 0.0,
    fastest: bool = False,
    preset: str = "",
    model: Table | None = None,
    data: Table | None = None,
    **training: Any,
) -> Plan:
    """What training on `texts` for so many `minutes` would take and give; nothing is trained, no run is made.

    The other arguments are those of quire.train. Raises UserError where memory does not suffice.
    """
    build, wanted = asked(
        texts, preset, fastest, model, data, {**training, **({"minutes": minutes} if minutes else {})}
    )
    return planned(build, wanted)


def asked(
    texts: Sequence[str], preset: str, fastest: bool, model: Table | None, data: Table | None, training: Table
) -> tuple[Callable[[Table], Settings], str]:
    """What makes settings of a recipe and of these arguments over it, and the family to choose the recipe from."""
    if not isinstance(fastest, bool):
        raise UserError(f"fastest must be True or False, not {fastest!r}.")
    text = {"text": list(texts)} if texts else {}
    flags = {"model": model or {}, "data": {**(data or {}), **text}, "training": training}
    kind = flags["model"].get("kind")
    named = f"preset {preset}" if preset else f"model kind {kind}" if kind else ""
    base: Table = {"model": {"kind": FASTEST}} if fastest and not named else {}

    def build(recipe: Table) -> Settings:
        settings = typed(layered(preset or "default", flags=merged(merged(base, recipe), flags)))
        return with_its_tokenizer(settings, training)

    first = build({})
    return build, family(named, fastest, first.training, first.data)


def planned(build: Callable[[Table], Settings], wanted: str) -> Plan:
    """The plan for a family of recipes, or for the settings that `build` makes of no recipe."""
    first = build({})
    if first.data.pairs or first.model.reads_source:
        raise UserError("A plan is for a text: models of pairs are not measured. Give a TEXT, or leave out --pairs.")
    device = choose_device(first.training.device)
    found = choose(build, first, wanted, device)
    seconds = 0.0 if length_of(first) else minutes_of(found.settings) * 60
    return summed_up(found, wanted, seconds, device)


def follow(build: Callable[[Table], Settings], wanted: str, began: float) -> Chosen:
    """The recipe that suits text, machine and time, for a training that `began` at that time."""
    first = build({})
    check_pairs(first)
    device = choose_device(first.training.device)
    found = choose(build, first, wanted, device, began)
    if found.speed is None or device.type != "cpu":
        return found
    training = replace(found.settings.training, threads=found.speed.threads)  # training need not try them again
    return replace(found, settings=replace(found.settings, training=training))


def length_of(settings: Settings) -> bool:
    """Whether something but minutes says how long to train."""
    return any(getattr(settings.training, name) for name in LENGTHS if name != "minutes")


def minutes_of(settings: Settings) -> float:
    """The minutes that a recipe is chosen for: those given, whatever of them is spent already."""
    return settings.training.minutes or MINUTES


def choose(
    build: Callable[[Table], Settings], first: Settings, wanted: str, device: torch.device, began: float | None = None
) -> Chosen:
    """The recipe for what this machine does in the minutes: the table's for a machine like the sweep's, and where steps
    of that one are faster or slower here, the table's for so much more or less time.

    In short trainings, and those whose length is not in minutes, the first choice stands. A training, which `began` at
    that time, then measures nothing, and otherwise for a share of the time that is left; a plan always measures.
    `first` is what `build` makes of no recipe.
    """
    first, piped = given_text(first)
    text = open_text(first, piped)
    try:
        seconds, speed = 60 * minutes_of(first), None
        power = 1.0  # core-seconds of the sweep that a second is worth here
        by_table = length_of(first) or minutes_of(first) < UNMEASURED_MINUTES
        measuring = MEASURING_SECONDS
        if began is not None:
            left = 0.0 if by_table else max(0.0, seconds - (time.time() - began))
            measuring = min(measuring, MEASURING_SHARE * left)
        for last in (by_table, True):  # a second choice where measuring calls for one
            choice = chosen(wanted, seconds * power, text.size) if wanted else Choice("")
            recipe = choice.recipe
            settings = within_context(replace(build(table()["recipes"].get(recipe, {})), data=first.data), recipe)
            unchanged = bool(recipe) and holds(settings, recipe, text.fixed)
            share = choice.share if unchanged and not length_of(first) else 1.0
            settings = replace(settings, training=replace(settings.training, minutes=share * settings.training.minutes))
            settings, prepared = fitted(*text.prepared(settings))
            if not measuring and unchanged:  # no time for it: what the table has for so short a time fits anywhere
                break
            cost = cost_of(settings, device)
            refuse_too_large(cost, settings, device)
            if not measuring:
                break
            speed = measured_step(settings, prepared, cost, device, measuring)
            reference = table()["step_seconds"].get(recipe) if unchanged else None
            if last or not reference:  # another model's steps say nothing of a recipe's
                break
            power = reference / speed.step_seconds
            if chosen(wanted, seconds * power, text.size) == choice:
                break
    finally:
        text.close()
    recipe = recipe if unchanged and not text.fixed else ""  # nothing is foretold of another tokenizer than its own
    return Chosen(settings, Loaded(prepared, text.origins, piped), recipe, share, speed)


def within_context(settings: Settings, recipe: str) -> Settings:
    """The settings, a recipe's windows in them no longer than the context, which a flag may have shortened."""
    own, training = table()["recipes"].get(recipe, {}).get("training", {}), settings.training
    if not recipe or list(training.curriculum) != own.get("curriculum"):
        return settings
    stages = shortened(training.curriculum, settings.model.context_length)
    return replace(settings, training=replace(training, curriculum=stages))


def holds(settings: Settings, recipe: str, but: Sequence[str] = ()) -> bool:
    """Whether the settings are still those of the recipe over the default preset, whatever flags went over it, `but`
    for these."""
    wanted, left_out = layered("default", flags=table()["recipes"][recipe]), {*LENGTHS, *but}
    parts = {"model": to_table(settings.model), "training": to_table(settings.training)}
    named = ((part, name, value) for part in parts for name, value in wanted[part].items() if name not in left_out)
    return all(parts[part][name] == value for part, name, value in named)


def measured_step(settings: Settings, prepared: Prepared, cost: Cost, device: torch.device, seconds: float) -> Speed:
    """The seconds of a step; of a very large one, a single window's, times how many there are."""
    training = settings.training
    if not very_large(settings, cost, device):
        return measured(settings, prepared, device, seconds, training.threads)
    windows = training.batch_size * training.accumulation_steps
    context = min(settings.model.context_length, 256)
    part = replace(training, batch_size=1, accumulation_steps=1, curriculum=shortened(training.curriculum, context))
    small = replace(settings.with_model(context_length=context), training=part)
    speed = measured(small, prepared, device, 0.0, training.threads or usable_cores())
    return replace(speed, step_seconds=windows * settings.model.context_length / context * speed.step_seconds)


def very_large(settings: Settings, cost: Cost, device: torch.device) -> bool:
    """Whether one step would take longer than a plan may."""
    windows = settings.training.batch_size * settings.training.accumulation_steps
    return device.type != "cuda" and cost.flops_per_token * windows * settings.model.context_length >= LARGE_STEP


def refuse_too_large(cost: Cost, settings: Settings, device: torch.device) -> None:
    """A UserError where a training cannot fit the memory there is."""
    needed, limit = cost.total_memory + (PROGRAM_BYTES if device.type == "cpu" else 0), memory_limit(device)
    if limit and needed > limit:
        parts = sorted(cost.memory.items(), key=lambda part: -part[1])[:3]
        shown = ", ".join(f"{name} {value / 1e9:.1f} GB" for name, value in parts)
        remedy = "a smaller --batch-size with more --accumulation-steps" if settings.training.batch_size > 1 else ""
        remedy = " or ".join(filter(None, [remedy, "a smaller model (--model.layers, --model.embedding-size)"]))
        raise UserError(
            f"This cannot fit: training needs about {needed / 1e9:.1f} GB ({shown}), and {device} has"
            f" {limit / 1e9:.1f} GB. Take {remedy}."
        )


def summed_up(found: Chosen, wanted: str, seconds: float, device: torch.device) -> Plan:
    """The plan's numbers: steps from the time and what a step takes, and the bits per byte that those come to."""
    settings, prepared = found.settings, found.loaded.prepared
    shape, training, cost = settings.model, settings.training, cost_of(settings, device)
    speed = found.speed
    assert speed is not None, "what is planned was measured"
    per_step = training.batch_size * training.accumulation_steps * shape.context_length
    steps = steps_of(settings, prepared, per_step)
    evaluating = seconds_evaluating(training, speed, seconds, steps)
    if not steps:
        steps = max(1, int((seconds - START_SECONDS - EXIT_SECONDS - evaluating) / speed.step_seconds))
    text = measure(prepared, piloted=wanted == EXPORTABLE and bool(found.recipe))  # of no recipe nothing is foretold
    core_seconds = steps * table()["step_seconds"].get(found.recipe, 0.0)
    what_if = WhatIf(text, core_seconds / found.share, wanted)
    names = ("layers", "embedding_size", "heads", "feedforward_size", "hidden_size")
    return Plan(
        text=", ".join(settings.data.named[:3]),
        bytes=text.bytes,
        counted=[round(bits, 4) for bits in text.counted],
        recipe=found.recipe,
        kind=shape.kind,
        tokenizer=prepared.tokenizer.kind,
        vocabulary_size=shape.vocabulary_size,
        model={name: getattr(shape, name) for name in names if hasattr(shape, name)},
        parameters=cost.parameters,
        batch_size=training.batch_size * training.accumulation_steps,
        context_length=shape.context_length,
        learning_rate=training.learning_rate,
        matrix_learning_rate=training.matrix_learning_rate if training.optimizer == "muon" else None,
        steps=steps,
        epochs=round(steps * per_step / max(1, len(prepared.training)), 3),
        tokens=steps * per_step,
        flops_per_token=cost.flops_per_token,
        memory=cost.memory | ({"program": PROGRAM_BYTES} if device.type == "cpu" else {}),
        memory_limit=memory_limit(device),
        device=str(device),
        threads=speed.threads,
        step_seconds=round(speed.step_seconds, 6),
        estimated=very_large(settings, cost, device),
        contention=speed.contention,
        seconds=round(max(seconds, START_SECONDS + EXIT_SECONDS + steps * speed.step_seconds + evaluating), 1),
        minutes=round(seconds / 60, 4),
        share=found.share,
        prediction=predicted(wanted, core_seconds, text.bytes, text.counted, text.pilot),
        longer=what_if.at(LONGER) if found.share == 1 else None,
        gpu=what_if.at(GPU) if device.type == "cpu" else None,
        fastest=what_if.fastest() if wanted == EXPORTABLE else None,
    )


def steps_of(settings: Settings, prepared: Prepared, per_step: int) -> int:
    """The steps that the settings ask for, 0 where they go by time."""
    training = settings.training
    tokens = training.tokens or training.epochs * len(prepared.training)
    return training.steps or -int(-tokens // per_step)


def seconds_evaluating(training: TrainingSettings, speed: Speed, seconds: float, steps: int) -> float:
    """What all evaluations of a run of so many seconds take together; of 0, of so many steps.

    Each measures the held-out text, which was measured here on its beginning, and takes as long beside that as
    training/clock.py assumes before it knows better: for sample, plot and saving, in a run of a minute or more the
    seconds of one of a minute. How many there are follows the clock's rule; by steps, at each interval and at the end.
    """
    each = speed.evaluation_seconds + seconds_beside(seconds / 60 if seconds else 1.0)
    interval = training.evaluation_interval or default_interval(steps)
    return each * (evaluations(seconds, each) if seconds else math.ceil(steps / interval))


@dataclass(frozen=True)
class WhatIf:
    """Other times and machines for the same text."""

    text: Measure
    core_seconds: float
    family: str

    def at(self, times: float, other: str = "") -> dict[str, Any] | None:
        """The recipe and the prediction for so many times the core-seconds, of this family or another."""
        kind, core_seconds = other or self.family, times * self.core_seconds
        if not kind:
            return None
        choice = chosen(kind, core_seconds, self.text.bytes)
        found = predicted(kind, choice.share * core_seconds, self.text.bytes, self.text.counted, self.text.pilot)
        if found is None:
            return None
        return {"times": times, "recipe": choice.recipe, "prediction": found}

    def fastest(self) -> dict[str, Any] | None:
        """The same time with n-grams beside the network."""
        return self.at(1, FASTEST)
