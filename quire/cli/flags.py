"""Flags are generated from dataclasses: a field's comment is its help."""

import contextlib
import io
import json
import os
import shutil
import sys
from typing import Annotated, Any, TypeVar

import tyro

from quire import processes
from quire.errors import UserError

T = TypeVar("T")

Texts = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="[TEXT ...]", help_behavior_hint="")]]
RunPath = tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
Switch = tyro.conf.FlagCreatePairsOff[bool]  # --flag, without a --no-flag beside it


def parse(kind: type[T], words: list[str], command: str, default: T | None = None) -> T:
    """The command's flags as an instance of the dataclass `kind`; mistakes and --help end the program, 2 and 0.

    A UserError of a settings class is raised as it is; tyro would catch it, and draw a box around its sentence.
    """
    given = {} if default is None else {"default": default}
    boxes = io.StringIO()
    try:
        with contextlib.redirect_stderr(boxes):
            return tyro.cli(kind, prog=f"quire {command}", args=words, use_underscores=False, **given)  # type: ignore[call-overload]
    except SystemExit as end:
        cause = end.__context__
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause from None
            cause = cause.__context__
        if processes.leads():
            sys.stderr.write(boxes.getvalue())
        raise


def value_of(words: list[str], flag: str) -> str | None:
    """The value of `--flag V` or `--flag=V` in a command line before it is parsed; the last one counts."""
    found = None
    for index, word in enumerate(words):
        if word == flag and index + 1 < len(words):
            found = words[index + 1]
        elif word.startswith(f"{flag}="):
            found = word[len(flag) + 1 :]
    return found


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on standard output; numbers that JSON lacks (infinity) become null."""
    print(json.dumps({key: None if item == float("inf") else item for key, item in value.items()}))


def program() -> str:
    """How the user can call Quire from here: `quire`, or the path of this very program where that is not found."""
    name = os.path.basename(sys.argv[0])
    if shutil.which("quire") or name.removesuffix(".exe") != "quire":
        return "quire"
    return os.path.relpath(sys.argv[0])
