"""Several processes, gradients averaged: two that see half of each batch train as one that sees all of it.

The test starts this file twice, as two processes that find each other through a file; each writes what it found.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

import quire
from quire.data.batches import Batch
from quire.errors import UserError
from quire.models import build_model
from quire.models.gpt import GPTSettings
from quire.models.ngram import NgramSettings
from quire.models.recurrent import RecurrentSettings
from quire.training import engines
from quire.training.engines import ENGINES
from quire.training.optimizers import OPTIMIZERS
from quire.training.settings import TrainingSettings

WORLD, STEPS = 2, 3
SHAPE = {"vocabulary_size": 13, "context_length": 8, "embedding_size": 8, "layers": 2}
MODELS = {
    "gpt": GPTSettings(**SHAPE, heads=2),
    "lstm": RecurrentSettings(**SHAPE, cell="lstm"),
    "ngram": NgramSettings(**SHAPE, kind="ngram", heads=2, ngram_rows=200),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process found."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, str(Path(__file__).resolve()), str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(Path(quire.__file__).parents[1])}
    processes = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(WORLD)
    ]
    for process in processes:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.mark.parametrize("kind", MODELS)
def test_two_half_batches_are_the_whole_one(found, kind):
    """With accumulation, to rounding, in every step; and then both have the same weights, bit for bit."""
    for process in found:
        assert len(process[kind]["difference"]) == STEPS
        assert max(process[kind]["difference"]) < 1e-12
        assert min(process[kind]["alone"]) > 1e-4  # before, they were not alike
    assert found[0][kind]["weights"] == found[1][kind]["weights"]


def test_a_gradient_that_some_process_lacks_counts_as_zero(found):
    for process in found:
        assert process["missing"] == {"one lacks it": [0.5, 0.5], "all lack it": None, "frozen": None, "both": [1.5]}


def test_many_small_buckets_give_the_same(found):
    for process in found:
        assert process["buckets"] > 10 and process["bucketed"]


def test_the_other_engine_leaves_it_to_the_wrapper(found):
    assert [process["untouched"] for process in found] == [[0.0], [1.0]]


@pytest.mark.parametrize("wrapper", ["DistributedDataParallel", "FSDP"])
def test_a_wrapped_model_is_refused(found, wrapper):
    for process in found:
        assert wrapper in process[wrapper] and "take --engine autograd" in process[wrapper]


# ---- what runs in each process ----


def batches(rows: int) -> Batch:
    tokens = torch.randint(13, (rows, 9), generator=torch.Generator().manual_seed(5))
    return Batch(tokens[:, :-1], tokens[:, 1:], rows * 8)


def grads(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.to_dense().clone() for parameter in model.parameters()]


def largest(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def trained(settings: Any, rank: int) -> dict[str, Any]:
    """Some steps on this process's half of the batch, each half in two parts, beside the whole in one."""
    torch.manual_seed(1)
    model, engine = build_model(settings).double().train(), ENGINES["manual"]
    optimizers = OPTIMIZERS["muon"](model, TrainingSettings(steps=1, learning_rate=1e-2))
    differences, alone = [], []
    for step in range(STEPS):
        whole = batches(8 + 4 * step)
        engine.backpropagate(model, whole, 1.0)
        expected = grads(model)
        model.zero_grad()
        for part in whole.split(WORLD)[rank].split(2):
            engine.backpropagate(model, part, 0.5)
        alone.append(largest(grads(model), expected))
        engine.synchronize(model, WORLD)
        differences.append(largest(grads(model), expected))
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    weights = [parameter.detach().flatten().tolist() for parameter in model.parameters()]
    return {"difference": differences, "alone": alone, "weights": weights}


def missing(rank: int) -> dict[str, Any]:
    """What becomes of gradients that are not everywhere; process 0 has them where one lacks it."""
    model = nn.ParameterDict({"one lacks it": torch.zeros(2), "all lack it": torch.zeros(3), "frozen": torch.zeros(1),
                              "both": torch.zeros(1)})  # fmt: skip
    model["frozen"].requires_grad_(False)
    model["both"].grad = torch.tensor([1.0 + rank])
    if rank == 0:
        model["one lacks it"].grad = torch.ones(2)
    ENGINES["manual"].synchronize(model, WORLD)
    return {name: None if p.grad is None else p.grad.tolist() for name, p in model.items()}


def refused(model: nn.Module) -> str:
    try:
        ENGINES["manual"].check(model)
    except UserError as error:
        return str(error)
    return ""


def work(folder: Path, rank: int) -> None:
    """Everything that this file tests."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=(folder / "meet").as_uri(), rank=rank, world_size=WORLD)
    result: dict[str, Any] = {kind: trained(settings, rank) for kind, settings in MODELS.items()}
    result["missing"] = missing(rank)
    single = nn.Linear(1, 1, bias=False)
    single.weight.grad = torch.full((1, 1), float(rank))
    ENGINES["autograd"].synchronize(single, WORLD)
    result["untouched"] = single.weight.grad.flatten().tolist()
    engines.BUCKET = 100
    result["buckets"] = len(list(engines.buckets(list(build_model(MODELS["gpt"]).parameters()))))
    result["bucketed"] = trained(MODELS["gpt"], rank) == result["gpt"]
    wrapped = nn.parallel.DistributedDataParallel(build_model(MODELS["gpt"]))
    result["DistributedDataParallel"] = refused(wrapped)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    sharded = fully_shard(build_model(MODELS["gpt"]), mesh=init_device_mesh("cpu", (WORLD,)))
    result["FSDP"] = refused(sharded)
    (folder / f"{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]))
