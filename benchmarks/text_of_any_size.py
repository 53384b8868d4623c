"""Text of any size: gigabytes of text to token shards, the memory that takes, and a kill in the middle.

    python benchmarks/text_of_any_size.py [--gigabytes 1] [--tokenizer character] [--vocabulary-size N]

Makes text from a seeded vocabulary of made-up words, and from ../shared/data where that is there; reads, fits and
encodes it in a process of its own, as `quire train` does; then does so again with an empty cache, kills that call with
SIGKILL when half of its shards are finished, calls again, and compares every byte. Linux: memory is read from /proc,
every 20 ms, of the process and its workers; pages that several of them share count in each.
Prints a table and writes JSON.
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
FILE = 64_000_000  # bytes of a file of the text

PREPARE = """
import json, sys, time
from quire.data.prepare import prepare
from quire.data.reading import DataSettings, read

began = time.perf_counter()
corpus = read([sys.argv[1]], DataSettings())
spooled = time.perf_counter()
found = prepare(corpus, sys.argv[2], None, int(sys.argv[3]))
ended = time.perf_counter()
assert "torch" not in sys.modules
print(json.dumps({"reading": spooled - began, "fitting_and_encoding": ended - spooled, "tokens": found.report["tokens"],
                  "documents": found.report["documents"], "vocabulary": found.report["vocabulary"]}))
"""


def main() -> None:
    """Make the text, measure one call, kill another, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--tokenizer", default="character")
    parser.add_argument("--vocabulary-size", type=int, default=0)
    parser.add_argument("--folder", help="where the text and the caches go for the while (default: a temporary folder)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/text_of_any_size.json"))
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        size = make_text(folder / "text", int(given.gigabytes * 1e9))
        kind = (given.tokenizer, str(given.vocabulary_size))
        row = measured(Call(folder, "straight", kind))
        row |= killed_and_called_again(folder, kind)
    row |= {"megabytes": size / 1e6, "megabytes_per_second": size / 1e6 / row["seconds"], "tokenizer": given.tokenizer}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"machine": machine(), "run": row}, indent=1) + "\n")
    for key, value in row.items():
        print(f"{key.replace('_', ' '):34}", f"{value:,.1f}" if isinstance(value, float) else value)


def make_text(folder: Path, size: int) -> int:
    """Files of text of about `size` bytes together; gives their exact size."""
    folder.mkdir()
    generator = random.Random(1)
    letters = "etaoinshrdlucmfwypvbgkjqxz" + "éäñøж森"
    weights = [1 / (rank + 2) for rank in range(len(letters))]
    words = ["".join(generator.choices(letters, weights, k=generator.randint(1, 10))) for _ in range(50_000)]
    frequency = [1 / (rank + 1) for rank in range(len(words))]  # Zipf's law
    real = b"".join(path.read_bytes() for path in sorted(SHARED.glob("*.txt"))) if SHARED.exists() else b""
    done = number = 0
    while done < size:
        with open(folder / f"{number:03}.txt", "wb") as file:
            file.write(real[: max(0, size - done)])
            while file.tell() < min(FILE, size - done):
                drawn = generator.choices(words, frequency, k=20_000)
                lines = [" ".join(drawn[i : i + generator.randint(3, 30)]) + ".\n" for i in range(0, len(drawn), 16)]
                file.write("".join(lines).encode())
            done += file.tell()
        number += 1
    return done


class Call:
    """A process that prepares the text, with a cache of its own name."""

    def __init__(self, folder: Path, cache: str, kind: tuple[str, str]) -> None:
        self.cache = folder / cache
        environment = {**os.environ, "QUIRE_CACHE": str(self.cache), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", PREPARE, str(folder / "text"), *kind]
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    def family(self) -> list[int]:
        """The process and its workers."""
        found = [self.process.pid]
        for task in Path(f"/proc/{self.process.pid}/task").glob("*/children"):
            found += map(int, task.read_text().split())
        return found

    def finished(self) -> int:
        """Shards that are finished by now."""
        return sum(path.read_text().count("\n") for path in self.cache.glob("tokens/*/finished.jsonl"))

    def stamps(self) -> dict[str, tuple[int, int]]:
        """What changes where a file is written again."""
        found = {path.name: path.stat() for path in self.cache.glob("tokens/*/*.bin")}
        return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


def resident(pid: int) -> int:
    """Resident bytes of a process; 0 where it has gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def measured(call: Call) -> dict[str, Any]:
    """Wait for a call, and watch its memory."""
    began, alone, together, processes = time.perf_counter(), 0, 0, 1
    while call.process.poll() is None:
        try:
            sizes = [resident(pid) for pid in call.family()]
        except OSError:
            continue
        alone, together, processes = max(alone, sizes[0]), max(together, sum(sizes)), max(processes, len(sizes))
        time.sleep(0.02)
    seconds = time.perf_counter() - began
    assert call.process.returncode == 0 and call.process.stdout is not None
    said = json.loads(call.process.stdout.read())
    return {
        "seconds": seconds,
        "seconds_reading": said.pop("reading"),
        "seconds_fitting_and_encoding": said.pop("fitting_and_encoding"),
        **said,
        "processes": processes,
        "peak_megabytes_main_process": alone / 1e6,
        "peak_megabytes_all_processes": together / 1e6,
    }


def killed_and_called_again(folder: Path, kind: tuple[str, str]) -> dict[str, Any]:
    """Kill a call when half of the shards are finished, and call again."""
    straight = {path.name: path for path in (folder / "straight").glob("tokens/*/*.bin")}
    killed = Call(folder, "killed", kind)
    while killed.finished() < max(1, len(straight) // 2):
        assert killed.process.poll() is None, "the call ended before it could be killed"
        time.sleep(0.005)
    workers = killed.family()[1:]
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    time.sleep(2)
    left = [pid for pid in workers if resident(pid)]
    finished, before = killed.finished(), killed.stamps()
    again = Call(folder, "killed", kind)
    second = measured(again)
    after = again.stamps()
    kept = sum(after[name] == stamp for name, stamp in before.items())
    first = {str(path.relative_to(folder / "straight")): path for path in (folder / "straight").glob("tokens/*/*")}
    other = {str(path.relative_to(folder / "killed")): path for path in (folder / "killed").glob("tokens/*/*")}
    same = first.keys() == other.keys() and all(first[n].read_bytes() == other[n].read_bytes() for n in first)
    return {
        "shards": len(straight),
        "shards_finished_at_the_kill": finished,
        "shards_not_written_again": kept,
        "workers_left_after_the_kill": len(left),
        "seconds_of_the_second_call": second["seconds"],
        "same_bytes_after_the_kill": same,
    }


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": name, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


if __name__ == "__main__":
    main()
