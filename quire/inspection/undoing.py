"""The backward pass of a model, watched: each call's gradients as its layer's own backward gives them, checked on the
spot.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quire.inspection.calls import Call, floating, norm, picture, replaced
from quire.inspection.local_check import (
    AGREES_AUTOGRAD,
    STEPS,
    Apart,
    Findings,
    Leaf,
    Reference,
    by_autograd,
    differences,
    numerical,
    trained,
)
from quire.layers.layer import Layer
from quire.progress import Update

FEW = 8  # of a wrong call's gradients that disagree with autograd, each is put to finite differences too


class Misused(Exception):
    """A backward was called in a way that its layer has no part in: the caller's fault."""


@dataclass
class Undone:
    """What a call's backward was given and gave: norms, a picture, the gradients of parameters, and the verdict."""

    gradient: float
    picture: list[list[float]] | None
    returned: float | None = None
    parameters: dict[str, float] = field(default_factory=dict)  # norms of the gradients of the layer's own
    findings: Findings = field(default_factory=Findings)
    doubtful: bool = False  # something wrong in it could not be put right: what is wrong here may be that


class Backward:
    """The backward pass over recorded calls.

    `checked` says which calls are checked. With `repair` what is wrong is put right before it goes on, by autograd's
    gradients, so that a layer is judged by its own lines alone. `apart`: check the gradients of every call one by one
    too, not only those that are wrong.
    """

    def __init__(
        self, calls: Sequence[Call], checked: set[int], repair: bool, apart: bool, update: Update | None = None
    ) -> None:
        self.calls, self.checked, self.repair, self.apart = calls, checked, repair, apart
        self.update = update
        self.pending = {call.number for call in calls}
        self.running: list[Call] = []
        self.undone: dict[int, Undone] = {}
        self.stopped = False  # an error of the check itself is on its way out
        self.short: set[Layer] = set()  # layers from whose tapes too much was taken
        self.opaque: list[Call] = []  # calls that torch cannot differentiate
        self.broken: list[Call] = []  # wrong ones among them, which cannot be put right

    def call(self, layer: Layer, backward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do `backward`, the layer's, for the last call not yet undone; look at what it did."""
        call = self._last_of(layer)
        grads = self._given(call, args, kwargs)
        self.pending.discard(call.number)
        undone = Undone(norm(grads), picture(grads[0]) if len(grads) == 1 else None)
        self.undone[call.number] = undone
        before: dict[nn.Parameter, Tensor | None] = {parameter: parameter.grad for parameter in layer.parameters()}
        for parameter in before:
            parameter.grad = None  # so that what is found afterwards is of this call alone
        self.running.append(call)
        returned: Any = None
        whole = True
        try:
            returned = backward(*args, **kwargs)
        except Exception as error:
            if self.stopped or no_memory(error):
                raise  # the layer has no part in it
            whole = False
            told = str(error) or "no message"
            undone.findings.notes.append(told if isinstance(error, Misused) else f"{type(error).__name__}: {told}")
        finally:
            self.running.pop()
        self.stopped = True  # what is raised in here is no layer's fault
        self._leave_no_tape(call, undone.findings if whole else None)
        places = self._places(call, returned, undone.findings) if whole else None
        returned = self._checked(call, grads, returned, places, undone)
        self._tell(call, returned, undone, before)
        self.stopped = False
        return returned

    def _tell(self, call: Call, returned: Any, undone: Undone, before: dict[nn.Parameter, Tensor | None]) -> None:
        """Keep the norms, and add to the gradients of parameters what they were before the call."""
        undone.returned = norm(floating(returned)) if floating(returned) else None
        for name, parameter in call.layer.named_parameters(recurse=False):
            if parameter.grad is not None:
                undone.parameters[name] = norm([parameter.grad])
        for parameter, earlier in before.items():
            if parameter.grad is None:
                parameter.grad = earlier
            elif earlier is not None:
                parameter.grad = earlier + parameter.grad
        call.forget()
        if self.update is not None:
            self.update(1 - len(self.pending) / len(self.calls))

    # ---- what belongs to what ----

    def _last_of(self, layer: Layer) -> Call:
        """The layer's last call not yet undone, among those made within the call that is being undone."""
        mine = [call for call in reversed(self.calls) if call.layer is layer and call.number in self.pending]
        if not self.running:
            return mine[0]
        here = self.running[-1]
        for call in mine:
            if call.parent == here.number:
                return call
        for call in mine:
            if here.number in self.around(call):
                return call
        names = [call.name for call in self.calls if call.layer is layer] or [type(layer).__name__]
        raise Misused(f"calls the backward of {names[0]} once more than its forward called it")

    def around(self, call: Call) -> list[int]:
        """The calls within which a call was made."""
        found = []
        while call.parent is not None:
            found.append(call.parent)
            call = self.calls[call.parent]
        return found

    def _given(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Copies of the gradients by the call's results; a plain number stands for a scalar's."""
        grads = [x.clone() for x in floating((args, kwargs))]
        if not grads and call.outputs == [()]:
            number = next(iter((*args, *kwargs.values())), 1.0)
            grads = [torch.tensor(float(number), dtype=torch.float64)]
        if (shapes := [tuple(x.shape) for x in grads]) != call.outputs:
            raise Misused(
                f"gives the backward of {call.name} a gradient of shape {listed(shapes)}"
                f" where the output has shape {listed(call.outputs)}"
            )
        return grads

    def _leave_no_tape(self, call: Call, findings: Findings | None) -> None:
        """Say what the call's backward left on tapes or never undid, and take it away."""
        within = [
            self.calls[number] for number in sorted(self.pending) if call.number in self.around(self.calls[number])
        ]
        self.pending -= {inner.number for inner in within}
        missing = {inner.layer for inner in within}
        for layer, length in call.tapes.items():
            now = len(layer.tape or ())
            if findings is not None and now != length:
                name = next(other.name for other in self.calls if other.layer is layer)
                if layer in missing:
                    findings.notes.append(f"never calls the backward of {name}")
                elif now > length:
                    findings.notes.append(f"leaves on the tape of {name or 'the model'} what its forward saved")
                elif layer not in self.short:
                    self.short.add(layer)  # it is short for all calls around this one too
                    findings.notes.append(f"takes more from the tape of {name or 'the model'} than its forward saved")
                missing.discard(layer)
            if layer.tape is not None:
                del layer.tape[length:]
        if findings is not None:
            left = dict.fromkeys(inner.name for inner in within if inner.layer in missing and inner.learns)
            findings.remarks += [f"never calls the backward of {name}" for name in left]

    def _places(self, call: Call, returned: Any, findings: Findings) -> list[int] | None:
        """Which input each of the returned gradients is by; None where they do not fit the inputs."""
        parts = list(returned) if isinstance(returned, (tuple, list)) else [] if returned is None else [returned]
        inputs = call.inputs()
        wanted = [place for place, want in enumerate(call.wanted) if want]
        places = wanted if len(parts) == len(wanted) else list(range(len(inputs)))[: len(parts)]
        if len(parts) > len(places):
            findings.notes.append(f"returns {len(parts)} gradients for {len(inputs)} inputs")
            return None
        by_place, before = dict(zip(places, parts)), len(findings.notes)
        for place in sorted({*places, *wanted}):
            part, shape = by_place.get(place), tuple(inputs[place].shape)
            if part is None:
                if place in wanted:
                    findings.notes.append(f"returns no gradient of an input of shape {shape}")
            elif not isinstance(part, Tensor):
                findings.notes.append(f"returns a {type(part).__name__} where a tensor belongs")
            elif tuple(part.shape) != shape:
                findings.notes.append(f"returns a gradient of shape {tuple(part.shape)} for an input of shape {shape}")
        return None if len(findings.notes) > before else [place for place in places if by_place[place] is not None]

    # ---- the check ----

    def _checked(self, call: Call, grads: list[Tensor], returned: Any, places: list[int] | None, undone: Undone) -> Any:
        """Compare; gives what goes on to the layers before: what was returned, or what should have been."""
        findings = undone.findings
        if call.number not in self.checked and places is not None and not findings.notes:
            return returned
        reference = self._reference(call, grads, findings)
        found = dict(zip(places, floating(returned))) if places is not None else {}
        leaves = self._leaves(call, found)
        if call.number in self.checked and places is not None and leaves:
            compare(call, leaves, grads, reference, findings)
            if self.apart or (self.repair and findings.bad):
                compare_apart(call, leaves, grads, reference, findings, self.apart)
        if findings.bad and reference is None:
            undone.doubtful = any(call.number in self.around(other) for other in self.broken)
            self.broken.append(call)
        if places is None or (self.repair and findings.bad and reference is not None):
            for parameter in trained(call).values():
                parameter.grad = reference.parameters[parameter] if reference else None
            return self._right(call, returned if places is not None else None, places, reference)
        return returned

    def _reference(self, call: Call, grads: list[Tensor], findings: Findings) -> Reference | None:
        if any(call.number in self.around(other) for other in self.opaque):
            return None
        try:
            return by_autograd(call, grads)
        except (RuntimeError, NotImplementedError) as error:
            if no_memory(error):
                raise
            findings.remarks.append(f"torch cannot differentiate its forward: {str(error).splitlines()[0]}")
            self.opaque.append(call)
            return None

    def _leaves(self, call: Call, found: dict[int, Tensor]) -> list[Leaf]:
        inputs = call.inputs()
        names = {place: f"input {n}" if len(found) > 1 else "input" for n, place in enumerate(found, 1)}
        leaves = [Leaf(names[place], inputs[place], gradient, place) for place, gradient in found.items()]
        for name, parameter in trained(call).items():
            leaves.append(Leaf(name, parameter, zeros_unless(parameter)))
        return leaves

    def _right(self, call: Call, returned: Any, places: list[int] | None, reference: Reference | None) -> Any:
        """The right gradients in the form of those returned, or, without any, of the inputs that want one."""
        inputs = call.inputs()
        right = reference.inputs if reference else [torch.zeros_like(x) for x in inputs]
        if places is not None:
            return replaced(returned, [right[place] for place in places])
        wanted = [right[place] for place, want in enumerate(call.wanted) if want]
        return tuple(wanted) if len(wanted) > 1 else wanted[0] if wanted else None


def no_memory(error: Exception) -> bool:
    """Whether the machine is to blame."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def zeros_unless(parameter: nn.Parameter) -> Tensor:
    """A parameter's gradient; zeros where it has none."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()


def compare(
    call: Call, leaves: Sequence[Leaf], grads: list[Tensor], reference: Reference | None, findings: Findings
) -> None:
    """Fill in the differences of a call's gradients, all together."""
    if reference is not None:
        findings.autograd = max(differences(leaves, reference, grads))
    steps = STEPS[:1] if findings.bad else STEPS  # that it is wrong is known: no need to look for a better step
    findings.numerical, kink = numerical(call, leaves, grads, steps)
    if kink:
        findings.remarks.append("finite differences step over a kink, where there is no slope")


def compare_apart(
    call: Call, leaves: Sequence[Leaf], grads: list[Tensor], reference: Reference | None, findings: Findings, all: bool
) -> None:
    """Fill in the differences gradient by gradient; `all`: to finite differences too, else of the first FEW wrong."""
    gaps = [None] * len(leaves) if reference is None else differences(leaves, reference, grads)
    doubted = [leaf for leaf, gap in zip(leaves, gaps) if gap is None or not gap < AGREES_AUTOGRAD]
    measured = leaves if all or not doubted else doubted[:FEW]
    for leaf, gap in zip(leaves, gaps, strict=True):
        steps = STEPS[:1] if gap is not None and not gap < AGREES_AUTOGRAD else STEPS
        slope = numerical(call, [leaf], grads, steps)[0] if leaf in measured else None
        findings.apart.append(Apart(leaf.name, gap, slope))


def listed(shapes: Sequence[tuple[int, ...]]) -> str:
    """Shapes as text."""
    return " and ".join(str(shape) for shape in shapes) or "none"
