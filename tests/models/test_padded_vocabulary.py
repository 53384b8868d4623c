"""A vocabulary padded inside the model: the same losses, gradients and sizes, and no id that is not there."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from quire import checkpoint
from quire.layers.cross_entropy import IGNORED
from quire.layers.layer import recording
from quire.layers.linear import OutputHead
from quire.models.gpt import GPT, GPTSettings
from quire.training.engines import ENGINES
from quire.training.optimizers import OPTIMIZERS
from quire.training.settings import TrainingSettings

VOCABULARY = 1061  # a prime, to be padded to 1,088


def model(vocabulary: int = VOCABULARY, **settings: Any) -> GPT:
    torch.manual_seed(1)
    size = {"context_length": 8, "embedding_size": 8, "layers": 1, "heads": 2}
    made = GPT(GPTSettings(vocabulary_size=vocabulary, **{**size, **settings})).double()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def batch(vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocabulary, (3, 8), generator=torch.Generator().manual_seed(2))
    targets = torch.randint(vocabulary, (3, 8), generator=torch.Generator().manual_seed(3))
    targets[0, 0], targets[1, 1] = vocabulary - 1, IGNORED
    return tokens, targets


@pytest.fixture
def widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The widths of all that the head gives from here on."""
    seen, forward = [], OutputHead.forward

    def noted(head: OutputHead, *arguments: Any, **options: Any) -> Tensor:
        y = forward(head, *arguments, **options)
        seen.append(y.shape[-1])
        return y

    monkeypatch.setattr(OutputHead, "forward", noted)
    return seen


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_loss_and_gradients_are_those_of_the_true_logits(engine, tied, widths):
    ours, (tokens, targets) = model(tied=tied), batch()
    expected = F.cross_entropy(ours(tokens).flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    gradients = torch.autograd.grad(expected, list(ours.parameters()))
    if engine == "autograd":
        loss = ours(tokens, targets)
        loss.backward()
    else:
        with torch.no_grad(), recording(ours):
            loss = ours(tokens, targets)
            ours.backward()
    assert widths == [VOCABULARY, 1088]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for (name, parameter), gradient in zip(ours.named_parameters(), gradients, strict=True):
        assert float((parameter.grad - gradient).abs().max()) < 1e-10, name


@pytest.mark.parametrize(("vocabulary", "width"), [(1023, 1023), (1024, 1024), (1025, 1088), (1088, 1088)])
def test_small_and_fitting_vocabularies_are_left_alone(vocabulary, width, widths):
    ours = model(vocabulary)
    ours(*batch(vocabulary))
    assert widths == [width]


def test_no_padded_id_is_ever_among_the_logits():
    """Even where a padded column, whose weights are zero, would be the largest by far."""
    ours, (tokens, targets) = model(tied=False), batch()
    with torch.no_grad():
        ours.norm.weight.zero_()
        ours.norm.bias.fill_(1.0)
        ours.head.weight.fill_(-5.0)
    cache = ours.new_cache(3)
    assert ours(tokens).shape == ours(tokens, cache=cache).shape == (3, 8, VOCABULARY)
    assert ours(tokens, targets).item() == pytest.approx(math.log(VOCABULARY))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_optimizer_and_checkpoint_have_the_true_size(optimizer, tied, tmp_path):
    ours, tensors = model(tied=tied).float(), batch()
    optimizers = OPTIMIZERS[optimizer](ours, TrainingSettings(optimizer=optimizer))
    for _ in range(2):
        ours(*tensors).backward()
        for one in optimizers:
            one.step()
    rows = {len(value) for one in optimizers for state in one.state.values() for value in state.values() if value.dim()}
    assert VOCABULARY in rows and max(rows) == VOCABULARY
    checkpoint.save(tmp_path / "last", checkpoint.model_tensors(ours), {}, {})
    saved = checkpoint.load(tmp_path / "last").model
    large = {name for name, tensor in saved.items() if len(tensor) == VOCABULARY}
    assert large == ({"token_embedding.weight"} if tied else {"token_embedding.weight", "head.weight"})
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in ours.parameters())
    assert all(len(tensor) <= VOCABULARY for tensor in saved.values())


def test_reduced_precision_is_padded_too(widths):
    ours, tensors = model().float(), batch()
    plain = float(F.cross_entropy(ours(tensors[0]).flatten(0, 1), tensors[1].flatten(), ignore_index=IGNORED).detach())
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(*tensors)
    loss.backward()
    assert widths[-1] == 1088
    assert loss.item() == pytest.approx(plain, rel=0.05)
    assert all(bool(parameter.grad.isfinite().all()) for parameter in ours.parameters())
