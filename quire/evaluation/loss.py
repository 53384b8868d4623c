"""Validation loss, one thing everywhere: nats per token over a whole stream, each token predicted once.

Windows of the context length stand side by side, so that most tokens are predicted from less than a full context.
That is the number other tools report; overlapping windows (a stride) give a lower one, and are named where used.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire.data.batches import Batch, cut
from quire.data.pairs import Examples, Pairs
from quire.data.shards import TokenStream
from quire.devices import out_of_memory, release_memory
from quire.errors import UserError
from quire.layers.cross_entropy import IGNORED

# Tokens at once on a CPU, where what fits a cache serves faster than what fills memory, and on a GPU; logits at most.
TOKENS, GPU_TOKENS, LOGITS = 1 << 11, 1 << 15, 1 << 24


@torch.no_grad()
def total_loss(
    model: Any,
    tokens: Examples,
    context_length: int,
    vocabulary_size: int,
    device: torch.device,
    stride: int | None = None,
    most_batches: int | None = None,
    share: tuple[int, int] = (0, 1),
) -> tuple[float, int]:
    """The sum of -log p(token), in nats, over all tokens but the first, and how many those are. Of pairs, over the
    tokens of every target and its end.

    With a `stride` below the context length, windows overlap: each predicts `stride` new tokens, the first all of its.
    `most_batches` leaves the rest of the tokens out. A `share` (r, n) is what the process r of n measures: every n-th
    batch. All of them call the model equally often, as one whose parts they hold wants it.
    """
    batches = held_out_batches(tokens, context_length, vocabulary_size, device, stride)
    was_training = model.training
    model.eval()
    losses, counts, pieces = [], [], 1  # in so many pieces each batch: more of them where memory runs out
    rank, processes = share
    number, batch = -1, None
    for number, batch in enumerate(islice(batches, most_batches)):
        if number % processes != rank:
            continue
        while (found := _losses(model, batch, min(pieces, len(batch.inputs)), device, processes == 1)) is None:
            pieces *= 2
            release_memory(device)
        losses += found[0]
        counts += found[1]
    if batch is not None and number % processes < rank:
        model(**batch.to(device).arguments())  # only for the others, which measure one more
    model.train(was_training)
    means = torch.stack(losses).tolist() if losses else []  # read here once: a GPU is not waited for after each batch
    return sum((mean * count for mean, count in zip(means, counts, strict=True)), 0.0), sum(counts)


def held_out_batches(
    tokens: Examples, context_length: int, vocabulary_size: int, device: torch.device, stride: int | None = None
) -> Iterator[Batch]:
    """What a loss is summed over, in batches that suit the device: windows of a stream, or pairs."""
    most = TOKENS if device.type == "cpu" else GPU_TOKENS
    if not isinstance(tokens, Pairs):
        return windows(tokens, context_length, vocabulary_size, stride, most)
    if stride is not None:
        raise UserError("--stride is for windows of a text. Leave it out: pairs are predicted whole.")
    return tokens.whole(min(most, LOGITS // vocabulary_size))


def _losses(
    model: Any, batch: Batch, pieces: int, device: torch.device, smaller: bool
) -> tuple[list[Tensor], list[int]] | None:
    """The mean loss of each piece of a batch, and its tokens; None where memory ran out and `smaller` ones may do."""
    parts = batch.split(pieces)
    try:
        return [model(**part.to(device).arguments()) for part in parts], [part.counted for part in parts]
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or pieces == len(batch.inputs) or not smaller:
            raise
        return None


def windows(
    tokens: np.ndarray | TokenStream, context_length: int, vocabulary_size: int, stride: int | None, most: int = TOKENS
) -> Iterator[Batch]:
    """The windows of a stream, side by side or overlapping, in batches of at most `most` tokens, or one window."""
    if stride is not None and not 0 < stride <= context_length:
        raise UserError(f"--stride must be between 1 and the context length {context_length}, not {stride}.")
    step = stride or context_length
    last = len(tokens) - 1
    starts = [0, *range(step, max(last - context_length + step, 1), step)]
    rows = [slice(start, min(start + context_length, last)) for start in starts]
    at_once = max(1, min(most // context_length, LOGITS // (context_length * vocabulary_size)))
    for first in range(0, len(rows), at_once):
        batch = cut(tokens, rows[first : first + at_once], context_length)
        if step < context_length:
            skip = int(first == 0)  # the very first window counts wholly
            batch.targets[skip:, : context_length - step] = IGNORED
        yield batch
