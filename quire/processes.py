"""Which one this process is of those that train together, as torchrun says, and how they speak with one voice.

torchrun sets in each process RANK (its number), WORLD_SIZE (how many there are), LOCAL_RANK (its number on its
machine), and the address of a store, a small table on the network in which all of them write and read. Where nothing
is set, there is one process, and it leads. The processes that Lightning starts have LOCAL_RANK and NODE_RANK alone.
"""

import os
import time
import zlib
from collections import Counter
from functools import cache
from typing import Any, NamedTuple
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


def on_leaders_machine() -> bool:
    """Whether this process is on the machine of the first of all (GROUP_RANK is the machine's number)."""
    return rank() == 0 or int(os.environ.get("GROUP_RANK", int(local_rank() != rank()))) == 0


def leads() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0 if launched() else all(int(os.environ.get(name, 0)) == 0 for name in ("LOCAL_RANK", "NODE_RANK"))


def restarted() -> bool:
    """Whether torchrun has started processes again, after one of them ended badly."""
    return launched() and meeting().restarted


def launch() -> str:
    """A name for the launch that stays when torchrun starts its processes again; "" where there is none."""
    return meeting().launch if launched() else ""


def store() -> Any:
    """The launch's store, with keys of this start alone."""
    return meeting().store


class Meeting(NamedTuple):
    """What the processes of a start have in common."""

    store: Any  # with keys of their own
    launch: str
    restarted: bool


def meeting() -> Meeting:
    """The other processes of this start; a UserError where they do not come."""
    found = _meet()
    if isinstance(found, UserError):
        raise found
    return found


@cache
def _meet() -> Meeting | UserError:
    """Find the other processes, or why they are not found, which is not tried twice.

    torchrun's store outlives the processes, and so keeps the name that the first of all starts gave the launch; but
    also keys of processes that have ended. So the first process gives this start a name too; each other one says hello
    with a word of its own, and takes the name for true once the first has answered that word under it.
    """
    from datetime import timedelta

    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        found, own, size = next(rendezvous("env://", timeout=timedelta(seconds=STORE_SECONDS)))
        start = _welcome(found, size) if own == 0 else _arrive(found, own)
        place = PrefixStore(f"quire/{start}", found)
        return Meeting(place, found.get("quire/launch").decode(), bool(place.get("restarted")))
    except UserError as error:
        return error
    except (RuntimeError, ValueError, OSError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        return UserError(f"The other processes were not found at {where}: {reason}. Start all of them again.")


def _welcome(found: Any, size: int) -> str:
    """Name this start, and the launch if it is the first; answer each other process; gives the start's name."""
    start, missing = uuid4().hex, set(range(1, size))
    again = found.check(["quire/launch"])
    if not again:
        found.set("quire/launch", start)
    found.set(f"quire/{start}/restarted", "yes" if again else "")
    found.set("quire/start", start)
    until = time.monotonic() + STORE_SECONDS
    while missing:
        for rank in sorted(missing):
            hello = f"quire/hello/{rank}"
            if found.check([hello]):  # perhaps of one that has ended, which will not say that they have met
                found.set(f"quire/{start}/{found.get(hello).decode()}", "")
            if found.check([f"quire/{start}/met/{rank}"]):
                missing.remove(rank)
        _wait(until, f"process {' and '.join(map(str, sorted(missing)))} of {size} did not come")
    return start


def _arrive(found: Any, rank: int) -> str:
    """Say hello to the first process; gives the name of this start."""
    word = uuid4().hex
    found.set(f"quire/hello/{rank}", word)
    until = time.monotonic() + STORE_SECONDS
    while not (found.check(["quire/start"]) and found.check([f"quire/{(start := _start(found))}/{word}"])):
        _wait(until, "process 0 did not come")
    found.set(f"quire/{start}/met/{rank}", "")
    return start


def _start(found: Any) -> str:
    return found.get("quire/start").decode()


def _wait(until: float, what: str) -> None:
    if time.monotonic() > until:
        raise UserError(f"In {STORE_SECONDS:.0f} seconds {what}. See what they said, and start all of them again.")
    time.sleep(LOOKING)


_counts = Counter[str]()


def numbered(key: str) -> str:
    """A key of the store for its next use: what was written for an earlier one is not read again."""
    _counts[key] += 1
    return f"{key}/{_counts[key]}"


def first_to_say(sentence: str) -> bool:
    """Whether no other process of this start has said the sentence: then this one is to."""
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
