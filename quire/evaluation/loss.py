"""Validation loss, one thing everywhere: nats per token over a whole stream, each token predicted once.

Windows of the context length stand side by side, so that most tokens are predicted from less than a full context.
That is the number other tools report; overlapping windows (a stride) give a lower one, and are named where used.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from quire.data.batches import Batch, cut
from quire.data.pairs import Examples, Pairs
from quire.data.shards import TokenStream
from quire.errors import UserError
from quire.layers.cross_entropy import IGNORED

TOKENS, LOGITS = 1 << 13, 1 << 24  # at most so many at once: what fits a cache serves faster than what fills memory


@torch.no_grad()
def total_loss(
    model: Any,
    tokens: Examples,
    context_length: int,
    vocabulary_size: int,
    device: torch.device,
    stride: int | None = None,
) -> tuple[float, int]:
    """The sum of -log p(token), in nats, over all tokens but the first, and how many those are. Of pairs, over the
    tokens of every target and its end.

    With a `stride` below the context length, windows overlap: each predicts `stride` new tokens, the first all of its.
    """
    if isinstance(tokens, Pairs):
        if stride is not None:
            raise UserError("--stride is for windows of a text. Leave it out: pairs are predicted whole.")
        batches: Iterable[Batch] = tokens.whole(min(TOKENS, LOGITS // vocabulary_size))
    else:
        batches = windows(tokens, context_length, vocabulary_size, stride)
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        counted = int((batch.targets != IGNORED).sum())
        total += float(model(**batch.to(device).arguments())) * counted
        count += counted
    model.train(was_training)
    return total, count


def windows(
    tokens: np.ndarray | TokenStream, context_length: int, vocabulary_size: int, stride: int | None
) -> Iterator[Batch]:
    """The windows of a stream, side by side or overlapping, in batches of a size that is quickly done."""
    if stride is not None and not 0 < stride <= context_length:
        raise UserError(f"--stride must be between 1 and the context length {context_length}, not {stride}.")
    step = stride or context_length
    last = len(tokens) - 1
    starts = [0, *range(step, max(last - context_length + step, 1), step)]
    rows = [slice(start, min(start + context_length, last)) for start in starts]
    at_once = max(1, min(TOKENS // context_length, LOGITS // (context_length * vocabulary_size)))
    for first in range(0, len(rows), at_once):
        batch = cut(tokens, rows[first : first + at_once], context_length)
        if step < context_length:
            skip = int(first == 0)  # the very first window counts wholly
            batch.targets[skip:, : context_length - step] = IGNORED
        yield batch
