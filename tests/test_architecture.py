"""What DESIGN.md says of the house, checked on the source itself."""

import ast
import dataclasses
import importlib
import inspect
import io
import re
import subprocess
import tokenize
import urllib.parse
from pathlib import Path

import pytest

import quire
from quire.data.reading import DataSettings
from quire.generation.generate import GenerationSettings
from quire.models import MODELS
from quire.sources.index import index_addresses
from quire.training.settings import TrainingSettings

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "quire").rglob("*.py"))
CODE = [*SOURCES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py")), ROOT / "go.py"]

# DESIGN.md, section 2: imports go from the top of this list to the bottom.
ORDER = [
    "__main__", "cli", "server", "interop", "compression", "planning", "inspection", "training", "evaluation",
    "generation", "plots", "run", "checkpoint", "models", "data", "layers", "tokenizers", "sources", "progress",
    "config", "files", "devices", "processes", "errors",
]  # fmt: skip

# Slow to import, and not needed by everyone: only inside functions.
LAZY = {
    "matplotlib", "charset_normalizer", "transformers", "rich", "filelock", "tomli_w", "safetensors", "pyarrow",
    "datasets", "gguf", "lightning", "onnx", "onnxruntime", "onnxscript", "fsspec", "aiohttp",
}  # fmt: skip


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imports(path: Path) -> list[tuple[int, str, bool]]:
    """Every import of a file, also inside functions: line, full name of the module, whether at the top level."""
    tree = parsed(path)
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names:  # `from quire import files` names a module, `from quire.files import x` does too
                name = f"{node.module}.{alias.name}" if node.module == "quire" else str(node.module)
                found.append((node.lineno, name, id(node) in top))
    return found


def part(module: str) -> str:
    """The part of the house a module belongs to: quire.data.reading is in data."""
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    own = path.relative_to(ROOT / "quire").with_suffix("").parts[0]
    if own == "__init__":
        return  # the face: it names everything, lazily
    assert own in ORDER, f"{own} has no place in the order: see DESIGN.md, section 2"
    for line, name, _ in imports(path):
        target = part(name) if name.split(".")[0] == "quire" else ""
        if target in ("", "__version__", own):
            continue
        assert target in ORDER, f"{path}:{line}: {name} has no place in the order"
        assert ORDER.index(target) > ORDER.index(own), f"{path}:{line}: {own} imports {target}, which stands above it"


def test_the_order_names_every_part_there_is() -> None:
    there = {path.relative_to(ROOT / "quire").with_suffix("").parts[0] for path in SOURCES} - {"__init__"}
    assert there <= set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_slow_is_imported_only_where_it_is_used(path: Path) -> None:
    for line, name, top in imports(path):
        package = name.split(".")[0]
        derived = package == "lightning" == path.stem.split("_")[0]  # their classes are made of Lightning's
        assert derived or not (top and package in LAZY), f"{path}:{line}: import {name} inside the function"


def test_no_file_over_400_lines() -> None:
    long = {str(path): n for path in CODE if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def test_nothing_is_called_utils() -> None:
    assert not [path for path in CODE if re.search(r"util|helper|misc|common", path.stem)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_that_runs_foreign_code_or_hides_errors(path: Path) -> None:
    assert not {"pickle", "shelve", "marshal", "dill"} & {name.split(".")[0] for _, name, _ in imports(path)}
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "compile", "torch.load", "torch.save", "os.system"), (
                f"{path}: {called}"
            )
            shell = [word for word in node.keywords if word.arg in ("shell", "allow_pickle")]
            assert not shell, f"{path}:{node.lineno}: {shell[0].arg}"
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path}:{node.lineno}: a bare except"
            passes = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            broad = ast.unparse(node.type) in ("Exception", "BaseException")
            assert not (passes and broad), f"{path}:{node.lineno}: swallows every error"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_public_is_documented(path: Path) -> None:
    """Every module, every public class and function, and of methods that several classes of a file have at least one;
    methods that a base class declares (forward and backward of a layer, a tokenizer's encode) are described there."""
    tree = parsed(path)
    if not tree.body:
        return  # an empty __init__.py
    assert ast.get_docstring(tree), f"{path} has no docstring"
    described = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and ast.get_docstring(node)}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}:{node.lineno}: {node.name} has no docstring"
        if isinstance(node, ast.ClassDef) and not node.bases and not node.name.startswith("_"):
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
                    assert method.name in described, f"{path}:{method.lineno}: {node.name}.{method.name}"


@pytest.mark.parametrize("name", quire.__all__)
def test_the_face_resolves_and_is_documented(name: str) -> None:
    thing = getattr(quire, name)
    if inspect.isclass(thing) or inspect.isroutine(thing):
        assert inspect.getdoc(thing)
    else:
        assert isinstance(thing, dict) and thing, f"{name} is a table with entries"
        assert all(isinstance(key, str) for key in thing)


def test_the_face_says_no_to_other_names() -> None:
    assert set(quire.__all__) <= set(dir(quire))
    with pytest.raises(AttributeError, match="nonsense"):
        quire.nonsense  # noqa: B018


def settings_classes() -> list[type]:
    """Every dataclass from which flags are made."""
    commands = [path.stem for path in (ROOT / "quire" / "cli").glob("*.py")]
    arguments = [getattr(importlib.import_module(f"quire.cli.{name}"), "Arguments", None) for name in commands]
    models = [model.Settings for model in MODELS.values()]
    return [DataSettings, TrainingSettings, GenerationSettings, *models, *filter(None, arguments)]


@pytest.mark.parametrize("kind", settings_classes(), ids=lambda kind: f"{kind.__module__}.{kind.__name__}")
def test_every_field_has_its_help(kind: type) -> None:
    """A field's comment is its help. One that the formatter moved off the field's line is lost: shorten it."""
    for base in [base for base in kind.__mro__ if dataclasses.is_dataclass(base)]:
        comments = comment_lines(base)
        names = inspect.get_annotations(base)
        source, first = inspect.getsourcelines(base)
        for name in names:
            where = next(n for n, line in enumerate(source, first) if re.match(rf"    {name}\s*:", line))
            group = "default_factory" in source[where - first]  # a table of settings, with a docstring of its own
            assert group or where in comments, f"{base.__module__}:{where}: {base.__name__}.{name} has no comment"


def comment_lines(kind: type) -> set[int]:
    path = inspect.getsourcefile(kind)
    assert path is not None
    tokens = tokenize.generate_tokens(io.StringIO(Path(path).read_text(encoding="utf-8")).readline)
    return {token.start[0] for token in tokens if token.type == tokenize.COMMENT and len(token.string) > 4}


def test_no_index_host_and_no_path_of_this_machine() -> None:
    """Which package index to use is the user's choice; a path of someone's machine is of use to nobody else."""
    host = re.compile(re.escape(str(urllib.parse.urlsplit(index_addresses({})[0]).hostname)))  # as pip itself names it
    local = re.compile(r"(?<![\w.])/(?:home|work|Users|root|mnt)/\w+")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        path = ROOT / name
        if path == Path(__file__) or not path.is_file():
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for pattern in (host, local):
            found = pattern.search(text)
            assert found is None, f"{name}: {found and found[0]}"
