"""Models that the manual engine cannot train are named at the start, and what to do instead."""

import pytest
import torch
from torch import Tensor, nn

from quire.errors import UserError
from quire.layers.feedforward import FeedForward
from quire.layers.layer import Layer
from quire.models.gpt import GPT, GPTSettings
from quire.training import loop
from quire.training.engines import ENGINES
from quire.training.resume import resume

SHAPE = {"vocabulary_size": 13, "context_length": 8, "embedding_size": 8, "layers": 2, "heads": 2}


class Bare(Layer):
    """Has no backward."""

    def forward(self, x: Tensor) -> Tensor:
        return x.square()


def with_part(part: nn.Module) -> GPT:
    model = GPT(GPTSettings(**SHAPE))
    model.blocks[1].feedforward.activation = part
    return model


def compiled_in_place() -> GPT:
    model = GPT(GPTSettings(**SHAPE))
    model.blocks[0].compile()
    return model


class Named(Layer):
    """Holds parameters in a list, and answers for them."""

    def __init__(self) -> None:
        super().__init__()
        self.several = nn.ParameterList([torch.ones(2)])

    def backward(self, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (lambda: with_part(Bare()), r"blocks\.1\.feedforward\.activation \(Bare\) has no backward, which"),
        (lambda: with_part(nn.Linear(32, 32)), r"blocks\.1\.feedforward\.activation \(Linear\) has parameters but"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), r"0 \(Linear\) has parameters but is no Layer"),
        (lambda: nn.Linear(2, 2), r"The model \(Linear\) has parameters but is no Layer"),
        (lambda: torch.compile(GPT(GPTSettings(**SHAPE))), r"The model \(OptimizedModule\) is compiled"),
        (lambda: nn.DataParallel(GPT(GPTSettings(**SHAPE))), r"The model \(DataParallel\) is wrapped by DataParallel"),
        (compiled_in_place, r"blocks\.0 \(PreNormBlock\) is compiled"),
    ],
)  # fmt: skip
def test_what_it_cannot_train_is_named(made, sentence):
    model = made()
    with pytest.raises(UserError, match=rf"{sentence}.*--engine autograd"):
        ENGINES["manual"].check(model)
    ENGINES["autograd"].check(model)


@pytest.mark.parametrize("part", [Named(), nn.Tanh(), nn.Linear(2, 2).requires_grad_(False)])
def test_what_has_nothing_to_learn_or_a_layer_that_answers_for_it_is_left_alone(part):
    ENGINES["manual"].check(with_part(part))


def test_a_training_says_so_before_its_first_step(lab, monkeypatch):
    monkeypatch.setattr(FeedForward, "backward", Layer.backward)
    with pytest.raises(UserError, match=r"blocks\.0\.feedforward \(FeedForward\) has no backward"):
        lab.train("run", steps=5, engine="manual")
    assert not (lab.folder / "run").exists()
    assert lab.train("run", steps=5).metrics()[-1]["step"] == 5
    with pytest.raises(UserError, match=r"\(FeedForward\) has no backward"):
        resume(lab.folder / "run", steps=5, engine="manual")
    assert resume(lab.folder / "run").metrics()[-1]["step"] == 10


def test_a_compiled_run_goes_on_by_hand_uncompiled(lab, monkeypatch):
    """There is no flag to say so on resume: the other engine says it."""
    asked = []
    monkeypatch.setattr(loop, "compiled", lambda model, settings, *more: asked.append(settings.compile) or model)
    with pytest.raises(UserError, match="--compile yes needs --engine autograd"):
        lab.train("run", steps=5, engine="manual", compile="yes")
    run = lab.train("run", steps=5, compile="yes")
    resume(run, steps=3, engine="manual")
    resume(run, steps=3)
    assert asked == ["yes", "no", "yes"]
    assert run.metrics()[-1]["step"] == 11
