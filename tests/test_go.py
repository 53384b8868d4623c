"""go.py decides rightly what to install, and says in a sentence what stops it. Nothing is installed here."""

import ast
import ctypes
import importlib.util
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from types import ModuleType
from typing import TextIO

import pytest
from packaging.requirements import Requirement

Patch, Capture = pytest.MonkeyPatch, pytest.CaptureFixture
ROOT = Path(__file__).resolve().parent.parent
LINUX = {"system": "Linux", "processor": "x86_64", "bits": 64, "implementation": "CPython", "c_library": ""}


def load_go(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("go", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def go(tmp_path: Path) -> ModuleType:
    """go.py in a clone of its own, with no .venv yet."""
    for name in ("go.py", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return load_go(tmp_path / "go.py")


def sentence_of(go: ModuleType, arguments: list[str], capsys: Capture) -> str:
    """What go.py says when it stops with the exit code of a mistake that can be mended."""
    with pytest.raises(SystemExit) as stopped:
        go.main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


class Machinery:
    """Stands in for subprocess.run: makes the files that venv and pip would make, and fails where told to."""

    def __init__(self, go: ModuleType) -> None:
        self.go = go
        self.version = go.PYTHON_VERSION
        self.calls: list[str] = []
        self.failing = ""  # a call with this word in it fails
        self.interrupted = ""  # a call with this word in it is stopped by Ctrl-C

    def run(self, command: list[str], stdout: TextIO | None = None, **_: object) -> subprocess.CompletedProcess:
        line = " ".join(command)
        self.calls.append(line)
        if "install" in line or "venv" in line:
            print("progress", file=stdout or sys.stdout)
        if self.interrupted and self.interrupted in line:
            raise KeyboardInterrupt
        if self.failing and self.failing in line:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no such thing")
        if "venv --clear" in line:
            self.make(self.go.PYTHON)
            self.make(self.go.SITE_PACKAGES / "pip-1.dist-info" / "INSTALLER")
        return subprocess.CompletedProcess(command, 0, self.version + "\n", "")

    @staticmethod
    def make(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def count(self, word: str) -> int:
        return sum(word in call for call in self.calls)


@pytest.fixture
def machinery(go: ModuleType, monkeypatch: Patch) -> Machinery:
    machinery = Machinery(go)
    monkeypatch.setattr(subprocess, "run", machinery.run)
    monkeypatch.setattr(go, "has_nvidia_driver", lambda: False)
    return machinery


# Which Python, which machine


def test_the_syntax_is_one_that_python_3_6_can_read() -> None:
    ast.parse((ROOT / "go.py").read_text(encoding="utf-8"), feature_version=(3, 6))


def test_an_older_python_gets_a_sentence(monkeypatch: Patch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 8, 10, "final", 0))
    with pytest.raises(SystemExit) as stopped:
        load_go(ROOT / "go.py")
    assert stopped.value.code == 2
    assert "needs Python 3.11 or newer; this is Python 3.8" in capsys.readouterr().err


def test_only_the_standard_library_is_imported() -> None:
    tree = ast.parse((ROOT / "go.py").read_text(encoding="utf-8"))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"bits": 32}, "64-bit"),
        ({"implementation": "PyPy"}, "PyPy"),
        ({"system": "Darwin", "processor": "x86_64"}, "Intel Macs"),
        ({"c_library": "x86_64-unknown-linux-musl"}, "musl"),
    ],
)
def test_an_unsupported_machine_gets_a_sentence(
    go: ModuleType, monkeypatch: Patch, capsys: Capture, change: dict, word: str
) -> None:
    monkeypatch.setattr(go, "this_machine", lambda: go.Machine(**{**LINUX, **change}))
    assert word in sentence_of(go, ["train"], capsys)


@pytest.mark.parametrize(
    "change", [{}, {"processor": "aarch64"}, {"system": "Darwin", "processor": "arm64"}, {"system": "Windows"}]
)
def test_a_supported_machine_gets_none(go: ModuleType, change: dict) -> None:
    assert go.why_unsupported(go.Machine(**{**LINUX, **change})) == ""


def test_this_machine_is_supported(go: ModuleType) -> None:
    assert go.why_unsupported(go.this_machine()) == ""


@pytest.mark.parametrize(
    ("system", "loads", "expected"),
    [("Linux", True, True), ("Linux", False, False), ("Windows", True, True), ("Darwin", True, False)],
)
def test_a_driver_is_there_when_its_library_loads(
    go: ModuleType, monkeypatch: Patch, system: str, loads: bool, expected: bool
) -> None:
    def load(name: str) -> None:
        if not loads:
            raise OSError(name)

    monkeypatch.setattr(go.platform, "system", lambda: system)
    monkeypatch.setattr(ctypes, "CDLL", load)
    assert go.has_nvidia_driver() is expected


# Which PyTorch


@pytest.mark.parametrize(
    ("system", "nvidia", "expected"),
    [
        ("Linux", False, [("torch==2.13.0+cpu", None), ("torch==2.13.0+cpu", "whl/cpu"), ("torch==2.13.0", None)]),
        ("Linux", True, [("torch==2.13.0", None)]),
        ("Windows", True, [("torch==2.13.0+cu130", "whl/cu130"), ("torch==2.13.0", None)]),
        ("Windows", False, [("torch==2.13.0", None)]),
        ("Darwin", False, [("torch==2.13.0", None)]),
    ],
)
def test_the_builds_of_pytorch_tried(go: ModuleType, system: str, nvidia: bool, expected: list) -> None:
    attempts = go.torch_attempts(system, nvidia, "2.13.0")
    assert len(attempts) == len(expected)
    for attempt, (requirement, index) in zip(attempts, expected, strict=True):
        assert attempt.arguments[0] == requirement
        assert ("--index-url" in attempt.arguments) == (index is not None)
        assert index is None or any(argument.endswith(index) for argument in attempt.arguments)


def test_linux_without_a_driver_waits_little_and_is_told_the_size(go: ModuleType) -> None:
    _, own_index, general = go.torch_attempts("Linux", False, "2.13.0")
    assert own_index.arguments[-4:-1] == ["--retries", "0", "--timeout"]
    assert int(own_index.arguments[-1]) <= 15
    assert "several GB" in general.sentence


def test_each_build_is_tried_until_one_installs(
    go: ModuleType, machinery: Machinery, monkeypatch: Patch, capsys: Capture
) -> None:
    monkeypatch.setattr(go.platform, "system", lambda: "Linux")
    machinery.failing = "+cpu"
    go.install_torch()
    assert ["+cpu" in call for call in machinery.calls] == [True, True, False]
    said = capsys.readouterr().err
    assert "several GB" in said
    assert "ERROR" not in said  # a build that is not there is no error as long as another is


def test_constraints_pin_every_requirement_within_its_range() -> None:
    """What pyproject.toml asks for is pinned, and no pin contradicts it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for text in [*project["dependencies"], *(extras := project["optional-dependencies"])["test"], *extras["datasets"]]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name]), text


# Installing once, and carrying on


def test_a_second_call_installs_nothing(go: ModuleType, machinery: Machinery) -> None:
    go.prepare([])
    assert machinery.count("venv --clear") == 1
    assert machinery.count("pip install") == 3  # setuptools, PyTorch, Quire
    machinery.calls.clear()
    go.prepare([])
    assert machinery.calls == []
    go.STAMP.write_text('{"folder": ', encoding="utf-8")  # a damaged stamp counts as none
    go.prepare([])
    assert machinery.count("--editable") == 1


def test_pip_installs_wheels_only_uncompiled_and_pinned(go: ModuleType, machinery: Machinery) -> None:
    go.prepare(["test"])
    pip_calls = [call for call in machinery.calls if "pip install" in call]
    for call in pip_calls:
        for option in ("--no-compile", "--disable-pip-version-check", "--constraint constraints.txt", "--only-binary"):
            assert option in call
    assert "--editable .[test]" in pip_calls[-1]


def test_the_test_tools_serve_training_but_not_the_other_way(go: ModuleType, machinery: Machinery) -> None:
    go.prepare([])
    machinery.calls.clear()
    go.prepare(["test"])
    assert machinery.count(".[test]") == 1
    machinery.calls.clear()
    go.prepare([])
    assert machinery.calls == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_requirement_is_installed_into_the_same_venv(go: ModuleType, machinery: Machinery, name: str) -> None:
    go.prepare([])
    machinery.calls.clear()
    with (go.HERE / name).open("a") as file:
        file.write("# changed\n")
    machinery.interrupted = "--editable"
    assert go.main(["train"]) == 130
    assert go.read_stamp() == {}  # neither the old install nor the new one
    machinery.interrupted = ""
    go.prepare([])
    assert machinery.count("--editable") == 2
    assert machinery.count("venv --clear") == 0


def test_another_python_gets_a_venv_of_its_own(go: ModuleType, machinery: Machinery, monkeypatch: Patch) -> None:
    go.prepare([])
    machinery.calls.clear()
    monkeypatch.setattr(go, "PYTHON_VERSION", "3.99")
    go.prepare([])
    assert machinery.count("venv --clear") == 1


def test_a_moved_clone_gets_a_new_venv(go: ModuleType, machinery: Machinery) -> None:
    go.prepare([])
    stamp = go.STAMP.read_text(encoding="utf-8")
    go.STAMP.write_text(stamp.replace(go.HERE.name, "elsewhere"), encoding="utf-8")
    machinery.calls.clear()
    go.prepare([])
    assert machinery.count("venv --clear") == 1


def test_a_venv_whose_python_is_gone_is_made_anew(go: ModuleType, machinery: Machinery) -> None:
    go.prepare([])
    go.PYTHON.unlink()
    machinery.calls.clear()
    go.prepare([])
    assert machinery.count("venv --clear") == 1


@pytest.mark.parametrize("moment", ["venv --clear", "setuptools", "torch==", "--editable"])
def test_an_interrupted_install_is_carried_on(go: ModuleType, machinery: Machinery, moment: str) -> None:
    machinery.interrupted = moment
    assert go.main(["train"]) == 130
    assert go.read_stamp() == {}
    machinery.interrupted = ""
    go.prepare([])
    assert machinery.count("--editable") == 1 + (moment == "--editable")
    assert go.covers(go.read_stamp(), go.describe_install([]))


def test_what_pip_left_half_done_is_removed(go: ModuleType, machinery: Machinery) -> None:
    go.make_venv()
    whole, half, leftover = (go.SITE_PACKAGES / name for name in ("a-1.dist-info", "b-1.dist-info", "~c"))
    Machinery.make(whole / "INSTALLER")
    Machinery.make(half / "METADATA")
    leftover.mkdir()
    go.prepare([])
    assert {path.name for path in go.SITE_PACKAGES.iterdir()} == {"pip-1.dist-info", whole.name}


def test_a_pytorch_that_is_there_is_kept(go: ModuleType, machinery: Machinery) -> None:
    Machinery.make(go.SITE_PACKAGES / "torch-2.13.0+cu130.dist-info" / "INSTALLER")
    go.install_torch()
    assert machinery.calls == []


# What goes wrong


@pytest.mark.parametrize("module", ["venv", "ensurepip"])
def test_a_missing_module_gets_a_sentence(go: ModuleType, monkeypatch: Patch, capsys: Capture, module: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    said = sentence_of(go, ["train"], capsys)
    assert f"no module {module}" in said
    assert "python3-venv" in said


@pytest.mark.parametrize("step", ["setuptools", "torch==", "--editable"])
def test_a_failing_pip_gets_its_words_and_a_sentence(
    go: ModuleType, machinery: Machinery, capsys: Capture, step: str
) -> None:
    machinery.failing = step
    said = sentence_of(go, ["train"], capsys)
    assert "ERROR: no such thing" in said
    assert "pip could not install what Quire needs" in said
    assert go.read_stamp() == {}


def test_a_venv_that_cannot_be_made_gets_a_sentence(go: ModuleType, machinery: Machinery, capsys: Capture) -> None:
    machinery.failing = "venv --clear"
    assert "could not make" in sentence_of(go, ["train"], capsys)


# The commands


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_both_commands(go: ModuleType, capsys: Capture, arguments: list[str]) -> None:
    assert go.main(arguments) == 0
    said = capsys.readouterr().out
    assert "go.py train" in said
    assert "go.py test" in said


def test_an_unknown_command_gets_a_sentence(go: ModuleType, capsys: Capture) -> None:
    assert "train and test, not 'trian'" in sentence_of(go, ["trian"], capsys)


def test_train_hands_its_arguments_to_quire(go: ModuleType, machinery: Machinery, monkeypatch: Patch) -> None:
    commands = []
    monkeypatch.setattr(go, "become", lambda command: commands.append(command) or 0)
    assert go.main(["train", "my novel.txt", "--minutes", "2"]) == 0
    assert commands == [[str(go.QUIRE), "train", "my novel.txt", "--minutes", "2"]]


def test_nothing_is_said_on_standard_output_before_training(
    go: ModuleType, machinery: Machinery, monkeypatch: Patch, capsys: Capture
) -> None:
    """`go.py train --json` gives one JSON object there, and quire writes it."""
    monkeypatch.setattr(go, "become", lambda command: 0)
    go.main(["train", "--json"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0, 0), 0), ((1, 0, 0), 1), ((0, 2, 0), 2), ((0, 0, 5), 5), ((1, 2, 3), 1)]
)
@pytest.mark.parametrize("cores", [1, 4])
def test_test_runs_every_check_and_fails_if_one_does(
    go: ModuleType, machinery: Machinery, monkeypatch: Patch, codes: tuple, expected: int, cores: int
) -> None:
    ran = []

    def call(command: list[str], **_: object) -> int:
        ran.append(command[2:])
        return codes[len(ran) - 1]

    monkeypatch.setattr(subprocess, "call", call)
    monkeypatch.setattr(go, "count_cores", lambda: cores)
    assert go.main(["test", "tests/test_go.py"]) == expected
    assert [command[0] for command in ran] == ["ruff", "mypy", "pytest"]
    assert ran[-1] == ["pytest", "-q", *(["-n", "2"] if cores > 1 else []), "tests/test_go.py"]


def test_the_paths_are_those_of_a_venv(go: ModuleType) -> None:
    """The oracle: a real environment, without pip, and what its own Python says of itself."""
    venv.create(go.VENV)
    answer = subprocess.run(
        [
            go.PYTHON,
            "-I",
            "-c",
            "import sysconfig; print(sysconfig.get_path('scripts'), sysconfig.get_path('purelib'))",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert answer.stdout.strip() == f"{go.SCRIPTS} {go.SITE_PACKAGES}"
    assert go.QUIRE.parent == go.SCRIPTS
    assert not go.venv_works()  # it has no pip yet
    Machinery.make(go.SITE_PACKAGES / "pip-1.dist-info" / "INSTALLER")
    assert go.venv_works()
