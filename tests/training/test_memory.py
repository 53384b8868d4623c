"""Memory that runs out: a training goes on in smaller parts, with the same gradient and the same bits."""

import subprocess
import sys

import pytest
import torch

import quire
from quire import checkpoint, processes
from quire.cli.main import call
from quire.evaluation.loss import total_loss
from quire.generation.generate import Writer
from quire.run import Run
from quire.training.journal import Journal
from quire.training.loop import Trainer
from quire.training.resume import resume
from quire.training.settings import TrainingSettings
from quire.training.state import TrainingState
from tests.training.conftest import assert_equal_tensors

MESSAGES = [
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: 9 bytes"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
    MemoryError(),
]


@pytest.fixture
def limited(monkeypatch):
    """limited(rows, error, first): a training's last layer has no memory for more rows, from step `first` on."""

    def limit(rows, error=MESSAGES[0], first=0):
        wrap = Trainer.wrap_model

        def wrap_limited(trainer):
            def check(module, given):
                if module.training and given[0].shape[0] > rows and trainer.state.step >= first:
                    raise error

            trainer.model.norm.register_forward_pre_hook(check)  # after dropout has drawn its numbers
            wrap(trainer)

        monkeypatch.setattr(Trainer, "wrap_model", wrap_limited)

    return limit


@pytest.mark.parametrize(
    ("engine", "error"), zip(["autograd", "manual"] * 2, MESSAGES, strict=True), ids=["CPU", "CUDA", "MPS", "Python"]
)
def test_batches_too_large_are_what_smaller_ones_would_have_been(lab, limited, engine, error, capsys):
    settings = {"steps": 12, "engine": engine}
    small = lab.train("small", batch_size=2, accumulation_steps=4, **settings)
    limited(2, error)
    run = lab.train("run", batch_size=8, accumulation_steps=1, **settings)
    said = capsys.readouterr().err
    assert "Out of memory at step 0: from here on 4 of its 8 windows at a time go through the model, not 8." in said
    assert said.count("Out of memory") == 2  # 4, then 2
    assert lab.timeless(run) == lab.timeless(small)
    mine, theirs = (checkpoint.load(each.folder("last")) for each in (run, small))
    assert_equal_tensors({**mine.model, **mine.training}, {**theirs.model, **theirs.training})
    assert mine.state["divided"] == 4


def test_what_was_learned_is_kept_at_once_and_a_resume_begins_with_it(lab, limited, monkeypatch):
    with monkeypatch.context() as patch:
        limited(2, first=13)
        straight = lab.train("straight", steps=40)
        lab.killed(15, lab.train, "killed", steps=40)
        patch.undo()
    found = Run(lab.folder / "killed").checkpoint()
    assert (found.state["step"], found.state["divided"]) == (14, 2)
    lab.assert_same(
        resume(lab.folder / "killed"), straight
    )  # here there is memory enough, and yet the bits are the same


def test_a_single_window_that_does_not_fit_is_the_users_to_change(lab, limited, capsys):
    limited(0)
    words = ["train", str(lab.text), f"--run={lab.folder / 'run'}", "--preset=gpt-mini", "--steps=3", "--threads=1"]
    assert call([*words, "--model.layers=1", "--model.embedding-size=16", "--model.heads=2"]) == 2
    said = capsys.readouterr().err
    assert said.endswith("a shorter --model.context-length, or a smaller --model.embedding-size.\n")
    assert not (lab.folder / "run").exists()


def test_other_errors_are_not_taken_for_want_of_memory(lab, limited):
    limited(2, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        lab.train("run", steps=3)


def test_pairs_with_an_encoder_are_parted_too(lab, monkeypatch):
    """More than four sources do not fit: the weights come out as in batches of four."""
    shape = {"layers": 1, "encoder_layers": 1, "embedding_size": 16, "heads": 2}
    settings = {"run": None, "preset": "seq2seq-copy", "data": {"pairs": "copy"}, "threads": 1, "device": "cpu"}
    settings |= {"steps": 5, "epochs": 0, "minutes": 0, "sample_tokens": 0, "model": shape}
    small = quire.train(**{**settings, "run": lab.folder / "small", "batch_size": 4, "accumulation_steps": 2})
    accumulated = Trainer.accumulated

    def limited(trainer, parts):
        if max(len(part.source) for part in parts) > 4:
            torch.rand(3)
            raise MESSAGES[0]
        return accumulated(trainer, parts)

    monkeypatch.setattr(Trainer, "accumulated", limited)
    run = quire.train(**{**settings, "run": lab.folder / "run", "batch_size": 8, "accumulation_steps": 1})
    assert run.checkpoint().state["divided"] == 2
    assert_equal_tensors(run.checkpoint().model, small.checkpoint().model)


# ---- evaluations and samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5])
def test_an_evaluation_takes_smaller_batches(lab, rows):
    run = lab.train("run", steps=5)
    model, tokens = run.model("cpu"), run.validation_tokens()
    expected = total_loss(model, tokens, 16, run.settings.vocabulary_size, torch.device("cpu"))

    def check(module, given):
        if given[0].shape[0] > rows:
            raise MESSAGES[0]

    model.norm.register_forward_pre_hook(check)
    found = total_loss(model, tokens, 16, run.settings.vocabulary_size, torch.device("cpu"))
    assert found[1] == expected[1] and found[0] == pytest.approx(expected[0], rel=1e-6)


def test_a_sample_without_memory_is_left_out(lab, monkeypatch, capsys):
    straight = lab.train("straight", steps=10)

    def fails(*arguments):
        raise MESSAGES[0]

    with monkeypatch.context() as patch:
        patch.setattr(Writer, "write", fails)
        run = lab.train("run", steps=10)
    assert "Out of memory while writing a sample at step 10" in capsys.readouterr().err
    with monkeypatch.context() as patch, pytest.raises(type(MESSAGES[0])):
        patch.setattr(Writer, "write", fails)
        patch.setattr(processes, "world_size", lambda: 2)  # of which others write with this one's part of the model
        Journal(run, TrainingSettings(steps=1, parallel="fsdp"), torch.device("cpu")).sample(
            TrainingState(), run.model("cpu"), run.validation_tokens(), 1.0
        )
    assert lab.timeless(run) == lab.timeless(straight) and not (run.path / "samples.md").exists()


# ---- the real thing -----------------------------------------------------------------------------------------------

BOUNDED = """
import resource, sys
from quire.cli.main import call

small, big = sys.argv[1].split("|"), sys.argv[2].split("|")
assert call(small) == 0  # whatever is imported on the way is in memory before it gets little
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (400 << 20), -1))
sys.exit(call(big))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="bounds the memory of a process as Linux does")
def test_a_process_with_little_memory_trains_on(lab):
    words = ["train", str(lab.text), "--preset=gpt-mini", "--steps=1", "--threads=1", "--sample-tokens=0"]
    words += ["--model.layers=2", "--model.embedding-size=64", "--model.heads=2", "--model.context-length=128"]
    small = "|".join([*words, f"--run={lab.folder / 'small'}", "--batch-size=1"])
    big = "|".join([*words, f"--run={lab.folder / 'run'}", "--batch-size=256"])
    done = subprocess.run([sys.executable, "-c", BOUNDED, small, big], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Out of memory at step 0: from here on 128 of its 256 windows" in done.stderr
    assert Run(lab.folder / "run").checkpoint().state["divided"] > 1
