"""GGUF out: every tensor read back by the gguf package, the way in again, and llama.cpp's own greedy text."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from quire.errors import UserError
from quire.generation.stream import tokens as stream
from quire.interop import export_model, import_model
from quire.interop.gguf_export import architecture_of
from quire.models import MODELS

from .conftest import logits

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

QWEN3 = {"positions": "rotary", "normalization": "rmsnorm", "feedforward": "swiglu", "bias": False, "qk_norm": True}
YARN = {"rotary_scaling": "yarn", "rotary_factor": 4.0, "rotary_original_context": 16}
LLAMA3 = {"rotary_scaling": "llama3", "rotary_factor": 8.0, "rotary_original_context": 16, "head_size": 32}
SHAPES = {
    "llama": {"kind": "modern", "kv_heads": 2, "tied": True},
    "llama-odd": {"kind": "modern", "heads": 3, "kv_heads": 1, "head_size": 20, "tied": False, "norm_epsilon": 1e-6},
    "llama-linear": {"kind": "modern", "rotary_scaling": "linear", "rotary_factor": 2.0},
    "llama-yarn": {"kind": "modern", "rotary_base": 500.0, **YARN},
    "llama-3": {"kind": "modern", "rotary_base": 5000.0, **LLAMA3},
    "qwen2": {"kind": "modern", "kv_heads": 2, "qkv_bias": True, "rotary_base": 1e6},
    "qwen2-yarn": {"kind": "modern", "qkv_bias": True, **YARN},
    "qwen3": {"kind": "modern", "kv_heads": 1, "qk_norm": True, "head_size": 32, "tied": False},
    "gpt-as-qwen3": {"kind": "gpt", "kv_heads": 2, **QWEN3},
    "gpt-as-llama": {"kind": "gpt", **QWEN3, "qk_norm": False},
    "gpt2": {"kind": "gpt"},
    "gpt2-no-bias": {"kind": "gpt", "bias": False, "tied": False},
}
ARCHITECTURES = {"gpt-as-qwen3": "qwen3", "gpt-as-llama": "llama"}


def read_back(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file, dequantized by the gguf package."""
    return {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key map as llama.cpp's converter orders them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def expected(run, architecture: str) -> dict[str, np.ndarray]:
    """The tensors of a run by the names that the gguf package has for transformers' names."""
    settings = run.settings
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], settings.layers)
    hugging = {  # a block's parts in transformers
        "attention_norm": "input_layernorm", "feedforward_norm": "post_attention_layernorm",
        "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj", "attention.output": "self_attn.o_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm", "feedforward.gate": "mlp.gate_proj", "feedforward.up": "mlp.up_proj",
        "feedforward.down": "mlp.down_proj",
    }  # fmt: skip
    whole = {"token_embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
    found = {}
    for name, parameter in run.model("cpu").named_parameters():
        stem, _, end = name.rpartition(".")
        array = parameter.detach().numpy()
        if architecture == "llama" and "attention.query." in name:
            array = interleaved(array, settings.heads)
        if architecture == "llama" and "attention.key." in name:
            array = interleaved(array, settings.kv_heads or settings.heads)
        if stem.startswith("blocks."):
            _, number, part = stem.split(".", 2)
            stem = f"model.layers.{number}.{hugging[part]}"
        else:
            stem = whole[stem]
        found[f"{theirs.get_name(stem)}.{end}"] = array
    return found


@pytest.mark.parametrize("name", [name for name in SHAPES if not name.startswith("gpt2")])
def test_every_tensor_comes_back(random_run, tmp_path, name):
    run, architecture = random_run(**SHAPES[name]), ARCHITECTURES.get(name, name.partition("-")[0])
    export_model(run, "gguf", tmp_path / "model.gguf")
    there, want = read_back(tmp_path / "model.gguf"), expected(run, architecture)
    there.pop("rope_freqs.weight", None)
    assert there.keys() == want.keys()
    for tensor, array in want.items():
        np.testing.assert_array_equal(there[tensor].reshape(array.shape), array)


@pytest.mark.parametrize("name", ["gpt2", "gpt2-no-bias"])
def test_gpt2_joins_query_key_and_value(random_run, tmp_path, name):
    run = random_run(**SHAPES[name])
    export_model(run, "gguf", tmp_path / "model.gguf")
    there, own = read_back(tmp_path / "model.gguf"), dict(run.model("cpu").named_parameters())
    parts = [own[f"blocks.1.attention.{part}.weight"].detach() for part in ("query", "key", "value")]
    np.testing.assert_array_equal(there["blk.1.attn_qkv.weight"], torch.cat(parts).numpy())
    assert there["blk.0.attn_qkv.bias"].shape == (192,) and ("output.weight" in there) == (name == "gpt2-no-bias")
    assert there["blk.0.ffn_up.bias"].any() == run.settings.bias


@pytest.mark.parametrize("name", [name for name in SHAPES if not name.startswith("gpt")])
def test_out_and_in_again_is_the_same_model(random_run, tmp_path, name):
    run = random_run(**SHAPES[name], prefix=(0,) if name == "qwen3" else ())
    export_model(run, "gguf", tmp_path / "model.gguf")
    again = import_model(str(tmp_path / "model.gguf"), tmp_path / "again")
    ids = run.tokenizer.encode("The owl calls upon café 森")
    assert again.tokenizer.encode("The owl calls upon café 森") == ids
    torch.testing.assert_close(logits(again, ids), logits(run, ids), rtol=1e-5, atol=1e-5)
    assert (again.prompt_prefix(), again.tokenizer.separator) == (run.prompt_prefix(), run.tokenizer.separator)
    assert again.settings.context_length == 64


def test_metadata(random_run, tmp_path):
    run = random_run(**SHAPES["qwen3"], rotary_base=12345.0)
    export_model(run, "gguf", tmp_path / "model.gguf")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    assert fields["general.name"] == run.path.name and fields["general.architecture"] == "qwen3"
    wanted = {
        "context_length": 64, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96,
        "attention.head_count": 4, "attention.head_count_kv": 1, "attention.key_length": 32,
        "attention.value_length": 32, "rope.dimension_count": 32, "rope.freq_base": 12345.0,
    }  # fmt: skip
    assert {key: fields[f"qwen3.{key}"] for key in wanted} == wanted
    assert fields["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert len(fields["tokenizer.ggml.tokens"]) == run.tokenizer.vocabulary_size
    assert fields["tokenizer.ggml.eos_token_id"] == run.tokenizer.separator
    assert fields["tokenizer.ggml.add_bos_token"] is False


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 1e-3), ("q8_0", 5e-3)])
def test_smaller_types_are_close_and_norms_stay_exact(random_run, tmp_path, kind, tolerance):
    run = random_run(**SHAPES["llama"])
    export_model(run, "gguf", tmp_path / "model.gguf", kind)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.ffn_up.weight"] == kind.upper() and types["blk.0.attn_norm.weight"] == "F32"
    there, want = read_back(tmp_path / "model.gguf"), expected(run, "llama")
    for name, array in want.items():
        np.testing.assert_allclose(there[name].reshape(array.shape), array, atol=tolerance)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kind": "modern", "window": 16}, "a window of 16"),
        ({"kind": "modern", "qk_norm": True, "qkv_bias": True}, "both qk_norm and qkv_bias"),
        ({"kind": "modern", "qk_norm": True, **LLAMA3}, "llama3"),
        ({"kind": "sparse"}, "its kind is sparse"),
        ({"kind": "gpt", "positions": "sinusoidal"}, "positions are sinusoidal"),
        ({"kind": "gpt", "feedforward": "relu"}, "feedforward is relu, not gelu-tanh"),
        ({"kind": "gpt", "kv_heads": 2}, "kv_heads are 2, not as many as heads"),
    ],
)
def test_what_llama_cpp_lacks_is_refused_by_name(random_run, tmp_path, settings, said):
    with pytest.raises(UserError, match=f"{said}.*kind modern"):
        export_model(random_run(**settings), "gguf", tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("gpt", "modern")])
def test_every_other_kind_of_model_is_refused(kind):
    with pytest.raises(UserError, match=f"its kind is {kind}"):
        architecture_of(SimpleNamespace(kind=kind))


def test_an_interrupted_export_leaves_nothing(random_run, tmp_path, monkeypatch):
    def full(self, *arguments, **options):
        raise OSError("1048576 requested and 4096 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_model(random_run(kind="modern"), "gguf", tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


# ---- llama.cpp ----------------------------------------------------------------------------------------------------

TO_LLAMA_CPP = ("llama-odd", "llama-yarn", "llama-3", "qwen2", "qwen3", "gpt-as-llama", "gpt2", "characters")
GREEDY = """
import json, sys, urllib.request, xllamacpp
for path, prompt in json.load(sys.stdin):
    given = xllamacpp.CommonParams()
    given.model.path, given.n_ctx, given.warmup, given.n_gpu_layers = path, 64, False, 0
    given.cpuparams.n_threads = given.cpuparams_batch.n_threads = 1
    given.fit_params = False
    server = xllamacpp.Server(given)
    asked = {"prompt": prompt, "n_predict": 32, "temperature": 0.0, "ignore_eos": True, "return_tokens": True}
    request = urllib.request.Request(server.listening_address + "/completion", json.dumps(asked).encode())
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    print("IDS", json.dumps(json.load(opener.open(request))["tokens"]), flush=True)
"""


def test_llama_cpp_writes_the_same(random_run, characters, tmp_path):
    """Greedy, 32 tokens, of the same prompt as text: its tokenizer must agree too."""
    pytest.importorskip("xllamacpp", reason="xllamacpp (llama.cpp) is not installed")
    prompt, jobs, ours = "The owl calls", [], {}
    for name in TO_LLAMA_CPP:
        known, shape = (None, SHAPES[name]) if name in SHAPES else (characters, SHAPES["llama"])
        run, path = random_run(known, (0,) if name == "llama-odd" else (), **shape), tmp_path / f"{name}.gguf"
        export_model(run, "gguf", path)
        jobs.append((str(path), prompt))
        start = [*run.prompt_prefix(), *run.tokenizer.encode(prompt)]
        end = run.tokenizer.separator  # never written, here and there

        def best(row: torch.Tensor, _: object, end: int = end) -> list[int]:
            return [int(row[0].index_fill(0, torch.tensor(end), -torch.inf).argmax())]

        written = stream(run.model("cpu"), [start], best, torch.device("cpu"))
        ours[name] = [next(written)[0] for _ in range(32)]
    done = subprocess.run([sys.executable, "-c", GREEDY], input=json.dumps(jobs), capture_output=True, text=True)
    theirs = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("IDS")]
    assert len(theirs) == len(jobs), done.stderr[-2000:]
    assert dict(zip(ours, theirs, strict=True)) == ours
