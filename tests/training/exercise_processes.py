"""What two processes do for test_distributed.py: they train together, and write down what they found.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python tests/training/exercise_processes.py FOLDER

FOLDER has words.json, the words of the training; 0.json and 1.json are written there.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from quire import progress
from quire.cli.main import call
from quire.errors import UserError
from quire.run import Run
from quire.training import agreement
from quire.training.distributed import ALONE, World, join
from quire.training.loop import Trainer
from quire.training.settings import TrainingSettings

CPU = torch.device("cpu")
STEPS = 6  # of the comparison with one process


def sharded(folder: Path, world: World) -> dict[str, Any]:
    """A sharded training, straight and through checkpoints of both kinds."""
    run, tokens = agreement.small_run(folder / f"shards-{world.rank}")
    settings = TrainingSettings(steps=12, parallel="fsdp", batch_size=4, device="cpu")
    weights: dict[str, Any] = {}

    def trainer(parallel: str = "fsdp") -> Trainer:
        made = Trainer(run, replace(settings, parallel=parallel), tokens, CPU, time.time())
        made.begin()
        made.wrap_model()
        return made

    def whole(of: Trainer) -> dict[str, torch.Tensor]:
        parts = {name: tensor.clone() for name, tensor in of.saving.tensors().items()}
        return {name: part.full_tensor() if hasattr(part, "full_tensor") else part for name, part in parts.items()}

    def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
        return sorted(one.keys() ^ other.keys()) or [name for name in one if not torch.equal(one[name], other[name])]

    where, straight, stopped = folder / "sharded" / "checkpoints" / "last", trainer(), trainer()
    beginning = whole(straight)
    for _ in range(6):
        straight.update()
        stopped.update()
    stopped.saving.shards.save(where, stopped.saving.tensors(), stopped.state.to_table())
    stopped.update()  # while it is being written: what is saved is what was there then
    stopped.saving.finish()
    middle = whole(straight)
    weights = {
        name.removeprefix("model."): tensor.flatten().tolist() for name, tensor in middle.items() if "model." in name
    }
    resumed = trainer()
    resumed.state = resumed.saving.load(where)
    for _ in range(3):
        straight.update()
        resumed.update()
    half, ways = {}, [("ddp", "bfloat16"), ("fsdp", "bfloat16"), ("fsdp", "float32")]
    for parallel, precision in ways:
        low = replace(settings, parallel=parallel, precision=precision, gradient_checkpointing=True)
        half[f"{parallel} {precision}"], _ = agreement.trained(run, low, tokens, CPU, world, 6)
    result = {"half": half, "weights": {n: w for n, w in weights.items() if not n.startswith("optimizer")},
              "resumed": differing(whole(straight), whole(resumed)),
              "unlike the beginning": bool(differing(beginning, whole(straight)))}  # fmt: skip
    ordinary = trainer("ddp")
    ordinary.state = ordinary.saving.load(where)
    ordinary.saving.run = Run(run.path)
    ordinary.saving.save("last", ordinary.state)
    world.meet()
    again = trainer()
    again.state = again.saving.load(folder / "shards-0" / "checkpoints" / "last")
    result["from an ordinary one"] = differing(middle, whole(again))
    if world.leads:
        for path in (folder / f"shards-{world.rank}").iterdir():
            if path.name != "checkpoints":
                path.rename(folder / "sharded" / path.name)
        path = where / "shard-00002-model-00001-of-00002.safetensors"
        good = path.read_bytes()
        path.write_bytes(good[:-40] + bytes([good[-40] ^ 1]) + good[-39:])
    world.meet()
    try:
        again.saving.load(where)
    except UserError as error:
        result["damaged"] = str(error)
    world.meet()
    if world.leads:
        path.write_bytes(good)
    return result


def out_of_step(folder: Path, world: World) -> float:
    """The largest relative difference from one process where each process trains on the first one's rows."""
    run, tokens = agreement.small_run(folder / f"wrong-{world.rank}")
    settings, share = TrainingSettings(steps=2, batch_size=12, device="cpu"), World.share
    alone, _ = agreement.trained(run, settings, tokens, CPU, ALONE, 2)
    World.share = lambda self, rows: share(World(0, self.size), rows)
    wrong, _ = agreement.trained(run, settings, tokens, CPU, world, 2)
    World.share = share
    return max(abs(one - other) / other for one, other in zip(wrong, alone, strict=True))


def work(folder: Path) -> None:
    """Everything in which both take part."""
    torch.set_num_threads(1)
    console, said = progress.console(), []
    show = console.print
    console.print = lambda text, **style: said.append(text) or show(text, **style)
    assert call(json.loads((folder / "words.json").read_text())) == 0
    again = ["--run", str(folder / "again"), "--steps=2", "--parallel=fsdp"]  # another one in the same processes
    assert call([*json.loads((folder / "words.json").read_text()), *again]) == 0
    assert call(["resume", str(folder / "again"), "--steps=2"]) == 0
    world = join(TrainingSettings.timeout)
    result: dict[str, Any] = {"said": "\n".join(said), "wrong": out_of_step(folder, world)}
    result["ways"] = {each.way: vars(each) for each in agreement.agreements(world, CPU, STEPS)}
    result["sharded"] = sharded(folder, world)
    (folder / f"{world.rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    work(Path(sys.argv[1]))
