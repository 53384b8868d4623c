"""A small model of every kind, whose weights are large enough to matter."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quire.models import MODELS

SMALL = {  # those of these fields that a model's settings have
    "vocabulary_size": 13, "context_length": 12, "separator": 12, "embedding_size": 16, "hidden_size": 16, "layers": 3,
    "heads": 4, "kv_heads": 2, "feedforward_size": 24, "window": 4,
    "stack": ({"kind": "embedding", "size": 16}, {"kind": "block", "heads": 4}, {"kind": "gru"}, {"kind": "block"}),
}  # fmt: skip


@pytest.fixture
def small_model() -> Callable[..., Any]:
    """Builds a model of a kind, in evaluation mode, with random weights."""

    def build(kind: str, **changes: Any) -> Any:
        settings = MODELS[kind].Settings
        names = {field.name for field in dataclasses.fields(settings)}
        given = {**SMALL, **changes, "kind": kind}
        model = MODELS[kind](settings(**{name: value for name, value in given.items() if name in names}))
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3
        return model.eval()

    return build
