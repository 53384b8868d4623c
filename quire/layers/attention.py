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
    """softmax(Q K^T / sqrt(D)) V, by torch's fused kernel.

    The weights, a number for each pair of positions, are not kept for the gradient: it makes them again, some
    queries at a time (Dao et al. 2022).
    """

    QUERIES = 64  # whose weights are made at once; of those before the last, causal attention skips what it hides

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = Dropout(dropout)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, visible: Visible = None) -> Tensor:
        """query (B, H, T, D), key and value (B, K, S, D) give (B, H, T, D); `visible` as Sight.visible gives it."""
        drops = self.training and self.dropout.p > 0
        if isinstance(visible, BlockSparse):
            plain = self.tape is None and not drops
            if plain and query.dtype is not torch.float64:  # whose precision that kernel does not keep
                return visible.attend(query, key, value)
            visible = visible.dense()
        keep = None
        if self.tape is not None and drops:  # spelled out, since the kernel does not tell what it drops
            weights = self.weights(query, key, visible)
            keep = self.dropout.draw(weights)
            value_of_each = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
            mixed = self.dropout.applied(weights, keep).to(value.dtype) @ value_of_each
        else:
            mixed = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=visible,
                dropout_p=self.dropout.p if drops else 0.0,
                is_causal=visible is None and query.shape[2] > 1,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        self.save(query, key, value, mixed, keep, visible)
        return mixed

    def weights(self, query: Tensor, key: Tensor, visible: Tensor | None = None) -> Tensor:
        """softmax(Q K^T / sqrt(D)), (B, H, T, S): how much each position takes of each; before any dropout."""
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)  # query heads that share a key head
        scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
        if visible is None and query.shape[2] > 1:
            visible = causal_mask(query.shape[2], 0, query.device)
        if visible is not None:
            scores = scores.masked_fill(~visible, -math.inf)
        return torch.softmax(scores, dim=-1)

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Through Y = W V:  dW = dY V^T,  dV = W^T dY, with W as dropout left it, and dW then back through dropout
        # Through softmax:  dS = W * (dW - sum over S of W dW), and that sum is the one of Y dY over D
        # Through Q K^T:    dQ = dS K / sqrt(D),  dK = dS^T Q / sqrt(D)
        # A hidden position has W = 0, hence dS = 0. The G query heads that share keys lie below each other as rows of
        # one matrix, so that the products sum over them.
        query, key, value, mixed, keep, visible = self.saved()
        (rows, heads, new, size), kv_heads, causal = query.shape, key.shape[1], visible is None and query.shape[2] > 1
        scale = 1 / math.sqrt(size)

        def shared(x: Tensor, first: int, last: int) -> Tensor:
            """Some queries (t) of all of them: (B, H, T, ...) as (B K, G t, ...)."""
            return x[:, :, first:last].unflatten(1, (kv_heads, -1)).flatten(2, 3).flatten(0, 1)

        sums = (grad * mixed).sum(-1, keepdim=True)
        grad_query = torch.empty_like(query)
        query, grad = torch.mul(query, scale).contiguous(), grad.contiguous()
        key, value = key.contiguous().flatten(0, 1), value.contiguous().flatten(0, 1)  # (B K, S, D)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        if visible is not None:
            visible = visible.expand(*visible.shape[:-2], new, -1)  # where all queries may see the same
        future = ~causal_mask(min(new, self.QUERIES), 0, query.device)
        hidden = torch.zeros_like(future, dtype=query.dtype).masked_fill_(future, -math.inf)
        for first in range(0, new, self.QUERIES):
            last = min(first + self.QUERIES, new)
            seen = last if causal else key.shape[1]
            asked, received = shared(query, first, last), shared(grad, first, last)  # (B K, G t, D)
            scores = asked @ key[:, :seen].mT  # (B K, G t, S), of positions that may be seen
            if causal:
                scores.view(rows, heads, last - first, seen)[..., first:] += hidden[: last - first, : last - first]
            elif visible is not None:
                scores.view(rows, heads, last - first, seen).masked_fill_(~visible[..., first:last, :], -math.inf)
            weights = torch.softmax(scores, dim=-1)
            del scores  # beside the weights and their gradient there is nothing else of that size
            grad_weights, dropped = received @ value[:, :seen].mT, weights
            if keep is not None:
                kept = shared(keep, first, last)[..., :seen]
                dropped, grad_weights = self.dropout.applied(weights, kept), self.dropout.applied(grad_weights, kept)
            grad_value[:, :seen] += dropped.to(grad.dtype).mT @ received
            grad_scores = grad_weights.sub_(shared(sums, first, last)).mul_(weights).to(query.dtype)
            grad_query[:, :, first:last] = (grad_scores @ key[:, :seen]).view(rows, heads, last - first, size)
            grad_key[:, :seen] += grad_scores.mT @ asked
        return (
            grad_query.mul_(scale),
            grad_key.unflatten(0, (rows, kv_heads)),
            grad_value.unflatten(0, (rows, kv_heads)),
        )


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
        return self.value.backward(value).add_(self.key.backward(key)).add_(self.query.backward(query))

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) to (B, T, heads, D)."""
        return x.unflatten(-1, (-1, self.head_size))
