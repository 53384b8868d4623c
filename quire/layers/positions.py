"""Three ways of telling a model where a token stands: learned, sinusoidal and rotary.

The first two give vectors that are added to the token embeddings; the third turns queries and keys.
"""

import torch
from torch import Tensor

from quire.layers.embedding import Embedding
from quire.layers.layer import Layer


class LearnedPositions(Embedding):
    """One trained vector for each position below the context length (GPT-2)."""


class SinusoidalPositions(Layer):
    """Fixed waves: PE(p, 2i) = sin(p / 10000^(2i/C)), PE(p, 2i+1) = cos(the same) (Vaswani et al. 2017, 3.5).

    Positions (...) of integers give vectors (..., C).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, positions: Tensor) -> Tensor:
        even = torch.arange(0, self.size, 2, device=positions.device, dtype=torch.float32)
        angles = positions.float().unsqueeze(-1) / 10000 ** (even / self.size)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)[..., : self.size]

    def backward(self, grad: Tensor) -> None:
        """Nothing to learn, and nothing before it to hand a gradient to."""


class RotaryPositions(Layer):
    """Turns each pair (i, i + D/2) of a query or key by p * base^(-2i/D) (Su et al. 2021; halves as in GPT-NeoX).

    A dot product of two turned vectors depends on the distance of their positions alone.
    """

    def __init__(self, head_size: int, base: float = 10000.0) -> None:
        super().__init__()
        self.head_size, self.base = head_size, base

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each (T, 1, D/2) or (B, T, 1, D/2), of positions (T) or (B, T): made once for all layers."""
        even = torch.arange(0, self.head_size, 2, device=positions.device, dtype=torch.float32)
        frequencies = 1 / self.base ** (even / self.head_size)  # rounded in this order, as other implementations do
        angles = (positions.float().unsqueeze(-1) * frequencies).unsqueeze(-2)
        return angles.cos(), angles.sin()

    def forward(self, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """Turn x (B, T, H, D)."""
        cosine, sine = cosine.to(x.dtype), sine.to(x.dtype)
        self.save(cosine, sine)
        return _turn(x, cosine, sine)

    def backward(self, grad: Tensor) -> Tensor:
        # A rotation is orthogonal: its transpose turns the other way.
        cosine, sine = self.saved()
        return _turn(grad, cosine, -sine)


def _turn(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
