"""A curriculum: which stage a step belongs to, what it is trained on, and that a stop anywhere changes nothing."""

import os
import random
import re
import signal
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import quire
from quire.data.batches import Batches, Cursor
from quire.errors import UserError
from quire.run import Run
from quire.training import engines, loop
from quire.training import resume as resuming
from quire.training.curriculum import Curriculum, Stage, stage_seed
from quire.training.loop import Trainer
from quire.training.resume import resume, verify
from quire.training.signals import Stopped

# ---- what is written ----------------------------------------------------------------------------------------------

WORDS = {
    "0.5:64": Stage(0.5, 64),
    "3:": Stage(3.0),
    "1e1:0": Stage(10.0),
    "0.25::book.txt": Stage(0.25, 0, "book.txt"),
    "1:8:http://host:80/a.txt": Stage(1.0, 8, "http://host:80/a.txt"),
    "1:8:C:\\a b.txt": Stage(1.0, 8, "C:\\a b.txt"),
}


@pytest.mark.parametrize("word", WORDS)
def test_a_stage_is_a_share_a_context_and_perhaps_a_text(word):
    assert Stage.parse(word) == WORDS[word]


MISTAKES = {
    "64": "'64' is no stage: write SHARE:CONTEXT or SHARE:CONTEXT:TEXT, such as 0.5:64",
    "": "'' is no stage",
    "half:64": "the share 'half' must be a number above 0",
    ":64": "the share '' must be a number above 0",
    "0:64": "the share '0' must be",
    "-1:64": "the share '-1' must be",
    "nan:64": "the share 'nan' must be",
    "inf:64": "the share 'inf' must be",
    "1:long": "the context 'long' is no whole number: write SHARE:CONTEXT",
    "1:8.5": "the context '8.5' is no whole number",
    "1:1": "the context must be at least 2 tokens, or 0 for the model's",
    "1:-8": "the context must be at least 2",
    "1:17": "Stage 2 of --curriculum has a context of 17 tokens, more than the model's 16. .*--model.context-length",
    "1:8:beta.tx": r"names the text 'beta.tx'.* Did you mean beta.txt\? Name one of: alpha.txt, beta.txt, gamma.txt",
    "1:16:gamma.txt": "Stage 2 of --curriculum: gamma.txt has 15 tokens to train on .*fewer than one window of 16",
}


@pytest.mark.parametrize("word", MISTAKES)
def test_a_mistake_is_named_before_a_run_is_made(lab, texts, word):
    with pytest.raises(UserError, match=MISTAKES[word]):
        texts("run", steps=5, curriculum=("1:4", word))
    assert not (lab.folder / "run").exists()


# ---- which stage --------------------------------------------------------------------------------------------------


@pytest.fixture
def texts(lab, monkeypatch) -> Callable[..., Run]:
    """texts(name, ...): a training of three texts, of which the last is short."""
    generator = random.Random(1)
    for name, letters, count in [("alpha", "abcd", 1500), ("beta", "efgh", 900), ("gamma", "ijkl", 15)]:
        (lab.folder / f"{name}.txt").write_text("".join(generator.choices(letters, k=count)))
    (lab.folder / "held-out.txt").write_text("".join(generator.choices("abcdefghijkl", k=200)))

    def act(name: str, **settings: Any) -> Run:
        return quire.train(
            "alpha.txt", "beta.txt", "gamma.txt", run=lab.folder / name, preset="gpt-mini", model=dict(lab.MODEL),
            data={"validation": "held-out.txt"}, **{**lab.TRAINING, **settings},
        )  # fmt: skip

    return act


@pytest.fixture
def taken(monkeypatch) -> list[tuple[int, int, int, torch.Tensor]]:
    """For each batch from here on: the step, the rows, the context and the tokens."""
    seen: list[tuple[int, int, int, torch.Tensor]] = []
    current: list[Trainer] = []
    update, backpropagate = Trainer.update, engines.Autograd.backpropagate

    def known(trainer: Trainer) -> None:
        current[:] = [trainer]
        update(trainer)

    def noted(engine: Any, model: Any, batch: Any, scale: float) -> torch.Tensor:
        seen.append((current[0].state.step, *batch.inputs.shape, batch.inputs))
        return backpropagate(engine, model, batch, scale)

    monkeypatch.setattr(Trainer, "update", known)
    monkeypatch.setattr(engines.Autograd, "backpropagate", noted)
    return seen


def test_stages_follow_progress_and_steps_keep_their_size(lab, taken, capsys):
    """Shares 1, 2 and 1 of 40 steps; batches of 4 x 16 tokens, or as many whole windows as fit into that."""
    run = lab.train("run", steps=40, curriculum=("1:4", "2:6", "1:"), evaluation_interval=7)
    shapes = [(rows, context) for _, rows, context, _ in taken]
    assert [step for step, *_ in taken] == list(range(40))
    assert shapes == [(16, 4)] * 10 + [(10, 6)] * 20 + [(4, 16)] * 10
    said = capsys.readouterr().err
    assert re.findall(r"Stage \d of 3: windows of \d+ tokens", said) == [
        f"Stage {number} of 3: windows of {context} tokens" for number, context in [(1, 4), (2, 6), (3, 16)]
    ]
    assert run.checkpoint().state["stage"] == 2


@pytest.mark.parametrize("steps", [7, 10, 30, 97])
def test_a_boundary_falls_on_the_step_that_reaches_it(lab, taken, steps):
    lab.train("run", steps=steps, curriculum=("0.1:4", "0.2:8", "0.7:16"), evaluation_interval=1000)
    stages = {4: 0, 8: 1, 16: 2}
    tenths = [(10 * step) // steps for step, *_ in taken]  # whole numbers: nothing is rounded
    assert [stages[context] for _, _, context, _ in taken] == [0 if t < 1 else 1 if t < 3 else 2 for t in tenths]


def test_accumulation_splits_the_windows_of_every_stage(lab, taken):
    lab.train("run", steps=4, curriculum=("1:8", "1:"), accumulation_steps=2)
    assert [(step, rows, context) for step, rows, context, _ in taken] == [
        (step, *shape) for step in range(4) for shape in [(8, 8) if step < 2 else (4, 16)] * 2
    ]


def test_a_text_s_stage_is_trained_on_nothing_else(lab, texts, taken):
    run = texts("run", steps=30, curriculum=("1:8:beta.txt", "1::alpha.txt", "1:"))
    letters = [set(run.tokenizer.decode(tokens.flatten().tolist())) for *_, tokens in taken]
    stages = [set().union(*letters[start : start + 10]) for start in (0, 10, 20)]
    assert stages[0] <= set("efgh") and stages[1] <= set("abcd") and stages[2] > set("abcdefgh")
    assert run.manifest["ranges"]["beta.txt"] == [1501, 2402]


def test_each_stage_takes_its_text_in_a_fresh_order_of_its_own(lab, taken):
    run = lab.train("run", steps=30, curriculum=("1:8", "1:8", "1:8"))
    tokens = resuming.reopened(run).tokens
    orders = []
    for number in range(3):
        batches, cursor = Batches(tokens, 8, stage_seed(1337, number)), Cursor()
        expected = [batches.take(cursor, 8).inputs for _ in range(10)]
        found = [inputs for *_, inputs in taken[10 * number : 10 * number + 10]]
        assert all(map(torch.equal, found, expected))
        orders.append(batches.epoch(0)[1])
    assert not any(np.array_equal(orders[a], orders[b]) for a, b in [(0, 1), (0, 2), (1, 2)])
    assert stage_seed(1338, 1) != stage_seed(1337, 1) != stage_seed(1337, 2)


def test_one_stage_of_everything_is_a_run_without_stages(lab):
    one, plain = lab.train("one", steps=20, curriculum=("1:",)), lab.train("plain", steps=20)
    lab.assert_same(one, plain)


def test_an_epoch_is_as_many_tokens_as_the_text_has(lab, taken):
    staged = lab.train("staged", steps=0, epochs=2, curriculum=("1:4", "1:8", "2:"))
    plain = lab.train("plain", steps=0, epochs=2)
    assert staged.metrics()[-1]["step"] == plain.metrics()[-1]["step"]
    assert staged.metrics()[-1]["tokens"] == pytest.approx(plain.metrics()[-1]["tokens"], rel=0.02)


def test_the_held_out_loss_keeps_the_model_s_context(lab, monkeypatch):
    contexts = []
    total_loss = loop.total_loss

    def noted(model, tokens, context, *more):
        contexts.append((len(tokens), context))
        return total_loss(model, tokens, context, *more)

    monkeypatch.setattr(loop, "total_loss", noted)
    run = lab.train("run", steps=30, curriculum=("1:4", "1:8"))
    assert set(contexts) == {(len(run.validation_tokens()), 16)}


def test_tokens_per_second_counts_the_tokens_of_every_stage(lab, monkeypatch):
    """On a clock of a second a step, it is the tokens of a step."""
    monkeypatch.setattr("quire.training.clock.Clock.elapsed", lambda clock: float(trainers[-1].state.step))
    trainers: list[Trainer] = []
    monkeypatch.setattr(Trainer, "wrap_model", lambda t: trainers.append(t) or setattr(t, "wrapped", t.model))
    run = lab.train("run", steps=40, curriculum=("1:6", "1:"), batch_size=3, evaluation_interval=15)
    lines, before = run.metrics(), (0, 0)
    for line in lines:
        steps, tokens = line["step"] - before[0], line["tokens"] - before[1]
        assert line["tokens_per_second"] == round(tokens / steps)
        before = (line["step"], line["tokens"])


# ---- stopped and resumed ------------------------------------------------------------------------------------------

STAGES = ("1:4", "1:8:beta.txt", "2::alpha.txt", "1:")  # of 50 steps: from step 0, 10, 20 and 40


def stopped(at: int, act: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    """Do `act`, which trains, and send SIGTERM in the middle of step `at`."""
    step_optimizers = Trainer.step_optimizers

    def perhaps(trainer: Trainer, loss: float) -> None:
        if trainer.state.step == at:
            os.kill(os.getpid(), signal.SIGTERM)
        step_optimizers(trainer, loss)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped, match=f"Stopped at step {at + 1} and saved"):
        patch.setattr(Trainer, "step_optimizers", perhaps)
        act(*arguments, **options)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_stop_around_every_boundary_changes_nothing(lab, texts, optimizer):
    settings = {"steps": 50, "optimizer": optimizer, "curriculum": STAGES, "evaluation_interval": 17}
    straight = texts("straight", **settings)
    stopped(4, texts, "run", **settings)
    for step in (8, 9, 10, 15, 18, 19, 20, 30, 38, 39, 40, 45):
        stopped(step, resume, lab.folder / "run")
    lab.assert_same(resume(lab.folder / "run"), straight)


def test_a_kill_in_the_middle_of_any_stage_changes_nothing(lab, texts):
    straight = texts("straight", steps=50, curriculum=STAGES)
    lab.killed(2, texts, "run", steps=50, curriculum=STAGES)
    for step in (12, 22, 41, 49):
        lab.killed(step, resume, lab.folder / "run")
    lab.assert_same(resume(lab.folder / "run"), straight)


def test_a_resume_knows_the_ranges_from_the_manifest(lab, texts, monkeypatch):
    """Also where the texts have moved, and have other names."""
    straight = texts("straight", steps=30, curriculum=STAGES)
    lab.killed(14, texts, "run", steps=30, curriculum=STAGES)
    monkeypatch.undo()
    monkeypatch.chdir(lab.folder)
    moved = [(lab.folder / f"{name}.txt").rename(lab.folder / f"{name}-moved.txt") for name in ("alpha", "beta")]
    lab.assert_same(resume(lab.folder / "run", data=[*map(str, moved), "gamma.txt"]), straight)


def test_a_finished_run_trains_on_in_its_last_stage(lab, taken):
    run = lab.train("run", steps=20, curriculum=("1:4", "1:8"))
    cursor = run.checkpoint().state["cursor"]
    taken.clear()
    resume(run, steps=10)
    assert [(rows, context) for _, rows, context, _ in taken] == [(8, 8)] * 10
    first = Batches(resuming.reopened(run).tokens, 8, stage_seed(1337, 1)).take(Cursor(**cursor), 8)
    assert torch.equal(taken[0][3], first.inputs)  # from where it stood in the data
    killed = lab.train("killed", steps=20, curriculum=("1:4", "1:8"))
    lab.killed(23, resume, killed, steps=10)
    lab.assert_same(resume(killed), run)


@pytest.mark.parametrize("finished", [True, False])
def test_verify_sees_a_curriculum_too(lab, finished):
    settings = {"steps": 12, "curriculum": ("1:4", "1:8")}
    if finished:
        lab.train("run", **settings)
    else:
        lab.killed(5, lab.train, "run", **settings)
    assert verify(lab.folder / "run") is None


def test_without_stages_nothing_is_asked_of_the_ranges():
    batches = Curriculum((), np.arange(5), 16, 1, {}).batches
    assert [(len(batch.tokens), batch.context_length, batch.seed) for batch in batches] == [(5, 16, 1)]
