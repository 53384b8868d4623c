"""Which one this process is of those that train together, as torchrun says, and how they speak with one voice.

torchrun sets in each process RANK (its number), WORLD_SIZE (how many there are), LOCAL_RANK (its number on its
machine), and the address of a store, a small table on the network in which all of them write and read. Where nothing
is set, there is one process, and it leads.
"""

import os
import zlib
from functools import cache
from typing import Any

STORE_SECONDS = 60.0  # for a process to find the store


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


def leads() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def restarted() -> bool:
    """Whether torchrun has started the processes again, after one of them ended badly."""
    return launched() and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launch() -> str:
    """A name for the launch that stays when torchrun starts its processes again; "" where there is none."""
    if not launched():
        return ""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    # Launches that were given no name are told apart by the torchrun that is this process's parent.
    return name if name != "none" else f"{os.uname().nodename if hasattr(os, 'uname') else ''}-{os.getppid()}"


@cache
def store() -> Any:
    """The launch's store; its keys begin anew when torchrun starts the processes again."""
    from datetime import timedelta

    from torch.distributed import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    found, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=STORE_SECONDS)))
    return PrefixStore(f"quire/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", found)


def first_to_say(sentence: str) -> bool:
    """Whether no other process of this launch has said the sentence: then this one is to."""
    if world_size() == 1:
        return True
    try:
        return store().add(f"said/{zlib.crc32(sentence.encode())}", 1) == 1
    except (RuntimeError, OSError):  # the store has gone, and with it everyone who might have said it
        return True
