"""Who fills in the gradients: autograd, or the layers' own hand-written backward. Nothing else learns which.

An engine's `backpropagate(model, batch, scale)` adds scale times the gradient of the batch's mean loss to every
parameter's `.grad`, and gives that loss, not scaled. Its forward is a call of the model itself, never of a method, so
that wrappers (compilation, data parallelism) work. `check` refuses a model that an engine cannot train, once, before
the first step; `synchronize` makes the gradients of several processes one, once a step, when all parts are added up.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from quire.data.batches import Batch
from quire.errors import UserError
from quire.layers.layer import Layer, recording

WRAPPERS = {  # by name, since to import them takes a second
    "OptimizedModule": "compiled", "DataParallel": "wrapped by DataParallel",
    "DistributedDataParallel": "wrapped by DistributedDataParallel",
    "FullyShardedDataParallel": "sharded by FSDP", "FSDPModule": "sharded by FSDP",
}  # fmt: skip
BUCKET = 1 << 23  # numbers averaged at once: few messages, and little memory beside the gradients


class Engine(Protocol):
    """See the module's description."""

    def check(self, model: nn.Module) -> None:
        """Refuse, as a UserError that says what to do, a model that this engine cannot train."""
        ...

    def backpropagate(self, model: nn.Module, batch: Batch, scale: float) -> Tensor:
        """Add scale times the gradient of the batch's mean loss to every `.grad`; gives the loss, a scalar."""
        ...

    def synchronize(self, model: nn.Module, processes: int) -> None:
        """Make every `.grad` the mean over all `processes` of a distributed training; with one process nothing."""
        ...


class Autograd:
    """PyTorch's automatic differentiation."""

    def check(self, model: nn.Module) -> None:
        """Any model will do."""

    def backpropagate(self, model: nn.Module, batch: Batch, scale: float) -> Tensor:
        loss = model(**batch.arguments())
        (loss * scale).backward()
        return loss.detach()

    def synchronize(self, model: nn.Module, processes: int) -> None:
        """Nothing: the wrapper that makes a model distributed does it while autograd runs."""


class Manual:
    """Each layer's `backward`, written by hand beside its forward."""

    def check(self, model: nn.Module) -> None:
        for name, module in model.named_modules():
            where = f"{name} ({type(module).__name__})" if name else f"The model ({type(module).__name__})"
            if state := wrapping(module):
                raise UserError(
                    f"{where} is {state}, which the manual engine cannot call backward through. Give it the model"
                    " itself, whose gradients it averages over processes, or take --engine autograd."
                )
            if isinstance(module, Layer):
                if type(module).backward is Layer.backward:
                    raise UserError(
                        f"{where} has no backward, which --engine manual needs. Write it below its forward, or take"
                        " --engine autograd."
                    )
            elif not isinstance(module, (nn.ParameterList, nn.ParameterDict)) and any(
                parameter.requires_grad for parameter in module.parameters(recurse=False)
            ):  # a list of parameters is no part that computes: the layer that holds it answers for it
                raise UserError(
                    f"{where} has parameters but is no Layer: --engine manual would leave them without a gradient."
                    " Make it a quire.layers.layer.Layer with a backward, or take --engine autograd."
                )

    def backpropagate(self, model: Any, batch: Batch, scale: float) -> Tensor:
        with torch.no_grad(), recording(model):
            loss = model(**batch.arguments())
            model.backward(scale)
        return loss

    @torch.no_grad()
    def synchronize(self, model: nn.Module, processes: int) -> None:
        if processes == 1:
            return
        for bucket in buckets(list(model.parameters())):
            # Beside the gradients, for each whether it is there: a process without one adds zeros, and takes the
            # mean of the others; a parameter that no process has a gradient for keeps none.
            there = torch.tensor([parameter.grad is not None for parameter in bucket]).to(bucket[0])
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([there, *(grad.to_dense().flatten() for grad in grads)])
            torch.distributed.all_reduce(flat)  # the sum: not every backend knows the mean
            has, *means = flat.split([len(bucket), *(parameter.numel() for parameter in bucket)])
            for parameter, anywhere, mean in zip(bucket, has.tolist(), means, strict=True):
                parameter.grad = (mean / processes).view_as(parameter) if anywhere else None


def wrapping(module: nn.Module) -> str:
    """What stands around a module so that its own backward is not that of its call; "" if nothing does."""
    if getattr(module, "_compiled_call_impl", None) is not None:  # module.compile()
        return "compiled"
    return next((WRAPPERS[kind.__name__] for kind in type(module).__mro__ if kind.__name__ in WRAPPERS), "")


def buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The trained parameters in groups of one type and device and at most BUCKET numbers or one parameter, in an order
    that is the same in every process."""
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    for group in groups.values():
        bucket, size = [group[0]], group[0].numel()
        for parameter in group[1:]:
            if size + parameter.numel() > BUCKET:
                yield bucket
                bucket, size = [], 0
            bucket.append(parameter)
            size += parameter.numel()
        yield bucket


ENGINES: dict[str, Engine] = {"autograd": Autograd(), "manual": Manual()}
