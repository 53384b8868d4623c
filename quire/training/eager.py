"""torch's optimizers without torch's compiler.

torch.optim imports the whole of torch._dynamo (two CPU seconds, as much as torch itself) at an optimizer's first call,
only to say that it is not to be compiled. These are the same optimizers, their methods taken from below that wrapping.
"""

import inspect
from typing import Any

import torch


class Eager(torch.optim.Optimizer):
    """An optimizer that is built without the compiler; its `step` must not ask for it either."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)


def _step(kind: type[torch.optim.Optimizer]) -> Any:
    return torch.no_grad()(inspect.unwrap(kind.step))


class AdamW(Eager, torch.optim.AdamW):
    """torch.optim.AdamW."""

    step = _step(torch.optim.AdamW)


class Adam(Eager, torch.optim.Adam):
    """torch.optim.Adam."""

    step = _step(torch.optim.Adam)


class SGD(Eager, torch.optim.SGD):
    """torch.optim.SGD."""

    step = _step(torch.optim.SGD)
