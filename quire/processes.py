"""Which one this process is of those that train together, as torchrun says, and how they speak with one voice.

torchrun sets in each process RANK (its number), WORLD_SIZE (how many there are), LOCAL_RANK (its number on its
machine), and the address of a store, a small table on the network in which all of them write and read. Where nothing
is set, there is one process, and it leads.
"""

import os
import time
import zlib
from collections import Counter
from functools import cache
from typing import Any
from uuid import uuid4

STORE_SECONDS = 60.0  # for processes to find the store, and one another
LOOKING = 0.02  # seconds between two looks at the store


def launched() -> bool:
    """Whether this process is one of a launch: of torchrun, or of anything that sets the same names."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ


def rank() -> int:
    """This process's number among all, from 0."""
    return int(os.environ["RANK"]) if launched() else 0


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", rank())) if launched() else 0


def local_size() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if launched() else 1


def beside_leader() -> bool:
    """Whether this process is not the first of all, but on its machine (GROUP_RANK is the machine's number)."""
    return launched() and rank() > 0 and int(os.environ.get("GROUP_RANK", int(local_rank() != rank()))) == 0


def leads() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def restarted() -> bool:
    """Whether torchrun has started processes again, after one of them ended badly."""
    return launched() and meeting()[1]


def launch() -> str:
    """A name for the launch that stays when torchrun starts its processes again; "" where there is none."""
    if not launched():
        return ""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # Launches that were given no name are told apart by the torchrun that is this process's parent.
    return name if name != "none" else f"{os.uname().nodename if hasattr(os, 'uname') else ''}-{os.getppid()}"


def store() -> Any:
    """The launch's store, its keys those of this start alone."""
    return meeting()[0]


@cache
def meeting() -> tuple[Any, bool]:
    """Find the other processes; gives the store with keys of their own, and whether any of them was started again.

    torchrun's store may keep the keys of processes that have ended, and each machine counts restarts by itself. So the
    first process names this start, and answers each other one, which writes a number of its own, under that name.
    """
    from datetime import timedelta

    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    found, own, size = next(rendezvous("env://", timeout=timedelta(seconds=STORE_SECONDS)))
    count, name = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), uuid4().hex
    until = time.monotonic() + STORE_SECONDS
    told: dict[int, str] = {}  # restarts, by the number of the process that told them
    if own == 0:
        found.set("quire/start", name)
    while len(told) < (size - 1 if own == 0 else 1):
        if time.monotonic() > until:
            raise RuntimeError(f"timed out: after {STORE_SECONDS:.0f} s some of {size} processes have not been met")
        for rank in range(1, size) if own == 0 else [own]:
            answer = _greeted(found, rank, name) if own == 0 else _greet(found, rank, name)
            if answer:
                told[rank] = answer
        time.sleep(LOOKING)
    start = name if own == 0 else told[own]
    place = PrefixStore(f"quire/{start}", found)
    if own == 0:
        place.set("restarts", str(max([count, *map(int, told.values())])))
    return place, int(place.get("restarts")) > 0


def _greet(found: Any, rank: int, own: str) -> str:
    """What a process other than the first says; gives the name of this start, once the first one has answered."""
    found.set(f"quire/hello/{rank}", own)
    start = found.get("quire/start").decode()
    if not found.check([f"quire/{start}/hello/{own}"]):
        return ""
    found.set(f"quire/{start}/met/{rank}", os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return start


def _greeted(found: Any, rank: int, start: str) -> str:
    """What the first process answers; gives how often the other one was started again, once that has heard it."""
    if found.check([f"quire/hello/{rank}"]):
        found.set(f"quire/{start}/hello/{found.get(f'quire/hello/{rank}').decode()}", "")
    met = f"quire/{start}/met/{rank}"
    return found.get(met).decode() if found.check([met]) else ""


@cache
def _counts() -> Counter[str]:
    return Counter()


def numbered(key: str) -> str:
    """A key of the store for its next use: what was written for an earlier one is not read again."""
    _counts()[key] += 1
    return f"{key}/{_counts()[key]}"


def first_to_say(sentence: str) -> bool:
    """Whether no other process of this launch has said the sentence: then this one is to."""
    if world_size() == 1:
        return True
    try:
        return store().add(f"said/{zlib.crc32(sentence.encode())}", 1) == 1
    except (RuntimeError, OSError):  # the store has gone, and with it everyone who might have said it
        return True


def end(sentence: str) -> None:
    """Let the other processes know why this one ends, before they miss it."""
    if world_size() > 1:
        try:
            store().set("ended", sentence)
        except (RuntimeError, OSError):
            return  # the store has gone


def ended() -> str:
    """Why another process has ended, or ""."""
    return store().get("ended").decode() if world_size() > 1 and store().check(["ended"]) else ""
