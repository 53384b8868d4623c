"""The tasks: every answer is right, every call gives the same, and what is held out is new."""

import re
from dataclasses import replace
from datetime import date, datetime

import pytest

from quire.config import PRESETS, preset
from quire.data.prepare import split
from quire.data.reading import DataSettings, read
from quire.data.tasks import TASKS


def is_right(task: str, source: str, target: str) -> bool:
    """Whether the answer is right, by other means than the task's own."""
    if task in ("copy", "reverse", "sort"):
        assert re.fullmatch("[a-z]{1,10}", source)
        return list(target) == {"copy": list, "reverse": lambda s: [*s][::-1], "sort": sorted}[task](source)
    if task in ("addition", "subtraction"):
        assert re.fullmatch(r"\d{1,3}[+-]\d{1,3}", source)
        return str(eval(re.sub(r"\b0+(?=\d)", "", source))) == target
    forms = ["%B %d, %Y", "%d %B %Y", "%d %b %Y", "%m/%d/%Y", "%d.%m.%Y"]
    read = [form for form in forms if _reads(source, form) == target]
    return len(read) >= 1 and date.fromisoformat(target).isoformat() == target


def _reads(text: str, form: str) -> str:
    try:
        return datetime.strptime(text, form).date().isoformat()
    except ValueError:
        return ""


def key(task: str, source: str, target: str) -> object:
    """What a training pair must not share with a held-out one."""
    if task in ("addition", "subtraction"):
        return frozenset(re.split(r"[+-]", source))
    return target if task in ("sort", "dates") else source


@pytest.mark.parametrize("task", TASKS)
def test_pairs_are_right_and_held_out_ones_are_new(task, tmp_path, monkeypatch):
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path))
    monkeypatch.setitem(TASKS, task, replace(TASKS[task], count=4000))
    pairs = TASKS[task].pairs()
    assert len(pairs) == 4000
    assert all(is_right(task, *pair) for pair in pairs[:1000])
    assert pairs[-50:] == TASKS[task].pairs()[-50:]

    corpus = read([task], DataSettings(pairs=task))
    training, held_out, _ = split(corpus.documents)
    known, new = ({key(task, *pair) for pair in zip(*[iter(part)] * 2, strict=True)} for part in (training, held_out))
    assert not known & new
    assert len(new) == len(held_out) // 2 >= 300
    assert len(training) // 2 == len(pairs) - len(new)  # nothing had to be left out
    sizes = {len(source) for source in list(held_out)[::2]}
    assert len(sizes) >= 4  # of short and long ones some are held out


def test_the_five_spellings_of_a_date_all_occur():
    forms = [r"[A-Z]\w+ \d+, \d+", r"\d+ [A-Z]\w+ \d+", r"\d+ [A-Z]\w\w \d+", r"\d+/\d+/\d+", r"\d\d\.\d\d\.\d+"]
    sources = [source for source, _ in replace(TASKS["dates"], count=1000).pairs()]
    for form in forms:
        assert sum(bool(re.fullmatch(form, source)) for source in sources) > 100


def test_every_task_has_its_preset():
    assert {f"seq2seq-{task}" for task in TASKS} == {name for name in PRESETS if name.startswith("seq2seq-")}
    assert all(preset(f"seq2seq-{task}")["data"]["pairs"] == task for task in TASKS)
