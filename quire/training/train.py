"""Training a run: from its text to its last checkpoint, resumed, continued, and proven exact."""

import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import quire
from quire import files
from quire.config import Table, from_table
from quire.data.prepare import Prepared, prepare
from quire.data.reading import DataSettings, read
from quire.devices import choose_device, set_threads, unused_card
from quire.errors import UserError
from quire.progress import bar, say
from quire.run import Run
from quire.training.loop import Trainer
from quire.training.settings import LENGTHS, Settings, TrainingSettings, layered, typed
from quire.training.verify import first_difference

DEFAULT_CORPUS = "shakespeare"
STANDARD_INPUT = "standard-input.txt"  # where a run keeps text that came by a pipe
SHORTEST_CONTEXT = 8
VERIFIED_STEPS = 6


def train(
    *texts: str,
    run: str | Path | None = None,
    preset: str = "default",
    model: Table | None = None,
    data: Table | None = None,
    **training: Any,
) -> Run:
    """Train a model on `texts` (files, folders, globs, addresses, corpus names; none: the built-in corpus).

    `model`, `data` and the other keywords are fields of the preset's model settings, DataSettings and
    TrainingSettings, over those of the preset: `quire.train("book.txt", minutes=5, model={"layers": 6})`.
    """
    flags = {
        "model": model or {},
        "data": {**(data or {}), **({"text": list(texts)} if texts else {})},
        "training": training,
    }
    return train_run(typed(layered(preset, flags=flags)), Path(run) if run is not None else None)


def train_run(settings: Settings, path: Path | None = None, began: float | None = None) -> Run:
    """Train a new run with finished settings; `began` is time.time() at the command's start, for --minutes."""
    began = began or time.time()
    if not any(getattr(settings.training, name) for name in LENGTHS):
        raise UserError("Say how long to train: --minutes M, --steps N, --epochs N or --tokens N.")
    texts = settings.data.text or (DEFAULT_CORPUS,)
    path = path or free_path(texts[0])
    refuse_existing(path)
    piped = sys.stdin.buffer.read() if "-" in texts else None
    settings = replace(settings, data=replace(settings.data, text=texts))
    device, threads = prepare_machine(settings.training)
    settings = replace(settings, training=replace(settings.training, threads=threads))
    prepared, origins = load_data(settings, piped)
    say(f"{', '.join(texts[:3])}: {prepared}")
    settings = fitted(settings, prepared)
    manifest = describe(settings, prepared, origins, device)
    created = Run.create(path, settings.tables(), prepared.tokenizer, manifest, prepared.validation)
    if piped is not None:
        files.write_bytes(path / "data" / STANDARD_INPUT, piped)
    if settings.training.decisions:
        files.write_bytes(path / "decisions.jsonl", Path(settings.training.decisions).read_bytes())
    trainer = Trainer(created, settings.training, prepared.training, device, began)
    trainer.begin()
    announce(created, trainer)
    return fit(created, trainer)


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
    trainer, found = reopen(run, data, engine=engine, device=device, threads=threads, began=began)
    state = trainer.state
    if state.finished and not (steps or minutes):
        say(
            f"{run.path} is finished (step {state.step}): nothing to resume."
            f" To train it further: quire resume {run.path} --minutes 5"
        )
        return run
    if steps or minutes:
        if not state.finished:
            raise UserError(f"{run.path} is not finished (step {state.step}). Finish it first: quire resume {run.path}")
        trainer.stretch(steps, minutes)
        say(f"{run.path} trains on from step {state.step}; the learning rate warms up again.")
    elif found:
        say(f"{run.path} resumes at step {state.step}.")
    else:
        say(f"{run.path} was stopped before its first checkpoint and begins anew.")
    return fit(run, trainer, save_first=bool(steps or minutes))


def verify(run: Run | str | Path, *, data: Sequence[str] = ()) -> str | None:
    """Train a few steps twice from the last checkpoint, once through a stop; the first part that differs, or None.

    The run itself is left as it is.
    """
    run = run if isinstance(run, Run) else Run(run)
    with tempfile.TemporaryDirectory() as folder:
        opened: list[Any] = []

        def trainer() -> Trainer:
            if not opened:
                opened.append(reopen(run, data)[0])
                return opened[0]
            first = opened[0]
            again = Trainer(run, first.settings, first.batches.tokens, first.device, time.time())
            again.load()
            return again

        return first_difference(trainer, Path(folder) / "checkpoint", VERIFIED_STEPS)


def fit(run: Run, trainer: Trainer, save_first: bool = False) -> Run:
    """Train under the run's lock; leftovers of a kill are swept first."""
    sentence = f"Another process is training {run.path}. Wait for it, or stop it with Ctrl-C there."
    with files.locked(run.path / ".lock", sentence):
        files.sweep(run.path / "checkpoints", "state.json")
        trainer.cut_back_logs()
        if save_first:
            trainer.save("last")
        trainer.fit()
    return run


def reopen(
    run: Run, data: Sequence[str] = (), *, engine: str = "", device: str = "", threads: int = 0, began: float = 0.0
) -> tuple[Trainer, bool]:
    """A trainer at the run's last checkpoint, and whether there was one; the text must be the one it began with."""
    training = from_table(TrainingSettings, run.config.get("training", {}), "training")
    training = replace(
        training,
        engine=engine or training.engine,
        device=device or training.device,
        threads=threads or training.threads,
    )
    settings = Settings(from_table(DataSettings, run.config.get("data", {}), "data"), run.settings, training)
    where, _ = prepare_machine(training)
    tokens = find_data(run, settings, tuple(data))
    trainer = Trainer(run, training, tokens, where, began or time.time())
    return trainer, trainer.load()


# ---- what a run begins with ----


def prepare_machine(training: TrainingSettings) -> tuple[torch.device, int]:
    """The device and the number of threads; says when a card lies idle."""
    device = choose_device(training.device)
    if sentence := unused_card():
        say(sentence, "yellow")
    return device, set_threads(training.threads)


def load_data(settings: Settings, piped: bytes | None = None) -> tuple[Prepared, list[Table]]:
    """The prepared text, and where it came from."""
    with bar("reading") as show:

        def on_bytes(done: int, total: int | None) -> None:
            show(done / total if total else 0.0, megabytes=f"{done / 1e6:.1f}")

        corpus = read(settings.data.text, settings.data, on_bytes, piped)
        held_out = read([settings.data.validation], settings.data, on_bytes) if settings.data.validation else None
    for sentence in corpus.attributions:
        say(sentence, "dim")
    if corpus.skipped:
        named = "; ".join(f"{path} {why}" for path, why in corpus.skipped[:5])
        say(f"Skipped {len(corpus.skipped)}: {named}{'; ...' if len(corpus.skipped) > 5 else ''}")
    return prepare(corpus, settings.data, settings.training.tokenizer, held_out), corpus.origins


def fitted(settings: Settings, prepared: Prepared) -> Settings:
    """The settings with the tokenizer's vocabulary, and a context no longer than the text."""
    vocabulary, context = prepared.tokenizer.vocabulary_size, settings.model.context_length
    predictions = len(prepared.training) - 1
    if predictions < SHORTEST_CONTEXT:
        raise UserError(f"The training text has {predictions} tokens; at least {SHORTEST_CONTEXT} are needed.")
    if predictions < context:
        context = 1 << (predictions.bit_length() - 1)
        say(
            f"The training text has {predictions} tokens, fewer than the context length"
            f" {settings.model.context_length}: the context is shortened to {context}."
        )
    return settings.with_model(vocabulary_size=vocabulary, context_length=context)


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
        "separators": prepared.report["training_documents"],
        "validation": {"bytes": prepared.validation_bytes, "chosen_as": prepared.report["held_out_as"]},
    }


def announce(run: Run, trainer: Trainer) -> None:
    """What is about to be trained, and for how long."""
    parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
    state, shape = trainer.state, run.settings
    length = f"{state.end - state.start:,} steps" if state.end else f"{state.minutes:g} minutes"
    say(
        f"Training {run.path}: a {shape.kind} of {parameters:,} parameters, context {shape.context_length},"
        f" for {length} on {trainer.device} ({torch.get_num_threads()} threads)."
    )


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


def refuse_existing(path: Path) -> None:
    """A run is never overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already. Name another --run, or go on with it: quire resume {path}")


def find_data(run: Run, settings: Settings, moved: tuple[str, ...]) -> np.ndarray:
    """The run's training tokens, from the text it began with; another text is refused."""
    kept = run.path / "data" / STANDARD_INPUT
    data = replace(settings.data, text=moved or settings.data.text)
    where = f"Say where the text is now: quire resume {run.path} --data PATH"
    try:
        prepared, origins = load_data(replace(settings, data=data), kept.read_bytes() if kept.exists() else None)
    except UserError as error:
        raise UserError(f"The training text of {run.path} cannot be read: {error} {where}") from error
    before, now = ([origin["sha256"] for origin in found] for found in (run.manifest["data"], origins))
    if before != now:
        changed = next(
            (new["path"] for old, new in zip(before, origins, strict=False) if old != new["sha256"]), data.text[0]
        )
        raise UserError(f"{changed} is not the text that {run.path} began with: its contents differ. {where}")
    if prepared.tokenizer.to_table() != run.tokenizer.to_table():
        raise UserError(f"The tokenizer of {run.path} is not the one its text gives: tokenizer.json was exchanged.")
    return prepared.training
