"""Whether one call of a layer was undone rightly: its gradients by hand beside autograd's, and finite differences.

All is done on that call alone, from the same inputs, with the same dropout and the same gradient of its output, so that
one broken layer does not make the others look wrong. y is the output, g the gradient by it, d a direction.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quire.inspection.calls import Call
from quire.layers.layer import recording

AGREES_AUTOGRAD, AGREES_NUMERICAL = 1e-10, 1e-6
STEPS = (1e-5, 1e-6, 1e-4, 1e-7)  # of finite differences, relative to the size of what is moved, tried in this order
NOISE = 1e-14  # relative errors of rounding that a difference of two outputs may have
SMALL = 1e-3  # a gradient below this share of the call's largest is compared with that share of it: it may be rounding


@dataclass(frozen=True, eq=False)
class Leaf:
    """Something that a call's gradients are by: an input, with its place among the inputs, or a parameter."""

    name: str
    tensor: Tensor
    found: Tensor  # the gradient by hand
    place: int | None = None  # None: a parameter


@dataclass(frozen=True)
class Apart:
    """The relative differences of one gradient of a call, that by an input or by a parameter."""

    name: str
    autograd: float | None
    numerical: float | None


@dataclass
class Findings:
    """Relative differences of a call's gradients, the largest; None where there is nothing to compare.

    `notes` say what was wrong besides; `apart` has the differences one by one, where they were asked for.
    """

    autograd: float | None = None
    numerical: float | None = None
    notes: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # what is worth saying, and no fault
    apart: list[Apart] = field(default_factory=list)

    @property
    def bad(self) -> bool:
        """Whether anything disagrees."""
        autograd = self.autograd is not None and not self.autograd < AGREES_AUTOGRAD
        numerical = self.numerical is not None and not self.numerical < AGREES_NUMERICAL
        return bool(self.notes) or autograd or numerical


# ---- autograd ----


@dataclass(frozen=True)
class Reference:
    """Autograd's gradients of a call: by its floating inputs, and by each parameter in it that is trained."""

    inputs: list[Tensor]
    parameters: dict[nn.Parameter, Tensor]


def trained(call: Call) -> dict[str, nn.Parameter]:
    """The parameters that a call's layer and the layers in it have, but for frozen ones."""
    return {name: parameter for name, parameter in call.layer.named_parameters() if parameter.requires_grad}


def by_autograd(call: Call, grads: list[Tensor]) -> Reference:
    """Differentiate the recorded forward of a call; a RuntimeError where torch cannot."""
    parameters = list(trained(call).values())
    with torch.enable_grad(), recording(call.layer):
        inputs = [x.detach().clone().requires_grad_() for x in call.inputs()]
        outputs = call.again([x.clone() for x in inputs])  # copies, which the layer may write into
        if not inputs and not parameters:
            return Reference([], {})
        if not any(y.requires_grad for y in outputs):
            raise RuntimeError("its result does not know what it was made from")
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in pairs], [*inputs, *parameters], [g for _, g in pairs], allow_unused=True
        )
    whole = [
        torch.zeros_like(x) if g is None else g.to_dense() for x, g in zip([*inputs, *parameters], found, strict=True)
    ]
    return Reference(whole[: len(inputs)], dict(zip(parameters, whole[len(inputs) :], strict=True)))


def differences(leaves: Sequence[Leaf], reference: Reference, grads: list[Tensor]) -> list[float]:
    """Of each gradient: the largest difference to autograd's, divided by autograd's largest number there.

    A gradient that is nothing but rounding, as that of a bias of keys, is measured by the call's larger ones.
    """
    theirs = [reference.parameters[leaf.tensor] if leaf.place is None else reference.inputs[leaf.place]  # type: ignore[index]
              for leaf in leaves]  # fmt: skip
    floor = SMALL * max((largest(x) for x in [*theirs, *grads]), default=0.0)
    return [relative(largest(leaf.found - x), max(largest(x), floor)) for leaf, x in zip(leaves, theirs, strict=True)]


def largest(x: Tensor) -> float:
    """The largest absolute number; NaN counts as infinite."""
    value = float(x.detach().abs().max()) if x.numel() else 0.0
    return value if value == value else float("inf")


def relative(gap: float, size: float) -> float:
    """gap / size; 0 where there is no gap, infinite where either is or there is a gap and no size."""
    if gap == 0:
        return 0.0
    return gap / size if 0 < size < float("inf") else float("inf")


# ---- finite differences ----


def numerical(
    call: Call, leaves: Sequence[Leaf], grads: list[Tensor], steps: Sequence[float] = STEPS
) -> tuple[float | None, bool]:
    """The relative difference of the slope along a random direction, measured, to the one that the gradients foretell.

    Central differences: <g, y(x + h d) - y(x - h d)> / 2h beside <gradient, d>, with d of the size of what it moves.
    Divided by the root mean square that <gradient, d> has over such directions. Several steps h are tried until one
    agrees; None, and True, where the slopes to both sides differ by as much as is missing: at a kink, as of ReLU.
    """
    directions = [direction(leaf.tensor, call.number + number) for number, leaf in enumerate(leaves)]
    parts = [(leaf.found * d).sum() for leaf, d in zip(leaves, directions, strict=True)]
    foretold = float(sum(parts)) if parts else 0.0
    size = float(sum((leaf.found * d).square().sum() for leaf, d in zip(leaves, directions, strict=True))) ** 0.5
    best = float("inf")
    with torch.no_grad():
        for step in steps:
            after, before = moved(call, leaves, directions, step), moved(call, leaves, directions, -step)
            slope = along(grads, after, before) / (2 * step)
            weighed = sum(float((g * torch.nan_to_num(y, 0.0, 0.0, 0.0)).square().sum()) for g, y in zip(grads, after))
            rounding = NOISE * weighed**0.5 / step / AGREES_NUMERICAL
            best = min(best, relative(abs(slope - foretold), max(size, abs(slope), rounding)))
            if best < AGREES_NUMERICAL:
                return best, False
        here = moved(call, leaves, directions, 0.0)
        bends = [torch.nan_to_num(g * (a - 2 * h + b), 0.0, 0.0, 0.0) for g, a, h, b in zip(grads, after, here, before)]
        bend = float(sum(x.abs().sum() for x in bends)) / step
    if abs(slope - foretold) <= bend + AGREES_NUMERICAL * size and bend > AGREES_NUMERICAL * size:
        return None, True
    return best, False


def direction(x: Tensor, seed: int) -> Tensor:
    """Random numbers of about the size of those in x, or of 0.01 where these are smaller; 0 where x is infinite."""
    generator = torch.Generator().manual_seed(seed)
    few = 65537  # a prime: repeated, they line up with no rows
    numbers = torch.randn(min(x.numel(), few), dtype=x.dtype, generator=generator)
    numbers = numbers.repeat(-(-x.numel() // few))[: x.numel()].view(x.shape)
    finite = x.detach().isfinite()
    size = float(torch.where(finite, x.detach(), 0.0).abs().mean()) if x.numel() else 0.0
    return numbers * max(size, 0.01) * finite


def moved(call: Call, leaves: Sequence[Leaf], directions: Sequence[Tensor], distance: float) -> list[Tensor]:
    """The call's output with every leaf moved along its direction."""
    inputs = [x.clone() for x in call.inputs()]
    with parameters_kept(leaves), recording(call.layer):
        for leaf, d in zip(leaves, directions, strict=True):
            if leaf.place is None:
                leaf.tensor.data = leaf.tensor.data.add(d, alpha=distance)
            else:
                inputs[leaf.place].add_(d, alpha=distance)
        return [y.clone() for y in call.again(inputs)]


@contextmanager
def parameters_kept(leaves: Sequence[Leaf]) -> Iterator[None]:
    """After this block the parameters are what they were, to the bit."""
    before = [leaf.tensor.data for leaf in leaves if leaf.place is None]
    try:
        yield
    finally:
        for leaf, data in zip([leaf for leaf in leaves if leaf.place is None], before, strict=True):
            leaf.tensor.data = data


def along(grads: list[Tensor], after: list[Tensor], before: list[Tensor]) -> float:
    """<g, after - before>; what is infinite on both sides has not moved."""
    total = 0.0
    for g, a, b in zip(grads, after, before, strict=True):
        gap = torch.where(a == b, 0.0, a - b)
        total += float((g * gap).sum())
    return total
