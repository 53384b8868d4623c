"""quire doctor: versions, devices, threads, memory, and what is missing."""

import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from quire import __version__, files
from quire.cli.flags import Switch, parse, print_json
from quire.devices import memory_bytes, unused_card, usable_cores
from quire.tokenizers import core

PACKAGES = ("torch", "numpy", "safetensors", "tyro", "rich", "matplotlib")


@dataclass(frozen=True)
class Arguments:
    """Show what this machine has for training, and what is missing."""

    json: Switch = False  # print one JSON object on standard output


def run(words: list[str]) -> int:
    """Look and tell."""
    given = parse(Arguments, words, "doctor")
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
