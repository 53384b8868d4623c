"""quire plan: what a training would take and give, before any of it is spent."""

import json
import shlex
from dataclasses import asdict, dataclass, field
from typing import Any

from tyro.conf import FlagConversionOff, OmitArgPrefixes

from quire.cli.flags import Switch, program, value_of
from quire.cli.models import amount
from quire.cli.runs import size
from quire.cli.train import Preset, StagedSettings, TextSettings, arguments, settings_of, wanted_family
from quire.config import Table
from quire.errors import UserError
from quire.models import ModelSettings
from quire.planning import cluster
from quire.planning.cards import NETWORK, NODE
from quire.planning.plan import Plan, planned
from quire.planning.recipes import EXPORTABLE, FAMILIES, FASTEST, Prediction
from quire.training.settings import LENGTHS, Settings
from quire.training.threads import in_words
from quire.training.train import check_length


@dataclass(frozen=True)
class Arguments:
    """Say what training on TEXT takes and gives: model, memory, time and the loss to expect. Nothing is trained.

    Takes the flags of quire train, and measures this machine for a few seconds. With --devices it plans for cards
    elsewhere: nothing is measured and no TEXT is read, memory, time and dollars follow from formulas.
    """

    preset: Preset = "default"  # where settings start from; without it, the planner chooses them
    config: str = ""  # a TOML file over the preset, for example another run's config.toml
    fastest: Switch = False  # a recipe with n-grams beside the network: usually a lower loss; only Quire can load it
    json: Switch = False  # print one JSON object on standard output
    devices: int = 0  # plan for so many cards, in machines of 8; 0: for this machine
    card: str = "h100"  # of which kind: a100-40gb, a100-80gb, h100, h200, l40s or rtx-4090
    price: float = 0.0  # dollars of a card for an hour; 0: what the table has
    network: float = NETWORK  # gigabits a second between machines, of each: by default 400 for each of its cards
    training: OmitArgPrefixes[StagedSettings] = field(default_factory=StagedSettings)
    data: OmitArgPrefixes[TextSettings] = field(default_factory=TextSettings)
    model: FlagConversionOff[ModelSettings] = field(default_factory=ModelSettings)


def run(words: list[str]) -> int:
    """Plan, and print it."""
    given = arguments(Arguments, words, "plan")
    if given.devices:
        return elsewhere(words, given)
    if alone := [flag for flag in ("--card", "--price", "--network") if value_of(words, flag)]:
        raise UserError(f"{alone[0]} says of which cards there are --devices N. Give that too, or leave it out.")
    wanted = wanted_family(words, given)
    if any(value_of(words, f"--{name}") for name in LENGTHS):
        check_length(given.training)  # --minutes 0

    def build(recipe: Table) -> Settings:
        return settings_of(arguments(Arguments, words, "plan", recipe) if recipe else given, words)

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


def steps(plan: Plan | cluster.ClusterPlan) -> str:
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


# ---- cards elsewhere ----


def elsewhere(words: list[str], given: Arguments) -> int:
    """Plan for cards that are not here, and print it."""
    if value_of(words, "--minutes"):
        raise UserError(
            "--devices tells the time that a length in tokens takes: give --tokens or --steps, no --minutes."
        )
    if "--fastest" in words:
        raise UserError("--devices plans for a network without n-grams beside it. Leave out --fastest.")
    if given.data.pairs:
        raise UserError("--devices plans for a stream of text. Leave out --pairs.")
    found = cluster.planned(settings_of(given, words), given.devices, given.card, given.price, given.network)
    commands = [command(words, given, found, way) for way in found.ways]
    if given.json:
        ways = [
            asdict(way) | {"total_memory": way.total_memory, "command": line}
            for way, line in zip(found.ways, commands, strict=True)
        ]
        print(json.dumps(asdict(found) | {"ways": ways}))
    else:
        run_it = next((line for way, line in zip(found.ways, commands, strict=True) if way == found.best), "")
        given_length = any(value_of(words, f"--{name}") for name in LENGTHS)
        print("\n".join(told_elsewhere(found, run_it, given_length)))
    return 0


def told_elsewhere(plan: cluster.ClusterPlan, run_it: str, given_length: bool) -> list[str]:
    """The plan for cards elsewhere in lines."""
    shape = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plan.model.items() if value)
    machines = f" in {plan.nodes} machines, {digits(plan.network)} Gb/s between them" if plan.nodes > 1 else ""
    share = f"{plan.share:.0%} of {plan.peak / 1e12:.0f} T operations a second at this width"
    each = f"{plan.tokens / sum(plan.parameters.values()):.3g} for each parameter"
    why = "" if given_length else ", as many steps as the preset has"
    why = ", since no length was given" if plan.chinchilla else why
    every = plan.windows * plan.context_length
    lines = [
        row("model", f"{plan.kind}: {shape}, context {plan.context_length}, vocabulary {plan.vocabulary_size:,}"),
        row("parameters", total(plan.parameters, amount)),
        row(
            "cards",
            f"{plan.devices} {plan.card}{machines}: {size(plan.memory_limit)}, {share}, ${plan.price:.2f} an hour",
        ),
        row("training", f"{steps(plan)} of {plan.windows} windows, {amount(every)} tokens"),
        row("tokens", f"{amount(plan.tokens)}: {each}{why}"),
        row("arithmetic", f"{amount(plan.flops_per_token)} operations a token, forward and backward"),
        "",
        cells("memory of a card", [way.name for way in plan.ways]),
    ]
    parts = dict.fromkeys(name for way in plan.ways for name in way.memory)
    lines += [cells(f"  {name}", [size(way.memory.get(name, 0)) for way in plan.ways]) for name in parts]
    lines += [
        cells("  together", [size(way.total_memory) for way in plan.ways]),
        cells("fits", ["yes" if way.fits else "no" for way in plan.ways]),
        cells("windows at once", [f"{way.micro_batch} ({way.largest_micro_batch} fit)" for way in plan.ways]),
    ]
    for name in ("computing", "optimizer", "exchange"):
        lines.append(cells(f"  {name}", [milliseconds(way.seconds[name]) if way.seconds else "-" for way in plan.ways]))
    lines += [
        cells("a step", [milliseconds(sum(way.seconds.values())) if way.seconds else "-" for way in plan.ways]),
        cells("tokens a second", [amount(int(way.tokens_per_second or 0)) if way.fits else "-" for way in plan.ways]),
        cells("of the peak (MFU)", [f"{way.utilization:.1%}" if way.utilization else "-" for way in plan.ways]),
        cells("time", [span(way.days) if way.days else "-" for way in plan.ways]),
        cells("dollars", [digits(way.cost) if way.cost else "-" for way in plan.ways]),
        "",
    ]
    more = "a --card with more memory"
    if plan.enough > plan.devices:
        more += f", --devices {plan.enough} (on so many it fits, recomputed)"
    remedy = f"It fits in none of these ways. Take {more}, or a smaller model."
    return [*lines, run_it or remedy]


def span(days: float) -> str:
    """A time in days, hours or minutes."""
    for unit, length in (("days", 1.0), ("hours", 1 / 24)):
        if days >= 1.5 * length:
            return f"{digits(days / length)} {unit}"
    return f"{digits(1440 * days)} minutes"


def cells(name: str, columns: list[str]) -> str:
    """A line of the table."""
    return f"{name:21}" + "".join(f" {text:>18}" for text in columns)


def command(words: list[str], given: Arguments, plan: cluster.ClusterPlan, way: cluster.Way) -> str:
    """The command that trains this way: the flags that were given, with the batch as it is taken here."""
    lengths = ("--tokens", "--steps") if plan.chinchilla else ()
    left = without(
        words,
        ("--devices", "--card", "--price", "--network", "--batch-size", "--accumulation-steps", "--parallel", *lengths),
    )
    left = [word for word in left if word not in ("--json", "--gradient-checkpointing")]
    flags = [f"--batch-size {way.micro_batch * plan.devices} --accumulation-steps {way.accumulation_steps}"]
    if plan.chinchilla:
        flags.append(f"--tokens {plan.tokens}")
    if way.gradient_checkpointing:
        flags.append("--gradient-checkpointing")
    if way.parallel:
        flags.append(f"--parallel {way.parallel}")
    train = shlex.join(["train", *([] if given.data.text else ["TEXT"]), *left]) + " " + " ".join(flags)
    if not way.parallel:
        return f"{program()} {train}"
    meet = (
        f"--nnodes {plan.nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id RUN " if plan.nodes > 1 else ""
    )
    return f"torchrun {meet}--nproc-per-node {min(plan.devices, NODE)} -m -- quire {train}"


def without(words: list[str], flags: tuple[str, ...]) -> list[str]:
    """A command line without these flags and their values."""
    left, rest = [], iter(words)
    for word in rest:
        if word in flags:
            next(rest, None)
        elif not word.startswith(tuple(f"{flag}=" for flag in flags)):
            left.append(word)
    return left
