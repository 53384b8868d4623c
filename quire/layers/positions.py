"""Three ways of telling a model where a token stands: learned, sinusoidal and rotary.

The first two give vectors that are added to the token embeddings; the third turns queries and keys.
"""

import math
from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class RotaryScaling:
    """How rotary angles are slowed down so that a model reads texts `factor` times as long as it was trained on.

    linear: all alike (Chen et al. 2023). yarn: slow ones fully, fast ones not at all, those between in part, by the
    turns that they make within `original_context` (Peng et al. 2023). llama3: the same idea by wavelength (Grattafiori
    et al. 2024; the formula is in Meta's llama-models). `low` and `high` bound the part between; 0: the usual ones.
    """

    kind: Literal["none", "linear", "yarn", "llama3"] = "none"
    factor: float = 1.0
    original_context: int = 0
    low: float = 0.0
    high: float = 0.0

    def __call__(self, frequencies: Tensor, base: float) -> Tensor:
        """The angles per position that take the place of `frequencies` (D/2)."""
        if self.kind == "none":
            return frequencies
        slowed = frequencies / self.factor
        if self.kind == "linear":
            return slowed
        low, high = self.low or 1.0, self.high or {"llama3": 4.0, "yarn": 32.0}[self.kind]
        if self.kind == "llama3":  # turns within the original context: below `low` slowed, above `high` as they were
            turns = self.original_context * frequencies / (2 * math.pi)
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        else:  # pair i makes context / (2 pi base^(2i/D)) turns: solved for i at `high` and at `low` turns
            pairs = len(frequencies)

            def pair(turns: float) -> float:
                return pairs * math.log(self.original_context / (turns * 2 * math.pi)) / math.log(base)

            first, last = max(math.floor(pair(high)), 0), min(math.ceil(pair(low)), 2 * pairs - 1)
            ramp = torch.arange(pairs, device=frequencies.device, dtype=torch.float32) - first
            kept = 1 - (ramp / max(last - first, 0.001)).clamp(0, 1)
        return slowed * (1 - kept) + frequencies * kept

    @property
    def amplitude(self) -> float:
        """What cosine and sine are multiplied by: yarn sharpens attention a little (Peng et al. 2023, 3.4)."""
        return 0.1 * math.log(self.factor) + 1 if self.kind == "yarn" and self.factor > 1 else 1.0


class RotaryPositions(Layer):
    """Turns each pair (i, i + D/2) of a query or key by p * base^(-2i/D) (Su et al. 2021; halves as in GPT-NeoX).

    A dot product of two turned vectors depends on the distance of their positions alone.
    """

    def __init__(self, head_size: int, base: float = 10000.0, scaling: RotaryScaling | None = None) -> None:
        super().__init__()
        self.head_size, self.base, self.scaling = head_size, base, scaling or RotaryScaling()

    def frequencies(self, device: torch.device | None = None) -> Tensor:
        """The angle per position of each pair (D/2), before any scaling."""
        even = torch.arange(0, self.head_size, 2, device=device, dtype=torch.float32)
        return 1 / self.base ** (even / self.head_size)  # rounded in this order, as other implementations do

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, each (T, 1, D/2) or (B, T, 1, D/2), of positions (T) or (B, T): made once for all layers."""
        frequencies = self.scaling(self.frequencies(positions.device), self.base)
        angles = (positions.float().unsqueeze(-1) * frequencies).unsqueeze(-2)
        return angles.cos() * self.scaling.amplitude, angles.sin() * self.scaling.amplitude

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
