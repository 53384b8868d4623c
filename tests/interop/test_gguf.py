"""GGUF in: transformers' models in every type of weight, and files that are cut off, damaged or of another kind."""

import random
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from quire.errors import UserError
from quire.interop import import_model
from quire.interop.gguf_file import GGUFFile
from quire.tokenizers.gguf import to_gguf

from .conftest import logits

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

Q = gguf.GGMLQuantizationType
NAMES = {
    "model": "model", "pre": "pre", "tokens": "tokens", "token_types": "token_type", "merges": "merges",
    "bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "add_bos": "add_bos_token",
}  # fmt: skip
COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "bos_token_id": 0,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "eos_token_id": 1,
}  # fmt: skip
FAMILIES = {
    "llama": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (transformers.Qwen3Config, {"tie_word_embeddings": False, "head_dim": 32}),
}


def written(path: Path, tokenizer, family: str, types: dict[str, Q], skip: tuple[str, ...] = (), **changes):
    """A GGUF file of a random model of transformers, made as llama.cpp's converter does; and that model, as stored.

    `types`: of the tensors whose name has this in it, else float32; `changes`: entries of the metadata.
    """
    config_class, more = FAMILIES[family]
    config = config_class(**{**COMMON, **more, "vocab_size": tokenizer.vocabulary_size})
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    writer = gguf.GGUFWriter(path, family)
    entries = {
        "context_length": 128, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": model.config.head_dim
        if family == "qwen3" else 16, "attention.value_length": 32 if family == "qwen3" else 16,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": 10000.0,
    }  # fmt: skip
    values = {f"{family}.{key}": value for key, value in entries.items()}
    values |= {f"tokenizer.ggml.{NAMES[key]}": value for key, value in to_gguf(tokenizer).items() if key in NAMES}
    for key, value in {**values, **changes}.items():
        if value is not None:
            kind = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}[type(value)]
            getattr(writer, f"add_{kind}")(key, value)
    mapped = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], 2)
    for name, parameter in model.named_parameters():
        stem, _, end = name.rpartition(".")
        theirs, array = f"{mapped.get_name(stem)}.{end}", parameter.detach().numpy()
        kind = next((kind for part, kind in types.items() if part in theirs), Q.F32)
        if theirs in skip:
            continue
        if family == "llama" and (".attn_q." in theirs or ".attn_k." in theirs):
            heads = 4 if ".attn_q." in theirs else 2
            array = array.reshape(heads, 2, 8, -1).swapaxes(1, 2).reshape(array.shape)
        packed = array if kind == Q.F32 else gguf.quants.quantize(array, kind)
        writer.add_tensor(theirs, packed, raw_dtype=kind)
        stored = gguf.quants.dequantize(packed, kind)
        if family == "llama" and (".attn_q." in theirs or ".attn_k." in theirs):
            stored = stored.reshape(heads, 8, 2, -1).swapaxes(1, 2).reshape(array.shape)
        parameter.data = torch.from_numpy(stored.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


SMOLLM2 = {"token_embd": Q.Q8_0, "attn_norm": Q.F32, "ffn_norm": Q.F32, "output_norm": Q.F32, "blk": Q.Q4_1}


KINDS = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "as SmolLM2"]


@pytest.mark.parametrize(
    ("family", "kind"), [("qwen2", "F32"), ("qwen3", "Q8_0"), *(("llama", kind) for kind in KINDS)]
)
def test_logits_are_transformers_own(tmp_path, byte_bpe, family, kind):
    weights = ("token_embd", "attn_q.w", "attn_k.w", "attn_v.w", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    types = SMOLLM2 if kind == "as SmolLM2" else dict.fromkeys(weights, Q[kind])
    model = written(tmp_path / "model.gguf", byte_bpe, family, types)
    run = import_model(str(tmp_path / "model.gguf"), tmp_path / "run")
    ids = run.tokenizer.encode("The owl calls upon the night") * 3
    with torch.no_grad():
        want = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(logits(run, ids), want, rtol=1e-4, atol=1e-4)
    assert ids == byte_bpe.encode("The owl calls upon the night") * 3 and run.tokenizer.separator == byte_bpe.separator


def test_transformers_reads_the_same_file_alike(tmp_path, byte_bpe):
    pytest.importorskip("accelerate", reason="transformers reads GGUF files with accelerate, which is not installed")
    written(tmp_path / "model.gguf", byte_bpe, "llama", SMOLLM2)
    run = import_model(str(tmp_path / "model.gguf"), tmp_path / "run")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    ids = run.tokenizer.encode("The owl calls upon the night")
    with torch.no_grad():
        torch.testing.assert_close(logits(run, ids), model(torch.tensor([ids])).logits[0], rtol=1e-4, atol=1e-4)


def test_a_token_before_every_text_is_kept(tmp_path, byte_bpe):
    path = tmp_path / "model.gguf"
    written(path, byte_bpe, "llama", {}, **{"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": 7})
    run = import_model(str(path), tmp_path / "run")
    assert run.prompt_prefix() == [7] and run.start_token() == 7


def test_the_manifest_says_where_it_came_from(tmp_path, byte_bpe):
    path = tmp_path / "model.gguf"
    notes = {"general.name": "Owl", "general.license": "mit", "tokenizer.chat_template": "{{ messages }}"}
    written(path, byte_bpe, "llama", {}, **notes)
    manifest = import_model(str(path), tmp_path / "run").manifest
    assert (manifest["name"], manifest["licence"], manifest["chat_template"]) == ("Owl", "mit", "{{ messages }}")
    origin = manifest["imported_from"]
    assert (origin["path"], origin["bytes"]) == (str(path.resolve()), path.stat().st_size) and len(
        origin["sha256"]
    ) == 64


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("llama", {"general.architecture": "mamba"}, "'mamba', which Quire does not read.*llama, qwen2, qwen3"),
        ("llama", {"llama.expert_count": 8}, "a mixture of 8 experts"),
        ("llama", {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "scales .* by 'longrope'"),
        ("llama", {"llama.rope.dimension_count": 8}, "rope.dimension_count is 8, not the head size 16"),
        ("llama", {"llama.block_count": None}, "metadata lacks llama.block_count"),
        ("llama", {"llama.block_count": 1 << 31}, "lacks the tensor blk.2147483647.attn_q.weight"),
        ("llama", {"llama.block_count": 1}, "no place for"),
        ("llama", {"llama.feed_forward_length": 1 << 30}, "by its metadata blk.0.ffn_up.weight is"),
        ("llama", {"llama.attention.head_count": "four"}, "head_count is four"),
        ("llama", {"llama.attention.head_count": 0}, "0 heads"),
        ("llama", {"tokenizer.ggml.model": "bert"}, "tokenizer of kind 'bert'"),
        ("llama", {"tokenizer.ggml.pre": "tekken"}, "splits text as 'tekken'"),
        ("llama", {"tokenizer.ggml.tokens": None}, "lacks tokenizer.ggml.tokens"),
        ("llama", {"split.count": 3}, "one of several parts"),
    ],
)  # fmt: skip
def test_what_quire_has_not_is_refused_by_name(tmp_path, byte_bpe, family, changes, said):
    architecture = changes.pop("general.architecture", None) if "general.architecture" in changes else None
    path = tmp_path / "model.gguf"
    written(path, byte_bpe, family, {}, **changes)
    if architecture:
        path.write_bytes(path.read_bytes().replace(b"llama", architecture.encode(), 1))
    with pytest.raises(UserError, match=said):
        import_model(str(path), tmp_path / "run")
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.new").exists()


def test_a_missing_tensor_is_named(tmp_path, byte_bpe):
    written(tmp_path / "model.gguf", byte_bpe, "llama", {}, skip=("blk.1.ffn_gate.weight",))
    with pytest.raises(UserError, match=r"it lacks blocks.1.feedforward.gate.weight"):
        import_model(str(tmp_path / "model.gguf"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_file_cut_off_anywhere_is_refused(tmp_path, byte_bpe, quire):
    whole, cut = tmp_path / "whole.gguf", tmp_path / "cut.gguf"
    written(whole, byte_bpe, "llama", {})
    data, generator = whole.read_bytes(), random.Random(3)
    for length in (0, 3, 4, 7, 23, 24, 100, *generator.sample(range(len(data) - 32), 12)):
        cut.write_bytes(data[:length])
        said = quire("import", str(cut), "--run", str(tmp_path / "run"))
        assert said.code == 2 and "cut.gguf" in said.plain and "Traceback" not in said.err
    assert not (tmp_path / "run").exists()


def test_a_damaged_header_is_a_sentence_or_harmless(tmp_path, byte_bpe):
    """Any byte of the header may be any other: what is read is a model of that header, or a UserError, and soon."""
    path = tmp_path / "model.gguf"
    written(path, byte_bpe, "llama", {})
    data, generator = bytearray(path.read_bytes()), random.Random(4)
    header = min(entry.start for entry in GGUFFile.open(path).tensors.values())
    refused = 0
    for place in [*range(24), *generator.sample(range(24, header), 300)]:
        before, data[place] = data[place], generator.randrange(256)
        try:
            GGUFFile(bytes(data), "it")
        except UserError:
            refused += 1
        data[place] = before
    assert refused > 20


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GGUF" + struct.pack("<I", 1), "version 1 GGUF"),
        (b"GGUF" + struct.pack(">I", 3), "big-endian GGUF"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1 << 60, 0), "announces 1,152,921,504,606,846,976"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1 << 62), "behind the file's end"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"a", 9, 4, 1 << 60), "announces"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q1sI", 1, b"a", 99), "type 99"),
        (b"lmgg" + bytes(60), "does not begin with the letters GGUF"),
    ],
)
def test_headers_that_lie(data, said):
    with pytest.raises(UserError, match=said):
        GGUFFile(data + bytes(16), "it")


def test_without_the_package_a_sentence_says_what_to_install(tmp_path, byte_bpe, monkeypatch):
    written(tmp_path / "model.gguf", byte_bpe, "llama", {})
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r'pip install "quire\[gguf\]"'):
        import_model(str(tmp_path / "model.gguf"), tmp_path / "run")


def test_types_of_weights_that_the_package_cannot_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "one.gguf", "llama")
    writer.add_tensor("a", np.zeros((2, 256), np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="weights of type I32"):
        GGUFFile.open(tmp_path / "one.gguf").tensor("a")
