"""RNN, LSTM and GRU beside torch.nn's: states, gradients, padding, forgetting, and a state carried on."""

import pytest
import torch
from torch import Tensor, nn

from quire.layers.layer import recording
from quire.layers.recurrent import CELLS, RNN, Memory

SHAPES = [(3, 7, 4, 5), (1, 1, 2, 3), (2, 5, 3, 3), (1, 9, 5, 1)]  # batch, time, inputs, size


def pair(name: str, inputs: int, size: int) -> tuple[RNN, nn.Module]:
    """Our layer and torch's, with the same random weights, in float64."""
    torch.manual_seed(1)
    theirs = getattr(nn, name.upper())(inputs, size, batch_first=True).double()
    ours = CELLS[name](inputs, size).double()
    ours.load_state_dict(theirs.state_dict(), strict=True)  # hence also: the same names and shapes
    return ours, theirs


def numbers(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def furthest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("name", CELLS)
def test_states_and_gradients_equal_torch_s(name, shape):
    batch, time, inputs, size = shape
    ours, theirs = pair(name, inputs, size)
    x, grad = numbers(batch, time, inputs).requires_grad_(True), numbers(batch, time, size)
    expected, _ = theirs(x)
    gradients = torch.autograd.grad(expected, [x, *theirs.parameters()], grad)

    plain = ours(x)
    assert furthest([plain], [expected]) <= 1e-10
    assert furthest(torch.autograd.grad(plain, [x, *ours.parameters()], grad), gradients) <= 1e-10
    with torch.no_grad(), recording(ours):
        assert furthest([ours(x)], [expected]) <= 1e-10
        given = ours.backward(grad)
    assert furthest([given, *(parameter.grad for parameter in ours.parameters())], gradients) <= 1e-10


@pytest.mark.parametrize("name", CELLS)
@torch.no_grad()
def test_each_weight_s_gradient_is_one_product_over_all_times(name, monkeypatch):
    """However long the sequence: through time goes the gates' gradient alone."""
    ours, _ = pair(name, 3, 4)
    products = []
    matmul = torch.Tensor.__matmul__

    def counted(a: Tensor, b: Tensor) -> Tensor:
        products.append((tuple(a.shape), tuple(b.shape)))
        return matmul(a, b)

    with recording(ours):
        ours(numbers(2, 6, 3))
        monkeypatch.setattr(torch.Tensor, "__matmul__", counted)
        ours.backward(numbers(2, 6, 4))
    rows = len(ours.weight_hh_l0)
    assert products.count(((2, rows), (rows, 4))) == 6  # back through the state, step by step
    assert products.count(((rows, 12), (12, 3))) == products.count(((rows, 12), (12, 4))) == 1
    assert len(products) == 9  # and one to the inputs


@pytest.mark.parametrize("name", CELLS)
@torch.no_grad()
def test_padding_leaves_the_state_as_it_was(name):
    """Beside torch's packed sequences, on either side and in between."""
    ours, theirs = pair(name, 3, 4)
    x = numbers(3, 6, 3)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1]]).bool()
    memory = Memory()
    found = ours(x, mask, memory=memory)
    packed = nn.utils.rnn.pack_sequence([row[keep] for row, keep in zip(x, mask, strict=True)], enforce_sorted=False)
    states, last = theirs(packed)
    states, _ = nn.utils.rnn.pad_packed_sequence(states, batch_first=True)
    for row, keep in enumerate(mask):
        assert furthest([found[row][keep]], [states[row][: int(keep.sum())]]) <= 1e-12
    last = last if isinstance(last, tuple) else (last,)
    assert furthest(list(memory.state), [part[0] for part in last]) <= 1e-12
    assert float(found[1, :2].abs().max()) == 0  # nothing read yet
    assert torch.equal(found[0, 2:], found[0, 2:3].expand(4, -1))


@pytest.mark.parametrize("name", CELLS)
@torch.no_grad()
def test_a_state_is_forgotten_where_a_document_starts(name):
    ours, _ = pair(name, 3, 4)
    x, starts = numbers(2, 7, 3), torch.tensor([[0, 0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 1, 0, 0]]).bool()
    found = ours(x, starts=starts)
    for row, places in enumerate([[(0, 2), (2, 5), (5, 6), (6, 7)], [(0, 4), (4, 7)]]):
        alone = [ours(x[row : row + 1, a:b]) for a, b in places]
        assert furthest([found[row]], [torch.cat(alone, 1)[0]]) <= 1e-12


@pytest.mark.parametrize("name", CELLS)
@torch.no_grad()
def test_a_memory_carries_on_where_it_stopped(name):
    ours, _ = pair(name, 3, 4)
    x = numbers(2, 7, 3)
    whole, memory = ours(x), Memory()
    pieces = [ours(x[:, a:b], memory=memory) for a, b in [(0, 3), (3, 4), (4, 7)]]
    assert furthest([torch.cat(pieces, 1)], [whole]) <= 1e-12
    memory = Memory()
    ours(x[:, :4], memory=memory)
    memory.length = 4
    order, copied = torch.tensor([1, 0, 1]), memory.copy()
    assert furthest([ours(x[order, 4:], memory=memory.reordered(order))], [whole[order, 4:]]) <= 1e-12
    ours(x[:, :2], memory=memory)
    assert furthest([ours(x[:, 4:], memory=copied)], [whole[:, 4:]]) <= 1e-12  # what befell the other left it alone


def test_a_state_cannot_be_cut_in_between():
    memory = Memory()
    memory.state, memory.length = (torch.ones(1, 2),), 5
    memory.cut(5)
    memory.cut(9)
    assert memory.length == 5 and memory.state is not None
    with pytest.raises(ValueError, match="A recurrent state of 5 positions cannot be cut to 3"):
        memory.cut(3)
    assert memory.length == 5 and memory.state is not None
    memory.cut(0)
    assert memory.length == 0 and memory.state is None


@pytest.mark.parametrize("name", CELLS)
def test_fresh_weights(name):
    """Each gate's map of the state is orthogonal, and an LSTM's forget gate is open."""
    torch.manual_seed(3)
    layer = CELLS[name](400, 32)
    for gate in layer.weight_hh_l0.detach().chunk(layer.GATES):
        torch.testing.assert_close(gate @ gate.T, torch.eye(32), rtol=0, atol=1e-5)
    assert float(layer.weight_ih_l0.detach().std()) == pytest.approx(1 / 20, rel=0.05)
    biases = (layer.bias_ih_l0 + layer.bias_hh_l0).detach().chunk(layer.GATES)
    assert [float(bias.mean()) for bias in biases] == ([0, 1, 0, 0] if name == "lstm" else [0] * layer.GATES)


@pytest.mark.parametrize("name", CELLS)
def test_in_mixed_precision_on_a_cpu(name):
    """Recorded or not, and whatever the layer before gave."""
    layer, x = CELLS[name](6, 5), numbers(2, 4, 6).float()
    exact = layer(x).detach()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = [layer(x), layer(x.bfloat16())]
        with recording(layer):
            found.append(layer(x))
            layer.backward(torch.ones_like(exact))
    for states in found:
        torch.testing.assert_close(states.float(), exact, rtol=0, atol=0.03)
