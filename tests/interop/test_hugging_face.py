"""Hugging Face in: transformers' models of random weights, every family in several shapes; and what is refused."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quire
from quire.errors import UserError
from quire.interop import export_model, import_model
from quire.run import Run

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "The owl calls upon the night, and café or 森 are none of its 1234 concerns.\n" * 30
TEXTS = ("the owl", "  two spaces, don't 12345\n\n and café 森!  ", "Ünïcödé\t— I'LL")
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = QWEN2.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")


def its_tokenizer(like: str) -> Any:
    """A little byte-level BPE, configured as that family's published tokenizer is."""
    from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE(ignore_merges=like == "llama3"))
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = {
        "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
        "smollm": lambda: pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
        "qwen2": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN2), "isolated"), rest]),
        "llama3": lambda: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), rest]),
    }[like]()
    if like == "qwen2":
        made.normalizer = normalizers.NFC()
    made.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|begin_of_text|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([TEXT], trainer)
    if like == "llama3":
        made.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 1)]
        )
    return made


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
GROUPED = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2}
ODD = {"hidden_size": 30, "num_attention_heads": 3, "num_key_value_heads": 1}
# What a model is called: its family, its tokenizer, and its shape.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "gpt2", {"n_head": 3}),
    "gpt2-untied": ("gpt2", "gpt2", {
        "n_head": 4, "n_inner": 40, "tie_word_embeddings": False, "activation_function": "relu",
        "layer_norm_epsilon": 1e-3,
    }),
    "llama": ("llama", "llama3", ODD),
    "llama-theta": ("llama", "gpt2", {**GROUPED, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    "llama-3": ("llama", "llama3", {**GROUPED, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5}}),
    "llama-linear": ("llama", "gpt2", {
        **GROUPED, "head_dim": 10, "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    }),
    "llama-yarn": ("llama", "gpt2", {**ODD, "rope_parameters": {**YARN, "rope_theta": 1e4}}),
    "smollm2": ("llama", "smollm", {**GROUPED, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
    "mistral": ("mistral", "gpt2", {**ODD, "sliding_window": 7}),
    "ministral": ("ministral", "gpt2", {
        **GROUPED, "head_dim": 6, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }),
    "mistral-full": ("mistral", "gpt2", {**GROUPED, "head_dim": 6, "sliding_window": None}),
    "qwen2": ("qwen2", "qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", "qwen2", {
        **ODD, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
    }),
    "qwen2-yarn": ("qwen2", "qwen2", {
        **GROUPED, "rope_parameters": {**YARN, "rope_theta": 1e6, "beta_fast": 16.0, "beta_slow": 2.0},
    }),
    "qwen3": ("qwen3", "qwen2", {**GROUPED, "head_dim": 10, "rms_norm_eps": 1e-5}),
    "qwen3-layers": ("qwen3", "qwen2", {
        **ODD, "head_dim": 8, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }),
}  # fmt: skip
SCALED = [name for name, (_, _, shape) in MODELS.items() if "rope_parameters" in shape]


def made(name: str, folder: Path, **saving: Any) -> Any:
    """transformers' model of that name, all its weights random, saved with its tokenizer."""
    family, like, shape = MODELS[name]
    tokenizer = its_tokenizer(like)
    size = {"vocab_size": tokenizer.get_vocab_size() + (7 if like == "qwen2" else 0), "eos_token_id": 0}
    if family == "gpt2":
        size |= {"n_embd": 24, "n_layer": 2, "n_positions": 128, "bos_token_id": 0}
    else:
        size |= {"intermediate_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 128, "bos_token_id": 1}
    config = transformers.CONFIG_MAPPING[family](**{**size, **shape})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(len(name))
    for part, parameter in model.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) / 4
        parameter.data = drawn + 1 if "norm" in part or "ln_" in part else drawn
    model.save_pretrained(folder, **saving)
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return model


def changed(folder: Path, **entries: Any) -> None:
    """Put entries into config.json; ... takes one out."""
    path = folder / "config.json"
    table = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({name: value for name, value in table.items() if value is not ...}))


def some_tokens(model: Any, length: int = 60) -> Tensor:
    return torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(3))


def same_logits(run: Run, model: Any) -> None:
    tokens = some_tokens(model)
    with torch.no_grad():
        expected, found = model(tokens).logits, run.model("cpu")(tokens)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def same_ids(run: Run, tokenizer: Any) -> None:
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert run.prompt_prefix() + run.tokenizer.encode(text) == ids
        assert tokenizer.decode(run.tokenizer.encode(text)) == run.tokenizer.decode(run.tokenizer.encode(text))


def same_text(run: Run, model: Any, tokenizer: Any, **settings: Any) -> None:
    """64 tokens, greedily, as its own `generate` writes them."""
    prompt = tokenizer("the owl", return_tensors="pt")
    with torch.no_grad():
        written = model.generate(**prompt, max_new_tokens=64, do_sample=False, **settings)
    expected = written[0, prompt.input_ids.shape[1] :].tolist()
    (sample,) = quire.generate(run, prompt="the owl", tokens=64, temperature=0, device="cpu")
    ended = [run.tokenizer.separator] if sample.stopped_by == "separator" else []
    assert sample.tokens + ended == expected
    assert len(expected) == 64 or ended


# ---- in ----


@pytest.mark.parametrize("name", MODELS)
def test_an_imported_model_is_the_same_model(name, tmp_path):
    model = made(name, tmp_path / "theirs")
    run = import_model(str(tmp_path / "theirs"), tmp_path / "run")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    same_logits(run, model)
    same_ids(run, tokenizer)
    same_text(run, model, tokenizer, pad_token_id=0, suppress_tokens=run.never_written() or None)
    assert run.settings.vocabulary_size == model.config.vocab_size
    assert run.tokenizer.separator == 0


@pytest.mark.parametrize("name", SCALED)
def test_rotary_settings_are_read_in_the_old_spelling(name, tmp_path):
    model = made(name, tmp_path / "theirs")
    scaling = dict(model.config.rope_parameters)
    theta, kind = scaling.pop("rope_theta"), scaling.pop("rope_type")
    old = None if kind == "default" else {("type" if kind == "linear" else "rope_type"): kind, **scaling}
    changed(tmp_path / "theirs", rope_parameters=..., rope_theta=theta, rope_scaling=old)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    assert again.config.rope_parameters.items() >= model.config.rope_parameters.items()
    same_logits(import_model(str(tmp_path / "theirs"), tmp_path / "run"), model)


def test_layers_that_all_look_alike_make_a_modern_model_and_others_a_sparse_one(tmp_path):
    kinds = {}
    for name in ("mistral", "mistral-full", "qwen2-window", "qwen3-layers"):
        made(name, tmp_path / name)
        kinds[name] = import_model(str(tmp_path / name), tmp_path / f"{name}-run").settings
    assert (kinds["mistral"].kind, kinds["mistral"].window) == ("modern", 7)
    assert (kinds["mistral-full"].kind, kinds["mistral-full"].window) == ("modern", 0)
    assert (kinds["qwen2-window"].kind, kinds["qwen2-window"].attention) == ("sparse", ("full", "window"))
    assert (kinds["qwen3-layers"].kind, kinds["qwen3-layers"].attention) == ("sparse", ("window", "full"))


def test_a_model_in_several_files_and_in_half_precision(tmp_path):
    model = made("qwen3", tmp_path / "theirs", max_shard_size="10KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 2
    same_logits(import_model(str(tmp_path / "theirs"), tmp_path / "run"), model)
    for dtype in (torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        halved = model.to(dtype)
        halved.save_pretrained(folder)
        its_tokenizer("qwen2").save(str(folder / "tokenizer.json"))
        run = import_model(str(folder), tmp_path / f"run-{dtype}")
        own = run.model("cpu").state_dict()
        assert all(tensor.dtype == torch.float32 for tensor in own.values())
        query = halved.model.layers[1].self_attn.q_proj.weight
        assert torch.equal(own["blocks.1.attention.query.weight"], query.float())


def test_gpt2_as_it_was_published_without_the_first_part_of_names_and_with_masks(tmp_path):
    from safetensors.torch import load_file, save_file

    model = made("gpt2", tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file({**tensors, "h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4)}, path)
    same_logits(import_model(str(tmp_path / "theirs"), tmp_path / "run"), model)
    short = import_model(str(tmp_path / "theirs"), tmp_path / "short", context_length=64)
    tokens = some_tokens(model)
    with torch.no_grad():
        torch.testing.assert_close(short.model("cpu")(tokens), model(tokens).logits, rtol=0, atol=1e-4)


def test_what_begins_and_ends_a_text_comes_along(tmp_path):
    made("llama-3", tmp_path / "theirs")
    generation = {"eos_token_id": [5, 0], "bos_token_id": 1}
    (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps(generation))
    (tmp_path / "theirs" / "chat_template.jinja").write_text("{{ messages }}")
    run = import_model(str(tmp_path / "theirs"), tmp_path / "run")
    assert run.prompt_prefix() == [1]
    assert run.tokenizer.separator == 0  # of several, the tokenizer's own
    assert run.manifest["chat_template"] == "{{ messages }}"
    assert run.manifest["start_token"] == 1


def test_an_imported_model_trains_on(tmp_path):
    made("smollm2", tmp_path / "theirs")
    (tmp_path / "more.txt").write_text(TEXT)
    run = import_model(str(tmp_path / "theirs"), tmp_path / "run")
    before = quire.evaluate(run, [str(tmp_path / "more.txt")], device="cpu").validation_loss
    tuned = quire.finetune(run, str(tmp_path / "more.txt"), run=tmp_path / "tuned", steps=10, device="cpu")
    assert quire.evaluate(tuned, [str(tmp_path / "more.txt")], device="cpu").validation_loss < before
    export_model(tuned, "hf", tmp_path / "out")
    same_logits(tuned, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


# ---- bad input ----

REFUSED = {  # a change of config.json, and what the sentence names
    "family": ("llama", {"model_type": "mamba"}, ("'mamba'", "Qwen3")),
    "mixture": ("mistral", {"model_type": "mixtral"}, ("'mixtral'", "Mistral")),
    "quantized": ("llama", {"quantization_config": {"bits": 4}}, ("quantized",)),
    "biases": ("llama", {"attention_bias": True}, ("self_attn.q_proj.bias",)),
    "feedforward biases": ("llama", {"mlp_bias": True}, ("mlp_bias",)),
    "curve": ("qwen2", {"hidden_act": "gelu"}, ("hidden_act", "gelu", "silu")),
    "curve of GPT-2": ("gpt2", {"activation_function": "silu"}, ("activation_function", "gelu_new")),
    "scaled attention": ("gpt2", {"scale_attn_weights": False}, ("scale_attn_weights",)),
    "by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ("scale_attn_by_inverse_layer_idx",)),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ("dynamic", "yarn")),
    "longrope": ("llama", {"rope_parameters": {"rope_type": "longrope"}}, ("longrope", "linear")),
    "part of a head": ("llama", {"partial_rotary_factor": 0.5}, ("partial_rotary_factor",)),
    "sharpened": ("llama", {"rope_parameters": {**YARN, "attention_factor": 3.0}}, ("attention_factor",)),
    "apart": ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ("rope_parameters",)),
    "chunks": ("qwen3", {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["chunked_attention"] * 2},
               ("layer_types", "sliding_attention")),
    "no size": ("llama", {"hidden_size": None}, ("hidden_size",)),
    "words for numbers": ("llama", {"num_hidden_layers": "two"}, ("num_hidden_layers", "'two'")),
    "no heads": ("llama", {"num_attention_heads": 0}, ("heads",)),
    "another shape": ("llama", {"intermediate_size": 41}, ("mlp.gate_proj.weight", "(41, 30)")),
    "more layers": ("llama", {"num_hidden_layers": 3}, ("model.layers.2.input_layernorm.weight",)),
    "fewer layers": ("llama", {"num_hidden_layers": 1}, ("model.layers.1.",)),
    "vocabulary": ("llama", {"vocab_size": 17}, ("model.embed_tokens.weight",)),
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each family, to be copied."""
    folder = tmp_path_factory.mktemp("saved")
    for name in ("gpt2", "llama", "mistral", "qwen2", "qwen3"):
        made(name, folder / name)
    return {path.name: path for path in folder.iterdir()}


def copied(saved: dict[str, Path], name: str, folder: Path) -> Path:
    folder.mkdir()
    for file in saved[name].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_what_quires_models_lack_is_refused_by_name(name, saved, tmp_path):
    family, entries, words = REFUSED[name]
    changed(copied(saved, family, tmp_path / "theirs"), **entries)
    with pytest.raises(UserError) as refusal:
        import_model(str(tmp_path / "theirs"), tmp_path / "run")
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert not (tmp_path / "run").exists()


def test_damage_is_a_sentence(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    def refused(folder: Path, *words: str) -> None:
        with pytest.raises(UserError) as refusal:
            import_model(str(folder), tmp_path / "run")
        assert all(word in str(refusal.value) for word in words), refusal.value
        assert not (tmp_path / "run").exists()

    def theirs(number: int) -> Path:
        return copied(saved, "llama", tmp_path / str(number))

    weights = "model.safetensors"
    tensors = load_file(saved["llama"] / weights)
    for number, size in enumerate((0, 5, 300, 9000)):
        folder = theirs(number)
        (folder / weights).write_bytes((folder / weights).read_bytes()[:size])
        refused(folder, weights, "cut off")
    save_file({**tensors, "model.layers.0.extra": torch.zeros(2)}, theirs(10) / weights)
    refused(tmp_path / "10", "model.layers.0.extra")
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}, theirs(11) / weights)
    refused(tmp_path / "11", "lacks", "model.norm.weight")
    save_file({**tensors, "model.norm.weight": torch.zeros(30, dtype=torch.int8)}, theirs(12) / weights)
    refused(tmp_path / "12", "model.norm.weight", "I8")
    (theirs(13) / weights).rename(tmp_path / "13" / "pytorch_model.bin")
    refused(tmp_path / "13", "pickle", "safetensors")
    for number, name in enumerate(("config.json", "tokenizer.json"), 14):
        (theirs(number) / name).unlink()
        refused(tmp_path / str(number), name)
    for number, name in enumerate(("config.json", "tokenizer.json", "tokenizer_config.json"), 16):
        (theirs(number) / name).write_bytes(b"\xff\x00[")
        refused(tmp_path / str(number), name, "damaged")
    (theirs(20) / weights).unlink()
    (tmp_path / "20" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    refused(tmp_path / "20", "model-1.safetensors")
    (tmp_path / "20" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../19/model.safetensors"}}')
    refused(tmp_path / "20", "damaged")
    refused(saved["llama"] / weights, "Import the folder")


def test_a_command_says_what_is_wrong(saved, tmp_path, quire, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed(copied(saved, "llama", tmp_path / "theirs"), model_type="mamba")
    said = quire("import", "theirs", "--run", "run")
    assert said.code == 2
    assert "'mamba'" in said.plain
    (tmp_path / "empty").mkdir()
    assert quire("import", "empty", "--run", "run").code == 2
    assert quire("import", str(saved["gpt2"]), "--run", "run").code == 0
    said = quire("export", "run", "--to", "hf", "--out", "theirs")
    assert said.code == 2
    assert "exists already" in said.plain
    assert quire("export", "run", "--to", "hf", "--out", "out").code == 0
    assert quire("export", "run", "--to", "hf", "--out", "other", "--type", "f16").code == 2
    assert not (tmp_path / "other").exists()
