"""A run that was stopped, in whatever way, goes on as if it had not been."""

import dataclasses
import json
import os
import signal
import subprocess
import sys

import pytest
import torch

import quire
from quire import checkpoint, files
from quire.cli.main import call
from quire.errors import UserError
from quire.run import Run
from quire.training import state as states
from quire.training.resume import reopened, resume, verify

# ---- exactly ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "accumulation_steps": 2},
        {"optimizer": "muon", "schedule": "warmup-stable-decay"},
        {"optimizer": "adam", "evaluation_interval": 7, "patience": 1, "patience_action": "lower"},
        {"optimizer": "sgd", "learning_rate": 0.1, "evaluation_interval": 50, "engine": "manual"},
    ],
    ids=lambda settings: settings["optimizer"],
)
def test_killed_and_resumed_equals_uninterrupted(lab, settings):
    straight = lab.train("straight", steps=60, **settings)
    lab.killed(3, lab.train, "killed", steps=60, **settings)  # before its first checkpoint
    for step in (14, 29, 30, 56):
        lab.killed(step, resume, lab.folder / "killed")
    lab.assert_same(resume(lab.folder / "killed"), straight)


def test_a_kill_while_saving_loses_nothing(lab, monkeypatch):
    straight = lab.train("straight", steps=30)

    def killed(kind, path):
        if (kind, path.name) == ("rename", "last.new"):
            counted.append(path)
            if len(counted) == 2:  # last is last.old by now, and its successor not yet in place
                raise KeyboardInterrupt

    counted = []
    with monkeypatch.context() as patch:
        patch.setattr(files, "operation", killed)
        with pytest.raises(KeyboardInterrupt):
            lab.train("killed", steps=30)
    run = Run(lab.folder / "killed")
    assert not run.folder("last").exists()
    resume(run)
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["best", "last"]
    lab.assert_same(run, straight)


SELF_INTERRUPTING = """
import json, os, signal, sys
import torch._dynamo  # as the first optimizer does: all imports once, for all the processes below
import quire.cli.resume, quire.cli.train
from quire.cli.main import call
from quire.training import journal, loop

journal.plot_losses = lambda *arguments: None
step_optimizers = loop.Trainer.step_optimizers

def train_and_interrupt(step, name, words, errors):
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)

    def perhaps(trainer, loss):
        if trainer.state.step == step:
            os.kill(os.getpid(), getattr(signal, name))
        step_optimizers(trainer, loss)

    loop.Trainer.step_optimizers = perhaps
    return call(words)

codes = []
for command in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        try:
            os._exit(train_and_interrupt(*command))
        finally:
            os._exit(1)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX signals")
def test_sigkill_sigterm_and_ctrl_c_in_processes_of_their_own(lab):
    settings = {"steps": 60, "optimizer": "muon", "accumulation_steps": 2}
    straight = lab.train("straight", **settings)
    run = lab.folder / "stopped"
    words = ["train", str(lab.text), f"--run={run}", "--preset=gpt-mini"]
    words += [f"--{name.replace('_', '-')}={value}" for name, value in {**lab.TRAINING, **settings}.items()]
    words += [f"--model.{name.replace('_', '-')}={value}" for name, value in lab.MODEL.items()]
    errors = [lab.folder / f"errors-{number}" for number in range(3)]
    commands = [
        (17, "SIGKILL", words, str(errors[0])),
        (30, "SIGTERM", ["resume", str(run)], str(errors[1])),
        (44, "SIGINT", ["resume", str(run)], str(errors[2])),
    ]
    done = subprocess.run(
        [sys.executable, "-c", SELF_INTERRUPTING, json.dumps(commands)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout, done.stderr
    assert json.loads(done.stdout) == [-signal.SIGKILL, 143, 130], done.stderr
    assert f"Stopped at step 31 and saved. Go on: quire resume {run}" in errors[1].read_text()
    assert "resumes at step 31" in errors[2].read_text()
    assert f"Stopped at step 45 and saved. Go on: quire resume {run}" in errors[2].read_text()
    assert [path for path in run.rglob("*") if path.suffix in (".new", ".old") or path.name == ".lock"] == []
    lab.assert_same(resume(run), straight)


def test_training_works_off_the_main_thread(lab):
    import threading

    runs = []
    thread = threading.Thread(target=lambda: runs.append(lab.train("beside", steps=10)))
    thread.start()
    thread.join()
    assert runs[0].metrics()[-1]["step"] == 10


def test_best_stays_the_best_after_a_resume(lab):
    """Held-out losses that rise after the middle: the checkpoint called best is the lowest, resumed or not."""
    settings = {"steps": 60, "learning_rate": 0.05, "optimizer": "adamw", "warmup_steps": 0, "schedule": "constant"}
    lab.killed(45, lab.train, "killed", **settings)
    run = resume(lab.folder / "killed")
    losses = {line["step"]: line["validation_loss"] for line in run.metrics() if "validation_loss" in line}
    best = checkpoint.load(run.folder("best")).state
    assert best["step"] == best["best_step"] == min(losses, key=losses.__getitem__)
    assert best["best_loss"] == min(losses.values())


# ---- in other ways ------------------------------------------------------------------------------------------------


def test_a_run_killed_before_its_first_checkpoint_begins_anew(lab, capsys):
    lab.killed(3, lab.train, "killed", steps=20)
    resume(lab.folder / "killed")
    assert "was stopped before its first checkpoint and begins anew" in capsys.readouterr().err
    lab.assert_same(Run(lab.folder / "killed"), lab.train("straight", steps=20))


def test_resuming_a_finished_run_says_so_and_changes_nothing(lab, capsys):
    run = lab.train("run", steps=20)
    before = lab.contents(run.path)
    resume(run)
    assert "is finished (step 20): nothing to resume" in capsys.readouterr().err
    assert lab.contents(run.path) == before
    assert call(["resume", str(run.path)]) == 0


def test_a_finished_run_trains_on_with_a_new_warm_up(lab, capsys):
    settings = {"steps": 20, "schedule": "constant", "warmup_steps": 15, "learning_rate": 1e-3}
    run = lab.train("run", **settings)
    resume(run, steps=30)
    assert "trains on from step 20; the learning rate warms up again" in capsys.readouterr().err
    rates = {line["step"]: line["learning_rate"] for line in run.metrics()}
    assert list(rates) == [10, 20, 30, 40, 50]
    assert rates[20] == rates[40] == rates[50] == 1e-3
    assert rates[30] == rates[10] < 1e-3
    killed = lab.train("killed", **settings)
    lab.killed(20, resume, killed, steps=30)  # before any step: its new end is known all the same
    lab.killed(33, resume, killed)
    lab.assert_same(resume(killed), run)


@pytest.mark.parametrize("more", [{"steps": 10}, {"minutes": 1.0}])
def test_an_unfinished_run_is_finished_before_it_trains_on(lab, more):
    lab.killed(15, lab.train, "killed", steps=20)
    with pytest.raises(UserError, match=r"is not finished \(step 12\)\. Finish it first: quire resume"):
        resume(lab.folder / "killed", **more)


@pytest.mark.parametrize("more", [{"steps": 10, "minutes": 1.0}, {"steps": -1}, {"minutes": -1.0}])
def test_a_length_to_train_on_is_one_positive_number(lab, more):
    with pytest.raises(UserError, match="--steps N or --minutes M"):
        resume(lab.train("run", steps=10), **more)


@pytest.mark.parametrize(("own", "other"), [("autograd", "manual"), ("manual", "autograd")])
def test_a_run_goes_on_under_the_other_engine_and_back(lab, own, other):
    """Its losses are those of the run that was never stopped, to rounding."""
    settings = {"steps": 40, "evaluation_interval": 5, "engine": own, "model": {"dropout": 0.0}}
    straight = lab.train("straight", **settings)
    lab.killed(13, lab.train, "killed", **settings)
    lab.killed(27, resume, lab.folder / "killed", engine=other)
    run = resume(lab.folder / "killed")
    for mine, theirs in zip(run.metrics(), straight.metrics(), strict=True):
        for loss in ("train_loss", "validation_loss"):
            assert mine[loss] == pytest.approx(theirs[loss], rel=1e-5)
    for name, tensor in run.checkpoint().model.items():
        if not name.endswith("key.bias"):  # its gradient is 0 but for rounding, which Adam makes steps of
            torch.testing.assert_close(tensor, straight.checkpoint().model[name], rtol=1e-3, atol=1e-5)


def test_two_processes_do_not_train_one_run(lab):
    lab.killed(15, lab.train, "run", steps=20)
    run = Run(lab.folder / "run")
    before = lab.contents(run.path)
    with (
        files.locked(run.path / ".lock", "unused"),
        pytest.raises(UserError, match=r"Another process is training .*Ctrl-C there"),
    ):
        resume(run)
    assert lab.contents(run.path) == before
    assert resume(run).metrics()[-1]["step"] == 20


# ---- its text -----------------------------------------------------------------------------------------------------


def test_moved_text_is_named_and_pointed_at_with_data(lab):
    straight = lab.train("straight", steps=20)
    lab.killed(15, lab.train, "run", steps=20)
    elsewhere = lab.text.rename(lab.folder / "elsewhere.txt")
    with pytest.raises(UserError, match=r"no file.*text\.txt.*quire resume .*run --data PATH"):
        resume(lab.folder / "run")
    lab.assert_same(resume(lab.folder / "run", data=[str(elsewhere)]), straight)


@pytest.mark.parametrize("given", [[], ["text.txt"], ["other.txt"], ["text.txt", "other.txt"]])
def test_another_text_is_refused(lab, given):
    lab.killed(15, lab.train, "run", steps=20)
    other = lab.text.read_text().replace("a", "b", 1)
    (lab.folder / "other.txt").write_text(other)
    if given != ["text.txt", "other.txt"]:
        lab.text.write_text(other)
    with pytest.raises(UserError, match=r"is not the text that .*run began with.*--data PATH"):
        resume(lab.folder / "run", data=given)


def test_a_resume_needs_neither_the_same_folder_nor_the_validation_file(lab, monkeypatch):
    held_out = lab.folder / "held-out.txt"
    held_out.write_text(lab.text.read_text()[::-1] + "?")

    def started(name):
        return quire.train("text.txt", run=lab.folder / name, preset="gpt-mini", model=dict(lab.MODEL), **lab.TRAINING,
                           steps=20, data={"validation": "held-out.txt"})  # fmt: skip

    straight = started("straight")
    lab.killed(15, started, "run")
    held_out.unlink()
    (lab.folder / "below").mkdir()
    monkeypatch.chdir(lab.folder / "below")
    lab.assert_same(resume(lab.folder / "run"), straight)


# ---- proven -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{"optimizer": "adamw", "accumulation_steps": 2}, {"optimizer": "muon"}])
@pytest.mark.parametrize("finished", [True, False])
def test_verify_finds_no_difference_and_leaves_the_run_alone(lab, settings, finished):
    if finished:
        lab.train("run", steps=12, **settings)
    else:
        lab.killed(5, lab.train, "run", steps=20, **settings)
    before = lab.contents(lab.folder / "run")
    assert verify(lab.folder / "run") is None
    assert lab.contents(lab.folder / "run") == before


@pytest.mark.parametrize("lost", ["exp_avg", "momentum_buffer", "random.cpu", "cursor", "lowered"])
def test_verify_finds_what_a_faulty_resume_loses(lab, monkeypatch, lost):
    run = lab.train("run", steps=12, optimizer="muon")
    load = checkpoint.load

    def forgetful(folder, training=True):
        found = load(folder, training)
        if folder.name != "checkpoint":  # the run's own, from which both ways begin
            return found
        for name in [name for name in found.training if name.endswith(lost)]:
            old = found.training[name]
            found.training[name] = torch.Generator().get_state() if lost == "random.cpu" else old.roll(1)
        if lost == "cursor":
            found.state["cursor"]["position"] += 1
        if lost == "lowered":
            found.state["lowered"] = 0.5
        return found

    monkeypatch.setattr(checkpoint, "load", forgetful)
    assert verify(run) is not None


def test_every_field_of_the_state_survives(lab):
    lab.killed(15, lab.train, "run", steps=20)
    trainer = reopened(Run(lab.folder / "run"))
    trainer.load()
    for field in dataclasses.fields(trainer.state):
        value = getattr(trainer.state, field.name)
        changed = {int: 7, float: 0.7, bool: True, dict: {"a": 1}, type(None): 0.7}.get(type(value), value)
        setattr(trainer.state, field.name, changed)
    trainer.state.cursor.position = 5
    trainer.save("last")
    again = states.TrainingState.from_table(checkpoint.load(trainer.run.folder("last")).state)
    assert again == trainer.state


def test_a_lost_checkpoint_is_no_new_beginning(lab):
    """To begin anew would overwrite the best model, which is still there."""
    run = lab.train("lost", steps=30, evaluation_interval=10)
    best = checkpoint.load(run.folder("best")).model
    (run.folder("last") / "state.json").unlink()
    with pytest.raises(UserError, match="has lost its checkpoint"):
        resume(Run(run.path))
    files.remove(run.folder("last"))
    with pytest.raises(UserError, match="has lost its checkpoint"):
        resume(Run(run.path))
    assert all(torch.equal(tensor, best[name]) for name, tensor in checkpoint.load(run.folder("best")).model.items())
