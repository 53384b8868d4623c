"""GPT: its gradients over every mixture of parts, its logits beside transformers', its cache, what it writes."""

import itertools
import math
import random
from collections.abc import Sequence
from itertools import islice
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quire.config import preset
from quire.generation.sampling import SamplingSettings, sample
from quire.generation.stream import tokens
from quire.layers.cross_entropy import IGNORED
from quire.layers.layer import Layer, recording
from quire.models.gpt import GPT, GPTSettings

CPU = torch.device("cpu")


def gpt(weights: float = 1 / 3, **settings: Any) -> GPT:
    """A GPT in float64 all of whose weights, biases and norms too, are random numbers of that size."""
    size = {"vocabulary_size": 11, "context_length": 8, "embedding_size": 8, "layers": 2, "heads": 4}
    model = GPT(GPTSettings(**{**size, "feedforward_size": 12, **settings})).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, dtype=torch.float64, generator=generator) * weights
    return model


def random_tokens(*shape: int, below: int = 11, seed: int = 2) -> Tensor:
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(seed))


# ---- gradients ----

PARTS: dict[str, Sequence[Any]] = {
    "positions": ("learned", "sinusoidal", "rotary"),
    "normalization": ("layernorm", "rmsnorm"),
    "norm_placement": ("pre", "post"),
    "feedforward": ("gelu-tanh", "gelu", "relu", "squared-relu", "swiglu"),
    "tied": (True, False),
    "qk_norm": (True, False),
    "kv_heads": (0, 2, 1),
    "head_size": (0, 6),
    "bias": (True, False),
    "dropout": (0.0, 0.2),
    "padding": ("none", "left", "right"),
}


def covering(parts: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Mixtures in which every two choices of different parts meet at least once."""
    draw, names = random.Random(1), list(parts)
    left = {
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x, y in itertools.product(parts[a], parts[b])
    }
    chosen = []
    while left:
        mixtures = [{name: draw.choice(parts[name]) for name in names} for _ in range(40)]
        pairs = [left.intersection(itertools.combinations(mixture.items(), 2)) for mixture in mixtures]
        best = max(range(40), key=lambda i: len(pairs[i]))
        if pairs[best]:
            chosen.append(mixtures[best])
            left -= pairs[best]
    return chosen


@pytest.mark.parametrize("mixture", covering(PARTS), ids=lambda mixture: "-".join(map(str, mixture.values())))
def test_gradients_by_hand_equal_autograd(mixture):
    padding = mixture.pop("padding")
    model = gpt(**mixture).train()
    inputs, targets = random_tokens(3, 6), random_tokens(3, 6, seed=3)
    mask = None
    if padding != "none":
        mask = torch.arange(6) >= torch.arange(3).unsqueeze(1)
        mask = mask if padding == "left" else mask.flip(1)
        targets = targets.masked_fill(~mask, IGNORED)

    torch.manual_seed(4)
    with recording(model):
        loss = model(inputs, targets, mask=mask)
        expected = torch.autograd.grad(loss * 3.0, list(model.parameters()))
        with torch.no_grad():
            model.backward(3.0)
        assert all(not layer.tape for layer in model.modules() if isinstance(layer, Layer))
    largest = max(float(gradient.abs().max()) for gradient in expected)
    for (name, parameter), theirs in zip(model.named_parameters(), expected, strict=True):
        assert float((parameter.grad - theirs).abs().max()) <= 1e-10 * largest, name

    if not mixture["dropout"]:  # and what was recorded is what is trained without recording
        torch.testing.assert_close(model(inputs, targets, mask=mask), loss, rtol=1e-12, atol=0)


def test_the_mixtures_hold_every_pair_of_choices():
    mixtures = covering(PARTS)
    assert len(mixtures) < 40
    for (a, xs), (b, ys) in itertools.combinations(PARTS.items(), 2):
        assert {(m[a], m[b]) for m in mixtures} == set(itertools.product(xs, ys))


def test_a_tied_head_is_one_tensor():
    tied, untied = gpt(tied=True), gpt(tied=False)
    assert tied.head.weight is tied.token_embedding.weight
    assert len(list(tied.parameters())) == len(list(untied.parameters())) - 1


# ---- the same model elsewhere ----


def logits_agree(ours: GPT, theirs: Any, vocabulary: int, context: int) -> None:
    rows = random_tokens(2, context, below=vocabulary)
    with torch.no_grad():
        expected = theirs(rows).logits
        found = ours.eval()(rows)
    assert float(expected.std()) > 0.1
    assert float((found - expected).abs().max()) < 1e-5


def roughened(model: Any) -> Any:
    """Weights far enough from their first values for every part to matter."""
    torch.manual_seed(6)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def test_gpt2_of_transformers(with_gpt2_weights):
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 31, "n_positions": 16, "n_embd": 12, "n_layer": 3, "n_head": 3}
    theirs = roughened(GPT2LMHeadModel(GPT2Config(**shape, attn_implementation="eager")))
    gpt2 = {**preset("gpt2")["model"], "vocabulary_size": 31, "context_length": 16, "embedding_size": 12}
    ours = GPT(GPTSettings(**{**gpt2, "layers": 3, "heads": 3}))
    with_gpt2_weights(ours, theirs)
    logits_agree(ours, theirs, 31, 16)


def qwen3(settings: GPTSettings) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=settings.vocabulary_size,
        hidden_size=settings.embedding_size,
        intermediate_size=settings.feedforward_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads or settings.heads,
        head_dim=settings.head_channels,
        max_position_embeddings=settings.context_length,
        rms_norm_eps=settings.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": settings.rotary_base},
        tie_word_embeddings=settings.tied,
        hidden_act="silu",
        attention_bias=False,
        attn_implementation="eager",
    )
    return roughened(Qwen3ForCausalLM(config))


def from_qwen3(settings: GPTSettings, theirs: Any) -> GPT:
    ours = GPT(settings)
    renamed = {}
    for name, tensor in theirs.state_dict().items():
        name = name.removeprefix("model.")
        for old, new in [("layers.", "blocks."), ("input_layernorm", "attention_norm"), ("self_attn", "attention"),
                         ("post_attention_layernorm", "feedforward_norm"), ("mlp", "feedforward"),
                         ("embed_tokens", "token_embedding"), ("lm_head", "head"), ("q_proj", "query"),
                         ("k_proj", "key"), ("v_proj", "value"), ("o_proj", "output"), ("q_norm", "query_norm"),
                         ("k_norm", "key_norm"), ("_proj", "")]:  # fmt: skip
            name = name.replace(old, new)
        renamed[name] = tensor
    ours.load_state_dict(renamed)
    return ours


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "head_size", "base"), [(4, 2, 0, 1e4), (3, 1, 6, 1e6), (2, 0, 10, 50.0)])
def test_qwen3_of_transformers(tied, heads, kv_heads, head_size, base):
    settings = GPTSettings(
        vocabulary_size=31, context_length=20, embedding_size=16, layers=2, heads=heads, kv_heads=kv_heads,
        head_size=head_size, feedforward_size=24, positions="rotary", rotary_base=base, normalization="rmsnorm",
        norm_epsilon=1e-6, feedforward="swiglu", bias=False, qk_norm=True, tied=tied,
    )  # fmt: skip
    theirs = qwen3(settings)
    logits_agree(from_qwen3(settings, theirs), theirs, 31, 20)


# ---- the cache ----

KINDS = {
    "learned": {"positions": "learned"},
    "sinusoidal": {"positions": "sinusoidal", "norm_placement": "post"},
    "rotary": {"positions": "rotary", "kv_heads": 2, "qk_norm": True},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_can_be_cut_copied_and_reordered(kind):
    model, rows = gpt(**KINDS[kind]).eval(), random_tokens(3, 8)
    whole = model(rows)
    cache = model.new_cache(3)
    pieces = [model(rows[:, a:b], cache=cache) for a, b in [(0, 3), (3, 4), (4, 8)]]
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    assert cache.length == 8

    cache.cut(5)
    other = cache.copy()
    torch.testing.assert_close(model(rows[:, 5:], cache=cache), whole[:, 5:])
    assert (cache.length, other.length) == (8, 5)
    torch.testing.assert_close(model(rows[:, 5:], cache=other), whole[:, 5:])  # what befell the first left it alone

    other.cut(2)
    order = torch.tensor([2, 0, 2, 1])
    picked = other.reordered(order)
    torch.testing.assert_close(model(rows[order, 2:5], cache=picked), whole[order, 2:5])
    assert other.length == 2


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_cache_remembers_padding(kind):
    model, rows = gpt(**KINDS[kind]).eval(), random_tokens(2, 7)
    alone = model(rows[1:, 2:])
    mask = torch.tensor([[True] * 4, [False] * 2 + [True] * 2])
    cache = model.new_cache(2)
    model(rows[:, :4], cache=cache, mask=mask)
    later = model(rows[:, 4:6], cache=cache)
    torch.testing.assert_close(later[1:], alone[:, 2:4])
    cache.cut(5)
    swapped = cache.reordered(torch.tensor([1, 0]))
    torch.testing.assert_close(model(rows[1:, 5:].expand(2, -1), cache=swapped)[:1], alone[:, 3:])


# ---- writing ----


def chooser(settings: SamplingSettings, rows: Sequence[int]) -> Any:
    """Each row has random numbers of its own, in whatever company it is."""
    generators = [torch.Generator().manual_seed(50 + row) for row in rows]

    def choose(logits: Tensor, windows: list[list[int]]) -> list[int]:
        return [sample(row, window, settings, g) for row, window, g in zip(logits, windows, generators, strict=True)]

    return choose


@torch.no_grad()
def written_plainly(model: GPT, prompt: list[int], count: int, choose: Any) -> list[int]:
    """One row, the whole window read for each token: what generation means, without batch, padding or cache."""
    context = model.settings.context_length
    window, written = prompt[-context:], []
    for _ in range(count):
        written += choose(model(torch.tensor([window]))[:, -1], [window])
        window = [*window, written[-1]]
        if len(window) > context:
            window = window[-(context // 2) :]
    return written


SAMPLING = {
    "greedy": SamplingSettings(temperature=0.0),
    "sampled": SamplingSettings(temperature=1.3, top_k=7, top_p=0.9, repetition_penalty=1.2),
}


@pytest.mark.parametrize("context", [8, 7, 2])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_and_batched_writing_is_plain_writing(kind, sampling, context):
    """Prompts of all lengths, also past the context length, and the context filled several times over."""
    # Sharp weights and no biases: a model that heeds its context, and does not write one token for ever.
    shape = {"context_length": context, "vocabulary_size": 29, "embedding_size": 16, "bias": False, "tied": False}
    model, settings, count = gpt(1.0, **shape, **KINDS[kind]).eval(), SAMPLING[sampling], 5 * context
    prompts = [random_tokens(length, below=29, seed=length).tolist() for length in (1, 3, context, 2, 2 * context + 1)]
    expected = []
    for row, prompt in enumerate(prompts):
        expected.append(written_plainly(model, prompt, count, chooser(settings, [row])))
        alone = list(islice(tokens(model, [prompt], chooser(settings, [row]), CPU), count))
        assert [chosen for (chosen,) in alone] == expected[-1]
    for cached in (True, False):
        choose = chooser(settings, range(len(prompts)))
        together = list(islice(tokens(model, prompts, choose, CPU, cached), count))
        assert [list(row) for row in zip(*together, strict=True)] == expected
    assert len({token for row in expected for token in row}) >= 4


# ---- fresh weights ----


def test_initialization():
    torch.manual_seed(1)
    model = GPT(GPTSettings(vocabulary_size=500, context_length=300, embedding_size=64, layers=8, heads=4))
    for name, parameter in model.named_parameters():
        deviation, inner = parameter.std(correction=0).item(), parameter.mean().item()
        if parameter.dim() == 1:
            assert deviation == 0 and inner == float("norm" in name and name.endswith("weight")), name
        else:
            last = name.endswith(("attention.output.weight", "feedforward.down.weight"))
            assert abs(deviation / (0.02 / 4 if last else 0.02) - 1) < 0.05, name
    quiet = GPT(GPTSettings(vocabulary_size=50, embedding_size=64, heads=4, tied=False, initialization="zero-output"))
    assert quiet(random_tokens(1, 9), random_tokens(1, 9)).item() == pytest.approx(math.log(50))
    assert all(isinstance(module, Layer | nn.ModuleList) for module in model.modules())
