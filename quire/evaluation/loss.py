"""Validation loss, one thing everywhere: nats per token over a whole stream, each token predicted once.

Windows of the context length stand side by side, so that most tokens are predicted from less than a full context.
That is the number other tools report; overlapping windows (a stride) give a lower one, and are named where used.
"""

from typing import Any

import numpy as np
import torch

from quire.data.batches import cut
from quire.errors import UserError
from quire.layers.cross_entropy import IGNORED

TOKENS, LOGITS = 1 << 13, 1 << 24  # at most so many at once: what fits a cache serves faster than what fills memory


@torch.no_grad()
def total_loss(
    model: Any,
    tokens: np.ndarray,
    context_length: int,
    vocabulary_size: int,
    device: torch.device,
    stride: int | None = None,
) -> tuple[float, int]:
    """The sum of -log p(token), in nats, over all tokens but the first, and how many those are.

    With a `stride` below the context length, windows overlap: each predicts `stride` new tokens, the first all of its.
    """
    if stride is not None and not 0 < stride <= context_length:
        raise UserError(f"--stride must be between 1 and the context length {context_length}, not {stride}.")
    step = stride or context_length
    last = len(tokens) - 1
    starts = [0, *range(step, max(last - context_length + step, 1), step)]
    rows = [slice(start, min(start + context_length, last)) for start in starts]
    at_once = max(1, min(TOKENS // context_length, LOGITS // (context_length * vocabulary_size)))
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for first in range(0, len(rows), at_once):
        batch = cut(tokens, rows[first : first + at_once], context_length)
        if step < context_length:
            skip = int(first == 0)  # the very first window counts wholly
            batch.targets[skip:, : context_length - step] = IGNORED
        counted = int((batch.targets != IGNORED).sum())
        batch = batch.to(device)
        total += float(model(batch.inputs, batch.targets)) * counted
        count += counted
    model.train(was_training)
    return total, count
