"""The bends between two linear maps, element by element."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.layers.layer import Layer


class ReLU(Layer):
    """max(0, x)."""

    def forward(self, x: Tensor) -> Tensor:
        self.save(x)
        return F.relu(x)

    def backward(self, grad: Tensor) -> Tensor:
        (x,) = self.saved()
        return grad * (x > 0)


class SquaredReLU(Layer):
    """max(0, x)^2 (So et al. 2021, Primer)."""

    def forward(self, x: Tensor) -> Tensor:
        self.save(x)
        return F.relu(x).square()

    def backward(self, grad: Tensor) -> Tensor:
        (x,) = self.saved()
        return grad * 2 * F.relu(x)


class GELU(Layer):
    """x * P(Z < x) for a standard normal Z (Hendrycks and Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        self.save(x)
        return F.gelu(x)

    def backward(self, grad: Tensor) -> Tensor:
        # d(x * cdf(x)) = cdf(x) + x * density(x)
        (x,) = self.saved()
        cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
        return grad * (cdf + x * density)


class TanhGELU(Layer):
    """GPT-2's approximation: x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))."""

    def forward(self, x: Tensor) -> Tensor:
        self.save(x)
        return F.gelu(x, approximate="tanh")

    def backward(self, grad: Tensor) -> Tensor:
        (x,) = self.saved()
        a, b = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(a * (x + b * x**3))
        return grad * 0.5 * (1 + t + x * (1 - t.square()) * a * (1 + 3 * b * x.square()))


class SiLU(Layer):
    """x * sigmoid(x), also called swish (Hendrycks and Gimpel 2016)."""

    def forward(self, x: Tensor) -> Tensor:
        self.save(x)
        return F.silu(x)

    def backward(self, grad: Tensor) -> Tensor:
        (x,) = self.saved()
        s = torch.sigmoid(x)
        return grad * s * (1 + x * (1 - s))


ACTIVATIONS: dict[str, type[Layer]] = {
    "relu": ReLU,
    "squared-relu": SquaredReLU,
    "gelu": GELU,
    "gelu-tanh": TanhGELU,
    "silu": SiLU,
}
