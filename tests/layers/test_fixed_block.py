"""Blocks in one call of the core: whatever they are made of, and however they are used, the logits are the model's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quire.generation.fixed import fix
from quire.layers import fixed_block, product
from quire.layers.activations import ACTIVATIONS
from quire.layers.fixed_block import FixedBlock
from quire.models import MODELS, build_model

pytestmark = pytest.mark.skipif(product.fast is None, reason="the core was not compiled here")

SHAPE = {"vocabulary_size": 53, "context_length": 160, "embedding_size": 40, "layers": 2, "heads": 4, "tied": False}
PARTS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "gpt without biases": {"bias": False},
    "gpt, waves": {"positions": "sinusoidal", "normalization": "rmsnorm"},
    **{f"gpt, {name}": {"feedforward": name, "positions": "rotary"} for name in ACTIVATIONS if name != "silu"},
    "gpt, swiglu": {"feedforward": "swiglu"},
    "modern": {"kind": "modern"},
    "modern, shared keys": {"kind": "modern", "kv_heads": 2, "qkv_bias": True, "qk_norm": True},
    "modern, one key": {
        "kind": "modern",
        "kv_heads": 1,
        "head_size": 22,
        "rotary_scaling": "linear",
        "rotary_factor": 2.0,
    },
}


def model_of(**parts: Any) -> Any:
    """A model with weights that make every part count."""
    torch.manual_seed(7)
    kind = parts.get("kind", "gpt")
    model = build_model(MODELS[kind].Settings(**{"kind": kind, **SHAPE, **parts})).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.05, std=0.25)
    return model


@torch.no_grad()
def stepped(model: Any, tokens: Tensor, first: int, **named: Any) -> Tensor:
    """Logits of `tokens` (B, T), the `first` at once, then one by one."""
    cache = model.new_cache(len(tokens))
    return torch.cat(
        [model(part, cache=cache, **named) for part in tokens.tensor_split(tuple(range(first, tokens.shape[1])), 1)], 1
    )


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of positions before each step that the core took."""
    taken: list[int] = []

    class Core:
        """The core, counting."""

        block = staticmethod(product.fast.block)

        @staticmethod
        def step(*arguments: Any) -> None:
            taken.append(arguments[6])
            product.fast.step(*arguments)

    monkeypatch.setattr(fixed_block, "fast", Core)
    return taken


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", PARTS)
def test_one_by_one_the_logits_are_those_of_the_whole_text(name: str, threads: int, steps: list[int]) -> None:
    torch.set_num_threads(threads)
    model, tokens = model_of(**PARTS[name]), torch.randint(53, (1, 150))
    with torch.no_grad():
        whole = model(tokens)
    fixed = fix(copy.deepcopy(model))
    assert sum(isinstance(part, FixedBlock) for part in fixed.modules()) == 2
    torch.testing.assert_close(stepped(fixed, tokens, 3), whole, rtol=1e-4, atol=1e-4)
    assert steps == [past for past in range(3, 150) for _ in range(2)]  # each of them, in both blocks


@pytest.mark.parametrize("kind", ["gpt", "modern"])
def test_int8_by_the_core_is_int8_by_torch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = fix(model_of(kind=kind), "int8"), torch.randint(53, (1, 60))
    ours = stepped(model, tokens, 5)
    monkeypatch.setattr(FixedBlock, "forward", fixed_block.PreNormBlock.forward)
    torch.testing.assert_close(ours, stepped(model, tokens, 5), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_threads_change_no_bit() -> None:
    model, tokens = fix(model_of(head_size=64, context_length=400)), torch.randint(53, (1, 400))
    torch.set_num_threads(1)
    read = model.new_cache(1)
    model(tokens[:, :300], cache=read)  # by torch's own products, whose bits do depend on the threads

    def written(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        cache = read.copy()
        return torch.cat([model(tokens[:, t : t + 1], cache=cache) for t in range(300, 400)], 1)

    alone = written(1)
    assert torch.equal(written(2), alone) and torch.equal(written(4), alone)


@pytest.mark.parametrize("why", ["two rows", "padding", "a window", "gradients wanted", "no cache", "norms after"])
def test_the_rest_goes_the_long_way(why: str, steps: list[int]) -> None:
    parts = {"a window": {"kind": "modern", "window": 5}, "norms after": {"norm_placement": "post"}}.get(why, {})
    model = model_of(**parts)
    tokens = torch.randint(53, (2 if why in ("two rows", "padding") else 1, 20))
    with torch.no_grad():
        whole = model(tokens)
    fixed = fix(copy.deepcopy(model))
    if why == "padding":
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[0, :4] = False
        with torch.no_grad():
            expected = model(tokens[:1], mask=mask[:1])
            cache = fixed.new_cache(1)
            found = torch.cat(
                [fixed(tokens[:1, t : t + 1], cache=cache, mask=mask[:1, t : t + 1]) for t in range(20)], 1
            )
        torch.testing.assert_close(found[:, 4:], expected[:, 4:], rtol=1e-4, atol=1e-4)
    elif why in ("gradients wanted", "no cache"):
        with torch.set_grad_enabled(why != "no cache"):
            torch.testing.assert_close(fixed(tokens[:, :1]).detach(), whole[:, :1], rtol=1e-4, atol=1e-4)
    else:
        torch.testing.assert_close(stepped(fixed, tokens, 3), whole, rtol=1e-4, atol=1e-4)
    assert not steps


def test_a_cache_that_was_cut_and_reordered_is_gone_on_with() -> None:
    model, tokens = model_of(kind="modern"), torch.randint(53, (1, 30))
    fixed = fix(copy.deepcopy(model))
    with torch.no_grad():
        cache = fixed.new_cache(1)
        fixed(torch.randint(53, (1, 12)), cache=cache)
        cache.cut(0)
        fixed(tokens[:, :20], cache=cache)
        fixed(torch.randint(53, (1, 1)), cache=cache)
        cache.cut(20)
        cache = cache.reordered(torch.tensor([0]))
        found = torch.cat([fixed(tokens[:, t : t + 1], cache=cache) for t in range(20, 30)], 1)
        torch.testing.assert_close(found, model(tokens)[:, 20:], rtol=1e-4, atol=1e-4)


def test_weights_changed_in_place_count() -> None:
    model, tokens = model_of(), torch.randint(53, (1, 9))
    fixed = fix(copy.deepcopy(model))
    with torch.no_grad():
        for one in (model, fixed):
            for name, tensor in [*one.named_parameters()]:
                if "norm" in name or name.endswith("bias"):
                    tensor.mul_(1.5)
        torch.testing.assert_close(stepped(fixed, tokens, 2), model(tokens), rtol=1e-4, atol=1e-4)


def arrays(**changes: Any) -> tuple[Any, ...]:
    """What the core is given for a block of 4 channels, 2 heads of 2, and 3 hidden channels."""

    def matrix(outputs: int, inputs: int) -> tuple[Any, ...]:
        return torch.zeros(outputs, inputs).numpy(), None, None, outputs, inputs

    shapes = {
        "query": (4, 4),
        "key": (4, 4),
        "value": (4, 4),
        "output": (4, 4),
        "gate": None,
        "up": (3, 4),
        "down": (4, 3),
    }
    matrices = [matrix(*shape) if shape else None for shape in {**shapes, **changes.get("shapes", {})}.values()]
    norm = torch.ones(changes.get("channels", 4)).numpy(), None, 1e-5, True
    return tuple(matrices), (norm, norm, None, None), changes.get("heads", 2), changes.get("kv_heads", 2), 2, 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shapes": {"down": (4, 5)}}, "do not fit each other"), ({"shapes": {"key": (2, 4)}}, "do not fit each other"),
        ({"channels": 5}, "16 are needed"), ({"kv_heads": 0}, "no block"), ({"heads": 3}, "no block"),
    ],
)  # fmt: skip
def test_the_core_refuses_what_is_no_block(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        product.fast.block(*arrays(**changes))


@pytest.mark.parametrize(
    ("past", "capacity", "size", "says"), [(8, 8, 4, "no room"), (-1, 8, 4, "no room"), (0, 9, 4, "are needed"),
                                           (0, 8, 5, "16 are needed")]
)  # fmt: skip
def test_the_core_refuses_a_step_that_does_not_fit(past: int, capacity: int, size: int, says: str) -> None:
    block, cache = product.fast.block(*arrays()), torch.zeros(2, 8, 2).numpy()
    step: Callable[..., None] = product.fast.step
    step(block, torch.zeros(4).numpy(), None, None, cache, cache.copy(), 7, 8, 1)
    with pytest.raises(ValueError, match=says):
        step(block, torch.zeros(size).numpy(), None, None, cache, cache.copy(), past, capacity, 1)
    with pytest.raises(ValueError, match="PyCapsule"):
        step(cache, torch.zeros(4).numpy(), None, None, cache, cache.copy(), 0, 8, 1)
