"""Training a run: from its text to its last checkpoint, resumed, continued, and proven exact."""

import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import quire
from quire import files
from quire.config import Table, from_table, write_checked_toml
from quire.data.pairs import Pairs
from quire.data.prepare import Prepared
from quire.data.reading import DataSettings
from quire.data.tasks import TASKS
from quire.devices import choose_device, keep_freed_memory, set_threads, unused_card
from quire.errors import UserError
from quire.progress import say
from quire.run import Run, refuse_existing
from quire.training.clock import read_decisions
from quire.training.curriculum import Curriculum, shortened
from quire.training.loop import Trainer
from quire.training.settings import LENGTHS, Settings, TrainingSettings
from quire.training.texts import STANDARD_INPUT, find_data, given_text, load_data
from quire.training.threads import find_threads, in_words
from quire.training.verify import first_difference

SHORTEST_CONTEXT = 8
VERIFIED_STEPS = 6


@dataclass(frozen=True)
class Loaded:
    """A text that was read and prepared before its run begins, as a plan does; `piped` is that of standard input."""

    prepared: Prepared
    origins: list[Table]
    piped: bytes | None = None


def train_run(
    settings: Settings, path: Path | None = None, began: float | None = None, loaded: Loaded | None = None
) -> Run:
    """Train a new run with finished settings; `began` is time.time() at the command's start, for --minutes.

    A text that is `loaded` already, with these very settings, is not read again.
    """
    began = began or time.time()
    check_length(settings.training)
    check_pairs(settings)
    if path is not None:
        refuse_existing(path)
    kept = {}
    if decisions := settings.training.decisions:
        recorded = [decision.threads for decision in read_decisions(Path(decisions)).values()]
        if not settings.training.threads and any(recorded):  # the same bits need the same threads
            settings = replace(settings, training=replace(settings.training, threads=max(recorded)))
        kept["decisions.jsonl"] = Path(decisions).read_bytes()
    if loaded:
        piped = loaded.piped
    else:
        settings, piped = given_text(settings)
    if piped is not None:
        kept[f"data/{STANDARD_INPUT}"] = piped
    texts = settings.data.named
    path = path or free_path(texts[0])
    measure = settings.training.threads == 0
    device, threads = prepare_machine(settings.training)
    settings = replace(settings, training=replace(settings.training, threads=threads))
    if loaded:
        prepared, origins = loaded.prepared, loaded.origins
    else:
        settings, prepared, origins = load_data(settings, piped)
    say(f"{', '.join(texts[:3])}: {prepared}")
    settings, prepared = fitted(settings, prepared)
    manifest, counts = describe(settings, prepared, origins, device), settings.model.count(prepared.training)
    created = Run.create(
        path, settings.tables(), prepared.tokenizer, manifest, prepared.validation[:], kept, counts=counts
    )
    begin = begun_with_threads(Trainer.begin) if measure else Trainer.begin
    return train_created(created, settings.training, prepared, device, began, begin, keep=piped is not None)


def check_length(training: TrainingSettings) -> None:
    """Refuse settings that do not say how long to train."""
    if not any(getattr(training, name) for name in LENGTHS):
        raise UserError("Say how long to train: --minutes M, --steps N, --epochs N or --tokens N.")


def check_pairs(settings: Settings) -> None:
    """Refuse a text where pairs are wanted, and what pairs cannot have."""
    data, model = settings.data, settings.model
    if data.pairs and data.text:
        raise UserError(f"TEXT ({data.text[0]}) and --pairs {data.pairs} both name what to train on. Choose one.")
    if not data.pairs and model.reads_source:
        raise UserError(
            f"A model of the kind {model.kind} learns from pairs of a source and a target: give it --pairs FILE, with"
            f" lines of SOURCE, tab, TARGET, or a task ({', '.join(TASKS)}). For a plain text take another --preset."
        )
    if data.pairs and model.separate_documents:
        raise UserError("--model.separate-documents is for streams of text. Leave it out: pairs are apart already.")


def train_created(
    run: Run,
    training: TrainingSettings,
    prepared: Prepared,
    device: torch.device,
    began: float,
    begin: Callable[[Trainer], None],
    keep: bool,
) -> Run:
    """Train a run that has just been made; `begin` sets its trainer going. One that fails before its first step is
    deleted, unless it is to be kept: it may hold the only copy of a text."""
    trainer = None
    try:
        with training_lock(run):
            trainer = Trainer(run, training, prepared.training, device, began)
            begin(trainer)
            announce(run, trainer)
            trainer.fit()
    except (Exception, KeyboardInterrupt):
        if not keep and (trainer is None or trainer.state.step == 0):
            shutil.rmtree(run.path, ignore_errors=True)  # it holds nothing yet: leave the name free for the next try
        raise
    return run


def begun_with_threads(begin: Callable[[Trainer], None]) -> Callable[[Trainer], None]:
    """`begin`, and then the number of threads found by measurement, and written into the run."""

    def begun(trainer: Trainer) -> None:
        begin(trainer)
        found = find_threads(trainer)
        if not found.seconds:
            return
        run, each = trainer.run, {str(count): round(seconds, 4) for count, seconds in found.seconds.items()}
        trainer.settings = replace(trainer.settings, threads=found.threads)
        run.manifest = {**run.manifest, "threads": found.threads, "seconds_a_step_by_threads": each}
        files.write_json(run.path / "manifest.json", run.manifest)
        run.config = {**run.config, "training": {**run.config["training"], "threads": found.threads}}
        write_checked_toml(run.path / "config.toml", run.config)

    return begun


def resume(
    run: Run | str | Path,
    *,
    steps: int = 0,
    minutes: float = 0.0,
    data: Sequence[str] = (),
    engine: str = "",
    device: str = "",
    threads: int = 0,
    began: float | None = None,
) -> Run:
    """Continue a run exactly where it stopped; a finished one trains `steps` or `minutes` more, if given.

    `data` says where the training text is now, if it has moved. Gives the run, also where there is nothing to do.
    """
    began = began or time.time()
    run = run if isinstance(run, Run) else Run(run)
    if steps < 0 or minutes < 0 or (steps and minutes):
        raise UserError("Give --steps N or --minutes M, one of them, to train a finished run further.")
    with training_lock(run):
        files.sweep(run.path / "checkpoints", "state.json")
        trainer = reopened(run, data, engine=engine, device=device, threads=threads, began=began)
        found = trainer.load()
        state = trainer.state
        if state.finished and not (steps or minutes):
            say(
                f"{run.path} is finished (step {state.step}): nothing to resume."
                f" To train it further: quire resume {run.path} --minutes 5"
            )
            return run
        if (steps or minutes) and not state.finished:
            raise UserError(f"{run.path} is not finished (step {state.step}). Finish it first: quire resume {run.path}")
        trainer.journal.cut_back(state)
        if steps or minutes:
            say(f"{run.path} trains on from step {state.step}; the learning rate warms up again.")
            trainer.stretch(steps, minutes)
            trainer.save("last")
        elif found:
            say(f"{run.path} resumes at step {state.step}.")
        else:
            say(f"{run.path} was stopped before its first checkpoint and begins anew.")
        trainer.fit()
    return run


def verify(
    run: Run | str | Path, *, data: Sequence[str] = (), engine: str = "", device: str = "", threads: int = 0
) -> str | None:
    """Train a few steps twice from the last checkpoint, once through a stop; the first part that differs, or None.

    A finished run begins a new stretch for it, since the end of a schedule may move nothing. The run itself is left
    as it is.
    """
    run = run if isinstance(run, Run) else Run(run)
    first = reopened(run, data, engine=engine, device=device, threads=threads)

    def trainer() -> Trainer:
        again = Trainer(run, first.settings, first.tokens, first.device, time.time())
        again.load()
        if again.state.finished:
            again.stretch(VERIFIED_STEPS, 0.0)
        return again

    with tempfile.TemporaryDirectory() as folder:
        return first_difference(trainer, Path(folder) / "checkpoint", VERIFIED_STEPS)


def training_lock(run: Run) -> AbstractContextManager[None]:
    """Held by the one process that trains a run."""
    sentence = f"Another process is training {run.path}. Wait for it, or stop it with Ctrl-C there."
    return files.locked(run.path / ".lock", sentence)


def reopened(
    run: Run, data: Sequence[str] = (), *, engine: str = "", device: str = "", threads: int = 0, began: float = 0.0
) -> Trainer:
    """A trainer for a run that exists, its checkpoint not loaded; the text must be the one it began with."""
    if run.imported:
        raise UserError(
            f"{run.path} was imported: there is no training to resume. To train its model on a text:"
            f" quire finetune {run.path} {run.text_argument} --run NEW"
        )
    training = from_table(TrainingSettings, run.config.get("training", {}), "training")
    if engine == "manual" and training.compile == "yes":
        training = replace(training, compile="no")  # what was compiled under the other engine no longer is
    training = replace(
        training,
        engine=engine or training.engine,
        device=device or training.device,
        threads=threads or training.threads,
    )
    settings = Settings(from_table(DataSettings, run.config.get("data", {}), "data"), run.settings, training)
    where, _ = prepare_machine(training)
    tokens = find_data(run, settings, tuple(data))
    return Trainer(run, training, tokens, where, began or time.time())


# ---- what a run begins with ----


def prepare_machine(training: TrainingSettings) -> tuple[torch.device, int]:
    """The device and the number of threads; says when a card lies idle."""
    device = choose_device(training.device)
    if sentence := unused_card():
        say(sentence, "yellow")
    keep_freed_memory()
    return device, set_threads(training.threads)


def fitted(settings: Settings, prepared: Prepared) -> tuple[Settings, Prepared]:
    """The settings with the tokenizer's vocabulary, and a context no longer than the text; pairs looked through."""
    vocabulary, context = prepared.tokenizer.vocabulary_size, settings.model.context_length
    if settings.data.pairs:
        settings = settings.with_model(vocabulary_size=vocabulary, separator=prepared.tokenizer.separator)
        settings = replace(settings, model=settings.model.sized(len(prepared.training)))
        return settings, fitting_pairs(settings, prepared)
    predictions = len(prepared.training) - 1
    if predictions < SHORTEST_CONTEXT:
        raise UserError(f"The training text has {predictions} tokens; at least {SHORTEST_CONTEXT} are needed.")
    if predictions < context:
        context = 1 << (predictions.bit_length() - 1)
        say(
            f"The training text has {predictions} tokens, fewer than the context length"
            f" {settings.model.context_length}: the context is shortened to {context}."
        )
        curriculum = shortened(settings.training.curriculum, context)
        settings = replace(settings, training=replace(settings.training, curriculum=curriculum))
    training = settings.training
    Curriculum(training.curriculum, prepared.training, context, training.seed, prepared.ranges)  # refused before a run
    separator = prepared.tokenizer.separator
    settings = settings.with_model(vocabulary_size=vocabulary, context_length=context, separator=separator)
    return replace(settings, model=settings.model.sized(len(prepared.training))), prepared


def fitting_pairs(settings: Settings, prepared: Prepared) -> Prepared:
    """Prepared pairs with the count of what is predicted of them; says how many do not fit the context length."""
    shape, longer, kept = settings.model, [], []
    for tokens, what in ((prepared.training, "to train on"), (prepared.validation, "held out")):
        pairs = Pairs(tokens, shape.separator, shape.context_length, settings.training.seed, shape.reads_source)
        limit = f"the context length of {shape.context_length} tokens"
        if not pairs.examples():
            raise UserError(f"No pair {what} fits {limit}. Give a longer --model.context-length.")
        if pairs.left_out:
            longer.append(f"{pairs.left_out:,} of {pairs.left_out + pairs.examples():,} pairs {what}")
        kept.append(pairs)
    if longer:
        say(f"{' and '.join(longer)} do not fit {limit} and are left out. A longer --model.context-length takes them.")
    Curriculum(settings.training.curriculum, kept[0], shape.context_length, settings.training.seed, {})  # or refused
    report = {**prepared.report, "predictions": len(kept[0])}
    return replace(prepared, validation_bytes=kept[1].target_bytes(prepared.tokenizer), report=report)


def describe(settings: Settings, prepared: Prepared, origins: list[Table], device: torch.device) -> Table:
    """manifest.json: what a repetition of this run would need to know."""
    from importlib.metadata import version

    training = settings.training
    per_step = training.batch_size * training.accumulation_steps * settings.model.context_length
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {
            "quire": quire.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "safetensors")},
        },
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": training.threads,
        "world_size": 1,
        "tokens_per_rank": [per_step],
        "compile": training.compile,
        "seed": training.seed,
        "data": origins,
        "report": prepared.report,
        "ranges": prepared.ranges,
        "prepared": prepared.key,
        "left_out": sorted(prepared.left_out),
        "separators": prepared.report["training_documents"],
        "validation": {"bytes": prepared.validation_bytes, "chosen_as": prepared.report["held_out_as"]},
    }


def announce(run: Run, trainer: Trainer) -> None:
    """What is about to be trained, and for how long."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    state, shape = trainer.state, run.settings
    length = f"{state.end - state.start:,} steps" if state.end else f"{state.minutes:g} minutes"
    say(
        f"Training {run.path}: {shape.named} of {parameters:,} parameters, context {shape.context_length},"
        f" for {length} on {trainer.device} ({in_words(torch.get_num_threads())})."
    )
    if trainer.settings.curriculum:
        say(trainer.curriculum.sentence(state.stage))


# ---- names and places ----


def free_path(text: str) -> Path:
    """runs/NAME after a text, or NAME-2, NAME-3 ... where that is taken."""
    bare = "standard-input" if text == "-" else re.sub(r"[?#].*", "", text.rstrip("/\\"))
    stem = re.split(r"[/\\]", bare)[-1].split(".")[0] or Path(bare).resolve().name
    name = re.sub(r"[^\w-]+", "-", stem).strip("-") or "run"
    number = 1
    while (path := Path("runs") / (name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return path
