"""What a model remembers of the tokens it has read, so that each new token costs one step and not a rereading."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Past:
    """What every cache knows of the `length` positions it has read: which are tokens, and where documents begin.

    `mask` (B, length) is False on padding, or None where no row is padded; `begins` (B, length) is True where documents
    begin, or None where nobody asked. A cache can be cut, copied and reordered.
    """

    def __init__(self) -> None:
        self.length = 0
        self.mask: Tensor | None = None
        self.begins: Tensor | None = None

    def extended(
        self, mask: Tensor | None, begins: Tensor | None, tokens: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """`mask` and `begins` of the past positions and of new `tokens` (B, T), given those of the new ones."""
        if mask is not None or self.mask is not None:
            new = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
            past = new.new_ones(len(tokens), self.length) if self.mask is None else self.mask
            mask = torch.cat((past, new), dim=1)
        if begins is not None and self.begins is not None:
            begins = torch.cat((self.begins, begins), dim=1)
        return mask, begins

    def advance(self, count: int, mask: Tensor | None, begins: Tensor | None = None) -> None:
        """All layers have read `count` new positions; `mask` and `begins` are the extended ones."""
        self.length += count
        self.mask, self.begins = mask, begins

    def cut(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        self.length = min(length, self.length)
        self.mask = None if self.mask is None else self.mask[:, :length]
        self.begins = None if self.begins is None else self.begins[:, :length]

    def take(self, other: "Past", rows: Tensor | slice) -> None:
        """Know of row i what `other` knows of its row rows[i]."""
        self.length = other.length
        self.mask = None if other.mask is None else other.mask[rows]
        self.begins = None if other.begins is None else other.begins[rows]


class KeyValueCache(Past):
    """Keys and values of every layer for up to `capacity` positions.

    A layer that reaches back only so many positions, the newest one counted, keeps no more than those (`reaches`:
    one number a layer, None where it reaches back to the first). `keys` and `values` are a tensor for each layer,
    (B, kv_heads, positions, D).
    """

    def __init__(
        self,
        reaches: Sequence[int | None],
        batch: int,
        heads: int,
        capacity: int,
        head_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()

        def empty(reach: int | None) -> Tensor:  # room for all, or what is kept grows and stays at reach - 1
            return torch.empty(batch, heads, capacity if reach is None else 0, head_size, device=device, dtype=dtype)

        self.reaches, self.capacity = list(reaches), capacity
        self.keys, self.values = [empty(reach) for reach in reaches], [empty(reach) for reach in reaches]

    def held(self, layer: int) -> int:
        """How many of the past positions that layer has."""
        return self.length if self.reaches[layer] is None else self.keys[layer].shape[2]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put a layer's new keys and values (B, kv_heads, T, D) behind the old; gives all that the layer may see."""
        end = self.length + keys.shape[2]
        assert end <= self.capacity, f"the cache holds {self.capacity} positions, not {end}"
        reach = self.reaches[layer]
        if reach is None:
            self.keys[layer][:, :, self.length : end] = keys
            self.values[layer][:, :, self.length : end] = values
            return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        keys, values = torch.cat((self.keys[layer], keys), dim=2), torch.cat((self.values[layer], values), dim=2)
        last = max(0, keys.shape[2] - reach + 1)  # the next position counts too
        self.keys[layer], self.values[layer] = keys[:, :, last:].clone(), values[:, :, last:].clone()
        return keys, values

    def cut(self, length: int) -> None:
        """Forget all but the first `length` positions; a ValueError where a layer no longer has what it would need."""
        if length >= self.length:
            return
        for layer, reach in enumerate(self.reaches):
            if reach is not None and self.held(layer) < self.length and length > 0:
                raise ValueError(f"layer {layer} looks back {reach} positions, and has forgotten those before {length}")
        for layer, reach in enumerate(self.reaches):
            if reach is not None:
                self.keys[layer], self.values[layer] = (
                    kept[layer][:, :, :length].clone() for kept in (self.keys, self.values)
                )
        super().cut(length)

    def copy(self) -> "KeyValueCache":
        """An independent copy."""
        return self.reordered(torch.arange(self.keys[0].shape[0], device=self.keys[0].device))

    def reordered(self, rows: Tensor) -> "KeyValueCache":
        """A new cache whose row i is this one's row rows[i]; rows may repeat or be left out."""
        other = object.__new__(type(self))
        other.take(self, rows)
        other.reaches, other.capacity = self.reaches, self.capacity
        other.keys, other.values = [kept[rows] for kept in self.keys], [kept[rows] for kept in self.values]
        return other
