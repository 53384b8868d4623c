"""Every layer computes what torch's layer or function of that name computes, from the same weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quire.layers.activations import ACTIVATIONS
from quire.layers.attention import MultiHeadAttention, ScaledDotProductAttention, causal_mask
from quire.layers.dropout import Dropout
from quire.layers.embedding import Embedding
from quire.layers.feedforward import FeedForward, SwiGLU
from quire.layers.layer import Layer, recording
from quire.layers.linear import Linear
from quire.layers.normalization import LayerNorm, RMSNorm
from quire.layers.positions import LearnedPositions, RotaryPositions, SinusoidalPositions
from quire.layers.sparsity import Pattern, Sight

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(5)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def twice(layer: Layer, *inputs: Tensor) -> list[Tensor]:
    """The layer's result, not recorded and recorded."""
    plain = layer(*inputs)
    with torch.no_grad(), recording(layer):
        return [plain, layer(*inputs)]


PAIRS = {
    "linear": (Linear(4, 5), nn.Linear(4, 5)),
    "linear without bias": (Linear(4, 5, bias=False), nn.Linear(4, 5, bias=False)),
    "layernorm": (LayerNorm(4), nn.LayerNorm(4)),
    "layernorm without bias": (LayerNorm(4, bias=False, epsilon=0.1), nn.LayerNorm(4, bias=False, eps=0.1)),
    "rmsnorm": (RMSNorm(4, 1e-3), nn.RMSNorm(4, 1e-3)),
    "embedding": (Embedding(7, 4), nn.Embedding(7, 4)),
    "learned positions": (LearnedPositions(7, 4), nn.Embedding(7, 4)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_parameters_and_values_are_torch_nn_s(name):
    ours, theirs = (layer.double() for layer in PAIRS[name])
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())  # the same names and shapes, or an error
    looks_up = isinstance(ours, Embedding)
    x = torch.randint(7, (2, 3)) if looks_up else torch.randn(2, 3, 4, dtype=torch.float64) + 1
    for y in twice(ours, x):
        close(y, theirs(x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    theirs = {
        "relu": nn.ReLU(),
        "squared-relu": lambda x: nn.ReLU()(x) ** 2,
        "gelu": nn.GELU(),
        "gelu-tanh": nn.GELU(approximate="tanh"),
        "silu": nn.SiLU(),
    }[name]
    x = torch.randn(3, 50, dtype=torch.float64) * 4
    for y in twice(ACTIVATIONS[name](), x):
        close(y, theirs(x))


@pytest.mark.parametrize("bias", [True, False])
def test_feedforward_and_swiglu(bias):
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    ours = FeedForward(4, 6, "gelu", bias).double()
    theirs = nn.Sequential(nn.Linear(4, 6, bias), nn.GELU(), nn.Linear(6, 4, bias)).double()
    ours.up.load_state_dict(theirs[0].state_dict())
    ours.down.load_state_dict(theirs[2].state_dict())
    for y in twice(ours, x):
        close(y, theirs(x))

    gated = SwiGLU(4, 6, bias).double()
    for parameter in gated.parameters():
        nn.init.normal_(parameter)
    opened = F.silu(F.linear(x, gated.gate.weight, gated.gate.bias)) * F.linear(x, gated.up.weight, gated.up.bias)
    for y in twice(gated, x):
        close(y, F.linear(opened, gated.down.weight, gated.down.bias))


@pytest.mark.parametrize("p", [0.0, 0.3, 0.9])
def test_dropout_draws_the_same_whether_recording_or_not(p):
    layer, x = Dropout(p).train(), torch.randn(40, 50, dtype=torch.float64)
    results = []
    for record in (False, True):
        torch.manual_seed(3)
        with recording(layer if record else nn.Identity()):
            results.append(layer(x))
    torch.manual_seed(3)
    results.append(F.dropout(x, p))
    close(results[0], results[2])
    close(results[1], results[2])
    zeros = float((results[1] == 0).double().mean())
    assert abs(zeros - p) < 0.05
    assert torch.equal(layer.eval()(x), x)


# ---- attention ----


def test_multi_head_attention_is_torch_nn_s():
    ours = MultiHeadAttention(8, 4, 4, 2).double()
    theirs = nn.MultiheadAttention(8, 4, batch_first=True).double()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    thirds = zip(theirs.in_proj_weight.chunk(3), theirs.in_proj_bias.chunk(3), strict=True)
    for part, (weight, bias) in zip((ours.query, ours.key, ours.value), thirds, strict=True):
        part.load_state_dict({"weight": weight, "bias": bias})
    ours.output.load_state_dict(theirs.out_proj.state_dict())
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected, weights = theirs(x, x, x, attn_mask=~causal_mask(5, 0, CPU), average_attn_weights=False)
    for y in twice(ours, x):
        close(y, expected)
    parts = ours.query(x), ours.key(x), ours.value(x)
    query, key, _ = (part.unflatten(-1, (4, 2)).transpose(1, 2) for part in parts)
    close(ours.attend.weights(query, key), weights)


def test_grouped_heads_are_repeated_heads():
    """Two key/value heads that four query heads share: four heads with those two written out twice."""
    few, many = MultiHeadAttention(8, 4, 2, 2).double(), MultiHeadAttention(8, 4, 4, 2).double()
    for parameter in few.parameters():
        nn.init.normal_(parameter)
    state = few.state_dict()
    for name in ("key.weight", "key.bias", "value.weight", "value.bias"):
        state[name] = state[name].unflatten(0, (2, 2)).repeat_interleave(2, 0).flatten(0, 1)
    many.load_state_dict(state)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    for ours, theirs in zip(twice(few, x), twice(many, x), strict=True):
        close(ours, theirs)


MASKS = {
    "none": None,
    "left": torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]).bool(),
    "right": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]).bool(),
    "nothing but padding": torch.zeros(3, 5).bool(),
}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("past", [0, 2, 4])
@pytest.mark.parametrize("mask", MASKS)
def test_fused_attention_is_its_weights_times_its_values(mask, past, kv_heads):
    attend = ScaledDotProductAttention().double()
    query = torch.randn(3, 4, 5 - past, 6, dtype=torch.float64)
    key, value = torch.randn(2, 3, kv_heads, 5, 6, dtype=torch.float64)
    visible = Sight(torch.arange(5), 5 - past, MASKS[mask]).visible(Pattern(), past)
    fused, recorded = twice(attend, query, key, value, visible)
    weights = attend.weights(query, key, visible)
    close(fused, recorded)
    assert weights.shape == (3, 4, 5 - past, 5)
    close(weights.sum(-1), torch.ones(3, 4, 5 - past, dtype=torch.float64))
    close(weights @ value.repeat_interleave(4 // kv_heads, 1), fused)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("documents", [None, torch.tensor([[0, 0, 1, 1, 1], [1, 2, 2, 3, 4], [0, 0, 0, 0, 1]])])
@pytest.mark.parametrize(("new", "past"), [(5, 0), (1, 4), (2, 3), (1, 0)])
def test_visibility_position_by_position(mask, new, past, documents):
    """A position sees itself and the real tokens of its document before it, and no more."""
    real = None if MASKS[mask] is None else MASKS[mask][:, : past + new]
    documents = None if documents is None else documents[:, : past + new]
    visible = Sight(torch.arange(past + new), new, real, documents).visible(Pattern(), past)
    if visible is None:  # the kernels' own cases
        assert real is None and documents is None
        visible = causal_mask(new, past, CPU)
    visible = visible.expand(3, 1, new, past + new)
    for row in range(3):
        for i in range(new):
            for j in range(past + new):
                before = j < past + i and (real is None or bool(real[row, j]))
                before = before and (documents is None or bool(documents[row, j] == documents[row, past + i]))
                assert bool(visible[row, 0, i, j]) == (before or j == past + i)


def test_padding_never_yields_nan_and_never_reaches_a_token():
    attention = MultiHeadAttention(4, 2, 2, 2).double()
    mask = MASKS["left"]
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    other = torch.where(mask.unsqueeze(-1), x, torch.randn_like(x))
    visible = Sight.of(5, 0, CPU, mask).visible(Pattern(), 0)
    y, moved = attention(x, None, visible), attention(other, None, visible)
    assert y.isfinite().all()
    close(y[mask], moved[mask])


def test_attention_looks_at_nothing_that_comes_later():
    attention = MultiHeadAttention(4, 2, 1, 2, qk_norm=True).double()
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    for record in (False, True):
        with recording(attention if record else nn.Identity()):
            whole = attention(x)
            for length in range(1, 6):
                close(attention(x[:, :length]), whole[:, :length])


# ---- positions ----


def test_sinusoidal_positions_are_the_formula():
    for size in (6, 7):
        table = SinusoidalPositions(size)(torch.arange(50))
        assert table.shape == (50, size)
        for position in range(50):
            for channel in range(size):
                angle = position / 10000 ** (2 * (channel // 2) / size)
                expected = math.sin(angle) if channel % 2 == 0 else math.cos(angle)
                assert abs(float(table[position, channel]) - expected) < 1e-5


def test_positions_of_padded_rows_are_looked_up_row_by_row():
    rows = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 3]])
    waves = SinusoidalPositions(4)
    assert torch.equal(waves(rows)[0, 1:], waves(torch.arange(3)))
    rotary = RotaryPositions(4)
    x = torch.randn(2, 4, 3, 4)
    torch.testing.assert_close(rotary(x, *rotary.angles(rows))[1], rotary(x[1:], *rotary.angles(torch.arange(4)))[0])


@pytest.mark.parametrize("base", [100.0, 10000.0])
def test_rotary_dot_products_depend_on_the_distance_alone(base):
    rotary = RotaryPositions(8, base)
    query, key = torch.randn(2, 8, dtype=torch.float64)

    def turned(x: Tensor, position: int) -> Tensor:
        return rotary(x.view(1, 1, 1, 8), *rotary.angles(torch.tensor([position]))).flatten()

    assert torch.equal(turned(query, 0), query)
    for distance in (-3, 0, 1, 7):
        products = [float(turned(query, p + distance) @ turned(key, p)) for p in (3, 4, 10, 100)]
        assert max(products) - min(products) < 1e-4  # the angles are float32
    assert abs(float(turned(query, 4) @ turned(key, 3)) - float(query @ key)) > 1e-3


def test_rotary_turns_each_pair_of_halves_by_its_angle():
    x = torch.randn(6, dtype=torch.float64)
    rotary = RotaryPositions(6, 10.0)
    y = rotary(x.view(1, 1, 1, 6), *rotary.angles(torch.tensor([5]))).flatten()
    for i in range(3):
        turn = complex(math.cos(5 * 10.0 ** (-2 * i / 6)), math.sin(5 * 10.0 ** (-2 * i / 6)))
        expected = complex(x[i], x[i + 3]) * turn
        assert abs(complex(y[i], y[i + 3]) - expected) < 1e-5
