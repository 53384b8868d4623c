"""The two engines side by side, and beside the well-known project that trains in plain Python with layers by hand.

    python benchmarks/engines.py [--rounds 7] [--threads 1] [--checkout DIR] [--peer-rounds 3] [--json OUT]

Engines: forward and backward of one batch by autograd (eager) and by the layers' own backward, in turn; CPU seconds and
the highest sum of memory that was in use, parameters not counted. Parts: the same of single layers.

--checkout is one of eduardoleao052/Transformer-from-scratch. Its layers at the configuration of its config.py (8 blocks
of 512, 8 heads, 196 tokens, 16 windows, dropout 0.2, rate and regularization 2e-4), and two of its LSTMs in place of
the blocks, train on TEXT, step for step as its Model.train does; so does the same stack of Quire's layers, begun with
the same weights, by both engines on the same batches. Beside them stand the matrix products of one step alone, which
none of the three can do without.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quire.data.batches import Batch
from quire.layers.activations import GELU, SiLU, TanhGELU
from quire.layers.attention import ScaledDotProductAttention
from quire.layers.cross_entropy import CrossEntropy
from quire.layers.dropout import Dropout
from quire.layers.layer import Layer, recording
from quire.layers.linear import Linear
from quire.layers.normalization import LayerNorm, RMSNorm
from quire.layers.recurrent import CELLS
from quire.models import MODELS, build_model
from quire.training.engines import ENGINES
from quire.training.optimizers import OPTIMIZERS
from quire.training.settings import TrainingSettings, layered, typed

GPT = {"kind": "gpt", "context_length": 256, "embedding_size": 384, "layers": 6, "heads": 6}
SMALL = {"kind": "gpt", "context_length": 64, "embedding_size": 128, "layers": 4, "heads": 4}
SHAPES: dict[str, tuple[dict[str, Any], int]] = {  # a preset or settings, and the rows of a batch
    "GPT, 4 x 128, T 64": (SMALL, 12),
    "GPT, 6 x 384, T 256": (GPT, 4),
    "the same with dropout 0.2": ({**GPT, "dropout": 0.2}, 4),
    "GPT, 4 x 128, T 1024": ({**SMALL, "context_length": 1024}, 2),
    "GPT, 2 x 128, 50,257 tokens": ({**SMALL, "layers": 2, "context_length": 128, "vocabulary_size": 50257}, 4),
    "default preset": ({"preset": "default"}, 16),
    "RNN preset": ({"preset": "rnn"}, 16),
    "LSTM preset": ({"preset": "lstm"}, 16),
    "GRU preset": ({"preset": "gru"}, 16),
}
PARTS: dict[str, tuple[Callable[[], Layer], list[tuple[int, ...]]]] = {  # a layer, and the shapes it is called with
    "softmax, cross-entropy, V 50,257": (CrossEntropy, [(512, 50257)]),
    "layer norm, C 384": (lambda: LayerNorm(384), [(4, 256, 384)]),
    "RMS norm, C 384": (lambda: RMSNorm(384), [(4, 256, 384)]),
    "GELU (tanh)": (TanhGELU, [(4, 256, 1536)]),
    "GELU (erf)": (GELU, [(4, 256, 1536)]),
    "SiLU": (SiLU, [(4, 256, 1536)]),
    "dropout": (lambda: Dropout(0.1), [(4, 256, 384)]),
    "linear, 384 to 1536": (lambda: Linear(384, 1536), [(4, 256, 384)]),
    "attention, T 256": (ScaledDotProductAttention, [(4, 6, 256, 64)] * 3),
    "attention, T 1024": (ScaledDotProductAttention, [(1, 6, 1024, 64)] * 3),
    "LSTM, 256, T 128": (lambda: CELLS["lstm"](256, 256), [(16, 128, 256)]),
}
CONFIGURATION = {"size": 512, "blocks": 8, "heads": 8, "context": 196, "batch": 16, "dropout": 0.2, "rate": 2e-4}


def main() -> None:
    """Measure, print the tables, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkout", type=Path, help="of eduardoleao052/Transformer-from-scratch")
    parser.add_argument("--peer-rounds", type=int, default=3)
    parser.add_argument("--text", type=Path, default=Path("../shared/data/tinyshakespeare.txt"))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/engines.json"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    machine = {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__,
               "vectors": torch.backends.cpu.get_cpu_capability(), "threads": given.threads}  # fmt: skip
    found: dict[str, Any] = {"machine": machine}
    heading = f"{'':34}{'autograd, ms':>13}{'by hand, ms':>13}{'ratio':>8}{'MB':>9}{'MB':>9}"
    print(f"forward and backward, CPU time and peak memory\n{heading}")
    found["engines"] = [engines(name, *shape, given.rounds) for name, shape in SHAPES.items()]
    print(f"\nparts\n{heading}")
    found["parts"] = [part(name, *made, given.rounds * 2) for name, made in PARTS.items()]
    if given.checkout:
        if not given.text.is_file():
            sys.exit(f"There is no {given.text}. Name a text with --text.")
        sys.path.insert(0, str(given.checkout))
        found["peer"] = peer(given.text, given.peer_rounds)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(found, indent=1) + "\n")


# ---- both engines ----


def engines(name: str, shape: dict[str, Any], rows: int, rounds: int) -> dict[str, Any]:
    """One model's batch by both engines."""
    shape = dict(shape)
    preset = shape.pop("preset", None)
    sizes = {"vocabulary_size": 96, "separator": 0, **shape}
    settings = typed(layered(preset)).with_model(**sizes).model if preset else MODELS[shape["kind"]].Settings(**sizes)
    torch.manual_seed(0)
    model = build_model(settings).train()
    ids = torch.randint(settings.vocabulary_size, (rows, settings.context_length + 1))
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), ids[:, 1:].numel())

    def step(engine: str) -> None:
        model.zero_grad()
        ENGINES[engine].backpropagate(model, batch, 1.0)

    return line(name, lambda: step("autograd"), lambda: step("manual"), rounds)


def part(name: str, make: Callable[[], Layer], shapes: list[tuple[int, ...]], rounds: int) -> dict[str, Any]:
    """One layer, forward and backward."""
    layer = make().train()
    inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
    others = [torch.randint(shapes[0][-1], shapes[0][:-1])] if isinstance(layer, CrossEntropy) else []
    grad = torch.randn_like(layer(*inputs, *others).detach())

    def autograd() -> None:
        layer.zero_grad()
        torch.autograd.grad(layer(*inputs, *others), [*inputs, *layer.parameters()], grad)

    def by_hand() -> None:
        layer.zero_grad()
        with torch.no_grad(), recording(layer):
            layer(*inputs, *others)
            layer.backward(grad)

    return line(name, autograd, by_hand, rounds)


def line(name: str, autograd: Callable[[], None], by_hand: Callable[[], None], rounds: int) -> dict[str, Any]:
    """Both in turn: the medians, the median of the ratios, and the memory."""
    seconds: dict[str, list[float]] = {"autograd": [], "manual": []}
    memory = {}
    for engine, run in (("autograd", autograd), ("manual", by_hand)):
        run()
        memory[engine] = peak_bytes(run)
    for _ in range(rounds):
        for engine, run in (("autograd", autograd), ("manual", by_hand)):
            began = time.process_time()
            run()
            seconds[engine].append(time.process_time() - began)
    ratio = statistics.median(ours / theirs for theirs, ours in zip(*seconds.values(), strict=True))
    autograd_ms, manual_ms = (round(statistics.median(each) * 1e3, 2) for each in seconds.values())
    print(f"{name:34}{autograd_ms:13.1f}{manual_ms:13.1f}{ratio:8.2f}"
          f"{memory['autograd'] / 1e6:9.1f}{memory['manual'] / 1e6:9.1f}", flush=True)  # fmt: skip
    return {"name": name, "autograd_ms": autograd_ms, "manual_ms": manual_ms, "ratio": round(ratio, 3),
            "autograd_bytes": memory["autograd"], "manual_bytes": memory["manual"]}  # fmt: skip


def peak_bytes(run: Callable[[], None]) -> int:
    """The most memory that tensors held at once while `run` ran, over what they held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


# ---- beside the project ----


def peer(path: Path, rounds: int) -> list[dict[str, Any]]:
    """Its configuration by characters and by words: all three train in turn, on the same batches."""
    import re

    text = path.read_text(encoding="utf-8")
    characters, words = list(text), re.findall(r"\w+|[^\w]", text)
    found = []
    for name, tokens, recurrent in (
        ("blocks, characters", characters, False),
        ("blocks, words", words, False),
        ("two LSTMs, characters", characters, True),
    ):
        number = {token: index for index, token in enumerate(sorted(set(tokens)))}
        data = torch.tensor([number[token] for token in tokens])
        found.append(trained(name, data, len(number), recurrent, rounds))
    return found


def trained(name: str, data: Tensor, vocabulary: int, recurrent: bool, rounds: int) -> dict[str, Any]:
    """Steps of training: CPU and wall seconds of each way, and the losses."""
    torch.manual_seed(1)
    theirs = their_layers(vocabulary, recurrent)
    models = {engine: our_stack(theirs, vocabulary, recurrent) for engine in ("autograd", "manual")}
    kept = {engine: OPTIMIZERS["adamw"](model, our_training()) for engine, model in models.items()}
    size, length = CONFIGURATION["batch"], CONFIGURATION["context"]
    results: dict[str, list[tuple[float, float, float]]] = {who: [] for who in ("theirs", *models)}
    for _ in range(rounds + 1):
        places = torch.randint(len(data) - length - 1, (size,)).tolist()
        inputs = torch.stack([data[place : place + length] for place in places])
        targets = torch.stack([data[place + 1 : place + 1 + length] for place in places])
        batch = Batch(inputs, targets, targets.numel())

        def ours(engine: str, batch: Batch = batch) -> float:
            loss = ENGINES[engine].backpropagate(models[engine], batch, 1.0)
            for optimizer in kept[engine]:
                optimizer.step()
            models[engine].zero_grad()
            return float(loss)

        ways: dict[str, Callable[[], float]] = {
            "theirs": lambda inputs=inputs, targets=targets: their_step(theirs, inputs, targets),
            **{engine: lambda engine=engine: ours(engine) for engine in models},
        }
        for who, way in ways.items():
            cpu, wall = time.process_time(), time.perf_counter()
            loss = way()
            results[who].append((time.process_time() - cpu, time.perf_counter() - wall, loss))
    products = products_alone(models["manual"], size * length)
    print(f"\nits configuration: {name} ({vocabulary:,} of them), tokens per CPU second, and loss step by step")
    row: dict[str, Any] = {"name": name, "vocabulary_size": vocabulary, "configuration": CONFIGURATION}
    for who, steps in results.items():
        cpu, wall = (statistics.median(step[which] for step in steps[1:]) for which in (0, 1))
        row[who] = {"cpu_seconds": round(cpu, 3), "seconds": round(wall, 3),
                     "tokens_per_second": round(size * length / wall),
                     "tokens_per_cpu_second": round(size * length / cpu),
                     "losses": [round(step[2], 4) for step in steps]}  # fmt: skip
        print(f"{who:34}{size * length / cpu:13.0f}   {row['theirs']['cpu_seconds'] / cpu:.2f} times theirs   "
              + " ".join(f"{step[2]:.3f}" for step in steps), flush=True)  # fmt: skip
    row["products_alone_cpu_seconds"] = round(products, 3)
    print(f"{'its matrix products alone':34}{size * length / products:13.0f}   "
          f"{row['theirs']['cpu_seconds'] / products:.2f} times theirs", flush=True)  # fmt: skip
    return row


def their_layers(vocabulary: int, recurrent: bool) -> list[Any]:
    """The layers of its config.py, or two LSTMs in place of positions and blocks, ready to train."""
    from src import layers as theirs  # type: ignore[import-not-found]  # of the checkout
    from src.layers_recurrent import LSTM  # type: ignore[import-not-found]

    size, length, heads = CONFIGURATION["size"], CONFIGURATION["context"], CONFIGURATION["heads"]
    if recurrent:
        middle = [LSTM(size, size), LSTM(size, size)]
    else:
        middle = [theirs.PositionalEmbedding(length, size)]
        for _ in range(int(CONFIGURATION["blocks"])):
            middle.append(theirs.Block(size, size, heads, length, dropout_prob=CONFIGURATION["dropout"]))
        middle.append(theirs.LayerNorm(size))
    layers = [theirs.Embedding(vocabulary, size), *middle, theirs.TemporalDense(size, vocabulary),
              theirs.CrossEntropyLoss()]  # fmt: skip
    for layer in layers:
        layer.set_mode("train")
        layer.initialize_optimizer(CONFIGURATION["rate"], CONFIGURATION["rate"])
    return layers


def their_step(layers: list[Any], inputs: Tensor, targets: Tensor) -> float:
    """One step of its Model.train."""
    a = inputs.clone()
    for layer in layers:
        a = layer.forward(a)
    grad, loss = layers[-1].backward(targets, a)
    for layer in layers[-2::-1]:
        grad = layer.backward(grad)
        layer.optimize()
    return float(loss)


def our_training() -> TrainingSettings:
    """Its optimizer, as near as AdamW comes."""
    rate = float(CONFIGURATION["rate"])
    return TrainingSettings(learning_rate=rate, weight_decay=rate, beta1=0.9, beta2=0.99)


def our_stack(theirs: list[Any], vocabulary: int, recurrent: bool) -> nn.Module:
    """The same layers of Quire's, with the same weights."""
    block = {"kind": "block", "heads": CONFIGURATION["heads"], "normalization": "layernorm", "activation": "relu",
             "rotary": False, "bias": True, "dropout": CONFIGURATION["dropout"]}  # fmt: skip
    blocks = [{"kind": "positional-embedding"}, *[block] * int(CONFIGURATION["blocks"]), {"kind": "layernorm"}]
    middle = [{"kind": "lstm"}, {"kind": "lstm"}] if recurrent else blocks
    stack = ({"kind": "embedding", "size": CONFIGURATION["size"]}, *middle)
    sizes = {"vocabulary_size": vocabulary, "context_length": CONFIGURATION["context"], "separator": 0}
    model = build_model(MODELS["stack"].Settings(kind="stack", stack=stack, **sizes)).train()
    with torch.no_grad():
        for ours, weights in zip(model.parameters(), weights_in_our_order(theirs, recurrent), strict=True):
            ours.copy_(weights)
    return model


def weights_in_our_order(layers: list[Any], recurrent: bool) -> Iterator[Tensor]:
    """Its weights as Quire's stack lists them; a matrix lies the other way there."""
    yield layers[0].params["E"]
    if recurrent:
        for lstm in layers[1:3]:
            in_order = [torch.cat([part.chunk(4, -1)[gate] for gate in (0, 1, 3, 2)], -1)  # theirs: i, f, o, g
                        for part in (lstm.params["Wxa"], lstm.params["Wha"], lstm.params["ba"])]  # fmt: skip
            yield from (in_order[0].T, in_order[1].T, in_order[2], torch.zeros_like(in_order[2]))
    else:
        yield layers[1].params["E"]
        for block in layers[2:-3]:
            attention, feedforward = block.att, block.fcc
            for norm, dense in (
                (block.ln1, (attention.Wq, attention.Wk, attention.Wv, attention.residual_proj)),
                (block.ln2, (feedforward.fcc1, feedforward.fcc2)),
            ):
                yield norm.params["gamma"][0]
                yield norm.params["beta"][0]
                for layer in dense:
                    yield layer.params["W"].T
                    yield layer.params["b"]
        yield layers[-3].params["gamma"][0]
        yield layers[-3].params["beta"][0]
    yield layers[-2].params["W"].T


def products_alone(model: nn.Module, rows: int) -> float:
    """CPU seconds of each matrix's three products in one step: y = x W^T, dx = dy W, dW = dy^T x."""
    matrices = [layer.weight for layer in model.modules() if isinstance(layer, Linear)]
    matrices += [weight for name, weight in model.named_parameters() if "weight_ih" in name or "weight_hh" in name]
    total = 0.0
    for matrix in matrices:
        outputs, inputs = matrix.shape
        x, grad, weight = torch.randn(rows, inputs), torch.randn(rows, outputs), matrix.detach()
        for product in (lambda: x @ weight.T, lambda: grad @ weight, lambda: grad.T @ x):  # noqa: B023
            began = time.process_time()
            product()
            total += time.process_time() - began
    return total


if __name__ == "__main__":
    main()
