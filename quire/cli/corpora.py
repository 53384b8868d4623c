"""quire corpora: a table of the texts known by name."""

import sys
from dataclasses import dataclass
from typing import Any

from quire.cli.flags import Switch, parse, print_json
from quire.cli.runs import size
from quire.data.corpora import CORPORA, HubDataset
from quire.sources import cached


@dataclass(frozen=True)
class Arguments:
    """List the texts that `quire train NAME` knows: size, licence, and whether the download is on this machine."""

    json: Switch = False  # print one JSON object on standard output


def run(words: list[str]) -> int:
    """List them."""
    given = parse(Arguments, words, "corpora")
    rows = [row(name) for name in CORPORA]
    if given.json:
        print_json({"corpora": rows})
    else:
        show(rows)
    return 0


def row(name: str) -> dict[str, Any]:
    """What the table shows of one corpus."""
    corpus = CORPORA[name]
    if isinstance(corpus, HubDataset):
        here, origin = None, corpus.address  # it streams in each time
    else:
        here, origin = cached(corpus), next(iter(corpus.addresses), f"{corpus.package} {corpus.version}")
    return {
        "name": name,
        "download_bytes": corpus.size,
        "text_bytes": corpus.text_bytes,
        "licence": corpus.licence,
        "cached": here,
        "from": origin,
        "description": corpus.description,
        "attribution": corpus.attribution,
    }


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("name", "download", "text", "here", "licence", "what"):
        no_wrap = name not in ("licence", "what")
        table.add_column(
            name, justify="right" if name in ("download", "text") else "left", overflow="fold", no_wrap=no_wrap
        )
    for line in rows:
        here = {True: "yes", False: "no", None: "streams"}[line["cached"]]
        sizes = (size(line["download_bytes"]), size(line["text_bytes"]))
        table.add_row(line["name"], *sizes, here, line["licence"], line["description"])
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)  # a pipe has no width of its own
    console.print(table)
    console.print("Any dataset of the Hugging Face hub: hf:OWNER/NAME", markup=False)
