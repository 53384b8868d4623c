"""What a model costs, against the same model built and counted, and against the formulas of papers."""

import json
from dataclasses import replace

import pytest
import torch

from quire.cli import models
from quire.config import PRESETS
from quire.inspection.size import _kept_bytes, size_of
from quire.layers.layer import Block
from quire.models import build_model
from quire.training.settings import layered, typed


def settings_of(preset: str, **changes):
    model = typed(layered(preset)).model
    return replace(model, vocabulary_size=50, separator=0, **changes)


@pytest.mark.parametrize("preset", ["default", "gpt-mini", "sparse"])
def test_equals_what_the_real_model_has_and_keeps(preset):
    settings = settings_of(preset, layers=5)
    found, model = size_of(settings), build_model(settings).train()
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.zeros(1, settings.context_length, dtype=torch.long)
    given = {"tokens": tokens, "targets": tokens}
    assert found.window_bytes == pytest.approx(_kept_bytes(model, given), rel=0.01)
    for module in model.modules():
        if isinstance(module, Block):
            module.recomputed = True
    assert found.recomputed_window_bytes == pytest.approx(_kept_bytes(model, given), rel=0.01)


def test_gpt2_s_arithmetic_is_the_formula_s():
    """2 for each weight of a matrix, and 4 T C a layer for attention's two products (Chowdhery et al. 2022, app. B)."""
    settings = replace(typed(layered("gpt2")).model, separator=0)
    layers, size, context, vocabulary = 12, 768, 1024, 50257
    matrices = 12 * size * size * layers + vocabulary * size
    assert size_of(settings).flops_per_token == 2 * matrices + 4 * context * size * layers
    assert size_of(settings).parameters == 124_439_808


@pytest.mark.parametrize("preset", ["default", "gpt-mini", "sparse", "rnn", "lstm", "gru", "transformer-base"])
def test_recomputed_blocks_halve_the_memory_of_a_deep_model(preset):
    found = size_of(settings_of(preset, layers=12))
    assert found.recomputed_window_bytes < found.window_bytes / 2


def test_a_window_s_cache_is_no_larger_in_a_longer_context():
    short, long = (
        size_of(settings_of("sparse", attention=("window",), context_length=n)).cache_bytes for n in (256, 1024)
    )
    assert short == long


def test_the_command_lists_every_preset(quire, capsys, monkeypatch):
    """Those that there are; all of them, which take a while, in the README's test."""
    some = {name: PRESETS[name] for name in ("default", "gpt2", "gpt2-xl", "lstm", "seq2seq-copy")}
    monkeypatch.setattr(models, "PRESETS", some)
    said = quire("models", "--json")
    rows = json.loads(said.out)["models"]
    assert said.code == 0 and {row["preset"] for row in rows} == set(some)
    gpt2 = next(row for row in rows if row["preset"] == "gpt2")
    assert gpt2["parameters"] == 124_439_808 and gpt2["kind"] == "gpt"
    assert all(row["checkpointed_training_bytes"] < row["training_bytes"] for row in rows)
    models.show(rows)
    shown = capsys.readouterr().out
    assert "gpt2-xl" in shown and "1.56 G" in shown
