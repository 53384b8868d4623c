"""What processes that torchrun has started again go on with, and what makes room."""

import quire
from quire import files, processes
from quire.data.reading import DataSettings
from quire.training.begin import begun_before
from quire.training.resume import resume
from quire.training.settings import Settings


def test_a_run_of_another_launch_is_not_gone_on_with(lab, monkeypatch):
    """A run that was there before is refused, also by processes that torchrun has started again."""
    run = lab.train("run", steps=1)
    files.write_json(run.path / "manifest.json", {**run.manifest, "launch": "this"})
    monkeypatch.setattr(processes, "restarted", lambda: True)
    monkeypatch.setattr(processes, "launch", lambda: "this")
    assert begun_before(Settings(), run.path) == run.path
    monkeypatch.setattr(processes, "launch", lambda: "another")
    assert begun_before(Settings(), run.path) is None
    monkeypatch.setattr(processes, "restarted", lambda: False)
    assert begun_before(Settings(), run.path) is None


def test_what_others_have_is_passed_over(lab, monkeypatch):
    """Files, folders and runs of other names are left alone; this launch's run is found behind them."""
    monkeypatch.chdir(lab.folder)
    monkeypatch.setattr(processes, "restarted", lambda: True)
    monkeypatch.setattr(processes, "launch", lambda: "this")
    runs = lab.folder / "runs"
    for number, name in enumerate(("text", "text-2", "text-3", "text-4")):
        (runs / name).mkdir(parents=True)
        if number:
            (runs / name / ("manifest.json" if number == 3 else "own.new")).write_text("{ damaged")
    settings = Settings(data=DataSettings(text=(str(lab.text),)))
    before = lab.contents(runs)
    assert begun_before(settings, None) is None and begun_before(settings, lab.text) is None
    run = lab.train("runs/text-5", steps=1)
    files.write_json(run.path / "manifest.json", {**run.manifest, "launch": "this"})
    assert begun_before(settings, None) == run.path.relative_to(lab.folder)
    assert before.items() <= lab.contents(runs).items() and (runs / "text").is_dir() and lab.text.exists()


def test_what_was_killed_before_it_was_a_run_makes_room(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "restarted", lambda: True)
    monkeypatch.setattr(processes, "launch", lambda: "this")
    for launch in ("this", "another"):
        files.write_json(tmp_path / launch / "manifest.json", {"launch": launch})
        assert begun_before(Settings(), tmp_path / launch) is None
    assert not (tmp_path / "this").exists() and (tmp_path / "another").exists()


def test_a_fine_tuning_killed_before_it_had_its_weights_makes_room(lab, monkeypatch):
    base = lab.train("base", steps=2)
    (lab.folder / "other.txt").write_text(lab.text.read_text()[::-1])
    run = quire.finetune(base, str(lab.folder / "other.txt"), run=lab.folder / "tuned", steps=2)
    files.write_json(run.path / "manifest.json", {**run.manifest, "launch": "this"})
    monkeypatch.setattr(processes, "restarted", lambda: True)
    monkeypatch.setattr(processes, "launch", lambda: "this")
    assert begun_before(Settings(), run.path) == run.path
    for name in ("checkpoints", "metrics.jsonl"):
        files.remove(run.path / name)
    assert begun_before(Settings(), run.path) is None and not run.path.exists()


def test_more_steps_are_asked_for_once_however_often_torchrun_starts(lab, monkeypatch):
    run = lab.train("run", steps=4)
    monkeypatch.setattr(processes, "launch", lambda: "this")
    assert resume(run, steps=4).metrics()[-1]["step"] == 8
    monkeypatch.setattr(processes, "restarted", lambda: True)
    assert resume(run, steps=4).metrics()[-1]["step"] == 8
    monkeypatch.setattr(processes, "launch", lambda: "another")  # which was started again before it began
    assert resume(run, steps=4).metrics()[-1]["step"] == 12
