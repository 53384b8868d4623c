"""What the chapters share: the text and its two parts, random batches of it, and the measure all are held to.

B batch, T time (characters in a window), V vocabulary.

Two environment variables change it: QUIRE_COURSE_TEXT names another text (a file or a known corpus), and
QUIRE_COURSE_SHORT, set to anything, cuts every training down to a few steps.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from quire.data.prepare import split
from quire.data.reading import DataSettings, read
from quire.errors import UserError
from quire.tokenizers.character import CharacterTokenizer

SHORT = bool(os.environ.get("QUIRE_COURSE_SHORT"))
T = 64  # characters in a window, the same in every chapter, so that their losses compare

_documents = read([os.environ.get("QUIRE_COURSE_TEXT", "tiny-shakespeare")], DataSettings()).documents
_training, _held_out, _ = split(_documents)  # as Quire always does: the last tenth, at most 256,000 characters
training_text, held_out_text = "".join(_training), "".join(_held_out)
if len(held_out_text) <= T:
    raise UserError(f"The course needs a text of more than {10 * T} characters; some 100,000 and more are good.")

tokenizer = CharacterTokenizer.train([training_text, held_out_text])  # a character's id, and back
V = tokenizer.vocabulary_size
training = torch.tensor(tokenizer.encode(training_text))  # the ids of all its characters, in a row
held_out = torch.tensor(tokenizer.encode(held_out_text))


def steps(count: int, short: int = 20) -> int:
    """`count` steps of training, or `short` when all is cut down."""
    return min(count, short) if SHORT else count


def batch(size: int, length: int = T) -> tuple[Tensor, Tensor]:
    """`size` windows from anywhere in the training text: tokens (B, T), and as targets the one after each (B, T)."""
    starts = torch.randint(len(training) - length, (size, 1))
    places = starts + torch.arange(length)  # (B, T)
    return training[places], training[places + 1]


def measure(logits_of: Callable[[Tensor], Tensor], length: int = T) -> float:
    """The held-out loss in nats per character: each character but the first predicted once, in windows of `length`.

    `logits_of` takes tokens (B, T) and gives logits (B, T, V) for the ones that follow. It is told nothing of the
    window before.
    """
    count = len(held_out) - 1
    whole = count // length * length
    total = by_place(logits_of, length).sum().item() * (whole // length)
    if whole < count:  # the last window is shorter
        total += _nats(logits_of, held_out[whole:-1].view(1, -1), held_out[whole + 1 :].view(1, -1)).sum().item()
    return total / count


def by_place(logits_of: Callable[[Tensor], Tensor], length: int = T) -> Tensor:
    """The held-out loss at each place of a window (T): what is predicted after 1, 2, 3 ... characters were read."""
    whole = (len(held_out) - 1) // length * length
    tokens, targets = held_out[:whole].view(-1, length), held_out[1 : whole + 1].view(-1, length)
    parts = zip(tokens.split(64), targets.split(64))
    return sum((_nats(logits_of, *part).sum(0) for part in parts), torch.zeros(length)) / len(tokens)


def _nats(logits_of: Callable[[Tensor], Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
    """-log p (B, T) of each target."""
    with torch.no_grad():
        log_p = torch.log_softmax(logits_of(tokens), dim=-1)
    return -log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def write(logits_of: Callable[[Tensor], Tensor], count: int = 300, length: int = T) -> str:
    """`count` characters drawn one by one, each from the probabilities that the last `length` ones lead to."""
    ids = tokenizer.encode("\n")
    with torch.no_grad():
        for _ in range(steps(count)):
            p = torch.softmax(logits_of(torch.tensor([ids[-length:]]))[0, -1], dim=-1)
            ids.append(int(torch.multinomial(p, 1)))
    return tokenizer.decode(ids[1:])
