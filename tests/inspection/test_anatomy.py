"""A model taken apart: every parameter once, norms beside torch's own, gradients beside autograd's."""

import pytest
import torch

from quire import files
from quire.data.batches import cut
from quire.inspection.anatomy import anatomy, by_block, by_part, held_out_gradient, tied_names
from quire.models import MODELS
from quire.run import Run


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_is_counted_once(kind: str, small_model) -> None:
    model = small_model(kind)
    facts = anatomy(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert [fact.name for fact in facts] == [name for name, _ in model.named_parameters()]
    whole = torch.nn.utils.parameters_to_vector(model.parameters()).double().norm().item()
    for groups in (facts, by_part(facts), by_block(facts)):
        assert sum(group.parameters for group in groups) == total
        assert sum(group.weight_norm**2 for group in groups) ** 0.5 == pytest.approx(whole, rel=1e-6)
        assert all(group.gradient_norm is None for group in groups)
    assert "other" not in {fact.part for fact in facts}, "every part has its name"
    assert len({fact.block for fact in facts} - {""}) >= 2


def test_the_parts_of_a_gpt(small_model) -> None:
    facts = {fact.name: fact for fact in anatomy(small_model("gpt", qk_norm=True))}
    for name, part, block in [
        ("token_embedding.weight", "embedding", ""),
        ("positions.weight", "positions", ""),
        ("blocks.1.attention.query.weight", "attention", "blocks.1"),
        ("blocks.1.attention.query_norm.weight", "attention", "blocks.1"),
        ("blocks.2.feedforward.up.bias", "feedforward", "blocks.2"),
        ("blocks.0.feedforward_norm.weight", "norms", "blocks.0"),
        ("norm.weight", "norms", ""),
    ]:
        assert (facts[name].part, facts[name].block) == (part, block), name
    assert facts["token_embedding.weight"].shape == (13, 16)
    assert [part.name for part in by_block(facts.values())][:3] == ["embedding", "positions", "blocks.0"]


def test_a_tied_head_is_named_and_not_counted(small_model) -> None:
    assert tied_names(small_model("gpt")) == {"head.weight": "token_embedding.weight"}
    untied = small_model("gpt", tied=False)
    assert tied_names(untied) == {} and "head" in {part.name for part in by_part(anatomy(untied))}


@pytest.mark.parametrize("engine", ["autograd", "manual"])
def test_gradient_norms_are_autograds(tiny: Run, engine: str) -> None:
    model = tiny.model("cpu")
    tiny.config["training"]["engine"] = engine
    gradient = held_out_gradient(tiny, model)
    assert gradient is not None and all(parameter.grad is None for parameter in model.parameters())
    tokens = tiny.validation_tokens()
    rows = [slice(at, min(at + 32, len(tokens) - 1)) for at in range(0, min(4096, len(tokens) - 1), 32)]
    batch = cut(tokens, rows, 32)
    loss = model(batch.inputs, batch.targets)
    assert (gradient.loss, gradient.tokens) == (pytest.approx(loss.item(), rel=1e-5), batch.counted)
    expected = torch.autograd.grad(loss, list(model.parameters()))
    facts = anatomy(model, gradient)
    for fact, wanted in zip(facts, expected, strict=True):
        assert fact.gradient_norm == pytest.approx(wanted.norm().item(), rel=1e-3, abs=1e-7)
    whole = sum(float(wanted.double().norm() ** 2) for wanted in expected) ** 0.5
    assert sum(part.gradient_norm**2 for part in by_part(facts)) ** 0.5 == pytest.approx(whole, rel=1e-4)


def test_without_held_out_text_there_is_no_gradient(tiny: Run) -> None:
    files.remove(tiny.path / "data" / "validation.bin")
    assert held_out_gradient(tiny, tiny.model("cpu")) is None
