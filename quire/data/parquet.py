"""Texts from .parquet files: a column of strings, a document each."""

from collections.abc import Iterator
from pathlib import Path

from quire.errors import UserError

ROWS = 1_000  # read at once


def parquet_documents(name: str, path: Path, column: str) -> Iterator[str]:
    """The strings of a column, row group by row group; empty cells are passed over. `name` is the file's for messages.

    Raises UserError where the file or the column cannot be read, or pyarrow is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"Reading {name} needs pyarrow: pip install pyarrow") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            if column not in schema.names:
                there = ", ".join(schema.names) or "none"
                raise UserError(f"{name} has no column {column!r} (there: {there}). Say --text-field NAME.")
            kind = schema.field(column).type
            if pyarrow.types.is_dictionary(kind):
                kind = kind.value_type
            if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
                raise UserError(f"{name}: the column {column!r} holds {kind}, not strings. Say --text-field NAME.")
            for batch in file.iter_batches(ROWS, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = str(error).partition("\n")[0].rstrip(".")
        raise UserError(f"{name} is damaged, or not parquet: {problem}. Copy or download it again.") from error
