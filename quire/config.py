"""One configuration: dataclasses are the source, TOML spells them, and flags are generated from them.

A run's config.toml ends in a comment that carries the CRC-32 of what stands before it.
"""

import dataclasses
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar

from quire import files
from quire.errors import UserError, choose, nearest

Table = dict[str, Any]
T = TypeVar("T")

PRESETS: dict[str, Path] = {path.stem: path for path in sorted((Path(__file__).parent / "presets").glob("*.toml"))}

_CHECKSUM = "# crc32 "


def preset(name: str) -> Table:
    """The partial configuration of that name."""
    return read_toml(PRESETS[choose("The preset", name, list(PRESETS))])


def merged(base: Table, over: Table) -> Table:
    """`base` with the entries of `over` in their place, table by table."""
    result = dict(base)
    for key, value in over.items():
        both_tables = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both_tables else value
    return result


def to_table(settings: Any) -> Table:
    """A settings dataclass as a table for TOML or JSON, every field spelled out."""
    return {
        field.name: list(value) if isinstance(value := getattr(settings, field.name), tuple) else value
        for field in dataclasses.fields(settings)
    }


def from_table(kind: type[T], table: Table, where: str) -> T:
    """Build the settings dataclass `kind` from a table; `where` names the table in error messages.

    An unknown key is a UserError that names the nearest right one; a value of the wrong type says what is wanted.
    """
    hints = typing.get_type_hints(kind)
    for key, value in table.items():
        if key not in hints or typing.get_origin(hints[key]) is typing.ClassVar:
            raise UserError(f"{where} has no setting {key!r}.{nearest(key, list(hints))}")
        if not _fits(value, hints[key]):
            raise UserError(f"{where}.{key} must be {_wanted(hints[key])}, not {value!r}.")
    tuples = {key: tuple(value) for key, value in table.items() if isinstance(value, list)}
    floats = {key: float(value) for key, value in table.items() if hints[key] is float}
    return kind(**{**table, **tuples, **floats})


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return value in typing.get_args(hint)
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_fits(item, typing.get_args(hint)[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict)
    if origin in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _wanted(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes"}
    names[tuple[str, ...]] = "a list of texts in quotes"
    return names.get(hint, "a list of tables")


def read_toml(path: Path) -> Table:
    """The tables of a TOML file; a mistake in it is a UserError with the file and the line."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"There is no configuration file {path}.") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as TOML: {error}.") from error


def write_checked_toml(path: Path, table: Table) -> None:
    """Write a run's configuration with its checksum as the last line."""
    import tomli_w

    text = tomli_w.dumps(table)
    files.write_text(path, text + _CHECKSUM + files.crc32(text.encode()) + "\n")


def read_checked_toml(path: Path) -> Table:
    """Read what `write_checked_toml` wrote; any change since is a UserError."""
    raw = path.read_bytes()
    text, _, checksum = raw.rpartition(_CHECKSUM.encode())
    if checksum != f"{files.crc32(text)}\n".encode():
        raise UserError(
            f"{path} does not match its checksum: it was edited or damaged. A run's settings are fixed;"
            f" to train with other ones start a new run: quire train TEXT --config {path}"
        )
    return read_toml(path)
