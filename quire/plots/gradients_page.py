"""One forward and one backward pass as an HTML page that one can walk: the calls as a graph, and what each one did.

A picture's values v are kept as the bytes round(255 sqrt(v / largest)) in base64, pooled to at most ROWS x COLUMNS by
the largest value of each cell, so that nothing that stands out is lost.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quire.plots.page import write_page
from quire.tokenizers.tokenizer import visible

ROWS, COLUMNS = 64, 96  # of a picture, at most

Picture = list[list[float]] | None


@dataclass(frozen=True)
class GraphNode:
    """One call of a layer, forward and backward.

    `number` counts the calls of the forward pass; `name` is the module's path, "" for the model itself, and `layer` its
    class. `parent` is the call within which this one was made; `sources` are the calls without calls of their own
    whose results it read, directly or through sums. Norms and differences are None where there is none to
    tell; the differences are those of the gradients by hand to autograd's and to finite differences.

    `verdict` is "agrees", "wrong" (this very layer's backward), "within" (that of a call within it) or a sentence.
    `parameters` are (name, shape, norm, norm of the gradient). Pictures hold values of 0 or more, a row for each
    position and a column for each channel.
    """

    number: int
    name: str
    layer: str
    parent: int | None
    sources: tuple[int, ...]
    equation: str
    derivation: str
    forward_code: str
    backward_code: str
    inputs: str
    output: str
    activation_norm: float | None
    gradient_norm: float | None
    returned_norm: float | None
    autograd_difference: float | None
    numerical_difference: float | None
    verdict: str
    parameters: tuple[tuple[str, str, float, float | None], ...]
    activation_picture: Picture
    gradient_picture: Picture


def write_gradients_page(
    path: Path, title: str, tokens: Sequence[str], loss: float, nodes: Sequence[GraphNode]
) -> None:
    """Write the page: the graph of all calls from `tokens` to `loss`, to be walked forward and then backward."""
    assert nodes, "a pass has calls"
    texts: dict[str, int] = {}  # equations and code, which every block repeats, are written once

    def text(words: str) -> int:
        return texts.setdefault(words, len(texts))

    packed = [_node(node) | {part: text(getattr(node, part)) for part in TEXTS} for node in nodes]
    data = {
        "tokens": [visible(token) for token in tokens],
        "loss": _number(loss),
        "texts": list(texts),
        "nodes": packed,
    }
    write_page(path, "gradients.html", title, data)


TEXTS = ("equation", "derivation", "forward_code", "backward_code")
NORMS = ("activation_norm", "gradient_norm", "returned_norm", "autograd_difference", "numerical_difference")
PLAIN = ("number", "name", "layer", "parent", "sources", "inputs", "output", "verdict")


def _node(node: GraphNode) -> dict[str, Any]:
    return {
        **{part: getattr(node, part) for part in PLAIN},
        **{part: _number(getattr(node, part)) for part in NORMS},
        "parameters": [[name, shape, _number(norm), _number(grad)] for name, shape, norm, grad in node.parameters],
        "activation_picture": _picture(node.activation_picture),
        "gradient_picture": _picture(node.gradient_picture),
    }


def _number(value: float | None) -> float | str | None:
    """Four digits; as text where JSON has no such number."""
    if value is None:
        return None
    return float(f"{value:.4g}") if math.isfinite(value) else {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")


def _picture(rows: Picture) -> dict[str, Any] | None:
    """A picture's own size, the size it is kept in, its largest value, and its bytes; 0 for what is not finite."""
    values = np.array(rows if rows is not None else [], dtype=np.float64)
    if values.size == 0:
        return None
    whole = values.shape
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    for axis, most in enumerate((ROWS, COLUMNS)):
        if values.shape[axis] > most:
            starts = np.arange(most) * values.shape[axis] // most
            values = np.maximum.reduceat(values, starts, axis=axis)
    largest = float(values.max())
    share = values / largest if largest > 0 else values
    packed = np.rint(255 * np.sqrt(share.clip(0, 1))).astype(np.uint8)
    return {
        "whole": list(whole),
        "size": list(packed.shape),
        "largest": float(f"{largest:.3g}"),
        "data": base64.b64encode(packed.tobytes()).decode("ascii"),
    }
