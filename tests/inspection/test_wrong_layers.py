"""A learner's own layer: right, or wrong in any way, it is named, and not what is around or within it.

The drill that breaks Quire's own layers is in tests/benchmarks/test_bad_layers.py.
"""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quire.inspection import undoing
from quire.inspection.gradients import AGREES, UNCALLED, WITHIN, LayerCall, Pass, walk
from quire.layers.cross_entropy import CrossEntropy
from quire.layers.embedding import Embedding
from quire.layers.layer import Layer, add_grad
from quire.layers.linear import Linear


class Learner(Layer):
    """Embedding, a layer of one's own twice, head, loss."""

    def __init__(self, own: Layer) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embedding, self.own = Embedding(12, 6), own
        self.head, self.loss = Linear(6, 12), CrossEntropy()
        self.double()
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return self.loss(self.head(self.own(self.own(self.embedding(tokens)))), targets)

    def backward(self, grad: Tensor | float = 1.0) -> None:
        grad = self.head.backward(self.loss.backward(grad))
        self.embedding.backward(self.own.backward(self.own.backward(grad)))

    def found(self) -> Pass:
        row = torch.randint(12, (1, 6), generator=torch.Generator().manual_seed(2))
        return walk(self, {"tokens": row[:, :-1], "targets": row[:, 1:]})


class Scale(Layer):
    """x * weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        self.save(x)
        return x * self.weight

    def backward(self, grad: Tensor) -> Any:
        # dL/dweight = the sum over rows of grad x
        (x,) = self.saved()
        add_grad(self.weight, (grad * x).flatten(0, -2).sum(0))
        return grad * self.weight


class Outer(Layer):
    """tanh of what is within, and the input added."""

    def __init__(self, inner: Layer) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.inner(x))
        self.save(y)
        return x + y

    def backward(self, grad: Tensor) -> Any:
        (y,) = self.saved()
        return grad + self.inner.backward(grad * (1 - y.square()))


def verdicts(found: Pass) -> dict[str, str]:
    return {call.name: call.verdict for call in found.calls}


def named(found: Pass, name: str) -> LayerCall:
    return next(call for call in found.calls if call.name == name)


@pytest.mark.parametrize("own", [Scale, lambda: Outer(Scale()), lambda: Outer(Outer(Linear(6, 6)))])
def test_a_right_layer_of_ones_own(own):
    assert set(verdicts(Learner(own()).found()).values()) == {AGREES}


def wrong_input(self: Scale, grad: Tensor) -> Any:
    return -Scale.backward(self, grad)


def wrong_weight(self: Scale, grad: Tensor) -> Any:
    (x,) = self.saved()
    add_grad(self.weight, (grad * x)[0, 0])
    return grad * self.weight


def no_weight(self: Scale, grad: Tensor) -> Any:
    self.saved()
    return grad * self.weight


def slightly(self: Scale, grad: Tensor) -> Any:
    return Scale.backward(self, grad) * (1 + 1e-8)


def rounded(self: Scale, grad: Tensor) -> Any:
    return Scale.backward(self, grad).float().double()


def not_a_number(self: Scale, grad: Tensor) -> Any:
    return Scale.backward(self, grad) * float("nan")


def nothing(self: Scale, grad: Tensor) -> Any:
    Scale.backward(self, grad)


def a_number(self: Scale, grad: Tensor) -> Any:
    Scale.backward(self, grad)
    return 1.0


def two(self: Scale, grad: Tensor) -> Any:
    return Scale.backward(self, grad), grad


def too_flat(self: Scale, grad: Tensor) -> Any:
    return Scale.backward(self, grad).sum(0)


def wrong_shape_of_weight(self: Scale, grad: Tensor) -> Any:
    (x,) = self.saved()
    add_grad(self.weight, grad * x)
    return grad


def raises(self: Scale, grad: Tensor) -> Any:
    raise KeyError("a slip of the pen")


def missing(self: Scale, grad: Tensor) -> Any:
    return Layer.backward(self, grad)


def leaves_its_tape(self: Scale, grad: Tensor) -> Any:
    (x,) = self.tape[-1]  # type: ignore[index]
    add_grad(self.weight, (grad * x).flatten(0, -2).sum(0))
    return grad * self.weight


def takes_too_much(self: Scale, grad: Tensor) -> Any:
    if len(self.tape or ()) > 1:
        del (self.tape or [])[0]
    return Scale.backward(self, grad)


def writes_into_what_it_was_given(self: Scale, grad: Tensor) -> Any:
    given = Scale.backward(self, grad)
    return given.add_(grad.zero_() + 1)


@pytest.mark.parametrize(
    "backward, says",
    [
        (wrong_input, ""),
        (wrong_weight, ""),
        (no_weight, ""),
        (slightly, ""),
        (rounded, ""),
        (not_a_number, ""),
        (writes_into_what_it_was_given, ""),
        (nothing, r"returns no gradient of an input of shape \(1, 5, 6\)"),
        (a_number, "returns a float where a tensor belongs"),
        (two, "returns 2 gradients for 1 inputs"),
        (too_flat, r"returns a gradient of shape \(5, 6\) for an input of shape \(1, 5, 6\)"),
        (wrong_shape_of_weight, r"AssertionError: gradient \(1, 5, 6\) for a parameter \(6,\)"),
        (raises, "KeyError: 'a slip of the pen'"),
        (missing, "NotImplementedError: Wrong has no backward"),
        (leaves_its_tape, r"leaves on the tape of \S+ what its forward saved"),
        (takes_too_much, r"takes more from the tape of \S+ than its forward saved"),
    ],
)
def test_a_wrong_layer_is_named_wherever_it_stands(backward, says):
    """Alone, and within another: that one, and all around it, are not to blame."""

    class Wrong(Scale):
        pass

    Wrong.backward = backward  # type: ignore[method-assign]
    for own, path in [(Wrong(), "own"), (Outer(Outer(Wrong())), "own.inner.inner")]:
        found = Learner(own).found()
        seen = verdicts(found)
        assert {call.name for call in found.wrong} == {path}
        around = [name for name in ("own", "own.inner") if name != path and name in seen]
        assert all(seen[name] in (WITHIN, AGREES) for name in around) and seen[""] in (WITHIN, AGREES)
        assert {seen[name] for name in ("embedding", "head", "loss")} == {AGREES}
        notes = " ".join(note for call in found.wrong for note in call.notes)
        assert re.search(says, notes), notes
        if not says:
            assert not notes and any(call.apart for call in found.wrong)


def test_which_gradient_is_wrong():
    class Wrong(Scale):
        backward = no_weight  # type: ignore[assignment]

    found = Learner(Wrong()).found()
    parts = {part.name: part for part in found.wrong[0].apart}
    assert list(parts) == ["input", "weight"]
    assert parts["input"].autograd == 0 and parts["weight"].autograd == 1
    assert (parts["input"].numerical or 0) < 1e-6 and (parts["weight"].numerical or 0) > 0.1


class Forgets(Outer):
    def backward(self, grad: Tensor) -> Any:
        self.saved()
        return grad


class Twice(Outer):
    def backward(self, grad: Tensor) -> Any:
        return super().backward(grad) + self.inner.backward(grad)


class Misshapes(Outer):
    def backward(self, grad: Tensor) -> Any:
        (y,) = self.saved()
        return grad + self.inner.backward((grad * (1 - y.square()))[0])


class OwnSign(Outer):
    def backward(self, grad: Tensor) -> Any:
        (y,) = self.saved()
        return grad - self.inner.backward(grad * (1 - y.square()))


@pytest.mark.parametrize(
    "kind, inner, says",
    [
        (Forgets, UNCALLED, "never calls the backward of own.inner.inner"),
        (Twice, AGREES, "calls the backward of own.inner.inner once more than its forward called it"),
        (Misshapes, UNCALLED, r"gives the backward of own.inner.inner a gradient of shape \(5, 6\) where the output"),
        (OwnSign, AGREES, ""),
    ],
)
def test_a_wrong_composite_is_named_and_not_what_is_within(kind, inner, says):
    found = Learner(Outer(kind(Scale()))).found()
    assert {call.name for call in found.wrong} == {"own.inner"}
    assert named(found, "own").verdict == WITHIN and named(found, "").verdict == WITHIN
    assert inner in {call.verdict for call in found.calls if call.name == "own.inner.inner"}
    notes = " ".join(note for call in found.wrong for note in call.notes)
    assert re.search(says, notes), notes


def test_two_wrong_layers_one_within_the_other_are_both_named():
    class Wrong(Scale):
        backward = wrong_input  # type: ignore[assignment]

    found = Learner(OwnSign(Wrong())).found()
    assert {call.name for call in found.wrong} == {"own", "own.inner"}
    assert verdicts(found)[""] == WITHIN


def test_a_kink_is_no_fault():
    """At 0 max(0, x) has no slope: finite differences have no say there."""

    class Kink(Layer):
        def forward(self, x: Tensor) -> Tensor:
            self.save(x)
            return torch.relu(x * 0) + x

        def backward(self, grad: Tensor) -> Any:
            self.saved()
            return grad

    class AtZero(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.shift) + x

        def backward(self, grad: Tensor) -> Any:
            add_grad(self.shift, torch.zeros_like(self.shift))
            return grad

    assert set(verdicts(Learner(Kink()).found()).values()) == {AGREES}
    model = Learner(AtZero())
    nn.init.zeros_(model.own.shift)
    found = model.found()
    assert set(verdicts(found).values()) == {AGREES}
    assert named(found, "own").numerical_difference is None and "kink" in named(found, "own").notes[0]


def test_a_forward_that_torch_cannot_differentiate_is_judged_by_finite_differences():
    class Opaque(Scale):
        def forward(self, x: Tensor) -> Tensor:
            self.save(x)
            return torch.from_numpy(x.detach().numpy() * self.weight.detach().numpy())

        def backward(self, grad: Tensor) -> Any:
            return super().backward(grad) * self.sign

        sign = 1

    found = Learner(Opaque()).found()
    assert named(found, "own").numerical_difference is not None
    for sign, wrong in [(1, set()), (-1, {"own"})]:
        model = Learner(Opaque())
        model.own.sign = sign
        assert {call.name for call in model.found().wrong} == wrong


@pytest.mark.parametrize("where", ["differences", "by_autograd"])
def test_an_error_of_the_check_itself_is_no_layers_fault(where, monkeypatch):
    def fails(*arguments: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(undoing, where, fails)
    with pytest.raises(ZeroDivisionError):
        Learner(Outer(Scale())).found()


def test_a_full_memory_is_no_layers_fault():
    class Large(Scale):
        def backward(self, grad: Tensor) -> Any:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="allocate memory"):
        Learner(Large()).found()
