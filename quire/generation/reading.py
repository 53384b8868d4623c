"""Reading what is given: windows into a cache at once, and what two prompts share only once.

B batch, T time, V vocabulary. A window is the tokens a row sees, a source what its encoder read, where there is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from quire.layers.cross_entropy import IGNORED

Source = tuple[int, ...] | None


def read(
    model: Any,
    windows: Sequence[Sequence[int]],
    sources: Sequence[Source],
    device: torch.device,
    cached: bool = True,
) -> tuple[Any, Tensor]:
    """Read whole windows, padded on the left where they differ; gives a cache and the logits (B, V) of what follows.

    The cache is None where the model remembers nothing, or `cached` is False.
    """
    width = max(map(len, windows))
    rows = torch.tensor([[0] * (width - len(window)) + list(window) for window in windows], device=device)
    mask = None
    if any(len(window) < width for window in windows):
        mask = torch.tensor([[i >= width - len(window) for i in range(width)] for window in windows], device=device)
    cache = model.new_cache(len(windows)) if cached else None
    return cache, model(rows, cache=cache, mask=mask, **source_argument(sources, device))[:, -1]


def source_argument(sources: Sequence[Source], device: torch.device) -> dict[str, Tensor]:
    """The argument `source` (B, S) of a model with an encoder, padding IGNORED; none for all other models."""
    known = [source for source in sources if source is not None]
    if not known:
        return {}
    assert len(known) == len(sources), "every row has a source, or none has"
    width = max(map(len, known))
    return {"source": torch.tensor([[*row, *[IGNORED] * (width - len(row))] for row in known], device=device)}


@dataclass
class PromptMemory:
    """The last prompts, as a model read them: asked again, or for a longer prompt, it reads only what is new.

    It keeps the cache as it stood at the end of the prompts. Prompts that were all among the last ones cost nothing. A
    single prompt reuses the longest beginning that it shares with one of them, where the cache can be cut to that
    length. A cache that cannot be cut (a recurrent state, a sliding window: `cut` raises ValueError) serves a prompt
    that goes on from a whole earlier one.
    """

    prompts: list[tuple[Source, tuple[int, ...]]] = field(default_factory=list)
    cache: Any = None
    logits: Tensor | None = None  # (B, V): what the model expects after each prompt

    @torch.no_grad()
    def read(
        self, model: Any, windows: Sequence[Sequence[int]], sources: Sequence[Source], device: torch.device
    ) -> tuple[Any, Tensor]:
        """As `read` gives it: a cache of the caller's own, and the logits (B, V). Equal rows are read once."""
        wanted = [(source, tuple(window)) for source, window in zip(sources, windows, strict=True)]
        new = list(dict.fromkeys(wanted))
        if not set(new) <= set(self.prompts):
            windows, sources = [window for _, window in new], [source for source, _ in new]
            known = self._extended(model, new, device) or read(model, windows, sources, device)
            self.prompts, (self.cache, self.logits) = new, known
        assert self.logits is not None
        rows = torch.tensor([self.prompts.index(prompt) for prompt in wanted], device=device)
        logits = self.logits[rows]
        if self.cache is None:  # a model without a memory
            self.prompts = []
            return None, logits
        return self.cache.reordered(rows), logits

    def _extended(
        self, model: Any, new: list[tuple[Source, tuple[int, ...]]], device: torch.device
    ) -> tuple[Any, Tensor] | None:
        """Cache and logits of a single new prompt, read on from an earlier one; None where none serves."""
        (source, window), *others = new
        shared = [_shared(window, old) if old_source == source else 0 for old_source, old in self.prompts]
        if others or not any(shared):
            return None
        row = max(range(len(shared)), key=shared.__getitem__)
        kept = min(shared[row], len(window) - 1)  # the last token is read in any case: its logits are wanted
        cache = self.cache.reordered(torch.tensor([row], device=device))
        old = len(self.prompts[row][1])
        padding = cache.length - old
        if padding + len(window) > model.settings.context_length:
            return None
        if kept < old:
            try:
                cache.cut(padding + kept)
            except ValueError:
                return None
        return cache, model(torch.tensor([window[kept:]], device=device), cache=cache)[:, -1]


def _shared(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two windows have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
