"""Several processes under torchrun: whether they train as one does, what they gain, survive and cost.

    python benchmarks/many_processes.py [agree scaling kills checkpoint one_device] [--device cpu] [--json OUT]

Prints tables and writes JSON; parts that are not named stay there as they were. Exits with 1 where a curve differs.

agree        quire doctor --distributed on 1, 2, 3 and 4 processes: the largest relative difference of a loss in 50
             steps from one process, in each way to train, and whether all processes have the same parameters
scaling      tokens per second of 2 processes with a thread each against one process with one thread on one core, the
             same batch; and, as the machine's limit, of two such single trainings beside each other. Medians of rounds
             taken by turns, for two sizes of a step
kills        a training under torchrun in which a process is killed at 10 random steps: curve and weights against those
             of one that nobody killed, with copies (ddp) and with parts (fsdp)
checkpoint   seconds for which a save holds training up, until it is whole, and to load it: by one of two processes, and
             by each its own part, which goes on beside training
one_device   tokens per second with --parallel fsdp on one device against plain training there
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import ROOT, cores, environment, machine

OUT = ROOT / "benchmarks" / "results" / "many_processes.json"
KILLS, KILLED_STEPS, SEED = 10, 120, 0
ROUNDS, STEPS = 5, 30
TINY = {"layers": 1, "embedding-size": 16, "heads": 2, "context-length": 16, "dropout": 0.1}
MIDDLE = {"layers": 4, "embedding-size": 256, "heads": 4, "context-length": 128, "dropout": 0.0}
LARGE = {"layers": 8, "embedding-size": 512, "heads": 8, "context-length": 64, "dropout": 0.0}
Figures = dict[str, Any]
# What scaling trains: a preset as it is, and a step of half as many tokens that has more parameters to exchange.
SCALED: dict[str, Figures] = {
    "gpt-mini: 256 tokens each, 2.7 M parameters": {},
    "128 tokens each, 3.2 M parameters": MIDDLE,
}


def torchrun(processes: int, words: list[str], folder: Path, *options: str, **variables: str) -> str:
    """Standard output of WORDS in so many processes; RuntimeError where they fail."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
    quiet = {"OMP_NUM_THREADS": "1", "QUIRE_CACHE": str(folder / "cache"), **variables}
    done = subprocess.run([*launch, *words], cwd=folder, env=environment(**quiet), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}: {done.stderr[-3000:]}")
    return done.stdout


def a_text(folder: Path, words: int) -> Path:
    """A text of made-up words."""
    generator = random.Random(SEED)
    known = ["".join(generator.choices("abcdefghijklmnop", k=generator.randint(2, 7))) for _ in range(500)]
    path = folder / "text.txt"
    path.write_text(" ".join(generator.choices(known, k=words)))
    return path


def train(folder: Path, name: str, model: Figures, steps: int, *more: str) -> list[str]:
    """The words of a training of that text."""
    shape = [f"--model.{key}={value}" for key, value in model.items()]
    plain = ["--preset=gpt-mini", "--sample-tokens=0", f"--steps={steps}", "--threads=1", "--json"]
    return ["train", str(folder / "text.txt"), f"--run={folder / name}", *plain, *shape, *more]


def metrics(run: Path) -> list[Figures]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def agree(folder: Path, device: str) -> Figures:
    """The differences in each way, by the number of processes."""
    most = range(1, 5)
    if device == "cuda":
        import torch

        most = range(1, 1 + torch.cuda.device_count())
    found = {n: json.loads(torchrun(n, ["-m", "quire", "doctor", "--distributed", "--json"], folder)) for n in most}
    differences = {
        way["way"]: [found[n]["ways"][number]["difference"] for n in found]
        for number, way in enumerate(found[1]["ways"])
    }
    same = all(way["same_parameters"] for table in found.values() for way in table["ways"])
    print(*equality_table(differences), sep="\n")
    print(f"parameters in all processes: {'the same' if same else 'DIFFERENT'}")
    return {"steps": found[1]["steps"], "differences": differences, "same_parameters": same, "harm": not same}


def equality_table(differences: dict[str, list[float]]) -> list[str]:
    """The largest relative differences in Markdown, as docs/many-machines.md has them."""
    counts = range(1, 1 + len(next(iter(differences.values()))))
    head = f"| processes | {' | '.join(map(str, counts))} |"
    rows = [f"| {way} | {' | '.join(f'{one:.1e}' for one in each)} |" for way, each in differences.items()]
    return [head, "|---" * (1 + len(counts)) + "|", *rows]


def speed(run: Path) -> float:
    """Tokens per second in the middle of a run."""
    return statistics.median(row["tokens_per_second"] for row in metrics(run)[1:])


def scaling(folder: Path, device: str) -> Figures:
    """Two processes, one, and two single ones beside each other, by turns, for each of SCALED."""
    a_text(folder, 60_000)
    figures = {"sizes": {name: scaled(folder, name, shape, device) for name, shape in SCALED.items()}}
    print(*scaling_table(figures), sep="\n")
    return figures


def scaled(folder: Path, shape_name: str, shape: Figures, device: str) -> Figures:
    """The speeds with one shape."""
    rows = ["--batch-size=16", f"--evaluation-interval={10 * STEPS}", f"--device={device}"]
    found: dict[str, list[float]] = {"two": [], "one": [], "beside": []}

    def words(name: str) -> list[str]:
        return train(folder, f"{name}-{len(shape)}", shape, STEPS, *rows)

    def single(name: str, core: int) -> subprocess.Popen[bytes]:
        pinned = ["taskset", "-c", str(core)] if sys.platform == "linux" else []
        quiet = environment(OMP_NUM_THREADS="1", QUIRE_CACHE=str(folder / "cache"))
        command = [*pinned, sys.executable, "-m", "quire", *words(name)]
        return subprocess.Popen(command, env=quiet, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def speed_of(name: str) -> float:
        return speed(folder / f"{name}-{len(shape)}")

    for number in range(ROUNDS):
        torchrun(2, ["-m", "--", "quire", *words(f"two-{number}")], folder)
        found["two"].append(speed_of(f"two-{number}"))
        single(f"one-{number}", cores()[0]).wait()
        found["one"].append(speed_of(f"one-{number}"))
        both = [single(f"beside-{number}-{core}", core) for core in cores()[:2]]
        for process in both:
            process.wait()
        found["beside"].append(sum(speed_of(f"beside-{number}-{core}") for core in cores()[:2]))
        print(shape_name, f"round {number + 1}:", {name: each[-1] for name, each in found.items()}, file=sys.stderr)
    efficiency = [two / (2 * one) for two, one in zip(found["two"], found["one"], strict=True)]
    limit = [beside / (2 * one) for beside, one in zip(found["beside"], found["one"], strict=True)]
    return {"model": shape, "batch_size": 16, "tokens_per_second": found, "efficiency": efficiency, "limit": limit}


def scaling_table(figures: Figures) -> list[str]:
    """What two processes gain in Markdown, as docs/many-machines.md has it."""
    lines = ["| a batch of 16 | one process, tokens/s | two | of twice one | limit |", "|---|---|---|---|---|"]
    for name, found in figures["sizes"].items():
        one, two = (statistics.median(found["tokens_per_second"][count]) for count in ("one", "two"))
        shares = [
            f"{statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})"
            for each in (found["efficiency"], found["limit"])
        ]
        lines.append(f"| {name} | {one:,.0f} | {two:,.0f} | {shares[0]} | {shares[1]} |")
    return lines


KILLER = """
import os, signal
from pathlib import Path
from quire import processes
from quire.cli.main import main
from quire.training.loop import Trainer
step, kills = Trainer.step_optimizers, {kills}
def perhaps(trainer, loss):
    done = Path("killed-at-" + str(trainer.state.step))
    if kills.get(trainer.state.step) == processes.rank() and not done.exists():
        done.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    step(trainer, loss)
Trainer.step_optimizers = perhaps
main()
"""


def kills(folder: Path, device: str) -> Figures:
    """Ten kills in a training, with copies and with parts."""
    generator, found = random.Random(SEED), {}
    a_text(folder, 1500)
    for parallel in ("ddp", "fsdp"):
        at = {step: generator.randrange(2) for step in sorted(generator.sample(range(1, KILLED_STEPS), KILLS))}
        place = folder / parallel
        place.mkdir()
        (place / "killer.py").write_text(KILLER.format(kills=at))
        words = [f"--parallel={parallel}", "--batch-size=6", "--evaluation-interval=20", f"--device={device}"]
        torchrun(2, ["-m", "--", "quire", *train(folder, f"{parallel}/straight", TINY, KILLED_STEPS, *words)], place)
        killer = ["--", "killer.py", *train(folder, f"{parallel}/killed", TINY, KILLED_STEPS, *words)]
        torchrun(2, killer, place, f"--max-restarts={KILLS}")
        happened = len(list(place.glob("killed-at-*")))
        clocks = ("seconds", "tokens_per_second", "memory_bytes")
        curves = [[{key: row[key] for key in row if key not in clocks} for row in metrics(place / name)]
                  for name in ("straight", "killed")]  # fmt: skip
        same_curve, same_weights = curves[0] == curves[1], same_checkpoints(place / "straight", place / "killed")
        found[parallel] = {"killed": {str(step): rank for step, rank in at.items()}, "kills": happened,
                           "same_curve": same_curve, "same_weights": same_weights}  # fmt: skip
        print(f"{parallel}: killed {happened} times (process by step: {at}); the curve is"
              f" {'the same' if same_curve else 'DIFFERENT'}, weights and optimizer"
              f" {'the same bits' if same_weights else 'DIFFERENT'}")  # fmt: skip
    return {**found, "harm": not all(part["same_curve"] and part["same_weights"] and part["kills"] == KILLS
                                     for part in found.values())}  # fmt: skip


def same_checkpoints(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same bits."""
    import torch

    from quire import checkpoint

    mine, theirs = (checkpoint.load(run / "checkpoints" / "last") for run in (one, other))
    pairs = [(mine.model, theirs.model), (mine.training, theirs.training)]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


def timed(act: Callable[[], object]) -> float:
    """Wall seconds of it."""
    began = time.perf_counter()
    act()
    return time.perf_counter() - began


def save_and_load(folder: Path, device: str) -> None:
    """What each of two processes does for `checkpoint`."""
    import torch

    from quire.models.gpt import GPTSettings
    from quire.run import Run
    from quire.training.agreement import small_run
    from quire.training.distributed import join
    from quire.training.loop import Trainer
    from quire.training.settings import TrainingSettings

    world, found = join(600.0), {}
    small, tokens = small_run(folder / f"own-{world.rank}")
    run = Run(small.path)
    run.__dict__["settings"] = GPTSettings(
        **{**vars(small.settings), **{k.replace("-", "_"): v for k, v in LARGE.items()}}
    )
    for parallel in ("ddp", "fsdp"):
        settings = TrainingSettings(steps=99, parallel=parallel, batch_size=4)  # type: ignore[arg-type]
        trainer = Trainer(run, settings, tokens, torch.device(device), time.time())
        trainer.begin()
        trainer.wrap_model()
        trainer.update()
        trainer.saving.run = Run(folder / "own-0")
        held, whole, loads = [], [], []
        for _ in range(3):
            world.meet()
            held.append(timed(lambda trainer=trainer: trainer.saving.save("last", trainer.state)))
            began = time.perf_counter()
            trainer.saving.finish()
            world.meet()
            whole.append(held[-1] + time.perf_counter() - began)
            place = folder / "own-0" / "checkpoints" / "last"
            loads.append(timed(lambda trainer=trainer, place=place: trainer.saving.load(place)))
        size = sum(file.stat().st_size for file in place.iterdir())
        found[parallel] = {"bytes": size, "holds_up_seconds": held, "until_whole_seconds": whole, "load_seconds": loads}
    if world.leads:
        (folder / "checkpoint.json").write_text(json.dumps(found))


def checkpoint(folder: Path, device: str) -> Figures:
    """What saving and loading takes."""
    torchrun(2, ["--", str(Path(__file__).resolve()), "--save-and-load", str(folder), "--device", device], folder)
    found: Figures = json.loads((folder / "checkpoint.json").read_text())
    print(*checkpoint_table(found), sep="\n")
    return {"model": LARGE, **found}


def checkpoint_table(found: Figures) -> list[str]:
    """Seconds in Markdown, as docs/many-machines.md has them."""
    rows = []
    for parallel, name in {"ddp": "one process writes all (ddp)", "fsdp": "each writes its part (fsdp)"}.items():
        part = found[parallel]
        medians = [statistics.median(part[f"{each}_seconds"]) for each in ("holds_up", "until_whole", "load")]
        rows.append(f"| {name} | {part['bytes'] / 1e6:,.0f} | {' | '.join(f'{each:.2f}' for each in medians)} |")
    return ["| | MB | holds training up, s | whole after, s | loaded in, s |", "|---|---|---|---|---|", *rows]


def one_device(folder: Path, device: str) -> Figures:
    """FSDP on one device against plain training, by turns."""
    a_text(folder, 60_000)
    steps, shape = (STEPS, MIDDLE) if device == "cpu" else (300, {**LARGE, "layers": 12, "embedding-size": 768,
                                                                 "heads": 12, "context-length": 1024})  # fmt: skip
    words = [f"--device={device}", "--batch-size=16", f"--evaluation-interval={10 * steps}", "--compile=no"]
    found: dict[str, list[float]] = {"ddp": [], "fsdp": []}
    for number in range(ROUNDS):
        for parallel, speeds in found.items():
            name = f"{parallel}-{number}"
            torchrun(
                1, ["-m", "--", "quire", *train(folder, name, shape, steps, *words, f"--parallel={parallel}")], folder
            )
            speeds.append(speed(folder / name))
    ratios = [sharded / plain for sharded, plain in zip(found["fsdp"], found["ddp"], strict=True)]
    print(f"fsdp on one device / plain: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    return {"model": shape, "tokens_per_second": {"plain": found["ddp"], "fsdp": found["fsdp"]}, "ratios": ratios}


PARTS = {"agree": agree, "scaling": scaling, "kills": kills, "checkpoint": checkpoint, "one_device": one_device}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, default=OUT)
    parser.add_argument("--save-and-load", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.save_and_load:
        save_and_load(given.save_and_load, given.device)
        return 0
    if unknown := set(given.parts) - set(PARTS):
        parser.error(f"there is no part {', '.join(unknown)}")
    kept = json.loads(given.json.read_text()) if given.json.exists() else {}
    for name in given.parts or PARTS:
        print(f"\n{name}")
        with tempfile.TemporaryDirectory() as folder:
            kept[name] = {**PARTS[name](Path(folder), given.device), "machine": machine(given.device)}
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(kept, indent=1) + os.linesep)
    return int(any(part.get("harm") for part in kept.values()))


if __name__ == "__main__":
    sys.exit(main())
