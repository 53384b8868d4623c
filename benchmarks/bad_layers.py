"""The bad-layer drill: break each backward pass in every small way, and see whether the checker names that layer.

    python benchmarks/bad_layers.py [--json OUT]

Every gradient written by hand in quire/layers and quire/models is taken as source: the methods `backward`, `step_back`,
`undo_add` and `trace`, and what only they call. One at a time, each sum becomes a difference and each difference a sum
(in place too), each unary minus is dropped, each value returned and each gradient handed on (to add_grad, or to the
backward of a layer within) is negated. The broken method is put in place, and `quire gradients` steps through every
small model below that runs through that line. It must name that layer, and no other one. Prints a table and writes
JSON; exits with 1 if a broken layer was missed or another one was blamed.
"""

import argparse
import ast
import copy
import inspect
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor

from quire.inspection.gradients import WRONG, Pass, walk
from quire.layers.attention import ScaledDotProductAttention
from quire.layers.cross_entropy import IGNORED
from quire.models import MODELS, build_model

ROOT = Path(__file__).resolve().parents[1]
GRADIENTS = ("backward", "step_back", "undo_add", "trace")  # methods that are a gradient by name
HANDED = {"add_grad": 1, "add_product": 1, "index_add_": 2, "scatter_add_": 2, "backward": 0, "undo": 0}
# calls, and which of their arguments is a gradient, or a part of one
OPPOSITE = {"add_": "sub_", "sub_": "add_", "add": "sub", "sub": "add"}
PRODUCTS = ("addcmul", "addcmul_")  # a + value b c
LEFT_OUT = (
    "layers/layer.py",  # the base: its `undo` does not run here, where no block is recomputed
    "layers/fixed_linear.py",  # its backward refuses
    "layers/head_loss.py",  # nor this, where head and loss are looked at one by one
)

# A curve's value and slope are made together. Where both are broken the forward pass is another one too, and the layers
# around the curve, which are compared with the right one, are named beside it.
VALUE_TOO = {
    ("GELU.trace", "(x * math.sqrt(0.5)).erf_().add_(1) -> (x * math.sqrt(0.5)).erf_().sub_(1)"),
    ("TanhGELU.trace", "(x * a).addcmul_(x, x.square(), value=0.044715 * a) -> "
                       "(x * a).addcmul_(x, x.square(), value=-(0.044715 * a))"),
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One way to break one gradient: the broken module, and where in it the function is."""

    file: str  # below quire/
    owner: str  # class, or "" for a function of the module
    function: str
    lines: range  # of the statement
    what: str  # before -> after
    broken: ast.Module = field(repr=False, compare=False)  # with nothing else in it

    @property
    def name(self) -> str:
        """Class and method."""
        return f"{self.owner}.{self.function}".lstrip(".")

    def original(self) -> FunctionType:
        """The function as it is."""
        module = import_module("quire." + self.file.removesuffix(".py").replace("/", "."))
        return vars(getattr(module, self.owner))[self.function] if self.owner else getattr(module, self.function)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this block, Quire has the broken function."""
        function = self.original()
        code = compile(self.broken, str(ROOT / "quire" / self.file), "exec")
        for name in filter(None, (self.owner, self.function)):
            code = next(part for part in code.co_consts if isinstance(part, CodeType) and part.co_name == name)
        before, function.__code__ = function.__code__, code
        try:
            yield
        finally:
            function.__code__ = before


# ---- breaking ----


def mutants() -> list[Mutant]:
    """Every mutant of every gradient."""
    found = []
    for file, tree in sources().items():
        for owner, function in gradients_in(tree):
            found += list(broken(file, owner, function))
    return found


def gradients() -> list[tuple[str, str, str]]:
    """Every gradient: file, class and method."""
    return [(file, owner, function.name) for file, tree in sources().items() for owner, function in gradients_in(tree)]


def sources() -> dict[str, ast.Module]:
    """The files that have layers, by their paths below quire/."""
    paths = sorted([*(ROOT / "quire/layers").glob("*.py"), *(ROOT / "quire/models").glob("*.py")])
    found = {path.relative_to(ROOT / "quire").as_posix(): path for path in paths}
    return {file: ast.parse(path.read_text(encoding="utf-8")) for file, path in found.items() if file not in LEFT_OUT}


def gradients_in(tree: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    """The functions of a module that are gradients, or are called by gradients alone."""
    functions = [("", node) for node in tree.body if isinstance(node, ast.FunctionDef)]
    for kind in tree.body:
        if isinstance(kind, ast.ClassDef):
            functions += [(kind.name, node) for node in kind.body if isinstance(node, ast.FunctionDef)]
    callers: dict[str, set[str]] = {}
    for _, function in functions:
        for node in ast.walk(function):
            named = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if named != function.name:
                callers.setdefault(named, set()).add(function.name)
    names = set(GRADIENTS)
    while more := {f.name for _, f in functions if callers.get(f.name) and callers[f.name] <= names} - names:
        names |= more
    return [(owner, function) for owner, function in functions if function.name in names]


def broken(file: str, owner: str, function: ast.FunctionDef) -> Iterator[Mutant]:
    """Every mutant of one function."""
    smallest = statements(function)
    for number, node in enumerate(ast.walk(function)):
        for change in changes(node):
            twin = copy.deepcopy(function)
            target: Any = list(ast.walk(twin))[number]
            before = ast.unparse(target)
            change(target)
            body: list[ast.stmt] = [twin]
            if owner:
                body = [ast.ClassDef(owner, bases=[], keywords=[], body=[twin], decorator_list=[])]
            module = ast.fix_missing_locations(ast.Module(body, type_ignores=[]))
            statement = next(s for s in smallest if node in ast.walk(s))
            lines = range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
            yield Mutant(file, owner, function.name, lines, f"{before} -> {ast.unparse(target)}", module)


def statements(function: ast.FunctionDef) -> list[ast.stmt]:
    """The statements of a function, the smallest first."""
    found = [node for node in ast.walk(function) if isinstance(node, ast.stmt)]
    return sorted(found, key=lambda node: (node.end_lineno or node.lineno) - node.lineno)


def changes(node: ast.AST) -> Iterator[Callable[[Any], None]]:
    """What can be done to one node of a function, each as a function that does it."""
    flipped = {ast.Add: ast.Sub, ast.Sub: ast.Add}
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and type(node.op) in flipped:
        yield lambda node: setattr(node, "op", flipped[type(node.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield lambda node: setattr(node, "op", ast.UAdd())
    if isinstance(node, ast.Return) and node.value is not None:
        for path in values(node.value):
            yield lambda node, path=path: negate(node, "value", path)
    if isinstance(node, ast.Call):
        called = ast.unparse(node.func).split(".")[-1]
        if called in HANDED and len(node.args) > HANDED[called]:
            place = HANDED[called]
            yield lambda node: node.args.__setitem__(place, ast.UnaryOp(ast.USub(), node.args[place]))
        if isinstance(node.func, ast.Attribute) and called in OPPOSITE:
            yield lambda node: setattr(node.func, "attr", OPPOSITE[called])
        if called in PRODUCTS and not any(isinstance(word.value, ast.UnaryOp) for word in node.keywords):
            yield subtract_product


def subtract_product(node: Any) -> None:
    """Turn the sign of what a call of PRODUCTS adds."""
    word = next((word for word in node.keywords if word.arg == "value"), None)
    if word is None:
        word = ast.keyword("value", ast.Constant(1))
        node.keywords.append(word)
    word.value = ast.UnaryOp(ast.USub(), word.value)


def values(node: ast.expr, path: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
    """Where in a returned value its parts are: those of tuples each, but for zeros, which have no sign."""
    if isinstance(node, ast.Tuple):
        for number, part in enumerate(node.elts):
            yield from values(part, (*path, number))
    elif not (isinstance(node, ast.Constant) and not node.value):
        yield path


def negate(node: Any, name: str, path: tuple[int, ...]) -> None:
    """Put a minus before one part of a returned value."""
    if not path:
        setattr(node, name, ast.UnaryOp(ast.USub(), getattr(node, name)))
        return
    holder = getattr(node, name)
    for number in path[:-1]:
        holder = holder.elts[number]
    holder.elts[path[-1]] = ast.UnaryOp(ast.USub(), holder.elts[path[-1]])


# ---- small models of every layer ----


@dataclass
class Trial:
    """A model with what it is called with, and the lines of Quire's gradients that its backward pass runs through."""

    name: str
    model: Any
    arguments: dict[str, Tensor]
    lines: set[tuple[str, int]] = field(default_factory=set)
    calls: int = 0

    def pass_(self) -> Pass:
        """What the checker finds."""
        return walk(self.model, self.arguments)

    def learn_lines(self) -> None:
        """Step through once, watched line by line; everything must agree."""

        def calls(frame: FrameType, event: str, value: Any) -> Any:
            file = frame.f_code.co_filename.replace("\\", "/")
            if "/quire/layers/" in file or "/quire/models/" in file:
                return lambda frame, event, value: self.lines.add((file, frame.f_lineno))
            return None

        before = sys.gettrace()
        sys.settrace(calls)
        try:
            found = self.pass_()
        finally:
            sys.settrace(before)
        self.calls = len(found.calls)
        assert not found.wrong, f"{self.name}: {[call.name for call in found.wrong]}"

    def runs(self, mutant: Mutant) -> bool:
        """Whether its backward pass comes through the mutant's line."""
        file = f"/quire/{mutant.file}"
        return any(name.endswith(file) and line in mutant.lines for name, line in self.lines)


def trials() -> list[Trial]:
    """Models that run every line of every gradient, the smallest first."""
    from quire.layers.activations import ACTIVATIONS

    made = []
    decoder = {"embedding_size": 8, "layers": 1, "heads": 2, "feedforward_size": 6, "dropout": 0.2}
    for name, cell in [("rnn", "rnn"), ("lstm", "lstm"), ("gru", "gru")]:
        made.append(trial(f"recurrent {name}", "recurrent", {"cell": cell, "embedding_size": 8, "layers": 1}))
        documents = {"cell": cell, "embedding_size": 8, "layers": 1, "separate_documents": True}
        made.append(trial(f"recurrent {name}, documents and padding", "recurrent", documents, padded=True))
    for name in ACTIVATIONS:
        made.append(stack(name, {"kind": name}))
    for kind in ("layernorm", "rmsnorm", "positional-embedding", "sinusoidal-positions"):
        made.append(stack(kind, {"kind": kind}))
    made.append(stack("positions of padded rows", {"kind": "positional-embedding"}, padded=True))
    made.append(stack("dropout", {"kind": "dropout", "probability": 0.3}))
    made.append(stack("dense", {"kind": "dense", "activation": "silu", "normalization": "layernorm", "dropout": 0.2}))
    made.append(stack("dense, no curve", {"kind": "dense", "residual": True}))
    for activation in ("gelu", "swiglu"):
        made.append(stack(activation + " feedforward", {"kind": "feedforward", "activation": activation, "bias": True,
                                                        "residual": True, "dropout": 0.2}))  # fmt: skip
    made.append(stack("attention", {"kind": "attention", "heads": 2, "kv_heads": 1, "rotary": True, "qk_norm": True,
                                    "dropout": 0.2}))  # fmt: skip
    made.append(stack("plain attention", {"kind": "attention", "heads": 2, "bias": True}))
    made.append(trial("gpt", "gpt", {**decoder, "positions": "learned"}))
    made.append(trial("gpt, padded rows", "gpt", {**decoder, "positions": "learned"}, padded=True))
    made.append(trial("gpt after Vaswani", "gpt", {**decoder, "positions": "sinusoidal", "norm_placement": "post"}))
    made.append(trial("gpt of a large vocabulary", "gpt", {**decoder, "vocabulary_size": 1030}))
    made.append(trial("modern", "modern", {**decoder, "kv_heads": 1, "qk_norm": True, "tied": False}))
    for name, sparse in (("sparse", True), ("dense", False)):
        tables = {**decoder, "ngram_orders": (2, 3), "ngram_rows": 16, "ngram_dropout": 0.2}
        made.append(trial(f"ngram, {name} gradients", "ngram", tables))
        made[-1].model.ngram_embedding.sparse = sparse
    made.append(trial("sparse", "sparse", {**decoder, "window": 2, "layers": 2}))
    for placement in ("post", "pre"):
        shape = {**decoder, "norm_placement": placement, "label_smoothing": 0.1}
        made.append(trial(f"encoder-decoder, {placement}", "encoder-decoder", shape))
    for each in made:
        each.learn_lines()
    return sorted(made, key=lambda each: each.calls)


def stack(name: str, layer: dict[str, Any], padded: bool = False) -> Trial:
    """A model of one layer between an embedding and the head."""
    return trial(f"stack: {name}", "stack", {"stack": ({"kind": "embedding", "size": 8}, layer)}, padded)


def trial(name: str, kind: str, shape: dict[str, Any], padded: bool = False) -> Trial:
    """A small model in float64 whose weights are random numbers large enough to matter; `padded`: on padded rows."""
    rows, length, vocabulary = 2, 5, shape.pop("vocabulary_size", 7) if "vocabulary_size" in shape else 7
    settings = MODELS[kind].Settings(
        kind=kind, vocabulary_size=vocabulary, context_length=8, separator=0, **shape
    )  # fmt: skip
    model = build_model(settings).double()
    for module in model.modules():
        if isinstance(module, ScaledDotProductAttention):
            module.QUERIES = 2  # so that its gradient takes more than one turn
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 2
    ids = torch.randint(1, vocabulary, (rows if padded else 1, length + 1), generator=generator)
    ids[:, 2] = 0  # a document begins
    arguments = {"tokens": ids[:, :-1], "targets": ids[:, 1:].clone()}
    arguments["targets"][0, 1] = IGNORED
    if padded:
        arguments["mask"] = torch.ones(rows, length, dtype=torch.bool)
        arguments["mask"][1, [0, 3]] = False  # before the text and within it
    if settings.reads_source:
        arguments["source"] = torch.randint(1, vocabulary, (1, 4), generator=generator)
    return Trial(name, model, arguments)


# ---- the drill ----


def verdict(mutant: Mutant, trial: Trial) -> str:
    """What the checker says of a broken layer in a model: "named", "missed", or whom it blamed instead."""
    with mutant.in_place():
        found = trial.pass_()
    blamed = {call.kind for call in found.calls if call.verdict == WRONG}
    if not blamed:
        return "missed"
    owners = {kind for kind in blamed if mutant.owner in {base.__name__ for base in inspect.getmro(kind)}}
    innocent = sorted(kind.__name__ for kind in blamed - owners) if mutant.owner else []
    if owners and (mutant.name, mutant.what) in VALUE_TOO:
        innocent = []
    return "named" if not innocent else "blamed " + ", ".join(innocent)


def main() -> int:
    """Break everything, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "bad_layers.json")
    given = parser.parse_args()
    began = time.perf_counter()
    models, every = trials(), mutants()
    rows, faults = [], []
    counts: dict[str, Counter[str]] = {}
    for mutant in every:
        seen = {trial.name: verdict(mutant, trial) for trial in models if trial.runs(mutant)}
        named = sum(each == "named" for each in seen.values())
        blamed = [f"{name}: {each}" for name, each in seen.items() if each.startswith("blamed")]
        count = counts.setdefault(mutant.name, Counter())
        count.update(mutants=1, named=bool(named and not blamed), models=len(seen), times=named)
        if blamed or not named:
            faults.append(f"{mutant.name}, line {mutant.lines[0]}: {mutant.what}: {blamed or seen or 'never run'}")
        rows.append({"layer": mutant.name, "line": mutant.lines[0], "what": mutant.what, "seen": seen})
    print(f"{'gradient':40} mutants named   in models, of which it showed")
    for name, count in counts.items():
        print(f"{name:40} {count['mutants']:7} {count['named']:5} {count['models']:11}"
              f" {count['times']:10}")  # fmt: skip
    total = Counter()
    for count in counts.values():
        total += count
    print(f"{total['mutants']} mutants of {len(counts)} gradients: {total['named']} named, {len(faults)} not,"
          f" in {time.perf_counter() - began:.0f} s")  # fmt: skip
    print(*faults, sep="\n")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"torch": torch.__version__, "models": [m.name for m in models],
                                      "mutants": rows}, indent=1) + "\n")  # fmt: skip
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
