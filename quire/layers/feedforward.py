"""The part of a block that looks at each position by itself."""

from torch import Tensor

from quire.layers.activations import ACTIVATIONS, SiLU
from quire.layers.layer import Layer
from quire.layers.linear import Linear


class FeedForward(Layer):
    """down(activation(up(x))): widen, bend, narrow (Vaswani et al. 2017, 3.3)."""

    def __init__(self, size: int, hidden_size: int, activation: str, bias: bool = True) -> None:
        super().__init__()
        self.up = Linear(size, hidden_size, bias)
        self.activation = ACTIVATIONS[activation]()
        self.down = Linear(hidden_size, size, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))

    def backward(self, grad: Tensor) -> Tensor:
        return self.up.backward(self.activation.backward(self.down.backward(grad)))


class SwiGLU(Layer):
    """down(silu(gate(x)) * up(x)): one half opens and closes the other (Shazeer 2020)."""

    def __init__(self, size: int, hidden_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate = Linear(size, hidden_size, bias)
        self.up = Linear(size, hidden_size, bias)
        self.activation = SiLU()
        self.down = Linear(hidden_size, size, bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.activation(self.gate(x)), self.up(x)
        self.save(gate, up)
        return self.down(gate * up)

    def backward(self, grad: Tensor) -> Tensor:
        # Product rule, with a = silu(gate(x)) and u = up(x): da = dy u, du = dy a; x fed both: they add up.
        gate, up = self.saved()
        grad = self.down.backward(grad)
        return self.up.backward(grad * gate) + self.gate.backward(self.activation.backward(grad * up))
