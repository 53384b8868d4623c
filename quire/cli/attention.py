"""quire attention: what every head of a model attends to."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from quire.cli.flags import RunPath, Switch, parse, print_json
from quire.inspection.attention import Attention, attention
from quire.inspection.heads import HeadScores, head_scores, induction_scores
from quire.plots.attention import plot_attention, plot_overview
from quire.plots.attention_page import HeadMaps, write_attention_page
from quire.progress import bar, say
from quire.run import Run
from quire.tokenizers.tokenizer import Unknown

Prompt = Annotated[str, tyro.conf.arg(metavar="TEXT", help_behavior_hint="(required)")]
Folder = Annotated[str, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: RUN/attention)")]

MEASURES = ("entropy", "distance", "previous_token", "first_token", "induction")


@dataclass(frozen=True)
class Arguments:
    """Draw what every layer and head attends to while it reads a text, and tell it in numbers."""

    run: RunPath  # the run directory
    prompt: Prompt = ""  # what the model reads
    out: Folder = ""  # where attention.html and the pictures go
    unknown: Unknown = "error"  # prompt characters outside the vocabulary: refuse, skip or replace them
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    json: Switch = False  # print one JSON object: the files, the tokens and the numbers of every head


def run(words: list[str]) -> int:
    """Read the prompt, draw, and print the table."""
    given = parse(Arguments, words, "attention")
    opened = Run(given.run)
    model = opened.model(given.device)
    seen = attention(opened, given.prompt, unknown=given.unknown, model=model)
    if seen.left_out:
        shown = len(seen.ids["prompt"])
        say(f"The prompt is too long to show: its first {seen.left_out:,} tokens are left out, {shown:,} remain.")
    scores = head_scores(seen.layers, induction_scores(opened, model))
    folder = Path(given.out) if given.out else opened.path / "attention"
    page, pictures = draw(given.run, seen, scores, folder)
    if given.json:
        tokens = {name: list(row) for name, row in seen.tokens.items()}
        heads = [asdict(row) for row in scores]
        made = {"page": str(page), "pictures": [str(picture) for picture in pictures]}
        print_json({"run": given.run, **made, "tokens": tokens, "left_out": seen.left_out, "heads": heads})
        return 0
    show(scores)
    say(f"\nPictures: {pictures[0]}, and one of each layer beside it. The page, for a browser: {page}")
    return 0


def draw(name: str, seen: Attention, scores: Sequence[HeadScores], folder: Path) -> tuple[Path, list[Path]]:
    """The page, and the pictures: the overview first, then one of each layer."""
    maps = []
    for layer in seen.layers:
        rows = [
            [(measure.replace("_", " "), getattr(row, measure)) for measure in MEASURES]
            for row in scores
            if row.layer == layer.name
        ]
        maps.append(HeadMaps(layer.name, layer.queries, layer.keys, layer.weights, rows))
    page, pictures = folder / "attention.html", [folder / "overview.png"]
    likeliest = [[(other.text, other.probability) for other in row] for row in seen.alternatives]
    write_attention_page(page, f"Attention in {name}", maps, seen.tokens, seen.predicted, likeliest)
    plot_overview(f"Attention in {name}", [(layer.name, layer.weights) for layer in seen.layers], pictures[0])
    with bar("Drawing") as update:
        for done, layer in enumerate(seen.layers):
            pictures.append(folder / f"{layer.name}.png")
            queries, keys = seen.tokens[layer.queries], seen.tokens[layer.keys]
            plot_attention(f"{name}: {layer.name}", layer.weights, queries, keys, pictures[-1])
            update((done + 1) / len(seen.layers))
    return page, pictures


def show(scores: Sequence[HeadScores]) -> None:
    """The table, the highest of each measure in bold."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    table.add_column("layer", no_wrap=True)
    for name in ("head", *MEASURES):
        table.add_column(name.removesuffix("_token"), justify="right")
    best = {name: max((getattr(row, name) or 0.0 for row in scores), default=0.0) for name in MEASURES}
    for row in scores:
        cells = []
        for name in MEASURES:
            value = getattr(row, name)
            text = "-" if value is None else f"{value:.3f}"
            cells.append(f"[bold]{text}[/bold]" if value and value == best[name] else text)
        table.add_row(row.layer if row.head == 0 else "", str(row.head), *cells)
    Console(highlight=False).print(table)
