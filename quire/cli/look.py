"""quire look: a model taken apart."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import tyro

from quire.cli.flags import RunPath, Switch, parse, print_json
from quire.config import to_table
from quire.inspection.anatomy import PartFacts, anatomy, by_block, by_part, held_out_gradient, tied_names
from quire.inspection.neighbours import find_token, neighbours, tokenizer_facts
from quire.run import Run

Token = Annotated[str | None, tyro.conf.arg(metavar="T", help_behavior_hint="(default: none)")]


@dataclass(frozen=True)
class Arguments:
    """Show a run's model by its parts: parameters, the norms of weights and of one gradient, its vocabulary."""

    run: RunPath  # the run directory
    token: Token = None  # show the ten tokens whose embeddings are nearest to this one's
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: Switch = False  # print one JSON object, with every tensor


def run(words: list[str]) -> int:
    """Take apart and print."""
    given = parse(Arguments, words, "look")
    opened = Run(given.run)
    token = None if given.token is None else find_token(opened.tokenizer, given.token)
    model = opened.model(given.device)
    gradient = held_out_gradient(opened, model)
    facts = anatomy(model, gradient)
    found: dict[str, Any] = {
        "run": given.run,
        "settings": to_table(opened.settings),
        "tokenizer": asdict(tokenizer_facts(opened)),
        "parameters": sum(fact.parameters for fact in facts),
        "parts": [asdict(part) for part in by_part(facts)],
        "blocks": [asdict(block) for block in by_block(facts)],
        "tensors": [asdict(fact) for fact in facts],
        "tied": tied_names(model),
        "gradient": gradient and {"loss": gradient.loss, "tokens": gradient.tokens},
        "neighbours": None,
    }
    if token is not None:
        near = [asdict(neighbour) for neighbour in neighbours(model, opened.tokenizer, token)]
        found["neighbours"] = {"id": token, "token": opened.tokenizer.name(token), "nearest": near}
    if given.json:
        print_json(found)
    else:
        show(found, by_part(facts), by_block(facts), opened.settings.reads_source)
    return 0


def show(found: dict[str, Any], parts: Sequence[PartFacts], blocks: Sequence[PartFacts], reads_source: bool) -> None:
    """Everything as text and tables."""
    settings, tokenizer, gradient = found["settings"], found["tokenizer"], found["gradient"]
    print(f"{found['run']}: {settings['kind']}, {found['parameters']:,} parameters\n")
    left_out = ("kind", "vocabulary_size", "separator")
    print("settings   " + wrapped([f"{name} {value}" for name, value in settings.items() if name not in left_out]))
    print("tokenizer  " + wrapped(described(tokenizer)))
    if gradient:
        about = f"one batch of {gradient['tokens']:,} held-out tokens, where the loss is {gradient['loss']:.4f}"
        print(f"gradient   of {about}")
    else:
        reason = "this model reads a source" if reads_source else "this run has no held-out text to measure it on"
        print(f"gradient   not measured: {reason}")
    table("part", parts, found["parameters"])
    for name, other in found["tied"].items():
        print(f"{name} is {other} (tied), counted once")
    table("block", blocks, found["parameters"])
    if found["neighbours"]:
        near = found["neighbours"]
        print(f"\nnearest to {near['token']!r} (token {near['id']}), by the cosine of the embeddings")
        for row in near["nearest"]:
            print(f"  {row['similarity']:6.3f}  {row['token']!r}")


def described(tokenizer: dict[str, Any]) -> list[str]:
    """The facts of a tokenizer as short phrases."""
    facts = [f"{tokenizer['kind']} with {tokenizer['vocabulary_size']:,} tokens"]
    facts.append("special: " + ", ".join(f"{name} {number}" for name, number in tokenizer["specials"].items()))
    if tokenizer["bytes_per_token"] is not None:
        facts.append(f"{tokenizer['occurring']:,} of them occur in the held-out text")
        facts.append(f"{tokenizer['bytes_per_token']:.2f} bytes per token there")
    if max(map(len, tokenizer["longest"]), default=0) > 1:
        facts.append("longest: " + " ".join(repr(name[:40]) for name in tokenizer["longest"]))
    return facts


def wrapped(phrases: list[str], width: int = 100) -> str:
    """Phrases with commas between, in lines of about `width`, the later ones indented."""
    lines = [""]
    for index, phrase in enumerate(phrases):
        if lines[-1] and len(lines[-1]) + len(phrase) > width - 13:  # the indent, and a comma
            lines.append("")
        lines[-1] += phrase + (", " if index < len(phrases) - 1 else "")
    return f"\n{' ' * 11}".join(line.rstrip() for line in lines)


def table(title: str, rows: Sequence[PartFacts], total: int) -> None:
    """One table of parts."""
    from rich.console import Console
    from rich.table import Table

    drawn = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    drawn.add_column(title, no_wrap=True)
    for name in ("parameters", "share", "weight norm", "gradient norm"):
        drawn.add_column(name, justify="right")
    for row in rows:
        norm = "-" if row.gradient_norm is None else f"{row.gradient_norm:.4g}"
        share = f"{row.parameters / total:.1%}"
        drawn.add_row(row.name, f"{row.parameters:,}", share, f"{row.weight_norm:.4g}", norm)
    print()
    Console(highlight=False).print(drawn)
