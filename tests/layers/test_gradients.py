"""Every layer's hand-written backward, against autograd and against finite differences, in float64."""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import quire.layers
from quire.layers import layer as layer_module
from quire.layers.activations import ACTIVATIONS, Curve
from quire.layers.attention import MultiHeadAttention, ScaledDotProductAttention
from quire.layers.blocks import BLOCKS
from quire.layers.cross_attention import CrossAttention, source_visibility
from quire.layers.cross_entropy import IGNORED, CrossEntropy
from quire.layers.dropout import Dropout
from quire.layers.embedding import Embedding
from quire.layers.feedforward import FeedForward, SwiGLU
from quire.layers.fixed_block import FixedBlock
from quire.layers.fixed_linear import FixedLinear
from quire.layers.head_loss import HeadLoss
from quire.layers.layer import Block, Layer, recording
from quire.layers.linear import Linear, OutputHead
from quire.layers.ngram_embedding import NgramEmbedding
from quire.layers.normalization import LayerNorm, RMSNorm
from quire.layers.positions import LearnedPositions, RotaryPositions, RotaryScaling, SinusoidalPositions
from quire.layers.recurrent import CELLS
from quire.layers.sparsity import Pattern, Sight

CPU = torch.device("cpu")


@dataclass
class Case:
    """A layer and what it is called with; `backward` gives the gradients of the first `gradients` inputs."""

    make: Callable[[], Layer]
    inputs: list[Tensor]
    gradients: int = 1
    others: tuple[object, ...] = ()  # arguments after the inputs
    layer: Layer = field(init=False)

    def __post_init__(self) -> None:
        """Weights of size 1, so that no term of any gradient hides behind a larger one."""
        self.layer = self.make().double().train()
        generator = torch.Generator().manual_seed(7)
        for parameter in self.layer.parameters():
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        for x in self.inputs[: self.gradients]:
            x.requires_grad_(True)
        for module in self.layer.modules():
            if isinstance(module, ScaledDotProductAttention):
                module.QUERIES = 2  # so that its gradient takes several turns

    def forward(self) -> Tensor:
        """Recorded, and with the same dropout each time."""
        torch.manual_seed(11)
        return self.layer(*self.inputs, *self.others)

    def leaves(self) -> list[Tensor]:
        return [*self.inputs[: self.gradients], *self.layer.parameters()]


def numbers(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int, below: int = 5) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(5))


def left_padded(batch: int, length: int) -> Tensor:
    """Row i begins with i paddings."""
    return torch.arange(length) >= torch.arange(batch).unsqueeze(1)


def right_padded(batch: int, length: int) -> Tensor:
    return left_padded(batch, length).flip(1)


def cases() -> dict[str, Case]:
    made: dict[str, Case] = {}
    for name, activation in ACTIVATIONS.items():
        x = numbers(3, 4)
        made[f"{name}"] = Case(activation, [x])
        made[f"{name} far out"] = Case(activation, [numbers(2, 3, 4) * 6])
    for shape in [(4,), (3, 4), (2, 3, 4), (2, 1, 3, 4)]:
        rows = "x".join(map(str, shape))
        if len(shape) > 1:
            made[f"linear {rows}"] = Case(lambda: Linear(4, 5), [numbers(*shape)])
            made[f"linear without bias {rows}"] = Case(lambda: Linear(4, 3, bias=False), [numbers(*shape)])
            made[f"layernorm {rows}"] = Case(lambda: LayerNorm(4), [numbers(*shape) + 2])
            made[f"layernorm without bias {rows}"] = Case(lambda: LayerNorm(4, bias=False), [numbers(*shape)])
            made[f"rmsnorm {rows}"] = Case(lambda: RMSNorm(4), [numbers(*shape) + 1])
            made[f"rmsnorm, small {rows}"] = Case(lambda: RMSNorm(4, epsilon=0.1), [numbers(*shape) / 9])
        made[f"dropout {rows}"] = Case(lambda: Dropout(0.4), [numbers(*shape)])
        made[f"no dropout {rows}"] = Case(lambda: Dropout(0.0), [numbers(*shape)])
        made[f"embedding {rows}"] = Case(lambda: Embedding(5, 3), [ids(*shape)], 0)
    for dropout, mask, begins in [
        (0.0, None, None),
        (0.4, left_padded(3, 6), None),
        (0.0, None, ids(3, 6, below=3) == 0),
    ]:
        made[f"n-gram embedding, dropout {dropout}, padded {mask is not None}, documents {begins is not None}"] = Case(
            lambda dropout=dropout: NgramEmbedding(4, 3, (2, 3), 30, dropout),
            [ids(3, 6, below=4)],
            0,
            (5, mask, begins),
        )
    made["output head"] = Case(lambda: OutputHead(4, 5), [numbers(2, 3, 4)])
    made["learned positions"] = Case(lambda: LearnedPositions(6, 3), [torch.arange(4)], 0)
    made["learned positions of padded rows"] = Case(lambda: LearnedPositions(6, 3), [ids(2, 4)], 0)
    made["sinusoidal positions"] = Case(lambda: SinusoidalPositions(4), [torch.arange(5)], 0)

    for head_size in (2, 6):
        rotary = RotaryPositions(head_size, 100.0)
        for name, positions in [("row", torch.arange(3)), ("padded rows", ids(2, 3, below=9))]:
            made[f"rotary {head_size} {name}"] = Case(
                lambda size=head_size: RotaryPositions(size, 100.0),
                [numbers(2, 3, 4, head_size)],
                others=rotary.angles(positions),
            )
    yarn = RotaryPositions(6, 100.0, RotaryScaling("yarn", 4.0, 8))
    made["rotary with an amplitude"] = Case(lambda: yarn, [numbers(2, 3, 4, 6)], others=yarn.angles(torch.arange(3)))
    for activation in ACTIVATIONS:
        for bias in (True, False):
            made[f"feedforward {activation} bias {bias}"] = Case(
                lambda activation=activation, bias=bias: FeedForward(3, 5, activation, bias), [numbers(2, 3, 3)]
            )
    for bias in (True, False):
        made[f"swiglu bias {bias}"] = Case(lambda bias=bias: SwiGLU(3, 5, bias), [numbers(2, 3, 3)])

    starts = ids(3, 4, below=2).bool()
    for name, cell in CELLS.items():
        for about, others in [
            ("alone", ()),
            ("left padding", (left_padded(3, 4),)),
            ("right padding", (right_padded(3, 4),)),
            ("documents", (None, starts)),
            ("documents and padding", (left_padded(3, 4), starts)),
        ]:
            made[f"{name} {about}"] = Case(lambda cell=cell: cell(3, 2), [numbers(3, 4, 3)], others=others)
        made[f"{name} one step"] = Case(lambda cell=cell: cell(3, 2), [numbers(2, 1, 3)])

    for name, targets in [
        ("all", ids(2, 4)),
        ("some ignored", ids(2, 4).masked_fill(left_padded(2, 4).flip(0).logical_not(), IGNORED)),
        ("a row ignored", ids(2, 4).index_fill(0, torch.tensor([0]), IGNORED)),
        ("none", torch.full((2, 4), IGNORED)),
    ]:
        made[f"cross-entropy {name}"] = Case(CrossEntropy, [numbers(2, 4, 5) * 3], others=(targets,))
        made[f"smoothed cross-entropy {name}"] = Case(
            lambda: CrossEntropy(0.2), [numbers(2, 4, 5) * 3], others=(targets,)
        )
    for norm in (lambda: LayerNorm(4), lambda: RMSNorm(4)):
        for placement, kind in BLOCKS.items():
            made[f"{placement}-norm block {type(norm()).__name__}"] = Case(
                lambda kind=kind, norm=norm: kind(
                    MultiHeadAttention(4, 2, 1, 2, dropout=0.2), FeedForward(4, 6, "gelu"), norm, 0.3
                ),
                [numbers(2, 5, 4)],
            )
    made["cross-entropy of a plain list"] = Case(CrossEntropy, [numbers(6, 5)], others=(ids(6),))

    # (past, new positions, mask of past and new, or None, documents of past and new, or None)
    sights = {
        "causal": (0, 4, None, None),
        "one token": (0, 1, None, None),
        "left padding": (0, 4, left_padded(3, 4), None),
        "right padding": (0, 4, right_padded(3, 4), None),
        "past": (2, 3, None, None),
        "past and padding": (2, 3, left_padded(3, 5), None),
        "documents": (0, 4, None, ids(3, 4, below=2).cumsum(1)),
        "documents, past and padding": (2, 3, left_padded(3, 5), ids(3, 5, below=2).cumsum(1)),
    }
    for name, (past, new, mask, segments) in sights.items():
        visible = Sight(torch.arange(past + new), new, mask, segments).visible(Pattern(), past)
        for heads, kv_heads in [(4, 4), (4, 2), (2, 1)]:
            for dropout in (0.0, 0.3):
                inputs = [
                    numbers(3, heads, new, 2, seed=1),
                    numbers(3, kv_heads, past + new, 2, seed=2),
                    numbers(3, kv_heads, past + new, 2, seed=3),
                ]
                made[f"attention {name}, heads {heads} of {kv_heads}, dropout {dropout}"] = Case(
                    lambda dropout=dropout: ScaledDotProductAttention(dropout), inputs, 3, (visible,)
                )
    shapes = [  # heads, kv_heads, head_size, bias, qk_norm, rotary, dropout, padding
        (2, 2, 2, True, False, False, 0.0, None),
        (2, 2, 2, True, False, False, 0.4, "left"),
        (2, 1, 4, False, True, True, 0.0, None),
        (4, 2, 2, True, True, False, 0.2, "right"),
        (4, 1, 2, False, False, True, 0.3, "left"),
        (3, 3, 6, False, True, True, 0.1, "right"),
        (1, 1, 2, True, True, True, 0.0, "left"),
    ]
    for heads, kv_heads, head_size, bias, qk_norm, rotary, dropout, side in shapes:
        mask = {None: None, "left": left_padded(3, 4), "right": right_padded(3, 4)}[side]
        turn = RotaryPositions(head_size, 50.0) if rotary else None
        positions = torch.arange(4) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
        made[f"multi-head {heads} {kv_heads} {head_size} {bias} {qk_norm} {rotary} {dropout} {side}"] = Case(
            lambda heads=heads, kv=kv_heads, size=head_size, bias=bias, norm=qk_norm, turn=turn, p=dropout: (
                MultiHeadAttention(3, heads, kv, size, bias=bias, qk_norm=norm, rotary=turn, dropout=p)
            ),
            [numbers(3, 4, 3)],
            others=(turn.angles(positions) if turn else None, Sight.of(4, 0, CPU, mask).visible(Pattern(), 0)),
        )
    for heads in (1, 2):
        for dropout in (0.0, 0.3):
            for side, mask in [
                ("no", torch.ones(3, 5).bool()),
                ("right", right_padded(3, 5)),
                ("left", left_padded(3, 5)),
            ]:
                made[f"cross-attention of {heads} heads, dropout {dropout}, {side} padding"] = Case(
                    lambda heads=heads, dropout=dropout: CrossAttention(4, heads, dropout=dropout),
                    [numbers(3, 2, 4), numbers(3, 5, 4, seed=4)],
                    2,
                    (source_visibility(mask),),
                )
    return made


CASES = cases()


def by_hand(case: Case, grad: Tensor) -> list[Tensor]:
    """The gradients that the layer's own backward gives, in the order of `leaves`."""
    with torch.no_grad(), recording(case.layer):
        case.forward()
        given = case.layer.backward(grad)
        assert all(not m.tape for m in case.layer.modules() if isinstance(m, Layer)), "something stayed on a tape"
    given = () if given is None else given if isinstance(given, tuple) else (given,)
    assert len(given) == case.gradients
    return [*given, *(parameter.grad.to_dense() for parameter in case.layer.parameters())]


@pytest.mark.parametrize("name", CASES)
def test_backward_equals_autograd(name):
    case = CASES[name]
    case.layer.zero_grad()
    with recording(case.layer):  # the very forward that backward undoes, dropout and all, differentiated by autograd
        y = case.forward()
    grad = torch.randn_like(y)
    if not case.leaves():
        assert not y.requires_grad
        assert by_hand(case, grad) == []
        return
    expected = [gradient.to_dense() for gradient in torch.autograd.grad(y, case.leaves(), grad)]
    found = by_hand(case, grad)
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= 1e-10 * largest
    again = by_hand(case, grad)  # parameters accumulate; gradients of inputs do not
    for number, (ours, theirs) in enumerate(zip(again, expected, strict=True)):
        times = 1 if number < case.gradients else 2
        assert float((ours - times * theirs).abs().max()) <= 1e-10 * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_curves_in_lower_precision_are_rounded_once(name, dtype, monkeypatch):
    """As torch's kernels do it, in several pieces; and large numbers, whose cube float16 cannot hold, stay finite."""
    monkeypatch.setattr(layer_module, "PIECE", 64)
    x = torch.cat((torch.randn(9, 30) * 3, torch.full((9, 2), 90.0)), dim=1).to(dtype).requires_grad_()
    curve, grad = ACTIVATIONS[name](), torch.randn(9, 32).to(dtype)
    y = curve(x)
    (expected,) = torch.autograd.grad(y, x, grad)
    with torch.no_grad(), recording(curve):
        torch.testing.assert_close(curve(x), y)
        torch.testing.assert_close(curve.backward(grad), expected)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("visible", [None, torch.ones(1, 1, 1, 5).bool()], ids=["causal", "all"])
def test_an_empty_batch_has_empty_gradients(visible, kv_heads):
    attend, query, key = ScaledDotProductAttention(), torch.ones(0, 4, 5, 2), torch.ones(0, kv_heads, 5, 2)
    with torch.no_grad(), recording(attend):
        given = attend.backward(attend(query, key, key, visible))
    assert [x.shape for x in given] == [query.shape, key.shape, key.shape]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.leaves()])
def test_backward_equals_finite_differences(name):
    """Central differences along random directions: of everything at once, and of each input and parameter alone."""
    case, step = CASES[name], 1e-5
    case.layer.zero_grad()
    with torch.no_grad(), recording(case.layer):
        grad = torch.randn_like(case.forward())
    found, leaves = by_hand(case, grad), case.leaves()
    alone = [[leaf] for leaf in leaves]

    def moved(directions: list[Tensor], distance: float) -> float:
        with torch.no_grad(), recording(case.layer):
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.add_(direction, alpha=distance)
            value = float((case.forward() * grad).sum())
            for leaf, direction in zip(leaves, directions, strict=True):
                leaf.sub_(direction, alpha=distance)
        return value

    for chosen in [leaves, leaves, *alone]:
        members = {id(leaf) for leaf in chosen}
        directions = [torch.randn_like(leaf) * (id(leaf) in members) for leaf in leaves]
        slope = (moved(directions, step) - moved(directions, -step)) / (2 * step)
        predicted = sum(float((direction * gradient).sum()) for direction, gradient in zip(directions, found))
        size = sum(float((direction * gradient).abs().sum()) for direction, gradient in zip(directions, found))
        assert abs(slope - predicted) <= 1e-6 * max(size, 1.0)


def test_every_layer_is_tested():
    for module in pkgutil.iter_modules(quire.layers.__path__, "quire.layers."):
        importlib.import_module(module.name)

    def below(kind: type[Layer]) -> set[type[Layer]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    # Of those that their module has now: other tests in this process may have run one anew, or sharded a model.
    known = {kind for kind in below(Layer) if getattr(sys.modules[kind.__module__], kind.__name__, None) is kind}
    layers = {kind for kind in known - {Layer, Block, Curve} if kind.__module__.startswith("quire.layers")}
    assert len(layers) > 10
    elsewhere = {HeadLoss, FixedLinear, FixedBlock}  # in tests of their own: one needs its head, the others never learn
    assert layers - elsewhere == {type(case.layer) for case in CASES.values()}


def test_kinks_and_zeros():
    """At 0 ReLU has no derivative; ours is the one torch chooses."""
    for name, activation in ACTIVATIONS.items():
        layer, x = activation(), torch.tensor([-1.0, 0.0, -0.0, 1.0], dtype=torch.float64, requires_grad=True)
        with recording(layer):
            (expected,) = torch.autograd.grad(layer(x).sum(), x)
            torch.testing.assert_close(layer.backward(torch.ones_like(x)).detach(), expected, msg=name)


def test_a_frozen_parameter_gets_no_gradient():
    layer = Linear(3, 2)
    layer.weight.requires_grad_(False)
    with torch.no_grad(), recording(layer):
        layer(torch.ones(4, 3))
        layer.backward(torch.ones(4, 2))
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((2,), 4.0))


def test_recording_ends_with_its_block():
    layer = FeedForward(3, 4, "relu")
    with pytest.raises(KeyError), recording(layer):
        layer(torch.ones(2, 3))
        raise KeyError
    assert all(module.tape is None for module in layer.modules())
    layer(torch.ones(2, 3))  # records nothing
    with pytest.raises(AssertionError, match="without a recorded forward"):
        layer.backward(torch.ones(2, 3))


def test_a_layer_used_twice_is_undone_in_reverse():
    """One Linear applied twice: its tape is a stack."""
    layer, x = Linear(3, 3).double(), numbers(2, 3).requires_grad_(True)
    with recording(layer):
        y = layer(torch.tanh(layer(x)))
        expected = torch.autograd.grad(y.sum(), [x, layer.weight])
    with torch.no_grad(), recording(layer):
        middle = torch.tanh(layer(x))
        layer(middle)
        found = layer.backward(layer.backward(torch.ones(2, 3, dtype=torch.float64)) * (1 - middle.square()))
    torch.testing.assert_close(found, expected[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.weight.grad, expected[1], rtol=1e-12, atol=0)
