"""What is written about a layer where it is written: its equation, its code forward and backward, its derivation."""

import inspect
import os
import textwrap
from collections.abc import Iterator
from types import FunctionType

from quire.layers.activations import Curve
from quire.layers.layer import Block, Layer


def equation(kind: type[Layer]) -> str:
    """The first line of the class's docstring; '' where it has none."""
    return (inspect.getdoc(kind) or "").partition("\n")[0]


def derivation(kind: type[Layer]) -> str:
    """The comments in its backward that stand on lines of their own, and in what that calls."""
    lines = [line.strip() for line in code(kind, "backward").splitlines()]
    return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))


def code(kind: type[Layer], method: str) -> str:
    """The source of a method, and of its class's other methods and its module's functions that it calls.

    A curve makes its slope in forward, where value and slope have much in common: `trace` is of both.
    """
    functions = called(kind, method)
    if method == "backward" and issubclass(kind, Curve):
        functions += called(kind, "trace")
    return "\n".join(filter(None, map(source, functions)))


def places(kind: type[Layer]) -> list[tuple[str, str]]:
    """Where its backward stands, and what only that calls: names, each with FILE:LINE."""
    forward = called(kind, "forward")
    return [
        (function.__qualname__, f"{near(function.__code__.co_filename)}:{function.__code__.co_firstlineno}")
        for function in called(kind, "backward")
        if function not in forward
    ]


def source(function: FunctionType) -> str:
    """A function's source, as far to the left as it goes; '' where there is no file, as of one typed in."""
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return ""


def called(kind: type[Layer], method: str) -> list[FunctionType]:
    """A method, and by way of it the methods of its class and the functions of its module that it names, in order."""
    found: dict[FunctionType, None] = {}

    def follow(function: FunctionType) -> None:
        if function in found:
            return
        found[function] = None
        for name in names(function):
            own = inspect.getattr_static(kind, name, None)
            base = inspect.getattr_static(Block, name, None)
            if isinstance(own, FunctionType) and own is not base and name not in ("forward", "backward"):
                follow(own)
            other = function.__globals__.get(name) if own is None else None
            if isinstance(other, FunctionType) and other.__module__ == function.__module__:
                follow(other)
        if "super" in names(function):
            inherited = [vars(base)[function.__name__] for base in kind.__mro__ if function.__name__ in vars(base)]
            after = inherited[inherited.index(function) + 1 :]
            if after and isinstance(after[0], FunctionType):
                follow(after[0])

    start = inspect.getattr_static(kind, method)
    if isinstance(start, FunctionType):
        follow(start)
    return list(found)


def names(function: FunctionType) -> Iterator[str]:
    """What a function's code names, functions within it too."""
    waiting = [function.__code__]
    while waiting:
        body = waiting.pop(0)
        yield from body.co_names
        waiting += [part for part in body.co_consts if inspect.iscode(part)]


def near(file: str) -> str:
    """A path from the working directory, where it is below that."""
    try:
        relative = os.path.relpath(file)
    except ValueError:  # on Windows: another drive
        return file
    return file if relative.startswith("..") else relative
