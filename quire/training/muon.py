"""Muon: momentum whose matrices are orthogonalized before each step (Jordan et al. 2024).

A gradient matrix is dominated by a few directions; replacing it by the nearest matrix with all singular values
near 1 lets the rare directions learn as fast as the common ones.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from quire.training.eager import Eager

# The quintic p(s) = a s + b s^3 + c s^5 of Jordan et al.: five rounds bring singular values between about 0.01 and 1
# near 1, and lift smaller ones.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(matrices: Tensor, rounds: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """The matrices (N, rows, columns) with their singular values brought near 1, computed in `dtype`.

    dtype None: bfloat16 on a GPU, as published; on a CPU the matrices' own, where bfloat16 is slow and inexact.
    """
    a, b, c = COEFFICIENTS
    x = matrices.to(dtype or (torch.bfloat16 if matrices.is_cuda else matrices.dtype))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT  # the products below are rows x rows
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(rounds):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(Eager):
    """Muon with Nesterov momentum and decoupled weight decay, for parameters that are matrices.

    B <- m B + (1 - m) G,   U = (1 - m) G + m B,   W <- (1 - lr weight_decay) W - 0.2 lr sqrt(max(rows, columns)) NS(U)

    for gradient G, momentum m and newton_schulz NS. The factor 0.2 sqrt(max(rows, columns)) gives the step the size of
    one of AdamW's (Liu et al. 2025), so that learning rates of one size serve both. Equal to
    torch.optim.Muon(adjust_lr_fn="match_rms_adamw") in bfloat16.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        rounds: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.dtype = dtype
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "rounds": rounds})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update every matrix that has a gradient."""
        assert closure is None, "Muon evaluates no closure"
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)  # matrices of one shape go as one batch
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape, parameter.dtype, parameter.device].append(parameter)
            for parameters in alike.values():
                self._step_alike(parameters, group)

    def _step_alike(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
            updates.append(parameter.grad.lerp(buffer, group["momentum"]))
        directions = newton_schulz(torch.stack(updates), group["rounds"], self.dtype)
        size = 0.2 * max(parameters[0].shape) ** 0.5
        for parameter, direction in zip(parameters, directions, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-group["lr"] * size)
