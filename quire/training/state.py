"""All that training changes, in one visible place: what a checkpoint must hold for an exact resume."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from quire import checkpoint
from quire.data.batches import Cursor
from quire.devices import generators
from quire.training.distributed import ALONE, World
from quire.training.optimizers import Optimizers


@dataclass
class TrainingState:
    """Plain numbers, all in state.json; weights, optimizer and random generators are tensors beside it.

    A run is trained in one or more stretches: `quire resume RUN --steps N` adds one, with a new warm-up.
    """

    step: int = 0  # optimizer steps taken
    tokens: int = 0  # tokens trained on
    seconds: float = 0.0  # wall time
    stage: int = 0  # of the curriculum
    cursor: Cursor = field(default_factory=Cursor)  # the place in that stage's data
    divided: int = 1  # in so many parts each batch: doubled where memory ran out
    # the stretch
    launch: str = ""  # of the processes that began it, as torchrun names it
    start: int = 0  # step at which it began
    end: int = 0  # step at which it ends; 0: when the clock says so
    minutes: float = 0.0  # its wall time, where the clock ends it
    seconds_before: float = 0.0  # wall time of earlier stretches
    progress: float = 0.0  # 0 at its beginning, 1 at its end
    rate: float = 0.0  # progress of one step; 0: not known yet
    next_decision: int = 0  # step at which the clock corrects the rate
    next_evaluation: int = 0  # step
    finished: bool = False
    # the best so far, and what to do when it does not come
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0  # evaluations since the best, or since the learning rate was lowered
    lowered: float = 1.0  # share of the learning rate left by patience and rollbacks
    first_loss: float | None = None  # of the first step: what a loss is called exploding by
    passed_over: int = 0  # steps in a row without an update, because the loss was not finite
    # since the last line of metrics.jsonl
    loss_sum: float = 0.0
    loss_steps: int = 0
    log_sizes: dict[str, int] = field(default_factory=dict)  # bytes of each log at this state

    def to_table(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> "TrainingState":
        """From plain JSON; fields that an older Quire did not write keep their defaults."""
        known = {item.name for item in fields(cls)}
        return cls(**{**{k: v for k, v in table.items() if k in known}, "cursor": Cursor(**table["cursor"])})


def device_of(model: nn.Module) -> torch.device:
    """Where a model's parameters are."""
    return next(model.parameters()).device


def training_tensors(model: nn.Module, optimizers: Optimizers, scaler: Any, world: World = ALONE) -> dict[str, Tensor]:
    """Optimizer state, named optimizer.PARAMETER.KEY, the loss scale, and the random generators of all processes, named
    random.KIND, and random.KIND.RANK from the second process on."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    tensors = {
        drawn_by(rank, kind): each
        for kind, (state, _) in generators(device_of(model)).items()
        for rank, each in enumerate(world.gathered(state))
    }
    if scaler.is_enabled():
        scale = scaler.state_dict()
        tensors["scaler"] = torch.tensor([scale["scale"], scale["_growth_tracker"]], dtype=torch.float64)
    for optimizer in optimizers:
        for parameter, values in optimizer.state.items():
            for key, value in values.items():
                if value is not None:  # SGD without momentum
                    tensors[f"optimizer.{names[id(parameter)]}.{key}"] = torch.as_tensor(value)
    return tensors


def drawn_by(rank: int, kind: str) -> str:
    """The name of a random generator's state in a checkpoint."""
    return f"random.{kind}.{rank}" if rank else f"random.{kind}"


def restore_training_tensors(
    tensors: dict[str, Tensor], model: nn.Module, optimizers: Optimizers, scaler: Any, world: World = ALONE
) -> None:
    """The inverse of `training_tensors`, into a model and optimizers already built.

    A process that was not there when they were saved keeps the random generators that it has.
    """
    for optimizer in optimizers:
        optimizer.state.clear()
    homes = {
        parameter: optimizer for optimizer in optimizers for g in optimizer.param_groups for parameter in g["params"]
    }
    named = dict(model.named_parameters())
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            parameter_name, _, key = name.removeprefix("optimizer.").rpartition(".")
            parameter = named[parameter_name]
            # A step counter stays where its optimizer keeps it: on the CPU, or with the parameter if fused on a GPU.
            fused = bool(homes[parameter].defaults.get("fused"))
            device = parameter.device if tensor.dim() or fused else torch.device("cpu")
            part = tensor if hasattr(tensor, "to_local") else like(parameter, tensor.to(device, copy=True))
            homes[parameter].state[parameter][key] = part
    if "scaler" in tensors and scaler.is_enabled():
        scale, tracker = tensors["scaler"].tolist()
        scaler.load_state_dict({**scaler.state_dict(), "scale": scale, "_growth_tracker": int(tracker)})
    restore_generators(tensors, model, world)


def restore_generators(tensors: dict[str, Tensor], model: nn.Module, world: World = ALONE) -> None:
    """Go on with this process's random generators where they were saved."""
    for kind, (_, set_state) in generators(device_of(model)).items():
        if (drawn := tensors.get(drawn_by(world.rank, kind))) is not None:
            set_state(drawn)


def like(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """A tensor of a parameter's shape as the parameter is held: where that is sharded, this process's part."""
    if tensor.shape != parameter.shape or not hasattr(parameter, "to_local"):
        return tensor
    part = torch.empty_like(parameter)
    checkpoint.put(part, tensor)
    return part


def save(
    folder: Any, state: TrainingState, model: nn.Module, optimizers: Optimizers, scaler: Any, world: World = ALONE
) -> None:
    """Write a checkpoint that resumes exactly; of several processes, which all call this, the leading one writes."""
    tensors = training_tensors(model, optimizers, scaler, world)
    if world.leads:
        checkpoint.save(folder, checkpoint.model_tensors(model), tensors, state.to_table())


def restore(
    found: checkpoint.Checkpoint,
    origin: Any,
    model: nn.Module,
    optimizers: Optimizers,
    scaler: Any,
    world: World = ALONE,
) -> TrainingState:
    """Put a checkpoint's tensors where they belong, and give its state."""
    checkpoint.load_model_tensors(model, found.model, origin)
    restore_training_tensors(found.training, model, optimizers, scaler, world)
    return TrainingState.from_table(found.state)
