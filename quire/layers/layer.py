"""The base of every layer: an ordinary nn.Module that can also record, and run its own backward."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from quire.devices import generators


class Layer(nn.Module):
    """An nn.Module with a hand-written gradient.

    `forward` is ordinary PyTorch. While recording, it leaves what its gradient needs on `tape`, a stack;
    `backward(grad)` takes that off again, adds to each parameter's `.grad`, and returns the gradient of the input.
    Layers therefore run backward in the exact reverse of the order in which they ran forward.
    """

    tape: list[Any] | None = None  # None: not recording

    def save(self, *values: Any) -> None:
        """Keep `values` for backward; does nothing unless recording."""
        if self.tape is not None:
            self.tape.append(values)

    def saved(self) -> Any:
        """The values of the last `save` not yet taken."""
        assert self.tape, f"{type(self).__name__}.backward without a recorded forward"
        return self.tape.pop()

    def backward(self, grad: Tensor) -> Any:
        """Gradient of the loss by the input, given `grad`, the gradient by the output (same shape as it)."""
        raise NotImplementedError(f"{type(self).__name__} has no backward")


class Block(Layer):
    """A layer of a stack, large enough to be `recomputed`: it then keeps its inputs alone, and does its forward again
    when its gradient is wanted (Chen et al. 2016). Gradients are the same, dropout included.

    Models call `run` and `undo` in place of `forward` and `backward`; the first input is a tensor.
    """

    recomputed = False

    def run(self, *inputs: Any) -> Any:
        """`forward` of the same inputs."""
        if not (self.recomputed and self.training):
            return self(*inputs)
        if self.tape is None:
            return checkpoint(self, *inputs, use_reentrant=False) if torch.is_grad_enabled() else self(*inputs)
        drawn = [state for state, _ in generators(inputs[0].device).values()]
        with recording(self):  # the very forward that is done again, whose tapes are let go
            result = self(*inputs)
        self.save(inputs, drawn)
        return result

    def undo(self, grad: Tensor) -> Any:
        """`backward` of the last `run`."""
        if not (self.recomputed and self.training):
            return self.backward(grad)
        inputs, drawn = self.saved()
        now = list(generators(inputs[0].device).values())
        with recording(self):
            for (_, put), state in zip(now, drawn, strict=True):
                put(state)
            self(*inputs)
            for state, put in now:
                put(state)
            return self.backward(grad)


@contextlib.contextmanager
def recording(model: nn.Module) -> Iterator[None]:
    """Within this block every Layer of `model` records its forward on a fresh tape, so that `backward` may follow."""
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    before = [layer.tape for layer in layers]
    for layer in layers:
        layer.tape = []
    try:
        yield
    finally:
        for layer, tape in zip(layers, before, strict=True):
            layer.tape = tape


PIECE = 65536  # numbers: a quarter of a megabyte of float32, which a core keeps close


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, all (..., C), as rows (n, C), on a CPU some rows at a time.

    A formula of several steps reads and writes each number several times; piece by piece that happens in the
    processor's cache, and not in memory. On other devices there is one piece.
    """
    rows = [tensor.flatten(0, -2) if tensor.dim() > 1 else tensor.unsqueeze(0) for tensor in tensors]
    if tensors[0].device.type != "cpu":
        return iter([tuple(rows)])
    count = max(1, PIECE // max(1, rows[0].shape[-1]))
    return zip(*(row.split(count) for row in rows), strict=True)


def add_grad(parameter: nn.Parameter, grad: Tensor) -> None:
    """Add `grad` (the parameter's shape), which the caller made and gives away, to the parameter's `.grad`."""
    assert grad.shape == parameter.shape, f"gradient {tuple(grad.shape)} for a parameter {tuple(parameter.shape)}"
    if not parameter.requires_grad:
        return
    with torch.no_grad():
        if parameter.grad is None:
            parameter.grad = grad.to(parameter.dtype)
        else:
            parameter.grad += grad


def add_product(parameter: nn.Parameter, grad: Tensor, x: Tensor) -> None:
    """Add the gradient of a matrix (outputs, inputs) that made rows `grad` (N, outputs) of rows `x` (N, inputs)."""
    same = grad.dtype is x.dtype is parameter.dtype  # under mixed precision it is a product that autocast has to see
    if parameter.grad is None or not same or not parameter.requires_grad:
        add_grad(parameter, grad.T @ x)
    else:
        with torch.no_grad():
            parameter.grad.addmm_(grad.T, x)
