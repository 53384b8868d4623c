"""Which positions each rule shows, one by one; and that all ways of attending to them agree."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from quire.layers import sparsity
from quire.layers.attention import ScaledDotProductAttention, causal_mask
from quire.layers.layer import recording
from quire.layers.sparsity import RULES, BlockSparse, Pattern, Sight

CPU = torch.device("cpu")

# In words, for a query at position i and a key at position j <= i.
SEES = {
    "full": lambda i, j, size: True,
    "window": lambda i, j, size: j in range(i - size + 1, i + 1),
    "block-local": lambda i, j, size: j in range(i - i % size, i + 1),
    "columns": lambda i, j, size: i == j or j in range(size - 1, i + 1, size),
    "strided": lambda i, j, size: j in range(i, -1, -size),
}


def shown(pattern: Pattern, new: int, past: int, held: int) -> torch.Tensor:
    visible = Sight.of(new, past, CPU).visible(pattern, held)
    return causal_mask(new, held, CPU) if visible is None else visible


@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_position_by_position(rule, size):
    seen = shown(Pattern(rule, size), 12, 0, 0)
    for i in range(12):
        for j in range(12):
            assert bool(seen[i, j]) == (j <= i and SEES[rule](i, j, size)), (i, j)


@pytest.mark.parametrize("rule", RULES)
def test_what_a_rule_shows_later_is_what_it_showed_at_once(rule):
    """With the keys of the past held whole, and with no more of them than the rule ever reaches back to."""
    pattern = Pattern(rule, 4)
    whole = shown(pattern, 14, 0, 0)
    for past in range(1, 14):
        for new in range(1, 15 - past):
            for held in {past, min(past, (pattern.reach or 99) - 1)}:
                later = shown(pattern, new, past, held)
                if Sight.of(new, past, CPU).visible(pattern, held) is None:
                    assert new == 1 and whole[past, past - held : past + 1].all()
                else:
                    assert torch.equal(later, whole[past : past + new, past - held : past + new])
                assert not whole[past : past + new, : past - held].any()


@pytest.mark.parametrize("rule", RULES)
def test_padding_takes_no_position(rule):
    """A row padded on the left sees what it would see alone: blocks and columns begin with its first token."""
    pattern, mask = Pattern(rule, 3), torch.arange(11) >= torch.tensor([[0], [2], [7]])
    visible = Sight.of(11, 0, CPU, mask).visible(pattern, 0)
    for row, padding in enumerate((0, 2, 7)):
        alone = shown(pattern, 11 - padding, 0, 0)
        assert torch.equal(visible[row, 0, padding:, padding:], alone)
        assert not visible[row, 0, padding:, :padding].any()


@pytest.mark.parametrize("rule", RULES)
def test_documents_are_counted_from_their_beginnings(rule):
    pattern, begins = Pattern(rule, 3), torch.zeros(1, 12, dtype=torch.bool)
    begins[0, [4, 5]] = True
    visible = Sight.of(12, 0, CPU, None, begins).visible(pattern, 0)[0, 0]
    expected = torch.zeros(12, 12, dtype=torch.bool)
    for start, stop in [(0, 4), (4, 5), (5, 12)]:
        expected[start:stop, start:stop] = shown(pattern, stop - start, 0, 0)
    assert torch.equal(visible, expected)


def devices() -> list[torch.device]:
    return [CPU, torch.device("cuda")] if torch.cuda.is_available() else [CPU]


@pytest.mark.parametrize("device", devices(), ids=str)
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "full"])
def test_the_kernel_for_sparse_attention_equals_dense_attention_with_its_mask(rule, device, monkeypatch):
    """On a GPU forward and gradients too; on a CPU, where the kernel has no backward, what it computes forward."""
    if device.type == "cpu":
        monkeypatch.setattr(sparsity, "_flex", lambda: flex_attention)  # not compiled, which needs a C++ compiler
    torch.manual_seed(1)
    query = torch.randn(2, 4, 200, 16, device=device, requires_grad=device.type == "cuda")
    key, value = (torch.randn(2, 2, 200, 16, device=device, requires_grad=query.requires_grad) for _ in range(2))
    sparse, attend = BlockSparse(Pattern(rule, 32), 200, device), ScaledDotProductAttention()
    assert torch.equal(sparse.dense(), shown(sparse.pattern, 200, 0, 0).to(device))
    results = [attend(query, key, value, sparse), attend(query, key, value, sparse.dense())]
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)
    if query.requires_grad:
        grad = torch.randn_like(query)
        found, expected = (torch.autograd.grad(result, (query, key, value), grad) for result in results)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    with recording(attend):  # the hand-written backward needs the mask spelled out
        torch.testing.assert_close(attend(query, key, value, sparse), results[1], rtol=1e-4, atol=1e-5)
