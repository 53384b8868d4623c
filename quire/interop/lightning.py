"""Lightning: any Quire model as a LightningModule, a text as its DataModule, checkpoints to runs and back.

    from quire.interop.lightning import GPT2, TextData, Trainer, generate

    model, data = GPT2(max_len=256, warmup_steps=100), TextData("book.txt", batch_size=4)
    Trainer(max_steps=1000, accumulate_grad_batches=10).fit(model, data)
    print(generate(model, prompt="The ", max_new_tokens=100))

The model, its optimizer, its schedule and the order of its data are Quire's; the loop, the devices, the processes and
the checkpoints are Lightning's. Needs the package lightning.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from quire import checkpoint
from quire.config import from_table
from quire.devices import unused_card
from quire.errors import UserError
from quire.generation.generate import GenerationSettings, Writer
from quire.run import Run
from quire.tokenizers import Tokenizer
from quire.training.loop import LINE_STEPS
from quire.training.settings import LENGTHS, TrainingSettings

try:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
    from lightning.pytorch.utilities.exceptions import MisconfigurationException
except ImportError as error:
    raise UserError('quire.interop.lightning needs the package lightning: pip install "quire[lightning]".') from error

from quire.interop.lightning_data import TextData
from quire.interop.lightning_module import GPT2, LanguageModel
from quire.interop.lightning_runs import Kept, Unsaved, settled_tokenizer, to_run

__all__ = ["GPT2", "LanguageModel", "TextData", "Trainer", "from_run", "generate", "to_run"]

SHARES = 10  # of a training, at most, after each of which it is measured and saved
FEWEST_STEPS = 10  # in each of them


class Trainer(pl.Trainer):
    """Lightning's Trainer, with all of its arguments; what Lightning refuses at its construction is a UserError.

    Without arguments that say otherwise a training of max_steps is measured and saved ten times (one of fewer than 100
    steps less often), the last time at its end, and a line is logged every 10 steps.
    """

    def __init__(self, **arguments: Any) -> None:
        if str(arguments.get("strategy")).lower() == "dp":
            raise UserError(
                'Lightning has dropped the strategy "dp" (since 2.0). Take strategy="ddp": one process for each device,'
                " the same batches."
            )
        arguments = with_defaults(arguments)
        try:
            super().__init__(**arguments)
        except (ValueError, TypeError, MisconfigurationException) as error:
            sentence = f"Lightning's Trainer: {str(error).rstrip('.!')}."
            if DEVICES.search(sentence):
                without = 'Without a GPU take accelerator="cpu", with devices=N for N processes.'
                sentence = f"{sentence} {unused_card() or without}"
            raise UserError(sentence) from error


DEVICES = re.compile("accelerator|device|gpu", re.IGNORECASE)


def with_defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a Trainer, and those that they leave open."""
    if arguments.get("barebones") or arguments.get("fast_dev_run"):
        return arguments  # neither measures, saves or logs
    found = {"log_every_n_steps": LINE_STEPS, **arguments}
    steps, accumulated = (whole(arguments.get(name, default), name) for name, default in COUNTS.items())
    if steps < 1:
        return found
    stretch = -(-steps // max(1, min(SHARES, steps // FEWEST_STEPS)))
    callbacks = arguments.get("callbacks") or []
    callbacks = list(callbacks) if isinstance(callbacks, (list, tuple)) else [callbacks]
    if not {"val_check_interval", "check_val_every_n_epoch"} & set(arguments):
        found |= {"val_check_interval": stretch * accumulated, "check_val_every_n_epoch": None}
        callbacks.append(MeasuredLast())
    if arguments.get("enable_checkpointing", True) and not any(isinstance(each, Checkpoint) for each in callbacks):
        callbacks.append(SavedLast(every_n_train_steps=stretch))
    return {**found, "callbacks": callbacks}


COUNTS = {"max_steps": -1, "accumulate_grad_batches": 1}


def whole(number: Any, name: str) -> int:
    """A number of steps or batches."""
    if not isinstance(number, int):
        raise UserError(f"Lightning's Trainer: {name} is a whole number, not {number!r}.")
    return number


class MeasuredLast(pl.Callback):
    """The held-out text is measured after the last step too."""

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        """Lightning measures where a training is to stop; this one stops here anyhow."""
        trainer.should_stop = trainer.should_stop or trainer.global_step == trainer.max_steps


class SavedLast(ModelCheckpoint):
    """A checkpoint after every so many steps, and after the last one."""

    def on_train_batch_end(self, trainer: pl.Trainer, *rest: Any) -> None:
        """Save where neither has been done at this step."""
        super().on_train_batch_end(trainer, *rest)
        if trainer.global_step == trainer.max_steps != self._last_global_step_saved:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))


def generate(
    model: LanguageModel,
    prompt: str = "",
    max_new_tokens: int = GenerationSettings.tokens,
    temperature: float = GenerationSettings.temperature,
    tokenizer: Tokenizer | str | Path | None = None,
    **settings: Any,
) -> str:
    """The text that a model writes after `prompt`, at most so many tokens of it; at temperature 0 always the likeliest.

    The tokenizer is that of the TextData it was trained on, or GPT-2's for a vocabulary of 50,257, or the one named.
    `settings` are further fields of GenerationSettings, such as top_k, top_p, seed and stop.
    """
    kept, network = model.kept, model.model
    run = Unsaved(model.settings, settled_tokenizer(model.settings, kept, tokenizer), kept)
    training = network.training
    network.eval()
    try:
        wanted = GenerationSettings(tokens=max_new_tokens, temperature=temperature, **settings)
        return Writer(run, model.device, network).write([prompt], wanted)[0].text
    finally:
        network.train(training)


def from_run(run: Run | str | Path) -> LanguageModel:
    """The best model of a run, to be trained by Lightning; it knows the run's tokenizer and held-out text.

    Its settings are the run's but for the length of the training, a curriculum and the engine, which are Lightning's.
    """
    run = run if isinstance(run, Run) else Run(run)
    table = {**run.config.get("training", {}), **dict.fromkeys(LENGTHS, 0)}
    training = from_table(TrainingSettings, table, "training")
    training = replace(training, curriculum=(), engine="autograd")
    module, best = LanguageModel(run.settings, training), run.model("cpu")
    checkpoint.load_model_tensors(module.model, checkpoint.model_tensors(best), run.path)
    if hasattr(best, "counts"):
        module.model.counts = best.counts
    module.kept = Kept.of_run(run)
    return module
