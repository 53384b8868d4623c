"""The modern decoder beside transformers: each family with the same weights gives the same logits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quire.errors import UserError
from quire.layers.positions import RotaryPositions, RotaryScaling
from quire.models.modern import Modern, ModernSettings
from quire.training.settings import layered, typed

SHAPE = {
    "vocabulary_size": 31, "context_length": 24, "embedding_size": 12, "layers": 3, "heads": 3, "kv_heads": 1,
    "head_size": 6, "feedforward_size": 20, "norm_epsilon": 1e-6,
}  # fmt: skip
RENAMED = [
    ("layers.", "blocks."), ("input_layernorm", "attention_norm"), ("self_attn", "attention"),
    ("post_attention_layernorm", "feedforward_norm"), ("mlp", "feedforward"), ("embed_tokens", "token_embedding"),
    ("lm_head", "head"), ("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "output"),
    ("q_norm", "query_norm"), ("k_norm", "key_norm"), ("_proj", ""), ("model.", ""),
]  # fmt: skip


def transformers_model(family: str, settings: ModernSettings, rope: dict[str, Any], **more: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=settings.vocabulary_size, hidden_size=settings.embedding_size,
        intermediate_size=settings.feedforward_size, num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads, num_key_value_heads=settings.kv_heads or settings.heads,
        head_dim=settings.head_channels, max_position_embeddings=settings.context_length,
        rms_norm_eps=settings.norm_epsilon, rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **rope},
        tie_word_embeddings=settings.tied, hidden_act="silu", attn_implementation="eager", **more,
    )  # fmt: skip
    torch.manual_seed(6)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def with_weights_of(theirs: Any, settings: ModernSettings) -> Modern:
    renamed: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        renamed[name] = tensor
    ours = Modern(settings)
    ours.load_state_dict(renamed)
    return ours.eval()


def agree(theirs: Any, settings: ModernSettings, length: int = 24) -> None:
    rows = torch.randint(settings.vocabulary_size, (2, length), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = theirs(rows).logits, with_weights_of(theirs, settings)(rows)
    assert float(expected.std()) > 0.1
    assert float((found - expected).abs().max()) < 1e-5


FAMILIES = {
    "Llama": ({}, {"attention_bias": False}),
    "Qwen2": ({"qkv_bias": True, "head_size": 0}, {}),
    "Qwen3": ({"qk_norm": True}, {"attention_bias": False}),
    "Mistral": ({"window": 5}, {"sliding_window": 5}),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_transformers(family, tied):
    ours, more = FAMILIES[family]
    settings = ModernSettings(**{**SHAPE, **ours, "tied": tied})
    agree(transformers_model(family, settings, {}, **more), settings)


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALINGS = {
    "none": ({}, {}),
    "linear": ({"rotary_factor": 3.0}, {"factor": 3.0}),
    "yarn": (
        {"rotary_factor": 4.0, "rotary_original_context": 16},
        {"factor": 4.0, "original_max_position_embeddings": 16},
    ),
    "llama3": (
        {"rotary_factor": 8.0, "rotary_original_context": 16},
        {"factor": 8.0, "original_max_position_embeddings": 16, **LLAMA3},
    ),
}


@pytest.mark.parametrize("base", [100.0, 1e6])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_scaled_rotary_positions_of_transformers(scaling, base):
    """Short original contexts, so that each of the three parts of the frequencies is there."""
    ours, theirs = SCALINGS[scaling]
    settings = ModernSettings(**{**SHAPE, **ours, "head_size": 16, "rotary_scaling": scaling, "rotary_base": base})
    rope = {**theirs, "rope_type": "default" if scaling == "none" else scaling, "rope_theta": base}
    agree(transformers_model("Llama", settings, rope, attention_bias=False), settings)


def test_the_bounds_of_the_scaled_part_count():
    positions = torch.arange(50)
    plain = RotaryPositions(16, 100.0, RotaryScaling("llama3", 8.0, 64)).angles(positions)[0]
    same = RotaryPositions(16, 100.0, RotaryScaling("llama3", 8.0, 64, 1.0, 4.0)).angles(positions)[0]
    other = RotaryPositions(16, 100.0, RotaryScaling("llama3", 8.0, 64, 2.0, 6.0)).angles(positions)[0]
    assert torch.equal(plain, same) and not torch.equal(plain, other)


def test_the_default_model_has_qwen3_s_shape():
    settings = typed(layered("default")).with_model(vocabulary_size=87).model
    theirs = transformers_model("Qwen3", settings, {}, attention_bias=False)
    agree(theirs, settings, settings.context_length)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"head_size": 5}, "head size 5 must be even"),
        ({"window": -1}, "--model.window must be at least 1"),
        ({"rotary_factor": 0.5}, "--model.rotary-factor must be at least 1"),
        ({"rotary_scaling": "yarn"}, "needs --model.rotary-original-context"),
        ({"rotary_low_frequency": 5.0, "rotary_high_frequency": 4.0}, "must be above --model.rotary-low-frequency"),
    ],
)
def test_what_cannot_be(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        ModernSettings(**{**SHAPE, **changes})
