"""Head and loss in pieces: the loss and the gradients of F.cross_entropy of F.linear, without ever all logits."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quire.layers import head_loss
from quire.layers.cross_entropy import IGNORED
from quire.layers.head_loss import HeadLoss
from quire.layers.layer import recording
from quire.layers.linear import OutputHead
from quire.models import MODELS, build_model
from quire.training.engines import ENGINES

C, V = 12, 1061  # a prime: its rows are padded


@pytest.fixture(params=[1, 4, 100])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """So many rows of the 14 at once; the softmax takes up to 3 of them."""
    monkeypatch.setattr(head_loss, "LOGITS", V * request.param)
    monkeypatch.setattr(head_loss, "BLOCK", V * 3)
    return request.param


def given(ignored: int = 3, dtype: torch.dtype = torch.float64) -> tuple[OutputHead, Tensor, Tensor]:
    torch.manual_seed(1)
    head = OutputHead(C, V).to(dtype)
    torch.nn.init.normal_(head.weight)
    targets = torch.randint(V, (2, 7))
    targets.view(-1)[torch.randperm(14)[:ignored]] = IGNORED
    return head, torch.randn(2, 7, C, dtype=dtype, requires_grad=True), targets


def found(engine: str, layer: HeadLoss, head: OutputHead, x: Tensor, targets: Tensor, scale: float = 1.0) -> Any:
    """Loss, and `scale` times its gradients by x and the weights."""
    head.weight.grad = x.grad = None
    if engine == "manual":
        with torch.no_grad(), recording(layer), recording(head):
            return layer.of(head, x, targets), layer.undo(scale, head), head.weight.grad
    loss = layer.of(head, x, targets)
    (loss * scale).backward()
    return loss.detach(), x.grad, head.weight.grad


@pytest.mark.parametrize("ignored", [0, 3, 13])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("engine", ENGINES)
def test_equal_to_torch(engine, scale, smoothing, ignored, pieces):
    head, x, targets = given(ignored)
    for training in (True, False):
        layer = HeadLoss(smoothing).train(training)
        expected = F.cross_entropy(
            F.linear(x, head.weight).flatten(0, 1), targets.flatten(), label_smoothing=smoothing * training
        )
        gradients = torch.autograd.grad(expected, [x, head.weight], torch.tensor(scale, dtype=torch.float64))
        loss, *ours = found(engine, layer, head, x, targets, scale)
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=0)
        for gradient, wanted in zip(ours, gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_are_added_to_what_is_there(engine, pieces):
    head, x, targets = given()
    _, _, once = found(engine, HeadLoss(), head, x, targets)
    head.weight.grad = torch.ones_like(head.weight)
    if engine == "manual":
        layer = HeadLoss()
        with torch.no_grad(), recording(layer):
            layer.of(head, x, targets)
            layer.undo(1.0, head)
    else:
        HeadLoss().of(head, x, targets).backward()
    torch.testing.assert_close(head.weight.grad, once + 1, rtol=0, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_counted_target_gives_zero_and_no_gradient(engine, pieces):
    head, x, targets = given(14)
    loss, *gradients = found(engine, HeadLoss(0.1), head, x, targets)
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("engine", ENGINES)
def test_huge_logits_overflow_nothing(engine):
    head, x, targets = given(0, torch.float32)
    with torch.no_grad():
        head.weight.mul_(1e20)
    loss, *gradients = found(engine, HeadLoss(), head, x, targets)
    assert loss.isfinite() and all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_frozen_head_gets_no_gradient(engine):
    head, x, targets = given()
    _, wanted, _ = found(engine, HeadLoss(), head, x, targets)
    head.weight.requires_grad_(False)
    _, gradient, none = found(engine, HeadLoss(), head, x, targets)
    assert none is None and torch.equal(gradient, wanted)


@pytest.mark.parametrize("engine", ENGINES)
def test_reduced_precision_gives_gradients_of_the_parameters_type(engine, pieces):
    head, x, targets = given(dtype=torch.float32)
    exact = found(engine, HeadLoss(0.1), head, x, targets)
    exact = [exact[0], *(each.clone() for each in exact[1:])]
    with torch.autocast("cpu", torch.bfloat16):
        rough = found(engine, HeadLoss(0.1), head, x, targets)
    for ours, wanted in zip(rough, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, wanted, rtol=0.05, atol=0.02 * float(wanted.to_dense().abs().max()))


@pytest.mark.parametrize("engine", ENGINES)
def test_the_largest_tensor_is_a_piece(engine):
    """However many rows there are: all that is asked for at once, told by the profiler of memory."""
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(head_loss, "LOGITS", V * 64)
        head, rows = OutputHead(C, V), 64 * 40
        x, targets = torch.randn(rows, C, requires_grad=True), torch.randint(V, (rows,))
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            found(engine, HeadLoss(), head, x, targets)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held, peak = 0, 0
    for size in sizes:
        held += size
        peak = max(peak, held)
    padded = V + -V % 64
    assert max(sizes) <= 4 * padded * 64
    assert peak < 4 * (2.5 * padded * 64 + 2 * V * C + 4 * rows * C) < 4 * rows * V / 4


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_has_the_gradients_of_its_own_logits(kind, small_settings):
    """With a vocabulary that goes in pieces, by both engines, compared with the loss of the logits it gives."""
    settings = small_settings(kind, vocabulary_size=V, dropout=0.0)
    model = build_model(settings).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 3
    tokens, targets = (torch.randint(V, (2, 6), generator=generator) for _ in range(2))
    targets[1, 4:] = IGNORED
    source = {"source": tokens.flip(1)} if settings.reads_source else {}
    smoothing = getattr(settings, "label_smoothing", 0.0)
    logits = model.train()(tokens, **source)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)
    gradients = torch.autograd.grad(expected, list(model.parameters()))
    model(tokens, targets, **source).backward()
    by_hand = copy.deepcopy(model)
    by_hand.zero_grad()
    with torch.no_grad(), recording(by_hand):
        loss = by_hand(tokens, targets, **source)
        by_hand.backward()
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-10, atol=0)
    for parameter, hand, wanted in zip(model.parameters(), by_hand.parameters(), gradients, strict=True):
        largest = 1e-10 * max(1.0, float(wanted.to_dense().abs().max()))
        for found in (parameter.grad, hand.grad):  # those of n-gram tables are sparse
            assert float((found - wanted).to_dense().abs().max()) < largest


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_traced_block_is_the_same(smoothing):
    """As a GPU takes it in a compiled model: the wanted column by comparison, not by a scatter."""
    torch._dynamo.reset()
    head, x, targets = given(0)
    logits = F.linear(x.detach(), head.weight.detach()).flatten(0, 1)
    both = [logits.clone(), logits.clone()]
    share = torch.rand(14, 1, dtype=torch.float64)
    traced = torch.compile(head_loss.block, backend="aot_eager")
    losses = [
        step(z, targets.view(-1, 1), share, smoothing, True)
        for step, z in zip([head_loss.block, traced], both, strict=True)
    ]
    torch.testing.assert_close(*losses, rtol=1e-14, atol=0)
    torch.testing.assert_close(*both, rtol=0, atol=1e-14)


def test_a_compiled_model_has_the_same_gradients(small_settings):
    torch._dynamo.reset()
    model = build_model(small_settings("gpt", vocabulary_size=V, dropout=0.0)).double()
    tokens, targets = torch.randint(V, (2, 6)), torch.randint(V, (2, 6))
    expected = torch.autograd.grad(model(tokens, targets), list(model.parameters()))
    torch.compile(model, backend="aot_eager")(tokens, targets).backward()
    for parameter, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-12)
