"""What a model costs, from its settings alone: parameters, memory, arithmetic. Nothing of it is allocated.

Measured on a model of torch's fake tensors, which have shapes and no contents, so that it holds for any kind of model.
Of a deep stack two shallow ones are measured, and the rest follows by a straight line: exactly so where all layers are
alike, nearly so where they take turns. Without attention costs are in proportion to the length, and a short window will
do.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from quire.layers.attention import ScaledDotProductAttention
from quire.layers.layer import Block, recording
from quire.layers.ngram_embedding import NgramEmbedding
from quire.layers.recurrent import RNN
from quire.models.settings import ModelSettings
from quire.run import empty_model

FLOAT = 4  # bytes of a float32
ADAM = 4 * FLOAT  # a weight, its gradient, and the two moments of Adam
SHORT = 32  # tokens
DEEP, SHALLOW = 6, (2, 3)  # from so many layers on, stacks of these depths are measured


@dataclass(frozen=True)
class Size:
    """`parameters`; `flops_per_token` of a forward pass over a whole context (a training step takes three times as
    many); bytes that forward keeps for backward for each window, as it is and with recomputed blocks; bytes of what is
    remembered of a full context while writing; how many of the parameters are n-gram tables."""

    parameters: int
    flops_per_token: int
    window_bytes: int
    recomputed_window_bytes: int
    cache_bytes: int
    table_parameters: int = 0

    def training_bytes(self, windows: int, recomputed: bool = False) -> int:
        """Memory of a training step on so many windows in float32, by Adam."""
        weights = ADAM * (self.parameters - self.table_parameters) + FLOAT * self.table_parameters  # sparse gradients
        return weights + windows * (self.recomputed_window_bytes if recomputed else self.window_bytes)

    @property
    def writing_bytes(self) -> int:
        """Memory of writing one text of the context length in float32."""
        return FLOAT * self.parameters + self.cache_bytes


def size_of(settings: ModelSettings) -> Size:
    """The size of the model that `settings` describe."""
    layers = getattr(settings, "layers", 0)
    if layers < DEEP:
        return _measured(settings)
    low, high = (vars(_measured(replace(settings, layers=count))) for count in SHALLOW)  # type: ignore[call-arg]
    return Size(**{name: low[name] + (layers - SHALLOW[0]) * (high[name] - low[name]) for name in low})


def _measured(settings: ModelSettings) -> Size:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with FakeTensorMode():
        model = empty_model(settings, torch.device("cpu")).train()
        looks_back = any(isinstance(module, ScaledDotProductAttention) for module in model.modules())
        length = settings.context_length if looks_back else min(SHORT, settings.context_length)
        tokens = torch.zeros(1, length, dtype=torch.long)
        given = {"tokens": tokens} | ({"source": tokens} if settings.reads_source else {})
        counter = FlopCounterMode(display=False)
        # Recorded, recurrent layers spell out every product, and so does attention's plainest kernel.
        recurrent = nn.ModuleList(module for module in model.modules() if isinstance(module, RNN))
        with torch.no_grad(), recording(recurrent), sdpa_kernel(SDPBackend.MATH), counter:
            model(**given)
        kept = []
        for recomputed in (False, True):
            for module in model.modules():
                if isinstance(module, Block):
                    module.recomputed = recomputed
            kept.append(_kept_bytes(model, {**given, "targets": tokens}) * settings.context_length // length)
        cache = model.new_cache(1)
        with torch.no_grad():
            model(**given, cache=cache)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        tables = sum(part.weight.numel() for part in model.modules() if isinstance(part, NgramEmbedding))
    flops = counter.get_total_flops() // length
    return Size(parameters, flops, kept[0], kept[1], _bytes(_tensors(cache)), tables)


def _kept_bytes(model: Any, given: dict[str, Tensor]) -> int:
    """What autograd keeps of a forward pass for the backward pass, parameters not counted."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(**given)
    return _bytes(kept)


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors; what several share counts once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor in an object's attributes, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return _tensors(vars(value)) if hasattr(value, "__dict__") else []
