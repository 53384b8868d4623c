"""Sparse attention: a dense model with the same mask gives the same, and caches hold no more than a window."""

import pytest
import torch

from quire.errors import UserError
from quire.layers.sparsity import RULES, Pattern, Sight
from quire.models.modern import Modern, ModernSettings
from quire.models.sparse import Sparse, SparseSettings
from quire.training.settings import layered, typed

SHAPE = {
    "vocabulary_size": 31, "context_length": 64, "embedding_size": 16, "layers": 4, "heads": 4, "kv_heads": 2,
    "feedforward_size": 24,
}  # fmt: skip


def sparse(window: int = 4, attention: tuple[str, ...] = ("window", "full"), **changes) -> Sparse:
    torch.manual_seed(3)
    model = Sparse(SparseSettings(**{**SHAPE, **changes}, window=window, attention=attention)).double().eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) / 3
    return model


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(31, shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("rule", RULES)
@torch.no_grad()
def test_equals_dense_attention_with_the_equivalent_mask(rule, monkeypatch):
    """The oracle is a modern decoder that is handed the mask of each rule, written out from positions alone."""
    model, rows = sparse(attention=(rule,)), random_tokens(2, 30)
    dense = Modern(ModernSettings(**SHAPE)).double().eval()
    dense.load_state_dict(model.state_dict())
    i, j = torch.arange(30).unsqueeze(1), torch.arange(30)
    seen = {
        "full": i >= j,
        "window": (i >= j) & (j > i - 4),
        "block-local": (i >= j) & (torch.div(i, 4, rounding_mode="floor") == torch.div(j, 4, rounding_mode="floor")),
        "columns": (i == j) | ((i > j) & (j % 4 == 3)),
        "strided": (i >= j) & ((i - j) % 4 == 0),
    }[rule]
    found = model(rows)
    monkeypatch.setattr(Sight, "visible", lambda *_: seen)
    torch.testing.assert_close(dense(rows), found, rtol=1e-10, atol=1e-10)


def test_layers_take_turns():
    model = sparse(attention=("window", "strided", "full"), layers=5)
    near, far, full = Pattern("window", 4), Pattern("strided", 4), Pattern()
    assert model.patterns == [near, far, full, near, far]


@pytest.mark.parametrize("rule", ["window", "block-local"])
@torch.no_grad()
def test_a_cache_holds_no_more_than_the_window(rule):
    """Measured in bytes of keys and values; and what is written past the window is what a whole reading gives."""
    model, rows = sparse(attention=(rule,)), random_tokens(2, 64)
    whole, cache, sizes = model(rows), model.new_cache(2), []
    for position in range(64):
        logits = model(rows[:, position : position + 1], cache=cache)
        torch.testing.assert_close(logits[:, 0], whole[:, position], rtol=1e-9, atol=1e-9)
        sizes.append(sum(kept.untyped_storage().nbytes() for kept in cache.keys + cache.values))
    assert len(set(sizes[3:])) == 1
    assert sizes[-1] == 4 * 2 * (2 * 2 * 3 * 4) * 8  # layers, keys and values of (B, kv_heads, window - 1, D) float64
    full = sparse(attention=("full",)).new_cache(2)
    assert sum(kept.untyped_storage().nbytes() for kept in full.keys + full.values) > 20 * sizes[-1]


@torch.no_grad()
def test_a_cache_that_has_forgotten_cannot_be_cut():
    model, rows = sparse(), random_tokens(1, 20)
    cache = model.new_cache(1)
    model(rows[:, :3], cache=cache)
    cache.cut(2)  # nothing has been forgotten yet
    torch.testing.assert_close(model(rows[:, 2:9], cache=cache), model(rows[:, :9])[:, 2:], rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match="looks back 4 positions"):
        cache.cut(7)
    cache.cut(9)  # which is all of it


def test_the_preset():
    settings = typed(layered("sparse")).with_model(vocabulary_size=90).model
    assert Sparse(settings).patterns.count(Pattern()) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"window": 1}, "--model.window must be at least 2"),
        ({"attention": ()}, "names no kind of attention"),
        ({"attention": ("windows",)}, "'windows' is not known. Did you mean window"),
    ],
)
def test_what_cannot_be(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        SparseSettings(**{**SHAPE, **changes})
