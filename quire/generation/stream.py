"""A stream of tokens from a model: the one loop behind every way of writing.

Up to the context length each new token costs one step, by the cache. When a row would exceed the context length, the
last half of its window is encoded anew and generation goes on from there; without a cache the window is cut at the
same places, so that both write the same.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Choose = Callable[[Tensor, list[list[int]]], list[int]]  # logits (B, V) on the CPU and windows to one token a row


@torch.no_grad()
def tokens(
    model: Any, prompts: Sequence[Sequence[int]], choose: Choose, device: torch.device, cached: bool = True
) -> Iterator[list[int]]:
    """Without end: the next token of each row, after prompts of any lengths, none of them empty."""
    assert all(prompts), "a prompt needs a token to start from"
    context_length = model.settings.context_length
    windows = [list(prompt[-context_length:]) for prompt in prompts]
    cache, logits = _encode(model, windows, device, cached)
    while True:
        chosen = choose(logits.cpu(), windows)
        yield chosen
        for window, token in zip(windows, chosen, strict=True):
            window.append(token)
        full = [window for window in windows if len(window) > context_length]
        for window in full:
            del window[: -(context_length // 2)]
        if full or cache is None:
            cache, logits = _encode(model, windows, device, cached)
        else:
            logits = model(torch.tensor(chosen, device=device).unsqueeze(1), cache=cache)[:, -1]


def _encode(model: Any, windows: list[list[int]], device: torch.device, cached: bool) -> tuple[Any, Tensor]:
    """Read whole windows, padded on the left where they differ; gives a cache and the logits (B, V) of what follows."""
    width = max(map(len, windows))
    rows = torch.tensor([[0] * (width - len(window)) + window for window in windows], device=device)
    mask = None
    if any(len(window) < width for window in windows):
        mask = torch.tensor([[i >= width - len(window) for i in range(width)] for window in windows], device=device)
    cache = model.new_cache(len(windows)) if cached else None
    return cache, model(rows, cache=cache, mask=mask)[:, -1]
