"""A training step of GPT-2 (124 million parameters): Quire beside nanoGPT and transformers, and beside the hardware.

    python benchmarks/gpt2_step.py --nanogpt CHECKOUT [--rounds 3] [--steps 5] [--threads N] [--device cuda]

--nanogpt is a checkout of karpathy/nanoGPT: its own model and optimizer, with the settings of its train.py (no biases,
a vocabulary of 50,304), eager and compiled. transformers' GPT2LMHeadModel trains with torch's fused AdamW, dropout off.
All clip the gradient to a norm of 1, as nanoGPT does, and train on the same random tokens: 4 windows of 256 in float32
on a CPU, 16 of 1,024 under bfloat16 autocast on a GPU.

Every round trains each of them for some steps in a process of its own, so that what slows the machine down meets all.
Right before and after them the same process multiplies matrices of the model's shapes: the best of them is the peak.
What a step reaches of it counts 6 N + 12 L C T operations a token, for N parameters without position embeddings, L
layers, C channels, T tokens of context (Chowdhery et al. 2022, appendix B; nanoGPT's formula). Ratios are medians over
the rounds, each to nanoGPT compiled in the same round.

A contender's finished rounds are not measured again: delete the JSON to begin anew. llm.c is left out: its CPU program
reads a checkpoint that it must download, and was several times slower than PyTorch on the machine where it was tried.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from command import machine
from torch import Tensor, nn

from quire.data.batches import Batch
from quire.devices import keep_freed_memory, set_threads
from quire.models import build_model
from quire.training.engines import ENGINES
from quire.training.optimizers import OPTIMIZERS
from quire.training.precision import Precision, compiled
from quire.training.settings import layered, typed

Step = Callable[[], Any]
PEER = "nanoGPT, compiled"
GPT2 = {"vocabulary": 50257, "layers": 12, "heads": 12, "channels": 768}
SHAPES = {"cpu": (4, 256), "cuda": (16, 1024)}  # windows, tokens of each
RATE, DECAY, BETAS, CLIP = 6e-4, 0.1, (0.9, 0.95), 1.0
WARM = 2  # steps before the clock starts, in which things are compiled and memory is fetched


def main() -> None:
    """Measure what is missing, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="measured in a round")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    parser.add_argument("--device", default="cpu", choices=SHAPES)
    parser.add_argument("--shape", nargs=2, type=int, metavar=("WINDOWS", "TOKENS"))
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--model", type=json.loads, default={}, help="another model's sizes, as JSON: " + str(GPT2))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.shape = given.shape or SHAPES[given.device]
    given.model = GPT2 | given.model
    if given.cell:
        print(json.dumps(measured(given)))
        return
    path = given.json or Path(f"benchmarks/results/gpt2_step_{given.device}.json")
    cells = measure_missing(given, path)
    show(cells, given)


def measure_missing(given: argparse.Namespace, path: Path) -> dict[str, dict[str, Any]]:
    """Every contender's cells, by "round, name"; each is written as soon as it is there."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"cells": {}}
    asked = {"shape": list(given.shape), "model": given.model, "device": given.device, "threads": given.threads}
    if record.setdefault("asked", asked) != asked:
        sys.exit(f"{path} has measurements of something else ({record['asked']}). Name another file with --json.")
    record["machine"] = machine(given.device)
    for turn in range(given.rounds):
        for name in given.only:
            if (key := f"{turn + 1}, {name}") in record["cells"]:
                continue
            if name.startswith("nanoGPT") and given.nanogpt is None:
                continue
            done = subprocess.run(
                [sys.executable, __file__, *sys.argv[1:], "--cell", name], stdout=subprocess.PIPE, text=True
            )
            if done.returncode:
                print(f"{name}: failed, see above", flush=True)
                continue
            record["cells"][key] = cell = json.loads(done.stdout.splitlines()[-1])
            print(
                "{key:28}{tokens_per_second:10.0f} tokens/s{share:8.1%} of the peak".format(key=key, **cell), flush=True
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
    return record["cells"]


def show(cells: dict[str, dict[str, Any]], given: argparse.Namespace) -> None:
    """The table: medians over the rounds, and the range of the ratios."""
    print(f"\n{'':24}{'ms a step':>11}{'tokens/s':>10}{'peak':>9}{'of peak':>9}{'MB':>8}   times {PEER}")
    for name in given.only:
        mine = {turn: cells[key] for turn in range(given.rounds) if (key := f"{turn + 1}, {name}") in cells}
        if not mine:
            continue
        middle = {key: statistics.median(cell[key] for cell in mine.values()) for key in next(iter(mine.values()))}
        ratios = [cell["tokens_per_second"] / cells[peer]["tokens_per_second"] for turn, cell in mine.items()
                  if (peer := f"{turn + 1}, {PEER}") in cells]  # fmt: skip
        times = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else ""
        print(f"{name:24}{middle['milliseconds']:11.1f}{middle['tokens_per_second']:10.0f}{middle['peak_gflops']:9.0f}"
              f"{middle['share']:9.1%}{middle['megabytes']:8.0f}   {times}")  # fmt: skip


# ---- one contender in its own process ----


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Time and share of the peak of one contender's step."""
    set_threads(given.threads)
    if given.device == "cuda":  # as nanoGPT's train.py
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    device, (windows, length) = torch.device(given.device), given.shape
    torch.manual_seed(1337)
    ids = torch.randint(given.model["vocabulary"], (windows, length + 1), device=device)
    x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    silent = contextlib.redirect_stdout(io.StringIO())
    with silent:
        step, parameters = CONTENDERS[given.cell](given, device, x, y)
    begun = time.perf_counter()
    losses = [float(step()) for _ in range(WARM)]
    first = time.perf_counter() - begun
    before = peak(given, device)
    times = []
    for _ in range(given.steps):
        begun = time.perf_counter()
        losses.append(float(step()))  # which waits for a GPU, too
        times.append(time.perf_counter() - begun)
    best = max(before, peak(given, device))
    sizes = given.model
    per_token = 6 * parameters + 12 * sizes["layers"] * sizes["channels"] * length
    seconds = statistics.median(times)
    return {
        "milliseconds": round(seconds * 1e3, 2), "tokens_per_second": round(windows * length / seconds, 1),
        "peak_gflops": round(best, 1), "share": round(per_token * windows * length / seconds / best / 1e9, 4),
        "megabytes": round(memory(device) / 1e6), "start_seconds": round(first, 1), "loss": round(losses[-1], 4),
    }  # fmt: skip


def memory(device: torch.device) -> int:
    """The most in use so far, in bytes."""
    from quire.devices import peak_memory

    return peak_memory(device)


def peak(given: argparse.Namespace, device: torch.device, seconds: float = 0.4) -> float:
    """The most operations a second, in billions, of products as the model has them: rows x C by C x 4 C, and square."""
    rows, channels = given.shape[0] * given.shape[1], given.model["channels"]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    best = 0.0
    shapes = [(rows, channels, 4 * channels), (rows, 4 * channels, channels), (rows, channels, channels)]
    if device.type == "cuda":
        shapes.append((8192, 8192, 8192))
    for n, inner, outputs in shapes:
        a, b = (torch.randn(shape, device=device, dtype=dtype) for shape in ((n, inner), (inner, outputs)))
        a @ b
        wait(device)
        until = time.perf_counter() + seconds
        while (begun := time.perf_counter()) < until:
            for _ in range(10 if device.type == "cuda" else 1):
                a @ b
            wait(device)
            each = (time.perf_counter() - begun) / (10 if device.type == "cuda" else 1)
            best = max(best, 2 * n * inner * outputs / each / 1e9)
    return best


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """nanoGPT's and transformers' precision: Quire's own choice for the device."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def quire(engine: str, compile: str) -> Callable[..., tuple[Step, int]]:
    """Quire's preset gpt2, as its training loop takes a step."""

    def made(given: argparse.Namespace, device: torch.device, x: Tensor, y: Tensor) -> tuple[Step, int]:
        keep_freed_memory()
        sizes, length = given.model, x.shape[1]
        flags = {"training": {"engine": engine, "compile": compile, "batch_size": len(x)}}
        settings = typed(layered("gpt2", None, flags)).with_model(
            vocabulary_size=sizes["vocabulary"], separator=0, context_length=length, layers=sizes["layers"],
            heads=sizes["heads"], embedding_size=sizes["channels"],
        )  # fmt: skip
        model = build_model(settings.model).to(device).train()
        precision, batch = Precision("auto", device), Batch(x, y, y.numel())
        optimizers = OPTIMIZERS["adamw"](model, settings.training)
        wrapped = compiled(model, settings.training, precision, sizes["vocabulary"], length)
        assert (wrapped is not model) == (compile == "yes"), "it was not compiled"

        def step() -> Tensor:
            with precision.autocast():
                loss = ENGINES[engine].backpropagate(wrapped, batch, 1.0)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            return loss

        return step, counted(model, model.positions)

    return made


def nanogpt(compile: bool) -> Callable[..., tuple[Step, int]]:
    """nanoGPT's model and optimizer, and the inside of its train.py's loop."""

    def made(given: argparse.Namespace, device: torch.device, x: Tensor, y: Tensor) -> tuple[Step, int]:
        sys.path.insert(0, str(given.nanogpt))
        from model import GPT, GPTConfig  # type: ignore[import-not-found]  # of the checkout

        sizes = given.model
        vocabulary = sizes["vocabulary"] + -sizes["vocabulary"] % 64  # 50,304, as in its train.py
        model = GPT(GPTConfig(
            block_size=x.shape[1], vocab_size=vocabulary, n_layer=sizes["layers"], n_head=sizes["heads"],
            n_embd=sizes["channels"], dropout=0.0, bias=False,
        )).to(device)  # fmt: skip
        optimizer = model.configure_optimizers(DECAY, RATE, BETAS, device.type)
        called = torch.compile(model) if compile else model
        return one_step(model, optimizer, device, lambda: called(x, y)[1]), counted(model, model.transformer.wpe)

    return made


def transformers(given: argparse.Namespace, device: torch.device, x: Tensor, y: Tensor) -> tuple[Step, int]:
    """transformers' model, and torch's optimizer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = given.model
    model = GPT2LMHeadModel(GPT2Config(
        vocab_size=sizes["vocabulary"], n_positions=x.shape[1], n_layer=sizes["layers"], n_head=sizes["heads"],
        n_embd=sizes["channels"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
    )).to(device).train()  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), RATE, BETAS, weight_decay=DECAY, fused=True)
    step = one_step(model, optimizer, device, lambda: model(input_ids=x, labels=x).loss)  # it moves the labels itself
    return step, counted(model, model.transformer.wpe)


def one_step(model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device, loss_of: Step) -> Step:
    """Forward, backward, clipping, the optimizer's step, and no gradients."""

    def step() -> Tensor:
        with autocast(device):
            loss: Tensor = loss_of()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def counted(model: nn.Module, positions: nn.Module) -> int:
    """Parameters, but for the position embeddings; a tied one once."""
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in positions.parameters())


CONTENDERS: dict[str, Callable[..., tuple[Step, int]]] = {
    "nanoGPT, eager": nanogpt(False),
    PEER: nanogpt(True),
    "transformers": transformers,
    "Quire, eager": quire("autograd", "no"),
    "Quire, compiled": quire("autograd", "yes"),
    "Quire, manual": quire("manual", "no"),
}

if __name__ == "__main__":
    main()
