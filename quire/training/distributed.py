"""Several processes that train one model, started by torchrun: each takes its part of every batch.

A World is the processes and what they do together; a World of one does nothing. Models, engines and optimizers know
nothing of it: they are wrapped (DistributedDataParallel) or sharded (see sharded.py) from outside. A batch is that of
all processes, as without them: the loss is the sum over all its tokens divided by their number, whoever holds which, so
that the same settings give the same curve with any number of processes.

    torchrun --nproc-per-node 2 -m -- quire train TEXT --run DIR
"""

import atexit
import contextlib
import functools
import itertools
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn

from quire import processes
from quire.config import Table
from quire.devices import out_of_memory
from quire.errors import UserError
from quire.layers.ngram_embedding import NgramEmbedding
from quire.models import ModelSettings
from quire.training.settings import TrainingSettings

PATIENCE = 3  # times as long as --timeout nccl waits
LISTENING = 3.0  # seconds in which those that are still there say so, after one is missed
LOOKING = 0.2  # seconds between two looks at the store
REMEDY = "Training stopped; quire resume goes on from the last checkpoint."
# What torch's backends say where another process has gone or hangs; gloo's errors have no type of their own.
LOST = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "broken pipe")


class Lost(Exception):
    """Another process of the training ended or hangs."""

    exit_code = 1


@dataclass(frozen=True)
class World:
    """`size` processes, of which this is number `rank`."""

    rank: int = 0
    size: int = 1
    group: Any = None  # of torch's, by which numbers are exchanged; None: the one of all
    timeout: float = 600.0  # seconds after which one that is not heard of counts as lost

    @property
    def leads(self) -> bool:
        """Whether this is the one that prints and writes."""
        return self.rank == 0

    # ---- who does what ----

    def share(self, rows: int) -> slice:
        """Which of a batch's rows are this process's: as equal shares as there can be, none empty."""
        if rows < self.size:
            raise UserError(
                f"A batch of {rows} window{'s' * (rows != 1)} cannot be shared by {self.size} processes. Give a"
                f" --batch-size of at least {self.size}, or start fewer processes."
            )
        return slice(rows * self.rank // self.size, rows * (self.rank + 1) // self.size)

    def parts(self, rows: int, wanted: int) -> int:
        """In how many parts each process takes its share of so many rows: the same number in all of them."""
        return min(rows // self.size, wanted)

    # ---- numbers exchanged, on the CPU ----

    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over all processes."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        distributed.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    def largest(self, number: float) -> float:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX, self.group)
        return float(tensor)

    def first(self, number: float) -> float:
        """The leading process's number."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number, dtype=torch.float64)
        distributed.broadcast(tensor, 0, self.group)
        return float(tensor)

    def told(self, *numbers: float) -> list[list[float]]:
        """Each number as all processes have it, in their order: one message for all of them."""
        return torch.stack(self.gathered(torch.tensor(numbers, dtype=torch.float64))).T.tolist()

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The tensors (of one shape, on the CPU) of all processes."""
        if self.size == 1:
            return [tensor]
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(found, tensor, self.group)
        return found

    def meet(self) -> None:
        """Wait until all are here."""
        self.largest(0)

    # ---- one after the other ----

    @contextlib.contextmanager
    def leading(self, what: str) -> Iterator[Callable[[str], None]]:
        """What the leading process does while the others wait in `follow` for the same thing: they get the result that
        it tells them by calling what this gives, or learn that it failed, and why."""

        def say(kind: str, text: str) -> None:
            if self.size > 1:
                processes.store().set(processes.numbered(what), f"{kind}: {text}")

        try:
            yield functools.partial(say, "result")
        except BaseException as error:
            say("mistake" if isinstance(error, UserError) else "failure", str(error))
            raise

    def follow(self, what: str) -> str:
        """The result of what the leading process does meanwhile, however long that takes."""
        store, key = processes.store(), processes.numbered(what)
        with self.explained():
            self.wait_for({key: 0})
            kind, _, text = store.get(key).decode().partition(": ")
        if kind == "result":
            return text
        if kind == "mistake":
            raise UserError(text)
        until = time.monotonic() + LISTENING  # a full disk, say, has its sentence only where the command ends
        while not (sentence := self.why_ended()) and time.monotonic() < until:
            time.sleep(LOOKING)
        raise UserError(sentence) if sentence else Lost("Process 0 failed.")

    def assemble(self) -> None:
        """Wait until all are here, however long one of them prepares what it needs."""
        if self.size > 1:
            key = processes.numbered("assembled")
            with self.explained():
                processes.store().set(f"{key}/{self.rank}", "")
                self.wait_for({f"{key}/{rank}": rank for rank in range(self.size)})

    def wait_for(self, keys: dict[str, int]) -> None:
        """Wait until the store has these keys, each of a process; a process may tell why it ends, or be lost."""
        store, heard = processes.store(), dict[int, bytes]()
        since = dict.fromkeys(keys.values(), time.monotonic())
        while not store.check(list(keys)):
            if sentence := processes.ended():
                raise UserError(sentence)
            for rank, beat in zip(since, store.multi_get([beat_of(rank) for rank in since]), strict=True):
                if beat != heard.get(rank):
                    heard[rank], since[rank] = beat, time.monotonic()
            if lost := [rank for rank, when in since.items() if time.monotonic() - when > self.timeout]:
                raise Lost(self.missing(lost))
            time.sleep(LOOKING)

    # ---- the model ----

    def of_step(self, wrapped: Any, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a part of a step: gradients are exchanged once, with the last part's."""
        if last or not isinstance(wrapped, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return wrapped.no_sync()

    def wrapped(self, model: Any, device: torch.device) -> Any:
        """The model with gradients that become the mean over all processes while autograd runs."""
        for module in model.modules():
            if isinstance(module, NgramEmbedding):
                module.sparse = False  # DistributedDataParallel expects dense gradients of all but torch's embeddings
        where = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=where, gradient_as_bucket_view=True)

    # ---- what goes wrong ----

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Within, an error that means that another process is missed becomes a sentence that names it."""
        try:
            yield
        except UserError as error:
            processes.end(str(error))
            raise
        except RuntimeError as error:
            said = str(error).lower()
            if self.size == 1 or out_of_memory(error) or not any(word in said for word in LOST):
                raise
            if sentence := self.why_ended():
                raise UserError(sentence) from error
            raise Lost(self.who_is_missing()) from error

    def why_ended(self) -> str:
        """The reason that another process gave before it ended, or ""."""
        try:
            return processes.ended()
        except RuntimeError:  # the store has gone with it
            return ""

    def who_is_missing(self) -> str:
        """A sentence about those processes that do not say within a moment that they are there."""
        try:
            store = processes.store()
            if store.check(["lost"]):  # another process has looked
                return store.get("lost").decode()
            store.set(f"here/{self.rank}", "")
            until = time.monotonic() + LISTENING
            missing = [rank for rank in range(self.size) if rank != self.rank]
            while missing and time.monotonic() < until:
                time.sleep(LOOKING)
                missing = [rank for rank in missing if not store.check([f"here/{rank}"])]
            return self.missing(missing)
        except RuntimeError:
            return f"The other processes, and their store, do not answer any more. {REMEDY}"

    def missing(self, ranks: list[int]) -> str:
        """A sentence about processes that are lost, kept for others that look."""
        if not ranks:
            return f"The connection between the processes was lost for a moment. {REMEDY}"
        store = processes.store()
        names = " and ".join(f"process {rank} ({store.get(f'name/{rank}').decode()})" for rank in ranks)
        verb, it, was = ("does", "it hangs", "it was") if len(ranks) == 1 else ("do", "they hang", "they were")
        sentence = f"{names[0].upper()}{names[1:]} {verb} not answer: {it}, or {was} killed. {REMEDY}"
        store.set("lost", sentence)
        return sentence


ALONE = World()


def world_table(training: TrainingSettings, model: ModelSettings, size: int) -> Table:
    """What a manifest says of so many processes: the tokens that each takes in a step, of pairs at most."""
    rows = range(training.batch_size * training.accumulation_steps)
    shares = [rows[World(rank, size).share(len(rows))] for rank in range(size)]
    return {"world_size": size, "tokens_per_rank": [len(share) * model.context_length for share in shares]}


_joined: list[World] = []  # once this process has met the others


def join(timeout: float) -> World:
    """Meet the other processes of this launch; later messages fail after `timeout` seconds without an answer (those of
    the first call)."""
    if not processes.launched():
        return ALONE
    if not _joined:
        rank, size, waiting = processes.rank(), processes.world_size(), timedelta(seconds=timeout)
        store = processes.store()
        store.set_timeout(waiting)
        store.set(f"name/{rank}", f"pid {os.getpid()} on {platform.node()}")
        store.set(beat_of(rank), "")
        end = threading.Event()
        beating = threading.Thread(target=beat, args=(store.clone(), rank, min(1.0, timeout / 5), end), daemon=True)
        beating.start()
        atexit.register(beating.join, 1.0)
        atexit.register(end.set)  # before that, and after the group is left: atexit goes backwards
        # A process that nccl misses ends without a word: it has more patience than the messages on the CPU.
        longer = PATIENCE * waiting if "nccl" in backend() else waiting
        distributed.init_process_group(backend(), store=store, rank=rank, world_size=size, timeout=longer)
        _joined.append(World(rank, size, distributed.new_group(backend="gloo", timeout=waiting), timeout))
        atexit.register(leave)
    return _joined[0]


def beat_of(rank: int) -> str:
    """The key of the store under which a process shows that it lives."""
    return f"beat/{rank}"


def beat(store: Any, rank: int, pause: float, end: threading.Event) -> None:
    """Show every `pause` seconds that this process lives, however busy it is."""
    for number in itertools.count():
        try:
            store.set(beat_of(rank), str(number))
        except RuntimeError:  # the store has gone
            return
        if end.wait(pause):
            return


def alone() -> None:
    """Make this process a group of one, where it was not launched among others: sharding needs a group."""
    if not distributed.is_initialized():
        distributed.init_process_group(backend(), store=distributed.HashStore(), rank=0, world_size=1)
        atexit.register(leave)


def backend() -> str:
    """How processes speak: tensors on CPUs by gloo, on GPUs by nccl."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"


def leave() -> None:
    """Leave the group at the process's end."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """The device of this process: of a machine's GPUs each process takes the one of its number."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # where parts are gathered
    if device.type == "cpu" or not processes.launched():
        return device
    number, size, cards = processes.local_rank(), processes.local_size(), torch.cuda.device_count()
    if device.type != "cuda":
        raise UserError("Several processes train on CPUs or on NVIDIA's GPUs: give --device cpu.")
    if device.index is not None and size > 1:
        raise UserError("Several processes take a GPU each: leave the number out of --device.")
    if number >= cards:
        raise UserError(
            f"There are {size} processes on this machine, and {cards} GPU{'s' * (cards != 1)}: start it with"
            f" --nproc-per-node {cards}, or take --device cpu."
        )
    torch.cuda.set_device(number if device.index is None else device.index)
    return torch.device("cuda", torch.cuda.current_device())
