"""How the processes of a launch find each other, in a store that may remember others."""

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch import distributed

from quire import processes
from quire.errors import UserError


def test_processes_meet_in_a_store_that_remembers_others():
    """What processes that have ended said is not taken for theirs; but the launch's name is, which they began."""
    store, names = distributed.HashStore(), []
    for key in ("quire/hello/1", "quire/hello/2"):
        store.set(key, "stale")
    for key in ("quire/old/stale", "quire/old/met/1", "quire/old/met/2"):
        store.set(key, "")
    store.set("quire/start", "old")
    for again in ("", "yes"):
        with ThreadPoolExecutor(3) as beside:
            first = beside.submit(processes._welcome, store, 3)
            others = [beside.submit(processes._arrive, store, rank) for rank in (1, 2)]
            names.append(first.result())
            assert [other.result() for other in others] == names[-1:] * 2
        assert store.get(f"quire/{names[-1]}/restarted").decode() == again
        assert store.get("quire/launch").decode() == names[0]
    assert len({"old", *names}) == 3


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


def test_who_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(processes, "STORE_SECONDS", 0.2)
    with pytest.raises(UserError, match="process 1 and 2 of 3 did not come"):
        processes._welcome(distributed.HashStore(), 3)
    with pytest.raises(UserError, match="process 0 did not come"):
        processes._arrive(distributed.HashStore(), 1)
