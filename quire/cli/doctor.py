"""quire doctor: versions, devices, threads, memory, and what is missing."""

import platform
import shutil
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from quire import __version__, files, processes
from quire.cli.flags import Switch, parse, print_json
from quire.devices import choose_device, memory_bytes, unused_card, usable_cores
from quire.errors import UserError
from quire.tokenizers import core

TIMEOUT = 120.0  # seconds for which a process of --distributed waits for another
PACKAGES = ("torch", "numpy", "safetensors", "tyro", "rich", "matplotlib")


@dataclass(frozen=True)
class Arguments:
    """Show what this machine has for training, and what is missing."""

    json: Switch = False  # print one JSON object on standard output
    distributed: Switch = False  # under torchrun: train a small model alone and together, and compare


def run(words: list[str]) -> int:
    """Look and tell."""
    given = parse(Arguments, words, "doctor")
    if given.distributed:
        return show_agreements(given.json)
    if not processes.leads():
        return 0
    found = examine()
    if given.json:
        print_json(found)
        return 0
    for name, value in found.items():
        if name != "missing":
            print(f"{name.replace('_', ' '):14}{', '.join(value) if isinstance(value, list) else value}")
    for sentence in found["missing"] or ["Nothing is missing."]:
        print(sentence)
    return 0


def show_agreements(as_json: bool) -> int:
    """Whether the processes of this launch train as one would."""
    from quire.training.agreement import STEPS, agreements
    from quire.training.distributed import join, own_device

    if not processes.launched():
        raise UserError(
            "Start the processes with torchrun: torchrun --nproc-per-node 2 -m -- quire doctor --distributed"
        )
    world, device = join(TIMEOUT), own_device(choose_device())
    with world.explained():
        found = agreements(world, device)
    if world.leads and as_json:
        print_json({"processes": world.size, "steps": STEPS, "ways": [asdict(each) for each in found]})
    elif world.leads:
        print(f"{world.size} processes against one, {STEPS} steps: the largest difference of a loss, relative")
        for each in found:
            same = "the same" if each.same_parameters else "DIFFERENT"
            print(f"{each.way:28}{each.difference:9.1e}   parameters {same} in all processes")
    if wrong := [each.way for each in found if not each.holds]:
        raise UserError(
            f"These processes do not train as one does: {'; '.join(wrong)}. Their torch, or the network between them,"
            " is not to be trusted."
        )
    if world.leads and not as_json:
        print("They agree: " + " and ".join(sorted({f"to {each.tolerance:g}" for each in found})) + ".")
    return 0


def examine() -> dict[str, Any]:
    """What `quire doctor` prints."""
    import torch

    cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    devices = ["cpu", *(f"cuda:{i} ({name})" for i, name in enumerate(cards))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    cache = files.cache_folder()
    used = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) if cache.exists() else 0
    return {
        "quire": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: installed(name) for name in PACKAGES},
        "devices": devices,
        "tokenizer_core": "C" if core.fast is not None else "Python",
        "cores": usable_cores(),
        "torch_threads": torch.get_num_threads(),
        "cpu_kernels": torch.backends.cpu.get_cpu_capability(),
        "memory": f"{memory_bytes() / 2**30:.1f} GiB",
        "disk_free": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
        "cache": f"{cache} ({used / 1e6:.1f} MB)",
        "missing": [sentence for sentence in (unused_card(), no_compiler(), no_core()) if sentence],
    }


def installed(name: str) -> str:
    """A package's version."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def no_core() -> str | None:
    """Byte-level BPE has a fast core in C, compiled at installation where that is possible."""
    if core.fast is not None:
        return None
    return (
        "The tokenizers' fast core was not compiled, so byte-bpe works in Python, about twenty times slower. Install a"
        " C compiler, then install Quire again."
    )


def no_compiler() -> str | None:
    """torch.compile on a CPU needs a C++ compiler."""
    if any(shutil.which(name) for name in ("c++", "g++", "clang++", "cl")):
        return None
    return "No C++ compiler: --compile yes cannot work on this CPU (training does not need it)."
