"""Training a run, from its text to its last checkpoint."""

import itertools
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import quire
from quire import files, processes
from quire.config import Table, write_checked_toml
from quire.data.elsewhere import is_index
from quire.data.pairs import Pairs
from quire.data.prepare import Prepared
from quire.data.shards import INDEX
from quire.data.tasks import TASKS
from quire.errors import UserError
from quire.progress import say
from quire.run import Run, refuse_existing
from quire.training.clock import read_decisions
from quire.training.curriculum import Curriculum, shortened
from quire.training.distributed import World, join
from quire.training.loop import Trainer
from quire.training.resume import reopened, resume, settings_of, training_lock
from quire.training.settings import LENGTHS, Settings, TrainingSettings
from quire.training.texts import STANDARD_INPUT, given_text, load_data
from quire.training.threads import find_threads, in_words, prepare_machine

SHORTEST_CONTEXT = 8
BEGUN = "begun"  # the name under which the processes of a launch learn what the leading one has begun


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

    A text that is `loaded` already, with these very settings, is not read again. Under torchrun the leading process
    makes the run, and all train it; where torchrun has started them again, they go on with the run that they began.
    """
    began = began or time.time()
    check_length(settings.training)
    check_pairs(settings)
    world = join(settings.training.timeout)
    if not world.leads:
        return trained_along(world.follow(BEGUN), began)
    with world.leading(BEGUN) as told:
        if before := begun_before(settings, path):
            told["result"] = f"resume {before}"
        else:
            run, training, prepared, device, begin, keep = new_run(settings, path, loaded)
            told["result"] = f"train {run.path}"
    if before:
        return resume(before, began=began)
    return train_created(run, training, prepared, device, began, begin, keep)


def new_run(
    settings: Settings, path: Path | None, loaded: Loaded | None
) -> tuple[Run, TrainingSettings, Prepared, torch.device, Callable[[Trainer], None], bool]:
    """Make a run; gives it, and what `train_created` wants to know."""
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
    settings = replace(settings, training=replace(settings.training, threads=threads * processes.local_size()))
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
    begin = begun_with_threads(Trainer.begin) if measure and processes.world_size() == 1 else Trainer.begin
    return created, settings.training, prepared, device, begin, piped is not None


def begun_before(settings: Settings, path: Path | None) -> Path | None:
    """The run that this launch began before torchrun started its processes again, or None."""
    if not processes.restarted():
        return None
    named = given_text(settings)[0].data.named if path is None else ()
    for place in [path] if path else names_after(named[0]):
        if not place.exists():
            break
        manifest = place / "manifest.json"
        if manifest.is_file() and files.read_json(manifest).get("launch") == processes.launch():
            if (place / "config.toml").is_file():
                return place
            files.remove(place)  # killed before it was a run
            break
    return None


def trained_along(told: str, began: float, begin: Callable[[Trainer], object] = Trainer.begin) -> Run:
    """Train the run that the leading process has begun, and `begin`s with too."""
    how, _, path = told.partition(" ")
    if how == "resume":
        return resume(path, began=began)
    run = Run(path)
    with join(settings_of(run).timeout).explained():
        trainer = reopened(run, began=began, looked_at=processes.beside_leader())
        begin(trainer)
        trainer.fit()
    return run


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
        with join(training.timeout).explained(), training_lock(run):
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


# ---- what a run begins with ----


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
    rows, size = training.batch_size * training.accumulation_steps, processes.world_size()
    shares = [World(rank, size).share(rows) for rank in range(size)]
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
        "world_size": processes.world_size(),
        "tokens_per_rank": [len(range(rows)[share]) * settings.model.context_length for share in shares],
        **({"launch": processes.launch()} if processes.launched() else {}),
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
    size, whole = trainer.world.size, "each a part of the model" if trainer.sharded else "each a copy of the model"
    together = f" in each of {size} processes, {whole}" if size > 1 else ""
    length = f"{state.end - state.start:,} steps" if state.end else f"{state.minutes:g} minutes"
    say(
        f"Training {run.path}: {shape.named} of {parameters:,} parameters, context {shape.context_length},"
        f" for {length} on {trainer.device} ({in_words(torch.get_num_threads())}){together}."
    )
    if size > 1 and getattr(shape, "dropout", 0.0) > 0:
        say("Each process drops out other parts: with dropout, curves differ with the number of processes.")
    if trainer.settings.curriculum:
        say(trainer.curriculum.sentence(state.stage))


# ---- names and places ----


def free_path(text: str) -> Path:
    """runs/NAME after a text, or NAME-2, NAME-3 ... where that is taken."""
    return next(path for path in names_after(text) if not path.exists())


def names_after(text: str) -> Iterator[Path]:
    """runs/NAME after a text, then NAME-2, NAME-3 ... without an end."""
    named = text.removesuffix(INDEX) if is_index(text) else text  # a prepared text is called as its folder is
    bare = "standard-input" if text == "-" else re.sub(r"[?#].*", "", named.rstrip("/\\"))
    stem = re.split(r"[/\\]", bare)[-1].split(".")[0] or Path(bare).resolve().name
    name = re.sub(r"[^\w-]+", "-", stem).strip("-") or "run"
    return (Path("runs") / (name if number == 1 else f"{name}-{number}") for number in itertools.count(1))
