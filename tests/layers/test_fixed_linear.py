"""Weights that no longer change: the fast core and int8 numbers, against torch's own products."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quire.errors import UserError
from quire.generation.fixed import fix
from quire.layers import product
from quire.layers.fixed_linear import FixedLinear, rounded
from quire.layers.linear import Linear
from quire.models import MODELS, build_model

CORES = pytest.mark.parametrize("core", ["fast", "torch"])


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Chooses the core, or torch in its place."""

    def choose(core: str) -> None:
        if core == "torch":
            monkeypatch.setattr(product, "fast", None)
        elif product.fast is None:
            pytest.skip("the core was not compiled here")

    return choose


@CORES
@pytest.mark.parametrize("rows", [1, 3, product.FEW + 1])
@pytest.mark.parametrize(("outputs", "inputs"), [(1, 1), (13, 7), (130, 70), (257, 96), (1000, 300)])
def test_products_are_those_of_float64(use: Any, core: str, rows: int, outputs: int, inputs: int) -> None:
    use(core)
    weight, bias, x = torch.randn(outputs, inputs), torch.randn(outputs), torch.randn(2, rows, inputs)
    whole, scale = rounded(weight)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        for given, dense in (((weight, bias, None), weight), ((whole, bias, scale), whole * scale[:, None])):
            exact = F.linear(x.double(), dense.double(), bias.double())
            torch.testing.assert_close(product.Product(*given)(x).double(), exact, rtol=1e-5, atol=1e-4)
    torch.set_num_threads(1)


def test_the_core_gives_the_same_bits_whatever_the_threads_and_rows(use: Any) -> None:
    use("fast")
    weight, x = torch.randn(3000, 333), torch.randn(9, 333)
    for given in ((weight, None, None), (rounded(weight)[0], None, rounded(weight)[1])):
        multiply = product.Product(*given)
        torch.set_num_threads(1)
        alone = torch.cat([multiply(row[None]) for row in x])
        for threads in (2, 4):
            torch.set_num_threads(threads)
            for _ in range(50):
                assert torch.equal(multiply(x), alone)
        torch.set_num_threads(1)


def test_the_core_refuses_arrays_of_another_size(use: Any) -> None:
    use("fast")
    y, x, weight = (torch.zeros(size).numpy() for size in (4, 3, 12))
    product.fast.product(y, x, weight, None, None, 1, 4, 3, 1)
    with pytest.raises(ValueError, match="48 are needed"):
        product.fast.product(y, x, weight[:8], None, None, 1, 4, 3, 1)
    with pytest.raises(ValueError, match="16 are needed"):
        product.fast.product(y[:2], x, weight, None, None, 1, 4, 3, 1)


def test_no_weight_is_off_by_more_than_half_a_scale() -> None:
    weight = torch.randn(50, 40) * torch.logspace(-6, 3, 50)[:, None]
    weight[7] = 0
    whole, scale = rounded(weight)
    assert whole.dtype == torch.int8 and int(whole.min()) >= -127
    assert bool(((whole * scale[:, None] - weight).abs() <= 0.5001 * scale[:, None]).all())


@CORES
@pytest.mark.parametrize("kind", list(MODELS))
def test_a_fixed_model_gives_the_logits_of_the_model(use: Any, core: str, kind: str, small_settings: Any) -> None:
    use(core)
    torch.manual_seed(3)
    settings = small_settings(kind)
    model, exact, near = (build_model(settings).eval() for _ in range(3))
    for part in model.parameters():
        torch.nn.init.normal_(part, std=0.3)
    for other, weights in ((exact, "float32"), (near, "int8")):
        other.load_state_dict(model.state_dict())
        fix(other, weights)
    tokens = torch.randint(settings.vocabulary_size, (2, 9))
    source = {"source": tokens[:, :4]} if settings.reads_source else {}
    with torch.no_grad():
        logits, same, rounded_ones = (one(tokens, **source) for one in (model, exact, near))
    torch.testing.assert_close(same, logits, rtol=1e-4, atol=1e-4)
    assert float((rounded_ones - logits).std()) < 0.05 * float(logits.std())
    assert any(isinstance(part, FixedLinear) for part in near.modules())


def test_the_loss_of_a_fixed_model_is_that_of_its_logits() -> None:
    model = fix(build_model(MODELS["gpt"].Settings(vocabulary_size=1500, context_length=16, embedding_size=16, layers=1,
                                                   heads=2)).eval(), "int8")  # fmt: skip
    tokens = torch.randint(1500, (2, 9))
    with torch.no_grad():
        loss, logits = model(tokens[:, :-1], targets=tokens[:, 1:]), model(tokens[:, :-1])
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_fixed_weights_are_shared_and_do_not_learn() -> None:
    linear = Linear(8, 5)
    fixed, x = FixedLinear(linear, "float32"), torch.randn(2, 8)
    with torch.no_grad():
        linear.weight.mul_(2)
    torch.testing.assert_close(fixed(x), linear(x).detach())
    with pytest.raises(NotImplementedError, match="does not learn"):
        fixed.backward(torch.ones(2, 5))


def test_int8_is_for_a_cpu() -> None:
    with pytest.raises(UserError, match="--device cpu"):
        fix(torch.nn.Sequential(Linear(3, 3)).to("meta"), "int8")
