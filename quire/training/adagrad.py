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


class RowAdagrad(torch.optim.Optimizer):
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
    """A step from a sparse gradient whose rows may repeat: they are added up first."""
    grad = grad.coalesce()
    rows, grads = grad.indices()[0], grad.values()  # (n), (n, C)
    seen = sums[rows] + grads.square().mean(1, keepdim=True)  # (n, 1)
    sums[rows] = seen
    table.index_add_(0, rows, grads / (seen.sqrt() + epsilon), alpha=-rate)
