"""Recurrent layers: a state that reads one position after another (Elman 1990, LSTM, GRU).

B batch, T time, C input channels, H state channels (size), G gates. x_t is an input, h_t the state after it.
Weights of all gates lie below each other, (G H, C) and (G H, H), named and ordered as in torch.nn.RNN, LSTM and GRU.
"""

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire.layers.layer import Layer, add_grad, add_product

State = tuple[Tensor, ...]  # each (B, H): the hidden state first, then what else a layer carries on


class Memory:
    """What one recurrent layer remembers of the `length` positions it has read: its state, None before the first."""

    def __init__(self) -> None:
        self.state: State | None = None
        self.length = 0

    def cut(self, length: int) -> None:
        """Keep all, or with length 0 nothing; any other is a ValueError, since a state has no way back."""
        if 0 < length < self.length:
            raise ValueError(
                f"A recurrent state of {self.length} positions cannot be cut to {length}: what came later is mixed into"
                " it. Read those positions anew with a fresh cache."
            )
        if length == 0:
            self.state, self.length = None, 0

    def copy(self) -> "Memory":
        """Another that goes its own way; the tensors are never changed, and may be shared."""
        other = Memory()
        other.state, other.length = self.state, self.length
        return other

    def reordered(self, rows: Tensor) -> "Memory":
        """A new one whose row i is this one's row rows[i]."""
        other = Memory()
        other.state = None if self.state is None else tuple(part[rows] for part in self.state)
        other.length = self.length
        return other


class RNN(Layer):
    """h_t = tanh(W x_t + b + U h_{t-1} + c) (Elman 1990): (B, T, C) to the states (B, T, H), as torch.nn.RNN.

    The other two differ in `step` alone, which makes a state of the one before, and in its gradient: `slopes`, what of
    it is known of all times at once, and `step_back`, what has to wait for the step after.
    """

    GATES, STATES = 1, 1

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.inputs, self.size = inputs, size
        # A GPU's kernel wants the weights as one piece of memory, and copies them together where they are not.
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk", UserWarning)
        self.weight_ih_l0 = nn.Parameter(torch.empty(self.GATES * size, inputs))
        self.weight_hh_l0 = nn.Parameter(torch.empty(self.GATES * size, size))
        self.bias_ih_l0 = nn.Parameter(torch.zeros(self.GATES * size))
        self.bias_hh_l0 = nn.Parameter(torch.zeros(self.GATES * size))
        self.initialize()

    def initialize(self) -> None:
        """Inputs normal with deviation 1 / sqrt(C); each gate's map of the state orthogonal, which neither shrinks nor
        grows what passes through it many times (Saxe et al. 2014)."""
        nn.init.normal_(self.weight_ih_l0, std=self.inputs**-0.5)
        for gate in self.weight_hh_l0.detach().chunk(self.GATES):
            nn.init.orthogonal_(gate)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, starts: Tensor | None = None, memory: Memory | None = None
    ) -> Tensor:
        """x (B, T, C) gives the states (B, T, H); `memory` holds the state to begin from, and takes the last one.

        `mask` (B, T) is False on padding, which leaves the state as it was. `starts` (B, T) is True where the state is
        forgotten before the position is read.
        """
        state = memory.state if memory is not None else None
        if state is None:
            state = (self.weight_hh_l0.new_zeros(len(x), self.size),) * self.STATES
        if self.tape is None and mask is None and starts is None:
            with torch.autocast("cpu", enabled=False):  # torch has no such kernel of mixed precision on a CPU
                states, state = self.kernel(x.to(self.weight_hh_l0.dtype), state)
            states = states.contiguous()  # as below: a dropout after it then draws alike, whichever way it was made
        else:
            states, state = self.spelled_out(x, state, mask, starts)
        if memory is not None:
            memory.state = state
        return states

    def spelled_out(self, x: Tensor, state: State, mask: Tensor | None, starts: Tensor | None) -> tuple[Tensor, State]:
        """The same as torch's own kernel, line by line: the states (B, T, H), and the last with all it carries."""
        from_inputs = F.linear(x, self.weight_ih_l0, self.bias_ih_l0)  # (B, T, G H), of all times at once
        states, before, kept = [], [], []
        for t in range(x.shape[1]):
            if starts is not None:
                state = tuple(part.masked_fill(starts[:, t, None], 0) for part in state)
            from_state = F.linear(state[0], self.weight_hh_l0, self.bias_hh_l0)  # (B, G H)
            new, needed = self.step(from_inputs[:, t], from_state, state)
            before.append(state[0])
            kept.append(needed)
            if mask is not None:
                new = tuple(torch.where(mask[:, t, None], part, old) for part, old in zip(new, state, strict=True))
            state = new
            states.append(state[0])
        if self.tape is not None:
            self.save(x, torch.stack(before), [torch.stack(part) for part in zip(*kept, strict=True)], mask, starts)
        return torch.stack(states, 1), state

    def backward(self, grad: Tensor) -> Tensor:
        # Through time, last step first: a state's gradient is what its own output receives, and what comes back from
        # the step after it, directly and by way of U. The loop finds the gradients of the gates, before their curves;
        # the weights' are then one product each: dW = sum over B, T of dgates^T x_t, dU = the same with h_{t-1}.
        x, before, kept, mask, starts = self.saved()
        slopes = self.slopes(before, *kept)  # each (T, B, ...)
        del kept
        passed: Any = (0.0,) * self.STATES
        grads_inputs: list[Tensor] = []
        grads_state: list[Tensor] = []
        for t in reversed(range(x.shape[1])):
            received = (passed[0] + grad[:, t], *passed[1:])
            into = received
            if mask is not None:  # a padded step hands on what it received
                into = tuple(part * mask[:, t, None] for part in received)
            from_inputs, from_state, direct = self.step_back(into, *(slope[t] for slope in slopes))
            passed = (direct[0] + from_state @ self.weight_hh_l0, *direct[1:])
            if mask is not None:
                passed = tuple(part + old * ~mask[:, t, None] for part, old in zip(passed, received, strict=True))
            if starts is not None:  # a forgotten state had no part in anything
                passed = tuple(part.masked_fill(starts[:, t, None], 0) for part in passed)
            grads_inputs.append(from_inputs)
            if from_state is not from_inputs:  # where the two are not simply added
                grads_state.append(from_state)
        del slopes
        grad_inputs = torch.stack(grads_inputs[::-1], 1)  # (B, T, G H)
        del grads_inputs
        grad_state = torch.stack(grads_state[::-1], 1) if grads_state else grad_inputs
        for rows, read, weight, bias in (
            (grad_inputs, x, self.weight_ih_l0, self.bias_ih_l0),
            (grad_state, before.transpose(0, 1), self.weight_hh_l0, self.bias_hh_l0),
        ):
            add_product(weight, rows.flatten(0, 1), read.flatten(0, 1))
            add_grad(bias, rows.sum((0, 1)))
        return grad_inputs @ self.weight_ih_l0

    # ---- what makes it this layer ----

    def kernel(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """Torch's own kernel."""
        states, hidden = torch.rnn_tanh(x, state[0].unsqueeze(0), *self._arguments())
        return states, (hidden[0],)

    def step(self, from_inputs: Tensor, from_state: Tensor, state: State) -> tuple[State, tuple[Tensor, ...]]:
        """The next state, and what `slopes` needs; from_inputs = W x + b and from_state = U h + c, each (B, G H)."""
        hidden = torch.tanh(from_inputs + from_state)
        return (hidden,), (hidden,)

    def slopes(self, before: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        """What `step_back` needs, of all times (T, B, ...): of the states before, and of what `step` left."""
        # tanh' = 1 - tanh^2
        (hidden,) = kept
        return (1 - hidden.square(),)

    def step_back(self, grads: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Of a new state's gradient: those of from_inputs, from_state, and of the old state but for U's part."""
        # Both sums enter the tanh alike, and the old state by way of U alone.
        grad = grads[0] * slopes[0]
        return grad, grad, (0.0,)

    def _arguments(self) -> tuple[Any, ...]:
        """What torch's kernels want after input and state: weights, has_biases, num_layers, dropout, train,
        bidirectional, batch_first."""
        weights = [self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0]
        return weights, True, 1, 0.0, torch.is_grad_enabled(), False, True


class LSTM(RNN):
    """c_t = f c_{t-1} + i g and h_t = o tanh(c_t), with i, f, o = sigmoid and g = tanh of W x_t + b + U h_{t-1} + c.

    A cell that gates write, keep and show (Hochreiter and Schmidhuber 1997; Gers et al. 2000), as torch.nn.LSTM.
    """

    GATES, STATES = 4, 2

    def initialize(self) -> None:
        """As the others; the forget gate begins open, its bias 1 (Gers et al. 2000; Jozefowicz et al. 2015)."""
        super().initialize()
        nn.init.ones_(self.bias_ih_l0.detach()[self.size : 2 * self.size])

    def kernel(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        states, hidden, cell = torch.lstm(x, [part.unsqueeze(0) for part in state], *self._arguments())
        return states, (hidden[0], cell[0])

    def step(self, from_inputs: Tensor, from_state: Tensor, state: State) -> tuple[State, tuple[Tensor, ...]]:
        i, f, g, o = (from_inputs + from_state).chunk(4, dim=1)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)
        cell = f * state[1] + i * g
        shown = torch.tanh(cell)
        return (o * shown, cell), (i, f, g, o, state[1], shown)

    def slopes(self, before: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        # Through h_t = o tanh(c_t):        do = dh tanh(c_t),  dc_t = what came back + dh o (1 - tanh(c_t)^2)
        # Through c_t = f c_{t-1} + i g:    di = dc_t g,  df = dc_t c_{t-1},  dg = dc_t i,  dc_{t-1} = dc_t f
        # Through the curves:               sigmoid' = s (1 - s), tanh' = 1 - tanh^2
        i, f, g, o, cell, shown = kept
        by_cell = torch.stack((g * i * (1 - i), cell * f * (1 - f), i * (1 - g.square())), dim=2)  # (T, B, 3, H)
        return by_cell, shown * o * (1 - o), o * (1 - shown.square()), f

    def step_back(self, grads: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, Any]:
        by_cell, by_state, shown, f = slopes
        grad_cell = grads[1] + grads[0] * shown
        gates = torch.cat(((by_cell * grad_cell.unsqueeze(1)).flatten(1), by_state * grads[0]), dim=1)  # (B, 4 H)
        return gates, gates, (0.0, grad_cell * f)


class GRU(RNN):
    """h_t = (1 - z) n + z h_{t-1}, with z, r = sigmoid(a + u) and n = tanh(a + r u), a = W x_t + b, u = U h_{t-1} + c.

    One gate mixes old and new, another resets (Cho et al. 2014, the reset after the product as in torch.nn.GRU).
    """

    GATES = 3

    def kernel(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        states, hidden = torch.gru(x, state[0].unsqueeze(0), *self._arguments())
        return states, (hidden[0],)

    def step(self, from_inputs: Tensor, from_state: Tensor, state: State) -> tuple[State, tuple[Tensor, ...]]:
        (r, z, n), (reset, update, inner) = from_inputs.chunk(3, dim=1), from_state.chunk(3, dim=1)
        r, z = torch.sigmoid(r + reset), torch.sigmoid(z + update)
        n = torch.tanh(n + r * inner)
        return ((1 - z) * n + z * state[0],), (r, z, n, inner)

    def slopes(self, before: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        # Through h_t = (1 - z) n + z h_{t-1}:    dn = dh (1 - z),  dz = dh (h_{t-1} - n),  dh_{t-1} = dh z
        # Through n = tanh(a + r inner), inner = U h_{t-1} + c:    da = dn (1 - n^2),  dr = da inner,  dinner = da r
        # Through r and z:    sigmoid' = s (1 - s)
        r, z, n, inner = kept
        by_n = (1 - z) * (1 - n.square())
        return torch.cat((by_n * inner * r * (1 - r), (before - n) * z * (1 - z)), -1), by_n, r, z

    def step_back(self, grads: Any, *slopes: Tensor) -> tuple[Tensor, Tensor, Any]:
        by_gates, by_n, r, z = slopes
        (grad,) = grads
        gates, grad_n = by_gates * grad.repeat(1, 2), by_n * grad
        return torch.cat((gates, grad_n), 1), torch.cat((gates, grad_n * r), 1), (grad * z,)


CELLS: dict[str, type[RNN]] = {"rnn": RNN, "lstm": LSTM, "gru": GRU}
