"""Fine-tuning: the weights of a run, trained on other text in a new run.

Only the weights are taken, with the tokenizer that they belong to. Optimizer, schedule and data begin anew, at a
gentler learning rate. The model is measured on the new held-out text before its first step: that is the line of step 0
in metrics.jsonl, and the first `best` checkpoint, so that a fine-tuning never ends worse than it began.
"""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quire import checkpoint, processes
from quire.config import Table, merged
from quire.data.reading import DataSettings
from quire.data.vocabulary import Policy
from quire.errors import UserError
from quire.progress import say
from quire.run import Run, refuse_existing
from quire.training.begin import NewRun, begin_run, free_path
from quire.training.loop import Trainer
from quire.training.settings import LENGTHS, Settings, typed
from quire.training.texts import is_prepared, open_text
from quire.training.threads import prepare_machine
from quire.training.train import check_length, check_pairs, describe, fitting_pairs

GENTLER = 0.25  # of the run's own learning rates
LONGEST = 512  # tokens: the context of a fine-tuning from an imported model, where nothing else is said
KEPT = ("prompt_prefix", "start_token", "licence", "attribution", "chat_template")  # in the manifest of imported models


def finetune(
    base: Run | str | Path,
    *texts: str,
    run: str | Path | None = None,
    unknown: Policy = "error",
    context_length: int = 0,
    data: Table | None = None,
    **training: Any,
) -> Run:
    """Train the model of the run `base` on `texts`, in a new run.

    What its vocabulary lacks is an error, is left out ("skip"), gets a stand-in ("replace"), or becomes new tokens
    ("grow") whose rows of weights begin as the mean of all. The new run reads `context_length` tokens at once; 0: as
    many as the base, but of a model imported with a longer context LONGEST. `data` and the other keywords are fields
    of DataSettings and TrainingSettings: `quire.finetune("runs/book", "letters.txt", minutes=2)`.
    """
    base = base if isinstance(base, Run) else Run(base)
    flags = {"data": {**(data or {}), "text": list(texts), "unknown": unknown}, "training": training}
    settings = typed(merged(inherited(base), flags))
    return finetune_run(base, settings, Path(run) if run is not None else None, context_length=context_length)


def inherited(base: Run) -> Table:
    """The settings that a fine-tuning starts from: the run's own, without its text and its length, and gentler."""
    table = {name: dict(part) for name, part in base.config.items()}
    training = table.setdefault("training", {})
    training |= {**dict.fromkeys(LENGTHS, 0), "decisions": "", "curriculum": [], "tokenizer": str(base.path)}
    for name in ("learning_rate", "matrix_learning_rate", "table_learning_rate"):
        if name in training:
            training[name] *= GENTLER
    table.setdefault("data", {}).update(text=[], pairs="", validation="", unknown="error")
    return table


def finetune_run(
    base: Run, settings: Settings, path: Path | None = None, began: float | None = None, context_length: int = 0
) -> Run:
    """Fine-tune with finished settings; `began` is time.time() at the command's start, for --minutes.

    The new run reads `context_length` tokens at once; 0: as many as the base, but see LONGEST.
    """
    began = began or time.time()
    texts = settings.data.named
    if not texts:
        what = "--pairs FILE" if base.settings.reads_source else "TEXT"
        own = "" if base.imported else f" To train further on the run's own text: quire resume {base.path} --minutes 5"
        raise UserError(f"Name the {what} to fine-tune on.{own}")
    check_pairs(settings)
    if "-" in texts:
        raise UserError("Fine-tuning reads no standard input. Write the text to a file, and name that.")
    check_length(settings.training)
    if settings.training.tokenizer != str(base.path):
        raise UserError("Fine-tuning keeps the run's own tokenizer: leave --tokenizer out.")
    weights = checkpoint.load(base.trained_folder(), training=False).model

    def begin(trainer: Trainer) -> None:
        put_weights(trainer.model, weights, base.settings.vocabulary_size)
        trainer.begin()
        measure_start(trainer)

    return begin_run(lambda: new_run(base, settings, path, context_length), settings, path, began, begin)


def new_run(base: Run, settings: Settings, path: Path | None, context_length: int) -> NewRun:
    """Make the run of a fine-tuning."""
    texts, further = settings.data.named, f"quire resume {base.path} --minutes 5"
    context_length = context_of(base, context_length)
    path = path or free_path(texts[0])
    refuse_existing(path)
    measure = settings.training.threads == 0
    device, threads = prepare_machine(settings.training)
    if is_prepared(settings.data):  # how the run's own text was read is of no concern to it
        kept = ("text", "pairs", "validation", "unknown", "cache_gigabytes")
        settings = replace(settings, data=DataSettings(**{name: getattr(settings.data, name) for name in kept}))
    text = open_text(settings)
    try:
        if [origin["sha256"] for origin in text.origins] == [origin["sha256"] for origin in base.manifest["data"]]:
            raise UserError(f"That is the text {base.path} was trained on. To train on it further: {further}")
        _, prepared = text.prepared(settings)
    finally:
        text.close()
    say(f"{', '.join(texts[:3])}: {prepared}")
    settings = Settings(
        settings.data,
        replace(base.settings, vocabulary_size=prepared.tokenizer.vocabulary_size, context_length=context_length),
        replace(settings.training, threads=threads * processes.local_size()),
    )
    if settings.data.pairs:
        prepared = fitting_pairs(settings, prepared)
    manifest = describe(settings, prepared, text.origins, device)
    manifest |= {"finetuned_from": str(base.path), "separators": manifest["separators"] + base.manifest["separators"]}
    manifest |= {name: base.manifest[name] for name in KEPT if name in base.manifest}
    counts = settings.model.count(prepared.training)
    created = Run.create(
        path, settings.tables(), prepared.tokenizer, manifest, prepared.validation[:], {}, counts=counts
    )
    return NewRun(created, settings.training, prepared.training, device, measure)


def context_of(base: Run, wanted: int) -> int:
    """How many tokens the new run reads at once."""
    own = base.settings.context_length
    if not 0 <= wanted <= own or wanted == 1:
        raise UserError(f"--context-length must be between 2 and that of {base.path}, {own}, not {wanted}.")
    if wanted or not base.imported or own <= LONGEST:
        return wanted or own
    say(
        f"The new run reads {LONGEST} tokens at once, not {own:,} as {base.path}: that takes less memory and time."
        f" To keep them all: --context-length {own}"
    )
    return LONGEST


def measure_start(trainer: Trainer) -> None:
    """Measure the weights before their first step: the best so far, and a checkpoint."""
    state = trainer.state
    trainer.save("last")  # so that a resume begins with these weights
    state.best_loss, bits = trainer.held_out_loss(trainer.measured())
    trainer.journal.first_line(state, state.best_loss, bits, time.time() - trainer.began)
    say(f"Before training: {state.best_loss:.4f} nats per token, {bits:.4f} bits per byte on the held-out text.")
    trainer.save("best")
    trainer.save("last")


def put_weights(model: Any, weights: dict[str, Tensor], known: int) -> None:
    """Copy `weights` into the model; the rows of tokens beyond the first `known` become the mean of those.

    Of learned positions those stay that the model has.
    """
    own = checkpoint.model_tensors(model)
    grown = {}
    for name, tensor in weights.items():
        if name == "positions.weight":
            grown[name] = tensor[: len(own[name])]
            continue
        if name == "ngram_embedding.weight":
            grown[name] = model.ngram_embedding.grown(tensor, known)
            continue
        more = own[name].shape[0] - known if tensor.dim() and len(tensor) == known else 0
        mean = tensor.mean(0, keepdim=True).expand(more, *tensor.shape[1:])
        grown[name] = torch.cat((tensor, mean)) if more else tensor
    checkpoint.load_model_tensors(model, grown, "The run to fine-tune")
