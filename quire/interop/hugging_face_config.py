"""config.json of Hugging Face's transformers: what it says of a model, in Quire's settings, and back.

The families, by their model_type: gpt2, llama (SmolLM2 is one), mistral, ministral (a mistral whose layers differ),
qwen2, qwen3. What any of them may say and Quire's models lack is refused by name.
"""

import math
from collections.abc import Collection
from typing import Any, NamedTuple

from quire.config import Table
from quire.errors import UserError

FAMILIES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SUPPORTED = "GPT-2, Llama (SmolLM2 too), Mistral, Qwen2 and Qwen3"

# What a family may say, and what of it Quire's models can be: first the value where nothing is said.
MODERN_ONLY: Table = {"hidden_act": ("silu", "swish"), "mlp_bias": (False,), "partial_rotary_factor": (1.0,)}
ONLY: dict[str, Table] = {
    "gpt2": {
        "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    },
    "llama": MODERN_ONLY,
    "mistral": {"layer_types": (None,), **MODERN_ONLY},
    "qwen2": MODERN_ONLY,
    "ministral": MODERN_ONLY,
    "qwen3": MODERN_ONLY,
}  # fmt: skip
ACTIVATIONS = {  # theirs and ours
    "gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh", "gelu": "gelu", "relu": "relu", "relu2": "squared-relu",
}  # fmt: skip
SCALINGS = ("default", "linear", "llama3", "yarn")
BIASED = ("llama", "qwen3")  # attention_bias gives these biases on the output too, which in Quire's can but be zero
KINDS = {"full_attention": "full", "sliding_attention": "window"}  # of attention, theirs and ours


class Config(NamedTuple):
    """A table of config.json, and where it is from."""

    table: Table
    where: str

    def get(self, name: str, kind: type, default: Any = ...) -> Any:
        """The value of that name, of that kind; `default` where it is null or missing (...: then it is a UserError)."""
        value = self.table.get(name)
        if value is None:
            if default is ...:
                raise UserError(f"{self.where} does not say its {name}.")
            return default
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (isinstance(value, bool) and kind is not bool):
            raise UserError(f"{self.where}: {name} must be of the type {kind.__name__}, not {value!r}.")
        return value

    def no(self, name: str, value: object, known: str) -> UserError:
        """What to raise where Quire's models cannot be as the file says."""
        return UserError(f"{self.where}: {name} is {value!r}, which Quire's models do not have. They have {known}.")


# ---- in -----------------------------------------------------------------------------------------------------------


def family_of(config: Config) -> str:
    """The model_type, if it is one of FAMILIES."""
    family = config.get("model_type", str, "none")
    if family not in FAMILIES:
        raise UserError(f"{config.where}: Quire does not read the family {family!r}. It imports {SUPPORTED}.")
    if config.table.get("quantization_config") is not None:
        raise UserError(f"{config.where}: its weights are quantized. Import the model that it was made from.")
    for name, values in ONLY[family].items():
        if (value := config.table.get(name)) is not None and value not in values:
            raise config.no(name, value, " or ".join(map(repr, values)))
    return family


def settings_of(config: Config) -> Table:
    """The settings of our model of the same shape."""
    family = family_of(config)
    settings = gpt2_settings(config) if family == "gpt2" else modern_settings(config, family)
    return {"vocabulary_size": config.get("vocab_size", int), **settings}


def gpt2_settings(config: Config) -> Table:
    """Those of a GPT-2."""
    size, curve = config.get("n_embd", int), config.get("activation_function", str, "gelu_new")
    if curve not in ACTIVATIONS:
        raise config.no("activation_function", curve, ", ".join(ACTIVATIONS))
    return {
        "kind": "gpt",
        "context_length": config.get("n_positions", int),
        "embedding_size": size,
        "layers": config.get("n_layer", int),
        "heads": config.get("n_head", int),
        "feedforward_size": config.get("n_inner", int, 4 * size),
        "feedforward": ACTIVATIONS[curve],
        "norm_epsilon": config.get("layer_norm_epsilon", float, 1e-5),
        "tied": config.get("tie_word_embeddings", bool, True),
    }


def modern_settings(config: Config, family: str) -> Table:
    """Those of a Llama, Mistral or Qwen."""
    heads = config.get("num_attention_heads", int)
    # Where nothing is said, transformers fills these in: Llama has as many key heads as heads, the others a number.
    kv_heads = config.get("num_key_value_heads", int, {"llama": heads, "mistral": 8, "ministral": 8}.get(family, 32))
    layers, context = config.get("num_hidden_layers", int), config.get("max_position_embeddings", int)
    return {
        "kind": "modern",
        "context_length": context,
        "embedding_size": config.get("hidden_size", int),
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads,
        "head_size": config.get("head_dim", int, 128 if family == "qwen3" else 0),
        "feedforward_size": config.get("intermediate_size", int),
        "norm_epsilon": config.get("rms_norm_eps", float, 1e-6),
        "tied": config.get("tie_word_embeddings", bool, False),
        "qkv_bias": family == "qwen2" or (family in BIASED and config.get("attention_bias", bool, False)),
        "qk_norm": family == "qwen3",
        **rotary(config, context),
        **attention(config, family, layers),
    }


def attention(config: Config, family: str, layers: int) -> Table:
    """What each layer looks at: the kind and those settings that are not the usual ones."""
    window = config.get("sliding_window", int, 0)
    if family in ("mistral", "ministral") and "sliding_window" not in config.table:
        window = 4096
    switched = family in ("qwen2", "qwen3")
    if family == "llama" or (switched and not config.get("use_sliding_window", bool, False)) or window == 0:
        return {}
    first = config.get("max_window_layers", int, 28) if switched else 0
    usual = ["full_attention"] * min(first, layers) + ["sliding_attention"] * (layers - first)
    named = config.get("layer_types", list, usual)
    if len(named) != layers or not set(named) <= set(KINDS):
        raise config.no("layer_types", named, f"{' or '.join(KINDS)} for each of {layers} layers")
    kinds = [KINDS[name] for name in named]
    if "full" not in kinds:
        return {"window": window}
    if "window" not in kinds:
        return {}
    turn = next(n for n in range(2, layers + 1) if all(kinds[i] == kinds[i % n] for i in range(layers)))
    return {"kind": "sparse", "window": window, "attention": kinds[:turn]}


def rotary(config: Config, context: int) -> Table:
    """The rotary settings, in either spelling: rope_theta and rope_scaling, or rope_parameters."""
    table = config.get("rope_scaling", dict, {}) or config.get("rope_parameters", dict, {})
    if any(isinstance(value, dict) for value in table.values()):
        raise config.no("rope_parameters", table, "the same rotary positions in all layers")
    rope = Config(table, f"{config.where}, rotary positions")
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    if kind not in SCALINGS:
        raise rope.no("rope_type", kind, ", ".join(SCALINGS))
    if rope.get("partial_rotary_factor", float, 1.0) != 1:
        raise rope.no("partial_rotary_factor", table["partial_rotary_factor"], "1.0")
    found: Table = {"rotary_base": float(rope.get("rope_theta", float, config.get("rope_theta", float, 10000.0)))}
    if kind == "default":
        return found
    original = rope.get("original_max_position_embeddings", int, context)
    original = config.get("original_max_position_embeddings", int, original)
    factor = rope.get("factor", float, context / original if kind == "yarn" else ...)
    found |= {"rotary_scaling": kind, "rotary_factor": float(factor)}
    if kind == "linear":
        return found
    low, high = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
    missing = ... if kind == "llama3" else 0.0
    found["rotary_low_frequency"] = float(rope.get(low, float, missing))
    found["rotary_high_frequency"] = float(rope.get(high, float, missing))
    if kind == "yarn":
        check_yarn(rope, factor)
    return {**found, "rotary_original_context": original}


def check_yarn(rope: Config, factor: float) -> None:
    """Refuse variants of yarn: another sharpening of attention, or bounds that are not rounded."""
    usual = 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
    sharpening = rope.get("attention_factor", float, usual)
    if not math.isclose(sharpening, usual, rel_tol=1e-6):
        raise rope.no("attention_factor", sharpening, f"{usual:.6g} for the factor {factor:g}")
    if rope.get("mscale", float, 0.0) and rope.get("mscale_all_dim", float, 0.0):
        raise rope.no("mscale", rope.table["mscale"], "yarn without mscale")
    if not rope.get("truncate", bool, True):
        raise rope.no("truncate", False, "yarn with rounded bounds")


# ---- out ----------------------------------------------------------------------------------------------------------

TAKES = (
    "It takes models of kind modern, kind gpt in the shape of GPT-2 (--preset gpt2) or of Qwen3, and kind sparse whose"
    " layers are full or window."
)


def family_for(settings: Any, splits_as_qwen2: bool = False) -> str:
    """The family that has just the parts of a model; a UserError names the setting that none has.

    `splits_as_qwen2` says that the tokenizer is one of Qwen2's kind: transformers takes any of a qwen2 model for one.
    """
    if problem := obstacle(settings):
        raise UserError(f"No family of Hugging Face's that Quire knows fits this model: {problem}. {TAKES}")
    if settings.kind == "gpt" and settings.positions == "learned":
        return "gpt2"
    if settings.qk_norm:
        return "qwen3"
    kinds, biased = set(kinds_of(settings)), getattr(settings, "qkv_bias", False)
    if biased and splits_as_qwen2:
        return "qwen2"
    # transformers refuses a Llama whose embedding is no multiple of its heads; a Mistral is the same model
    if kinds == {"full"} and settings.embedding_size % settings.heads == 0:
        return "llama"
    if biased:
        raise UserError(
            "With qkv_bias this model is a Qwen2, and transformers reads every Qwen2's text as its own tokenizer splits"
            f" it: import one with such a tokenizer, or train without qkv_bias. {TAKES}"
        )
    return "ministral" if len(kinds) == 2 else "mistral"


GPT2_SHAPE = {"normalization": "layernorm", "norm_placement": "pre", "qk_norm": False}
ROTARY_SHAPE = {"normalization": "rmsnorm", "norm_placement": "pre", "feedforward": "swiglu", "bias": False}


def obstacle(settings: Any) -> str | None:
    """The first setting of a model that has no counterpart, in words."""
    if settings.kind in ("modern", "sparse"):
        other = set(getattr(settings, "attention", ())) - {"full", "window"}
        return f"its attention has layers that are {' and '.join(sorted(other))}" if other else None
    if settings.kind != "gpt":
        return f"its kind is {settings.kind}"
    return gpt_obstacle(settings, ACTIVATIONS.values())


def gpt_obstacle(settings: Any, feedforwards: Collection[str]) -> str | None:
    """What a model of kind gpt has that neither a GPT-2, with one of `feedforwards`, nor a rotary decoder can have."""
    if settings.positions == "sinusoidal":
        return "its positions are sinusoidal"
    learned = settings.positions == "learned"
    for name, value in (GPT2_SHAPE if learned else ROTARY_SHAPE).items():
        if getattr(settings, name) != value:
            return f"with positions {settings.positions} its {name} is {getattr(settings, name)}, not {value}"
    if learned and settings.feedforward not in feedforwards:
        return f"with positions learned its feedforward is {settings.feedforward}, not {' or '.join(feedforwards)}"
    if learned and settings.kv_heads not in (0, settings.heads):
        return f"with positions learned its kv_heads are {settings.kv_heads}, not as many as heads"
    if learned and settings.head_channels * settings.heads != settings.embedding_size:
        return f"with positions learned its head_size is {settings.head_size}, not embedding_size / heads"
    return None


def kinds_of(settings: Any) -> list[str]:
    """What the attention of each layer looks at: full or window."""
    if settings.kind == "gpt" or not settings.window:
        return ["full"] * settings.layers
    by_turns = getattr(settings, "attention", ("window",))
    return [by_turns[layer % len(by_turns)] for layer in range(settings.layers)]


def config_of(settings: Any, family: str, ends: Table) -> Table:
    """The contents of config.json; `ends` are the ids of special tokens by their names there."""
    return {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": settings.vocabulary_size,
        **(gpt2_config(settings) if family == "gpt2" else modern_config(settings, family)),
        "tie_word_embeddings": settings.tied,
        **ends,
        "dtype": "float32",
        "torch_dtype": "float32",  # the same for transformers before 4.56
        "use_cache": True,
    }


def gpt2_config(settings: Any) -> Table:
    """What is said of a GPT-2."""
    curves = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    return {
        "n_positions": settings.context_length,
        "n_embd": settings.embedding_size,
        "n_layer": settings.layers,
        "n_head": settings.heads,
        "n_inner": settings.feedforward_size or 4 * settings.embedding_size,
        "activation_function": curves[settings.feedforward],
        "layer_norm_epsilon": settings.norm_epsilon,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), settings.dropout),
    }


def modern_config(settings: Any, family: str) -> Table:
    """What is said of a Llama, Mistral or Qwen; of rotary positions in both spellings, old and new."""
    scaling = scaling_of(settings)
    return {
        "max_position_embeddings": settings.context_length,
        "hidden_size": settings.embedding_size,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.kv_heads or settings.heads,
        "head_dim": settings.head_channels,
        "intermediate_size": settings.feedforward_size or 4 * settings.embedding_size,
        "hidden_act": "silu",
        "rms_norm_eps": settings.norm_epsilon,
        "attention_dropout": settings.dropout,
        "rope_theta": settings.rotary_base,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", "rope_theta": settings.rotary_base, **scaling},
        **({"attention_bias": getattr(settings, "qkv_bias", False)} if family in BIASED else {}),
        **window_of(settings, family),
    }


def window_of(settings: Any, family: str) -> Table:
    """What each layer looks at, in the words of its family."""
    kinds = kinds_of(settings)
    window = settings.window if "window" in kinds else None
    if family in ("llama", "mistral"):
        return {"mlp_bias": False} if family == "llama" else {"sliding_window": window}
    names = {ours: theirs for theirs, ours in KINDS.items()}
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": next((n for n, kind in enumerate(kinds) if kind == "window"), settings.layers),
        "layer_types": [names[kind] for kind in kinds],
    }


def scaling_of(settings: Any) -> Table:
    """How rotary angles are scaled; empty where they are not."""
    kind = getattr(settings, "rotary_scaling", "none")
    if kind == "none":
        return {}
    found = {"rope_type": kind, "factor": settings.rotary_factor}
    if kind == "linear":
        return found
    low, high = settings.rotary_low_frequency or 1.0, settings.rotary_high_frequency
    names = ("low_freq_factor", "high_freq_factor") if kind == "llama3" else ("beta_slow", "beta_fast")
    found |= {names[0]: low, names[1]: high or {"llama3": 4.0, "yarn": 32.0}[kind]}
    return {**found, "original_max_position_embeddings": settings.rotary_original_context}
