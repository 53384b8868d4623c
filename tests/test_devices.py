"""Which device computes, with how many threads, and what the machine says of itself."""

import os
from pathlib import Path

import pytest
import torch

from quire import devices
from quire.errors import UserError


def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_takes_the_best_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    assert devices.choose_device() == torch.device("cpu")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert devices.choose_device("auto") == torch.device("mps") == devices.choose_device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.choose_device("auto") == torch.device("cuda")
    assert devices.choose_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="--device cuda:2: this torch finds no such device"):
        devices.choose_device("cuda:2")


@pytest.mark.parametrize("name", ["cuda", "mps", "meta", "xpu"])
def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    no_gpu(monkeypatch)
    with pytest.raises(UserError, match=f"--device {name}: this torch finds no such device here"):
        devices.choose_device(name)


def test_what_is_no_device() -> None:
    with pytest.raises(UserError, match=r"--device graphics is not a device. Choices: auto, cpu"):
        devices.choose_device("graphics")


def test_a_card_that_this_torch_cannot_use_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch)
    monkeypatch.setattr(devices, "_windows_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build: reinstall torch" in str(devices.unused_card())
    with pytest.raises(UserError, match=r"no such device here\. An NVIDIA card is present"):
        devices.choose_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert "update its driver" in str(devices.unused_card())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.unused_card() is None


def test_threads() -> None:
    assert devices.set_threads(3) == 3 == torch.get_num_threads()
    assert devices.set_threads(0) == devices.usable_cores() == torch.get_num_threads()
    with pytest.raises(UserError, match=r"--threads must be 0 .* not -2"):
        devices.set_threads(-2)


@pytest.mark.parametrize(
    "quota, cores", [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("900000 100000", 8)]
)
def test_a_containers_quota_counts(monkeypatch: pytest.MonkeyPatch, quota: str, cores: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda self: quota)
    assert devices.usable_cores() == cores


def test_cores_without_control_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: Path) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert devices.usable_cores() == 1


def test_memory_is_measured() -> None:
    assert devices.memory_bytes() > 1 << 28
    assert devices.peak_memory(torch.device("cpu")) > 1 << 20


def test_the_users_own_thread_policy_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    devices.set_thread_policy()
    assert os.environ["OMP_WAIT_POLICY"] == "active" and os.environ["GOMP_SPINCOUNT"] == "1000"
