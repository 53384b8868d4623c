"""A stream of tokens from a model: the one loop behind every way of writing.

Up to the context length each new token costs one step, by the cache. When a row would exceed the context length, the
last half of its window is encoded anew and generation goes on from there; without a cache the window is cut at the
same places, so that both write the same.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from quire.generation.reading import PromptMemory, Source, read

# From logits (B, V) on the CPU and windows to a token for each row; or to two lists, the rows that go on (in any order,
# and a row that goes on in several ways several times) and the token that each of them goes on with.
Choose = Callable[[Tensor, list[list[int]]], list[int] | tuple[list[int], list[int]]]


@torch.no_grad()
def tokens(
    model: Any,
    prompts: Sequence[Sequence[int]],
    choose: Choose,
    device: torch.device,
    cached: bool = True,
    sources: Sequence[Source] = (),
    kept: int = 0,
    memory: PromptMemory | None = None,
) -> Iterator[list[int]]:
    """The next token of each row, after prompts of any lengths, none of them empty; until `choose` lets no row go on.

    `sources` are what an encoder reads, one for each prompt. The first `kept` tokens of a prompt stay in front where
    its window is cut. A `memory` of earlier prompts saves reading again what this call shares with them.
    """
    assert all(prompts), "a prompt needs a token to start from"
    context_length = model.settings.context_length
    windows = [shortened(prompt, context_length, kept) for prompt in prompts]
    sources = sources or [None] * len(windows)
    if cached and memory is not None:
        cache, logits = memory.read(model, windows, sources, device)
    else:
        cache, logits = read(model, windows, sources, device, cached)
    while True:
        chosen = choose(logits.cpu().float(), windows)
        rows, chosen = chosen if isinstance(chosen, tuple) else (list(range(len(windows))), chosen)
        yield chosen
        if not rows:
            return
        same = rows == list(range(len(windows)))
        windows = [[*windows[row], token] for row, token in zip(rows, chosen, strict=True)]
        sources = [sources[row] for row in rows]
        full = any(len(window) > context_length for window in windows)
        if full or cache is None or cache.length >= context_length:  # a padded cache is full before any window is
            windows = [
                shortened(window, context_length // 2, kept) if len(window) > context_length else window
                for window in windows
            ]
            cache, logits = read(model, windows, sources, device, cached)
        else:
            cache = cache if same else cache.reordered(torch.tensor(rows, device=device))
            logits = model(torch.tensor(chosen, device=device).unsqueeze(1), cache=cache)[:, -1]


def shortened(window: Sequence[int], length: int, kept: int = 0) -> list[int]:
    """At most `length` tokens: the end of the window, behind its first `kept` ones (fewer where they would fill it)."""
    if len(window) <= length:
        return list(window)
    kept = min(kept, length - 1)
    return [*window[:kept], *window[len(window) - length + kept :]]
