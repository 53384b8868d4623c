"""Make quire/tokenizers/unicode_tables.py: which characters are letters, numbers and white space, by tiktoken.

    .venv/bin/python scripts/make_unicode_tables.py

Every tool that splits text for byte-level BPE asks its own copy of Unicode, and the copies are of different years:
tiktoken, `regex` and Python's unicodedata disagree on thousands of letters. Ids that shall equal tiktoken's need
tiktoken's answer, whatever Python runs here; so it is asked once about every code point, and its answer is kept.
"""

import textwrap
from pathlib import Path

from quire import files

HOME = Path(__file__).resolve().parents[1] / "quire" / "tokenizers" / "unicode_tables.py"
CLASSES = {"LETTERS": r"\p{L}", "NUMBERS": r"\p{N}", "SPACES": r"\s"}


def ask_tiktoken() -> dict[str, set[int]]:
    """The code points (no surrogates) that tiktoken's regular expressions put into each class."""
    import tiktoken

    code_points = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    single_bytes = {bytes([byte]): byte for byte in range(256)}
    found = {}
    for name, pattern in CLASSES.items():  # tiktoken drops what its pattern does not match
        encoding = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
        found[name] = {code for code in code_points if encoding.encode_ordinary(chr(code))}
    return found


def ranges(codes: set[int]) -> list[tuple[int, int]]:
    """The runs of consecutive code points, first and last of each."""
    runs: list[tuple[int, int]] = []
    for code in sorted(codes):
        if runs and runs[-1][1] == code - 1:
            runs[-1] = (runs[-1][0], code)
        else:
            runs.append((code, code))
    return runs


def source(tables: dict[str, set[int]], version: str) -> str:
    """The text of unicode_tables.py."""
    lines = [
        '"""Letters, numbers and white space as tiktoken sees them. Made by scripts/make_unicode_tables.py.',
        "",
        "Each run of code points is written FIRST-LAST, or alone, in hexadecimal.",
        '"""',
        "",
        f'TIKTOKEN_VERSION = "{version}"  # the one that was asked',
    ]
    for name, codes in tables.items():
        runs = " ".join(f"{first:x}" if first == last else f"{first:x}-{last:x}" for first, last in ranges(codes))
        lines += ["", f'{name} = """', *textwrap.wrap(runs, 119, break_on_hyphens=False), '"""']
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    import tiktoken

    files.write_text(HOME, source(ask_tiktoken(), tiktoken.__version__))
    print(f"{HOME}: as tiktoken {tiktoken.__version__} says")
