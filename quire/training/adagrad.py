"""Adagrad for large tables, of which each step touches few rows (Duchi, Hazan and Singer 2011).

A row that is seldom looked up has seen few gradients, and still takes large steps; one that is common takes small ones.

    s[r] <- s[r] + mean(G[r]^2)        w[r] <- w[r] - rate G[r] / sqrt(s[r])

with the gradient G of row r of this step, and one number s a row in place of Duchi's one for each weight, as in
production recommenders: it costs the memory of a column, and no more loss in our measurements.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quire.training.eager import Eager


class RowAdagrad(Eager):
    """Adagrad with one sum of mean squares a row, for tables (R, C); of sparse gradients only their rows are touched.

    Every gradient is scaled by its own history: its size, and so clipping, changes nothing but the first steps.
    Equal to torch.optim.Adagrad where rows have one number. No weight decay.
    """

    def __init__(self, parameters: Iterable[Any], lr: float = 0.1, epsilon: float = 1e-10) -> None:
        super().__init__(parameters, {"lr": lr, "epsilon": epsilon})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every table that has a gradient."""
        assert closure is None, "RowAdagrad evaluates no closure"
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                state = self.state[table]
                if not state:
                    state["sum"] = table.new_zeros(len(table), 1)
                rate, epsilon = group["lr"], group["epsilon"]
                if table.grad.is_sparse:
                    step_rows(table, table.grad, state["sum"], rate, epsilon)
                else:
                    sums = state["sum"].add_(table.grad.square().mean(1, keepdim=True))
                    table.sub_(table.grad / (sums.sqrt() + epsilon), alpha=rate)


def step_rows(table: Tensor, grad: Tensor, sums: Tensor, rate: float, epsilon: float) -> None:
    """A step from a sparse gradient whose rows may repeat.

    The gradients of a row are added up at one of the places where it stands, and the others count as zero: that takes
    no sorting, and a device need not be asked how many different rows there are.
    """
    rows, grads = grad._indices()[0], grad._values()  # (n), (n, C)
    place = rows.new_empty(len(table))  # filled where it is read, and only there
    place[rows] = torch.arange(len(rows), device=rows.device)
    summed = torch.zeros_like(grads).index_add_(0, place[rows], grads)
    sums.index_add_(0, rows, summed.square().mean(1, keepdim=True))
    steps = summed.div_(sums[rows].sqrt().add_(epsilon)).mul_(-rate)
    table.scatter_add_(0, rows.unsqueeze(1).expand_as(steps), steps)  # on a CPU faster than index_add_
