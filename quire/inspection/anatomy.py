"""A model taken apart: how many parameters each part has, and how long their weights and gradients are."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from quire.data.batches import cut
from quire.layers.layer import Block
from quire.run import Run
from quire.training.engines import ENGINES

# The part of a parameter is that of the outermost module around it whose class, or a base of it, is named here.
PARTS = {
    "LearnedPositions": "positions",
    "Embedding": "embedding",
    "NgramEmbedding": "n-gram tables",
    "MultiHeadAttention": "attention",
    "CrossAttention": "attention",
    "FeedForward": "feedforward",
    "SwiGLU": "feedforward",
    "RNN": "recurrent",
    "LSTM": "recurrent",
    "GRU": "recurrent",
    "LayerNorm": "norms",
    "RMSNorm": "norms",
    "OutputHead": "head",
    "Linear": "dense",
}
OTHER = "other"

TOKENS = 4096  # of held-out text, at most, for one gradient


@dataclass(frozen=True)
class TensorFacts:
    """One parameter: where it is, and the Euclidean norms of its weights and of the loss's gradient by them.

    `block` is the path of the block of the stack that it belongs to, "" outside. `gradient_norm` is None where no
    gradient was measured or the parameter takes no part in the loss.
    """

    name: str
    part: str
    block: str
    shape: tuple[int, ...]
    parameters: int
    weight_norm: float
    gradient_norm: float | None = None


@dataclass(frozen=True)
class PartFacts:
    """Several parameters together; a norm is that of all their numbers as one vector."""

    name: str
    parameters: int
    weight_norm: float
    gradient_norm: float | None


@dataclass(frozen=True)
class Gradient:
    """One batch's gradient: the loss in nats per token, the tokens it is the mean over, the norm of each tensor."""

    loss: float
    tokens: int
    norms: dict[str, float]


def anatomy(model: nn.Module, gradient: Gradient | None = None) -> list[TensorFacts]:
    """Every parameter of the model once, in its order; a tied one under its first name."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, Block)]
    facts = []
    for name, parameter in model.named_parameters():
        block = next((path for path in blocks if name.startswith(path + ".")), "")
        norm = float(torch.linalg.vector_norm(parameter.detach().double()))
        found = TensorFacts(name, _part(model, name), block, tuple(parameter.shape), parameter.numel(), norm)
        facts.append(replace(found, gradient_norm=gradient.norms.get(name)) if gradient else found)
    return facts


def tied_names(model: nn.Module) -> dict[str, str]:
    """Parameters that are another one under a second name, and that other's name."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[id(parameter)] for name, parameter in every if first[id(parameter)] != name}


def by_part(facts: Iterable[TensorFacts]) -> list[PartFacts]:
    """The parameters added up by part, in the order in which the parts occur."""
    return _grouped([(fact.part, fact) for fact in facts])


def by_block(facts: Iterable[TensorFacts]) -> list[PartFacts]:
    """The parameters added up by block; what belongs to none is under its part's name."""
    return _grouped([(fact.block or fact.part, fact) for fact in facts])


def held_out_gradient(run: Run, model: Any) -> Gradient | None:
    """The gradient of the loss on the beginning of the run's held-out text, by the run's own engine, without dropout.

    The model's `.grad` are None afterwards. None where the run has no held-out text, as imported ones have not, or
    where its model reads a source.
    """
    if run.settings.reads_source or not (run.path / "data" / "validation.bin").is_file():
        return None
    tokens, width = run.validation_tokens(), run.settings.context_length
    if len(tokens) < 2:
        return None
    rows = range(0, min(len(tokens) - 1, max(TOKENS, width)), width)
    batch = cut(tokens, [slice(start, min(start + width, len(tokens) - 1)) for start in rows], width)
    engine = ENGINES[run.config.get("training", {}).get("engine", "autograd")]
    model.zero_grad(set_to_none=True)
    loss = engine.backpropagate(model, batch.to(next(model.parameters()).device), 1.0)
    norms = {
        name: float(torch.linalg.vector_norm(parameter.grad.to_dense().double()))
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return Gradient(float(loss), batch.counted, norms)


def _part(model: nn.Module, parameter: str) -> str:
    module, path = model, parameter.split(".")[:-1]
    for name in path:
        module = getattr(module, name)
        for base in type(module).__mro__:
            if base.__name__ in PARTS:
                return PARTS[base.__name__]
    return OTHER


def _grouped(named: list[tuple[str, TensorFacts]]) -> list[PartFacts]:
    groups: dict[str, list[TensorFacts]] = {}
    for name, fact in named:
        groups.setdefault(name, []).append(fact)
    result = []
    for name, facts in groups.items():
        gradients = [fact.gradient_norm for fact in facts if fact.gradient_norm is not None]
        result.append(
            PartFacts(
                name,
                parameters=sum(fact.parameters for fact in facts),
                weight_norm=_length(fact.weight_norm for fact in facts),
                gradient_norm=_length(gradients) if gradients else None,
            )
        )
    return result


def _length(norms: Iterable[float]) -> float:
    """The norm of several vectors put end to end, from their norms."""
    return sum(norm**2 for norm in norms) ** 0.5
