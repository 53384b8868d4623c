"""The manual engine is whole and independent: a complete training runs while nothing of autograd may.

Within `forbidden` every way into automatic differentiation raises (the calls that run it, and the hook that is asked
about each tensor that it keeps), and every tensor that any operation gives is looked at: none has a graph behind it or
asks for one, but the parameters themselves, which are leaves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import quire
from quire import files
from quire.config import to_table
from quire.data.batches import Batch
from quire.models import MODELS, build_model
from quire.run import Run
from quire.training import journal
from quire.training.engines import ENGINES
from quire.training.loop import Trainer
from quire.training.resume import verify

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
TRAINING = {
    "batch_size": 4, "accumulation_steps": 2, "gradient_clip": 0.05, "learning_rate": 3e-3, "warmup_steps": 2,
    "evaluation_interval": 4, "threads": 1, "engine": "manual", "sample_tokens": 5,
}  # fmt: skip


class Graphs(AssertionError):
    """Something of autograd was about to run, or to be recorded."""


class NoGraph(TorchFunctionMode):
    """Looks at whatever a function of torch gives, and counts the functions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = func(*args, **(kwargs or {}))
        self.seen += 1
        for value in tree_leaves(given):
            leaf = isinstance(value, nn.Parameter) and value.grad_fn is None
            if isinstance(value, Tensor) and not leaf and (value.grad_fn is not None or value.requires_grad):
                raise Graphs(f"{getattr(func, '__name__', func)} gave a tensor of a graph: {value.grad_fn}")
        return given


@contextmanager
def forbidden() -> Iterator[NoGraph]:
    """See the module's description; gives the one who looks."""

    def refused(*arguments: Any, **named: Any) -> Any:
        raise Graphs("autograd was called")

    engine = type("Engine", (), {"run_backward": staticmethod(refused)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "backward", refused)
        patch.setattr(torch.autograd, "backward", refused)
        patch.setattr(torch.autograd, "grad", refused)
        patch.setattr(torch.autograd.Variable, "_execution_engine", engine)
        with torch.autograd.graph.saved_tensors_hooks(refused, refused), NoGraph() as watch:
            yield watch


@pytest.fixture
def settings(small_settings: Callable[..., Any]) -> Callable[[str], dict[str, Any]]:
    """A small model's settings of a kind, every one with dropout."""

    def of(kind: str) -> dict[str, Any]:
        stack = ({"kind": "embedding", "size": 16}, {"kind": "positional-embedding"}, {"kind": "dropout"},
                 {"kind": "rnn", "residual": True}, {"kind": "lstm", "size": 12, "dropout": 0.1}, {"kind": "gru"},
                 {"kind": "attention", "dropout": 0.1}, {"kind": "dense", "activation": "gelu"},
                 {"kind": "block", "heads": 2}, {"kind": "feedforward", "activation": "relu"},
                 {"kind": "layernorm"})  # fmt: skip
        context = 32 if MODELS[kind].Settings.reads_source else 16
        return to_table(small_settings(kind, context_length=context, layers=2, dropout=0.1, stack=stack))

    return of


@pytest.fixture
def corpus(desk: Path, pairs: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bool], tuple[list[str], Any]]:
    """What a model of a kind is trained on, and another text of the same characters for its fine-tuning."""
    text = (desk / "book.txt").read_text(encoding="utf-8")
    (desk / "other.txt").write_text(text[len(text) // 2 :] + text[: len(text) // 4], encoding="utf-8")
    (desk / "other.tsv").write_text("\n".join(reversed(pairs.read_text(encoding="utf-8").splitlines())) + "\n")
    monkeypatch.setattr(files, "_sync", lambda path: None)
    monkeypatch.setattr(journal, "plot_losses", lambda *arguments: None)

    def of(kind: str, other: bool) -> tuple[list[str], dict[str, Any]]:
        if MODELS[kind].Settings.reads_source:
            return [], {"pairs": "other.tsv" if other else str(pairs)}
        return ["other.txt" if other else "book.txt"], {}

    return of


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", MODELS)
def test_a_whole_life_without_a_graph(kind, device, settings, corpus, monkeypatch):
    """Trained, killed, resumed, proven exact, trained on and fine-tuned; then it is known what was done."""
    (texts, data), (other, other_data) = (corpus(kind, more) for more in (False, True))
    step, clipped = Trainer.step_optimizers, []

    def perhaps(trainer: Trainer, loss: float) -> None:
        clipped.append(trainer.gradient_norm > TRAINING["gradient_clip"])
        if len(clipped) == 6:
            raise KeyboardInterrupt
        step(trainer, loss)

    monkeypatch.setattr(Trainer, "step_optimizers", perhaps)
    with forbidden() as watch:
        with pytest.raises(KeyboardInterrupt):
            quire.train(*texts, run="run", model=settings(kind), data=data, steps=7, device=device, **TRAINING)
        run = quire.resume("run", device=device)
        assert verify(run, device=device) is None
        quire.resume(run, steps=2, device=device)
        tuned = quire.finetune(run, *other, run="tuned", data=other_data, steps=4, device=device)
    assert watch.seen > 5_000
    assert any(clipped)
    assert run.metrics()[-1]["step"] == 9 and tuned.metrics()[-1]["step"] == 4
    assert tuned.config["training"]["engine"] == "manual"
    for done in (run, tuned):
        losses = [line["validation_loss"] for line in done.metrics() if line.get("validation_loss")]
        assert min(losses[1:]) < losses[0]
        assert "## Step" in (done.path / "samples.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", MODELS)
def test_nor_in_mixed_precision_with_recomputed_blocks(kind, settings, corpus):
    texts, data = corpus(kind, False)
    options = {**TRAINING, "device": "cpu", "precision": "bfloat16", "gradient_checkpointing": True, "sample_tokens": 0}
    with forbidden():
        run = quire.train(*texts, run="run", model=settings(kind), data=data, steps=3, **options)
        assert verify(run) is None
    assert run.metrics()[-1]["train_loss"] < 4


# ---- the guard itself ----


@pytest.mark.parametrize("kind", MODELS)
def test_the_other_engine_is_caught(kind, settings, corpus):
    texts, data = corpus(kind, False)
    with forbidden(), pytest.raises(Graphs):
        quire.train(*texts, run="run", model=settings(kind), data=data, steps=2, device="cpu",
                    **{**TRAINING, "engine": "autograd"})  # fmt: skip
    assert not Path("run").exists()


def test_every_way_into_autograd_is_caught(small_settings):
    """Each part of the guard by itself: the calls, what a forward would keep, and what an operation gives."""
    model = build_model(small_settings("gpt"))
    tokens = torch.randint(12, (2, 8))
    batch = Batch(tokens, tokens, 16)
    loss = model(tokens, tokens)
    weight = model.head.weight
    with forbidden():
        for call in (
            loss.backward,
            lambda: torch.autograd.backward(loss),
            lambda: torch.autograd.grad(loss, [weight]),
            lambda: torch.autograd.Variable._execution_engine.run_backward(),
            lambda: ENGINES["autograd"].backpropagate(model, batch, 1.0),
            lambda: weight.exp(),  # keeps its result: the hook
            lambda: weight + 1,  # keeps nothing: seen by its grad_fn
            lambda: weight.detach().requires_grad_(),
        ):
            with pytest.raises(Graphs):
                call()
        assert weight.grad is None
        ENGINES["manual"].backpropagate(model, batch, 1.0)
    assert weight.grad is not None


def test_a_run_opened_again_is_free_of_graphs_too(desk):
    """Measuring and writing need no gradients."""
    with forbidden():
        run = Run("tiny")
        assert quire.evaluate(run).validation_loss > 0
        assert quire.generate(run, prompt="The", tokens=5)[0].text
