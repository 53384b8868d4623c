"""The cost model: parameters and memory, against models that are built and trained."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from quire.models import MODELS, build_model
from quire.planning.cost import cost_of, moments
from quire.training.optimizers import OPTIMIZERS
from quire.training.settings import Settings, TrainingSettings, layered, typed

KINDS = [kind for kind in MODELS if not MODELS[kind].Settings.reads_source]


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_those_of_the_model_built(kind: str, small_settings) -> None:
    settings = Settings(model=small_settings(kind), training=TrainingSettings(steps=1, batch_size=2))
    found = cost_of(settings)
    built = build_model(settings.model)
    assert found.total_parameters == sum(parameter.numel() for parameter in built.parameters())
    assert all(found.parameters.values())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["gpt", "modern", "ngram"])
def test_the_optimizers_memory_is_what_they_keep(kind: str, optimizer: str, momentum: float, small_settings) -> None:
    training = TrainingSettings(steps=1, optimizer=optimizer, momentum=momentum)
    settings = Settings(model=small_settings(kind), training=training)
    model = build_model(settings.model)
    tokens = torch.randint(10, (3, settings.model.context_length))
    model(tokens, tokens).backward()
    optimizers = OPTIMIZERS[optimizer](model, settings.training)
    kept = 0
    for one in optimizers:
        one.step()
        states = [value for state in one.state.values() for value in state.values() if torch.is_tensor(value)]
        kept += sum(value.nbytes for value in states if value.dim())  # but for counters of steps
    memory = cost_of(settings).memory
    tables = [p for name, p in model.named_parameters() if name.startswith("ngram_embedding")]
    rows = 4 * sum(len(table) for table in tables)
    assert memory.get("optimizer", 0) + rows == kept
    assert memory["weights"] + sum(table.nbytes for table in tables) == sum(p.nbytes for p in model.parameters())


def test_what_an_unknown_optimizer_keeps_is_not_guessed() -> None:
    with pytest.raises(AssertionError, match="Rprop"):
        moments(torch.optim.Rprop([torch.zeros(1)]))


MEASURED = """
import re, torch
from quire.models import build_model
from quire.training.optimizers import OPTIMIZERS
from quire.training.settings import layered, typed
settings = typed(layered("default", flags={flags}))
torch.set_num_threads(1)
def step(settings, batch):
    model = build_model(settings.model)
    optimizers = OPTIMIZERS["muon"](model, settings.training)
    tokens = torch.randint(60, (batch, settings.model.context_length))
    for _ in range(2):
        model(tokens, tokens).backward()
        for one in optimizers: one.step()
        model.zero_grad(set_to_none=True)
def peak():  # of this program alone: getrusage would count what it was forked from too
    return 1024 * int(re.search("VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
small = settings.with_model(layers=1, embedding_size=32, heads=1, context_length=16)
step(small, 1)
before = peak()
step(settings, settings.training.batch_size)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from Linux's /proc")
@pytest.mark.parametrize(("vocabulary", "layers", "batch"), [(500, 4, 24), (32000, 2, 8)])
def test_memory_is_about_what_a_training_step_takes(vocabulary: int, layers: int, batch: int) -> None:
    shape = {"embedding_size": 192, "layers": layers, "context_length": 256, "vocabulary_size": vocabulary}
    flags = {"model": shape, "training": {"batch_size": batch}}
    done = subprocess.run([sys.executable, "-c", MEASURED.format(flags=flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert cost_of(typed(layered("default", flags=flags))).total_memory == pytest.approx(int(done.stdout), rel=0.3)


def test_a_larger_batch_costs_only_activations_and_logits(small_settings) -> None:
    settings = Settings(model=small_settings("modern"), training=TrainingSettings(steps=1, batch_size=2))
    double = replace(settings, training=replace(settings.training, batch_size=4))
    one, two = cost_of(settings).memory, cost_of(double).memory
    assert {name for name in one if one[name] != two[name]} == {"activations", "logits"}
    assert two["logits"] == 2 * one["logits"] and two["activations"] == 2 * one["activations"]


def test_logits_of_a_large_vocabulary_do_not_grow_with_the_batch(small_settings) -> None:
    shape = small_settings("modern", vocabulary_size=1 << 16, context_length=128)

    def logits(batch: int, device: str) -> int:
        settings = Settings(model=shape, training=TrainingSettings(steps=1, batch_size=batch))
        return cost_of(settings, torch.device(device)).memory["logits"]

    assert logits(1, "cpu") == 4 * 128 << 16  # so few that they are computed at once
    assert logits(10, "cpu") == logits(1000, "cpu") < logits(1000, "cuda") < 4 * 1000 * 128 << 16


def test_every_parameter_of_a_transformer_has_its_part(small_settings) -> None:
    found = cost_of(Settings(model=small_settings("gpt"), training=TrainingSettings(steps=1)))
    assert set(found.parameters) == {"embeddings", "attention", "feedforward", "norms", "output head"} - (
        {"output head"} if small_settings("gpt").tied else set()
    )
