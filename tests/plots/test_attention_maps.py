"""Heat maps: the right ink in the right cell, every token named, whatever characters it has."""

import io
import warnings
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib import colormaps

from quire.plots import attention as drawing
from quire.plots.attention import plot_attention, plot_overview, pooled

AWKWARD = ["<script>", "$x$", "森", "😀", "\n", " the", "שלום", "\u202e", "\x00", "", "a" * 99, "\\xe6", "_^{", "%"]


def weights(heads: int, rows: int, columns: int | None = None, seed: int = 1) -> np.ndarray:
    draw = np.random.default_rng(seed).exponential(size=(heads, rows, columns or rows))
    draw = draw if columns else np.tril(draw)
    return (draw / draw.sum(-1, keepdims=True)).astype(np.float32)


def pixels(path: Path) -> np.ndarray:
    return (matplotlib.image.imread(io.BytesIO(path.read_bytes()))[..., :3] * 255).round().astype(int)


@pytest.mark.parametrize("rows, columns", [(5, None), (100, None), (4, 7)])
def test_every_weight_is_a_cell_of_its_colour(tmp_path: Path, rows: int, columns: int | None) -> None:
    """Each head's map is found in the picture, all its cells in order."""
    values = weights(3, rows, columns)
    names = [str(i) for i in range(max(values.shape))]
    plot_attention("a layer", values, names[:rows], names[: values.shape[2]], tmp_path / "layer.png")
    picture = pixels(tmp_path / "layer.png")
    cell = min(40, 1000 // max(values.shape[1:]))
    edges = (picture == drawing.EDGE).all(-1)
    corners = np.argwhere(edges[:-1, :-1] & edges[1:, :-1] & edges[:-1, 1:] & ~np.pad(edges, 1)[:-2, 1:-1][:-1, :-1]
                          & ~np.pad(edges, 1)[1:-1, :-2][:-1, :-1])  # fmt: skip
    assert len(corners) == 3
    for head, (top, left) in enumerate(corners.tolist()):
        middle = cell // 2
        found = picture[top + middle :: cell, left + middle :: cell][: values.shape[1], : values.shape[2]]
        expected = (colormaps[drawing.INK](np.sqrt(values[head]))[..., :3] * 255).round()
        assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("length", [1, 2, 5, 100, 512])
def test_any_length_and_any_tokens(tmp_path: Path, length: int) -> None:
    """No warning of a missing glyph, no mathematics, no picture that is out of bounds."""
    tokens = [AWKWARD[i % len(AWKWARD)] for i in range(length)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_attention("runs/$x$ 森", weights(2, length), tokens, tokens, tmp_path / "new folder" / "layer.png")
    height, width, _ = pixels(tmp_path / "new folder" / "layer.png").shape
    assert 150 < height < 3000 and 400 < width < 4700
    assert [entry.name for entry in (tmp_path / "new folder").iterdir()] == ["layer.png"]


def test_labels_have_ink_beside_every_row_and_column(tmp_path: Path) -> None:
    """At 5 and at 100 tokens every single one is named."""
    for length in (5, 100):
        cell = min(40, 1000 // length)
        labels = drawing._panel_labels(["token"] * length, ["token"] * length, cell)
        dark = (labels.astype(int).sum(-1) < 500).astype(int)
        top, left = dark.shape[0] - length * cell, dark.shape[1] - length * cell
        rows = dark[top:, :left].sum(1).reshape(length, cell).sum(1)
        columns = dark[:top, left:].sum(0).reshape(length, cell).sum(1)
        assert rows.min() > 10 and columns.min() > 10
        assert dark[:, 0].sum() == dark[0].sum() == 0, "no label is cut off"
        assert dark[top:, left:].sum() == 0, "none reaches into the map"


def test_the_overview_has_every_head(tmp_path: Path) -> None:
    layers = [("blocks.0.attention", weights(3, 100)), ("blocks.1.attention", weights(2, 100)),
              ("decoder.0.cross", weights(4, 3, 9))]  # fmt: skip
    plot_overview("all", layers, tmp_path / "overview.png")
    edges = (pixels(tmp_path / "overview.png") == drawing.EDGE).all(-1)
    starts = edges & ~np.pad(edges, 1)[:-2, 1:-1] & ~np.pad(edges, 1)[1:-1, :-2]
    assert starts.sum() == 3 + 2 + 4


def test_pooling_keeps_the_largest() -> None:
    values = weights(1, 100)[0]
    small = pooled(values, 30)
    assert small.shape == (30, 30) and small.max() == values.max()
    starts = np.arange(30) * 100 // 30
    assert small[7, 3] == values[starts[7] : starts[8], starts[3] : starts[4]].max()
    assert pooled(values[:5, :7], 30).shape == (5, 7)
