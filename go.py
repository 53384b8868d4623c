#!/usr/bin/env python3
"""Set Quire up and use it, with nothing but Python 3.11 or newer.

    python3 go.py train [ARGUMENT ...]   install Quire into .venv, then run `quire train ARGUMENT ...`;
                                         without arguments: the default model on the works of Shakespeare
    python3 go.py test [ARGUMENT ...]    install Quire and its test tools into .venv, then run ruff, mypy
                                         and `pytest ARGUMENT ...`

The first call downloads PyTorch and a few other packages into the folder .venv beside this file. Later calls
start at once. An install that was interrupted is carried on by the next call. To uninstall, delete .venv.
"""

# The syntax here is Python 3.6's, so that an older Python reads far enough to say which one is needed.

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

if sys.version_info < (3, 11):
    sys.stderr.write(
        "Quire needs Python 3.11 or newer; this is Python {}.{}. Install a newer one (https://www.python.org) "
        "and run go.py with it, for example: python3.12 go.py train\n".format(*sys.version_info[:2])
    )
    sys.exit(2)

PYTHON_VERSION = "{}.{}".format(*sys.version_info[:2])
HERE = Path(__file__).resolve().parent
VENV = HERE / ".venv"
SCRIPTS = Path(sysconfig.get_path("scripts", "venv", {"base": str(VENV)}))
SITE_PACKAGES = Path(sysconfig.get_path("purelib", "venv", {"base": str(VENV)}))
PYTHON, QUIRE = (SCRIPTS / (name + (".exe" if os.name == "nt" else "")) for name in ("python", "quire"))
STAMP = VENV / "quire-installed.json"  # what a finished install consisted of; written last, absent while one runs
CONSTRAINTS = HERE / "constraints.txt"

# PyTorch's own wheel indexes. cu130 carries the CUDA that PyTorch 2.13 calls stable, cards from 2018 (Turing) on.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_INDEX = "https://download.pytorch.org/whl/cu130"


def main(arguments: list[str]) -> int:
    """Run the command named first in `arguments`; return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__.strip())
        return 0
    commands = {"train": train, "test": test}
    if arguments[0] not in commands:
        stop(f"go.py knows the commands {' and '.join(commands)}, not '{arguments[0]}'.")
    sentence = why_unsupported(this_machine())
    if sentence:
        stop(sentence)
    try:
        return commands[arguments[0]](arguments[1:])
    except KeyboardInterrupt:
        say("Stopped. The same command carries on from here.")
        return 130


def train(arguments: list[str]) -> int:
    """Install what training needs, then become `quire train`."""
    prepare(extras=[])
    return become([str(QUIRE), "train", *arguments])


def test(arguments: list[str]) -> int:
    """Install the test tools and run them all; return the first exit code that is not 0."""
    prepare(extras=["test"])
    environment = dict(os.environ)
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # nothing is compiled at install: the first import has to keep it
    workers = []
    if count_cores() > 1:
        workers = ["-n", "2"]
        environment.setdefault("OMP_NUM_THREADS", "1")  # two workers with a thread each: no more threads than cores
    checks = {
        "ruff": ["-m", "ruff", "check", "."],
        "mypy": ["-m", "mypy", "quire"],
        "pytest": ["-m", "pytest", "-q", *workers, *arguments],  # last, so that its closing line ends a good run
    }
    failed = {}
    for name, check in checks.items():
        say(f"-- {name}")
        code = subprocess.call([str(PYTHON), *check], cwd=HERE, env=environment)
        if code:
            failed[name] = code
    if failed:
        say(f"Failed: {', '.join(failed)}.")
    return next(iter(failed.values()), 0)


# What this machine is


class Machine(NamedTuple):
    """What decides whether PyTorch has a build for this Python."""

    system: str  # Linux, Darwin, Windows
    processor: str  # x86_64, arm64, ...
    bits: int  # of the Python, not of the machine
    implementation: str  # CPython, PyPy, ...
    c_library: str  # the platform that Python was built for, such as x86_64-pc-linux-gnu or -musl


def this_machine() -> Machine:
    """Describe the Python that runs this script and the machine under it."""
    return Machine(
        system=platform.system(),
        processor=platform.machine(),
        bits=8 * struct.calcsize("P"),
        implementation=platform.python_implementation(),
        c_library=sysconfig.get_config_var("HOST_GNU_TYPE") or "",
    )


def why_unsupported(machine: Machine) -> str:
    """Say in a sentence why PyTorch cannot run on `machine`, or return an empty string."""
    if machine.bits != 64:
        return f"Quire needs a 64-bit Python, because PyTorch does; this one has {machine.bits} bits."
    if machine.implementation != "CPython":
        return f"Quire needs the ordinary Python (CPython), because PyTorch does; this one is {machine.implementation}."
    if machine.system == "Darwin" and machine.processor == "x86_64":
        return (
            "PyTorch no longer comes for Intel Macs, nor for an Intel Python on Apple silicon. "
            "On an Apple silicon Mac, install Python for arm64 and run go.py with it."
        )
    if "musl" in machine.c_library:
        return "PyTorch has no build for Linux on musl, such as Alpine. Use one with glibc, such as Debian."
    return ""


def has_nvidia_driver() -> bool:
    """Whether NVIDIA's driver is installed: its user library can be loaded, as PyTorch itself will load it."""
    library = {"Linux": "libcuda.so.1", "Windows": "nvcuda.dll"}.get(platform.system())
    if library is None:
        return False
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def count_cores() -> int:
    """Count the cores this process may use, which in a container can be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


# The virtual environment


def prepare(extras: list[str]) -> None:
    """Bring .venv to what pyproject.toml and constraints.txt ask for; do nothing where it is there already."""
    wanted = describe_install(extras)
    found = read_stamp()
    if covers(found, wanted) and PYTHON.exists():
        return
    say(f"Installing Quire into {VENV}. Later calls start at once.")
    STAMP.unlink(missing_ok=True)
    if not venv_works() or found.get("folder", wanted["folder"]) != wanted["folder"]:
        make_venv()
    remove_half_installed()
    # PyTorch needs setuptools in any case. With it in place Quire itself is built without a second environment,
    # and so a later edit of pyproject.toml is taken up without a network.
    install("setuptools")
    install_torch()
    install("--no-build-isolation", "--editable", ".[" + ",".join(extras) + "]" if extras else ".")
    STAMP.write_text(json.dumps(wanted), encoding="utf-8")


def describe_install(extras: list[str]) -> dict:
    """Describe an install with `extras`: two that are described alike need no work between them."""
    sources = [HERE / "pyproject.toml", CONSTRAINTS, *sorted(HERE.glob("quire/**/*.c"))]  # what is compiled counts too
    requirements = b"\0".join(path.read_bytes() for path in sources)
    return {
        "folder": str(HERE),  # a .venv does not survive being moved
        "python": PYTHON_VERSION,
        "requirements": hashlib.sha256(requirements).hexdigest(),
        "extras": sorted(extras),
    }


def read_stamp() -> dict:
    """Read what the last finished install consisted of: empty where none finished."""
    try:
        return json.loads(STAMP.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def covers(found: dict, wanted: dict) -> bool:
    """Whether the install `found` holds everything in `wanted`; more extras than wanted do no harm."""
    alike = all(found.get(key) == wanted[key] for key in ("folder", "python", "requirements"))
    return alike and set(wanted["extras"]) <= set(found["extras"])


def venv_works() -> bool:
    """Whether .venv holds a whole pip and a Python of this version that starts."""
    if not PYTHON.exists() or not list(SITE_PACKAGES.glob("pip-*.dist-info/INSTALLER")):
        return False
    question = "import sys; print('{}.{}'.format(*sys.version_info[:2]))"
    try:
        answer = subprocess.run([str(PYTHON), "-I", "-c", question], capture_output=True, text=True)
    except OSError:
        return False
    return answer.stdout.strip() == PYTHON_VERSION


def make_venv() -> None:
    """Make .venv afresh, whatever is in it."""
    missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
    if missing:
        stop(
            f"This Python has no module {missing[0]}, which makes the folder that Quire is installed into. "
            "On Debian and Ubuntu: sudo apt install python3-venv. Then run the same command again."
        )
    result = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], stdout=sys.stderr)
    if result.returncode:
        stop(f"Python could not make {VENV}; the reason is above.")


def remove_half_installed() -> None:
    """Remove what an interrupted pip left, so that pip installs those packages anew.

    pip writes the file INSTALLER after all files of a package, and renames what it is removing to ~NAME.
    """
    half = [info for info in SITE_PACKAGES.glob("*.dist-info") if not (info / "INSTALLER").exists()]
    for path in [*half, *SITE_PACKAGES.glob("~*")]:
        shutil.rmtree(path)


# What goes into it


class Attempt(NamedTuple):
    """One way to install PyTorch: pip's arguments, and a sentence for the person who waits (or none)."""

    arguments: list[str]
    sentence: str = ""


def torch_attempts(system: str, nvidia: bool, version: str) -> list[Attempt]:
    """List the ways to install PyTorch on `system`, with or without an NVIDIA driver, in the order to try them."""
    plain = ["torch==" + version]
    if system == "Linux" and nvidia:
        return [Attempt(plain, "There is an NVIDIA driver: PyTorch comes with CUDA, several GB.")]
    if system == "Linux":
        cpu = ["torch==" + version + "+cpu"]
        return [
            Attempt(cpu),
            Attempt([*cpu, "--index-url", CPU_INDEX, "--retries", "0", "--timeout", "15"]),
            Attempt(
                plain,
                "PyTorch's CPU build (200 MB) is out of reach from here. Taking the general build instead: "
                "it brings NVIDIA's CUDA libraries, several GB, and runs without a card too.",
            ),
        ]
    if system == "Windows" and nvidia:
        return [
            Attempt(
                ["torch==" + version + "+cu130", "--index-url", CUDA_INDEX],
                "There is an NVIDIA driver: PyTorch comes with CUDA, several GB.",
            ),
            Attempt(plain, "PyTorch's CUDA build is out of reach from here. Taking the CPU build instead."),
        ]
    return [Attempt(plain)]


def install_torch() -> None:
    """Install the PyTorch that constraints.txt pins, in the build that fits this machine.

    Without its dependencies: those come with Quire's own, from wherever pip is configured to look.
    """
    version = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), re.MULTILINE).group(1)
    if list(SITE_PACKAGES.glob(f"torch-{version}[+.]*dist-info")):
        return
    for attempt in torch_attempts(platform.system(), has_nvidia_driver(), version):
        if attempt.sentence:
            say(attempt.sentence)
        complaint = run_pip("--no-deps", *attempt.arguments)
        if not complaint:
            return
    stop_for_pip(complaint)


def install(*arguments: str) -> None:
    """Install with pip, or stop with a sentence."""
    complaint = run_pip(*arguments)
    if complaint:
        stop_for_pip(complaint)


def run_pip(*arguments: str) -> str:
    """Run `pip install` in .venv; return an empty string, or what pip complained of where it failed.

    Only ready-made wheels: nothing is compiled, and no package's build code runs but Quire's own. Byte code is
    written when a module is first imported, which is quicker than all of it now.
    """
    command = [str(PYTHON), "-I", "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--no-compile"]
    command += ["--only-binary", ":all:", "--constraint", CONSTRAINTS.name, *arguments]
    if not sys.stderr.isatty():
        command.append("--quiet")
    # pip's progress goes to standard error: standard output belongs to what `quire train` says.
    result = subprocess.run(command, cwd=HERE, stdout=sys.stderr, stderr=subprocess.PIPE, text=True, errors="replace")
    return "" if result.returncode == 0 else result.stderr or f"pip ended with exit code {result.returncode}"


def stop_for_pip(complaint: str) -> None:
    """End with pip's complaint and what to do about it."""
    say(complaint.strip())
    stop(
        "pip could not install what Quire needs; its own words are above. Most often the network or pip's index "
        "is out of reach, or the disk is full. Run the same command again afterwards: it carries on from here."
    )


# Saying and ending


def become(command: list[str]) -> int:
    """Run `command` in place of this script, so that Ctrl-C, SIGTERM and the exit code are its own."""
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name != "nt":
        os.execv(command[0], command)
    signal.signal(signal.SIGINT, lambda *_: None)  # Windows sends Ctrl-C to both; the command decides what it means
    return subprocess.call(command)


def say(sentence: str) -> None:
    """Tell the person something, on standard error."""
    print(sentence, file=sys.stderr, flush=True)


def stop(sentence: str) -> None:
    """End with a sentence and the exit code of a mistake that the person can mend."""
    say(sentence)
    sys.exit(2)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
