"""Optimizers: Muon beside torch.optim.Muon, and who gets which parameters, decay and learning rate."""

from typing import Any

import pytest
import torch
from torch import nn

from quire.models.gpt import GPT, GPTSettings
from quire.training.muon import Muon, newton_schulz
from quire.training.optimizers import OPTIMIZERS, set_learning_rates, split_matrices
from quire.training.settings import TrainingSettings

QWEN = {"positions": "rotary", "normalization": "rmsnorm", "feedforward": "swiglu", "qk_norm": True, "kv_heads": 1}
SHAPES = {"gpt2": {}, "untied": {"tied": False}, "qwen3": {**QWEN, "bias": False, "tied": False}, "tied qwen3": QWEN}


def gpt(**settings: Any) -> GPT:
    torch.manual_seed(1)
    shape = {"vocabulary_size": 13, "context_length": 8, "embedding_size": 8, "layers": 2, "heads": 2}
    return GPT(GPTSettings(**shape, **settings))


def named(model: nn.Module, parameters: list[nn.Parameter]) -> set[str]:
    ids = {id(parameter) for parameter in parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


# ---- Muon ----


@pytest.mark.parametrize("shape", [(8, 8), (4, 24), (24, 4), (1, 6), (32, 48)])
def test_muon_in_bfloat16_is_torch_s_step_for_step(shape):
    torch.manual_seed(3)
    start = torch.randn(3, *shape)
    ours, theirs = ([nn.Parameter(matrix.clone()) for matrix in start] for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    pair = (
        Muon(ours, **options, dtype=torch.bfloat16),
        torch.optim.Muon(theirs, **options, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(6):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(shape)
            b.grad = a.grad.clone()
        for optimizer in pair:
            optimizer.step()
        for a, b, first in zip(ours, theirs, start, strict=True):  # the same bits here; other kernels round otherwise
            assert (a - b).norm() <= 0.02 * (b - first).norm()


def test_muon_on_a_cpu_keeps_the_parameter_s_precision():
    """The same steps as torch's, but for what bfloat16 rounds away; in float64 they are exact."""
    torch.manual_seed(3)
    start, grad = torch.randn(12, 20, dtype=torch.float64), torch.randn(12, 20, dtype=torch.float64)
    moved = {}
    for dtype in (torch.float32, torch.float64):
        parameter = nn.Parameter(start.to(dtype, copy=True))
        parameter.grad = grad.to(dtype)
        Muon([parameter], 0.1, 0.0).step()
        moved[dtype] = parameter.detach().double()
    torch.testing.assert_close(moved[torch.float32], moved[torch.float64], rtol=0, atol=1e-6)
    theirs = nn.Parameter(start.clone())
    theirs.grad = grad
    torch.optim.Muon([theirs], 0.1, 0.0, adjust_lr_fn="match_rms_adamw").step()
    difference = (theirs.detach() - moved[torch.float64]).abs().max()
    assert 1e-6 < difference < 0.05 * (theirs.detach() - start).abs().max()


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 40), (2, 40, 8), (1, 1, 9)])
def test_newton_schulz_brings_singular_values_near_one(shape):
    torch.manual_seed(4)
    matrices = torch.randn(shape, dtype=torch.float64)
    orthogonal = newton_schulz(matrices)
    before, after = torch.linalg.svdvals(matrices), torch.linalg.svdvals(orthogonal)
    assert before.max() / before.min() > 2 or min(shape[1:]) == 1
    large = before > before.max() * 0.02
    assert after[large].min() > 0.6 and after.max() < 1.25
    # with the same singular vectors: U^T (result) V is diagonal
    for matrix, result in zip(matrices, orthogonal, strict=True):
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        inner = u.mT @ result @ v.mT
        assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-9
    torch.testing.assert_close(newton_schulz(matrices * 1e-3), orthogonal)  # the size of a gradient does not matter
    assert torch.equal(newton_schulz(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_muon_leaves_alone_what_has_no_gradient():
    parameters = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))]
    parameters[0].grad = torch.ones(3, 4)
    optimizer = Muon(parameters)
    optimizer.step()
    assert not torch.equal(parameters[0].detach(), torch.ones(3, 4))
    assert torch.equal(parameters[1].detach(), torch.ones(3, 4))
    assert parameters[1] not in optimizer.state


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_takes_the_matrices_between_embedding_and_head(shape):
    model = gpt(**SHAPES[shape])
    matrices, rest = split_matrices(model)
    taken, left = named(model, matrices), named(model, rest)
    assert taken | left == {name for name, _ in model.named_parameters()} and not taken & left
    apart = ("token_embedding", "positions", "head", "norm", "bias")
    assert all(any(part in name for part in apart) for name in left)
    assert taken and all(name.startswith("blocks.") and name.endswith(".weight") for name in taken)
    assert not any("norm" in name for name in taken)
    muon, adamw = OPTIMIZERS["muon"](model, TrainingSettings())
    assert named(model, muon.param_groups[0]["params"]) == taken
    assert named(model, [p for group in adamw.param_groups for p in group["params"]]) == left


# ---- all ----


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_each_parameter_once_and_decay_on_matrices_only(name, shape):
    model = gpt(**SHAPES[shape])
    optimizers = OPTIMIZERS[name](model, TrainingSettings(weight_decay=0.3))
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    everything = [parameter for group in groups for parameter in group["params"]]
    assert len(everything) == len({id(p) for p in everything}) == len(list(model.parameters()))
    for group in groups:
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.3 if parameter.dim() == 2 else 0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learning_rates_are_shares_of_the_peaks(name):
    model = gpt()
    settings = TrainingSettings(learning_rate=1e-3, matrix_learning_rate=0.05)
    optimizers = OPTIMIZERS[name](model, settings)
    for share in (0.5, 0.0, 1.0):
        set_learning_rates(optimizers, share)
        for optimizer in optimizers:
            peak = 0.05 if isinstance(optimizer, Muon) else 1e-3
            assert all(group["lr"] == share * peak for group in optimizer.param_groups)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_steps_are_torch_optim_s(name):
    """Built by hand from torch.optim, with the settings spelled out."""
    ours, theirs = gpt(), gpt()
    settings = TrainingSettings(learning_rate=0.01, weight_decay=0.2, beta1=0.8, beta2=0.9, momentum=0.7)
    (optimizer,) = OPTIMIZERS[name](ours, settings)
    groups = [
        {"params": [p for p in theirs.parameters() if p.dim() == 2], "weight_decay": 0.2},
        {"params": [p for p in theirs.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    reference: torch.optim.Optimizer = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.9), foreach=False),
        "adam": lambda: torch.optim.Adam(groups, lr=0.01, betas=(0.8, 0.9), foreach=False),
        "sgd": lambda: torch.optim.SGD(groups, lr=0.01, momentum=0.7, foreach=False),
    }[name]()
    torch.manual_seed(8)
    for _ in range(4):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_adamw_and_muon_decay_apart_from_the_gradient():
    """With a gradient of zero, decoupled decay shrinks a matrix by exactly lr x decay, and leaves a vector."""
    for name in ("adamw", "muon"):
        model = gpt()
        before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        optimizers = OPTIMIZERS[name](
            model, TrainingSettings(learning_rate=0.1, matrix_learning_rate=0.1, weight_decay=0.5)
        )
        set_learning_rates(optimizers, 1.0)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in optimizers:
            optimizer.step()
        for key, parameter in model.named_parameters():
            shrunk = before[key] * (0.95 if parameter.dim() == 2 else 1.0)
            torch.testing.assert_close(parameter.detach(), shrunk)
