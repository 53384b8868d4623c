"""Row-wise Adagrad beside torch's, beside the formula written out, and with the main optimizers."""

import pytest
import torch
from torch import Tensor, nn

from quire.models import build_model
from quire.training.adagrad import RowAdagrad
from quire.training.optimizers import OPTIMIZERS, split_matrices, split_tables
from quire.training.settings import TrainingSettings


def sparse(rows: list[int], values: Tensor, count: int) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (count, values.shape[1]), check_invariants=True)


def gradients(count: int, size: int) -> list[Tensor]:
    """Uncoalesced ones, of rows that stand in them several times, once and never; one without any."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(count - 2, (length,), generator=generator) for length in (9, 1, 0, 30)]
    return [sparse(r.tolist(), torch.randn(len(r), size, generator=generator).double(), count) for r in drawn]


def test_with_rows_of_one_number_it_is_torch_s():
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 7).double().view(7, 1)) for _ in range(2))
    pair = RowAdagrad([ours], 0.1), torch.optim.Adagrad([theirs], 0.1, eps=1e-10)
    for grad in gradients(7, 1):
        ours.grad, theirs.grad = grad, grad.clone()
        for optimizer in pair:
            optimizer.step()
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours[5:], torch.linspace(-1, 1, 7).double().view(7, 1)[5:])  # never looked up


@pytest.mark.parametrize("form", ["sparse", "coalesced", "dense"])
def test_it_is_the_formula_row_by_row(form):
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(2)).double()
    table, expected, sums = nn.Parameter(start.clone()), start.clone(), [0.0] * 7
    optimizer = RowAdagrad([table], 0.3)
    for grad in gradients(7, 5):
        table.grad = {"sparse": grad, "coalesced": grad.coalesce(), "dense": grad.to_dense()}[form].clone()
        optimizer.step()
        for number, whole in enumerate(grad.to_dense()):
            sums[number] += float((whole**2).sum()) / 5
            if whole.any():
                expected[number] -= 0.3 * whole / sums[number] ** 0.5
        torch.testing.assert_close(table.detach(), expected)


def test_a_gradient_s_size_does_not_matter():
    """And so clipping leaves tables out."""
    tables = [nn.Parameter(torch.zeros(7, 5).double()) for _ in range(2)]
    for table, scale in zip(tables, (1.0, 1e-3), strict=True):
        optimizer = RowAdagrad([table])
        for grad in gradients(7, 5):
            table.grad = grad * scale
            optimizer.step()
    torch.testing.assert_close(*tables, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_leaves_the_tables_to_it(name, small_settings):
    model = build_model(small_settings("ngram"))
    optimizers = OPTIMIZERS[name](model, TrainingSettings(table_learning_rate=0.07))
    *others, last = optimizers
    (group,) = last.param_groups
    assert isinstance(last, RowAdagrad) and not any(isinstance(other, RowAdagrad) for other in others)
    assert group["params"] == [model.ngram_embedding.weight] == split_tables(model)[0] and group["peak"] == 0.07
    everything = [p for optimizer in optimizers for g in optimizer.param_groups for p in g["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))
    matrices, rest = split_matrices(model)
    assert len(matrices) + len(rest) == len(everything) - 1
    assert not any(
        isinstance(o, RowAdagrad) for o in OPTIMIZERS[name](build_model(small_settings("gpt")), TrainingSettings())
    )
