"""What a run survives: kills, flipped bits, cut-off files, a full disk.

    python benchmarks/faults.py [--kills 100] [--flips 1000] [--truncations 1000] [--seed 0] [--json OUT]

Prints a table and writes JSON; exits with 1 if a fault did harm. Needs a POSIX system (it forks). About two minutes.

kills        a child saves a real, tiny training to best and last as fast as it can while we read its last checkpoint
             over and over; after a random moment it is killed. The run must load, must not have lost a finished save,
             and after the next start nothing may be left over
flips        one bit of one file of a checkpoint is flipped: loading must be refused, and the sentence must name the
             file, and the tensor where the bit lies in one
truncations  one file of a checkpoint is cut off at a random length: the same
run flips    one bit of the run's other checked files is flipped: the same
full disk    the 1st, 2nd, 3rd ... change to the disk during a save fails, until none does; once before anything is
             written and once after half of the file is: a checkpoint must load every time, and nothing be left over
"""

import argparse
import errno
import json
import os
import random
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import quire
from quire import checkpoint, files
from quire.errors import UserError
from quire.run import Run
from quire.training.loop import Trainer
from quire.training.resume import resume

TINY = {"layers": 1, "embedding_size": 16, "heads": 2, "context_length": 16}
LONGEST = 0.5  # seconds from a child's start to its death, at most
Figures = dict[str, Any]


def tiny_run(folder: Path) -> Run:
    """A run that has trained two steps and has far to go."""
    text = folder / "text.txt"
    generator = random.Random(0)
    text.write_text("".join(generator.choice("abcdefgh \n") for _ in range(2000)))
    run = quire.train(
        str(text), run=folder / "run", preset="gpt-mini", model=TINY, steps=2, batch_size=4, threads=1, device="cpu"
    )
    resumed(run, lambda trainer: None, steps=1_000_000)
    return run


def resumed(run: Run, fit: Callable[[Trainer], object], **more: Any) -> None:
    """`quire resume RUN` with another training loop."""
    its_own = Trainer.fit
    Trainer.fit = fit
    try:
        resume(run, **more)
    finally:
        Trainer.fit = its_own


def left_over(run: Run) -> list[str]:
    """Names that only an interrupted save leaves behind."""
    return [path.name for path in run.path.rglob("*") if path.suffix in (".new", ".old") or path.name == ".lock"]


# ---- kills --------------------------------------------------------------------------------------------------------


def kills(run: Run, count: int, seed: int = 0) -> Figures:
    """Kill a saving child `count` times; how often the run was unusable, had lost a save, or was left unclean."""
    generator = random.Random(seed)
    found: Counter[str] = Counter(kills=0, saves=0, reads=0, failed_reads=0, interrupted=0)
    found.update(unusable=0, saves_lost=0, leftovers=0)
    messages: set[str] = set()
    for _ in range(count):
        finished = _killed_child(run, generator.uniform(0, LONGEST), found, messages)
        found["kills"] += 1
        found["interrupted"] += any(name != ".lock" for name in left_over(run))
        try:
            checkpoint.load(run.folder("best"))
            step = _restart(run)
            found["saves_lost"] += step < finished
        except Exception as error:
            found["unusable"] += 1
            messages.add(f"{type(error).__name__}: {error}")
        found["leftovers"] += len(left_over(run))
    return {**found, "messages": sorted(messages)}


def _killed_child(run: Run, seconds: float, found: Counter[str], messages: set[str]) -> int:
    """Start a child that saves for ever, read its checkpoint meanwhile, kill it; the step of its last finished save."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            _save_for_ever(run, writing)
        finally:
            os._exit(1)  # never as a copy of the campaign
    os.close(writing)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found["reads"] += 1
        try:
            checkpoint.load(run.folder("last"))
        except Exception as error:
            found["failed_reads"] += 1
            messages.add(f"while saving: {error}")
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended by itself: it could not save"
    with os.fdopen(reading, "rb") as pipe:
        steps = [step for (step,) in struct.iter_unpack("i", pipe.read())]
    found["saves"] += 2 * len(steps)
    return max(steps, default=0)


def _save_for_ever(run: Run, finished: int) -> None:
    def fit(trainer: Trainer) -> None:
        trainer.wrap_model()
        while True:
            trainer.update()
            trainer.save("best")
            trainer.save("last")
            os.write(finished, struct.pack("i", trainer.state.step))

    resumed(run, fit)


def _restart(run: Run) -> int:
    """Resume the run for one step; the step it went on from."""
    steps = []

    def fit(trainer: Trainer) -> None:
        trainer.wrap_model()
        steps.append(trainer.state.step)
        trainer.update()

    resumed(run, fit)
    return steps[0]


# ---- damage -------------------------------------------------------------------------------------------------------


def flips(folder: Path, count: int, seed: int = 0) -> Figures:
    """Flip one bit of one file of the checkpoint in `folder`, `count` times; how many were loaded, or not named."""
    return _damaged(folder, count, seed, _flipped)


def truncations(folder: Path, count: int, seed: int = 0) -> Figures:
    """Cut one file of the checkpoint in `folder` off, `count` times; how many were loaded, or not named."""
    return _damaged(folder, count, seed, lambda data, place, bit: data[:place])


def run_flips(run: Run, count: int, seed: int = 0) -> Figures:
    """Flip one bit of each of the run's other checked files, `count` times."""
    uses: dict[str, Callable[[], object]] = {
        "config.toml": lambda: Run(run.path),
        "tokenizer.json": lambda: Run(run.path).tokenizer,
        "manifest.json": lambda: Run(run.path).manifest,
        "data/validation.bin": lambda: Run(run.path).validation_tokens(),
    }
    generator, found = random.Random(seed), Counter(tried=0, loaded=0, not_named=0)
    for name, use in uses.items():
        path = run.path / name
        data = path.read_bytes()
        for _ in range(count):
            place = generator.randrange(len(data))
            path.write_bytes(_flipped(data, place, generator.randrange(8)))
            _refused(use, [path.name], found)
        path.write_bytes(data)
    return dict(found)


def _damaged(folder: Path, count: int, seed: int, damage: Callable[[bytes, int, int], bytes]) -> Figures:
    generator, found = random.Random(seed), Counter(tried=0, loaded=0, not_named=0, in_a_tensor=0)
    names = [checkpoint.MODEL, checkpoint.TRAINING, checkpoint.STATE]
    for _ in range(count):
        path = folder / generator.choice(names)
        data = path.read_bytes()
        place = generator.randrange(len(data))
        changed = damage(data, place, generator.randrange(8))
        parts = [path.name]
        if len(changed) == len(data) and (tensor := tensor_at(data, place, path.name)):
            parts.append(tensor)
            found["in_a_tensor"] += 1
        path.write_bytes(changed)
        _refused(lambda: checkpoint.load(folder), parts, found)
        path.write_bytes(data)
    return dict(found)


def _flipped(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def _refused(use: Callable[[], object], parts: list[str], found: Counter[str]) -> None:
    found["tried"] += 1
    try:
        use()
    except UserError as error:
        found["not_named"] += not all(part in str(error) for part in parts)
    else:
        found["loaded"] += 1


def tensor_at(data: bytes, place: int, name: str) -> str | None:
    """The tensor in whose values that byte of a safetensors file lies, read from its header."""
    if name == checkpoint.STATE:
        return None
    header_size = int.from_bytes(data[:8], "little")
    for tensor, entry in json.loads(data[8 : 8 + header_size]).items():
        first, end = (8 + header_size + offset for offset in entry["data_offsets"])
        if first <= place < end:
            return tensor
    return None


# ---- a full disk --------------------------------------------------------------------------------------------------


def full_disk(run: Run) -> Figures:
    """Fail each change to the disk of a save in turn, in two ways; how often no checkpoint was left, or leftovers."""
    found: Counter[str] = Counter(failures=0, unusable=0, leftovers=0)
    resumed(run, lambda trainer: _fail_each_change(trainer, found))
    return dict(found)


def _fail_each_change(trainer: Trainer, found: Counter[str]) -> None:
    trainer.wrap_model()
    folder = trainer.run.folder("last")
    for half_written in (False, True):
        for number in range(1000):
            trainer.save("last")
            before = trainer.state.step
            trainer.update()
            with failing_at(number, half_written) as failed:
                try:
                    trainer.save("last")
                except OSError as error:
                    assert error.errno == errno.ENOSPC
            if not failed:
                break
            found["failures"] += 1
            try:
                found["unusable"] += checkpoint.load(folder).state["step"] not in (before, trainer.state.step)
            except UserError:
                found["unusable"] += 1
            files.sweep(folder.parent, checkpoint.STATE)
            found["leftovers"] += any(path.suffix in (".new", ".old") for path in folder.parent.rglob("*"))


@contextmanager
def failing_at(number: int, half_written: bool) -> Iterator[list[str]]:
    """Within, the change `number` (from 0) to the disk fails with ENOSPC; gives a list that is then not empty.

    `half_written`: only writes count, and half of the file has reached the disk when one fails.
    """
    operation, sync = files.operation, files._sync
    failed: list[str] = []
    seen = 0

    def full() -> OSError:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def counted(kind: str, path: Path) -> None:
        nonlocal seen
        if half_written and kind != "write":
            return
        if seen == number:
            failed.append(f"{kind} {path.name}")
            if not half_written:
                seen += 1
                raise full()
        seen += 1

    def cut_short(path: Path) -> None:
        if half_written and failed and path.is_file():
            os.truncate(path, path.stat().st_size // 2)
            raise full()
        sync(path)

    files.operation, files._sync = counted, cut_short
    try:
        yield failed
    finally:
        files.operation, files._sync = operation, sync


# ---- the campaign -------------------------------------------------------------------------------------------------

HARM = ("unusable", "saves_lost", "leftovers", "failed_reads", "loaded", "not_named")


def campaign(folder: Path, kill_count: int, flip_count: int, truncation_count: int, seed: int = 0) -> Figures:
    """All of it on one tiny run in `folder`: figures by kind of fault."""
    run = tiny_run(folder)
    figures = {"kills": kills(run, kill_count, seed)}
    last = run.folder("last")
    figures["flips"] = flips(last, flip_count, seed)
    figures["truncations"] = truncations(last, truncation_count, seed)
    figures["run flips"] = run_flips(run, flip_count // 4, seed)
    figures["full disk"] = full_disk(run)
    return figures


def harm(figures: Figures) -> int:
    """How many faults did harm."""
    return sum(found.get(name, 0) for found in figures.values() for name in HARM)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--truncations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/faults.json"))
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        os.environ["QUIRE_CACHE"] = folder
        figures = campaign(Path(folder), given.kills, given.flips, given.truncations, given.seed)
    for kind, found in figures.items():
        messages = found.pop("messages", [])
        print(f"{kind:12}" + ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in found.items()))
        print("".join(f"            {message}\n" for message in messages), end="")
    print(f"{harm(figures)} faults did harm; {time.monotonic() - began:.0f} s")
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if harm(figures) else 0


if __name__ == "__main__":
    sys.exit(main())
