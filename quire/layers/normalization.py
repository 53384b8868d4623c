"""Layer normalization and root-mean-square normalization, over the last dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire.layers.layer import Layer, add_grad


class LayerNorm(Layer):
    """y = (x - mean) / sqrt(variance + epsilon) * weight + bias (Ba et al. 2016); named as in torch.nn.LayerNorm."""

    def __init__(self, size: int, bias: bool = True, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        self.save(x)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.epsilon)

    def backward(self, grad: Tensor) -> Tensor:
        # With n = (x - mean) * r, r = 1/sqrt(variance + epsilon) and g = grad * weight:
        # dL/dx = r * (g - mean(g) - n * mean(g * n)); the means undo the shift and the scale that x itself caused.
        (x,) = self.saved()
        x = x.to(self.weight.dtype)
        centred = x - x.mean(-1, keepdim=True)
        r = (centred.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        n = centred * r
        add_grad(self.weight, (grad * n).flatten(0, -2).sum(0))
        if self.bias is not None:
            add_grad(self.bias, grad.flatten(0, -2).sum(0))
        g = grad * self.weight
        return r * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))


class RMSNorm(Layer):
    """y = x / sqrt(mean(x^2) + epsilon) * weight (Zhang and Sennrich 2019); named as in torch.nn.RMSNorm."""

    def __init__(self, size: int, epsilon: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        self.save(x)
        return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.epsilon)

    def backward(self, grad: Tensor) -> Tensor:
        # With n = x * r, r = 1/sqrt(mean(x^2) + epsilon) and g = grad * weight: dL/dx = r * (g - n * mean(g * n)).
        (x,) = self.saved()
        x = x.to(self.weight.dtype)
        r = (x.square().mean(-1, keepdim=True) + self.epsilon).rsqrt()
        n = x * r
        add_grad(self.weight, (grad * n).flatten(0, -2).sum(0))
        g = grad * self.weight
        return r * (g - n * (g * n).mean(-1, keepdim=True))
