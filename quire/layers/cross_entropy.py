"""The loss: how many nats the model needed, on average, for each token it should have foreseen."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.layers.layer import Layer

IGNORED = -100  # a target that does not count; the number that torch.nn.functional.cross_entropy uses too


class CrossEntropy(Layer):
    """Mean of -log softmax(logits)[target] over the targets that count, in nats; 0 where none does.

    With `label_smoothing` e a loss in training asks for a little of everything: the target's share of the wanted
    distribution is 1 - e + e / V, every other token's e / V (Szegedy et al. 2016, 7; Vaswani et al. 2017, 5.4). In
    evaluation mode the loss is the plain one, so that held-out figures compare with those of any other model.
    """

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (..., V), targets (...) of integers below V, or IGNORED."""
        smoothing = self.label_smoothing if self.training else 0.0
        counted = targets != IGNORED
        count = counted.sum().clamp(min=1)
        log_share = torch.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, dim=-1)
        self.save(log_share, targets, count, smoothing, logits.dtype)
        # -sum_v q_v log softmax(z)_v, with q = (1 - e) onehot(t) + e / V
        total = F.nll_loss(log_share.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        if smoothing:
            even = (log_share.mean(-1) * counted).sum()
            total = (1 - smoothing) * total - smoothing * even
        return total / count

    def backward(self, grad: Tensor | float = 1.0) -> Tensor:
        # d(-sum_v q_v log softmax(z)_v)/dz = softmax(z) - q, since q sums to 1; averaged over the targets that count.
        log_share, targets, count, smoothing, dtype = self.saved()
        share = log_share.detach().exp_()  # nobody else has it: it becomes the gradient where it lies
        counted = targets != IGNORED
        index = targets.masked_fill(~counted, 0).unsqueeze(-1)
        share.scatter_add_(-1, index, torch.full_like(index, smoothing - 1, dtype=share.dtype))
        if smoothing:
            share -= smoothing / share.shape[-1]
        share *= (counted.to(share.dtype) / count).unsqueeze(-1) * grad
        return share.to(dtype)
