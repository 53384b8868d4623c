"""A model made ready to write: it learns no more, and so it can be kept as a CPU reads it soonest."""

from typing import Any

from quire.errors import UserError
from quire.layers.fixed_block import FixedBlock
from quire.layers.fixed_linear import FixedLinear, Weights
from quire.layers.linear import Linear
from quire.layers.product import fast


def fix(model: Any, weights: Weights = "float32") -> Any:
    """The model, ready to write on a CPU: its Linears replaced by FixedLinears, and blocks that the core knows by
    FixedBlocks. It can be trained no longer.

    An embedding keeps its float32 numbers, of which a token needs one row; a head that was tied to it has its own.
    """
    device = next(model.parameters()).device
    if device.type != "cpu":
        if weights != "float32":
            raise UserError(f"--weights {weights} is for a CPU, and this model is on {device}. Give --device cpu too.")
        return model
    if fast is None and weights == "float32":
        return model  # nothing is gained
    for module in list(model.modules()):
        for name, part in module.named_children():
            if isinstance(part, Linear) and not isinstance(part, FixedLinear):
                setattr(module, name, FixedLinear(part, weights))
    for module in list(model.modules()):
        for name, part in module.named_children():
            if FixedBlock.takes(part):
                setattr(module, name, FixedBlock(part))
    return model
