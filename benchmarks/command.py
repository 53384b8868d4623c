"""What the benchmarks share: a command of Quire as a person would run it, what a command costs, and the machine."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def quire(words: list[str], folder: str | Path) -> dict[str, Any]:
    """What `quire WORDS`, called in a folder, prints as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "quire", *words], cwd=folder, env=environment(),
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


def environment(**more: str) -> dict[str, str]:
    """The environment of a command that is to find this Quire."""
    places = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": places, **more}


def measured(
    command: list[str], folder: str | Path, core: int | None = None, **variables: str
) -> tuple[str, dict[str, float]]:
    """Run a command in a folder; its standard output, and the wall and CPU seconds of the whole process.

    With a `core` it runs one thread on that core only. Raises RuntimeError where it fails, with what it said.
    """
    if core is not None:
        variables = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **variables}
    pinned = (
        (lambda: os.sched_setaffinity(0, {core})) if core is not None and hasattr(os, "sched_setaffinity") else None
    )
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=folder, env=environment(**variables), stdout=output, stderr=errors, preexec_fn=pinned
        )
        try:
            _, status, used = os.wait4(process.pid, 0)  # this process alone: others may run beside it
        except BaseException:
            process.kill()
            raise
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}: {errors.read().decode()[-2000:]}")
        cpu = used.ru_utime + used.ru_stime
        return output.read().decode(), {"wall_seconds": round(wall, 2), "cpu_seconds": round(cpu, 2)}


def cores() -> list[int]:
    """The cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def machine(device: str = "cpu") -> dict[str, Any]:
    """What it ran on."""
    import torch

    card = {"device": torch.cuda.get_device_name()} if device == "cuda" else {}
    return {
        **card,
        "platform": platform.platform(),
        "processor": processor(),
        "cores": len(cores()),
        "torch": torch.__version__,
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "date": time.strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The processor's name, where the system tells it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
