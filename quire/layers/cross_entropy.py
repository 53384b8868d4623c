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
        self.save(logits, targets, smoothing)
        total = F.cross_entropy(
            logits.flatten(0, -2),
            targets.flatten(),
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=smoothing,
        )
        return total / (targets != IGNORED).sum().clamp(min=1)

    def backward(self, grad: Tensor | float = 1.0) -> Tensor:
        # d(-sum_v q_v log softmax(z)_v)/dz = softmax(z) - q with q = (1 - e) onehot(t) + e / V, since q sums to 1;
        # averaged over the targets that count.
        logits, targets, smoothing = self.saved()
        counted = targets != IGNORED
        gradient = torch.softmax(logits.float() if logits.dtype.itemsize < 4 else logits, dim=-1)
        index = targets.masked_fill(~counted, 0).unsqueeze(-1)
        gradient.scatter_add_(-1, index, torch.full_like(index, smoothing - 1, dtype=gradient.dtype))
        if smoothing:
            gradient -= smoothing / logits.shape[-1]
        gradient *= (counted.to(gradient.dtype) / counted.sum().clamp(min=1)).unsqueeze(-1) * grad
        return gradient.to(logits.dtype)
