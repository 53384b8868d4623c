"""The mean of the weights: what is measured and kept, while training itself goes on with the weights as they are."""

import pytest
import torch

from quire import checkpoint
from quire.evaluation.evaluate import evaluate
from quire.training.average import EVERY, averaged, follow
from quire.training.loop import Trainer
from quire.training.train import resume, verify


def test_the_mean_is_the_sum_it_is_defined_as():
    """Against the sum written out, with the decay that a beginning has; a sparse gradient's parameter has no mean."""
    weight, table = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    optimizer = torch.optim.SGD([weight, table], lr=0.1, momentum=0.9)
    expected = None
    for step in range(60):
        weight.grad = torch.full((3,), -1.0)
        table.grad = torch.sparse_coo_tensor([[0]], [1.0], (3,), check_invariants=True)
        with torch.no_grad():
            weight += 1.0
        optimizer.state[weight]["kept"], optimizer.state[table]["kept"] = torch.ones(1), torch.ones(1)
        follow([optimizer], 0.8, step)
        if step % EVERY == 0:
            decay = min(0.8, (1 + step) / (10 + step)) ** EVERY
            expected = step + 1.0 if expected is None else decay * expected + (1 - decay) * (step + 1.0)
    assert optimizer.state[weight]["average"].tolist() == pytest.approx([expected] * 3)
    assert "average" not in optimizer.state[table]
    before = weight.detach().clone()
    with averaged([optimizer]):
        assert weight.tolist() == pytest.approx([expected] * 3)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("settings", [{"optimizer": "muon"}, {"engine": "manual"}])
def test_training_is_as_without_and_what_is_kept_is_the_mean(lab, settings):
    plain = lab.train("plain", steps=40, **settings)
    run = lab.train("run", steps=40, average=0.9, **settings)
    mine, theirs = (checkpoint.load(each.folder("last")) for each in (run, plain))
    assert all(torch.equal(mine.model[name], theirs.model[name]) for name in theirs.model)
    best = checkpoint.load(run.folder("best"))
    means = {name: best.training[f"optimizer.{name}.average"] for name in best.model}
    assert all(torch.equal(best.model[name], mean) for name, mean in means.items())
    losses = {line["step"]: line["validation_loss"] for line in run.metrics() if "validation_loss" in line}
    assert evaluate(run).validation_loss == pytest.approx(losses[best.state["step"]], rel=1e-6)


@pytest.mark.parametrize("step", [6, 17, 33])
def test_a_stop_changes_nothing(lab, step):
    settings = {"steps": 40, "average": 0.9, "evaluation_interval": 7}
    straight = lab.train("straight", **settings)
    lab.killed(step, lab.train, "run", **settings)
    lab.assert_same(resume(lab.folder / "run"), straight)
    assert verify(lab.folder / "run") is None


def test_the_first_step_passed_over_leaves_the_optimizer_to_begin_as_ever(lab):
    def bad(trainer: Trainer, loss: float) -> float:
        return float("nan") if trainer.state.step == 0 else loss

    with lab.losses(bad):
        run = lab.train("run", steps=20, non_finite="skip", average=0.5)
    assert run.metrics()[-1]["validation_loss"] < 10
