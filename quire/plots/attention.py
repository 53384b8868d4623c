"""Attention as heat maps: a picture for each layer with all its heads, and one of all layers.

H heads, T positions that look (rows, downwards), S positions that are looked at (columns). The ink is the square root
of the weight, so that a weight of 0.01 can still be seen.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from quire import files
from quire.tokenizers.tokenizer import visible

DPI = 100  # pixels an inch: everything below is in pixels
INK = "Blues"
PANEL, CELL = 1000, (2, 40)  # a head's width at most, where cells allow it; a cell's least and largest width
READABLE = 10  # pixels a label needs; where cells are smaller, every 2nd, 3rd ... token is named
LABEL = 12  # characters of a token's label at most
WIDTH = 4600  # of a picture, at most, unless one head alone is wider
LEGEND = "a row looks at its columns; the ink is the square root of the weight"
HEADING, SMALL = 72, 96  # the height of a picture's title; the width of a head in the overview
LINES, LINE, EDGE = 8, (222, 228, 236), (140, 150, 164)  # cells from this size on have lines between them; colours


def plot_attention(title: str, weights: np.ndarray, queries: Sequence[str], keys: Sequence[str], path: Path) -> None:
    """Draw one layer's `weights` (H, T, S) into a PNG, a heat map a head, each with the tokens on both its sides."""
    count, rows, columns = weights.shape
    cell = round(min(CELL[1], max(CELL[0], PANEL / max(rows, columns))))
    labels = _panel_labels(queries, keys, cell)  # alike for every head
    high, wide = labels.shape[0] + 46, labels.shape[1] + 24
    across = _columns(count, wide, high)
    places = [(HEADING + 28 + head // across * high, 20 + head % across * wide) for head in range(count)]
    texts = [(left, top - 24, f"head {head}", 11) for head, (top, left) in enumerate(places)]
    picture = _sheet(
        HEADING + math.ceil(count / across) * high + 16,
        max(20 + across * wide, 420),
        [(20, 14, title, 12), (20, 38, LEGEND, 8), *texts],
    )
    for values, (top, left) in zip(weights, places, strict=True):
        _paste(picture, labels, top, left)
        map_ = _heat(values, cell)
        _paste(picture, map_, top + len(labels) - len(map_), left + labels.shape[1] - map_.shape[1])
    _save(picture, path)


def plot_overview(title: str, layers: Sequence[tuple[str, np.ndarray]], path: Path) -> None:
    """Draw every head of every layer, (name, weights (H, T, S)), small and side by side, into a PNG."""
    beside = 30 + round(7.2 * max(len(name) for name, _ in layers))
    most, pitch = max(len(weights) for _, weights in layers), SMALL + 10
    tops = [HEADING + 22 + row * pitch for row in range(len(layers))]
    texts = [
        (20, 14, title, 12),
        (20, 38, LEGEND, 8),
        *((beside + head * pitch, HEADING, f"head {head}", 9) for head in range(most)),
    ]
    texts += [(20, top + SMALL // 2 - 7, name, 9) for top, (name, _) in zip(tops, layers, strict=True)]
    picture = _sheet(tops[-1] + pitch + 10, max(beside + most * pitch + 10, 420), texts)
    for top, (_, weights) in zip(tops, layers, strict=True):
        for head, values in enumerate(weights):
            _paste(picture, _heat(_fitted(values, SMALL), 1), top, beside + head * pitch)
    _save(picture, path)


def pooled(values: np.ndarray, most: int) -> np.ndarray:
    """(T, S) shrunk to at most (most, most), each cell the largest of those it stands for: no thin line is lost."""
    for axis in (0, 1):
        length = values.shape[axis]
        if length > most:
            values = np.maximum.reduceat(values, np.arange(most) * length // most, axis=axis)
    return values


def _fitted(values: np.ndarray, size: int) -> np.ndarray:
    """(T, S) as (size, size), pooled or repeated."""
    values = pooled(values, size)
    rows, columns = (np.arange(size) * length // size for length in values.shape)
    return values[rows][:, columns]


def _heat(values: np.ndarray, cell: int) -> np.ndarray:
    """A heat map (T * cell, S * cell, 3), the ink by the square root; thin lines between cells where they are large."""
    from matplotlib import colormaps

    colours = (colormaps[INK](np.sqrt(np.clip(values, 0, 1)))[..., :3] * 255).round().astype(np.uint8)
    map_ = colours.repeat(cell, 0).repeat(cell, 1)
    if cell >= LINES:
        map_[cell - 1 :: cell] = map_[:, cell - 1 :: cell] = LINE
    map_[[0, -1]] = map_[:, [0, -1]] = EDGE
    return map_


def _panel_labels(queries: Sequence[str], keys: Sequence[str], cell: int) -> np.ndarray:
    """The tokens at the left of a heat map and above it, with white room for the map at the lower right."""
    step = math.ceil(READABLE / cell)
    points = min(14.0, max(cell, READABLE) * 0.86) * 72 / DPI

    def measure(label: str) -> int:
        font = _font()
        font.set_size(points, DPI)
        font.set_text(label)
        return math.ceil(font.get_width_height()[0] / 64)  # FreeType counts in 64ths of a pixel

    left, top = (10 + max(map(measure, _labels(tokens))) for tokens in (queries, keys))

    def draw(figure: Any, height: int, width: int) -> None:
        style = {"fontsize": points, "parse_math": False, "color": "#1b2430"}
        for place, label in enumerate(_labels(keys[::step])):
            x = (left + (place * step + 0.5) * cell) / width
            figure.text(x, 1 - (top - 4) / height, label, rotation=90, ha="center", va="bottom", **style)
        for place, label in enumerate(_labels(queries[::step])):
            y = 1 - (top + (place * step + 0.5) * cell) / height
            figure.text((left - 4) / width, y, label, ha="right", va="center_baseline", **style)

    return _drawn(top + len(queries) * cell, left + len(keys) * cell, draw)


def _sheet(height: int, width: int, texts: Sequence[tuple[int, int, str, int]]) -> np.ndarray:
    """White paper (height, width, 3) with texts: left, top, what, size in points."""

    def draw(figure: Any, height: int, width: int) -> None:
        for x, y, text, size in texts:
            figure.text(x / width, 1 - y / height, _drawable(text), fontsize=size, va="top", parse_math=False)

    return _drawn(height, width, draw)


def _drawn(height: int, width: int, draw: Callable[[Any, int, int], None]) -> np.ndarray:
    """The pixels (height, width, 3) of a figure that `draw(figure, height, width)` has filled."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    canvas = FigureCanvasAgg(figure)
    draw(figure, height, width)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[:height, :width, :3]


def _paste(picture: np.ndarray, part: np.ndarray, top: int, left: int) -> None:
    picture[top : top + part.shape[0], left : left + part.shape[1]] = part


def _save(picture: np.ndarray, path: Path) -> None:
    from matplotlib import image

    files.write_by(path, lambda new: image.imsave(new, picture, format="png"))


def _columns(count: int, wide: float, high: float) -> int:
    """How many heads stand side by side: the picture is about half as wide again as it is high."""
    best = round(math.sqrt(count * 1.5 * high / wide))
    return max(1, min(count, best, int(WIDTH // wide)))


def _labels(tokens: Sequence[str]) -> list[str]:
    return [_short(_drawable(visible(token))) for token in tokens]


def _short(label: str) -> str:
    return label if len(label) <= LABEL else label[: LABEL - 1] + "…"


def _drawable(label: str) -> str:
    """What the font lacks is written as its code."""
    return "".join(c if ord(c) in _glyphs() else c.encode("unicode_escape").decode() for c in label)


@cache
def _glyphs() -> frozenset[int]:
    return frozenset(_font().get_charmap())


def _font() -> Any:
    """The font that labels are drawn in, which comes with matplotlib."""
    from matplotlib import font_manager

    return font_manager.get_font(font_manager.findfont("DejaVu Sans"))
