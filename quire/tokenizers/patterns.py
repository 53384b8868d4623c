"""How text is split into pieces before anything else: among others the patterns of GPT-2 and of cl100k (GPT-4).

A piece is a word, a number, a run of punctuation, or white space; no token reaches from one piece into the next. Which
characters are letters, numbers and white space is fixed in unicode_tables.py.

gpt2        a contraction ('s 't 're 've 'm 'll 'd) | a word | a number | other characters, each with one space before
            it if there is one | white space, without its last character where something visible follows
cl100k      the same, but contractions in any case; a word takes any one character before it that is no line end,
            letter or number; a number has at most three digits; other characters take the line ends that follow;
            white space ends after its last line end, but at the end of the text is one piece
cl100k-hf   cl100k as most files of Hugging Face have it: white space at the end of the text is split as elsewhere; the
            pattern of Llama 3
qwen2       the same, but each digit is a piece (Qwen2, Qwen2.5, Qwen3)
smollm      each digit is a piece, and what stands between digits is split as by gpt2 (SmolLM, SmolLM2, StarCoder)
word        letters and numbers, with apostrophes between them | white space | any other character alone
space       what stands between white space | white space; "</w>" is cut, so that it is never taken for an end mark
"""

import re
from functools import cache

import numpy as np

from quire.tokenizers import unicode_tables

_WORDS = (  # of both kinds of cl100k; U+017F, the long s, is an s in either case
    r"'(?:[sdmtSDMT\u017f]|[lL][lL]|[vV][eE]|[rR][eE])"
    r"|[^\r\n\p{L}\p{N}]?+[\p{L}]++|[\p{N}]{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
)
_SPACES = r"|[\s]*[\r\n]|[\s]+(?![^\s])|[\s]"
PATTERNS = {  # \p{L} a letter, \p{N} a number, \s white space: always within brackets, to be filled from the tables
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}]++| ?[\p{N}]++| ?[^\s\p{L}\p{N}]++|[\s]+(?![^\s])|[\s]",
    "cl100k": _WORDS + r"|[\s]++\Z|[\s]*[\r\n]|[\s]+(?![^\s])|[\s]",
    "cl100k-hf": _WORDS + _SPACES,
    "qwen2": _WORDS.replace("{1,3}+", "") + _SPACES,
    "smollm": r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}]++|[\p{N}]| ?[^\s\p{L}\p{N}]++|[\s]+(?![^\s\p{N}])|[\s]",
    "word": r"[\p{L}\p{N}]++(?:['\u2019][\p{L}\p{N}]++)*+|[\s]++|[^\s\p{L}\p{N}]",
    "space": r"(?:(?!</w>)[^\s])++|<|[\s]++",
}
HUGGING_FACE = {  # the same in the spelling of Hugging Face's files, but for smollm, which they spell in two steps
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "cl100k": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s+\z|\s*[\r\n]+|\s+(?!\S)|\s+",
    "cl100k-hf": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
}
CLASS_OF = {"LETTERS": 1, "NUMBERS": 2, "SPACES": 3}  # everything else is 0


@cache
def splitter(pattern: str) -> re.Pattern[str]:
    """The pattern of that name, compiled: its matches, one after the other, make up the whole text."""
    filled = PATTERNS[pattern]
    for name, table in ((r"\p{L}", "LETTERS"), (r"\p{N}", "NUMBERS"), (r"\s", "SPACES")):
        filled = filled.replace(name, "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in _runs(table)))
    return re.compile(filled)


@cache
def character_classes() -> bytes:
    """The class of every code point, one byte each: the tables as the fast core reads them."""
    classes = np.zeros(0x110000, dtype=np.uint8)
    for name, number in CLASS_OF.items():
        for first, last in _runs(name):
            classes[first : last + 1] = number
    return classes.tobytes()


def _runs(name: str) -> list[tuple[int, int]]:
    ends = [run.split("-") for run in getattr(unicode_tables, name).split()]
    return [(int(run[0], 16), int(run[-1], 16)) for run in ends]
