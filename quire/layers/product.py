"""The door to the fast core of decoding: x W^T for a few rows x, at the speed at which memory gives W.

The core is _product.c, compiled when Quire is installed where there is a C compiler. torch's own product of one row
(MKL's) read matrices of GPT-2's shape at half the speed of this machine's memory (benchmarks/NOTES.md).
B rows, N outputs, K inputs.
"""

import torch
from torch import Tensor

try:
    from quire.layers import _product as fast  # type: ignore[attr-defined]
except ImportError:  # not compiled
    fast = None

FEW = 32  # rows; with more of them the arithmetic takes longer than the reading, and torch's kernels are better at it


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """y = x W^T + b, (..., N), of x (..., K) and weight (N, K), float32; with a scale (N) for weight of int8 numbers.

    By the core where it is there, x has few rows, and all lies in the CPU's memory; else by torch. No gradient.
    """
    outputs, inputs = weight.shape
    rows = x.numel() // inputs
    if fast is None or rows > FEW or x.device.type != "cpu" or x.dtype != torch.float32:
        dense = weight if scale is None else weight.to(x.dtype) * scale.to(x.dtype).unsqueeze(1)
        return torch.nn.functional.linear(x, dense, bias)
    y = x.new_empty(*x.shape[:-1], outputs)
    arrays = [None if part is None else part.numpy() for part in (y, x.contiguous(), weight, bias, scale)]
    fast.product(*arrays, rows, outputs, inputs, torch.get_num_threads())
    return y
