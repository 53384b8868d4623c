"""Models made of parts, recurrent ones and stacks: gradients, caches, padding, documents, writing."""

from itertools import chain, islice, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.generation.stream import tokens
from quire.layers.cross_entropy import IGNORED
from quire.layers.layer import Block, Layer, recording
from quire.models import MODELS
from quire.models.parts import PartsModel

CPU = torch.device("cpu")
SEPARATOR, VOCABULARY = 2, 11

EMBEDDING = {"kind": "embedding", "size": 6}
STACKS: dict[str, list[dict[str, Any]]] = {
    "embedding alone": [EMBEDDING],
    "mixed": [
        EMBEDDING,
        {"kind": "lstm", "size": 8, "normalization": "layernorm"},
        {"kind": "attention", "heads": 4, "kv_heads": 2, "residual": True, "normalization": "rmsnorm", "bias": True},
        {"kind": "gru", "residual": True},
        {"kind": "block", "heads": 2, "qk_norm": True},
        {"kind": "rmsnorm"},
    ],
    "learned positions": [
        EMBEDDING,
        {"kind": "positional-embedding"},
        {"kind": "block", "heads": 3, "rotary": False, "activation": "gelu-tanh", "normalization": "layernorm"},
        {"kind": "rnn", "size": 5},
        {"kind": "layernorm"},
    ],
    "waves and dense": [
        EMBEDDING,
        {"kind": "sinusoidal-positions"},
        {"kind": "attention", "heads": 1, "head_size": 4, "rotary": True},
        {"kind": "dense", "size": 7, "activation": "silu"},
        {"kind": "gelu"},
        {"kind": "feedforward", "hidden_size": 9, "residual": True},
        {"kind": "dense", "bias": False, "residual": True},
    ],
}
DROPPING = [
    EMBEDDING,
    {"kind": "dropout", "probability": 0.2},
    {"kind": "lstm", "dropout": 0.3, "residual": True, "normalization": "rmsnorm"},
    {"kind": "block", "heads": 3, "dropout": 0.1},
    {"kind": "relu"},
    {"kind": "gru", "size": 4, "dropout": 0.2},
]
RECURRENT: dict[str, dict[str, Any]] = {
    "rnn": {"cell": "rnn", "layers": 3},
    "lstm": {"cell": "lstm", "tied": True},
    "gru": {"cell": "gru", "residual": False, "hidden_size": 5},
    "wider lstm": {"cell": "lstm", "hidden_size": 9, "layers": 3},
}
KINDS: dict[str, dict[str, Any]] = {
    **{name: {"kind": "recurrent", "embedding_size": 6, **settings} for name, settings in RECURRENT.items()},
    **{name: {"kind": "stack", "stack": stack} for name, stack in STACKS.items()},
}


def built(kind: dict[str, Any], weights: float = 0.5, **settings: Any) -> PartsModel:
    """A model in float64 all of whose weights are random numbers of that size."""
    shape = {"vocabulary_size": VOCABULARY, "context_length": 14, "separator": SEPARATOR}
    settings = {**shape, **kind, **settings}
    model = MODELS[settings["kind"]]
    made = model(model.Settings(**settings)).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * weights
    return made


def random_tokens(*shape: int, below: int = VOCABULARY, seed: int = 2) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


def padding(side: str, batch: int, length: int) -> Tensor | None:
    mask = torch.arange(length) >= torch.arange(batch).unsqueeze(1)
    return {"none": None, "left": mask, "right": mask.flip(1)}[side]


# ---- gradients ----


@pytest.mark.parametrize(
    ("side", "separate", "recomputed"),
    [
        ("none", False, False),
        ("none", False, True),
        ("left", True, False),
        ("right", False, False),
        ("right", True, True),
    ],
)
@pytest.mark.parametrize("kind", [*KINDS, "dropout", "recurrent with dropout"])
def test_gradients_by_hand_equal_autograd(kind, side, separate, recomputed):
    dropping = {
        "dropout": {"kind": "stack", "stack": DROPPING, "tied": False},
        "recurrent with dropout": {**KINDS["rnn"], "dropout": 0.3},
    }
    model = built({**KINDS, **dropping}[kind], separate_documents=separate).train()
    inputs, targets, mask = random_tokens(3, 7, below=5), random_tokens(3, 7, seed=3), padding(side, 3, 7)
    targets = targets if mask is None else targets.masked_fill(~mask, IGNORED)
    torch.manual_seed(4)
    with recording(model):
        loss = model(inputs, targets, mask=mask)
        expected = torch.autograd.grad(loss * 3.0, list(model.parameters()))
    for block in model.modules():
        if isinstance(block, Block):
            block.recomputed = recomputed
    torch.manual_seed(4)
    with torch.no_grad(), recording(model):
        again = model(inputs, targets, mask=mask)
        model.backward(3.0)
        assert all(not layer.tape for layer in model.modules() if isinstance(layer, Layer))
    by_hand = [parameter.grad for parameter in model.parameters()]
    assert float(again) == pytest.approx(float(loss.detach()), rel=1e-12)
    check(model, by_hand, expected)
    if kind == "dropout":
        return  # of attention weights: torch's kernel draws it otherwise
    model.zero_grad()
    torch.manual_seed(4)
    (model(inputs, targets, mask=mask) * 3.0).backward()  # not recorded: torch's kernels
    check(model, [parameter.grad for parameter in model.parameters()], expected)


def check(model: PartsModel, found: list[Tensor], expected: list[Tensor]) -> None:
    """The same gradients, and every parameter has one."""
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for (name, _), ours, theirs in zip(model.named_parameters(), found, expected, strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-10 * largest, name


# ---- the cache ----


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_can_be_copied_and_reordered(kind):
    model, rows = built(KINDS[kind]).eval(), random_tokens(3, 9)
    whole = model(rows)
    cache = model.new_cache(3)
    pieces = [model(rows[:, a:b], cache=cache) for a, b in [(0, 3), (3, 4), (4, 9)]]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert cache.length == 9
    cache = model.new_cache(3)
    model(rows[:, :5], cache=cache)
    other, order = cache.copy(), torch.tensor([2, 0, 2, 1])
    picked = cache.reordered(order)
    torch.testing.assert_close(model(rows[:, 5:], cache=cache), whole[:, 5:])
    assert (cache.length, other.length, picked.length) == (9, 5, 5)
    torch.testing.assert_close(model(rows[:, 5:], cache=other), whole[:, 5:])  # what befell the first left it alone
    torch.testing.assert_close(model(rows[order, 5:], cache=picked), whole[order, 5:])
    cache.cut(0)
    torch.testing.assert_close(model(rows, cache=cache), whole)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_is_cut_unless_a_recurrent_state_stands_in_the_way(kind):
    model, rows = built(KINDS[kind]).eval(), random_tokens(2, 9)
    whole, cache = model(rows), model.new_cache(2)
    model(rows[:, :6], cache=cache)
    cache.cut(8)  # no more than there is
    assert cache.length == 6
    if kind in ("embedding alone", "waves and dense"):
        cache.cut(4)
        torch.testing.assert_close(model(rows[:, 4:], cache=cache), whole[:, 4:])
        return
    with pytest.raises(ValueError, match="A recurrent state of 6 positions cannot be cut to 4"):
        cache.cut(4)
    torch.testing.assert_close(model(rows[:, 6:], cache=cache), whole[:, 6:])  # and nothing was lost by asking


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_padded_row_is_the_row_alone(kind):
    model, rows = built(KINDS[kind]).eval(), random_tokens(2, 8)
    alone = model(rows[1:, 2:])
    mask = torch.tensor([[True] * 4, [False] * 2 + [True] * 2])
    cache = model.new_cache(2)
    first = model(rows[:, :4], cache=cache, mask=mask)
    torch.testing.assert_close(first[1:, 2:], alone[:, :2])
    torch.testing.assert_close(model(rows[:, 4:6], cache=cache)[1:], alone[:, 2:4])
    swapped = cache.reordered(torch.tensor([1, 0]))
    torch.testing.assert_close(model(rows[1:, 6:].expand(2, -1), cache=swapped)[:1], alone[:, 4:])


# ---- documents ----


@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_packed_window_is_its_documents_one_at_a_time(kind, side):
    model, plain = built(KINDS[kind], separate_documents=True).eval(), built(KINDS[kind]).eval()
    lengths = [[4, 6, 4], [5, 1, 1, 7], [14]]
    window = random_tokens(3, 14).masked_fill(random_tokens(3, 14) == SEPARATOR, 3)
    for row, parts in zip(window, lengths, strict=True):  # the second row begins within a document
        for start in list(chain([0], torch.tensor(parts).cumsum(0).tolist()))[row is window[1] : -1]:
            row[start] = SEPARATOR
    mask = padding(side, 3, 14)
    expected = torch.zeros(3, 14, VOCABULARY, dtype=torch.float64)
    for row, parts in enumerate(lengths):
        skip = row if side == "left" else 0
        for a, b in pairwise([0, *torch.tensor(parts).cumsum(0).tolist()]):
            if max(a, skip) < b:
                expected[row, max(a, skip) : b] = plain(window[row : row + 1, max(a, skip) : b])[0]
    real = torch.ones(3, 14, dtype=torch.bool) if mask is None else mask
    assert float((model(window, mask=mask) - expected)[real].abs().max()) < 1e-10
    if kind != "embedding alone":
        assert float((plain(window, mask=mask) - expected)[real].abs().max()) > 1e-3  # it matters
    cache = model.new_cache(3)
    cuts = [0, 5, 6, 10, 14]
    pieces = [
        model(window[:, a:b], cache=cache, mask=None if mask is None or a else mask[:, :b]) for a, b in pairwise(cuts)
    ]
    assert float((torch.cat(pieces, 1) - expected)[real].abs().max()) < 1e-10


# ---- writing ----


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_cached_and_batched_writing_is_plain_writing(kind):
    model, count = built(KINDS[kind], weights=1.0).eval(), 20
    prompts = [random_tokens(length, seed=length).tolist() for length in (1, 3, 14, 2, 29)]

    def choose(logits: Tensor, windows: list[list[int]]) -> list[int]:
        return [(int(row.argmax()) + window[-1] + len(window)) % VOCABULARY for row, window in zip(logits, windows)]

    expected = []
    for prompt in prompts:
        window, written = prompt[-14:], []
        for _ in range(count):
            written += choose(model(torch.tensor([window]))[:, -1], [window])
            window = [*window, written[-1]]
            window = window if len(window) <= 14 else window[-7:]
        expected.append(written)
    for cached in (True, False):
        together = list(islice(tokens(model, prompts, choose, CPU, cached), count))
        assert [list(row) for row in zip(*together, strict=True)] == expected
