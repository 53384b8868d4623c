"""Models of other programs, here and there: the same logits, the same greedy text.

    python benchmarks/neighbours.py [--shared FOLDER] [--only NAME ...]

stories260K (llama2.c): 150 greedy tokens against the story that an independent implementation wrote. SmolLM2-135M-
Instruct (GGUF, by name): logits and greedy text against transformers' own reading of the same file, then its export as
GGUF in three types of weight, each read by llama.cpp where xllamacpp is installed. Families: random models as Hugging
Face folders, read by transformers, and as ONNX graphs, run by onnxruntime. Needs the extra test, and
accelerate; the archive (93 MB) comes from the package index and stays in the cache. Prints a table and writes JSON.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quire.config import from_table
from quire.generation.generate import GenerationSettings, Writer
from quire.interop import export_model, import_model, onnx
from quire.interop.imported import Foreign, create
from quire.interop.pretrained import PRETRAINED
from quire.models import MODELS, build_model
from quire.run import Run
from quire.sources import SOURCES, fetch
from quire.tokenizers import ByteBPETokenizer

PROMPTS = (
    "The capital of France is",
    "Once upon a time there was an owl who",
    "def add(a, b):\n    return",
    "In 1969, the first man on the moon was 38 years old;",
)
TOKENS = 64
LLAMA_CPP = """
import json, sys, urllib.request, xllamacpp
path, prompts, tokens = json.load(sys.stdin)
given = xllamacpp.CommonParams()
given.model.path, given.n_ctx, given.warmup, given.n_gpu_layers, given.fit_params = path, 512, False, 0, False
server = xllamacpp.Server(given)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
for prompt in prompts:
    asked = {"prompt": prompt, "n_predict": tokens, "temperature": 0.0, "return_tokens": True, "cache_prompt": False}
    request = urllib.request.Request(server.listening_address + "/completion", json.dumps(asked).encode())
    print("IDS", json.dumps(json.load(opener.open(request))["tokens"]), flush=True)
"""

Row = dict[str, Any]


def main() -> None:
    """Run the checks, print the table, write the JSON; exit code 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"))
    parser.add_argument("--only", nargs="+", choices=list(CHECKS), default=list(CHECKS))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/neighbours.json"))
    given = parser.parse_args()
    rows: list[Row] = []
    for name in given.only:
        with tempfile.TemporaryDirectory() as folder:
            for row in CHECKS[name](given.shared, Path(folder)):
                rows.append({"model": name, **row})
                print(
                    f"{name:24}{row['what']:64}{row['figure']!s:>14}  {'ok' if row['ok'] else 'NOT AS CLAIMED'}",
                    flush=True,
                )
    machine = {"platform": platform.platform(), "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    sys.exit(not all(row["ok"] for row in rows))


def row(what: str, figure: Any, ok: bool) -> Row:
    """One line of the table."""
    return {"what": what, "figure": figure, "ok": bool(ok)}


def greedy(run: Run, prompts: tuple[str, ...], tokens: int = TOKENS) -> list[list[int]]:
    """What the run's model writes after each prompt, without the token that ends a text."""
    writer, settings = Writer(run, "cpu"), GenerationSettings(temperature=0, tokens=tokens)
    return [writer.write([prompt], settings)[0].tokens for prompt in prompts]


def stories260k(shared: Path, folder: Path) -> Iterator[Row]:
    """llama2.c's little model."""
    run = import_model(str(shared / "stories260K.bin"), folder / "run")
    golden = (shared / "golden_stories260K_greedy150.txt").read_text(encoding="utf-8").split("\n", 2)[2]
    ids = greedy(run, ("",), 150)[0]
    written = "".join(run.tokenizer.pieces[number].replace("\u2581", " ") for number in ids)  # type: ignore[attr-defined]
    same = golden.startswith(written) and len(ids) == 150
    yield row("greedy tokens that spell the golden story", f"{len(ids)} of 150", same)


def smollm2(shared: Path, folder: Path) -> Iterator[Row]:
    """SmolLM2-135M-Instruct by name, against transformers; then out to llama.cpp."""
    from transformers import AutoModelForCausalLM

    name = "smollm2-135m-instruct"
    ((_, data),) = fetch(SOURCES[PRETRAINED[name].source])
    (folder / "original.gguf").write_bytes(data)
    began = time.perf_counter()
    run = import_model(name, folder / "run")
    yield row("seconds to import it, the archive being there", round(time.perf_counter() - began, 1), True)
    theirs = AutoModelForCausalLM.from_pretrained(folder, gguf_file="original.gguf", dtype=torch.float32).eval()
    ours, different, same = run.model("cpu"), 0.0, 0
    written = greedy(run, PROMPTS)
    for prompt, mine in zip(PROMPTS, written, strict=True):
        ids = torch.tensor([run.tokenizer.encode(prompt)])
        with torch.no_grad():
            different = max(different, float((ours(ids) - theirs(ids).logits).abs().max()))
            other = theirs.generate(ids, max_new_tokens=TOKENS, do_sample=False)[0, ids.shape[1] :].tolist()
        same += mine == [number for number in other if number != run.tokenizer.separator]
    yield row("largest difference of a logit from transformers'", f"{different:.1e}", different <= 1e-3)
    every = same == len(PROMPTS)
    yield row(f"greedy texts of {TOKENS} tokens as transformers'", f"{same} of {len(PROMPTS)}", every)
    capital = run.tokenizer.decode(written[0][:1])
    yield row("the capital of France is", capital.strip(), capital == " Paris")
    yield from exported(run, folder, written)


def exported(run: Run, folder: Path, written: list[list[int]]) -> Iterator[Row]:
    """The run as GGUF in each type: its size, and how long llama.cpp writes what we write."""
    for kind in ("f32", "f16", "q8_0"):
        path = export_model(run, "gguf", folder / f"{kind}.gguf", kind)
        yield row(f"GGUF {kind}: megabytes", round(path.stat().st_size / 1e6, 1), True)
        done = subprocess.run(
            [sys.executable, "-c", LLAMA_CPP],
            input=json.dumps([str(path), PROMPTS, TOKENS]),
            capture_output=True,
            text=True,
        )
        found = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("IDS")]
        if not found:
            yield row(f"GGUF {kind}: llama.cpp (xllamacpp) is not here", "-", True)
            continue
        found = [[number for number in ids if number != run.tokenizer.separator] for ids in found]
        same = sum(mine == other for mine, other in zip(written, found, strict=True))
        exact = kind != "f32" or same == len(PROMPTS)  # the others round: no claim
        yield row(f"GGUF {kind}: greedy texts of llama.cpp as ours", f"{same} of {len(PROMPTS)}", exact)
        path.unlink()


SHAPE: Row = {"layers": 3, "embedding_size": 96, "heads": 6, "feedforward_size": 160, "context_length": 256}
FAMILIES: dict[str, Row] = {  # what goes out as which family
    "gpt2": {"kind": "gpt"},
    "llama": {"kind": "modern", "kv_heads": 2, "rotary_scaling": "llama3", "rotary_factor": 8.0,
              "rotary_original_context": 32},
    "mistral": {"kind": "modern", "window": 16, "kv_heads": 3, "tied": False},
    "ministral": {"kind": "sparse", "window": 16},
    "qwen3": {"kind": "sparse", "window": 16, "head_size": 20, "qk_norm": True, "attention": ["window", "full"]},
}  # fmt: skip


def families(shared: Path, folder: Path) -> Iterator[Row]:
    """Random models of each of Hugging Face's families, written, read by transformers, and read back; then ONNX."""
    import onnxruntime
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = ByteBPETokenizer.train([" ".join(PROMPTS) * 9], 320)
    own = {"vocabulary_size": tokenizer.vocabulary_size, "separator": tokenizer.separator}
    tokens = torch.randint(own["vocabulary_size"], (2, 128), generator=torch.Generator().manual_seed(1))
    for name, parts in FAMILIES.items():
        torch.manual_seed(2)
        table = {**SHAPE, **parts}
        model = build_model(from_table(MODELS[table["kind"]].Settings, {**table, **own}, "model"))
        weights = [(part, torch.randn_like(weight) / 6) for part, weight in model.named_parameters()]
        run = create(Foreign(table, weights, tokenizer, {"path": name}), folder / f"{name}-run")
        out = export_model(run, "hf", folder / name)
        theirs, words = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
        with torch.no_grad():
            logits = run.model("cpu")(tokens)
            off = float((logits - theirs(tokens).logits).abs().max())
            ids = [words(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
            others = [theirs.generate(row, max_new_tokens=TOKENS, do_sample=False)[0, row.shape[1] :] for row in ids]
        yield row(f"{theirs.config.model_type}: largest difference of a logit", f"{off:.1e}", off <= 1e-4)
        written = zip(greedy(run, PROMPTS), others, strict=True)
        same = sum(mine == [i for i in other.tolist() if i != tokenizer.separator] for mine, other in written)
        yield row(f"{name}: greedy texts as transformers'", f"{same} of {len(PROMPTS)}", same == len(PROMPTS))
        if name in ("gpt2", "llama", "qwen3"):
            session = onnxruntime.InferenceSession(export_model(run, "onnx", folder / f"{name}-onnx") / "model.onnx")
            found = torch.from_numpy(np.concatenate(list(onnx.steps(session, tokens.numpy())), axis=1))
            off = float((logits - found).abs().max())
            yield row(f"ONNX, kind {table['kind']}: largest difference of a logit", f"{off:.1e}", off <= 1e-4)


CHECKS: dict[str, Callable[[Path, Path], Iterator[Row]]] = {
    "stories260K": stories260k, "smollm2": smollm2, "families": families,
}  # fmt: skip

if __name__ == "__main__":
    main()
