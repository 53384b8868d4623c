"""Texts from the Hugging Face hub: hf:OWNER/NAME, with ?config=C&split=S&field=F&revision=R where these are needed."""

import hashlib
import re
import urllib.parse
from collections.abc import Iterator
from typing import Any

from quire.data.download import check_first
from quire.errors import UserError, nearest
from quire.sources.transfer import Progress

OPTIONS = ["config", "split", "field", "revision"]


def is_hub(text: str) -> bool:
    """Whether a TEXT argument names a dataset of the hub."""
    return text.startswith("hf:")


def hub_documents(
    text: str, field: str, on_bytes: Progress | None = None, called: str = ""
) -> tuple[dict[str, Any], Iterator[str]]:
    """The origin of `hf:OWNER/NAME?...` and its documents, one for each row, as they stream in; nothing is kept.

    The split is `train`, and the text in `field`, unless the name says otherwise. The sha256 and bytes of the origin
    are those of the documents (each as UTF-8, for the sha256 with its length before it), there once the last has been
    given; its path is `text`, or what that is `called` here. The sha256 is recorded at the first reading, and checked
    from then on.
    Raises UserError, at once or while streaming, for what cannot be had. Nothing of the dataset is run.
    """
    name, options = _parsed(text)
    origin: dict[str, Any] = {"path": called or text}
    return origin, _stream(text, name, options, options.pop("field", field), origin, on_bytes)


def _parsed(text: str) -> tuple[str, dict[str, str]]:
    name, _, query = text.removeprefix("hf:").partition("?")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ".." in name:
        raise UserError(f"{text!r} names no dataset of the Hugging Face hub. Say hf:OWNER/NAME, as in its address.")
    options = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    for key in options:
        if key not in OPTIONS:
            raise UserError(f"{text}: {key!r} is not an option.{nearest(key, OPTIONS)} Choices: {', '.join(OPTIONS)}.")
    return name, options


def _stream(
    text: str, name: str, options: dict[str, str], field: str, origin: dict[str, Any], on_bytes: Progress | None
) -> Iterator[str]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"Reading {text} needs the library datasets: pip install datasets") from error
    digest, size, told = hashlib.sha256(), 0, 0
    for row in _rows(datasets, text, name, options, field):
        if field not in row:
            there = ", ".join(row) or "none"
            raise UserError(f"{text} has no field {field!r} (there: {there}). Say {_with(text, 'field=NAME')}.")
        document = row[field]
        if document is None:
            continue
        if not isinstance(document, str):
            raise UserError(f"{text}: the field {field!r} is not a string. Say {_with(text, 'field=NAME')}.")
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
        size += len(data)
        if on_bytes and size - told >= 1 << 18:
            on_bytes(size, None)
            told = size
        yield document
    origin.update(sha256=digest.hexdigest(), bytes=size)
    check_first(f"{text} ({field})", digest.hexdigest())


def _rows(datasets: Any, text: str, name: str, options: dict[str, str], field: str) -> Iterator[dict[str, Any]]:
    """The rows; whatever goes wrong inside the library, which has errors of many kinds, becomes a sentence."""
    try:
        found = datasets.load_dataset(
            name,
            options.get("config"),
            split=options.get("split", "train"),
            revision=options.get("revision"),
            streaming=True,
        )
        if field in (found.column_names or []):
            found = found.select_columns([field])  # the others need not be fetched, nor images decoded
        yield from found
    except GeneratorExit:
        raise
    except Exception as error:
        problem = " ".join(str(error).split())[:400].rstrip(". ") or type(error).__name__
        raise UserError(
            f"{text} could not be read from the Hugging Face hub: {problem}."
            f" Check its name, its ?config= and ?split=, and that this machine is online."
        ) from error


def _with(text: str, option: str) -> str:
    return f"{text}{'&' if '?' in text else '?'}{option}"
