"""GGUF, the files of llama.cpp: models of the Llama family and of GPT-2's shape go out. gguf.py has names and way in.

C channels, H heads, D head size, V vocabulary.
"""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quire import checkpoint, files
from quire.config import Table
from quire.errors import UserError, choose
from quire.interop.gguf import BLOCK, FACTORS, TOKENIZER, WHOLE
from quire.interop.gguf_file import package
from quire.interop.hugging_face_config import gpt_obstacle
from quire.interop.imported import neighbours
from quire.run import Run
from quire.tokenizers.gguf import to_gguf

TYPES = {"": "F32", "f32": "F32", "f16": "F16", "q8_0": "Q8_0"}
FILE_TYPES = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}


def write(run: Run, out: Path, weights: str = "") -> None:
    """Write a run's best model with its tokenizer; `weights` is one of TYPES: how matrices are stored.

    What has one dimension stays float32, as llama.cpp wants it, and so do position embeddings; q8_0 takes matrices
    whose rows are multiples of 32, and leaves the others float16.
    """
    gguf, kind = package(), TYPES[choose("--type", weights, list(TYPES))]
    architecture = architecture_of(run.settings)
    vocabulary = tokenizer_entries(run)
    named = checkpoint.model_tensors(run.model("cpu"))
    entries = {**metadata(run, architecture, named), **vocabulary}
    entries |= {"general.file_type": int(gguf.LlamaFileType[FILE_TYPES[kind]]), "general.quantization_version": 2}

    def store(new: Path) -> None:
        writer = gguf.GGUFWriter(new, architecture)
        for key, value in entries.items():
            put(writer, key, value)
        for name, tensor in foreign_tensors(run.settings, architecture, named):
            array, stored = packed(gguf, name, tensor.detach().numpy(), kind)
            writer.add_tensor(name, array, raw_dtype=stored)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        except OSError as error:
            if error.errno is None:  # what numpy says of a full disk
                raise OSError(errno.ENOSPC, "No space left on device", str(out)) from error
            raise
        finally:
            writer.close()

    files.write_by(out, store)


def architecture_of(settings: Any) -> str:
    """The architecture of llama.cpp that has just the parts of a model; a UserError names what none has."""
    if problem := obstacle(settings):
        raise UserError(
            f"GGUF has no words for this model: {problem}. It takes models of kind modern (--preset default), and of"
            " kind gpt in the shape of GPT-2 (--preset gpt2) or Qwen3."
        )
    if settings.kind == "gpt" and settings.positions == "learned":
        return "gpt2"
    if settings.qk_norm:
        return "qwen3"
    return "qwen2" if getattr(settings, "qkv_bias", False) else "llama"


def obstacle(settings: Any) -> str | None:
    """The first part of a model that llama.cpp's architectures lack, in words."""
    if settings.kind == "modern":
        if 0 < settings.window < settings.context_length:
            return f"its attention has a window of {settings.window}"
        if settings.qk_norm and settings.qkv_bias:
            return "it has both qk_norm and qkv_bias"
        if settings.rotary_scaling == "llama3" and (settings.qk_norm or settings.qkv_bias):
            return "its rotary_scaling is llama3, which goes without qk_norm and qkv_bias"
        return None
    if settings.kind != "gpt":
        return f"its kind is {settings.kind}"
    return gpt_obstacle(settings, ("gelu-tanh",))


def metadata(run: Run, architecture: str, named: dict[str, Tensor]) -> Table:
    """What a reader must know of the model to compute it; keys as in the gguf package."""
    settings: Any = run.settings
    entries = {
        "context_length": settings.context_length,
        "embedding_length": settings.embedding_size,
        "block_count": settings.layers,
        "feed_forward_length": len(named["blocks.0.feedforward.up.weight"]),
        "attention.head_count": settings.heads,
        "vocab_size": settings.vocabulary_size,
    }
    if architecture == "gpt2":
        entries["attention.layer_norm_epsilon"] = settings.norm_epsilon
    else:
        entries |= {
            "attention.layer_norm_rms_epsilon": settings.norm_epsilon,
            "attention.head_count_kv": settings.kv_heads or settings.heads,
            "attention.key_length": settings.head_channels,
            "attention.value_length": settings.head_channels,
            "rope.dimension_count": settings.head_channels,
            "rope.freq_base": float(settings.rotary_base),
            **scaling_entries(settings),
        }
    general = {"general.name": run.manifest.get("name", run.path.resolve().name), "general.type": "model"}
    if "licence" in run.manifest:
        general["general.license"] = run.manifest["licence"]
    if "chat_template" in run.manifest:
        general["tokenizer.chat_template"] = run.manifest["chat_template"]
    return {**general, **{f"{architecture}.{key}": value for key, value in entries.items()}}


def scaling_entries(settings: Any) -> Table:
    """The scaling of rotary positions, as `scaling` reads it."""
    kind, key = getattr(settings, "rotary_scaling", "none"), "rope.scaling."
    if kind == "none":
        return {}
    original = settings.rotary_original_context
    if kind == "llama3":
        # Only the quotients of context and bounds matter: those of a lower bound of 1 turn are written.
        return {f"{key}original_context_length": round(original / (settings.rotary_low_frequency or 1))}
    entries = {f"{key}type": kind, f"{key}factor": float(settings.rotary_factor)}
    if kind == "yarn":
        entries[f"{key}original_context_length"] = original
        entries[f"{key}yarn_beta_slow"] = settings.rotary_low_frequency or 1.0
        entries[f"{key}yarn_beta_fast"] = settings.rotary_high_frequency or 32.0
    return entries


def tokenizer_entries(run: Run) -> Table:
    """The tokenizer, and which token a text begins with."""
    parts = to_gguf(run.tokenizer, run.prompt_prefix())
    if not parts["add_bos"] and "start_token" in run.manifest:
        parts["bos"] = run.manifest["start_token"]
    return {f"tokenizer.ggml.{TOKENIZER[name]}": value for name, value in parts.items() if value is not None}


def foreign_tensors(settings: Any, architecture: str, named: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The weights by llama.cpp's names, in its order of rows."""
    whole, block = ({ours: theirs for theirs, ours in table.items()} for table in (WHOLE, BLOCK))
    if architecture == "gpt2":
        named = gpt2_tensors(named)
        block["attention.query_key_value"] = "attn_qkv"
    for name, tensor in named.items():
        path, _, end = name.rpartition(".")
        if path in whole:
            yield f"{whole[path]}.{end}", tensor
            continue
        _, number, part = path.split(".", 2)
        turned = architecture == "llama" and part in ("attention.query", "attention.key")
        yield f"blk.{number}.{block[part]}.{end}", neighbours(tensor, settings.head_channels) if turned else tensor
    if getattr(settings, "rotary_scaling", "") == "llama3":
        rotary = settings.rotary()
        frequencies = rotary.frequencies()
        yield FACTORS, frequencies / rotary.scaling(frequencies, rotary.base)


def gpt2_tensors(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """GPT-2's tensors by our names, but query, key and value in one map; a bias that a model goes without is zero."""
    found: dict[str, Tensor] = {}
    for name, tensor in named.items():
        part, _, end = name.rpartition(".")
        if end != "weight" or part in ("token_embedding", "positions", "head"):
            found |= {name: tensor} if end == "weight" else {}
            continue
        bias = named.get(f"{part}.bias", torch.zeros(len(tensor)))
        stem, _, role = part.rpartition(".")
        if role in ("query", "key", "value"):
            joint = f"{stem}.query_key_value"
            for kind, new in (("weight", tensor), ("bias", bias)):
                before = found.get(f"{joint}.{kind}")
                found[f"{joint}.{kind}"] = new if before is None else torch.cat((before, new))
        else:
            found |= {f"{part}.weight": tensor, f"{part}.bias": bias}
    return found


def packed(gguf: Any, name: str, array: np.ndarray, kind: str) -> tuple[np.ndarray, Any]:
    """A tensor as it is stored, and the type of that."""
    types = gguf.GGMLQuantizationType
    if array.ndim < 2 or name.startswith("position_embd") or kind == "F32":
        return np.ascontiguousarray(array, np.float32), types.F32
    if kind == "Q8_0" and array.shape[-1] % 32 == 0:
        return gguf.quants.quantize(array, types.Q8_0), types.Q8_0
    return array.astype(np.float16), types.F16


def put(writer: Any, key: str, value: Any) -> None:
    """Write one entry of metadata in the type that Python's has there."""
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_string(key, value)
