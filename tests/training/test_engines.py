"""Both engines train the same model, and accumulating batches is one large batch: by the trainer's own arithmetic."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from quire.data.batches import Batch, Batches, Cursor
from quire.layers.cross_entropy import IGNORED
from quire.models.gpt import GPT, GPTSettings
from quire.training.engines import ENGINES
from quire.training.loop import Trainer
from quire.training.optimizers import OPTIMIZERS
from quire.training.settings import TrainingSettings

CPU = torch.device("cpu")
SHAPE = {"vocabulary_size": 13, "context_length": 8, "embedding_size": 8, "layers": 2, "heads": 2}
QWEN = {
    "positions": "rotary", "normalization": "rmsnorm", "feedforward": "swiglu", "bias": False, "qk_norm": True,
    "kv_heads": 1, "feedforward_size": 12,
}  # fmt: skip
# 61 predictions make 8 windows, of which the last has only 5: ragged ends in every epoch, of 3 + 3 + 2 examples or so
TOKENS = np.random.default_rng(1).integers(0, 13, 62).astype(np.int32)


def trainer(model: dict[str, Any] | None = None, **training: Any) -> Trainer:
    """A real trainer in float64, of a run that lies nowhere."""
    settings = GPTSettings(**SHAPE, **(model or {}))

    def fresh_model(seed: int, device: torch.device) -> GPT:
        torch.manual_seed(seed)
        return GPT(settings).double().to(device)

    run: Any = SimpleNamespace(
        settings=settings, fresh_model=fresh_model, validation_tokens=lambda: TOKENS, path=Path("nowhere"),
        manifest={"report": {}}, examples=lambda tokens, seed=0: tokens, pairs=False,
    )  # fmt: skip
    defaults = {"steps": 1000, "learning_rate": 1e-2, "matrix_learning_rate": 1e-2, "warmup_steps": 3, "compile": "no"}
    made = Trainer(run, TrainingSettings(**{**defaults, **training}), TOKENS, CPU, 0.0)
    made.begin()
    made.wrap_model()
    return made


def weights(made: Trainer) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in made.model.named_parameters()}


def furthest(a: Trainer, b: Trainer) -> float:
    theirs = weights(b)
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in weights(a).items())


LEARNING = {"sgd": {"learning_rate": 0.1}, "adam": {}, "adamw": {}, "muon": {}}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_thirty_steps_of_both_engines_agree(optimizer, tied):
    """With clipping that bites, accumulation, warm-up, schedule and dropout."""
    shape = {"tied": tied, "dropout": 0.1, **({} if tied else QWEN)}
    common = {"optimizer": optimizer, "batch_size": 3, "accumulation_steps": 2, "gradient_clip": 0.6}
    pair = [trainer(shape, engine=engine, **common, **LEARNING.get(optimizer, {})) for engine in ENGINES]
    before, norms = weights(pair[0]), []
    for made in pair:
        torch.manual_seed(2)  # of dropout
        for _ in range(30):
            made.update()
            norms.append(made.gradient_norm)
    assert min(norms) < 0.6 < max(norms)  # some steps were clipped, some were not
    assert furthest(*pair) < 1e-9
    assert max(float((before[name] - tensor).abs().max()) for name, tensor in weights(pair[0]).items()) > 1e-2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_accumulation_is_one_large_batch(optimizer, engine):
    """Ragged ends too: each token weighs the same, in whichever part it stands."""
    common = {"optimizer": optimizer, "engine": engine, "gradient_clip": 0.9, **LEARNING.get(optimizer, {})}
    shapes = [(6, 1), (3, 2), (2, 3), (1, 6)]
    made = [trainer(batch_size=size, accumulation_steps=parts, **common) for size, parts in shapes]
    for one in made:
        for _ in range(8):
            one.update()
        assert one.state.cursor == made[0].state.cursor
        assert one.state.tokens == made[0].state.tokens
        assert furthest(one, made[0]) < 1e-11
    taken = made[0].batches.take(Cursor(), 48)
    assert any(len({part.counted for part in step.split(6)}) > 1 for step in taken.split(8))  # ragged indeed
    assert made[0].state.tokens == taken.counted


def test_accumulation_weighs_tokens_and_not_parts():
    """The gradient is that of the mean over all counted tokens, written out here."""
    made = trainer(batch_size=3, accumulation_steps=2, optimizer="sgd", learning_rate=1.0, momentum=0.0,
                   weight_decay=0.0, gradient_clip=0.0, warmup_steps=0, schedule="constant")  # fmt: skip
    before = weights(made)
    batch = Batches(TOKENS, 8, made.settings.seed).take(Cursor(), 6)
    model = made.run.fresh_model(made.settings.seed, CPU)
    logits = model(batch.inputs)[batch.targets != IGNORED]
    nn.functional.cross_entropy(logits, batch.targets[batch.targets != IGNORED]).backward()
    made.update()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(weights(made)[name], before[name] - parameter.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [0.5, 0.0])
def test_the_whole_gradient_is_clipped_to_its_norm(clip):
    made = trainer(optimizer="sgd", learning_rate=1.0, momentum=0.0, weight_decay=0.0, gradient_clip=clip,
                   warmup_steps=0, schedule="constant")  # fmt: skip
    before = weights(made)
    made.update()
    moved = torch.cat([(before[name] - tensor).flatten() for name, tensor in weights(made).items()])
    assert made.gradient_norm > 0.5
    assert float(moved.norm()) == pytest.approx(clip or made.gradient_norm, rel=1e-5)


# ---- float16, whose narrow range needs a scaled loss ----


def half(engine: str, scale: float) -> Trainer:
    """A trainer of float32 weights whose products are float16, its loss scaled: by torch's own scaler for CPUs, put
    where --precision float16 asks for a GPU."""
    made = trainer(engine=engine, batch_size=3, accumulation_steps=2, optimizer="sgd", learning_rate=0.1)
    made.model.float()
    made.precision.dtype = torch.float16
    made.precision.scaler = made.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10)
    return made


def test_a_scaled_loss_in_float16_trains_as_float32_does():
    plain = trainer(batch_size=3, accumulation_steps=2, optimizer="sgd", learning_rate=0.1)
    plain.model.float()
    before = weights(plain)
    scaled = {engine: half(engine, 2.0**10) for engine in ENGINES}
    for made in (plain, *scaled.values()):
        for _ in range(15):
            made.update()
    moved = max(float((before[name] - tensor).abs().max()) for name, tensor in weights(plain).items())
    for made in scaled.values():
        assert furthest(made, plain) < 0.02 * moved
        assert made.gradient_norm == pytest.approx(plain.gradient_norm, rel=0.02)  # of the unscaled gradient
        assert made.scaler.get_scale() == 2.0**11  # it grew once, as nothing overflowed


@pytest.mark.parametrize("engine", ENGINES)
def test_an_overflow_of_float16_passes_over_the_step_and_halves_the_scale(engine):
    made = half(engine, 2.0**30)
    before = weights(made)
    made.update()
    assert made.scaler.get_scale() == 2.0**29
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(made).items())
    while made.scaler.get_scale() > 2.0**8 and all(torch.equal(before[n], t) for n, t in weights(made).items()):
        made.update()
    assert made.scaler.get_scale() > 2.0**8
    assert all(bool(tensor.isfinite().all()) for tensor in weights(made).values())
    assert made.state.passed_over == 0


# ---- gradients of several processes are made one before they are clipped ----


@pytest.mark.parametrize("engine", ENGINES)
def test_the_trainer_synchronizes_once_a_step_before_it_clips(engine, monkeypatch):
    made = trainer(engine=engine, batch_size=2, accumulation_steps=3, gradient_clip=0.5)
    norms = []

    def ten_times(self: Any, model: nn.Module, processes: int) -> None:
        for parameter in model.parameters():
            parameter.grad *= 10
        norms.append(float(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]).norm()))

    monkeypatch.setattr(type(made.engine), "synchronize", ten_times)
    for _ in range(2):
        made.update()
        assert made.gradient_norm == pytest.approx(norms[-1], rel=1e-6)
    assert len(norms) == 2


# ---- one engine's call ----


def gradients(engine: str, model: GPT, batch: Batch, scale: float) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(3)
    loss = ENGINES[engine].backpropagate(model, batch, scale)
    return loss, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("engine", ENGINES)
def test_backpropagate_adds_the_scaled_gradient_and_gives_the_plain_loss(engine):
    torch.manual_seed(1)
    model, batch = GPT(GPTSettings(**SHAPE, dropout=0.2)).double().train(), Batches(TOKENS, 8, 1).take(Cursor(), 3)
    loss, once = gradients(engine, model, batch, 1.0)
    once = [grad.clone() for grad in once]
    again, added = gradients(engine, model, batch, 2.5)
    assert loss.item() == again.item() and not loss.requires_grad
    for grad, three_and_a_half in zip(once, added, strict=True):
        torch.testing.assert_close(grad * 3.5, three_and_a_half, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_without_targets_gives_no_gradient(engine):
    model = GPT(GPTSettings(**SHAPE))
    nothing = torch.full((2, 8), IGNORED)
    loss, grads = gradients(engine, model, Batch(torch.zeros_like(nothing), nothing, 0), 1.0)
    assert loss.item() == 0
    assert all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads)
