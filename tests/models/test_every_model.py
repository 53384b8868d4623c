"""What holds for every kind of model, by the table MODELS: a new one is tested by its line there.

Trained by both engines, resumed bit for bit, cached as uncached, in a batch as alone, saved and loaded, compiled, and
with recomputed blocks.
"""

import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quire
from quire.config import to_table
from quire.data.batches import Batch
from quire.layers.cross_entropy import IGNORED
from quire.layers.layer import Block, Layer, recording
from quire.models import MODELS, build_model
from quire.run import Run
from quire.training.engines import ENGINES
from quire.training.resume import verify

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def built(small_settings: Callable[..., Any]) -> Callable[..., Any]:
    """Builds a small model in float64, all of whose weights are random numbers large enough to matter."""

    def build(kind: str, **changes: Any) -> Any:
        model = build_model(small_settings(kind, **changes)).double()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) / 3
        return model.to(DEVICE)

    return build


def random_tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(12, shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def source(model: Any, rows: int, seed: int = 5) -> dict[str, Tensor]:
    """What a model with an encoder is called with besides, each row of another length; nothing for other models."""
    if not model.settings.reads_source:
        return {}
    read = random_tokens(rows, 7, seed=seed)
    return {
        "source": read.masked_fill(
            torch.arange(7, device=DEVICE) >= 7 - torch.arange(rows, device=DEVICE)[:, None], IGNORED
        )
    }


def gradients(model: Any, engine: str, batch: Batch) -> tuple[float, list[Tensor]]:
    torch.manual_seed(4)  # of dropout
    model.zero_grad()
    loss = ENGINES[engine].backpropagate(model, batch, 1.5)
    return float(loss), [parameter.grad.to_dense().clone() for parameter in model.parameters()]


def a_batch(model: Any) -> Batch:
    targets = random_tokens(3, 9, seed=3)
    targets[1, 4:] = IGNORED
    return Batch(random_tokens(3, 9), targets, int((targets != IGNORED).sum()), source(model, 3).get("source"))


def equal(ours: list[Tensor], theirs: list[Tensor], within: float) -> None:
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    assert largest > 0
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= within * largest


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", MODELS)
def test_both_engines_give_the_same_gradient(kind, dropout, built):
    """Of the very forward that backward undoes, and, without dropout, of the one that is not recorded."""
    model = built(kind, dropout=dropout).train()
    batch = a_batch(model)
    torch.manual_seed(4)
    with recording(model):
        loss = model(**batch.arguments())
        expected = [g.to_dense() for g in torch.autograd.grad(loss * 1.5, list(model.parameters()))]
        loss = loss.detach()
    found_loss, found = gradients(model, "manual", batch)
    assert found_loss == pytest.approx(float(loss), rel=1e-12)
    equal(found, expected, 1e-10)
    if not dropout or DEVICE.type == "cpu":  # where both draw alike
        equal(found, gradients(model, "autograd", batch)[1], 1e-10)
    assert all(not layer.tape for layer in model.modules() if isinstance(layer, Layer))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", MODELS)
def test_recomputed_blocks_give_the_same_gradient_from_less_memory(kind, engine, built):
    model = built(kind, dropout=0.3).train()
    batch = a_batch(model)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert len(blocks) >= 2
    loss, expected = gradients(model, engine, batch)
    kept = kept_bytes(model, engine, batch)
    for block in blocks:
        block.recomputed = True
    again, found = gradients(model, engine, batch)
    assert again == loss
    equal(found, expected, 1e-12)
    assert kept_bytes(model, engine, batch) < kept


@pytest.mark.parametrize("kind", MODELS)
def test_both_engines_in_mixed_precision(kind, built):
    """Under autocast the products are bfloat16 in both, and their gradients right to its precision."""
    model = built(kind).float().train()
    batch = a_batch(model)
    exact_loss, exact = gradients(model, "autograd", batch)
    for engine in ENGINES:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            loss, _ = gradients(model, engine, batch)
            torch.manual_seed(4)
            ENGINES[engine].backpropagate(model, batch, 1.5)  # adds to what is there
        found = [parameter.grad.to_dense() / 2 for parameter in model.parameters()]
        assert loss == pytest.approx(exact_loss, rel=0.02)
        assert all(gradient.dtype == torch.float32 for gradient in found)
        off = torch.stack([(a - b).norm() for a, b in zip(found, exact, strict=True)]).norm()
        assert float(off / torch.stack([b.norm() for b in exact]).norm()) < 0.03


def kept_bytes(model: Any, engine: str, batch: Batch) -> int:
    """What forward keeps for backward, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(value: Any) -> Any:
        if isinstance(value, Tensor) and value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, (tuple, list)):
            for part in value:
                count(part)
        return value

    if engine == "autograd":
        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            loss = model(**batch.arguments())
        del loss  # not before: memory that is let go may be given out again, and be counted once
        return sum(kept.values())
    with torch.no_grad(), recording(model):
        model(**batch.arguments())
        for layer in model.modules():
            if isinstance(layer, Layer):
                count(layer.tape)
        return sum(kept.values())


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_cached_equals_uncached(kind, built):
    """However the tokens are cut into pieces; also after the cache was copied and its rows put in another order."""
    model = built(kind).eval()
    rows, read = random_tokens(3, 12), source(model, 3)
    whole = model(rows, **read)
    for cuts in [(0, 1, 2, 3, 12), (0, 5, 6, 7, 8, 9, 10, 11, 12), (0, 12)]:
        cache = model.new_cache(3)
        for number, (start, stop) in enumerate(pairwise(cuts)):
            piece = model(rows[:, start:stop], cache=cache, **(read if number == 0 else {}))
            torch.testing.assert_close(piece, whole[:, start:stop], rtol=1e-9, atol=1e-9)
        assert cache.length == 12
    cache = model.new_cache(3)
    model(rows[:, :7], cache=cache, **read)
    order = torch.tensor([2, 0, 2, 1], device=DEVICE)
    other = cache.copy().reordered(order)
    model(rows[:, 7:9], cache=cache)  # what befalls the first leaves its copy alone
    torch.testing.assert_close(model(rows[order, 7:], cache=other), whole[order, 7:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_a_row_is_the_same_in_a_batch_and_alone(kind, built):
    """Rows of different lengths, padded on the left, the prompt at once and then token by token."""
    model = built(kind).eval()
    lengths, read = [9, 4, 1], source(model, 3)
    rows = random_tokens(3, 9)
    mask = (torch.arange(9) >= 9 - torch.tensor(lengths).unsqueeze(1)).to(DEVICE)
    for row, length in enumerate(lengths):
        own = {name: value[row : row + 1] for name, value in read.items()}
        alone = model(rows[row : row + 1, 9 - length :], **own)
        together = model(rows, mask=mask, **read)
        torch.testing.assert_close(together[row, 9 - length :], alone[0], rtol=1e-9, atol=1e-9)
        cache, next_tokens = model.new_cache(3), random_tokens(3, 2, seed=8)
        model(rows, cache=cache, mask=mask, **read)
        later = [model(next_tokens[:, i : i + 1], cache=cache) for i in range(2)]
        whole = model(torch.cat((rows[row : row + 1, 9 - length :], next_tokens[row : row + 1]), 1), **own)
        torch.testing.assert_close(torch.cat(later, 1)[row], whole[0, -2:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_nothing_looks_ahead(kind, built):
    model = built(kind).eval()
    rows, read = random_tokens(2, 12), source(model, 2)
    whole = model(rows, **read)
    for length in (1, 5, 11):
        torch.testing.assert_close(model(rows[:, :length], **read), whole[:, :length], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", MODELS)
def test_compiles(kind, built):
    """Traced forward and backward as torch.compile does, but for the last step, which makes machine code."""
    model = built(kind).train()
    batch = a_batch(model)
    torch._dynamo.reset()
    loss, expected = gradients(model, "autograd", batch)
    faster = torch.compile(copy.deepcopy(model), backend="aot_eager")
    again, found = gradients(faster, "autograd", batch)
    assert again == pytest.approx(loss, rel=1e-12)
    equal(found, expected, 1e-10)


@pytest.mark.parametrize("kind", MODELS)
def test_trains_resumes_and_loads(kind, desk: Path, pairs: Path, small_settings):
    """From a text to a run by either engine: the same steps, resumed bit for bit, measured and made to write."""
    settings = to_table(small_settings(kind, context_length=32))
    reads = MODELS[kind].Settings.reads_source
    texts, data = ([], {"pairs": str(pairs)}) if reads else (["book.txt"], {})
    common = {"steps": 6, "batch_size": 4, "threads": 1, "device": "cpu", "learning_rate": 3e-3, "warmup_steps": 2}
    runs = {}
    for engine in ENGINES:
        runs[engine] = quire.train(*texts, run=engine, model=settings, data=data, engine=engine, **common)
        assert verify(runs[engine]) is None
    one, other = (runs[engine].model("cpu") for engine in ENGINES)
    for (name, ours), theirs in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        if not name.endswith("key.bias"):  # its gradient is 0 but for rounding, which Adam makes steps of
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, msg=name)
    found = Run("manual")
    assert found.settings == one.settings
    assert quire.evaluate(found).validation_loss == pytest.approx(quire.evaluate("autograd").validation_loss, rel=1e-3)
    assert quire.generate(found, prompt="owl", tokens=5, temperature=0) == quire.generate(
        found, prompt="owl", tokens=5, temperature=0
    )
    before = quire.evaluate(found).validation_loss
    quire.resume(found, steps=4)
    assert quire.evaluate(found).validation_loss < before
