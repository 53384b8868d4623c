"""GGUF, the files of llama.cpp: models of the Llama family come in. gguf_export.py is the way out.

Metadata and tensor names are those of the gguf package (gguf.constants). For the architecture "llama" rotary positions
turn channels (2i, 2i + 1) of a head there: rows of queries and keys are reordered on the way in and out. The other
architectures turn (i, i + D/2), as Quire does.
C channels, H heads, D head size, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from quire import files
from quire.config import Table
from quire.errors import UserError
from quire.interop.gguf_file import MAGIC, GGUFFile
from quire.interop.imported import Foreign, halves
from quire.layers.positions import RotaryPositions, RotaryScaling
from quire.tokenizers import Tokenizer
from quire.tokenizers.gguf import from_gguf

IMPORTED = ("llama", "qwen2", "qwen3")

# Their names and ours, without .weight and .bias; those of a block follow blk.N and blocks.N.
WHOLE = {"token_embd": "token_embedding", "position_embd": "positions", "output_norm": "norm", "output": "head"}
BLOCK = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.query",
    "attn_k": "attention.key",
    "attn_v": "attention.value",
    "attn_output": "attention.output",
    "attn_q_norm": "attention.query_norm",
    "attn_k_norm": "attention.key_norm",
    "ffn_norm": "feedforward_norm",
    "ffn_gate": "feedforward.gate",
    "ffn_up": "feedforward.up",
    "ffn_down": "feedforward.down",
}
FACTORS = "rope_freqs.weight"  # what each rotary angle is divided by: how llama3's scaling is written
TOKENIZER = {  # the tokenizer's parts, as tokenizers/gguf.py names them
    "model": "model",
    "pre": "pre",
    "tokens": "tokens",
    "token_types": "token_type",
    "merges": "merges",
    "scores": "scores",
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "pad": "padding_token_id",
    "unknown": "unknown_token_id",
    "add_bos": "add_bos_token",
    "add_space_prefix": "add_space_prefix",
}


def recognizes(path: Path) -> bool:
    """Whether a file begins as GGUF does, or is named so."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(4) == MAGIC or path.suffix == ".gguf"


def read(path: Path, tokenizer: Path | None = None) -> Foreign:
    """The model in a GGUF file; its tokenizer is in it."""
    if tokenizer is not None:
        raise UserError(f"{path} has its tokenizer in it: leave --tokenizer out.")
    size = path.stat().st_size
    origin = {"format": "gguf", "path": str(path.resolve()), "bytes": size, "sha256": files.sha256_of(path)}
    return foreign(GGUFFile.open(path), origin)


def foreign(file: GGUFFile, origin: Table) -> Foreign:
    """The model of an open file: settings, tokenizer and notes; shapes are checked against the settings."""
    architecture = file.get("general.architecture", str)
    experts = file.metadata.get(f"{architecture}.expert_count")
    if architecture not in IMPORTED or experts:
        what = f"a mixture of {experts} experts" if experts else f"of the architecture {architecture!r}"
        raise UserError(f"{file.where} is {what}, which Quire does not read. It imports {', '.join(IMPORTED)}.")
    if "split.count" in file.metadata and file.metadata["split.count"] != 1:
        raise UserError(f"{file.where} is one of several parts. Join them first: llama-gguf-split --merge.")
    settings = model_settings(file, architecture)
    tokenizer, prefix = tokenizer_of(file)
    check_shapes(file, settings, tokenizer.vocabulary_size)
    names = {"name": "general.name", "licence": "general.license", "chat_template": "tokenizer.chat_template"}
    names["start_token"] = "tokenizer.ggml.bos_token_id"
    notes = {name: file.metadata[key] for name, key in names.items() if key in file.metadata}
    return Foreign(settings, tensors(file, architecture, settings), tokenizer, origin, prefix, notes)


def tokenizer_of(file: GGUFFile) -> tuple[Tokenizer, list[int]]:
    """The tokenizer, and the tokens that stand before every text."""
    file.get("tokenizer.ggml.tokens", list)
    keys = {name: f"tokenizer.ggml.{key}" for name, key in TOKENIZER.items()}
    parts = {name: file.metadata[key] for name, key in keys.items() if key in file.metadata}
    return from_gguf(**{"model": "", "token_types": [], **parts}, where=file.where)


def model_settings(file: GGUFFile, architecture: str) -> Table:
    """The settings of a model of kind "modern" from the metadata."""

    def number(key: str, default: int | None = None) -> int:
        return file.get(f"{architecture}.{key}", int, default)

    size, heads = number("embedding_length"), number("attention.head_count")
    if heads < 1:
        raise file.damaged(f"it has {heads} heads")
    head_size = number("attention.key_length", size // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (other := number(name, head_size)) != head_size:
            raise UserError(f"{file.where}: {name} is {other}, not the head size {head_size}. Quire has no such model.")
    base = short(file.get(f"{architecture}.rope.freq_base", float, 10000.0))
    return {
        "kind": "modern",
        "context_length": number("context_length"),
        "embedding_size": size,
        "layers": number("block_count"),
        "heads": heads,
        "kv_heads": number("attention.head_count_kv", heads),
        "head_size": head_size,
        "feedforward_size": number("feed_forward_length"),
        "norm_epsilon": short(file.get(f"{architecture}.attention.layer_norm_rms_epsilon", float)),
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "qk_norm": "blk.0.attn_q_norm.weight" in file.tensors,
        "tied": "output.weight" not in file.tensors,
        "window": number("attention.sliding_window", 0),
        "rotary_base": base,
        **scaling(file, architecture, head_size, base),
    }


def short(value: float) -> float:
    """The shortest number that is the same in float32."""
    return float(str(np.float32(value)))


def scaling(file: GGUFFile, architecture: str, head_size: int, base: float) -> Table:
    """How rotary angles are scaled: the settings that differ from none."""
    key = f"{architecture}.rope.scaling."
    if FACTORS in file.tensors:
        return llama3(file, head_size, base, file.get(f"{key}original_context_length", int, 8192))
    kind = file.get(f"{key}type", str, "none")
    factor = short(file.get(f"{key}factor", float, 1.0))
    if kind not in ("none", "linear", "yarn"):
        raise UserError(f"{file.where} scales rotary positions by {kind!r}. Quire knows linear, yarn and llama3.")
    if kind == "none" or factor == 1:
        return {}
    found = {"rotary_scaling": kind, "rotary_factor": factor}
    if kind == "yarn":
        found["rotary_original_context"] = file.get(f"{key}original_context_length", int)
        found["rotary_low_frequency"] = short(file.get(f"{key}yarn_beta_slow", float, 0.0))
        found["rotary_high_frequency"] = short(file.get(f"{key}yarn_beta_fast", float, 0.0))
    return found


def llama3(file: GGUFFile, head_size: int, base: float, original: int) -> Table:
    """The settings whose factors are those in the file: its own factor, and the usual bounds, 1 and 4 turns."""
    factors = file.tensor(FACTORS)
    guess = RotaryScaling("llama3", short(float(factors.max())), original)
    frequencies = RotaryPositions(head_size, base).frequencies()
    if factors.shape != frequencies.shape or not torch.allclose(
        frequencies / factors, guess(frequencies, base), rtol=1e-4, atol=0
    ):
        raise UserError(f"{file.where} scales rotary positions by factors of its own ({FACTORS}), which Quire has not.")
    return {"rotary_scaling": "llama3", "rotary_factor": guess.factor, "rotary_original_context": original}


def check_shapes(file: GGUFFile, settings: Table, vocabulary_size: int) -> None:
    """Refuse a file whose metadata and tensors disagree, before a model of such a size is made."""
    size, hidden = settings["embedding_size"], settings["feedforward_size"]
    expected = {
        "token_embd.weight": (vocabulary_size, size),
        f"blk.{settings['layers'] - 1}.attn_q.weight": (settings["heads"] * settings["head_size"], size),
        "blk.0.attn_k.weight": (settings["kv_heads"] * settings["head_size"], size),
        "blk.0.ffn_up.weight": (hidden, size),
    }
    for name, shape in expected.items():
        if name not in file.tensors:
            raise file.damaged(f"it lacks the tensor {name}")
        if file.tensors[name].shape != shape:
            raise file.damaged(f"by its metadata {name} is {shape}, and {file.tensors[name].shape} in the file")


def tensors(file: GGUFFile, architecture: str, settings: Table) -> Iterator[tuple[str, Tensor]]:
    """The weights by Quire's names, in float32."""
    for name in file.tensors:
        if name == FACTORS:
            continue
        ours = translated(name)
        if ours is None:
            raise UserError(f"{file.where} has a part that Quire's models lack: the tensor {name}.")
        tensor = file.tensor(name)
        turned = architecture == "llama" and (".attn_q." in name or ".attn_k." in name)
        yield ours, halves(tensor, settings["head_size"]) if turned else tensor


def translated(name: str) -> str | None:
    """Our name of one of their tensors; None for one that has none."""
    *path, end = name.split(".")
    if len(path) == 1 and path[0] in WHOLE:
        return f"{WHOLE[path[0]]}.{end}"
    if len(path) == 3 and path[0] == "blk" and path[2] in BLOCK:
        return f"blocks.{path[1]}.{BLOCK[path[2]]}.{end}"
    return None
