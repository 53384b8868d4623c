"""quire gradients: one forward and backward pass, layer by layer, each gradient checked."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from quire.cli.flags import RunPath, Switch, parse, print_json
from quire.errors import UserError
from quire.inspection.gradients import AGREES, WITHIN, WRONG, Gradients, LayerCall, gradients
from quire.inspection.local_check import AGREES_AUTOGRAD, AGREES_NUMERICAL, Apart
from quire.inspection.written import code, derivation, equation, places
from quire.layers.layer import Block, Layer
from quire.plots.gradients_page import GraphNode, write_gradients_page
from quire.progress import say
from quire.run import Run
from quire.tokenizers.tokenizer import Unknown

Prompt = Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(required)")]
Target = Annotated[str | None, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(default: none)")]
Page = Annotated[str, tyro.conf.arg(metavar="FILE", help_behavior_hint="(default: RUN/gradients.html)")]

MANY = 60  # rows from which blocks are folded


@dataclass(frozen=True)
class Arguments:
    """Step through one forward and backward pass over a text; each layer's gradient is checked on the spot."""

    run: RunPath  # the run directory
    prompt: Prompt = ""  # what the model reads and foresees, token by token
    target: Target = None  # for a model that reads a source: what it should write
    out: Page = ""  # where the page goes
    all: Switch = False  # show every call of a deep model, no block folded
    each: Switch = False  # tell each gradient by itself, of inputs and of parameters
    unknown: Unknown = "error"  # prompt characters outside the vocabulary: refuse, skip or replace them
    json: Switch = False  # print one JSON object, with every call


def run(words: list[str]) -> int:
    """Step through, write the page, print the table; 1 where a layer's backward is wrong."""
    given = parse(Arguments, words, "gradients")
    opened = Run(given.run)
    page = Path(given.out) if given.out else opened.path / "gradients.html"
    if page.is_dir():
        raise UserError(f"--out {page} is a directory: name a file, as {page / 'gradients.html'}")
    found = gradients(opened, given.prompt, given.target, unknown=given.unknown, apart=given.each)
    if found.left_out:
        read = len(found.source) + len(found.tokens)
        say(f"That is too long to step through: {found.left_out:,} tokens are left out, {read:,} remain.")
    nodes = [node(call) for call in found.calls]
    tokens = [*found.source, *found.tokens] if found.source else found.tokens
    write_gradients_page(page, f"Gradients of {given.run}", tokens, found.loss, nodes)
    if given.json:
        print_json(finite(summary(given.run, page, found)))
    else:
        show(given, opened, found)
        say(f"The page, for a browser: {page}")
    return 1 if found.wrong else 0


def node(call: LayerCall) -> GraphNode:
    """A call as the page has it."""
    return GraphNode(
        number=call.number,
        name=call.name,
        layer=call.kind.__name__,
        parent=call.parent,
        sources=call.sources,
        equation=equation(call.kind),
        derivation=derivation(call.kind),
        forward_code=code(call.kind, "forward"),
        backward_code=code(call.kind, "backward"),
        inputs=shapes(call.inputs),
        output=shapes(call.outputs),
        activation_norm=call.activation_norm,
        gradient_norm=call.gradient_norm,
        returned_norm=call.returned_norm,
        autograd_difference=call.autograd_difference,
        numerical_difference=call.numerical_difference,
        verdict=call.verdict,
        parameters=tuple((p.name, str(p.shape), p.weight_norm, p.gradient_norm) for p in call.parameters),
        activation_picture=call.activation_picture,
        gradient_picture=call.gradient_picture,
    )


# ---- JSON ----


def summary(name: str, page: Path, found: Gradients) -> dict[str, Any]:
    """Everything but the pictures."""
    left_out = ("kind", "activation_picture", "gradient_picture")
    calls = []
    for call in found.calls:
        told = {key: value for key, value in vars(call).items() if key not in left_out}
        told |= {"layer": call.kind.__name__, "equation": equation(call.kind)}
        calls.append(told | {"parameters": list(map(asdict, call.parameters)), "apart": list(map(asdict, call.apart))})
    wrong = [
        {"name": call.name, "layer": call.kind.__name__, "backward": dict(places(call.kind)), "notes": call.notes}
        for call in found.wrong
    ]
    autograd, numerical = worst(found.calls)
    return {
        "run": name,
        "page": str(page),
        "loss": found.loss,
        "gradient_norm": found.gradient_norm,
        "source": found.source,
        "tokens": found.tokens,
        "left_out": found.left_out,
        "autograd_difference": autograd,
        "numerical_difference": numerical,
        "agree": not found.wrong,
        "wrong": wrong,
        "calls": calls,
    }


def finite(value: Any) -> Any:
    """The same with null in place of numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def worst(calls: Sequence[LayerCall]) -> tuple[float | None, float | None]:
    """The largest differences, to autograd and to finite ones."""
    autograd = [call.autograd_difference for call in calls if call.autograd_difference is not None]
    numerical = [call.numerical_difference for call in calls if call.numerical_difference is not None]
    return max(autograd, default=None), max(numerical, default=None)


# ---- text ----


def show(given: Arguments, run: Run, found: Gradients) -> None:
    """The calls as a tree, the equations of their layers, and what came of it."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    read = f"{len(found.source)} tokens read, " if found.source else ""
    print(
        f"{given.run}: {run.settings.kind}, {read}{len(found.tokens) - 1} tokens foreseen, loss {found.loss:.4f},"
        f" gradient norm {found.gradient_norm:.4g}\n"
    )
    rows = [heads(), *table(found.calls, fold=not given.all and len(found.calls) > MANY, each=given.each)]
    width = max(len(row[0]) for row in rows)
    for row in rows:
        cells = f"{row[0]:{width}}  {row[1]:14} {row[2]:>9} {row[3]:>9} {row[4]:>8} {row[5]:>8}  {row[6]}"
        style = "bold" if row is rows[0] else "bold red" if row[6] == WRONG else ""
        console.print(cells.rstrip(), style=style or None, markup=False)
    print("\nequations, and where the backward of each is")
    for kind in dict.fromkeys(call.kind for call in found.calls):
        where = ", ".join(place for _, place in places(kind))
        print(f"  {kind.__name__}: {equation(kind)}\n      {where}")
    print()
    for line in ending(found):
        console.print(line, markup=False)


Row = tuple[str, str, str, str, str, str, str]


def heads() -> Row:
    """The names of the columns."""
    return "call", "output", "|output|", "|grad|", "autograd", "finite", "verdict"


def table(calls: Sequence[LayerCall], fold: bool, each: bool) -> list[Row]:
    """A row for each call, those within others indented; `fold`: of blocks that agree only the first of its kind."""
    rows: list[Row] = []
    opened: set[type[Layer]] = set()
    inner: dict[int | None, list[LayerCall]] = {}
    for call in calls:
        inner.setdefault(call.parent, []).append(call)

    def add(call: LayerCall, depth: int, around: str) -> None:
        name = call.name.removeprefix(around + ".") or "(model)"
        label = f"{'  ' * depth}{name}: {call.kind.__name__}"
        folded = fold and issubclass(call.kind, Block) and call.verdict == AGREES and call.kind in opened
        below = within(call, inner) if folded else []
        autograd, numerical = worst([call, *below])
        label += f", {len(below)} calls within" if below else ""
        norms = number(call.activation_norm), number(call.gradient_norm)
        rows.append((label, shapes(call.outputs), *norms, tiny(autograd), tiny(numerical), call.verdict))
        if each or call.verdict == WRONG:
            for part in call.apart if each else filter(disagrees, call.apart):
                label = f"{'  ' * depth}  by {part.name}"
                rows.append((label, "", "", "", tiny(part.autograd), tiny(part.numerical), ""))
        if folded:
            return
        opened.add(call.kind)
        for other in inner.get(call.number, []):
            add(other, depth + 1, call.name)

    for call in inner.get(None, []):
        add(call, 0, "")
    return rows


def disagrees(part: Apart) -> bool:
    """Whether a gradient by itself is wrong."""
    return not (part.autograd or 0.0) < AGREES_AUTOGRAD or not (part.numerical or 0.0) < AGREES_NUMERICAL


def within(call: LayerCall, inner: dict[int | None, list[LayerCall]]) -> list[LayerCall]:
    """All calls within a call, at whatever depth."""
    found = []
    for other in inner.get(call.number, []):
        found += [other, *within(other, inner)]
    return found


def ending(found: Gradients) -> list[str]:
    """What came of it: that all agree, or which layers are wrong, how, and where their backward is."""
    if not found.wrong:
        right = [call for call in found.calls if call.verdict == AGREES]
        autograd, numerical = worst(right)
        return [
            f"All {len(right)} calls agree: with autograd within {tiny(autograd)} (at most {AGREES_AUTOGRAD:.0e} is"
            f" rounding), with finite differences within {tiny(numerical)} (at most {AGREES_NUMERICAL:.0e})."
        ]
    lines = []
    for kind in dict.fromkeys(call.kind for call in found.wrong):
        calls = [call for call in found.wrong if call.kind is kind]
        names = list(dict.fromkeys(call.name or "the model" for call in calls))
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        lines.append(f"WRONG: the backward of {kind.__name__}, in {names[0]}{more}.")
        lines += [f"  {note}" for note in dict.fromkeys(note for call in calls for note in call.notes)]
        lines += [f"  {name}: {place}" for name, place in places(kind)]
    if any(call.verdict == WITHIN for call in found.calls):
        lines.append("The calls around it differ only because of it.")
    return lines


def shapes(all: Sequence[tuple[int, ...]]) -> str:
    """Shapes as text."""
    return " ".join(map(str, all))


def number(value: float | None) -> str:
    """A norm."""
    return "-" if value is None else f"{value:.4g}"


def tiny(value: float | None) -> str:
    """A relative difference."""
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"
