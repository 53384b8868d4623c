"""Which tokens a model holds to be alike, and what its tokenizer is made of."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from quire.errors import UserError, nearest
from quire.layers.embedding import Embedding
from quire.run import Run
from quire.tokenizers import Tokenizer

LONGEST_SHOWN = 5


@dataclass(frozen=True)
class Neighbour:
    """A token near another: `similarity` is the cosine between their embeddings, -1 to 1."""

    id: int
    token: str
    similarity: float


@dataclass(frozen=True)
class TokenizerFacts:
    """What a vocabulary is made of. `longest` are its longest tokens.

    `occurring` are how many of its tokens occur in the run's held-out text, `bytes_per_token` how many bytes one
    stands for there; None where there is no such text.
    """

    kind: str
    vocabulary_size: int
    specials: dict[str, int]
    longest: list[str]
    occurring: int | None
    bytes_per_token: float | None


def neighbours(model: nn.Module, tokenizer: Tokenizer, token: int, count: int = 10) -> list[Neighbour]:
    """The `count` tokens whose embeddings have the largest cosine with that of `token`, nearest first.

    Tokens that no text encodes to are left out: their embeddings say nothing, unless they were trained.
    """
    rows = F.normalize(token_embedding(model, tokenizer.vocabulary_size).detach().float(), dim=-1)
    likeness = (rows @ rows[token]).cpu()
    likeness[sorted((tokenizer.reserved() - {tokenizer.separator}) | {token})] = -torch.inf
    best = likeness.topk(min(count, len(likeness)))
    found = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [Neighbour(i, tokenizer.name(i), value) for i, value in found if value > -torch.inf]


def token_embedding(model: nn.Module, vocabulary_size: int) -> torch.Tensor:
    """The embeddings (V, C) of a model's tokens: those of its first table with a row for each token."""
    for module in model.modules():
        if isinstance(module, Embedding) and len(module.weight) == vocabulary_size:
            return module.weight
    raise UserError("This model has no table of token embeddings: --token has nothing to look up.")


def find_token(tokenizer: Tokenizer, text: str) -> int:
    """The id of the one token that `text` is, as a text or by its name; else a UserError that says what it is."""
    ids = tokenizer.encode(text, "skip", "text")
    if len(ids) == 1 and tokenizer.decode(ids) == text:
        return ids[0]
    names = [tokenizer.name(i) for i in range(tokenizer.vocabulary_size)]
    for written in (text, text.replace("\\n", "\n").replace("\\t", "\t")):
        if written in names:
            return names.index(written)
    if not text:
        raise UserError("--token is empty. Name a token, such as one of those that quire look shows.")
    near = nearest(text[:40], names) or nearest(text[:40].swapcase(), names)
    if len(ids) > 1 and tokenizer.decode(ids) == text:
        parts = ", ".join(repr(names[i]) for i in ids[:8]) + (" ..." if len(ids) > 8 else "")
        raise UserError(f"--token {text[:40]!r} is {len(ids)} tokens to this model: {parts}. Name one of them.{near}")
    raise UserError(f"--token {text[:40]!r} is not a token of this model's vocabulary of {len(names):,}.{near}")


def tokenizer_facts(run: Run) -> TokenizerFacts:
    """The facts of a run's tokenizer; its held-out text is read where there is one."""
    tokenizer, reserved = run.tokenizer, run.tokenizer.reserved()
    plain = (i for i in range(tokenizer.vocabulary_size) if i not in reserved)
    longest = sorted({tokenizer.name(i) for i in plain}, key=lambda name: (-len(name), name))[:LONGEST_SHOWN]
    occurring, share = None, None
    if (run.path / "data" / "validation.bin").is_file():
        tokens = run.validation_tokens()
        tokens = tokens[~np.isin(tokens, sorted(reserved))]
        occurring = len(np.unique(tokens))
        share = len(tokenizer.decode(tokens).encode()) / len(tokens) if len(tokens) else None
    return TokenizerFacts(
        tokenizer.kind, tokenizer.vocabulary_size, dict(tokenizer.specials), longest, occurring, share
    )
