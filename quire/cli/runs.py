"""quire runs: a table of the runs below a folder."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from quire import checkpoint
from quire.cli.flags import Switch, parse, print_json
from quire.errors import UserError
from quire.run import Run

Folder = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="[FOLDER]")]]


@dataclass(frozen=True)
class Arguments:
    """List the runs in a folder: text, size, steps, best held-out loss and age."""

    folder: Folder = "runs"  # where to look, at any depth
    json: Switch = False  # print one JSON object on standard output


def run(words: list[str]) -> int:
    """Find and list."""
    given = parse(Arguments, words, "runs")
    folder = Path(given.folder)
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}. A first run: quire train")
    rows = [row(path.parent) for path in sorted(folder.glob("**/config.toml"))]
    if given.json:
        print_json({"runs": rows})
    elif not rows:
        print(f"No runs in {folder}. A first one: quire train")
    else:
        show(rows)
    return 0


def row(path: Path) -> dict[str, Any]:
    """One run's line; a damaged run is listed with what is wrong."""
    try:
        opened = Run(path)
        metrics = opened.metrics()
        measured = [line for line in metrics if line.get("validation_loss") is not None]
        best = min(measured, key=lambda line: line["validation_loss"], default={})
        folder = opened.folder("best" if opened.folder("best").exists() else "last")
        return {
            "run": str(path),
            "text": text_of(opened),
            "steps": metrics[-1]["step"] if metrics else 0,
            "model_bytes": sum(file.stat().st_size for file in checkpoint.model_files(folder)),
            "validation_loss": best.get("validation_loss"),
            "bits_per_byte": best.get("validation_bits_per_byte"),
            "age_seconds": round(time.time() - (path / "config.toml").stat().st_mtime),
        }
    except (UserError, OSError, KeyError) as error:
        return {"run": str(path), "problem": str(error)}


def text_of(opened: Run) -> str:
    """What a run was trained on, or imported from."""
    if opened.imported:
        return f"imported from {opened.manifest['imported_from']['path']}"
    return ", ".join(origin["path"] for origin in opened.manifest["data"])


def show(rows: list[dict[str, Any]]) -> None:
    """The table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for name in ("run", "text", "steps", "size", "loss", "bits/byte", "age"):
        table.add_column(name, justify="left" if name in ("run", "text") else "right", overflow="fold")
    for line in rows:
        if "problem" in line:
            table.add_row(line["run"], line["problem"])
            continue
        loss, bits = line["validation_loss"], line["bits_per_byte"]
        figures = ("-", "-") if loss is None else (f"{loss:.4f}", f"{bits:.4f}")
        table.add_row(
            line["run"],
            line["text"],
            f"{line['steps']:,}",
            size(line["model_bytes"]),
            *figures,
            age(line["age_seconds"]),
        )
    Console(highlight=False).print(table)


def size(count: int) -> str:
    """Bytes for a person."""
    if not count:
        return "-"
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def age(seconds: float) -> str:
    """A time span for a person, in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
