"""The validation loss: every token predicted once, over the whole stream, whatever is computed at once."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quire.errors import UserError
from quire.evaluation import loss as measuring
from quire.evaluation.loss import total_loss
from quire.layers.cross_entropy import IGNORED
from quire.models.gpt import GPT, GPTSettings

CPU = torch.device("cpu")
CONTEXT, VOCABULARY = 8, 11


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(1)
    shape = {"vocabulary_size": VOCABULARY, "context_length": CONTEXT, "embedding_size": 8, "layers": 2, "heads": 2}
    model = GPT(GPTSettings(**shape, dropout=0.5)).double()  # dropout must be off while measuring
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model.train()


def stream(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, VOCABULARY, length).astype(np.uint16)


@torch.no_grad()
def token_by_token(model: GPT, tokens: np.ndarray, stride: int) -> float:
    """Each prediction by itself, from what its window shows of the text before it.

    Prediction i (of token i + 1) is made in the first window, [0, CONTEXT), or else in the first of the windows
    [k stride, k stride + CONTEXT) that reaches it.
    """
    model.eval()
    total = 0.0
    for i in range(len(tokens) - 1):
        start = max(0, -(-(i + 1 - CONTEXT) // stride)) * stride
        context = torch.from_numpy(tokens[start : i + 1].astype(np.int64))
        total -= float(F.log_softmax(model(context[None])[0, -1], -1)[int(tokens[i + 1])])
    model.train()
    return total


@pytest.mark.parametrize("at_once", [1, 24, 1 << 13])
@pytest.mark.parametrize("length", [2, 3, 8, 9, 10, 17, 18, 50, 57])
def test_windows_side_by_side(model, length, at_once, monkeypatch):
    """Also with a last window cut short, and computed one window, three or all at a time."""
    monkeypatch.setattr(measuring, "TOKENS", at_once)
    tokens = stream(length)
    total, count = total_loss(model, tokens, CONTEXT, VOCABULARY, CPU)
    assert count == length - 1
    assert total == pytest.approx(token_by_token(model, tokens, CONTEXT), rel=1e-9)
    with torch.no_grad():  # the plain definition: a sum over windows
        model.eval()
        rows = [torch.from_numpy(tokens[s : s + CONTEXT + 1].astype(np.int64)) for s in range(0, length - 1, CONTEXT)]
        by_window = sum(float(F.cross_entropy(model(row[None, :-1])[0], row[1:], reduction="sum")) for row in rows)
        model.train()
    assert total == pytest.approx(by_window, rel=1e-9)


@pytest.mark.parametrize("at_once", [1, 24])
@pytest.mark.parametrize("stride", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("length", [2, 8, 9, 10, 12, 13, 30, 41])
def test_overlapping_windows(model, length, stride, at_once, monkeypatch):
    monkeypatch.setattr(measuring, "TOKENS", at_once)
    tokens = stream(length)
    total, count = total_loss(model, tokens, CONTEXT, VOCABULARY, CPU, stride)
    assert count == length - 1
    assert total == pytest.approx(token_by_token(model, tokens, stride), rel=1e-9)


def test_a_stride_of_the_whole_context_is_no_stride(model):
    tokens = stream(37)
    assert total_loss(model, tokens, CONTEXT, VOCABULARY, CPU, CONTEXT) == total_loss(
        model, tokens, CONTEXT, VOCABULARY, CPU
    )


class Counting(torch.nn.Module):
    """Stands in for a model: notes which targets it is asked for, and how many tokens at once."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self.sizes: list[int] = []

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        counted = targets != IGNORED
        assert torch.equal(tokens[counted] + 1, targets[counted])
        assert counted.any(1).all(), "a window that predicts nothing"
        assert not self.training
        self.asked += targets[counted].tolist()
        self.sizes.append(tokens.numel())
        return torch.tensor(1.0)


@pytest.mark.parametrize("stride", [None, 1, 5, 16])
def test_each_token_is_asked_for_once(stride, monkeypatch):
    monkeypatch.setattr(measuring, "TOKENS", 64)
    model: Any = Counting()
    total, count = total_loss(model, np.arange(200), 16, 200, CPU, stride)
    assert sorted(model.asked) == list(range(1, 200))
    assert (total, count) == (199.0, 199)
    assert max(model.sizes) == 64
    assert model.training


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_an_impossible_stride_is_refused(model, stride):
    with pytest.raises(UserError, match="--stride must be between 1 and the context length 8"):
        total_loss(model, stream(20), CONTEXT, VOCABULARY, CPU, stride)
