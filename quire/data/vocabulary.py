"""Text beside a tokenizer that was made for another one: what is unknown to it, and what becomes of that."""

from collections import Counter
from typing import Literal

from quire.data.spool import Corpus
from quire.errors import UserError
from quire.progress import say
from quire.tokenizers.tokenizer import BytesTokenizer, Tokenizer

Policy = Literal["error", "skip", "replace", "grow"]  # refuse, leave out, put a stand-in, or make tokens of it


def adapted(tokenizer: Tokenizer, corpus: Corpus, held_out: Corpus | None, unknown: Policy) -> Tokenizer:
    """The tokenizer, grown where that was asked for; says how much of the text it knows."""
    parts = [corpus.documents, *([held_out.documents] if held_out is not None else [])]
    new: Counter[str] = Counter()
    for part in parts:
        for text in part.texts():
            new.update(tokenizer.unknown(text))
    characters = sum(part.sizes[1] for part in parts)
    missing = sum(len(piece) * count for piece, count in new.items())
    if not new:
        say("All of the text is in the tokenizer's vocabulary.")
        return tokenizer
    shown = ", ".join(f"{piece!r} ({count:,})" for piece, count in new.most_common(5))
    share = f"{1 - missing / max(1, characters):.2%} of the text is in the tokenizer's vocabulary"
    share += f"; it lacks {len(new):,}: {shown}{', ...' if len(new) > 5 else ''}."
    if unknown == "error" and not isinstance(tokenizer, BytesTokenizer):  # which spell what they lack by its bytes
        raise UserError(f"{share} Say --unknown grow to learn them, skip to leave them out, or replace.")
    say(share)
    if unknown != "grow":
        return tokenizer
    grown = tokenizer.grown(piece for piece, count in new.items() if count > 1 or len(piece) == 1)
    say(f"The vocabulary grows from {tokenizer.vocabulary_size:,} to {grown.vocabulary_size:,} tokens.")
    return grown
