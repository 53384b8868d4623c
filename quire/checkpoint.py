"""A model's and an optimizer's state, to and from a folder.

    model.safetensors      the weights, a tied tensor once
    training.safetensors   optimizer state and random generators
    state.json             everything else, and the CRC-32 of every tensor and file

state.json is written last: a folder that has it is complete.
"""

import errno
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quire import files
from quire.errors import UserError

MODEL, TRAINING, STATE = "model.safetensors", "training.safetensors", "state.json"

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
    if own.keys() != tensors.keys():
        different = ", ".join(sorted(own.keys() ^ tensors.keys())[:5])
        raise UserError(f"{origin} does not fit this model's settings: {different} are in one and not in the other.")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise UserError(
                    f"{origin} does not fit this model's settings: {name} is {tuple(tensors[name].shape)} there,"
                    f" and {tuple(tensor.shape)} here."
                )
            tensor.copy_(tensors[name])


def save(folder: Path, model: Tensors, training: Tensors, state: dict[str, Any]) -> None:
    """Replace `folder` by a checkpoint, whole or not at all."""

    def write(new: Path) -> None:
        sums = {name: write_tensors(new / name, tensors) for name, tensors in ((MODEL, model), (TRAINING, training))}
        files.write_json(new / STATE, {"state": state, "files": sums})

    files.replace_folder(folder, write)


def save_again(folder: Path, origin: Path) -> None:
    """Replace `folder` by the checkpoint just saved in `origin`, whole or not at all, without writing it again."""

    def write(new: Path) -> None:
        for name in (MODEL, TRAINING, STATE):
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


def exists(folder: Path) -> bool:
    """Whether there is a complete checkpoint."""
    return files.complete_folder(folder, STATE) is not None


def _load(folder: Path, training: bool) -> Checkpoint:
    whole = files.read_json(folder / STATE)
    model = read_tensors(folder / MODEL, whole["files"][MODEL])
    rest = read_tensors(folder / TRAINING, whole["files"][TRAINING]) if training else {}
    return Checkpoint(model, rest, whole["state"])


def write_tensors(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> dict[str, Any]:
    """Write a safetensors file; gives its size and the checksums of file and tensors."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {name: tensor.detach().to("cpu", copy=False).contiguous() for name, tensor in tensors.items()}
    try:
        files.write_by(path, lambda new: save_file(plain, new, metadata))
    except SafetensorError as error:  # a full disk, by another name
        raise OSError(errno.EIO, str(error).rpartition("I/O error: ")[2], str(path)) from error
    return {
        "bytes": path.stat().st_size,
        "crc32": files.crc32_of(path),
        "tensors": {name: _tensor_crc32(tensor) for name, tensor in plain.items()},
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
