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

from quire.errors import UserError

STORE_SECONDS = 300.0  # for processes to find the store, and one another
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


def meeting() -> tuple[Any, bool]:
    """The store with keys of this start alone, and whether any of its processes was started again; a UserError where
    the others do not come."""
    found = _meet()
    if isinstance(found, UserError):
        raise found
    return found


@cache
def _meet() -> tuple[Any, bool] | UserError:
    """Find the other processes, or why they are not found, which is not tried twice.

    torchrun's store may keep the keys of processes that have ended, and each machine counts restarts by itself. So the
    first process gives this start a name; each other one says hello with a word of its own, and takes the name for
    true once the first has answered that word under it.
    """
    from datetime import timedelta

    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        found, own, size = next(rendezvous("env://", timeout=timedelta(seconds=STORE_SECONDS)))
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        if own == 0:
            start, others = _welcome(found, size)
            place = PrefixStore(f"quire/{start}", found)
            place.set("restarts", str(max(restarts, others)))
        else:
            place = PrefixStore(f"quire/{_arrive(found, own, restarts)}", found)
        return place, int(place.get("restarts")) > 0
    except UserError as error:
        return error
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return UserError(f"The other processes were not found at {where}: {reason}. Start all of them again.")


def _welcome(found: Any, size: int) -> tuple[str, int]:
    """Name this start, and answer each other process; gives the name, and how often one of them was started again."""
    start, missing, restarts = uuid4().hex, set(range(1, size)), 0
    found.set("quire/start", start)
    until = time.monotonic() + STORE_SECONDS
    while missing:
        for rank in sorted(missing):
            hello, met = f"quire/hello/{rank}", f"quire/{start}/met/{rank}"
            if found.check([hello]):  # perhaps of one that has ended, which will not say that they have met
                found.set(f"quire/{start}/{found.get(hello).decode()}", "")
            if found.check([met]):
                restarts = max(restarts, int(found.get(met)))
                missing.remove(rank)
        _wait(until, f"of {size} processes {len(missing)} have not come")
    return start, restarts


def _arrive(found: Any, rank: int, restarts: int) -> str:
    """Say hello to the first process; gives the name of this start."""
    word = uuid4().hex
    found.set(f"quire/hello/{rank}", word)
    until = time.monotonic() + STORE_SECONDS
    while not found.check([f"quire/{(start := found.get('quire/start').decode())}/{word}"]):
        _wait(until, "process 0 has not come")
    found.set(f"quire/{start}/met/{rank}", str(restarts))
    return start


def _wait(until: float, what: str) -> None:
    if time.monotonic() > until:
        raise UserError(f"In {STORE_SECONDS:.0f} seconds {what}. See what they said, and start all of them again.")
    time.sleep(LOOKING)


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
    except (RuntimeError, OSError, UserError):  # the store has gone, and with it everyone who might have said it
        return True


def end(sentence: str) -> None:
    """Let the other processes know why this one ends, before they miss it."""
    if world_size() > 1:
        try:
            store().set("ended", sentence)
        except (RuntimeError, OSError, UserError):
            return  # the store has gone


def ended() -> str:
    """Why another process has ended, or ""."""
    return store().get("ended").decode() if world_size() > 1 and store().check(["ended"]) else ""
