"""What training a model costs, from its settings alone: parameters, memory and arithmetic, part by part.

inspection/size.py measures a model without contents; here its parameters are told apart, and what the optimizers
keep of them is added.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from quire.inspection.size import FLOAT, size_of
from quire.layers.head_loss import GPU_LOGITS, LOGITS, WORTH_IT
from quire.models import ModelSettings
from quire.run import empty_model
from quire.training.optimizers import OPTIMIZERS
from quire.training.settings import Settings, TrainingSettings

PARTS = {"embedding": "embeddings", "positions": "embeddings", "head": "output head", "attention": "attention",
         "feedforward": "feedforward", "norm": "norms"}  # fmt: skip
MOMENTS = {"AdamW": 2, "Adam": 2, "Muon": 1, "SGD": 1}  # numbers that an optimizer keeps of each parameter; see moments
CPU = torch.device("cpu")
TABLES = "RowAdagrad"  # keeps one for each row


@dataclass(frozen=True)
class Cost:
    """`parameters` by part; `memory` of a training step by part, in bytes; arithmetic for each token trained on."""

    parameters: dict[str, int]
    memory: dict[str, int]
    flops_per_token: int

    @property
    def total_parameters(self) -> int:
        """Of all parts."""
        return sum(self.parameters.values())

    @property
    def total_memory(self) -> int:
        """Of all parts, in bytes."""
        return sum(self.memory.values())


def cost_of(settings: Settings, device: torch.device = CPU) -> Cost:
    """The cost of training with these settings, in float32; the vocabulary size must be known."""
    shape, training = settings.model, settings.training
    size = size_of(shape)
    parameters, rows, kept = numbers_of(shape, training)
    tables = parameters.get("n-gram tables", 0)
    logits = training.batch_size * shape.context_length * shape.vocabulary_size
    each = size.recomputed_window_bytes if training.gradient_checkpointing else size.window_bytes
    windows = training.batch_size * each
    if shape.vocabulary_size >= WORTH_IT:  # HeadLoss: never all of them at once, and nothing of them is kept
        logits = min(logits, LOGITS if device.type == "cpu" else GPU_LOGITS)
    else:
        windows = max(0, windows - FLOAT * logits)
        logits *= 2  # and their gradient
    weights = sum(parameters.values()) - tables
    memory = {
        "weights": FLOAT * weights,
        "gradients": FLOAT * weights,
        "optimizer": FLOAT * kept,
        "activations": windows,
        "logits": FLOAT * logits,
        "n-gram tables": FLOAT * (tables + rows),
    }
    flops = 3 * size.flops_per_token
    return Cost(parameters, {name: value for name, value in memory.items() if value}, flops)


def numbers_of(shape: ModelSettings, training: TrainingSettings) -> tuple[dict[str, int], int, int]:
    """Parameters by part, rows of n-gram tables, and the numbers that the optimizers keep of the rest.

    On torch's fake tensors, which have shapes and no contents.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = empty_model(shape, CPU)
        parts: dict[str, int] = {}
        for name, parameter in model.named_parameters():
            where = part_of(name)
            parts[where] = parts.get(where, 0) + parameter.numel()
        rows = kept = 0
        for optimizer in OPTIMIZERS[training.optimizer](model, training):
            own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            if type(optimizer).__name__ == TABLES:
                rows += sum(len(parameter) for parameter in own)
            else:
                kept += moments(optimizer) * numbers_in(own)
    return parts, rows, kept


def moments(optimizer: torch.optim.Optimizer) -> int:
    """How many numbers an optimizer keeps of each of its parameters."""
    name = type(optimizer).__name__
    assert name in MOMENTS, f"what {name} keeps is known"
    without = name == "SGD" and not optimizer.param_groups[0]["momentum"]
    return 0 if without else MOMENTS[name]


def numbers_in(parameters: Iterable[torch.Tensor]) -> int:
    """How many numbers some tensors have together."""
    return sum(parameter.numel() for parameter in parameters)


def part_of(name: str) -> str:
    """The part that a parameter belongs to, by its name in the model."""
    if name.startswith("ngram_embedding"):
        return "n-gram tables"
    for word in reversed(name.split(".")):
        for start, part in PARTS.items():
            if start in word:
                return part
    return "layers"
