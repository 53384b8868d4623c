"""Output head and loss together, a few rows at a time: nobody needs all logits of a batch at once.

N rows (B T of a batch), C channels, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quire.layers.cross_entropy import IGNORED, CrossEntropy
from quire.layers.layer import add_grad
from quire.layers.linear import OutputHead

WORTH_IT = 1024  # from a vocabulary of this size on
MULTIPLE = 64  # a row of logits has room for a multiple of so many: matrix kernels like aligned rows
LOGITS = 1 << 24  # at once: 64 MB of float32 on a CPU ...
GPU_LOGITS = 1 << 28  # ... and 512 MB of bfloat16 on a GPU, whose products want many rows
BLOCK = 1 << 19  # of them that a CPU takes through all steps of the softmax before the next: they stay in its cache


class HeadLoss(CrossEntropy):
    """Cross-entropy that can take the output head before it along: `of(head, x, targets)` is
    `self(head(x), targets)`, and `undo(grad, head)` is `head.backward(self.backward(grad))`.

    The logits of GPT-2, 1,024 tokens by 50,257, are 206 MB, and so is each of the steps from them to their gradient.
    But the loss is the last layer: a row's gradient is known as soon as its logits are. So where the vocabulary is
    large, some rows at a time go through the head, the softmax and back (as in Liger Kernel, Hsu et al. 2024, 3.2).
    What is kept are the gradients of x and of the head's weights, for a loss that counts once.
    """

    apart = False  # True: two layers, one after the other, for who wants to see both

    def of(self, head: OutputHead, x: Tensor, targets: Tensor) -> Tensor:
        """The loss of x (..., C) against targets (...) of integers below V, or IGNORED."""
        if not self.together(head):
            return self(head(x), targets)
        smoothing = self.label_smoothing if self.training else 0.0
        traced = torch.compiler.is_compiling()
        if self.tape is None:
            apply = _traced if traced else _in_pieces
            return apply(x, head.weight, targets, smoothing, traced, torch.is_grad_enabled())
        wanted = True, head.weight.requires_grad
        loss, *gradients = in_pieces(x.detach(), head.weight.detach(), targets, smoothing, traced, wanted)
        self.save(*gradients)
        return loss

    def undo(self, grad: Tensor | float, head: OutputHead) -> Tensor:
        """Undo the last recorded `of`: add to the gradient of the head's weights, and give that of x."""
        if not self.together(head):
            return head.backward(self.backward(grad))
        grad_x, grad_weight = self.saved()
        if grad_weight is not None:
            add_grad(head.weight, times(grad_weight, grad))
        return times(grad_x, grad)

    def together(self, head: OutputHead) -> bool:
        """Whether the logits are so many that it pays; a head that is no longer trained is left alone."""
        return not self.apart and isinstance(head, OutputHead) and len(head.weight) >= WORTH_IT


def in_pieces(
    x: Tensor, weight: Tensor, targets: Tensor, smoothing: float, traced: bool, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The mean loss of logits x W^T over the targets that count, and its gradients by x and W where `wanted`."""
    device, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(device) and dtype is not torch.float64:
        dtype = torch.get_autocast_dtype(device)
    low = dtype.itemsize < 4
    rows, matrix, targets = x.flatten(0, -2).to(dtype), weight.to(dtype), targets.flatten().unsqueeze(-1)
    counted = targets != IGNORED
    count = counted.sum().clamp(min=1)
    # Of each row in the mean, (N, 1). In reduced precision at the end: a share of a small gradient could become 0.
    share = counted.float() if low else counted.to(dtype) / count
    index = targets.masked_fill(~counted, 0)
    loss, grad_x = share.new_zeros(()), torch.empty_like(rows) if wanted[0] else None
    grad_weight = torch.zeros_like(weight) if wanted[1] and low else torch.empty_like(weight) if wanted[1] else None
    at_once = max(1, (LOGITS if device == "cpu" else GPU_LOGITS) // len(weight))
    room = rows.new_empty(min(at_once, len(rows)), len(weight) + -len(weight) % MULTIPLE)
    for first in range(0, len(rows), at_once):
        piece = slice(first, first + at_once)
        logits = room[: len(rows[piece]), : len(weight)]
        torch.mm(rows[piece], matrix.T, out=logits)
        loss += softmax_and_back(logits, index[piece], share[piece], smoothing, traced, any(wanted))
        if grad_x is not None:  # dL/dx = G W, with G (n, V) what the logits have become
            torch.mm(logits, matrix, out=grad_x[piece])
        if grad_weight is not None:  # dL/dW = sum over rows of G^T x; the first piece writes where nothing stands yet
            if low:
                grad_weight += logits.T @ rows[piece]
            else:
                grad_weight.addmm_(logits.T, rows[piece], beta=float(first > 0))
    grad_x = None if grad_x is None else grad_x.view(x.shape).to(x.dtype)
    if low:
        for each in (loss, grad_x, grad_weight):
            if each is not None:
                each.div_(count)
    return loss, grad_x, grad_weight


def softmax_and_back(
    logits: Tensor, index: Tensor, share: Tensor, smoothing: float, traced: bool, learns: bool
) -> Tensor:
    """The sum of the rows' cross-entropies, each times its `share` (n, 1); `logits` (n, V) become the gradient."""
    on_cpu = logits.device.type == "cpu"
    count = max(1, BLOCK // logits.shape[1]) if on_cpu else len(logits)
    step = _compiled_block() if traced and not on_cpu else block
    parts = zip(logits.split(count), index.split(count), share.split(count), strict=True)
    return torch.stack([step(*part, smoothing, learns) for part in parts]).sum()


def block(logits: Tensor, index: Tensor, share: Tensor, smoothing: float, learns: bool) -> Tensor:
    """The same of a few rows; each exponential is computed once."""
    # -sum_v q_v log softmax(z)_v = log(sum_v exp z_v) - sum_v q_v z_v, with q = (1 - e) onehot(t) + e / V
    z = logits.float() if logits.dtype.itemsize < 4 else logits
    top, foreseen = z.amax(-1, keepdim=True), z.gather(-1, index)
    if smoothing:
        foreseen = torch.lerp(foreseen, z.mean(-1, keepdim=True), smoothing)
    z = z.sub_(top).exp_()
    total = z.sum(-1, keepdim=True)
    loss = ((total.log() + top - foreseen) * share).sum()
    if learns:  # dL/dz = softmax(z) - q
        z.mul_(share / total)
        if torch.compiler.is_compiling():  # one kernel with what stands around it, which a scatter never is
            columns = torch.arange(z.shape[1], device=z.device)
            z.sub_(torch.where(columns == index, share * (1 - smoothing), 0.0))
        else:
            z.scatter_add_(-1, index, share * (smoothing - 1))
        if smoothing:
            z.sub_(share * (smoothing / z.shape[1]))
        if logits.dtype.itemsize < 4:
            logits.copy_(z)
    return loss


@functools.cache
def _compiled_block() -> Callable[..., Tensor]:
    return torch.compile(block)


def times(gradient: Tensor, grad: Tensor | float) -> Tensor:
    """A gradient that nobody else has, times that of the loss, in place."""
    return gradient if isinstance(grad, float) and grad == 1.0 else gradient.mul_(grad)


class _InPieces(torch.autograd.Function):
    """`in_pieces` for autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, smoothing: float, traced: bool, learns: bool
    ) -> Tensor:
        x_wanted, weight_wanted = ctx.needs_input_grad[:2]
        wanted = learns and x_wanted, learns and weight_wanted
        loss, *ctx.gradients = in_pieces(x, weight, targets, smoothing, traced, wanted)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        assert ctx.gradients is not None, "the gradient of a loss is given away: take it once"
        gradients, ctx.gradients = ctx.gradients, None
        factor = float(grad) if grad.device.type == "cpu" else grad
        return *(None if each is None else times(each, factor) for each in gradients), None, None, None, None


def _in_pieces(*arguments: Any) -> Tensor:
    return _InPieces.apply(*arguments)


def _traced(*arguments: Any) -> Tensor:
    """The step's last part works in place: the compiler, which is imported only where it compiles, leaves it alone."""
    return torch.compiler.disable(_in_pieces)(*arguments)
