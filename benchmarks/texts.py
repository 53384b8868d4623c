"""Six texts of different kinds, for claims that must hold for more than one: novels, manuals, code, chat, a poem, wiki.

    python benchmarks/texts.py [FOLDER]

They are made here from packages and what is on this machine, and written as UTF-8 files beside texts.json, which says
of what version, with their sizes and hashes. What cannot be had is left out, with the reason.
"""

import argparse
import gzip
import hashlib
import io
import json
import lzma
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from quire.data.corpora import CORPORA
from quire.errors import UserError
from quire.sources import Source, fetch, texts

ROOT = Path(__file__).resolve().parents[1]
ENWIK8_BYTES = 5_000_000  # of enwik8, the first
SHARED = ROOT.parent / "shared" / "data"
NOT_CODE = {"test", "tests", "site-packages", "dist-packages", "idle_test", "__pycache__"}  # folders of Lib


class Missing(Exception):
    """A text that cannot be had here, and why."""


def jules_verne() -> tuple[str, str]:
    """Novels in English, 4.1 MB: the file in ../shared/data."""
    path = SHARED / "jules_verne_4M.txt"
    if not path.is_file():
        raise Missing(f"there is no {path.relative_to(ROOT.parent)} beside the repository")
    return path.read_text("utf-8"), "jules_verne_4M.txt, novels by Jules Verne in English, from itsubaki/gpt-go"


def manpages_ru() -> tuple[str, str]:
    """The manual pages of Debian's package manpages-ru, in Cyrillic letters: their roff source as it is, joined."""
    if not shutil.which("apt-get"):
        raise Missing("apt-get, which fetches Debian's package manpages-ru, is not on this machine")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # apt-get fetches as a user of its own
        done = subprocess.run(["apt-get", "download", "manpages-ru"], cwd=folder, capture_output=True, text=True)
        found = list(Path(folder).glob("manpages-ru_*.deb"))
        if done.returncode or not found:
            problem = " ".join(done.stderr.split())[-200:]
            raise Missing(f"`apt-get download manpages-ru` failed ({problem}). Say `apt-get update` first")
        package = found[0].read_bytes()
        name = found[0].name
    return "\n".join(pages(package)), f"{name} (Debian), sha256 {hashlib.sha256(package).hexdigest()}"


def pages(package: bytes) -> Iterator[str]:
    """The manual pages in a .deb, in the order of their names; links to other pages are passed over."""
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(member(package, "data.tar.xz")))) as tar:
        for entry in sorted(tar, key=lambda entry: entry.name):
            page = entry.isreg() and "/man/" in entry.name and entry.name.endswith(".gz")
            if page and (file := tar.extractfile(entry)):
                yield gzip.decompress(file.read()).decode("utf-8")


def member(archive: bytes, wanted: str) -> bytes:
    """One member of an ar archive, which a .deb is: headers of 60 bytes, the size in decimal at 48 (deb(5))."""
    at = 8  # behind "!<arch>\n"
    while at < len(archive):
        name, size = archive[at : at + 16].decode().strip().rstrip("/"), int(archive[at + 48 : at + 58])
        if name == wanted:
            return archive[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise Missing(f"Debian's package has no {wanted}")


def standard_library() -> tuple[str, str]:
    """The Python code of the running interpreter's own library, without its tests."""
    folder = Path(sysconfig.get_path("stdlib"))
    return joined(
        code(folder)
    ), f"the standard library of {platform.python_implementation()} {platform.python_version()}"


def code(folder: Path) -> Iterator[str]:
    """The .py files of a folder by their names, those that are UTF-8."""
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        if not NOT_CODE.intersection(path.relative_to(folder).parts):
            try:
                yield path.read_text("utf-8")
            except UnicodeDecodeError:
                continue


def conversations(file: IO[bytes]) -> Iterator[bytes]:
    """The conversations of one of ChatterBot's YAML files, a line for what is said by turns."""
    import yaml

    for turns in yaml.safe_load(file.read())["conversations"]:
        yield "".join(f"- {str(turn).strip()}\n" for turn in turns).encode()


CHATTERBOT = Source(
    name="chatterbot",
    package="chatterbot-corpus",
    version="1.3.3",
    filename="chatterbot_corpus-1.3.3-py2.py3-none-any.whl",
    size=345_706,
    sha256="86de5300afb9a80826386339d3bec79c0a72eb0358abb8327e2ecef5ae0ce154",
    members=("chatterbot_corpus/data/english/*.yml",),
    description="Short conversations in English by subjects.",
    licence="BSD",
    attribution="Conversations of the package chatterbot-corpus 1.3.3 (Gunther Cox, BSD).",
    extract=conversations,
)


def chat() -> tuple[str, str]:
    """The English conversations of the package chatterbot-corpus, in the order of their hashes.

    The files go by subject; mixed, the end that is held out speaks of what the rest speaks of.
    """
    try:
        import yaml  # noqa: F401
    except ImportError:
        raise Missing("reading it needs PyYAML: pip install pyyaml") from None
    spoken = sorted({text for _, text in fetch(CHATTERBOT)}, key=lambda text: hashlib.sha256(text).digest())
    return joined(text.decode() for text in spoken), f"{CHATTERBOT.filename}, sha256 {CHATTERBOT.sha256}"


def paradise_lost() -> tuple[str, str]:
    """Milton's poem, as `quire train paradise-lost` has it."""
    return of_corpus("paradise-lost")


def enwik8() -> tuple[str, str]:
    """The first five million bytes of enwik8, up to the last whole character."""
    return of_corpus("enwik8", ENWIK8_BYTES)


def of_corpus(name: str, size: int | None = None) -> tuple[str, str]:
    """A corpus that Quire knows by name, or its first bytes."""
    source = CORPORA[name]
    assert isinstance(source, Source)
    text = b"".join(text for _, text in texts(source))[:size].decode("utf-8", "ignore")
    return text, f"{source.filename}, sha256 {source.sha256}"


def joined(parts: Iterable[str]) -> str:
    """Texts with a blank line between them."""
    return "\n".join(parts)


TEXTS: dict[str, Callable[[], tuple[str, str]]] = {
    "jules-verne": jules_verne,
    "manpages-ru": manpages_ru,
    "python-library": standard_library,
    "chat": chat,
    "paradise-lost": paradise_lost,
    "enwik8": enwik8,
}


def six_texts(folder: Path, makers: dict[str, Callable[[], tuple[str, str]]] = TEXTS) -> dict[str, Path]:
    """Name -> UTF-8 file of each text that can be had, made in `folder` unless it is there; says why others are not.

    Line ends are \\n, so that every tool reads the same characters. FOLDER/texts.json says what each was made from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    list_of_them = folder / "texts.json"
    about: dict[str, Any] = json.loads(list_of_them.read_text()) if list_of_them.exists() else {}
    found = {}
    for name, make in makers.items():
        path = folder / f"{name}.txt"
        if name not in about or not path.exists():
            try:
                text, origin = make()
            except (Missing, UserError, OSError) as problem:
                print(f"{name} is left out: {problem}", file=sys.stderr)
                continue
            text = text.replace("\r\n", "\n").replace("\r", "\n")
            path.write_bytes(data := text.encode())
            about[name] = {
                "from": origin, "bytes": len(data), "characters": len(text), "symbols": len(set(text)),
                "sha256": hashlib.sha256(data).hexdigest(),
            }  # fmt: skip
            list_of_them.write_text(json.dumps(about, indent=1) + "\n")
        found[name] = path
    return found


def main() -> None:
    """Make them, and say what they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=Path(tempfile.gettempdir(), "six-texts"), help="where they go"
    )
    folder = parser.parse_args().folder
    made = six_texts(folder)
    about = json.loads((folder / "texts.json").read_text()) if made else {}
    for name in made:
        print("{0:16}{bytes:>12,} bytes {characters:>11,} characters {symbols:>6} different   {from}".format(
            name, **about[name]))  # fmt: skip


if __name__ == "__main__":
    main()
