"""Which earlier positions a position attends to: all of them, or few enough that long texts stay cheap.

T new positions, S positions of which the model still holds the keys: those of the past, then the new ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Each says of query positions q and key positions k, k <= q, which q looks at k, for a size.
Rule = Callable[[Tensor, Tensor, int], Tensor]


def full(q: Tensor, k: Tensor, size: int) -> Tensor:
    """Everything before, and itself."""
    return q >= k


def window(q: Tensor, k: Tensor, size: int) -> Tensor:
    """The last `size` positions, itself among them (Beltagy et al. 2020; Jiang et al. 2023, Mistral)."""
    return q - k < size


def block_local(q: Tensor, k: Tensor, size: int) -> Tensor:
    """What stands before it in its own block of `size` (the first half of Child et al. 2019's fixed attention)."""
    return q // size == k // size


def columns(q: Tensor, k: Tensor, size: int) -> Tensor:
    """Itself and the last position of each earlier block (the other half of Child et al. 2019's fixed attention)."""
    return (k % size == size - 1) | (q == k)


def strided(q: Tensor, k: Tensor, size: int) -> Tensor:
    """Every `size`-th position, counted back from itself (Child et al. 2019's strided attention, beside a window)."""
    return (q - k) % size == 0


RULES: dict[str, Rule] = {
    "full": full,
    "window": window,
    "block-local": block_local,
    "columns": columns,
    "strided": strided,
}
NEAR = ("window", "block-local")  # rules that never look further back than `size`


@dataclass(frozen=True)
class Pattern:
    """A rule and its size, in positions."""

    rule: str = "full"
    size: int = 0

    @property
    def reach(self) -> int | None:
        """How many positions back from the newest one, itself counted, are ever looked at; None: all."""
        return self.size if self.rule in NEAR else None

    def allowed(self, q: Tensor, k: Tensor) -> Tensor:
        """True where a position q looks at a position k."""
        return (q >= k) & RULES[self.rule](q, k, self.size)


@dataclass(frozen=True)
class Sight:
    """What is known of the positions of a batch, from which each layer's mask follows.

    `positions` (S) or (B, S) of past and new, counted from the beginning of their document, padding not counted;
    `mask` (B, S) is False on padding, None where there is none; `segments` (B, S) number the documents, into one
    another of which no position sees, None where all is one.
    """

    positions: Tensor
    new: int
    mask: Tensor | None = None
    segments: Tensor | None = None

    @classmethod
    def of(
        cls, new: int, past: int, device: torch.device, mask: Tensor | None = None, begins: Tensor | None = None
    ) -> "Sight":
        """From `mask` and `begins` (B, S), which is True where a document begins."""
        if mask is None and begins is None:
            return cls(torch.arange(past + new, device=device), new)
        counted = torch.ones_like(begins) if mask is None else mask  # type: ignore[arg-type]
        positions = counted.cumsum(1) - 1
        if begins is not None:
            positions = positions - torch.where(begins, positions, 0).cummax(1).values
        return cls(positions.clamp(min=0), new, mask, None if begins is None else begins.cumsum(1))

    def visible(self, pattern: Pattern, held: int) -> "Tensor | BlockSparse | None":
        """True where a new position may look at one of the `held` last past ones or a new one: (T, S) or (B, 1, T, S).

        None stands for the two plain cases that kernels know: a whole causal sequence, and one token that sees all.
        Every position sees itself, so that padding yields numbers, never NaN.
        """
        count, device = held + self.new, self.positions.device
        plain = self.mask is None and self.segments is None
        near = pattern.rule == "full" or (pattern.rule == "window" and count <= pattern.size)
        if plain and near and (held == 0 or self.new == 1):
            return None
        if plain and held == 0 and device.type == "cuda" and not near:
            return BlockSparse(pattern, self.new, device)
        keys = self.positions[..., -count:]
        seen = pattern.allowed(keys[..., -self.new :, None], keys[..., None, :])
        causal = torch.ones(self.new, count, dtype=torch.bool, device=device).tril(held)
        seen = causal & (seen[:, None] if seen.dim() == 3 else seen)
        if self.mask is not None:
            seen = seen & self.mask[:, None, None, -count:]
        if self.segments is not None:
            segments = self.segments[:, -count:]
            seen = seen & (segments[:, None, -self.new :, None] == segments[:, None, None, :])
        return seen if self.mask is None else seen | causal.triu(held)


@dataclass(frozen=True)
class BlockSparse:
    """The mask of a plain causal sequence on a GPU, for a kernel that passes over what is hidden, block by block."""

    pattern: Pattern
    length: int
    device: torch.device

    def dense(self) -> Tensor:
        """The same as a tensor (T, T), True where a position may look."""
        positions = torch.arange(self.length, device=self.device)
        return self.pattern.allowed(positions[:, None], positions)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention by torch's flex attention: query (B, H, T, D), key and value (B, K, T, D) give (B, H, T, D)."""
        groups = query.shape[1] != key.shape[1]
        return _flex()(query, key, value, block_mask=_block_mask(self), enable_gqa=groups)


@cache
def _flex() -> Callable[..., Tensor]:
    """Flex attention; not compiled it would compute all scores first."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@cache
def _block_mask(sparse: BlockSparse) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sparse.pattern.allowed(q, k)

    return create_block_mask(seen, None, None, sparse.length, sparse.length, device=sparse.device)
