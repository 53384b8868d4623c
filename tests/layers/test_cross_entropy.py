"""Cross-entropy is torch's, and a batch in which no target counts gives 0, never NaN."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from quire.layers.cross_entropy import IGNORED, CrossEntropy
from quire.layers.layer import recording


@pytest.mark.parametrize("ignored", [0, 1, 5, 11])
@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2)])
def test_equal_to_torch(shape, ignored):
    torch.manual_seed(1)
    logits = torch.randn(*shape, 7, dtype=torch.float64) * 5
    targets = torch.randint(7, shape)
    targets.view(-1)[torch.randperm(12)[:ignored]] = IGNORED
    expected = nn.CrossEntropyLoss()(logits.view(-1, 7), targets.view(-1))
    torch.testing.assert_close(CrossEntropy()(logits, targets), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("ignored", [0, 5])
@pytest.mark.parametrize("smoothing", [0.1, 0.9])
def test_smoothed_as_torch_does_it_but_only_in_training(smoothing, ignored):
    torch.manual_seed(1)
    logits = (torch.randn(3, 4, 7, dtype=torch.float64) * 5).requires_grad_(True)
    targets = torch.randint(7, (3, 4))
    targets.view(-1)[torch.randperm(12)[:ignored]] = IGNORED
    layer, flat = CrossEntropy(smoothing), (logits.view(-1, 7), targets.view(-1))
    expected = F.cross_entropy(*flat, label_smoothing=smoothing)
    with recording(layer):
        found = layer(logits, targets)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(layer.backward(), torch.autograd.grad(expected, logits)[0], rtol=0, atol=1e-14)
    torch.testing.assert_close(layer.eval()(logits, targets), F.cross_entropy(*flat), rtol=1e-12, atol=0)


def test_no_counted_target_gives_zero_and_no_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    targets = torch.full((2, 3), IGNORED)
    layer = CrossEntropy()
    loss = layer(logits, targets)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    with torch.no_grad(), recording(layer):
        layer(logits, targets)
        assert torch.equal(layer.backward(3.0), torch.zeros_like(logits))


def test_huge_logits_overflow_nothing():
    logits = torch.tensor([[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4]], dtype=torch.float64)
    layer = CrossEntropy()
    with torch.no_grad(), recording(layer):
        loss = layer(logits, torch.tensor([0, 0]))
        grad = layer.backward()
    assert float(loss) == 1e4
    assert torch.equal(grad, torch.tensor([[0.0, 0.0, 0.0], [-0.5, 0.0, 0.5]], dtype=torch.float64))


def test_logits_of_half_precision_get_a_gradient_of_theirs():
    torch.manual_seed(2)
    logits = (torch.randn(6, 9) * 3).bfloat16()
    targets = torch.randint(9, (6,))
    layer = CrossEntropy()
    with torch.no_grad(), recording(layer):
        layer(logits, targets)
        grad = layer.backward()
    exact = logits.double().requires_grad_(True)
    F.cross_entropy(exact, targets).backward()
    assert grad.dtype == torch.bfloat16
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-2, atol=1e-4)
