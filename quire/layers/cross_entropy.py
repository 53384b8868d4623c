"""The loss: how many nats the model needed, on average, for each token it should have foreseen."""

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.layers.layer import Layer

IGNORED = -100  # a target that does not count; the number that torch.nn.functional.cross_entropy uses too


class CrossEntropy(Layer):
    """Mean of -log softmax(logits)[target] over the targets that count, in nats; 0 where none does."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (..., V), targets (...) of integers below V, or IGNORED."""
        self.save(logits, targets)
        total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="sum")
        return total / (targets != IGNORED).sum().clamp(min=1)

    def backward(self, grad: Tensor | float = 1.0) -> Tensor:
        # d(-log softmax(z)_t)/dz = softmax(z) - onehot(t), averaged over the targets that count.
        logits, targets = self.saved()
        counted = targets != IGNORED
        gradient = torch.softmax(logits.float() if logits.dtype.itemsize < 4 else logits, dim=-1)
        index = targets.masked_fill(~counted, 0).unsqueeze(-1)
        gradient.scatter_add_(-1, index, torch.full_like(index, -1, dtype=gradient.dtype))
        gradient *= (counted.to(gradient.dtype) / counted.sum().clamp(min=1)).unsqueeze(-1) * grad
        return gradient.to(logits.dtype)
