"""Neighbours: models that come in from other programs as runs, and runs that go out to them.

To add one: a file, and a line in IMPORTERS or EXPORTERS. Libraries that not everyone has are imported where used.
"""

from collections.abc import Callable
from pathlib import Path

from quire.errors import UserError, choose, nearest
from quire.interop import gguf, gguf_export, hugging_face, json_file, lightning_runs, llama2c, onnx
from quire.interop.imported import Foreign, Importer, create
from quire.interop.pretrained import PRETRAINED
from quire.run import Run, refuse_existing
from quire.training.begin import free_path

IMPORTERS: dict[str, Importer] = {
    "hf": Importer(hugging_face.recognizes, hugging_face.read),
    "gguf": Importer(gguf.recognizes, gguf.read),
    "llama2c": Importer(llama2c.recognizes, llama2c.read),
    "json": Importer(json_file.recognizes, json_file.read),
    "lightning": Importer(lightning_runs.recognizes, lightning_runs.read),
}

# Each writes a run's best model to a path that does not exist yet; the text is --type, "" for the usual one.
EXPORTERS: dict[str, Callable[[Run, Path, str], None]] = {
    "hf": hugging_face.write,
    "gguf": gguf_export.write,
    "onnx": onnx.write,
    "json": json_file.write,
}

# What can be imported, for sentences.
KINDS = (
    "a Hugging Face folder, a .gguf file, a llama2.c .bin file, a Lightning .ckpt of Quire's LanguageModel or Quire's"
    " own .json"
)


def import_model(
    source: str, run: str | Path | None = None, tokenizer: str | Path | None = None, context_length: int = 0
) -> Run:
    """Make a run of a foreign model: a file, a folder, or a name in PRETRAINED.

    `run` is the new run directory (None: runs/NAME after the source), `tokenizer` the model's tokenizer where that is a
    file of its own, `context_length` how much of its context to keep (0: all). What is no model, is damaged, or has
    parts that Quire lacks is a UserError.
    """
    path = Path(run) if run is not None else free_path(source)
    refuse_existing(path)
    foreign = found(source, Path(tokenizer) if tokenizer is not None else None)
    return create(foreign, path, context_length)


def found(source: str, tokenizer: Path | None) -> Foreign:
    """What a path or a name stands for, its weights not read yet."""
    path = Path(source)
    if source in PRETRAINED and not path.exists():
        return PRETRAINED[source].read()
    if not path.exists():
        raise UserError(
            f"There is no {source} to import: give {KINDS}, or one of the names"
            f" {', '.join(PRETRAINED)}.{nearest(source, list(PRETRAINED))}"
        )
    for importer in IMPORTERS.values():
        if importer.recognizes(path):
            return importer.read(path, tokenizer)
    if (path / "manifest.json").is_file() and (path / "checkpoints").is_dir():
        raise UserError(f"{path} is a run of Quire's already: generate from it, or export it, as it is.")
    raise UserError(f"{path} is no model that Quire knows. It imports {KINDS}.")


def export_model(run: Run | str | Path, to: str, out: str | Path, weights: str = "") -> Path:
    """Write a run's best model in the format `to` of EXPORTERS; `weights` is how they are stored ("": as usual there).

    A path that exists is refused; so is a model that the format has no words for, by name.
    """
    run, out = run if isinstance(run, Run) else Run(run), Path(out)
    write = EXPORTERS[choose("--to", to, list(EXPORTERS))]
    if weights and to != "gguf":
        raise UserError(f"--to {to} writes weights as they are: leave out --type {weights}, which is for --to gguf.")
    if run.settings.kind == "ngram":
        raise UserError(
            f"{run.path} cannot be written for --to {to}: no other program has the n-grams of its kind of model."
            " A model without them can, which is trained without --fastest: quire train TEXT --preset default"
        )
    if out.exists():
        raise UserError(f"{out} exists already. Name another --out.")
    write(run, out, weights)
    return out
