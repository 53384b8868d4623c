"""How the processes of a launch find each other, in a store that may remember others."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import distributed

from quire import processes
from quire.errors import UserError


def test_processes_meet_in_a_store_that_remembers_others():
    """Of three one was started again, as its machine alone counts; what others said before is not taken for theirs."""
    store = distributed.HashStore()
    for key in ("quire/hello/1", "quire/hello/2"):
        store.set(key, "stale")
    for key in ("quire/old/stale", "quire/old/met/1", "quire/old/met/2"):
        store.set(key, "7")
    store.set("quire/start", "old")
    with ThreadPoolExecutor(3) as beside:
        first = beside.submit(processes._welcome, store, 3)
        others = [beside.submit(processes._arrive, store, rank, rank - 1) for rank in (1, 2)]
        start, restarts = first.result()
        assert restarts == 1 and start != "old" and [other.result() for other in others] == [start, start]


def test_processes_that_do_not_come_are_missed(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        for name, value in {
            "RANK": 1,
            "WORLD_SIZE": 2,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free.getsockname()[1],
        }.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(processes, "STORE_SECONDS", 0.5)
        processes._meet.cache_clear()
        for _ in range(2):  # the second time at once
            with pytest.raises(UserError, match=r"other processes were not found at 127\.0\.0\.1:\d+: .*Start all"):
                processes.store()
    processes._meet.cache_clear()
