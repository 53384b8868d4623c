"""The bends between two linear maps, element by element."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.layers.layer import Layer, pieces


class ReLU(Layer):
    """max(0, x)."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(x)
        self.save(y)
        return y

    def backward(self, grad: Tensor) -> Tensor:
        # dy/dx = 1 where y > 0, else 0
        (y,) = self.saved()
        return y.sign().mul_(grad)


class SquaredReLU(Layer):
    """max(0, x)^2 (So et al. 2021, Primer)."""

    def forward(self, x: Tensor) -> Tensor:
        positive = F.relu(x)
        self.save(positive)
        return positive.square()

    def backward(self, grad: Tensor) -> Tensor:
        # dy/dx = 2 max(0, x)
        (positive,) = self.saved()
        return (positive * grad).mul_(2)


class Curve(Layer):
    """A smooth curve. Value and slope have the dear part in common, so a recorded forward makes both at once, and keeps
    the slope in place of x."""

    def forward(self, x: Tensor) -> Tensor:
        if self.tape is None:
            return self.value(x)
        y, slope = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
        for part, *results in pieces(x.detach(), y, slope):
            self.trace(part.float() if part.dtype.itemsize < 4 else part, *results)
        self.save(slope)
        watched = x.requires_grad and torch.is_grad_enabled()  # by autograd, which the gradient is compared with
        return self.value(x) if watched else y

    def backward(self, grad: Tensor) -> Tensor:
        # dL/dx = dL/dy dy/dx, element by element
        (slope,) = self.saved()
        return slope.mul_(grad)

    def value(self, x: Tensor) -> Tensor:
        """The curve at x, by torch's kernel."""
        raise NotImplementedError

    def trace(self, x: Tensor, y: Tensor, slope: Tensor) -> None:
        """Write value and slope of the curve at x into y and slope."""
        raise NotImplementedError


class GELU(Curve):
    """x * P(Z < x) for a standard normal Z (Hendrycks and Gimpel 2016)."""

    def value(self, x: Tensor) -> Tensor:
        return F.gelu(x)

    def trace(self, x: Tensor, y: Tensor, slope: Tensor) -> None:
        # P(Z < x) = (1 + erf(x / sqrt(2))) / 2, whose slope is the density exp(-x^2 / 2) / sqrt(2 pi):
        # dy/dx = P(Z < x) + x * density
        below = (x * math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
        bell = x.square().mul_(-0.5).exp_()
        torch.mul(x, below, out=y)
        torch.addcmul(below, x, bell, value=1 / math.sqrt(2 * math.pi), out=slope)


class TanhGELU(Curve):
    """GPT-2's approximation: x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))."""

    def value(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")

    def trace(self, x: Tensor, y: Tensor, slope: Tensor) -> None:
        # (1 + tanh(u)) / 2 = sigmoid(2u), so y = x s with s = sigmoid(z), z = a x + b x^3, a = 2 sqrt(2/pi) and
        # b = 0.044715 a. Then dy/dx = s + s (1 - s) x dz/dx, and x dz/dx = a x + 3 b x^3 = 3 z - 2 a x.
        a = 2 * math.sqrt(2 / math.pi)
        z = (x * a).addcmul_(x, x.square(), value=0.044715 * a)
        s = torch.sigmoid(z)
        rise = torch.addcmul(s, s, s, value=-1)  # s (1 - s)
        torch.mul(x, s, out=y)
        torch.addcmul(s, rise, z.mul_(3).sub_(x, alpha=2 * a), out=slope)


class SiLU(Curve):
    """x * sigmoid(x), also called swish (Hendrycks and Gimpel 2016)."""

    def value(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def trace(self, x: Tensor, y: Tensor, slope: Tensor) -> None:
        # dy/dx = s + s (1 - s) x with s = sigmoid(x)
        s = torch.sigmoid(x)
        rise = torch.addcmul(s, s, s, value=-1)  # s (1 - s)
        torch.mul(x, s, out=y)
        torch.addcmul(s, rise, x, out=slope)


ACTIVATIONS: dict[str, type[Layer]] = {
    "relu": ReLU,
    "squared-relu": SquaredReLU,
    "gelu": GELU,
    "gelu-tanh": TanhGELU,
    "silu": SiLU,
}
