"""A whole model as one JSON file, for programs that know nothing of Quire: every layer by its kind, every number.

    {"format": "quire-json-1", "settings": {...}, "tokenizer": {...}, "prompt_prefix": [...], "separators": N,
     "pairs": false, "layers": [{"name": "blocks.0.attention.query", "kind": "Linear",
                 "parameters": {"weight": {"shape": [16, 16], "values": [row after row]}}, "shares": {}}, ...]}

`kind` is the name of the layer's class in quire/layers, where its forward pass stands. A tied parameter is written
once; where it is used again, `shares` says whose it is. Numbers are the shortest that are the same in float32.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from quire import files
from quire.config import Table, from_table, to_table
from quire.errors import UserError, choose
from quire.interop.imported import Foreign, gigabytes
from quire.models import MODELS
from quire.progress import bar, say
from quire.run import Run, empty_model
from quire.tokenizers import READ_ONLY, TOKENIZERS, Tokenizer

FORMAT = "quire-json-1"
BYTES = 13  # of text for each number, about
AT_ONCE = 1 << 16  # numbers formatted together

Layers = list[tuple[str, str, dict[str, Tensor], dict[str, str]]]  # name, kind, parameters, shared ones


def layers_of(model: nn.Module) -> Layers:
    """The layers of a model that have parameters of their own, or share another's."""
    found: Layers = []
    first: dict[int, str] = {}
    for name, module in model.named_modules():
        parameters: dict[str, Tensor] = {}
        shares: dict[str, str] = {}
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            whole = f"{name}.{own}" if name else own
            if first.setdefault(id(tensor), whole) == whole:
                parameters[own] = tensor
            else:
                shares[own] = first[id(tensor)]
        if parameters or shares:
            found.append((name, type(module).__name__, parameters, shares))
    return found


# ---- out ----------------------------------------------------------------------------------------------------------


def write(run: Run, out: Path, weights: str = "") -> None:
    """Write a run's best model, its settings and its tokenizer; numbers go to the disk as they are made."""
    model = run.model("cpu")
    layers = layers_of(model)
    for name, _, parameters, _ in layers:
        for own, tensor in parameters.items():
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{run.path}: {name}.{own} is not finite everywhere; JSON has no such numbers.")
    count = sum(tensor.numel() for _, _, parameters, _ in layers for tensor in parameters.values())
    if count * BYTES > 100e6:
        say(f"{count:,} numbers as text: about {gigabytes(count * BYTES)}.")
    tokenizer = {"kind": run.tokenizer.kind, **run.tokenizer.to_table()}
    head: Table = {"format": FORMAT, "settings": to_table(run.settings), "tokenizer": tokenizer}
    head |= {"prompt_prefix": run.prompt_prefix(), "separators": run.manifest["separators"], "pairs": run.pairs}

    def store(new: Path) -> None:
        with open(new, "w", encoding="ascii", newline="\n") as file, bar("writing") as show:
            file.write(json.dumps(head)[:-1] + ', "layers": [\n')
            for number, layer in enumerate(layers):
                write_layer(file, layer)
                file.write(",\n" if number + 1 < len(layers) else "\n")
                show((number + 1) / len(layers))
            file.write("]}\n")

    files.write_by(out, store)


def write_layer(file: IO[str], layer: tuple[str, str, dict[str, Tensor], dict[str, str]]) -> None:
    """Write one entry of `layers`."""
    name, kind, parameters, shares = layer
    file.write(f'{{"name": {json.dumps(name)}, "kind": {json.dumps(kind)}, "parameters": {{')
    for number, (own, tensor) in enumerate(parameters.items()):
        file.write(f'{", " if number else ""}{json.dumps(own)}: {{"shape": {list(tensor.shape)}, "values": [')
        for piece, text in enumerate(numbers(tensor)):
            file.write(f"{', ' if piece else ''}{text}")
        file.write("]}")
    file.write(f'}}, "shares": {json.dumps(shares)}}}')


def numbers(tensor: Tensor) -> Iterator[str]:
    """The numbers of a tensor, row after row, with commas between, a piece at a time."""
    flat = tensor.detach().float().reshape(-1).numpy()
    for start in range(0, len(flat), AT_ONCE):
        yield ", ".join(map(str, flat[start : start + AT_ONCE]))


# ---- in -----------------------------------------------------------------------------------------------------------


def recognizes(path: Path) -> bool:
    """Whether a path is a file named .json."""
    return path.is_file() and path.suffix == ".json"


def read(path: Path, tokenizer: Path | None = None) -> Foreign:
    """The model in a JSON file that `write` wrote, its layers checked; its tokenizer is in it."""
    if tokenizer is not None:
        raise UserError(f"{path} has its tokenizer in it: leave --tokenizer out.")
    table = parsed(path)
    if table.get("format") != FORMAT:
        raise UserError(f"{path} is no model: its format is {table.get('format')!r}, and not {FORMAT!r}.")
    settings, separators, prefix = (table.get(name) for name in ("settings", "separators", "prompt_prefix"))
    if not isinstance(settings, dict) or not isinstance(separators, int) or not isinstance(prefix, list):
        raise UserError(f"{path} is damaged: its settings, separators or prompt_prefix are not as they should be.")
    kind = choose(f"The model kind in {path}", str(settings.get("kind")), list(MODELS))
    model = empty_model(from_table(MODELS[kind].Settings, settings, f"{path}: settings"), torch.device("cpu"))
    found = checked_layers(path, table.get("layers"), layers_of(model))
    origin = {
        "format": FORMAT, "path": str(path.resolve()), "bytes": path.stat().st_size, "sha256": files.sha256_of(path),
    }  # fmt: skip
    known = tokenizer_of(path, table.get("tokenizer"))
    return Foreign(
        settings, found, known, origin, prefix, {"separators": separators, "pairs": table.get("pairs") is True}
    )


def parsed(path: Path) -> Table:
    """The file's contents, the numbers of each parameter a tensor already, so that no more than one is a list."""

    def constant(word: str) -> None:
        raise UserError(f"{path} is damaged: it has {word} where a number should be.")

    def gathered(table: Table) -> Any:
        return tensor_of(path, table) if table.keys() == {"shape", "values"} else table

    try:
        table = json.loads(path.read_bytes(), object_hook=gathered, parse_constant=constant)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is cut off, damaged, or no JSON: {error}.") from error
    if not isinstance(table, dict):
        raise UserError(f"{path} is no model: it is not a JSON object.")
    return table


def tensor_of(path: Path, table: Table) -> Tensor:
    """One parameter, float32."""
    shape, values = table["shape"], table["values"]
    sound = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not sound or not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise UserError(f"{path} is damaged: a parameter has a shape or values that are not numbers.")
    if math.prod(shape) != len(values):
        raise UserError(f"{path} is damaged: a parameter of the shape {tuple(shape)} has {len(values)} values.")
    with np.errstate(over="ignore"):
        array = np.array(values, dtype=np.float64).astype(np.float32)
    if not np.isfinite(array).all():
        raise UserError(f"{path} is damaged: a parameter has a number that is too large for float32.")
    return torch.from_numpy(array.reshape(shape))


def checked_layers(path: Path, layers: Any, own: Layers) -> list[tuple[str, Tensor]]:
    """The weights by name, if the layers are those of the model `own`; a UserError names the first that is not."""
    found: dict[str, Tensor] = {}
    kinds: dict[str, str] = {}
    try:
        for layer in layers:
            kinds[layer["name"]] = layer["kind"]
            for name, tensor in layer["parameters"].items():
                found[f"{layer['name']}.{name}" if layer["name"] else name] = tensor
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: its layers are not as Quire writes them.") from error
    for name, kind, _, _ in own:
        if name not in kinds:
            raise UserError(f"{path} is incomplete: it lacks the layer {name}, a {kind}.")
        if kinds[name] != kind:
            raise UserError(f"{path}: its layer {name} is a {kinds[name]!r}; with its settings it would be a {kind}.")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor):
            raise UserError(f"{path} is damaged: its parameter {name} has no shape and values.")
    return list(found.items())


def tokenizer_of(path: Path, table: Any) -> Tokenizer:
    """The tokenizer in the file."""
    known = {**TOKENIZERS, **READ_ONLY}
    kind = table.pop("kind", None) if isinstance(table, dict) else None
    try:
        return known[choose(f"The tokenizer kind in {path}", str(kind), list(known))].from_table(table)
    except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged: its tokenizer cannot be read.") from error
