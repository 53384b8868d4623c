"""A model's and an optimizer's state, to and from a folder.

    model.safetensors      the weights, a tied tensor once
    training.safetensors   optimizer state and random generators
    state.json             everything else, and the CRC-32 of every tensor and file

Of a model that was trained in parts (training/sharded.py) shard-*.safetensors take the place of the first two; they
are put together when they are read. state.json is written last: a folder that has it is complete.
"""

import errno
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quire import files
from quire.errors import UserError

MODEL, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"
PLACES = "DCP_SHARDING_INFO"  # in a shard's header: where its parts belong, as torch.distributed.checkpoint writes it

Tensors = dict[str, Tensor]


@dataclass
class Checkpoint:
    """What a checkpoint folder holds; `training` is empty where only the model was asked for."""

    model: Tensors
    training: Tensors
    state: dict[str, Any]


def model_tensors(model: nn.Module) -> Tensors:
    """The parameters and buffers of a model by name; a tied one appears once, under its first name."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def load_model_tensors(model: nn.Module, tensors: Tensors, origin: Path | str) -> None:
    """Copy `tensors` into the model; a missing, unknown or misshapen one is a UserError naming it and `origin`."""
    own = model_tensors(model)
    check_names(own, tensors.keys(), origin)
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise UserError(
                f"{origin} does not fit this model's settings: {name} is {tuple(tensors[name].shape)} there,"
                f" and {tuple(tensor.shape)} here."
            )
        put(tensor, tensors[name])


def check_names(own: Tensors, found: Iterable[str], origin: Path | str) -> None:
    """Refuse a checkpoint whose tensors have other names than the model's."""
    if different := sorted(own.keys() ^ set(found)):
        names = ", ".join(name.removeprefix("model.") for name in different[:5])
        raise UserError(f"{origin} does not fit this model's settings: {names} are in one and not in the other.")


def put(tensor: Tensor, values: Tensor) -> None:
    """Copy `values` into a tensor; where that is a process's part of one (a DTensor), its part of them."""
    with torch.no_grad():
        if hasattr(tensor, "to_local"):
            tensor.to_local().copy_(part_of(values, tensor))
        else:
            tensor.copy_(values)


def part_of(values: Tensor, sharded: Any) -> Tensor:
    """The part of `values` that this process holds of a tensor sharded like `sharded`."""
    from torch.distributed.tensor import Shard

    (placement,), mesh = sharded.placements, sharded.device_mesh
    assert isinstance(placement, Shard) and placement.dim == 0, "parameters are sharded by their rows"
    rows = values.chunk(mesh.size())
    number = mesh.get_local_rank()
    return rows[number] if number < len(rows) else values[:0]


def save(folder: Path, model: Tensors, training: Tensors, state: dict[str, Any]) -> None:
    """Replace `folder` by a checkpoint, whole or not at all."""

    def write(new: Path) -> None:
        sums = {name: write_tensors(new / name, tensors) for name, tensors in ((MODEL, model), (TRAINING, training))}
        files.write_json(new / STATE, {"state": state, "files": sums})

    files.replace_folder(folder, write)


def save_again(folder: Path, origin: Path) -> None:
    """Replace `folder` by the checkpoint just saved in `origin`, whole or not at all, without writing it again."""

    def write(new: Path) -> None:
        names = [path.name for path in sorted(origin.iterdir()) if path.name != STATE]
        for name in (*names, STATE):
            files.same_file(origin / name, new / name)

    files.replace_folder(folder, write)


def load(folder: Path, training: bool = True) -> Checkpoint:
    """The checkpoint in `folder`, every byte checked; damage is a UserError that names the file and the tensor.

    One that is being replaced meanwhile is read again.
    """
    while True:
        before = files.stamp(folder, STATE)
        found = files.complete_folder(folder, STATE)
        try:
            if found is None:
                raise UserError(f"There is no checkpoint in {folder}.")
            return _load(found, training)
        except (UserError, OSError):
            if files.stamp(folder, STATE) == before:
                raise


def is_sharded(folder: Path) -> bool:
    """Whether the checkpoint in `folder` was written in parts."""
    found = files.complete_folder(folder, STATE)
    return found is not None and not (found / MODEL).exists()


def model_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that hold weights."""
    return [*folder.glob(MODEL), *folder.glob("shard-*-model-00001-of-*.safetensors")]


def exists(folder: Path) -> bool:
    """Whether there is a complete checkpoint."""
    return files.complete_folder(folder, STATE) is not None


def _load(folder: Path, training: bool) -> Checkpoint:
    whole = files.read_json(folder / STATE)
    if MODEL not in whole["files"]:
        return read_shards(folder, whole, training)
    model = read_tensors(folder / MODEL, whole["files"][MODEL])
    rest = read_tensors(folder / TRAINING, whole["files"][TRAINING]) if training else {}
    return Checkpoint(model, rest, whole["state"])


def read_shards(folder: Path, whole: dict[str, Any], training: bool) -> Checkpoint:
    """A checkpoint that several processes wrote in parts, put together."""
    from safetensors import safe_open

    parts: dict[str, list[tuple[list[int], Tensor]]] = {}
    for file, sums in whole["files"].items():
        if not training and not any(name.startswith("model.") for name in sums["tensors"]):
            continue
        tensors = read_tensors(folder / file, sums)
        with safe_open(folder / file, "pt") as opened:
            places = json.loads((opened.metadata() or {}).get(PLACES, "{}"))
        for name, tensor in tensors.items():
            offsets = places.get(name, {}).get("saved_offsets", [0] * tensor.dim())
            parts.setdefault(name, []).append((offsets, tensor))
    together: dict[str, Tensors] = {"model": {}, "training": {}}
    for name, found in parts.items():
        size = [max(ends) for ends in zip(*((o + n for o, n in zip(at, t.shape)) for at, t in found))]
        tensor = found[0][1].new_empty(size)
        for offsets, values in found:
            tensor[tuple(slice(o, o + n) for o, n in zip(offsets, values.shape))] = values
        kind = "model" if name.startswith("model.") else "training"
        together[kind][name.removeprefix("model.")] = tensor
    return Checkpoint(together["model"], together["training"], whole["state"])


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """Write a safetensors file; gives its size and the checksums of file and tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().to("cpu", copy=False).contiguous() for name, tensor in tensors.items()}
    try:
        files.write_by(path, lambda new: save_file(plain, new, metadata))
    except SafetensorError as error:  # a full disk, by another name
        raise OSError(errno.EIO, str(error).rpartition("I/O error: ")[2], str(path)) from error
    return _sums(path, plain)


def sums_of(path: Path) -> dict[str, Any]:
    """What `write_tensors` gives, of a file that is there."""
    from safetensors.torch import load_file

    return _sums(path, load_file(path))


def _sums(path: Path, tensors: Tensors) -> dict[str, Any]:
    return {
        "bytes": path.stat().st_size,
        "crc32": files.crc32_of(path),
        "tensors": {name: _tensor_crc32(tensor) for name, tensor in tensors.items()},
    }


def _tensor_crc32(tensor: Tensor) -> str:
    return files.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data)


def read_tensors(path: Path, expected: dict[str, Any]) -> Tensors:
    """What `write_tensors` wrote, every byte checked against the `expected` checksums that it gave."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    remedy = "Restore it from a copy of the run."
    if not path.exists():
        raise UserError(f"{path} is missing. {remedy}")
    if (size := path.stat().st_size) != expected["bytes"]:
        raise UserError(f"{path} is damaged: it has {size} bytes instead of {expected['bytes']}. {remedy}")
    with ThreadPoolExecutor(1) as beside:  # checksums let other threads run: both are done in the time of one
        whole = beside.submit(files.crc32_of, path)
        try:
            tensors = load_file(path)
            # What was loaded is checked too: the file may have been exchanged for a newer one meanwhile.
            sums = expected["tensors"]
            changed = [name for name, checksum in sums.items() if _tensor_crc32(tensors[name]) != checksum]
            intact = whole.result() == expected["crc32"]
        except (SafetensorError, RuntimeError, ValueError, KeyError):  # KeyError: a name in the header has changed
            changed, intact = [], False
    if intact and not changed:
        return tensors
    part = f"tensor {changed[0]}" if changed else "its header"
    raise UserError(f"{path} is damaged: {part} does not match its checksum. {remedy}")
