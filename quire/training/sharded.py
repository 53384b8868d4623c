"""A model of which every process holds a part: FSDP2, and checkpoints that each process writes its part of.

`shard` leaves in each process 1/size of every parameter, of its gradient and of its optimizer state; a block's whole
parameters are put together just before it computes, and let go after it (Rajbhandari et al. 2020, "ZeRO"; torch's
fully_shard). A checkpoint of it is

    shard-00001-model-00001-of-00002.safetensors    process 0's parts of the weights,
    shard-00001-model-00002-of-00002.safetensors    and of optimizer state and random generators
    shard-00002-...                                 process 1's ...
    state.json                                      everything else, and the CRC-32 of every tensor and file; last

in torch.distributed.checkpoint's safetensors storage, whose headers say where each part belongs. It is written while
training goes on, and read by any number of processes, or by one that knows nothing of shards (checkpoint.load).
"""

import json
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.checkpoint.api import CheckpointException

from quire import checkpoint, files, processes
from quire.errors import UserError
from quire.layers.cross_attention import CrossAttention
from quire.layers.layer import Block
from quire.layers.ngram_embedding import NgramEmbedding
from quire.models import ModelSettings
from quire.run import empty_model
from quire.training.distributed import World, alone
from quire.training.precision import Precision

MODEL_FILE, TRAINING_FILE = 1, 2  # numbers of the two files of each process


def shard(model: nn.Module, world: World, precision: Precision) -> Any:
    """The same model, its parameters sharded: each block for itself, the rest (a tied tensor in it) together."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if any(isinstance(module, NgramEmbedding) for module in model.modules()):
        raise UserError("--parallel fsdp cannot shard n-gram tables: take --parallel ddp, or a model without them.")
    alone()
    mesh = init_device_mesh(precision.device.type, (world.size,))
    # Gathered in the precision of the products; gradients are added up in float32. What flows between the blocks has
    # that precision too, where autocast alone would leave it in float32.
    low = None if precision.dtype is torch.float32 else precision.dtype
    sums = torch.float32 if low else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=sums, cast_forward_inputs=False)
    apart = [
        part for module in model.modules() if isinstance(module, CrossAttention) for part in (module.key, module.value)
    ]
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    if apart:  # whose results nobody changes in place
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in (*apart, *blocks):  # what a block calls before it: a cache is filled with keys and values alone
        fully_shard(module, mesh=mesh, mp_policy=policy)
    sharded: Any = fully_shard(model, mesh=mesh, mp_policy=policy)
    sharded.register_forward_hook(let_go)  # after FSDP's own
    return sharded


def in_float32(sharded: Any, settings: ModelSettings, world: World, device: torch.device) -> Any:
    """A sharded model once more, its parts gathered in float32: a loss is told of that one.

    It takes 4/size bytes for each parameter, which are free while there are no gradients.
    """
    twin = shard(empty_model(settings, torch.device("cpu")), world, Precision("float32", device))  # sharding moves it
    with torch.no_grad():
        for part, own in zip(twin.parameters(), sharded.parameters(), strict=True):
            part.to_local().copy_(own.to_local())
    return twin


def let_go(model: nn.Module, inputs: Any, result: Any) -> None:
    """After a forward that no backward follows, let go the whole parameters that were kept for that."""
    from torch.distributed.fsdp import FSDPModule

    if not model.training:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class Shards:
    """The checkpoints of a sharded training, written one after the other beside it."""

    def __init__(self, world: World, timeout: float) -> None:
        self.world = world
        # A group of its own: it is used while training uses the other.
        self.group = distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout))
        self.store = processes.store().clone() if world.size > 1 else None
        self.beside = ThreadPoolExecutor(1, "checkpoint")
        self.pending: list[Future[None]] = []
        self.begun = False  # whether anything was, in all processes, since they last finished together

    def save(self, folder: Path, tensors: checkpoint.Tensors, state: dict[str, Any]) -> None:
        """Begin to replace `folder` by a checkpoint, once the one before is written; gives back when the tensors may
        change again."""
        from torch.distributed.checkpoint import async_save
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

        self.finish()
        self.begun = True
        if self.world.leads:
            files.fresh_folder(folder)
        self.world.meet()
        kinds = {name: MODEL_FILE if name.startswith("model.") else TRAINING_FILE for name in tensors}
        writer = HuggingFaceStorageWriter(str(files.beside(folder)), kinds, save_distributed=True)
        written = async_save(dict(tensors), storage_writer=writer, process_group=self.group)
        self.pending.append(self.beside.submit(self._complete, written, folder, state, processes.numbered("sums")))

    def save_again(self, folder: Path, origin: Path) -> None:
        """Replace `folder` by the checkpoint last saved in `origin`, once that is written."""
        if self.world.leads:
            self.pending.append(self.beside.submit(checkpoint.save_again, folder, origin))

    def finish(self) -> None:
        """Wait until what was begun is written, here and in all other processes."""
        pending, self.pending = self.pending, []
        for future in pending:
            future.result()
        if self.begun:
            self.begun = False
            self.world.meet()

    def _complete(self, written: Any, folder: Path, state: dict[str, Any], key: str) -> None:
        """Give every file its checksums, and when all processes have done so the checkpoint its name."""
        try:
            written.result()
        except CheckpointException as error:  # of any process, and of no kind that says what it is
            causes = [cause for cause, _ in error.failures.values()]
            if self.world.leads:
                files.remove(files.beside(folder))  # it may be what fills the disk
            cause = next((cause for cause in causes if isinstance(cause, OSError)), causes[0])
            if isinstance(cause, OSError):
                cause.filename = cause.filename or str(folder)
            raise cause from error
        new, own = files.beside(folder), {}
        for path in sorted(new.glob(f"shard-{self.world.rank + 1:05}-*.safetensors")):
            files.settle(path)
            own[path.name] = checkpoint.sums_of(path)
        if not self.world.leads:
            assert self.store is not None
            self.store.set(f"{key}/{self.world.rank}", json.dumps(own))
            return
        if self.store is not None:
            others = {f"{key}/{rank}": rank for rank in range(1, self.world.size)}
            self.world.wait_for(others)
            for told in others:
                own |= json.loads(self.store.get(told))
                self.store.delete_key(told)
        files.write_json(new / checkpoint.STATE, {"state": state, "files": own})
        files.take_place(folder)

    def load(self, folder: Path, model: nn.Module) -> tuple[dict[str, Any], checkpoint.Tensors]:
        """Fill the model from a checkpoint of shards, each process its parts; gives the state, and the other tensors,
        those of the optimizers sharded too. Every file is checked by one of the processes."""
        from torch.distributed.checkpoint import load
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        found = files.complete_folder(folder, checkpoint.STATE)
        assert found is not None, "the caller has looked whether there is a checkpoint"
        whole = files.read_json(found / checkpoint.STATE)
        self._check(found, whole["files"])
        reader = HuggingFaceStorageReader(str(found))
        stored = reader.read_metadata().state_dict_metadata
        named, rest = dict(model.named_parameters()), checkpoint.Tensors()
        tensors = {f"model.{name}": tensor.detach() for name, tensor in checkpoint.model_tensors(model).items()}
        checkpoint.check_names(tensors, {name for name in stored if name.startswith("model.")}, folder)
        for name, entry in stored.items():
            if name.startswith("model."):
                continue
            assert isinstance(entry, TensorStorageMetadata)
            parameter = named.get(name.removeprefix("optimizer.").rpartition(".")[0])
            if parameter is not None and entry.size == parameter.shape:
                rest[name] = torch.empty_like(parameter)
            else:
                rest[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
        load({**tensors, **rest}, storage_reader=reader, process_group=self.group)
        return whole["state"], rest

    def _check(self, folder: Path, sums: dict[str, Any]) -> None:
        """Raise a UserError, in all processes, where a file is damaged."""
        sentence, mine = "", sorted(sums)[self.world.rank :: self.world.size]
        try:
            for name in mine:
                checkpoint.read_tensors(folder / name, sums[name])
        except (UserError, OSError) as error:
            sentence = str(error)
        damaged = self.world.largest(self.world.rank + 1 if sentence else 0)
        if damaged and self.store is not None:
            if sentence:
                self.store.set(f"damaged/{self.world.rank}", sentence)
            self.world.meet()
            sentence = self.store.get(f"damaged/{int(damaged) - 1}").decode()
        if damaged:
            raise UserError(sentence)
