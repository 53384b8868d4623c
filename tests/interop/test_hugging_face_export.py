"""Hugging Face out: runs of every shape that a family has, loaded by transformers; and shapes that none has."""

import json
import os

import pytest
import torch

import quire
from quire.errors import UserError
from quire.interop import export_model, import_model
from quire.models import MODELS, ModelSettings
from quire.tokenizers import BPETokenizer, WordTokenizer

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")

TEXT = "The owl calls upon the night, and café or 森 are none of its 1234 concerns.\n" * 30
ROTARY = {
    "kind": "gpt", "positions": "rotary", "normalization": "rmsnorm", "feedforward": "swiglu", "bias": False,
}  # fmt: skip
LLAMA3 = {
    "rotary_scaling": "llama3", "rotary_factor": 4.0, "rotary_original_context": 32, "rotary_high_frequency": 3.0,
}  # fmt: skip
RUNS = {  # settings, and the family that has just these parts
    "gpt2": ({"kind": "gpt"}, "gpt2"),
    "gpt2-plain": ({"kind": "gpt", "bias": False, "feedforward": "squared-relu", "tied": False}, "gpt2"),
    "rotary": ({**ROTARY, "kv_heads": 2, "rotary_base": 500.0}, "llama"),
    "qwen3-shape": ({**ROTARY, "qk_norm": True, "head_size": 10}, "qwen3"),
    "modern": ({"kind": "modern", "kv_heads": 1, "tied": False, "norm_epsilon": 1e-6}, "llama"),
    "uneven": ({"kind": "modern", "embedding_size": 30, "head_size": 10}, "mistral"),
    "llama3": ({"kind": "modern", **LLAMA3}, "llama"),
    "linear": ({"kind": "modern", "rotary_scaling": "linear", "rotary_factor": 2.0, "qkv_bias": True}, "llama"),
    "yarn": ({"kind": "modern", **LLAMA3, "rotary_scaling": "yarn", "qk_norm": True}, "qwen3"),
    "window": ({"kind": "modern", "window": 6, "kv_heads": 2}, "mistral"),
    "window-qwen3": ({"kind": "modern", "window": 6, "qkv_bias": True, "qk_norm": True}, "qwen3"),
    "sparse": ({"kind": "sparse", "window": 5, "layers": 3, "kv_heads": 2}, "ministral"),
    "sparse-qwen3": ({"kind": "sparse", "window": 5, "attention": ["full", "window"], "qk_norm": True}, "qwen3"),
}


@pytest.mark.parametrize("name", RUNS)
def test_transformers_loads_what_was_exported(name, random_run, tmp_path):
    settings, family = RUNS[name]
    run = random_run(context_length=128, **settings)
    export_model(run, "hf", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.config.model_type == family

    tokens = torch.randint(run.settings.vocabulary_size, (2, 60), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected, found = run.model("cpu")(tokens), theirs(tokens).logits
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)

    for text in ("the owl", "  don't 12345\n\n café 森!  "):
        assert tokenizer(text).input_ids == run.tokenizer.encode(text)
        assert tokenizer.decode(run.tokenizer.encode(text)) == text
    prompt = tokenizer("the owl", return_tensors="pt")
    written = theirs.generate(**prompt, max_new_tokens=64, do_sample=False)[0, prompt.input_ids.shape[1] :].tolist()
    (sample,) = quire.generate(run, prompt="the owl", tokens=64, temperature=0, device="cpu")
    assert sample.tokens + ([run.tokenizer.separator] if sample.stopped_by == "separator" else []) == written

    again = import_model(str(tmp_path / "out"), tmp_path / "again")
    ours, back = run.model("cpu").state_dict(), again.model("cpu").state_dict()
    assert all(torch.equal(ours[name], back[name]) for name in ours)
    assert not any(back[name].any() for name in back.keys() - ours.keys())  # biases of zero, which that family has
    assert again.tokenizer.to_table() == run.tokenizer.to_table()
    if settings["kind"] == "modern" and name != "uneven":
        same = {"head_size": again.settings.head_size, "kv_heads": again.settings.kv_heads}
        scaled = {field: getattr(again.settings, field) for field in ("rotary_low_frequency", "rotary_high_frequency")}
        assert again.settings == type(run.settings)(**{**vars(run.settings), **same, **scaled})


def test_characters_and_what_stands_before_every_text(random_run, characters, byte_bpe, tmp_path):
    run = random_run(tokenizer=characters, kind="modern")
    export_model(run, "hf", tmp_path / "characters")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "characters")
    assert tokenizer("The café 森 12.").input_ids == characters.encode("The café 森 12.")
    assert tokenizer.decode(characters.encode("The  café")) == "The  café"
    assert import_model(str(tmp_path / "characters"), tmp_path / "again").tokenizer.to_table() == characters.to_table()

    run = random_run(prefix=(byte_bpe.separator,), kind="modern")
    export_model(run, "hf", tmp_path / "prefix")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "prefix")
    assert tokenizer("the owl").input_ids == [byte_bpe.separator, *byte_bpe.encode("the owl")]
    assert import_model(str(tmp_path / "prefix"), tmp_path / "twice").prompt_prefix() == [byte_bpe.separator]


REFUSED = {
    "post-norm": ({"kind": "gpt", "norm_placement": "post"}, "norm_placement"),
    "sinusoidal": ({"kind": "gpt", "positions": "sinusoidal"}, "sinusoidal"),
    "shared heads": ({"kind": "gpt", "kv_heads": 2}, "kv_heads"),
    "wide heads": ({"kind": "gpt", "head_size": 20}, "head_size"),
    "rmsnorm": ({"kind": "gpt", "normalization": "rmsnorm"}, "normalization"),
    "swiglu": ({"kind": "gpt", "feedforward": "swiglu"}, "feedforward"),
    "biased rotary": ({**ROTARY, "bias": True}, "bias"),
    "biased window": ({"kind": "modern", "window": 6, "qkv_bias": True}, "qkv_bias"),
    "strided": ({"kind": "sparse", "attention": ["window", "strided"]}, "strided"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_shape_without_a_family_is_refused_by_name(name, random_run, tmp_path):
    settings, word = REFUSED[name]
    with pytest.raises(UserError, match=word):
        export_model(random_run(**settings), "hf", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind not in ("gpt", "modern", "sparse")])
def test_other_kinds_are_refused_by_name(kind):
    from quire.interop.hugging_face_config import family_for

    with pytest.raises(UserError, match=kind):
        family_for(ModelSettings(kind=kind))


@pytest.mark.parametrize("kind", [BPETokenizer, WordTokenizer])
def test_a_tokenizer_that_no_other_program_has_is_refused_with_what_to_use(kind, random_run, tmp_path):
    run = random_run(tokenizer=kind.train([TEXT], 300), kind="modern")
    with pytest.raises(UserError, match="byte-bpe"):
        export_model(run, "hf", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_trained_run_goes_out_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "more.txt").write_text(TEXT)
    run = quire.train(
        str(tmp_path / "more.txt"), run=tmp_path / "new", preset="gpt2", steps=3, tokenizer="byte-bpe",
        vocabulary_size=300,
        model={"layers": 1, "heads": 2, "embedding_size": 16, "context_length": 32}, device="cpu",
    )  # fmt: skip
    export_model(run, "hf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["eos_token_id"] == run.tokenizer.separator
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["suppress_tokens"] == run.never_written()  # it never met a separator as a target
    with pytest.raises(UserError, match="exists already"):
        export_model(run, "hf", tmp_path / "out")
    from quire import files

    def broken(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_text", broken)
    with pytest.raises(OSError):
        export_model(run, "hf", tmp_path / "other")
    assert not list(tmp_path.glob("other*"))
