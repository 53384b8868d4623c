"""The door to the fast core of decoding: x W^T for a few rows x, at the speed at which memory gives W.

The core is _decoding.c, compiled when Quire is installed where there is a C compiler. torch's own product of one row
(MKL's) read matrices of GPT-2's shape at half the speed of this machine's memory (benchmarks/NOTES.md).
B rows, N outputs, K inputs.
"""

from typing import Any

import torch
from torch import Tensor

try:
    from quire.layers import _decoding as fast  # type: ignore[attr-defined]
except ImportError:  # not compiled
    fast = None

FEW = 32  # rows; with more of them the arithmetic takes longer than the reading, and torch's kernels are better at it


class Product:
    """y = x W^T + b, (..., N), of x (..., K) by a fixed weight (N, K), float32; with a scale (N) for int8 numbers.

    By the core where it is there, x has few rows, and all lies in the CPU's memory; else by torch. No gradient. It
    keeps the very memory of what it is given: weights changed in place count.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> None:
        self.weight, self.bias, self.scale = weight.detach(), None if bias is None else bias.detach(), scale
        here = weight.device.type == "cpu" and weight.dtype == (torch.float32 if scale is None else torch.int8)
        self.arrays: list[Any] | None = None
        if fast is not None and here and weight.is_contiguous():
            self.arrays = [None if part is None else part.numpy() for part in (self.weight, self.bias, self.scale)]

    def __call__(self, x: Tensor) -> Tensor:
        outputs, inputs = self.weight.shape
        rows = x.numel() // inputs
        if self.arrays is None or rows > FEW or x.dtype is not torch.float32:
            dense = self.weight if self.scale is None else self.weight.to(x.dtype) * self.scale.unsqueeze(1)
            return torch.nn.functional.linear(x, dense, self.bias)
        y = torch.empty(*x.shape[:-1], outputs)
        fast.product(y.numpy(), x.contiguous().numpy(), *self.arrays, rows, outputs, inputs, torch.get_num_threads())
        return y
