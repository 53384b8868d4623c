"""A running mean of the weights, which wanders less than they do: what is measured, shown and kept as best.

    mean <- decay^n mean + (1 - decay^n) weights        every n = EVERY steps

Polyak and Juditsky 1992 average all that training passed through; the exponential mean forgets the beginning, and can
stand in for a falling learning rate (Hägele et al. 2024, "Scaling Laws and Compute-Optimal Training Beyond Fixed
Training Durations"). While few steps are taken the mean is over fewer of them: decay <= (1 + step) / (10 + step).

The mean of a parameter lives beside its optimizer's state, as "average", and is saved, restored and rolled back with
it. Tables with sparse gradients have none: a pass over them costs more than a step.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from quire.training.optimizers import Optimizers

EVERY = 5  # steps


@torch.no_grad()
def follow(optimizers: Optimizers, decay: float, step: int) -> None:
    """Let the means follow the weights after `step` (from 0), while the gradients are still there."""
    if step % EVERY:
        return
    share = 1 - min(decay, (1 + step) / (10 + step)) ** EVERY
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            if "average" in state:
                state["average"].lerp_(parameter, share)
            elif parameter.grad is not None and not parameter.grad.is_sparse:
                state["average"] = parameter.detach().clone()


@contextlib.contextmanager
def averaged(optimizers: Optimizers) -> Iterator[None]:
    """Within, the weights are their means, where they have one; then again what they were, bit for bit."""
    means = [(p, state["average"]) for each in optimizers for p, state in each.state.items() if "average" in state]
    kept = [parameter.detach().clone() for parameter, _ in means]
    _put((parameter, mean) for parameter, mean in means)
    try:
        yield
    finally:
        _put((parameter, before) for (parameter, _), before in zip(means, kept, strict=True))


@torch.no_grad()
def _put(pairs: Iterator[tuple[Tensor, Tensor]]) -> None:
    for parameter, value in pairs:
        parameter.copy_(value)
