"""Linear maps for writing: weights that no longer change, kept as float32 or as int8 numbers.

A step of decoding reads every weight once and does little with it: int8 weights, a quarter of the bytes, are read in
less than half the time. K inputs, N outputs.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from quire.layers.linear import Linear
from quire.layers.product import Product

Weights = Literal["float32", "int8"]


class FixedLinear(Linear):
    """y = x W^T + b of a Linear whose training is over.

    int8: row n of W is scale_n times whole numbers from -127 to 127, with scale_n = max |W_n| / 127, so that no weight
    is off by more than half a scale. Inputs, sums and outputs stay float32.
    """

    def __init__(self, linear: Linear, weights: Weights) -> None:
        nn.Module.__init__(self)
        self.bias: Any = linear.bias  # shared with the Linear, and so is a float32 weight, which may be tied
        self.weight: Any = linear.weight
        scale: Tensor | None = None
        if weights == "int8":
            del self.weight
            whole, scale = rounded(linear.weight.detach())
            self.register_buffer("weight", whole)
        self.register_buffer("scale", scale)
        self.product = Product(self.weight, self.bias, scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x.detach())

    def backward(self, grad: Tensor) -> Any:
        raise NotImplementedError("a FixedLinear does not learn: train the Linear it was made of")


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers (N, K), int8, and scales (N): weight = scale * whole, nearly."""
    scale = weight.abs().amax(1).clamp(min=torch.finfo(weight.dtype).tiny) / 127
    whole = torch.div(weight, scale.unsqueeze(1)).round_().to(torch.int8)
    return whole, scale
