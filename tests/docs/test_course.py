"""The course in docs/course: every chapter runs to its end, shortened, and is a notebook in the percent format."""

import math
import random
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch

COURSE = Path(__file__).resolve().parents[2] / "docs" / "course"
CHAPTERS = sorted(COURSE.glob("[0-9][0-9]_*.py"))
WORDS = shlex.split("the owl calls upon a night and speaks to none while rivers run below their stones Or so it Seemed")

each_chapter = pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)


def cells(chapter: Path) -> list[tuple[bool, str]]:
    """A chapter's cells: whether it is text, and its lines (of text without their comment signs)."""
    heads = re.split(r"^# %%(.*)\n", chapter.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert heads[0] == "", "nothing stands before the first cell"
    assert set(heads[1::2]) == {"", " [markdown]"}
    found = []
    for kind, body in zip(heads[1::2], heads[2::2]):
        if kind:
            lines = body.strip().splitlines()
            assert all(line == "#" or line.startswith("# ") for line in lines), "text is all comments"
            body = "\n".join(line[2:] for line in lines) + "\n"
        found.append((bool(kind), body))
    return found


def experiment(chapter: Path) -> tuple[str, str]:
    """The line that a chapter's experiment changes, and what it becomes."""
    text = "".join(body for is_text, body in cells(chapter) if is_text)
    _, asked = re.split(r"^## Experiment\n", text, flags=re.MULTILINE)
    match = re.search(r"^Change the line\n\n {4}(.+)\n\ninto\n\n {4}(.+)\n\n(?:.*\n)+\*\*Answer\.\*\* ", asked, re.M)
    assert match, "Change the line, into, and an answer, as in the other chapters"
    return match[1], match[2]


@pytest.fixture
def a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small text of its own, a short course, and the state of torch and of modules put back afterwards."""
    draw = random.Random(1)
    lines = [" ".join(draw.choices(WORDS, k=8)) + ".\n" for _ in range(1200)]
    (tmp_path / "text.txt").write_text("".join(lines))
    monkeypatch.setenv("QUIRE_COURSE_TEXT", str(tmp_path / "text.txt"))
    monkeypatch.setenv("QUIRE_COURSE_SHORT", "1")
    monkeypatch.syspath_prepend(COURSE)
    monkeypatch.setitem(sys.modules, "course", None)  # put back to what it was, which is nothing
    del sys.modules["course"]


@each_chapter
def test_chapter_runs_shortened(chapter: Path, a_text: None, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with `loss`, its held-out loss: a number, and after a few steps no worse than knowing nothing."""
    with torch.random.fork_rng(devices=[]), torch.autograd.set_grad_enabled(True):
        names = runpy.run_path(str(chapter), run_name="__main__")
    vocabulary_size = sys.modules["course"].V
    assert math.isfinite(names["loss"])
    assert 0 < names["loss"] < math.log(vocabulary_size)
    assert capsys.readouterr().out.count("\n") > 10


@each_chapter
def test_chapter_is_a_notebook(chapter: Path) -> None:
    """It begins with its title; each cell of code is Python by itself; titles count the chapters."""
    pages = cells(chapter)
    assert pages[0][0] and pages[0][1].startswith(f"# {int(chapter.name[:2])}. ")
    assert any(not is_text for is_text, _ in pages)
    for is_text, body in pages:
        assert body.strip()
        if not is_text:
            compile(body, str(chapter), "exec")


@each_chapter
def test_experiment_changes_one_line_that_is_there(chapter: Path) -> None:
    before, after = experiment(chapter)
    source = chapter.read_text(encoding="utf-8").splitlines()
    places = [number for number, line in enumerate(source) if line.strip() == before]
    assert len(places) == 1, f"{before!r} stands in the code {len(places)} times"
    indent = source[places[0]][: -len(before)]
    source[places[0]] = indent + after
    compile("\n".join(source), str(chapter), "exec")


def test_the_course_names_every_chapter() -> None:
    page = (COURSE / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d\d_\w+\.py)\)", page) == [chapter.name for chapter in CHAPTERS]
    for number, chapter in enumerate(CHAPTERS, 1):
        assert int(chapter.name[:2]) == number
