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
        # With r = 1/sqrt(variance + epsilon), n = (x - mean) r and g = grad * weight:
        # dL/dx = r * (g - mean(g) - n * mean(g * n)); the means undo the shift and the scale that x itself caused.
        # dL/dweight = sum over rows of grad * n,  dL/dbias = sum over rows of grad
        (x,) = self.saved()
        x = x.to(self.weight.dtype)
        n = x - x.mean(-1, keepdim=True)
        r = n.square().mean(-1, keepdim=True).add_(self.epsilon).rsqrt_()
        n.mul_(r)
        product = grad * n
        add_grad(self.weight, product.flatten(0, -2).sum(0))
        if self.bias is not None:
            add_grad(self.bias, grad.flatten(0, -2).sum(0))
        share = (product @ self.weight).div_(len(self.weight)).unsqueeze(-1)  # mean(g * n)
        g = torch.mul(grad, self.weight, out=product)
        return g.sub_(g.mean(-1, keepdim=True)).addcmul_(n, share, value=-1).mul_(r)


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
        # With r = 1/sqrt(mean(x^2) + epsilon), n = x r and g = grad * weight: dL/dx = r * (g - n * mean(g * n)).
        # dL/dweight = sum over rows of grad * n
        (x,) = self.saved()
        x = x.to(self.weight.dtype)
        r = x.square().mean(-1, keepdim=True).add_(self.epsilon).rsqrt_()
        n = x * r
        product = grad * n
        add_grad(self.weight, product.flatten(0, -2).sum(0))
        share = (product @ self.weight).div_(len(self.weight)).unsqueeze(-1)  # mean(g * n)
        return torch.mul(grad, self.weight, out=product).addcmul_(n, share, value=-1).mul_(r)
