"""What a tokenizer makes of a text: the figures by which tokenizers are compared."""

import time
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from quire.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True)
class Comparison:
    """A tokenizer on a text of so many UTF-8 `bytes`; `scripts` are the bytes per token of its lines by script."""

    tokenizer: str
    vocabulary_size: int
    tokens: int
    bytes: int
    bytes_per_token: float
    vocabulary_used: float  # share of the vocabulary that occurs in the text
    unknown: int  # characters (words, for a word tokenizer) without a token of their own
    megabytes_per_second: float
    scripts: dict[str, float]


def compare(name: str, tokenizer: Tokenizer, texts: Sequence[str]) -> Comparison:
    """The figures of `tokenizer` on `texts`."""
    tokenizer.encode_array(texts[0][:100] if texts else "", "skip")  # builds what is built at first use
    began = time.perf_counter()
    ids = np.concatenate([np.zeros(0, dtype=np.int32), *(tokenizer.encode_array(text, "skip") for text in texts)])
    seconds = time.perf_counter() - began
    size = sum(len(text.encode()) for text in texts)
    by_script = {script: "".join(lines) for script, lines in lines_by_script(texts).items()}
    return Comparison(
        tokenizer=name,
        vocabulary_size=tokenizer.vocabulary_size,
        tokens=len(ids),
        bytes=size,
        bytes_per_token=size / max(1, len(ids)),
        vocabulary_used=len(np.unique(ids)) / tokenizer.vocabulary_size,
        unknown=sum(tokenizer.unknown(text).total() for text in texts),
        megabytes_per_second=size / 1e6 / max(seconds, 1e-9),
        scripts={
            script: len(text.encode()) / max(1, len(tokenizer.encode_array(text, "skip")))
            for script, text in by_script.items()
        },
    )


def lines_by_script(texts: Sequence[str]) -> dict[str, list[str]]:
    """The lines of `texts`, line ends included, by the script that most of their letters are of, most bytes first."""
    found: dict[str, list[str]] = {}
    for text in texts:
        for line in text.splitlines(keepends=True):
            found.setdefault(script_of(line), []).append(line)
    return dict(sorted(found.items(), key=lambda pair: -sum(len(line.encode()) for line in pair[1])))


def script_of(line: str) -> str:
    """The script of most letters of a line (Latin, Cyrillic, CJK ...): the first word of their names in Unicode."""
    if line.isascii():
        return "Latin" if any(map(str.isalpha, line)) else "none"
    counts = Counter(unicodedata.name(c, "OTHER").split()[0] for c in line if c.isalpha())
    script = counts.most_common(1)[0][0] if counts else "NONE"
    return script if script == "CJK" else script.capitalize() if script != "NONE" else "none"


def parts(tokenizer: Tokenizer, sentence: str) -> list[str]:
    """A sentence as its tokens, each as a person may read it."""
    return [tokenizer.name(token) for token in tokenizer.encode(sentence, "skip", "text")]
