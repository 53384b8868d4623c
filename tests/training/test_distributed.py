"""Several processes train one model: as one process does, through kills, hangs and signals, and with one voice.

exercise_processes.py runs as two processes that find each other as under torchrun; what they found they write into a
folder, and the tests read it there. Kills are torchrun's own matter, and go through it.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import distributed

import quire
from quire import checkpoint, processes
from quire.cli.main import call
from quire.errors import UserError
from quire.layers.dropout import drops
from quire.models import build_model
from quire.run import Run
from quire.training import agreement, threads
from quire.training import resume as resuming
from quire.training.distributed import Lost, World, beat
from quire.training.loop import Trainer
from quire.training.settings import TrainingSettings

EXERCISE = Path(__file__).with_name("exercise_processes.py")
MODEL = {"layers": 1, "embedding_size": 16, "heads": 2, "context_length": 16, "dropout": 0.1}
TRAINING = {"batch_size": 5, "warmup_steps": 2, "sample_tokens": 10, "threads": 1, "device": "cpu", "steps": 12}
CPU = torch.device("cpu")
KILLED = 8  # the step at which a process is killed
BARE = MappingProxyType({name: value for name, value in os.environ.items() if name != "QUIRE_CACHE"})


def environment(folder: Path, **more: str) -> dict[str, str]:
    return {**BARE, "PYTHONPATH": str(Path(quire.__file__).parents[1]), "QUIRE_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1", **more}  # fmt: skip


def flags(run: Path, text: Path) -> list[str]:
    words = ["train", str(text), "--run", str(run), "--preset", "gpt-mini"]
    words += [f"--model.{name.replace('_', '-')}={value}" for name, value in MODEL.items()]
    return words + [f"--{name.replace('_', '-')}={value}" for name, value in TRAINING.items()]


def start(folder: Path, size: int, command: list[str], **differing: list[str]) -> list[subprocess.Popen[str]]:
    """The same command in `size` processes that know of each other, with variables that differ among them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    names = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size)}
    return [
        subprocess.Popen(
            [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
            env=environment(folder, **names, RANK=str(rank), LOCAL_RANK=str(rank),
                            **{name: each[rank] for name, each in differing.items()}),
        )
        for rank in range(size)
    ]  # fmt: skip


def ended(started: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each."""
    found = [process.communicate(timeout=90) for process in started]
    return [(process.returncode, *said) for process, said in zip(started, found, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, and the two processes' training of it and what else they found."""
    folder = tmp_path_factory.mktemp("distributed")
    generator = random.Random(0)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 6))) for _ in range(40)]
    (folder / "text.txt").write_text(" ".join(generator.choices(words, k=700)))
    (folder / "words.json").write_text(json.dumps(flags(folder / "run", folder / "text.txt")))
    for code, _, said in ended(start(folder, 2, [str(EXERCISE), str(folder)])):
        assert code == 0, said
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each process found."""
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


# ---- as one process does ----


@pytest.mark.parametrize("way", agreement.WAYS)
def test_two_processes_train_as_one(found, way):
    """To 1e-5 in every loss (benchmarks/many_processes.py has the whole table, for 1 to 4 processes)."""
    for process in found:
        assert process["ways"][way]["difference"] < 1e-5
        assert process["ways"][way]["same_parameters"]


def test_a_process_that_is_out_of_step_would_be_seen(found):
    """One that trains on the other's rows: the losses differ, or the comparison would see nothing."""
    assert all(process["wrong"] > 1e-3 for process in found)


def test_the_leading_process_alone_writes_and_the_run_says_who_trained(folder, found):
    run = Run(folder / "run")
    assert Run(folder / "again").metrics()[-1]["step"] == 4
    assert run.manifest["world_size"] == 2 and run.manifest["tokens_per_rank"] == [32, 48]
    metrics = run.metrics()
    assert [line["step"] for line in metrics] == sorted({line["step"] for line in metrics})
    assert metrics[-1]["step"] == 12 and metrics[-1]["tokens"] > 12 * 5 * 15
    assert [process["said"].count("Training ") for process in found] == [2, 0]
    assert "curves differ with the number of processes" in found[0]["said"]


def test_one_process_says_a_list_of_one(lab):
    run = lab.train("one", steps=2)
    assert run.manifest["world_size"] == 1 and run.manifest["tokens_per_rank"] == [4 * 16]
    assert "launch" not in run.manifest


def test_a_batch_with_too_few_windows_is_refused():
    with pytest.raises(UserError, match=r"2 windows cannot be shared by 3 processes.*--batch-size of at least 3"):
        World(0, 3).share(2)


# ---- sharded checkpoints ----


def test_a_sharded_training_resumes_to_the_same_bits(found):
    for process in found:
        assert process["sharded"]["resumed"] == []
        assert process["sharded"]["unlike the beginning"]


def test_parts_are_gathered_in_bfloat16(found):
    """With recomputed blocks: near the copies' losses in bfloat16, and not those in float32."""
    for process in found:
        half = process["sharded"]["half"]
        assert half["fsdp bfloat16"] == pytest.approx(half["ddp bfloat16"], rel=2e-3)
        assert half["fsdp bfloat16"] != pytest.approx(half["fsdp float32"], rel=1e-5)


def test_shards_are_read_by_who_knows_nothing_of_them(folder, found):
    """One process loads, measures and trains on what two have written in parts, and the other way round."""
    run, written = Run(folder / "sharded"), found[0]["sharded"]["weights"]
    files = sorted(path.name for path in run.folder("last").iterdir())
    assert [name.partition("-model-")[0] for name in files] == ["shard-00001"] * 2 + ["shard-00002"] * 2 + [
        "state.json"
    ]
    weights = run.checkpoint().model
    assert {name: tensor.flatten().tolist() for name, tensor in weights.items()} == written
    for process in found:
        assert process["sharded"]["from an ordinary one"] == []


def test_a_flipped_bit_in_a_shard_is_refused_by_name(folder, tmp_path, found):
    damaged = found[0]["sharded"]["damaged"]
    assert "shard-00002-model-00001-of-00002.safetensors is damaged: tensor model." in damaged
    assert found[1]["sharded"]["damaged"] == damaged


# ---- faults ----


def test_a_killed_process_costs_nothing(folder, found):
    """torchrun starts both again, the same command goes on, and everything is as if nothing had happened."""
    (folder / "killer.py").write_text(
        "import os, signal\n"
        "from quire import processes\n"
        "from quire.cli.main import main\n"
        "from quire.training.loop import Trainer\n"
        "step = Trainer.step_optimizers\n"
        "def perhaps(trainer, loss):\n"
        f"    if trainer.state.step == {KILLED} and processes.rank() == 1 and not processes.restarted():\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    step(trainer, loss)\n"
        "Trainer.step_optimizers = perhaps\n"
        "main()\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*launch, "--", str(folder / "killer.py"), *flags(folder / "killed", folder / "text.txt")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment(folder), timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert f"{folder / 'killed'} resumes at step" in ran.stderr
    straight, resumed = Run(folder / "run"), Run(folder / "killed")
    for which in ("last", "best"):
        one, other = (checkpoint.load(run.folder(which)) for run in (straight, resumed))
        for mine, theirs in ((one.model, other.model), (one.training, other.training)):
            assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert "random.cpu.1" in checkpoint.load(straight.folder("last")).training
    clocks = ("seconds", "tokens_per_second", "memory_bytes")
    curves = [
        [{k: v for k, v in row.items() if k not in clocks} for row in run.metrics()] for run in (straight, resumed)
    ]
    assert curves[0] == curves[1]


def test_each_process_drops_out_other_parts_of_the_same_weights(lab, monkeypatch):
    run, weights, drawn = lab.train("run", steps=1), [], []
    monkeypatch.setattr(World, "assemble", lambda world: None)
    for rank in range(4):
        trainer = Trainer(run, resuming.settings_of(run), run.validation_tokens(), CPU, 0.0, World(rank, 4))
        drawn.append(tuple(torch.rand(4).tolist()))
        weights.append(tuple(parameter.sum().item() for parameter in trainer.model.parameters()))
    assert len(set(drawn)) == 4 and len(set(weights)) == 1


def test_threads_are_those_of_all_processes_of_a_machine(monkeypatch, same_threads):
    """What the first process takes is told to the others by the settings, and they take as many."""
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)
    for beside, given, each in ((2, 0, 4), (2, 1, 1), (2, 4, 2), (2, 99, 4), (16, 0, 1), (1, 3, 3)):
        monkeypatch.setattr(processes, "local_size", lambda beside=beside: beside)
        taken = threads.prepare_machine(TrainingSettings(threads=given, device="cpu"))[1]
        again = threads.prepare_machine(TrainingSettings(threads=taken * beside, device="cpu"))[1]
        assert taken == again == each


# quire whose checkpoints take a while.
SLOWLY = """
import time
from quire.cli.main import main
from quire.training import state
save = state.save
def slowly(*arguments):
    time.sleep(3)
    save(*arguments)
state.save = slowly
main()
"""


def trained_until(folder: Path, run: Path, step: int, *more: str, program: str = "") -> list[subprocess.Popen[str]]:
    """Two processes that train a run, which has come to a step."""
    command = ["-c", program] if program else ["-m", "quire"]
    command += [*flags(run, folder / "text.txt"), "--steps=100000", "--evaluation-interval=50000", *more]
    started, until = start(folder, 2, command), time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or len((run / "metrics.jsonl").read_text().splitlines()) < step // 10:
        assert time.monotonic() < until and all(process.poll() is None for process in started)
        time.sleep(0.1)
    return started


def test_a_signal_to_one_process_saves_and_ends_all(folder, found):
    """None before the checkpoint is whole: torchrun kills the others of one that has ended."""
    started = trained_until(folder, folder / "stopped", 20, program=SLOWLY)
    started[1].send_signal(signal.SIGTERM)
    started[1].wait(90)
    assert (folder / "stopped" / "checkpoints" / "last" / "state.json").exists()
    told = ended(started)
    assert [code for code, _, _ in told] == [143, 143]
    sentences = [said for _, _, said in told if "Stopped at step" in said]
    assert len(sentences) == 1 and f"quire resume {folder / 'stopped'}" in sentences[0]
    state = Run(folder / "stopped").checkpoint().state
    assert state["step"] >= 20 and f"Stopped at step {state['step']} and saved" in sentences[0]


def test_a_process_that_hangs_is_named(folder, found):
    started = trained_until(folder, folder / "hangs", 10, "--timeout=6")
    os.kill(started[1].pid, signal.SIGSTOP)
    code, _, said = ended(started[:1])[0]
    started[1].kill()
    started[1].communicate()
    assert code == 1
    assert f"Process 1 (pid {started[1].pid} on " in said and "does not answer: it hangs, or it was killed" in said


def test_who_is_silent_while_others_wait_is_named(monkeypatch):
    """Process 1 prepares and lives; process 2 does not."""
    store, end = distributed.HashStore(), threading.Event()
    for rank in (1, 2):
        store.set(f"name/{rank}", f"pid {rank} on here")
        store.set(f"beat/{rank}", "")
    monkeypatch.setattr(processes, "store", lambda: store)
    monkeypatch.setattr(processes, "ended", lambda: "")
    with ThreadPoolExecutor(1) as beside:
        beside.submit(beat, store, 1, 0.1, end)
        with pytest.raises(Lost, match=r"^Process 2 \(pid 2 on here\) does not answer: it hangs"):
            World(0, 3, timeout=1.0).wait_for({"ready/1": 1, "ready/2": 2})
        end.set()


def test_a_batch_that_some_would_have_no_part_of_changes_nothing(lab, monkeypatch):
    run = lab.train("run", steps=2, batch_size=1)
    before = lab.contents(run.path)
    monkeypatch.setattr(resuming, "join", lambda timeout: World(0, 2))
    monkeypatch.setattr("quire.training.loop.join", lambda timeout: World(0, 2))
    monkeypatch.setattr(processes, "store", distributed.HashStore)
    with pytest.raises(UserError, match="1 window cannot be shared by 2 processes"):
        resuming.resume(run, steps=2)
    assert lab.contents(run.path) == before


def test_every_way_to_drop_out_is_known(small_settings):
    for kind, own in (("gpt", {}), ("recurrent", {"layers": 2}), ("ngram", {})):
        for dropout in (0.0, 0.2):
            assert drops(build_model(small_settings(kind, dropout=dropout, **own))) is bool(dropout)


def test_a_mistake_is_told_once(folder, found):
    told = ended(start(folder, 2, ["-m", "quire", *flags(folder / "run", folder / "text.txt")]))
    assert [code for code, _, _ in told] == [2, 2]
    assert sum(said.count("exists already") for _, _, said in told) == 1


def test_what_one_process_does_is_refused_of_several(lab, monkeypatch, capsys):
    run = lab.train("run", steps=1)
    monkeypatch.setattr(resuming, "join", lambda timeout: World(0, 2))
    with pytest.raises(UserError, match="without torchrun"):
        resuming.verify(run)
    monkeypatch.setattr(processes, "world_size", lambda: 2)
    monkeypatch.setattr(processes, "first_to_say", lambda sentence: True)
    monkeypatch.setattr(processes, "end", lambda sentence: None)
    assert call(["generate", str(run.path)]) == 2
    assert "quire generate runs in one process: call it without torchrun." in capsys.readouterr().err
