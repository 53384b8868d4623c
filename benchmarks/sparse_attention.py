"""Sparse attention beside dense, and recomputed blocks beside kept ones: time and memory of a training step.

    python benchmarks/sparse_attention.py [--device cuda] [--lengths 1024 4096 16384] [--json FILE]

First a step (forward and backward) of one attention layer, by length: dense (torch's fused causal kernel), a window
by a mask, and a window by flex attention (on GPUs; it has no backward on a CPU). Then a step of a deep model, its
blocks kept and recomputed. Medians of several steps; memory is the allocator's peak on a GPU, and on a CPU the peak
resident set of a process of its own for each row.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire.devices import peak_memory
from quire.layers.attention import ScaledDotProductAttention
from quire.layers.layer import Block
from quire.layers.sparsity import BlockSparse, Pattern
from quire.models.modern import Modern, ModernSettings

HEADS, KV_HEADS, HEAD_SIZE, WINDOW = 12, 4, 64, 256


def main() -> None:
    """Measure each row in a process of its own, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--lengths", nargs="+", type=int, default=[])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    device = torch.device(given.device)
    if given.row:
        print(json.dumps(measured(given.row, device)))
        return
    cuda = device.type == "cuda"
    lengths = given.lengths or ([1024, 4096, 16384] if cuda else [1024, 2048, 4096])
    ways = ["dense", "mask", "flex"] if cuda else ["dense", "mask"]
    rows = [in_own_process(["attention", way, str(n)], given.device) for n in lengths for way in ways]
    rows += [in_own_process(["model", way], given.device) for way in ("kept", "recomputed")]
    name = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
    machine = {"device": name, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    path = given.json or Path(f"benchmarks/results/sparse_attention_{device.type}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "window": WINDOW, "rows": rows}, indent=1) + "\n")


def in_own_process(words: list[str], device: str) -> dict[str, Any]:
    """One row, measured where nothing else has taken memory."""
    command = [sys.executable, __file__, "--device", device, "--row", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    row = json.loads(done.stdout.splitlines()[-1])
    print("{what:32} {milliseconds:10.2f} ms {megabytes:10.1f} MB".format(**row), flush=True)
    return row


def measured(words: list[str], device: torch.device) -> dict[str, Any]:
    """A row's median time and peak memory above what stood before the first step."""
    torch.manual_seed(1)
    step = attention(words[1], int(words[2]), device) if words[0] == "attention" else model(words[1], device)
    before = peak_memory(device)
    step()  # which compiles, too
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    times = []
    for _ in range(10 if device.type == "cuda" else 3):
        began = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    memory = peak_memory(device) - before
    return {
        "what": " ".join(words),
        "milliseconds": round(1000 * statistics.median(times), 3),
        "megabytes": round(memory / 1e6, 1),
    }


def attention(way: str, length: int, device: torch.device) -> Callable[[], None]:
    """A forward and backward pass of scaled dot-product attention over so many positions."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shapes = [(1, heads, length, HEAD_SIZE) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    inputs = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes]
    sparse, attend = BlockSparse(Pattern("window", WINDOW), length, device), ScaledDotProductAttention()
    visible: Tensor | BlockSparse | None = {"dense": None, "mask": sparse.dense(), "flex": sparse}[way]
    grad = torch.randn(shapes[0], device=device, dtype=dtype)

    def step() -> None:
        torch.autograd.grad(attend(*inputs, visible), inputs, grad)

    return step


def model(way: str, device: torch.device) -> Callable[[], None]:
    """A forward and backward pass of a deep decoder, its blocks kept or recomputed."""
    size = {"vocabulary_size": 1024, "context_length": 512, "embedding_size": 256, "layers": 24, "heads": 4}
    deep = Modern(ModernSettings(**size)).to(device).train()
    for block in deep.modules():
        if isinstance(block, Block):
            block.recomputed = way == "recomputed"
    tokens = torch.randint(1024, (8 if device.type == "cuda" else 1, 512), device=device)

    def step() -> None:
        deep(tokens, tokens).backward()
        deep.zero_grad()

    return step


if __name__ == "__main__":
    main()
