"""A block of a decoder for writing: one new token goes through it in one call of the core.

Some sixty small operations a block, each told to torch from Python, take longer than reading its weights; here they are
told once. What is computed stands in blocks.py, attention.py and feedforward.py, which also serve wherever this cannot.
"""

from typing import Any

import torch
from torch import Tensor, nn

from quire.layers.activations import ACTIVATIONS
from quire.layers.attention import Visible
from quire.layers.blocks import Angles, PreNormBlock
from quire.layers.cache import KeyValueCache
from quire.layers.feedforward import SwiGLU
from quire.layers.fixed_linear import FixedLinear
from quire.layers.normalization import LayerNorm, RMSNorm
from quire.layers.product import fast

CURVES = list(ACTIVATIONS.values())  # in the core's order


class FixedBlock(PreNormBlock):
    """A PreNormBlock of FixedLinears whose training is over; it computes the same."""

    def __init__(self, block: PreNormBlock) -> None:
        nn.Module.__init__(self)
        self.train(block.training)
        for name, part in block.named_children():
            self.add_module(name, part)
        attention, feedforward = block.attention, block.feedforward
        gate = feedforward.gate if isinstance(feedforward, SwiGLU) else None
        linears = (attention.query, attention.key, attention.value, attention.output, gate, feedforward.up)
        norms = (block.attention_norm, block.feedforward_norm, attention.query_norm, attention.key_norm)
        heads, kv_heads = (part.product.weight.shape[0] // attention.head_size for part in linears[:2])  # type: ignore
        self.core = fast.block(
            tuple(map(_matrix, (*linears, feedforward.down))),
            tuple(map(_norm, norms)),
            heads, kv_heads, attention.head_size, CURVES.index(type(feedforward.activation)),
        )  # fmt: skip

    @staticmethod
    def takes(block: nn.Module) -> bool:
        """Whether the core can do what this block does."""
        if fast is None or type(block) is not PreNormBlock:
            return False
        linears = [part for part in block.modules() if isinstance(part, FixedLinear)]
        norms = [part for part in block.modules() if isinstance(part, (LayerNorm, RMSNorm))]
        return (
            all(part.product.arrays is not None for part in linears)
            and all(part.weight.dtype is torch.float32 for part in norms)
            and isinstance(block.attention_norm, (LayerNorm, RMSNorm))
            and type(block.feedforward.activation) in CURVES
        )

    def forward(
        self,
        x: Tensor,
        angles: Angles = None,
        visible: Visible = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        one = x.shape[:2] == (1, 1) and x.dtype is torch.float32 and visible is None and not self.training
        if not one or cache is None or cache.reaches[layer] is not None or torch.is_grad_enabled():
            return super().forward(x, angles, visible, cache, layer)
        x = x.clone(memory_format=torch.contiguous_format)
        turned = (None, None) if angles is None or self.attention.rotary is None else angles
        fast.step(
            self.core, x.numpy(), *(None if part is None else part.flatten().numpy() for part in turned),
            cache.keys[layer].numpy(), cache.values[layer].numpy(), cache.length, cache.capacity,
            torch.get_num_threads(),
        )  # fmt: skip
        return x


def _matrix(linear: Any) -> tuple[Any, ...] | None:
    """Weight, bias and scale of a FixedLinear, and its numbers of outputs and inputs, as the core takes them."""
    return None if linear is None else (*linear.product.arrays, *linear.product.weight.shape)


def _norm(norm: Any) -> tuple[Any, ...] | None:
    """Weight, bias and epsilon of a normalization, and whether it takes the mean off."""
    if norm is None:
        return None
    weight, bias = norm.weight.detach().numpy(), getattr(norm, "bias", None)
    return weight, None if bias is None else bias.detach().numpy(), norm.epsilon, isinstance(norm, LayerNorm)
