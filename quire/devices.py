"""Which processor computes, with how many threads, and what this machine has."""

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quire.errors import UserError


def set_thread_policy() -> None:
    """Let idle OpenMP threads sleep soon instead of spinning; takes effect only before torch is first imported.

    A thread that spins while it waits holds the core that the other one needs, as soon as anything else runs on the
    machine: on 2 cores beside one busy process a training step took 3 to 28 times as long. Waiting briefly
    (GOMP_SPINCOUNT) costs 5% undisturbed where not waiting at all costs 25% (benchmarks/NOTES.md).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def set_memory_policy() -> None:
    """Let torch ask Linux for large pages; takes effect only before torch is first imported.

    Weights are then read up to 1.5 times as fast, one row of a product after another (benchmarks/NOTES.md).
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def usable_cores() -> int:
    """Cores this process may use: its CPU affinity, and on Linux its control group's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, round(int(quota) / int(period))))


def choose_device(name: str = "auto") -> Any:
    """The torch.device called `name`; auto takes CUDA, then MPS, then the CPU."""
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name} is not a device. Choices: auto, cpu, cuda, cuda:0, mps.") from error
    available = {
        "cpu": True,
        "cuda": (device.index or 0) < torch.cuda.device_count(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available.get(device.type, False):
        raise UserError(f"--device {name}: this torch finds no such device here. {unused_card() or ''}".strip())
    return device


def set_threads(count: int) -> int:
    """Compute with `count` threads, 0 for one for each usable core; gives the number taken."""
    import torch

    if count < 0:
        raise UserError(f"--threads must be 0 (as many as there are cores) or more, not {count}.")
    count = count or usable_cores()
    torch.set_num_threads(count)
    return count


def keep_freed_memory() -> None:
    """Let this process keep memory that it frees, where the C library is glibc; elsewhere nothing.

    Each training step needs the same large tensors again. glibc gives them back to the system and fetches fresh pages,
    which that must clear first: 400,000 page faults and a tenth of the time of a step of GPT-2 (benchmarks/NOTES.md).
    """
    import ctypes

    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, most_mappings = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    adjust = ctypes.CDLL(None).mallopt
    adjust(most_mappings, 0)
    adjust(trim_threshold, 2**31 - 1)


def unused_card() -> str | None:
    """A sentence where the machine has an NVIDIA card that this torch cannot use, else None."""
    import torch

    if torch.cuda.is_available() or not (Path("/proc/driver/nvidia/gpus").exists() or _windows_driver()):
        return None
    if torch.version.cuda is None:
        return (
            "An NVIDIA card is present, but this torch is a CPU build: reinstall torch with CUDA"
            " (delete .venv and call go.py again, or see pytorch.org/get-started)."
        )
    return f"An NVIDIA card is present, but this torch (CUDA {torch.version.cuda}) cannot use it: update its driver."


def _windows_driver() -> bool:
    return os.name == "nt" and (Path(os.environ.get("SYSTEMROOT", "C:/Windows")) / "System32/nvcuda.dll").exists()


def generators(device: Any) -> dict[str, tuple[Any, Callable[[Any], None]]]:
    """The states of the random generators that work on `device` draws from, and how to set them, by kind."""
    import torch

    found: dict[str, tuple[Any, Callable[[Any], None]]] = {"cpu": (torch.get_rng_state(), torch.set_rng_state)}
    if device.type == "cuda":
        found["cuda"] = (torch.cuda.get_rng_state(device), lambda state: torch.cuda.set_rng_state(state, device))
    if device.type == "mps":
        found["mps"] = (torch.mps.get_rng_state(), torch.mps.set_rng_state)
    return found


def memory_bytes() -> int:
    """Memory this machine has, in bytes; 0 where it cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def memory_limit(device: Any) -> int:
    """Bytes that a training may use here: the GPU's, or this machine's and its control group's; 0: not known."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limit = memory_bytes()
    group = Path("/sys/fs/cgroup/memory.max")
    text = group.read_text().strip() if os.access(group, os.R_OK) else "max"
    return min(limit or int(text), int(text)) if text.isdigit() else limit


def peak_memory(device: Any) -> int:
    """The most memory in use so far, in bytes: the GPU's allocations, or the process's resident set."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "alloc_failed",
    "bad_alloc",
)  # CUDA, MPS; CPU; cuBLAS, cuDNN; C++


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, of this machine or of its GPU."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in said for word in NO_MEMORY)
    )


def release_memory(device: Any) -> None:
    """Give back what torch keeps for later, so that other sizes find room."""
    import gc

    import torch

    gc.collect()  # an error that was caught may hold the layers' results in a circle
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()
