"""Causal multi-head self-attention with grouped keys and values (Vaswani et al. 2017; Ainslie et al. 2023).

B batch, T new positions, S all positions (past and new), C channels, H query heads, K key/value heads, D head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.layers.cache import KeyValueCache
from quire.layers.dropout import Dropout
from quire.layers.layer import Layer
from quire.layers.linear import Linear
from quire.layers.normalization import RMSNorm
from quire.layers.positions import RotaryPositions
from quire.layers.sparsity import BlockSparse

Visible = Tensor | BlockSparse | None  # what quire.layers.sparsity.Sight.visible gives


def causal_mask(new: int, past: int, device: torch.device) -> Tensor:
    """True where a new position (T) may look at one of all positions (S = past + T): at itself and what came before."""
    return torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)


class ScaledDotProductAttention(Layer):
    """softmax(Q K^T / sqrt(D)) V: torch's fused kernel normally, spelled out while recording."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, visible: Visible = None) -> Tensor:
        """query (B, H, T, D), key and value (B, K, S, D) give (B, H, T, D); `visible` as Sight.visible gives it."""
        if isinstance(visible, BlockSparse):
            if self.tape is None and not (self.training and self.dropout.p):
                return visible.attend(query, key, value)
            visible = visible.dense()
        if self.tape is not None:
            return self.spelled_out(query, key, value, visible)[0]
        return F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=visible,
            dropout_p=self.dropout.p if self.training else 0.0,
            is_causal=visible is None and query.shape[2] > 1,
            enable_gqa=query.shape[1] != key.shape[1],
        )

    def spelled_out(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same as `forward`, line by line, with the attention weights (B, H, T, S) beside the result."""
        groups = query.shape[1] // key.shape[1]  # how many query heads share a key/value head
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)  # (B, H, S, D)
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])  # (B, H, T, S)
        if visible is None and query.shape[2] > 1:
            visible = causal_mask(query.shape[2], 0, query.device)
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        weights = torch.softmax(scores, dim=-1)
        dropped = self.dropout(weights).to(value.dtype)
        self.save(query, key, value, weights, dropped, groups)
        return dropped @ value, weights

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Through W V:      dW = dY V^T,  dV = W^T dY, with W as dropout left it, and dW then back through dropout
        # Through softmax:  dS = W * (dW - sum over S of W dW); a hidden position has W = 0, hence dS = 0
        # Through Q K^T:    dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D)
        query, key, value, weights, dropped, groups = self.saved()
        grad_value = dropped.transpose(-2, -1) @ grad
        grad_weights = self.dropout.backward(grad @ value.transpose(-2, -1))
        grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
        grad_scores = grad_scores.to(query.dtype) / math.sqrt(query.shape[-1])
        grad_query = grad_scores @ key
        grad_key = grad_scores.transpose(-2, -1) @ query

        def summed(grad: Tensor) -> Tensor:  # a shared head receives from every query head of its group
            return grad.unflatten(1, (-1, groups)).sum(2)

        return grad_query, summed(grad_key), summed(grad_value)


class MultiHeadAttention(Layer):
    """Each position gathers values from earlier ones, in H different ways at once: (B, T, C) to (B, T, C).

    `bias` is of queries, keys and values; `output_bias` None: of the output too.
    """

    def __init__(
        self,
        size: int,
        heads: int,
        kv_heads: int,
        head_size: int,
        *,
        bias: bool = True,
        output_bias: bool | None = None,
        qk_norm: bool = False,
        epsilon: float = 1e-6,
        rotary: RotaryPositions | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_size = head_size
        self.query = Linear(size, heads * head_size, bias)
        self.key = Linear(size, kv_heads * head_size, bias)
        self.value = Linear(size, kv_heads * head_size, bias)
        self.query_norm = RMSNorm(head_size, epsilon) if qk_norm else None
        self.key_norm = RMSNorm(head_size, epsilon) if qk_norm else None
        self.rotary = rotary
        self.attend = ScaledDotProductAttention(dropout)
        self.output = Linear(heads * head_size, size, bias if output_bias is None else output_bias)

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor] | None = None,
        visible: Visible = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        query, key, value = self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x))
        # Normalized and turned as (B, T, H, D), which lies in memory in one piece, then seen as (B, H, T, D).
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.rotary is not None and angles is not None:
            query, key = self.rotary(query, *angles), self.rotary(key, *angles)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if cache is not None:
            key, value = cache.append(layer, key, value)
        mixed = self.attend(query, key, value, visible)  # (B, H, T, D)
        return self.output(mixed.transpose(1, 2).flatten(2))

    def backward(self, grad: Tensor) -> Tensor:
        mixed = self._split(self.output.backward(grad)).transpose(1, 2)
        query, key, value = (part.transpose(1, 2) for part in self.attend.backward(mixed))  # (B, T, H, D)
        if self.rotary is not None:
            key, query = self.rotary.backward(key), self.rotary.backward(query)
        if self.query_norm is not None and self.key_norm is not None:
            key, query = self.key_norm.backward(key), self.query_norm.backward(query)
        query, key, value = query.flatten(2), key.flatten(2), value.flatten(2)
        return self.value.backward(value) + self.key.backward(key) + self.query.backward(query)

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) to (B, T, heads, D)."""
        return x.unflatten(-1, (-1, self.head_size))
