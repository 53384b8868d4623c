"""Text beside a tokenizer that was made for another one: what is unknown to it, and what becomes of that."""

from collections import Counter
from typing import Literal

from quire.data.documents import Documents
from quire.errors import UserError
from quire.progress import say
from quire.tokenizers.tokenizer import BytesTokenizer, Tokenizer

Policy = Literal["error", "skip", "replace", "grow"]  # refuse, leave out, put a stand-in, or make tokens of it


def adapted(tokenizer: Tokenizer, training: Documents, held_out: Documents, unknown: Policy) -> Tokenizer:
    """The tokenizer, grown where that was asked for; says how much of the text it knows.

    Words are taken from the training text alone; single characters also from the held-out text.
    """
    new, apart = (_unknown(tokenizer, part) for part in (training, held_out))
    both = new + apart
    if not both:
        say("All of the text is in the tokenizer's vocabulary.")
        return tokenizer
    missing = sum(len(piece) * count for piece, count in both.items())
    share = 1 - missing / (training.sizes[1] + held_out.sizes[1])
    shown = ", ".join(f"{piece!r} ({count:,})" for piece, count in both.most_common(5))
    known = f"{share:.2%} of the text is in the tokenizer's vocabulary"
    known += f"; it lacks {len(both):,}: {shown}{' ...' if len(both) > 5 else '.'}"
    if unknown == "error" and not isinstance(tokenizer, BytesTokenizer):  # which spell what they lack by its bytes
        raise UserError(f"{known} Say --unknown grow to learn them, skip to leave them out, or replace.")
    say(known)
    if unknown != "grow":
        return tokenizer
    characters = {character for piece in apart for character in piece if tokenizer.unknown(character)}
    grown = tokenizer.grown({piece for piece, count in new.items() if count > 1 or len(piece) == 1} | characters)
    say(f"The vocabulary grows from {tokenizer.vocabulary_size:,} to {grown.vocabulary_size:,} tokens.")
    return grown


def _unknown(tokenizer: Tokenizer, documents: Documents) -> Counter[str]:
    counts: Counter[str] = Counter()
    for text in documents.texts():
        counts.update(tokenizer.unknown(text))
    return counts
