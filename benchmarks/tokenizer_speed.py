"""Byte-level BPE beside its peers: the seconds to train, megabytes encoded a second, two cores, and linear time.

    python benchmarks/tokenizer_speed.py [--data ../shared/data] [--megabytes 12] [--rounds 3] [--json OUT]

Prints tables and writes JSON. Under nine minutes. Peers that are not installed are left out, with a sentence.

text       the novels, encyclopedia articles, plays and passages of ../shared/data, each once; where that is less than
           --megabytes, from the beginning again (the table says how much of it)
train      32,768 tokens by the pattern of GPT-2, from texts of about 16 KB. `reference` is Quire without its C core
encode     the same texts with the core's merges. `cold`: an encoder that has met no piece yet; `warm`: once more.
           All must give as many ids
figures    each measurement is a process of its own, on one thread: CPU seconds, the median of interleaved rounds;
           with two threads: wall seconds
scaling    the core on ten times the text, in parts of a megabyte, with one thread and with one for each core
linear     CPU seconds for a text ten times as long, of few letters, of white space, of no white space: the goal is
           at most 12 times as many
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

TEXTS = ["jules_verne_4M.txt", "wikitext2_test.txt", "wikitext2_valid.txt", "tinyshakespeare.txt", "lambada_test.jsonl"]
SIZE = 32768
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TOOLS = {
    "train": ["huggingface", "rustbpe", "reference", "core"],
    "encode": ["huggingface", "tiktoken", "reference", "core"],
}
PACKAGES = {"huggingface": "tokenizers", "rustbpe": "rustbpe", "tiktoken": "tiktoken"}
GOALS = [("train", "rustbpe", 3), ("train", "huggingface", 8), ("encode", "tiktoken", 3), ("encode", "huggingface", 15)]
LINEAR = ["one letter", "spaces", "newlines", "acgt", "CJK", "base64"]
Figures = dict[str, Any]


# ---- the text -----------------------------------------------------------------------------------------------------


def text_of(data: Path, size: int) -> tuple[str, int]:
    """Real text of `size` bytes, and how many of them stand there a second time."""
    missing = [name for name in TEXTS if not (data / name).is_file()]
    if missing:
        sys.exit(f"{data / missing[0]} is absent: give --data, a folder with {', '.join(TEXTS)}.")
    whole = "".join((data / name).read_bytes().decode() for name in TEXTS).encode()
    text = (whole * (1 + size // len(whole)))[:size]
    return text.decode("utf-8", "ignore"), max(0, size - len(whole))


def blocks(text: str, size: int = 1 << 14) -> list[str]:
    """The text in parts of about `size` characters that end at the end of a line."""
    parts: list[str] = [""]
    for line in text.splitlines(keepends=True):
        if len(parts[-1]) >= size:
            parts.append("")
        parts[-1] += line
    return parts


# ---- one measurement, in a process of its own ---------------------------------------------------------------------


def timed(work: Callable[[], Any]) -> tuple[Any, Figures]:
    """What `work` gives, and its seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}


def train(tool: str, parts: list[str], threads: int) -> Figures:
    """Training SIZE tokens."""
    if tool == "huggingface":
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=SIZE, initial_alphabet=alphabet, show_progress=False)
        return timed(lambda: made.train_from_iterator(parts, trainer))[1]
    if tool == "rustbpe":
        import rustbpe

        other = rustbpe.Tokenizer()
        return timed(lambda: other.train_from_iterator(iter(parts), SIZE, pattern=GPT2))[1]
    from quire.tokenizers import ByteBPETokenizer

    use(tool)
    ours, seconds = timed(lambda: ByteBPETokenizer.train(parts, SIZE, threads=threads))
    return {**seconds, "tokens": ours.vocabulary_size}


def encode(tool: str, parts: list[str], threads: int, file: Path) -> Figures:
    """Encoding with the tokenizer of `file`: an encoder that is new, and once more."""
    work = encoder(tool, parts, threads, file)
    tokens, cold = timed(work)
    again, warm = timed(work)
    assert tokens == again
    return {**cold, "warm": warm["cpu"], "tokens": tokens}


def encoder(tool: str, parts: list[str], threads: int, file: Path) -> Callable[[], int]:
    """What encodes all parts and counts the ids; all that it needs is ready, and no piece has been met."""
    if tool == "huggingface":
        from tokenizers import Tokenizer

        theirs = Tokenizer.from_file(str(file))
        return lambda: sum(len(row.ids) for row in theirs.encode_batch_fast(parts, add_special_tokens=False))
    from quire.tokenizers import ByteBPETokenizer, load_tokenizer

    ours = load_tokenizer(file)
    assert isinstance(ours, ByteBPETokenizer)
    if tool == "tiktoken":
        import tiktoken

        ranks = {token: number for number, token in enumerate(ours.tokens) if token}
        other = tiktoken.Encoding("ours", pat_str=GPT2, mergeable_ranks=ranks, special_tokens={})
        if threads == 1:
            return lambda: sum(len(other.encode_ordinary(part)) for part in parts)
        return lambda: sum(map(len, other.encode_ordinary_batch(parts, num_threads=threads)))
    use(tool)
    pool = ThreadPoolExecutor(threads)
    list(pool.map(ours.encode_array, ["a"] * threads))
    if threads == 1:
        return lambda: sum(len(ours.encode_array(part)) for part in parts)
    return lambda: sum(map(len, pool.map(ours.encode_array, parts)))


def linear(tool: str, kind: str, file: Path) -> Figures:
    """Encoding and training a text of one kind and one ten times as long, in turn; the least of five."""
    from quire.tokenizers import ByteBPETokenizer, core, load_tokenizer

    use(tool)
    ours = load_tokenizer(file)
    assert isinstance(ours, ByteBPETokenizer)
    size, merges = (1_000_000, SIZE) if tool == "core" else (10_000, 64)
    texts = {"short": monotonous(kind, size), "long": monotonous(kind, 10 * size)}
    runs: dict[str, dict[str, list[float]]] = {task: {"short": [], "long": []} for task in ("encode", "train")}
    for _ in range(5):
        for name, data in texts.items():
            fresh = core.Encoder(ours.tokens, ours.merges, {}, "gpt2")
            fresh.encode(b"a")
            runs["encode"][name].append(timed(partial(fresh.encode, data))[1]["cpu"])
            runs["train"][name].append(timed(partial(core.learn, [data], "gpt2", merges, 1))[1]["cpu"])
    found = {task: {name: min(each) for name, each in of.items()} for task, of in runs.items()}
    return {task: {**each, "ratio": each["long"] / each["short"]} for task, each in found.items()}


def monotonous(kind: str, size: int) -> bytes:
    """About `size` bytes of what the worst cases are made of."""
    import base64

    rng = random.Random(0)
    if kind == "CJK":
        return "".join(map(chr, rng.choices(range(0x4E00, 0x9FA6), k=size // 3))).encode()
    if kind == "base64":
        return base64.b64encode(rng.randbytes(size * 3 // 4))
    letters = {"one letter": "a", "spaces": " ", "newlines": "\n", "acgt": "acgt"}[kind]
    return "".join(rng.choices(letters, k=size)).encode()


def use(tool: str) -> None:
    """Quire with its core, or as where it is not compiled."""
    from quire.tokenizers import core

    if tool == "reference":
        core.fast = None
    elif core.fast is None:
        sys.exit("the C core is not compiled: install Quire where there is a C compiler")


def child(given: argparse.Namespace) -> Figures:
    """The measurement that this process is for."""
    task, tool, *rest = given.measure
    if task == "linear":
        return linear(tool, rest[0], given.file)
    parts = blocks(given.text.read_bytes().decode())
    threads = int(rest[0])
    return train(tool, parts, threads) if task == "train" else encode(tool, parts, threads, given.file)


# ---- all of them --------------------------------------------------------------------------------------------------


def measure(folder: Path, *what: str) -> Figures:
    """A measurement in a fresh process. -P: so that `import tokenizers` finds the package, not this file."""
    threads = what[2] if what[0] != "linear" else "1"
    environment = {**os.environ, "RAYON_NUM_THREADS": threads, "OMP_NUM_THREADS": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "true" if threads != "1" else "false"
    files = ["--text", str(folder / "text.txt"), "--file", str(folder / "tokenizer.json")]
    command = [sys.executable, "-P", __file__, *files, "--measure", *what]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(what)}: {done.stderr.strip()}")
    figures: Figures = json.loads(done.stdout)
    return figures


def rounds(folder: Path, number: int, cores: int) -> dict[str, list[Figures]]:
    """Everything that is compared, in turn, `number` times."""
    found: dict[str, list[Figures]] = {}
    for turn in range(number):
        for task, tools in TOOLS.items():
            for tool in tools:
                if tool in PACKAGES and not installed(PACKAGES[tool]):
                    if not turn:
                        print(f"{tool} is left out: pip install {PACKAGES[tool]}")
                    continue
                for threads in ["1"] if tool == "reference" or cores < 2 else ["1", "2"]:
                    found.setdefault(f"{task} {tool} {threads}", []).append(measure(folder, task, tool, threads))
        print(f"round {turn + 1} of {number} is done", file=sys.stderr)
    return found


def installed(package: str) -> str:
    """The version of a package, or nothing."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def table(found: dict[str, list[Figures]], megabytes: float) -> Figures:
    """Medians, their ratios and what two threads gain, printed and returned."""

    def median(task: str, tool: str, threads: int, key: str) -> float | None:
        runs = found.get(f"{task} {tool} {threads}")
        return statistics.median(run[key] for run in runs) if runs else None

    results: Figures = {}
    for task, tools in TOOLS.items():
        ours = median(task, "core", 1, "cpu")
        assert ours
        print(f"\n{task:12} CPU seconds   MB a second   warm   core is faster by   wall, 1 thread   2 threads")
        for tool in tools:
            if (cpu := median(task, tool, 1, "cpu")) is None:
                continue
            row = {"cpu_seconds": cpu, "megabytes_a_second": megabytes / cpu, "core_is_faster_by": cpu / ours}
            row |= {f"wall_seconds_{n}": wall for n in (1, 2) if (wall := median(task, tool, n, "wall"))}
            if task == "encode" and (warm := median(task, tool, 1, "warm")):
                row["megabytes_a_second_warm"] = megabytes / warm
            results[f"{task} {tool}"] = row
            warm_shown, two = row.get("megabytes_a_second_warm", 0), row.get("wall_seconds_2", 0)
            print(
                f"{tool:12} {cpu:11.2f} {megabytes / cpu:13.1f} {warm_shown or '':{'6.1f' if warm_shown else '>6'}}"
                f" {cpu / ours:19.1f} {row['wall_seconds_1']:16.2f} {two or '':{'11.2f' if two else '>11'}}"
            )
    counts = {run["tokens"] for name, runs in found.items() if name.startswith("encode") for run in runs}
    assert len(counts) == 1, f"the tools do not give as many ids: {counts}"
    print()
    for task, tool, goal in GOALS:
        if row := results.get(f"{task} {tool}"):
            word = "reached" if row["core_is_faster_by"] >= goal else "MISSED"
            print(f"{task}: at least {goal} times as fast as {tool}: {word} ({row['core_is_faster_by']:.1f})")
    return results


def scaling_table(text: str, cores: int) -> Figures:
    """Wall seconds of the core on ten times the text, in parts of a megabyte, by threads; the least of three."""
    from quire.tokenizers import ByteBPETokenizer

    parts = blocks(text, 1 << 20) * 10
    ours = ByteBPETokenizer.train(blocks(text), SIZE)
    found: Figures = {}
    print(f"\ncore, {sum(map(len, parts)) / 1e6:.0f} M characters   train, wall seconds   encode")
    for threads in (1, cores):
        runs = [(train("core", parts, threads)["wall"], timed(many(ours, parts, threads))[1]["wall"]) for _ in range(3)]
        found[f"{threads} threads"] = least = dict(zip(("train", "encode"), map(min, zip(*runs))))
        print(f"{threads} thread{'s' * (threads > 1):12}{least['train']:26.2f}{least['encode']:11.2f}")
    return found


def many(ours: Any, parts: list[str], threads: int) -> Callable[[], int]:
    """What encodes all parts in threads, the encoders of all of them new."""
    from quire.tokenizers import core

    fresh, data = core.Encoder(ours.tokens, ours.merges, {}, "gpt2"), [part.encode() for part in parts]
    return lambda: sum(map(len, ThreadPoolExecutor(threads).map(fresh.encode, data)))


def linear_table(folder: Path) -> Figures:
    """How the time grows, for the core and for the reference."""
    found: Figures = {}
    for tool, sizes in (("core", "1 MB and 10 MB"), ("reference", "10 KB and 100 KB")):
        print(f"\n{tool}: {sizes:24} encode, ratio      train, ratio   (goal: at most 12)")
        for kind in LINEAR:
            found[f"{tool} {kind}"] = row = measure(folder, "linear", tool, kind)
            shown = "".join(
                f" {row[task]['short']:7.3f} {row[task]['long']:7.3f} {row[task]['ratio']:5.1f}"
                f"{' ' if row[task]['ratio'] <= 12 else '!'}"
                for task in ("encode", "train")
            )
            print(f"{kind:20}{shown}")
    return found


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder of texts")
    parser.add_argument("--megabytes", type=float, default=12.0, help="of text")
    parser.add_argument("--rounds", type=int, default=3, help="times that everything is measured")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/tokenizer_speed.json"))
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--text", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(child(given)))
        return
    sys.path = [place for place in sys.path if Path(place or ".").resolve() != Path(__file__).resolve().parent]
    from quire.devices import usable_cores
    from quire.tokenizers import ByteBPETokenizer

    text, again = text_of(given.data, int(given.megabytes * 1e6))
    size = len(text.encode())
    print(f"text: {size / 1e6:.1f} MB of {', '.join(TEXTS)}; {again / 1e6:.1f} MB of it a second time")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "text.txt").write_bytes(text.encode())
        ByteBPETokenizer.train(blocks(text), SIZE).save(folder / "tokenizer.json")
        compared = table(rounds(folder, given.rounds, usable_cores()), size / 1e6)
        scaling = scaling_table(text, usable_cores())
        grown = linear_table(folder)
    figures = {
        "machine": {"platform": platform.platform(), "cores": usable_cores(), "python": platform.python_version()},
        "versions": {name: version for name in PACKAGES.values() if (version := installed(name))},
        "text": {"bytes": size, "bytes_repeated": again, "of": TEXTS},
        "rounds": given.rounds,
        "compared": compared,
        "scaling": scaling,
        "linear": grown,
    }
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
