"""Lightning: any Quire model as a LightningModule, a text as its DataModule, checkpoints to runs and back.

    from quire.interop.lightning import GPT2, TextData, Trainer, generate

    model, data = GPT2(max_len=256), TextData("book.txt", batch_size=4)
    Trainer(max_steps=1000, accumulate_grad_batches=10).fit(model, data)
    print(generate(model, prompt="The ", max_new_tokens=100))

The model, its optimizer, its schedule and the order of its data are Quire's; the loop, the devices, the processes and
the checkpoints are Lightning's. Needs the package lightning.
"""

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

SHARES = 10  # of a training of so many steps, at most, after each of which it is measured and saved
FEWEST_STEPS = 10  # in each of them


class Trainer(pl.Trainer):
    """Lightning's Trainer, with all of its arguments; what Lightning refuses at its construction is a UserError.

    Without arguments that say otherwise a training of max_steps is measured and saved about ten times, the last time at
    its end, and a line is logged every 10 steps.
    """

    def __init__(self, **arguments: Any) -> None:
        if str(arguments.get("strategy")).lower() == "dp":
            raise UserError(
                'Lightning has dropped the strategy "dp" (since 2.0). Take strategy="ddp": one process for each device,'
                " the same batches."
            )
        try:
            super().__init__(**with_defaults(arguments))
        except MisconfigurationException as error:
            card = unused_card() or 'Without a GPU take accelerator="cpu", with devices=N for N processes.'
            raise UserError(f"Lightning's Trainer: {error} {card}") from error


def with_defaults(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a Trainer, and those that they leave open."""
    if arguments.get("barebones") or arguments.get("fast_dev_run"):
        return arguments  # neither measures, saves or logs
    defaults: dict[str, Any] = {"log_every_n_steps": LINE_STEPS}
    if (steps := arguments.get("max_steps", -1)) > 0:
        most = max(1, min(SHARES, steps // FEWEST_STEPS))
        stretch = steps // max(count for count in range(1, most + 1) if steps % count == 0)
        if not {"val_check_interval", "check_val_every_n_epoch"} & set(arguments):
            batches = stretch * arguments.get("accumulate_grad_batches", 1)
            defaults |= {"val_check_interval": batches, "check_val_every_n_epoch": None}
        callbacks = arguments.get("callbacks") or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if arguments.get("enable_checkpointing", True) and not any(isinstance(each, Checkpoint) for each in callbacks):
            arguments = {**arguments, "callbacks": [*callbacks, ModelCheckpoint(every_n_train_steps=stretch)]}
    return {**defaults, **arguments}


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
