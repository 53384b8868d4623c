"""A training small enough to run many times, and the ways to interrupt and to compare it."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

import quire
from quire import checkpoint, files
from quire.run import Run
from quire.training import journal
from quire.training.loop import Trainer

CLOCKS = ("seconds", "tokens_per_second", "memory_bytes")  # what may differ between two equal runs


class Killed(BaseException):
    """Stands for a kill."""


class Lab:
    """A text in a folder of its own, and trainings of it."""

    MODEL = MappingProxyType({"layers": 1, "embedding_size": 16, "heads": 2, "context_length": 16, "dropout": 0.1})
    TRAINING = MappingProxyType(
        {"batch_size": 4, "warmup_steps": 5, "sample_tokens": 40, "threads": 1, "device": "cpu"}
    )

    def __init__(self, folder: Path) -> None:
        self.folder, self.text = folder, folder / "text.txt"
        generator = random.Random(0)
        words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(40)]
        self.text.write_text(" ".join(generator.choices(words, k=700)))

    def train(self, name: str, *, model: dict[str, Any] | None = None, **settings: Any) -> Run:
        """`quire.train` of the text with the sizes above."""
        shape = {**self.MODEL, **(model or {})}
        path = self.folder / name
        return quire.train(str(self.text), run=path, preset="gpt-mini", model=shape, **{**self.TRAINING, **settings})

    def killed(self, at: int, act: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Do `act`, which trains, and break it off in the middle of the step after step `at`."""
        step_optimizers = Trainer.step_optimizers

        def perhaps(trainer: Trainer, loss: float) -> None:
            if trainer.state.step == at:
                raise Killed
            step_optimizers(trainer, loss)

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Trainer, "step_optimizers", perhaps)
            act(*arguments, **options)

    @contextmanager
    def losses(self, change: Callable[[Trainer, float], float]) -> Iterator[None]:
        """Within, the loss of a step is what `change` makes of it."""
        step_optimizers = Trainer.step_optimizers
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Trainer, "step_optimizers", lambda trainer, loss: step_optimizers(trainer, change(trainer, loss))
            )
            yield

    @staticmethod
    def contents(folder: Path) -> dict[str, bytes]:
        """Every file below a folder."""
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    @staticmethod
    def timeless(run: Run) -> list[dict[str, Any]]:
        """metrics.jsonl without what the clock and the machine say."""
        return [{key: value for key, value in line.items() if key not in CLOCKS} for line in run.metrics()]

    def assert_same(self, one: Run, other: Run) -> None:
        """Both trainings agree bit for bit: checkpoints, samples, and metrics but for the clock's."""
        assert self.timeless(one) == self.timeless(other) != []
        assert (one.path / "samples.md").read_bytes() == (other.path / "samples.md").read_bytes()
        for which in ("last", "best"):
            mine, theirs = (checkpoint.load(run.folder(which)) for run in (one, other))
            assert_equal_tensors(mine.model, theirs.model)
            assert_equal_tensors(mine.training, theirs.training)
            for state in (mine.state, theirs.state):
                del state["seconds"], state["seconds_before"]
                del state["log_sizes"]["metrics.jsonl"]  # which spells the seconds
            assert mine.state == theirs.state


def assert_equal_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """The same names, the same bits."""
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """Tiny trainings in a temporary folder, without what takes time and is tested elsewhere: plots and fsync."""
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(journal, "plot_losses", lambda curves, axis, path: files.write_text(path, "a plot"))
    monkeypatch.setattr(files, "_sync", lambda path: None)
    return Lab(tmp_path)
