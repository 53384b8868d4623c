"""What a training leaves behind, when it ends, and what it does about bad news."""

import errno
import itertools
import math
import os
import random
import re

import pytest
import torch

from quire import checkpoint, files
from quire.cli.ending import show_ending
from quire.errors import UserError
from quire.plots.loss import plot_losses
from quire.run import Run
from quire.training import engines, journal, loop
from quire.training.loop import Trainer
from quire.training.resume import resume

KEYS = {"step", "tokens", "seconds", "train_loss", "learning_rate"}
KEYS |= {"gradient_norm", "tokens_per_second", "memory_bytes"}
MEASURED = {"validation_loss", "validation_bits_per_byte"}

# ---- what it writes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "interval"), [(25, 7), (60, 0), (33, 100), (9, 0), (40, 3)])
def test_a_line_at_least_every_ten_steps_and_an_evaluation_at_each_interval(lab, steps, interval):
    run = lab.train("run", steps=steps, evaluation_interval=interval)
    lines = run.metrics()
    due = {*range(interval or 10, steps, interval or 10), steps}
    assert [line["step"] for line in lines if "validation_loss" in line] == sorted(due)
    assert [line["step"] for line in lines] == sorted(due | set(range(10, steps, 10)))
    for line in lines:
        assert line.keys() == KEYS | (MEASURED if line["step"] in due else set())
        assert line["train_loss"] > 0 and line["gradient_norm"] > 0 and line["learning_rate"] > 0
    assert [line["tokens"] for line in lines] == sorted({line["tokens"] for line in lines})
    samples = (run.path / "samples.md").read_text()
    assert [f"## Step {step}:" in samples for step in sorted(due)] == [True] * len(due)


@pytest.mark.parametrize("length", [0, 1, 25])
def test_a_sample_is_as_long_as_asked_for(lab, length, capsys):
    """Characters are tokens here; a training writes and measures the same whatever it shows of itself."""
    run, other = lab.train("run", steps=20, sample_tokens=length), lab.train("other", steps=20)
    if length:
        found = re.findall(r"^```text\n(.*?)\n```$", (run.path / "samples.md").read_text(), re.MULTILINE | re.DOTALL)
        assert [len(text) for text in found] == [length, length]
    else:
        assert not (run.path / "samples.md").exists()
    assert lab.timeless(run) == lab.timeless(other)
    show_ending(run, False)
    assert ("The model writes:" in capsys.readouterr().err) == bool(length)
    resume(run, steps=5)
    with pytest.raises(UserError, match="--sample-tokens must be a finite number of at least 0, not -1"):
        lab.train("negative", steps=20, sample_tokens=-1)


def test_the_training_loss_is_the_mean_since_the_line_before(lab):
    losses = []
    with lab.losses(lambda trainer, loss: losses.append(loss) or loss):
        run = lab.train("run", steps=25)
    for line, taken in zip(run.metrics(), (losses[:10], losses[10:20], losses[20:]), strict=True):
        assert line["train_loss"] == pytest.approx(sum(taken) / len(taken), rel=1e-12)


def test_bits_per_byte_follows_from_the_loss_and_the_bytes_of_the_held_out_text(lab):
    lab.text.write_text(lab.text.read_text().replace("a", "森"))
    run = lab.train("run", steps=10)
    line = run.metrics()[-1]
    total = line["validation_loss"] * (len(run.validation_tokens()) - 1)
    held_out = run.tokenizer.decode(run.validation_tokens())
    assert line["validation_bits_per_byte"] == pytest.approx(total / math.log(2) / len(held_out.encode()))


def test_the_plot_is_a_picture(lab, monkeypatch):
    monkeypatch.setattr(journal, "plot_losses", plot_losses)
    run = lab.train("run", steps=20, evaluation_interval=20)
    assert (run.path / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_last_is_saved_at_least_every_fifth_of_a_run(lab, monkeypatch):
    saved, save = [0], Trainer.save
    monkeypatch.setattr(
        Trainer, "save", lambda trainer, which: saved.append(trainer.state.step) or save(trainer, which)
    )
    lab.train("run", steps=53, evaluation_interval=1000)
    assert saved[-1] == 53
    assert max(later - earlier for earlier, later in itertools.pairwise(saved)) <= math.ceil(53 / 5)


def test_last_is_saved_at_least_every_ten_minutes(lab, monkeypatch):
    saved, save = [], Trainer.save
    monkeypatch.setattr(loop, "SAVE_SECONDS", -1.0)  # they have always passed
    monkeypatch.setattr(
        Trainer, "save", lambda trainer, which: saved.append(trainer.state.step) or save(trainer, which)
    )
    lab.train("run", steps=9)
    assert set(saved) == set(range(1, 10))


# ---- how long -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [0.5, 1, 2.5])
def test_epochs_are_passes_over_the_training_text(lab, epochs):
    run = lab.train("run", steps=0, epochs=epochs, accumulation_steps=2)
    predictions = run.manifest["report"]["tokens"] - len(run.validation_tokens()) - 1
    seen = run.metrics()[-1]["tokens"]
    assert abs(seen - epochs * predictions) <= 2 * 4 * 16  # a step


def test_tokens_are_reached_and_not_by_more_than_a_step(lab):
    run = lab.train("run", steps=0, tokens=1500)
    assert 1500 <= run.metrics()[-1]["step"] * 4 * 16 < 1500 + 4 * 16


def test_a_training_has_exactly_one_length(lab):
    with pytest.raises(UserError, match="Say how long to train"):
        lab.train("run", steps=0)
    with pytest.raises(UserError, match="--steps and --epochs both give the length"):
        lab.train("run", steps=10, epochs=2)
    assert not (lab.folder / "run").exists()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_accumulated_batches_are_one_large_batch(lab, optimizer):
    shape = {"dropout": 0.0}
    at_once = lab.train("at-once", steps=20, batch_size=8, optimizer=optimizer, model=shape)
    parts = lab.train("parts", steps=20, batch_size=2, accumulation_steps=4, optimizer=optimizer, model=shape)
    assert [line["tokens"] for line in parts.metrics()] == [line["tokens"] for line in at_once.metrics()]
    for mine, theirs in zip(parts.metrics(), at_once.metrics(), strict=True):
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-5)
        assert mine["validation_loss"] == pytest.approx(theirs["validation_loss"], rel=1e-5)


def test_the_same_seed_gives_the_same_run_and_another_seed_another(lab):
    one, two, other = (lab.train(f"run{n}", steps=12, seed=seed) for n, seed in enumerate((1, 1, 2)))
    lab.assert_same(one, two)
    assert lab.timeless(one) != lab.timeless(other)


@pytest.mark.parametrize("engine", ["autograd", "manual"])
def test_documents_may_be_kept_apart(lab, engine):
    """The order of documents is then nothing to learn from: a window of many is each of them alone."""
    lab.text.write_text("\n".join(lab.text.read_text().split()))
    settings = {"steps": 30, "engine": engine, "data": {"documents": "line"}}
    run = lab.train("run", model={"separate_documents": True}, **settings)
    assert run.settings.separator == run.tokenizer.separator
    model, tokens = run.model("cpu"), torch.from_numpy(run.validation_tokens().astype("int64"))
    begun = [*(tokens == run.tokenizer.separator).nonzero().flatten().tolist(), len(tokens)]
    with torch.no_grad():
        for start, stop in itertools.pairwise(begun[:4]):
            alone = model(tokens[None, start:stop])[0]
            torch.testing.assert_close(model(tokens[None, begun[0] : stop])[0, start - stop :], alone)
    lab.killed(16, lab.train, "killed", model={"separate_documents": True}, **settings)
    lab.assert_same(resume(lab.folder / "killed"), run)
    assert lab.timeless(lab.train("crossing", **settings)) != lab.timeless(run)


# ---- patience -----------------------------------------------------------------------------------------------------


@pytest.fixture
def losing(monkeypatch):
    """Held-out losses that fall to their best at the second evaluation, and rise from there."""
    values = iter([3.0, 2.0, *(2.1 + 0.1 * n for n in range(20))])
    monkeypatch.setattr(loop, "total_loss", lambda model, tokens, *more: (next(values) * len(tokens), len(tokens)))


def test_patience_stops_and_keeps_the_best(lab, losing, capsys):
    run = lab.train("run", steps=200, evaluation_interval=10, patience=3)
    assert "No better held-out loss for 3 evaluations, since step 20: training stops" in capsys.readouterr().err
    assert run.metrics()[-1]["step"] == 50
    assert run.checkpoint().state["finished"]
    best = checkpoint.load(run.folder("best"))
    assert (best.state["step"], best.state["best_loss"]) == (20, 2.0)
    assert torch.equal(run.model("cpu").state_dict()["norm.weight"], best.model["norm.weight"])


def test_patience_lowers_the_learning_rate(lab, losing, capsys):
    settings = {"schedule": "constant", "warmup_steps": 0, "learning_rate": 1e-3, "patience": 2}
    run = lab.train("run", steps=80, evaluation_interval=10, patience_action="lower", **settings)
    assert "the learning rate is halved" in capsys.readouterr().err
    rates = [line["learning_rate"] for line in run.metrics()]
    assert rates == [1e-3] * 4 + [5e-4] * 2 + [2.5e-4] * 2


# ---- losses that are not to be trusted ----------------------------------------------------------------------------


class Faulty(engines.Autograd):
    """An engine that gives a bad loss, or bad gradients, at some steps."""

    def __init__(self, steps: set[int], fault: str) -> None:
        self.steps, self.fault, self.trainer = steps, fault, None

    def backpropagate(self, model, batch, scale):
        loss = engines.Autograd().backpropagate(model, batch, scale)
        if self.trainer.state.step not in self.steps:
            return loss
        if self.fault == "gradient":
            next(model.parameters()).grad[0] = math.nan
        return {"gradient": loss, "nan": loss * math.nan, "infinite": loss * math.inf, "exploded": loss * 100}[
            self.fault
        ]


@pytest.fixture
def faulty(monkeypatch):
    """faulty(steps, fault): from here on, the engine has that fault at those steps."""

    def plant(steps, fault="nan"):
        engine = Faulty(set(steps), fault)
        update = Trainer.update

        def known(trainer):
            engine.trainer = trainer
            update(trainer)

        monkeypatch.setattr(Trainer, "update", known)
        monkeypatch.setitem(loop.ENGINES, "autograd", engine)
        return engine

    return plant


FAULTS = {
    "nan": "the loss is not finite",
    "infinite": "the loss is not finite",
    "gradient": "the gradient is not finite",
    "exploded": r"the loss became \d+",
}


def finite(run: Run) -> bool:
    found = run.checkpoint()
    return all(bool(tensor.isfinite().all()) for tensor in [*found.model.values(), *found.training.values()])


@pytest.mark.parametrize("fault", FAULTS)
def test_stop_keeps_the_last_good_state_and_names_the_likely_cause(lab, faulty, fault):
    straight = lab.train("straight", steps=30)
    engine = faulty([15], fault)
    with pytest.raises(
        UserError, match=f"At step 15 {FAULTS[fault]}.*kept.*learning rate that is too high.*--learning-rate"
    ):
        lab.train("run", steps=30)
    run = Run(lab.folder / "run")
    assert finite(run) and run.checkpoint().state["step"] <= 15
    engine.steps.clear()
    lab.assert_same(resume(run), straight)


@pytest.mark.parametrize("fault", FAULTS)
def test_skip_leaves_the_weights_alone_for_that_step(lab, faulty, fault, monkeypatch):
    faulty([15, 16], fault)
    weights = {}
    advance = Trainer.advance
    monkeypatch.setattr(
        Trainer,
        "advance",
        lambda t: weights.update({t.state.step: t.model.head.weight.detach().clone()}) or advance(t),
    )
    run = lab.train("run", steps=30, non_finite="skip")
    assert run.metrics()[-1]["step"] == 30 and finite(run)
    assert all(math.isfinite(line["train_loss"]) for line in run.metrics())
    changed = [step for step in range(2, 31) if not torch.equal(weights[step], weights[step - 1])]
    assert changed == [step for step in range(2, 31) if step not in (16, 17)]


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_when_every_step_is_bad_training_stops(lab, faulty, policy):
    faulty(range(12, 100))
    with pytest.raises(UserError, match="the loss is not finite; training stopped"):
        lab.train("run", steps=100, non_finite=policy)
    assert finite(Run(lab.folder / "run"))


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", [6, 15])
def test_rollback_goes_back_to_the_best_weights_at_half_the_rate(lab, faulty, fault, step, monkeypatch, capsys):
    faulty([step], fault)
    after, roll_back = {}, Trainer.roll_back

    def noted(trainer):
        roll_back(trainer)
        after.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        if checkpoint.exists(trainer.run.folder("best")):
            after["best"] = checkpoint.load(trainer.run.folder("best")).model
        else:
            rng = torch.get_rng_state()
            after["best"] = dict(trainer.run.fresh_model(trainer.settings.seed, trainer.device).named_parameters())
            torch.set_rng_state(rng)

    monkeypatch.setattr(Trainer, "roll_back", noted)
    settings = {"schedule": "constant", "warmup_steps": 0, "learning_rate": 1e-3}
    run = lab.train("run", steps=30, non_finite="rollback", **settings)
    assert (
        "at half the learning rate. The likeliest cause is a learning rate that is too high (0.001)"
        in capsys.readouterr().err
    )
    best = after.pop("best")
    assert (step == 15) == (run.metrics()[0]["step"] <= step)
    assert after and all(torch.equal(after[name], best[name]) for name in after)
    assert run.metrics()[-1]["step"] == 30 and run.metrics()[-1]["learning_rate"] == 5e-4 and finite(run)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_bad_step_is_met_in_the_same_way_after_a_resume(lab, faulty, policy):
    faulty([0, 15, 16, 33])
    straight = lab.train("straight", steps=50, non_finite=policy)
    lab.killed(14, lab.train, "killed", steps=50, non_finite=policy)
    for step in (17, 31, 34):
        lab.killed(step, resume, lab.folder / "killed")
    lab.assert_same(resume(lab.folder / "killed"), straight)


def test_an_explosion_is_noticed_though_the_very_first_loss_was_not_finite(lab, faulty):
    with lab.losses(lambda trainer, loss: {0: math.nan, 20: 1e9}.get(trainer.state.step, loss)):
        run = lab.train("run", steps=30, non_finite="skip")
    assert max(line["train_loss"] for line in run.metrics()) < 10


# ---- a full disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", ["metrics.jsonl", "samples.md"])
def test_a_disk_that_fills_while_logging_costs_nothing_once_there_is_room(lab, log, monkeypatch):
    straight = lab.train("straight", steps=40)
    appended, append = random.Random(0), files.append_line

    def cut_short(path, line, **options):
        if path.name == log and "Step 30" in line.replace('"step": 30', "Step 30"):
            with open(path, "a") as file:
                file.write(line[: appended.randrange(1, len(line))])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        append(path, line, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(files, "append_line", cut_short)
        lab.train("run", steps=40)
    lab.assert_same(resume(lab.folder / "run"), straight)
