"""The calls of a model's layers in one forward pass: which call was made within which, and whose results it read.

T positions, C channels.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quire.layers.layer import Layer

PARAMETER = -1  # among sources: a parameter itself, read outside of any call
ROWS, COLUMNS = 24, 48  # of a picture, at most


@dataclass
class Call:
    """One call of a layer, with all that is needed to make it again.

    `sources` are the calls whose results it read. `wanted` says of each floating input whether a gradient can go on
    from it to a parameter, `learns` the same of the result. `tapes` are the lengths, before the call, of the tapes of
    the layer and of all layers in it.
    """

    number: int
    name: str
    layer: Layer
    parent: int | None
    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    random: Tensor
    sources: frozenset[int]
    wanted: list[bool]
    learns: bool
    tapes: dict[Layer, int]
    children: list[int] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)  # of its inputs
    outputs: list[tuple[int, ...]] = field(default_factory=list)  # the shapes of its results
    norm: float = 0.0  # of its results
    picture: list[list[float]] | None = None  # of its result

    def inputs(self) -> list[Tensor]:
        """Its floating inputs, those of tuples and lists too."""
        return floating(self.arguments)

    def again(self, inputs: list[Tensor]) -> list[Tensor]:
        """What the layer gives for other inputs, with the same dropout; its tapes, recorded on, are its caller's."""
        args, kwargs = replaced(self.arguments, iter(inputs))
        before = torch.get_rng_state()
        try:
            torch.set_rng_state(self.random)
            return floating(self.layer(*args, **kwargs))
        finally:
            torch.set_rng_state(before)

    def forget(self) -> None:
        """Let go of the tensors."""
        self.arguments = ((), {})


class Provenance(TorchFunctionMode):
    """Every tensor knows the calls it was made from, whatever arithmetic lies between: the union over what it read."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = list(tensors(result))
        if made:
            found = sources_of((args, kwargs))
            for tensor in made:
                mark(tensor, found)
        return result


class Forward:
    """The calls of one forward pass, as they were made."""

    def __init__(self, model: Layer) -> None:
        self.calls: list[Call] = []
        self.running: list[Call] = []
        self.names = {module: name for name, module in model.named_modules() if isinstance(module, Layer)}

    def call(self, layer: Layer, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do `forward`, the layer's, and keep what it was called with."""
        parent = self.running[-1] if self.running else None
        given, sources = list(tensors((args, kwargs))), sources_of((args, kwargs))
        call = Call(
            number=len(self.calls),
            name=self.names[layer],
            layer=layer,
            parent=None if parent is None else parent.number,
            arguments=replaced((args, kwargs), (x.clone() for x in floating((args, kwargs)))),
            random=torch.get_rng_state(),
            sources=sources,
            wanted=[self.learns(sources_of(x)) for x in floating(given)],
            learns=self.learns(sources) or any(True for _ in layer.parameters()),
            tapes={inner: len(inner.tape or ()) for inner in layer.modules() if isinstance(inner, Layer)},
            shapes=[tuple(x.shape) for x in given],
        )
        self.calls.append(call)
        if parent is not None:
            parent.children.append(call.number)
        self.running.append(call)
        try:
            result = forward(*args, **kwargs)
        finally:
            self.running.pop()
        if not call.children:  # its result is its own; where it hands on what it was given, under another name
            known = {id(x) for x in given}
            result = replaced(result, (x.view_as(x) if id(x) in known else x for x in floating(result)))
            for tensor in tensors(result):
                mark(tensor, frozenset({call.number}))
        given = floating(result)
        call.outputs, call.norm = [tuple(x.shape) for x in given], norm(given)
        call.picture = picture(given[0]) if len(given) == 1 else None
        return result

    def learns(self, sources: frozenset[int]) -> bool:
        """Whether a parameter is among what the sources were made from."""
        return PARAMETER in sources or any(self.calls[source].learns for source in sources)


Watch = Callable[[Layer, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextlib.contextmanager
def watched(model: nn.Module, method: str, watch: Watch) -> Iterator[None]:
    """Within this block a call of any layer's `method` is one of watch(layer, the method, arguments, named ones)."""
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    before = [vars(layer).get(method) for layer in layers]

    def watching(layer: Layer, original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: watch(layer, original, args, kwargs)

    for layer in layers:
        vars(layer)[method] = watching(layer, getattr(layer, method))
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del vars(layer)[method]
            else:
                vars(layer)[method] = own


# ---- tensors in tuples, lists and dictionaries ----


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def floating(value: Any) -> list[Tensor]:
    """Every tensor of floating numbers in a value."""
    return [x for x in tensors(value) if x.is_floating_point()]


def replaced(value: Any, others: Iterable[Tensor]) -> Any:
    """The same value with other tensors in place of the floating ones."""
    others = iter(others)

    def walk(value: Any) -> Any:
        if isinstance(value, Tensor):
            return next(others) if value.is_floating_point() else value
        if isinstance(value, (tuple, list)):
            parts = [walk(part) for part in value]
            return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
        if isinstance(value, dict):
            return {key: walk(part) for key, part in value.items()}
        return value

    return walk(value)


def mark(tensor: Tensor, sources: frozenset[int]) -> None:
    """Let a tensor know what it was made from."""
    if not isinstance(tensor, nn.Parameter):
        tensor.__dict__["sources"] = sources


def sources_of(value: Any) -> frozenset[int]:
    """What the tensors in a value were made from."""
    found: set[int] = set()
    for tensor in tensors(value):
        found |= {PARAMETER} if isinstance(tensor, nn.Parameter) else tensor.__dict__.get("sources", frozenset())
    return frozenset(found)


# ---- what is told of a tensor ----


def norm(values: list[Tensor]) -> float:
    """The Euclidean norm of all finite numbers together."""
    return float(sum(torch.nan_to_num(x.to_dense().double(), 0.0, 0.0, 0.0).square().sum() for x in values)) ** 0.5


def picture(value: Tensor) -> list[list[float]] | None:
    """|values| of (1, T, C), three digits each; None for any other shape.

    Of more than ROWS x COLUMNS each cell has the largest of its part, so that what stands out is not lost.
    """
    if value.dim() != 3 or len(value) != 1 or value.numel() == 0:
        return None
    size = (min(value.shape[1], ROWS), min(value.shape[2], COLUMNS))
    small = F.adaptive_max_pool2d(torch.nan_to_num(value.abs(), 0.0, 0.0, 0.0), size)[0]
    return [[float(f"{x:.3g}") for x in row] for row in small.tolist()]
