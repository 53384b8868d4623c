"""How a model is trained, and how presets, files and flags come together."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from quire.config import Table, from_table, merged, preset, read_toml, to_table
from quire.data.reading import DataSettings
from quire.errors import UserError, choose
from quire.models import MODELS, ModelSettings
from quire.training.curriculum import Stage
from quire.training.engines import ENGINES
from quire.training.optimizers import OPTIMIZERS
from quire.training.schedules import SCHEDULES

LENGTHS = ("steps", "epochs", "tokens", "minutes")


@dataclass(frozen=True)
class TrainingSettings:
    """How a model is trained. Its length is exactly one of steps, epochs, tokens and minutes."""

    steps: int = 0  # length: optimizer steps
    epochs: float = 0.0  # length: passes over the training text
    tokens: int = 0  # length: tokens trained on
    minutes: float = 0.0  # length: wall time from the command's start to its exit
    tokenizer: str = "character"  # a kind to fit, auto, or a tokenizer to use as it is: a path, or the name gpt2
    vocabulary_size: int = 0  # tokens of a tokenizer that is fitted; 0: as its kind sees fit
    batch_size: int = 12  # windows of the context length taken at once
    accumulation_steps: int = 1  # batches whose gradients are added up for one optimizer step
    curriculum: tuple[str, ...] = ()  # stages SHARE:CONTEXT or SHARE:CONTEXT:TEXT, for example 1:64 3:256
    optimizer: str = "adamw"  # adamw, adam, sgd or muon
    learning_rate: float = 6e-4  # at its peak
    matrix_learning_rate: float = 0.02  # muon: at its peak, for the matrices; learning_rate is for the rest
    table_learning_rate: float = 0.1  # of n-gram tables, at its peak: they have an Adagrad of their own
    weight_decay: float = 0.1  # on matrices only
    beta1: float = 0.9  # adam, adamw: decay of the mean of gradients
    beta2: float = 0.95  # adam, adamw: decay of the mean of squared gradients
    momentum: float = 0.95  # sgd, muon
    gradient_clip: float = 1.0  # the whole gradient is scaled down to at most this norm; 0: never
    schedule: str = "cosine"  # after the warm-up: cosine, linear, constant, warmup-stable-decay, inverse-square-root
    warmup_steps: int = 100  # steps over which the learning rate grows to its peak
    decay_floor: float = 0.1  # where the schedule ends, as a share of the peak
    decay_share: float = 0.2  # warmup-stable-decay: the share of the run over which it falls
    engine: str = "autograd"  # where gradients come from: autograd, or manual (every layer's own backward)
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on GPUs that have it
    gradient_checkpointing: bool = False  # compute each block again for its gradient: less memory, more time
    compile: Literal["auto", "yes", "no"] = "auto"  # torch.compile; auto: on CUDA, in runs long enough to gain by it
    evaluation_interval: int = 0  # steps between evaluations; 0: about ten in a run
    sample_tokens: int = 300  # written at each evaluation, at most 2 for a second of --minutes; 0: none
    patience: int = 0  # evaluations without a better held-out loss until patience_action; 0: never
    patience_action: Literal["lower", "stop"] = "stop"  # halve the learning rate, or stop
    non_finite: Literal["stop", "skip", "rollback"] = "stop"  # when the loss is not finite, or explodes
    seed: int = 1337  # of weights, order and dropout
    device: str = "auto"  # auto, cpu, cuda, cuda:N or mps
    threads: int = 0  # CPU threads, of all processes of a machine; 0: as a short trial says, or one for each core
    decisions: str = ""  # decisions.jsonl of an earlier run with --minutes, to repeat it exactly
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: a copy of the model in each process, or its part of it
    timeout: float = 600.0  # under torchrun: seconds without an answer after which another process counts as lost

    def __post_init__(self) -> None:
        choose("--engine", self.engine, list(ENGINES))
        choose("--optimizer", self.optimizer, list(OPTIMIZERS))
        choose("--schedule", self.schedule, list(SCHEDULES))
        for name in ("batch_size", "accumulation_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}.")
        for name in (*LENGTHS, "learning_rate", "matrix_learning_rate", "table_learning_rate", "weight_decay",
                     "gradient_clip", "warmup_steps", "evaluation_interval", "sample_tokens", "patience", "seed",
                     "threads", "vocabulary_size"):  # fmt: skip
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(
                    f"--{name.replace('_', '-')} must be a finite number of at least 0, not {getattr(self, name)}."
                )
        for name in ("beta1", "beta2", "momentum"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 0 and below 1, not {getattr(self, name)}.")
        for name in ("decay_floor", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} must be between 0 and 1, not {getattr(self, name)}.")
        for word in self.curriculum:
            Stage.parse(word)
        if self.compile == "yes" and self.engine == "manual":
            raise UserError("--compile yes needs --engine autograd: a recorded forward is not compiled.")
        if not 0 < self.timeout < float("inf"):
            raise UserError(f"--timeout must be a finite number of seconds above 0, not {self.timeout}.")
        if self.parallel == "fsdp":
            self._check_sharded()
        given = [f"--{name}" for name in LENGTHS if getattr(self, name)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} both give the length of the training. Choose one.")

    def _check_sharded(self) -> None:
        why = "--parallel fsdp leaves each process a part of every matrix"
        if self.engine == "manual":
            raise UserError(f"{why}, which the hand-written backward cannot do without: take --engine autograd.")
        if self.optimizer == "muon":
            raise UserError(f"{why}, and Muon orthogonalizes whole ones: take --optimizer adamw, or --parallel ddp.")
        if self.precision == "float16":
            raise UserError("--parallel fsdp trains in bfloat16 or float32, not --precision float16.")


@dataclass(frozen=True)
class Settings:
    """Everything a run is made from; config.toml has a table for each part."""

    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)

    def tables(self) -> Table:
        """As config.toml spells it."""
        return {"data": to_table(self.data), "model": to_table(self.model), "training": to_table(self.training)}

    def with_model(self, **changes: object) -> "Settings":
        """The same with other values of the model's settings."""
        return replace(self, model=replace(self.model, **changes))  # type: ignore[arg-type]


def layered(preset_name: str, file: str | Path | None = None, flags: Table | None = None) -> Table:
    """The tables of a preset, a configuration file and flags, each over the one before.

    A length given by a later one replaces whichever length an earlier one gave; another kind of model keeps those
    settings that it has too.
    """
    table = preset(preset_name)
    for over in (sections(read_toml(Path(file))) if file else {}, flags or {}):
        training = over.get("training", {})
        if any(training.get(name) for name in LENGTHS):
            table = merged(table, {"training": dict.fromkeys(LENGTHS, 0)})
        model = table.get("model", {})
        if (kind := over.get("model", {}).get("kind")) and kind != model.get("kind", ModelSettings.kind):
            known = {setting.name for setting in fields(MODELS[choose("--model.kind", kind, list(MODELS))].Settings)}
            table["model"] = {name: value for name, value in model.items() if name in known}
        table = merged(table, over)
    return table


def typed(table: Table) -> Settings:
    """The settings that a table spells; unknown tables, keys, kinds and choices are UserErrors."""
    model = sections(table).get("model", {})
    kind = choose("--model.kind", model.get("kind", "gpt"), list(MODELS))
    known = {other: {setting.name for setting in fields(MODELS[other].Settings)} for other in MODELS}
    for name in (name for name in model if name not in known[kind]):
        if others := [other for other in MODELS if name in known[other]]:
            raise UserError(
                f"The kind of model is {kind!r}, which has no setting {name!r}. These have: {', '.join(others)}."
                f' Say which, as in kind = "{others[0]}" under [model].'
            )
    return Settings(
        from_table(DataSettings, table.get("data", {}), "data"),
        from_table(MODELS[kind].Settings, model, "model"),
        from_table(TrainingSettings, table.get("training", {}), "training"),
    )


def sections(table: Table) -> Table:
    """`table` itself, if it is made of the tables that config.toml has."""
    for name, part in table.items():
        choose("The table", name, ["data", "model", "training"])
        if not isinstance(part, dict):
            raise UserError(f"{name} must be a table, [{name}] with settings below it, not {part!r}.")
    return table
