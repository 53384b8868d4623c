"""What a model remembers of the tokens it has read, so that each new token costs one step and not a rereading."""

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of every layer for up to `capacity` positions, and which of them are real tokens.

    `keys` and `values` are (layers, B, kv_heads, capacity, D); `mask` is (B, length), False on padding, or None
    where no row is padded; `begins` (B, length) is True where a document begins, or None where nobody asked. A model
    appends to it; it can be cut, copied and reordered.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        capacity: int,
        head_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        shape = (layers, batch, heads, capacity, head_size)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.mask: Tensor | None = None
        self.begins: Tensor | None = None
        self.length = 0

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's new keys and values (B, kv_heads, T, D) behind the old; gives all of that layer's so far."""
        end = self.length + keys.shape[2]
        assert end <= self.keys.shape[3], f"the cache holds {self.keys.shape[3]} positions, not {end}"
        self.keys[layer, :, :, self.length : end] = keys
        self.values[layer, :, :, self.length : end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def extended_mask(self, mask: Tensor | None, batch: int, count: int) -> Tensor | None:
        """Which of the past and `count` new positions are tokens, (B, length + count); None where all are."""
        if mask is None and self.mask is None:
            return None
        past, new = self.mask, mask
        if past is None:
            past = torch.ones(batch, self.length, dtype=torch.bool, device=self.keys.device)
        if new is None:
            new = torch.ones(batch, count, dtype=torch.bool, device=self.keys.device)
        return torch.cat((past, new), dim=1)

    def extended_begins(self, begins: Tensor) -> Tensor:
        """Where documents begin among the past positions and the new ones, `begins` (B, count)."""
        return begins if self.begins is None else torch.cat((self.begins, begins), dim=1)

    def advance(self, count: int, mask: Tensor | None, begins: Tensor | None = None) -> None:
        """All layers have appended `count` positions; `mask` and `begins` are the extended ones."""
        self.length += count
        self.mask, self.begins = mask, begins

    def cut(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        self.length = min(length, self.length)
        self.mask = None if self.mask is None else self.mask[:, : self.length]
        self.begins = None if self.begins is None else self.begins[:, : self.length]

    def copy(self) -> "KeyValueCache":
        """An independent copy."""
        return self.reordered(torch.arange(self.keys.shape[1], device=self.keys.device))

    def reordered(self, rows: Tensor) -> "KeyValueCache":
        """A new cache whose row i is this one's row rows[i]; rows may repeat or be left out."""
        other = object.__new__(KeyValueCache)
        other.keys, other.values = self.keys[:, rows], self.values[:, rows]
        other.mask = None if self.mask is None else self.mask[rows]
        other.begins = None if self.begins is None else self.begins[rows]
        other.length = self.length
        return other
