"""Tokenizers: text to ids and back. To add one: a file, and a line here."""

from pathlib import Path

from quire import files
from quire.errors import UserError, choose
from quire.tokenizers.character import CharacterTokenizer
from quire.tokenizers.tokenizer import Tokenizer

TOKENIZERS: dict[str, type[Tokenizer]] = {"character": CharacterTokenizer}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a run directory, or of a tokenizer.json."""
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"There is no tokenizer at {path}: give a run directory or a tokenizer.json.")
    table = files.read_json(file)
    kind = choose(f"The tokenizer kind in {file}", str(table.get("kind")), list(TOKENIZERS))
    return TOKENIZERS[kind].from_table(table)
