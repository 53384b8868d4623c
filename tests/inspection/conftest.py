"""A small model of every kind, whose weights are large enough to matter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quire.models import build_model


@pytest.fixture
def small_model(small_settings: Callable[..., Any]) -> Callable[..., Any]:
    """Builds a model of a kind, in evaluation mode, with random weights."""

    def build(kind: str, **changes: Any) -> Any:
        model = build_model(small_settings(kind, **changes))
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 3
        return model.eval()

    return build
