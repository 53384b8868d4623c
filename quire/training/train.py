"""A new run from its settings: its text read and prepared, its context fitted to that, its manifest."""

import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import quire
from quire import processes
from quire.config import Table
from quire.data.pairs import Pairs
from quire.data.prepare import Prepared
from quire.data.tasks import TASKS
from quire.errors import UserError
from quire.progress import say
from quire.run import Run, refuse_existing
from quire.training.begin import NewRun, free_path
from quire.training.clock import read_decisions
from quire.training.curriculum import Curriculum, shortened
from quire.training.distributed import world_table
from quire.training.settings import LENGTHS, Settings, TrainingSettings
from quire.training.texts import STANDARD_INPUT, given_text, load_data
from quire.training.threads import prepare_machine

SHORTEST_CONTEXT = 8


@dataclass(frozen=True)
class Loaded:
    """A text that was read and prepared before its run begins, as a plan does; `piped` is that of standard input."""

    prepared: Prepared
    origins: list[Table]
    piped: bytes | None = None


def new_run(settings: Settings, path: Path | None, loaded: Loaded | None = None) -> NewRun:
    """Make a run of finished settings; a text that is `loaded` already, with these very settings, is not read again."""
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
    return NewRun(created, settings.training, prepared.training, device, measure, keep=piped is not None)


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
        **world_table(training, settings.model, processes.world_size()),
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
