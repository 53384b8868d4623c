"""quire plan: what a training would take and give, before any of it is spent."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from tyro.conf import FlagConversionOff, OmitArgPrefixes

from quire.cli.flags import Switch, value_of
from quire.cli.models import amount
from quire.cli.runs import size
from quire.cli.train import Preset, StagedSettings, TextSettings, arguments, settings_of, wanted_family
from quire.config import Table
from quire.models import ModelSettings
from quire.planning.plan import Plan, planned
from quire.planning.recipes import EXPORTABLE, FAMILIES, FASTEST, Prediction
from quire.training.settings import LENGTHS, Settings
from quire.training.threads import in_words
from quire.training.train import check_length


@dataclass(frozen=True)
class Arguments:
    """Say what training on TEXT takes and gives: model, memory, time and the loss to expect. Nothing is trained.

    Takes the flags of quire train, and measures this machine for a few seconds.
    """

    preset: Preset = "default"  # where settings start from; without it, the planner chooses them
    config: str = ""  # a TOML file over the preset, for example another run's config.toml
    fastest: Switch = False  # a recipe with n-grams beside the network: usually a lower loss; only Quire can load it
    json: Switch = False  # print one JSON object on standard output
    training: OmitArgPrefixes[StagedSettings] = field(default_factory=StagedSettings)
    data: OmitArgPrefixes[TextSettings] = field(default_factory=TextSettings)
    model: FlagConversionOff[ModelSettings] = field(default_factory=ModelSettings)


def run(words: list[str]) -> int:
    """Plan, and print it."""
    given = arguments(Arguments, words, "plan")
    wanted = wanted_family(words, given)
    if any(value_of(words, f"--{name}") for name in LENGTHS):
        check_length(given.training)  # --minutes 0

    def build(recipe: Table) -> Settings:
        return settings_of(arguments(Arguments, words, "plan", recipe) if recipe else given)

    found = planned(build, wanted)
    print(json.dumps(asdict(found)) if given.json else "\n".join(told(found)))
    return 0


def told(plan: Plan) -> list[str]:
    """The plan in lines."""
    best = min(plan.counted)
    shape = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plan.model.items() if value)
    rate = f"{plan.learning_rate:g}"
    if plan.matrix_learning_rate is not None:
        rate += f" ({plan.matrix_learning_rate:g} for matrices)"
    measured = "measured uncompiled" if plan.device.startswith("cuda") else "measured"
    if plan.estimated:
        measured = "estimated from a part of one"
    where = f"{plan.device}, {in_words(plan.threads)}"
    lines = [
        row("text", f"{plan.text}: {size(plan.bytes)} to train on; counting alone gives {best:.3f} bits per byte"),
        row("tokenizer", f"{plan.tokenizer}, vocabulary {plan.vocabulary_size:,}"),
        row("model", f"{kind(plan)}: {shape}, context {plan.context_length}"),
        row("parameters", total(plan.parameters, amount)),
        row("training", f"batch {plan.batch_size}, learning rate {rate}, {steps(plan)}, {epochs(plan)}"),
        row("arithmetic", f"{amount(plan.flops_per_token)} operations a token, forward and backward"),
        row("memory", f"{total(plan.memory, size)}; there is {size(plan.memory_limit) if plan.memory_limit else '?'}"),
        row("speed", f"{milliseconds(plan.step_seconds)} a step on {where}, {measured}"),
        row("time", f"{digits(plan.seconds / 60)} minutes, from start to exit{differs(plan)}"),
        row("expected", expected(plan.prediction)),
    ]
    if plan.contention:
        lines.append(row("", plan.contention))
    return lines + [row("with", line) for line in otherwise(plan)]


def milliseconds(seconds: float) -> str:
    """A step's time, to two or three digits."""
    return f"{1000 * seconds:,.0f} ms" if seconds >= 0.01 else f"{1000 * seconds:.2g} ms"


def row(name: str, text: str) -> str:
    """A line of the plan."""
    return f"{name:12}{text}"


def kind(plan: Plan) -> str:
    """The kind of model, and the recipe where it is one's."""
    return f"{FAMILIES.get(plan.kind, plan.kind)} (recipe {plan.recipe})" if plan.recipe else plan.kind


def total(parts: dict[str, int], spelled: Any) -> str:
    """A sum and its parts."""
    return f"{spelled(sum(parts.values()))}: " + ", ".join(f"{name} {spelled(value)}" for name, value in parts.items())


def steps(plan: Plan) -> str:
    """How many steps."""
    return f"{plan.steps:,} step{'s' * (plan.steps != 1)}"


def epochs(plan: Plan) -> str:
    """How often the text is gone through."""
    return f"{digits(plan.epochs)} times through the text ({amount(plan.tokens)} tokens)"


def digits(number: float) -> str:
    """A number to three digits, or to its last one before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def differs(plan: Plan) -> str:
    """Why less or more than the minutes given is taken."""
    if plan.minutes and plan.seconds > 1.05 * 60 * plan.minutes + 3:
        return f", not {digits(plan.minutes)}: already {steps(plan)} with its evaluation takes so long"
    return "" if plan.share == 1 else ": longer, it would learn so short a text by heart"


def expected(prediction: Prediction | None) -> str:
    """A prediction in words."""
    if prediction is None:
        return "no bits per byte foretold: too few steps, or no recipe of the sweep (see docs/planning.md)"
    words = f"{prediction.bits_per_byte:.3f} bits per byte held out ({prediction.low:.3f} to {prediction.high:.3f})"
    return words + ("; extrapolated: nothing like it was measured" if prediction.extrapolated else "")


def otherwise(plan: Plan) -> list[str]:
    """What would change with more time, a GPU, or n-grams."""
    lines, own = [], plan.prediction
    for found, what in ((plan.longer, "{} times the time"), (plan.gpu, "a GPU, if {} times as fast")):
        if found:
            words = f"{expected(found['prediction'])}, by recipe {found['recipe']}"
            if own and found["prediction"].bits_per_byte >= own.bits_per_byte:
                words = "no gain for this text: there is no more to learn from it"
            lines.append(f"{what.format(found['times'])}: {words}")
    if plan.fastest:
        tables: Prediction = plan.fastest["prediction"]
        gain = f", {tables.bits_per_byte / own.bits_per_byte - 1:+.0%}" if own else ""
        if own and tables.bits_per_byte >= own.bits_per_byte:
            gain = ": no gain for this text and time"
        lines.append(
            f"--fastest (n-grams beside it, which no other program can load): {tables.bits_per_byte:.3f}{gain}"
        )
    elif plan.recipe and plan.kind == FASTEST:
        lines.append(f"a model that other programs can load: leave out --fastest ({FAMILIES[EXPORTABLE]})")
    return lines
