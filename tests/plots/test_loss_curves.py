"""Loss curves: what stands on the picture."""

import io
import json
from pathlib import Path

import matplotlib.figure
import matplotlib.image
import pytest

from quire import files
from quire.plots.loss import Curve, plot_losses
from quire.run import Run
from quire.training.curves import curve

FALLING = [(10.0, 3.0), (20.0, 2.0), (30.0, 1.5), (40.0, 1.75)]
STAR = "*"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[matplotlib.figure.Figure]:
    """The figures that were saved."""
    figures: list[matplotlib.figure.Figure] = []
    save = matplotlib.figure.Figure.savefig

    def keep(figure: matplotlib.figure.Figure, *arguments: object, **more: object) -> None:
        figures.append(figure)
        save(figure, *arguments, **more)

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return figures


def test_one_run(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    training = [(float(x), 4 - x / 20) for x in range(1, 41)]
    plot_losses([Curve("owl", training, FALLING)], "step", tmp_path / "loss.png")
    axes = drawn[0].axes[0]
    thin, held_out, best = axes.lines
    assert [*zip(*thin.get_data())] == training
    assert [*zip(*held_out.get_data())] == FALLING
    assert best.get_marker() == STAR and [*zip(*best.get_data())] == [(30.0, 1.5)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "held out, best 1.500"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("step", "loss (nats per token)", "owl")
    low, high = axes.get_ylim()
    assert low < 1.5 and high > 3.0, "every held-out loss is on the picture"


def test_the_file_is_a_png_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "loss.png"
    plot_losses([Curve("owl", [], FALLING)], "step", path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    pixels = matplotlib.image.imread(io.BytesIO(data))
    assert pixels.shape[:2] == (600, 960)
    assert 0.01 < (pixels[:, :, :3].min(axis=2) < 0.8).mean() < 0.3, "some ink, most of it white"
    assert [entry.name for entry in path.parent.iterdir()] == ["loss.png"]


def test_several_runs_each_in_its_colour(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    curves = [Curve(name, [(1, 4.0)], [(x, y + i) for x, y in FALLING]) for i, name in enumerate(("owl", "river"))]
    plot_losses(curves, "seconds", tmp_path / "losses.png", "bits per byte")
    axes = drawn[0].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["owl, best 1.500", "river, best 2.500"]
    stars = [line for line in axes.lines if line.get_marker() == STAR]
    assert [line.get_ydata()[0] for line in stars] == [1.5, 2.5]
    assert len({line.get_color() for line in stars}) == 2
    assert axes.get_ylabel() == "loss (bits per byte)" and axes.get_title() == ""


def test_the_first_steep_fall_is_left_out(tmp_path: Path, drawn: list[matplotlib.figure.Figure]) -> None:
    training = [(1.0, 300.0)] + [(float(x), 3 - x / 100) for x in range(2, 100)]
    plot_losses([Curve("owl", training, [(10.0, 2.9), (99.0, 2.0)])], "step", tmp_path / "loss.png")
    low, high = drawn[0].axes[0].get_ylim()
    assert low < 2.0 and 2.9 < high < 4


@pytest.mark.parametrize("held_out", [[], [(1.0, 2.0)]])
def test_few_points(tmp_path: Path, held_out: list[tuple[float, float]]) -> None:
    plot_losses([Curve("owl", [(1.0, 2.0)], held_out)], "step", tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000


def test_a_full_disk_leaves_the_picture_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plot_losses([Curve("owl", [], FALLING)], "step", tmp_path / "loss.png")
    before = (tmp_path / "loss.png").read_bytes()
    for failing in ("write", "rename"):

        def operation(kind: str, path: Path, failing: str = failing) -> None:
            if kind == failing:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(files, "operation", operation)
        with pytest.raises(OSError):
            plot_losses([Curve("other", [], FALLING[:2])], "step", tmp_path / "loss.png")
        assert (tmp_path / "loss.png").read_bytes() == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["loss.png"]


# ---- from a run ----


@pytest.mark.parametrize("axis, key", [("step", "step"), ("tokens", "tokens"), ("time", "seconds")])
def test_a_runs_curve(tiny: Run, axis: str, key: str) -> None:
    rows = tiny.metrics()
    found = curve(tiny, axis)
    assert found.name == "tiny"
    assert found.training == [(row[key], row["train_loss"]) for row in rows]
    assert found.validation == [(row[key], row["validation_loss"]) for row in rows if "validation_loss" in row]
    bits = curve(tiny, axis, bits_per_byte=True)
    assert not bits.training and [x for x, _ in bits.validation] == [x for x, _ in found.validation]


def test_the_plot_command(tiny: Run, quire, drawn: list[matplotlib.figure.Figure]) -> None:
    best = min(row["validation_loss"] for row in tiny.metrics() if "validation_loss" in row)
    said = quire("plot", "tiny")
    assert (said.code, said.out, said.err) == (0, "losses.png\n", "")
    assert drawn[0].axes[0].get_xlabel() == "tokens trained on"
    said = quire("plot", "tiny", "tiny", "--over", "time", "--out", "both.png", "--json")
    assert json.loads(said.out) == {"plot": "both.png", "best": {"tiny": best}}
    assert drawn[1].axes[0].get_xlabel() == "seconds" and Path("both.png").is_file()
    assert quire("plot", "tiny", "--bits-per-byte").code == 0
    assert drawn[2].axes[0].get_ylabel() == "loss (bits per byte)"


def test_training_draws_its_own(tiny: Run) -> None:
    assert matplotlib.image.imread(tiny.path / "loss.png").shape[:2] == (600, 960)
