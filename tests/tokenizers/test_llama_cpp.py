"""llama.cpp itself, through the package xllamacpp, gives a text the ids of the tokenizer that was written for it."""

import json
import unicodedata
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from quire.tokenizers import CharacterTokenizer, Tokenizer
from quire.tokenizers.gguf import to_gguf
from quire.tokenizers.hugging_face import from_hugging_face

NO_PACKAGE = "the packages gguf and xllamacpp, with which llama.cpp reads a file, are not installed"
gguf = pytest.importorskip("gguf", reason=NO_PACKAGE)
xllamacpp = pytest.importorskip("xllamacpp", reason=NO_PACKAGE)


def write(parts: dict[str, Any], path: Path) -> None:
    """A file of such a tokenizer and of the smallest model that there is."""
    file, size, words = gguf.GGUFWriter(path, "llama"), 32, len(parts["tokens"])
    file.add_context_length(64)
    file.add_embedding_length(size)
    file.add_block_count(1)
    file.add_feed_forward_length(size)
    file.add_head_count(2)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_dimension_count(size // 2)
    file.add_vocab_size(words)
    file.add_tokenizer_model(parts["model"])
    file.add_tokenizer_pre(parts["pre"])
    file.add_token_list(parts["tokens"])
    file.add_token_types(parts["token_types"])
    if parts["model"] == "llama":
        file.add_token_scores(parts["scores"])
        file.add_add_space_prefix(parts["add_space_prefix"])
    else:
        file.add_token_merges(parts["merges"])
    file.add_bos_token_id(parts["bos"])
    file.add_eos_token_id(parts["eos"])
    file.add_add_bos_token(parts["add_bos"])
    shapes = {"token_embd": (words, size), "output": (words, size), "output_norm": (size,)}
    shapes |= {f"blk.0.{name}": (size,) for name in ("attn_norm", "ffn_norm")}
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": (size, size) for name in square}
    for name, shape in shapes.items():
        file.add_tensor(f"{name}.weight", np.full(shape, 0.01, dtype=np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture
def served(tmp_path: Path) -> Callable[[Tokenizer], Callable[..., dict[str, Any]]]:
    """served(tokenizer)(what, **question): the answer of llama.cpp's server."""

    def serve(tokenizer: Tokenizer) -> Callable[..., dict[str, Any]]:
        write(to_gguf(tokenizer), tmp_path / "model.gguf")
        wanted = xllamacpp.CommonParams()
        wanted.model.path, wanted.n_ctx, wanted.warmup, wanted.n_parallel = str(tmp_path / "model.gguf"), 64, False, 1
        server = xllamacpp.Server(wanted)

        def ask(what: str, **question: Any) -> dict[str, Any]:
            data, head = json.dumps(question).encode(), {"Content-Type": "application/json"}
            with urllib.request.urlopen(urllib.request.Request(f"{server.listening_address}/{what}", data, head)) as it:
                return json.load(it)

        return ask

    return serve


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama3", "smollm2", "llama2", "no-prefix", "characters"])
def test_llama_cpp_gives_the_same_ids(name, family, texts, served):
    parts = [unicodedata.normalize("NFC", text).replace("\0", "") for text in texts(120, seed=90)]
    if name == "characters":
        parts = [text.replace("\u2581", "") for text in parts]
        ours: Tokenizer = CharacterTokenizer.train(parts)
    else:
        ours = from_hugging_face(family(name))
    ask = served(ours)
    for text in parts:
        ids = ours.encode(text, special="text")
        assert ask("tokenize", content=text, add_special=False, parse_special=False)["tokens"] == ids
