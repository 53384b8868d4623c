"""Attention as one HTML page that needs nothing else: no network, no library, no server.

A weight w is kept as the byte round(255 sqrt(w)), which is off by at most 0.004 at 1 and by far less near 0; a layer's
bytes, all heads one after the other, are deflated (which takes care of what a causal mask leaves empty) and written in
base64.
"""

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quire.plots.page import write_page
from quire.tokenizers.tokenizer import visible

Scores = Sequence[tuple[str, float | None]]  # names and numbers


@dataclass(frozen=True)
class HeadMaps:
    """One layer: `weights` (H, T, S), the names of the sequences that look and are looked at, each head's scores."""

    name: str
    queries: str
    keys: str
    weights: np.ndarray
    scores: Sequence[Scores] = field(default_factory=list)


def write_attention_page(
    path: Path,
    title: str,
    layers: Sequence[HeadMaps],
    sequences: Mapping[str, Sequence[str]],
    predicted: str,
    alternatives: Sequence[Sequence[tuple[str, float]]],
) -> None:
    """Write the page: all heads to choose from, a heat map of one, and for each token what it attends to.

    `sequences` are tokens by name; `alternatives` the likeliest next tokens, with probabilities, after each token of
    the sequence `predicted`.
    """
    data = {
        "sequences": {name: {"labels": [visible(token) for token in tokens]} for name, tokens in sequences.items()},
        "predicted": predicted,
        "alternatives": [[[visible(token), round(p, 4)] for token, p in row] for row in alternatives],
        "layers": [_layer(layer) for layer in layers],
    }
    write_page(path, "attention.html", title, data)


def quantized(weights: np.ndarray) -> np.ndarray:
    """Weights as bytes: round(255 sqrt(w))."""
    return np.rint(255 * np.sqrt(np.clip(weights, 0, 1))).astype(np.uint8)


def _layer(layer: HeadMaps) -> dict[str, Any]:
    heads, rows, columns = layer.weights.shape
    scores = layer.scores or [[] for _ in range(heads)]
    return {
        "name": layer.name,
        "queries": layer.queries,
        "keys": layer.keys,
        "heads": heads,
        "rows": rows,
        "columns": columns,
        "scores": [[[name, value] for name, value in row] for row in scores],
        "data": base64.b64encode(zlib.compress(quantized(layer.weights).tobytes(), 9)).decode("ascii"),
    }
