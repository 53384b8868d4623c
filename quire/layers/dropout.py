"""Dropout: while training, each number is zeroed with probability p and the rest grow by 1 / (1 - p)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire.layers.layer import Layer


class Dropout(Layer):
    """y = x m / (1 - p), each m drawn: 0 with probability p, else 1; outside training y = x (Srivastava et al. 2014).

    Draws from torch's default generator; on a CPU alike whether recording or not.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            self.save(None)
            return x
        if self.tape is None:
            return F.dropout(x, self.p)
        keep = self.draw(x)
        self.save(keep)
        return self.applied(x, keep)

    def backward(self, grad: Tensor) -> Tensor:
        # Linear in x: what was zeroed receives nothing, the rest what it gave, as much larger.
        (keep,) = self.saved()
        return grad if keep is None else self.applied(grad, keep)

    def draw(self, x: Tensor) -> Tensor:
        """What is kept of x: a byte for each number, 1 or 0."""
        return torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - self.p).view(torch.uint8)

    def applied(self, x: Tensor, keep: Tensor) -> Tensor:
        """x, of which `keep` is kept."""
        return (x * keep).mul_(1 / (1 - self.p))


def drops(model: nn.Module) -> bool:
    """Whether any layer of a model drops something out while it trains."""
    own = [getattr(module, "p" if isinstance(module, Dropout) else "dropout", 0.0) for module in model.modules()]
    return any(isinstance(probability, float) and probability > 0 for probability in own)
