"""Attention as one HTML page that needs nothing else: no network, no library, no server.

A weight w is kept as the byte round(255 sqrt(w)), which is off by at most 0.004 at 1 and by far less near 0; a layer's
bytes, all heads one after the other, are deflated (which takes care of what a causal mask leaves empty) and written in
base64. Text of any kind goes in as JSON without a "<", and comes out of it as text alone.
"""

import base64
import html
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from quire import files
from quire.tokenizers.tokenizer import visible

TEMPLATE = Path(__file__).with_name("attention.html")

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
    # Where JSON stands in a script element, "<" could end it; elsewhere in JSON it cannot occur but in a string.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    before, after = TEMPLATE.read_text(encoding="utf-8").split("__DATA__")
    files.write_text(path, before.replace("__TITLE__", html.escape(title)) + text + after)


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
