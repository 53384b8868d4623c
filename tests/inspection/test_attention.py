"""Attention weights: those that the fused kernel works with, of every kind of model; and the run's way to them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quire.config import preset
from quire.errors import UserError
from quire.inspection import attention as inspected
from quire.inspection.attention import ScaledDotProductAttention, attention, longest, record
from quire.layers.embedding import Embedding
from quire.layers.layer import Layer
from quire.models import MODELS
from quire.models.gpt import GPT, GPTSettings
from quire.run import Run


def random_tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(12, shape, generator=torch.Generator().manual_seed(seed))


def sequences(model: Any) -> dict[str, Tensor]:
    source = {"prompt": random_tokens(2, 7, seed=5)} if model.settings.reads_source else {}
    return {**source, "written": random_tokens(2, 11)}


# ---- the weights are the fused path's ----


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_recorded_weights_are_those_of_the_fused_path(kind: str, small_model) -> None:
    """They give, from the same values, what the kernel gives; through the output map, what the layer gives."""
    model = small_model(kind)
    rows = sequences(model)
    seen: dict[str, tuple] = {}

    def watch(name: str) -> Any:
        return lambda module, inputs, output: seen.__setitem__(name, (inputs, output))

    layers = {name: m for name, m in model.named_modules() if isinstance(m, ScaledDotProductAttention)}
    if not layers:
        pytest.skip(f"{kind} has no attention")
    outer = {name.removesuffix(".attend"): model.get_submodule(name.removesuffix(".attend")) for name in layers}
    hooks = [module.register_forward_hook(watch(name)) for name, module in {**layers, **outer}.items()]
    fused = model(rows["written"], **({"source": rows["prompt"]} if "prompt" in rows else {}))
    for hook in hooks:
        hook.remove()

    logits, weights = record(model, rows)
    assert float((logits - fused).abs().max()) < 1e-5 and float(fused.std()) > 0.1
    assert list(weights) == list(outer), "every attention layer, in the model's order"
    for name, found in weights.items():
        inner = name + ".attend" if name + ".attend" in layers else name
        (_, key, value, *_), mixed = seen[inner]
        assert found.shape[2:] == (mixed.shape[2], key.shape[2]) and found.dtype == torch.float32
        assert float((found.sum(-1) - 1).abs().max()) < 1e-5 and float(found.min()) >= 0
        again = found @ value.repeat_interleave(found.shape[1] // value.shape[1], 1)
        assert float((again - mixed).abs().max()) < 1e-5
        through = model.get_submodule(name).output(again.transpose(1, 2).flatten(2))
        assert float((through - seen[name][1]).abs().max()) < 1e-5


def test_weights_are_transformers_own() -> None:
    """GPT-2 with copied weights: its output_attentions, layer by layer and head by head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    shape = {"vocab_size": 31, "n_positions": 16, "n_embd": 12, "n_layer": 3, "n_head": 3}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, attn_implementation="eager")).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    settings = {**preset("gpt2")["model"], "vocabulary_size": 31, "context_length": 16, "embedding_size": 12}
    ours = GPT(GPTSettings(**{**settings, "layers": 3, "heads": 3}))
    names = {"h.": "blocks.", "ln_1": "attention_norm", "ln_2": "feedforward_norm", "wte": "token_embedding",
             "wpe": "positions", "ln_f": "norm", "lm_head": "head", "attn.c_proj": "attention.output",
             "mlp.c_fc": "feedforward.up", "mlp.c_proj": "feedforward.down"}  # fmt: skip
    state: dict[str, Tensor] = {}
    for name, tensor in theirs.state_dict().items():
        name = name.removeprefix("transformer.")
        for old, new in names.items():
            name = name.replace(old, new)
        tensor = tensor.T if "blocks" in name and tensor.dim() == 2 else tensor  # their Conv1D is (inputs, outputs)
        parts = zip(("query", "key", "value"), tensor.chunk(3)) if "attn.c_attn" in name else [("", tensor)]
        state.update({name.replace("attn.c_attn", f"attention.{part}"): third for part, third in parts})
    ours.load_state_dict(state)

    rows = torch.randint(31, (2, 16), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        expected = theirs(rows, output_attentions=True).attentions
    _, weights = record(ours, {"prompt": rows})
    assert list(weights) == [f"blocks.{n}.attention" for n in range(3)]
    for found, wanted in zip(weights.values(), expected, strict=True):
        assert float((found - wanted).abs().max()) < 1e-5
        assert float(wanted.std()) > 0.05


def test_recording_leaves_the_model_as_it_was(small_model) -> None:
    model = small_model("gpt").train()
    for tokens in ([1, 2, 3], [99]):  # the second is none of its tokens: the forward fails
        try:
            record(model, {"prompt": tokens})
            assert tokens == [1, 2, 3]
        except IndexError:
            assert tokens == [99]
        assert model.training
        assert all(layer.tape is None for layer in model.modules() if isinstance(layer, Layer))
        assert not any(layer._forward_hooks for layer in model.modules())


# ---- of a run ----


def test_a_runs_attention(tiny: Run) -> None:
    prompt = "The owl calls"
    model = tiny.model("cpu")
    found = attention(tiny, prompt, device="cpu")
    ids = tiny.tokenizer.encode(prompt)
    assert found.ids == {"prompt": ids} and found.tokens == {"prompt": list(prompt)}
    assert (found.predicted, found.left_out) == ("prompt", 0)
    (layer,) = found.layers
    assert (layer.name, layer.queries, layer.keys) == ("blocks.0.attention", "prompt", "prompt")
    assert layer.weights.shape == (2, 13, 13)
    assert (layer.weights[:, *torch.ones(13, 13).triu(1).nonzero().T.numpy()] == 0).all(), "nobody looks ahead"
    with torch.no_grad():
        probabilities = model(torch.tensor([ids]))[0].softmax(-1)
    for expected, row in zip(probabilities, found.alternatives, strict=True):
        best = expected.sort(descending=True, stable=True)
        assert [other.text for other in row] == [tiny.tokenizer.name(i) for i in best.indices[:5].tolist()]
        assert [other.probability for other in row] == pytest.approx(best.values[:5].tolist(), abs=1e-5)


def test_a_prompt_too_long_loses_its_beginning(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = Path("book.txt").read_text(encoding="utf-8")
    found = attention(tiny, prompt, device="cpu")  # its context is 32
    assert "".join(found.tokens["prompt"]) == prompt[-32:] and found.left_out == len(prompt) - 32
    monkeypatch.setattr(tiny, "prompt_prefix", lambda: [1, 1])
    found = attention(tiny, prompt, device="cpu")
    assert found.ids["prompt"][:2] == [1, 1] and "".join(found.tokens["prompt"][2:]) == prompt[-30:]


def test_many_heads_shorten_what_is_shown(small_model, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights together stay below a bound: a page of them can be opened."""
    model = small_model("gpt")
    assert longest(model, 0) == 12
    monkeypatch.setattr(inspected, "CELLS", 600)
    assert longest(model, 0) == 7 == math.isqrt(600 // (3 * 4))
    monkeypatch.setattr(inspected, "LONGEST", 5)
    assert longest(model, 0) == 5


def test_what_cannot_be_shown_is_said(tiny: Run) -> None:
    with pytest.raises(UserError, match="The prompt is empty"):
        attention(tiny, "")
    with pytest.raises(UserError, match=r"lacks 'Ω'"):
        attention(tiny, "Ωmega")
    assert attention(tiny, "ΩThe", unknown="skip", device="cpu").tokens["prompt"] == list("The")
    without = nn.Sequential(Embedding(4, 4))
    with pytest.raises(UserError, match=r"tiny is a model of the kind 'gpt' without attention.*quire look tiny"):
        attention(tiny, "The", model=without)


# ---- an encoder-decoder ----


def test_an_encoder_decoder_names_who_looks_at_what(tiny: Run, small_model) -> None:
    shape = {"vocabulary_size": tiny.tokenizer.vocabulary_size, "separator": tiny.tokenizer.separator}
    model = small_model("encoder-decoder", context_length=32, layers=1, **shape)
    found = attention(tiny, "The owl", model=model)
    written = found.ids["written"]
    assert found.tokens["prompt"] == list("The owl") and written[0] == tiny.tokenizer.separator
    assert [(layer.name, layer.queries, layer.keys) for layer in found.layers] == [
        ("encoder.0.attention", "prompt", "prompt"),
        ("decoder.0.attention", "written", "written"),
        ("decoder.0.cross_attention", "written", "prompt"),
    ]
    assert found.layers[2].weights.shape == (4, len(written), 7)
    assert found.predicted == "written" and len(found.alternatives) == len(written) > 1
    names = [tiny.tokenizer.name(i) for i in written]
    assert [row[0].text for row in found.alternatives[:-1]] == names[1:], "it is written greedily"
