"""Every preset is a whole, valid configuration, and each named model has the size its name promises."""

import pytest
import torch

from quire.config import PRESETS, preset
from quire.models import build_model
from quire.training.settings import LENGTHS, layered, typed

PARAMETERS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3": 174_604_259_328,
}


def parameters(name: str) -> int:
    with torch.device("meta"):
        model = build_model(typed(layered(name)).with_model(vocabulary_size=vocabulary(name)).model)
    return sum(parameter.numel() for parameter in model.parameters())


def vocabulary(name: str) -> int:
    """The preset's, or one such as a character tokenizer gives."""
    return preset(name)["model"].get("vocabulary_size", 100)


def test_the_presets_that_are_promised():
    assert {"default", "gpt-mini", "gpt3", "vaswani-decoder", *PARAMETERS} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_builds_typed_settings_and_a_model(name):
    settings = typed(layered(name))
    assert sum(bool(getattr(settings.training, length)) for length in LENGTHS) == 1
    assert typed(settings.tables()) == settings  # spelled out in full, it is the same
    assert parameters(name) > 10_000


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert parameters(name) == PARAMETERS[name]


def test_gpt3_has_175_billion_parameters():
    """By the paper's own shapes: 12 C^2 weights and 13 C biases and norms a layer, two embeddings, a last norm."""
    layers, size, context, words = 96, 12288, 2048, 50257
    by_formula = layers * (12 * size**2 + 13 * size) + (words + context) * size + 2 * size
    assert PARAMETERS["gpt3"] == by_formula
    assert PARAMETERS["gpt3"] == pytest.approx(174.6e9, rel=0.005)
    assert round(PARAMETERS["gpt3"] / 1e9) == 175


def test_gpt2_s_whole_recipe():
    settings = typed(layered("gpt2"))
    model, training = settings.model, settings.training
    assert (model.layers, model.heads, model.embedding_size) == (12, 12, 768)
    assert (model.context_length, model.vocabulary_size, model.dropout) == (1024, 50257, 0.0)
    assert (model.positions, model.normalization, model.norm_placement) == ("learned", "layernorm", "pre")
    assert (model.feedforward, model.bias, model.tied, model.qk_norm) == ("gelu-tanh", True, True, False)
    assert (training.batch_size, training.accumulation_steps, training.steps) == (12, 10, 600_000)
    assert (training.optimizer, training.learning_rate, training.weight_decay) == ("adamw", 6e-4, 0.1)
    assert (training.beta1, training.beta2, training.gradient_clip) == (0.9, 0.95, 1.0)
    assert (training.schedule, training.warmup_steps, training.decay_floor) == ("cosine", 2000, 0.1)


def test_the_other_shapes_the_presets_promise():
    mini = typed(layered("gpt-mini")).model
    assert (mini.layers, mini.heads, mini.embedding_size) == (6, 6, 192)
    gpt3 = typed(layered("gpt3")).model
    assert (gpt3.layers, gpt3.heads, gpt3.embedding_size, gpt3.context_length) == (96, 96, 12288, 2048)
    vaswani = typed(layered("vaswani-decoder")).model
    assert (vaswani.positions, vaswani.norm_placement, vaswani.feedforward) == ("sinusoidal", "post", "relu")
    default = typed(layered("default")).model  # what Qwen3ForCausalLM can load
    assert (default.kind, default.qk_norm, default.qkv_bias, default.window) == ("modern", True, False, 0)
