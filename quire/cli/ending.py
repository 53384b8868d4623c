"""What train and resume show at the end: the figures, a sample, the verdict, and the next commands to try."""

import shlex
import statistics

from quire import processes
from quire.cli.flags import print_json, program
from quire.evaluation.translations import shown
from quire.generation.generate import GenerationSettings, Writer
from quire.progress import say
from quire.run import Run
from quire.training.journal import sample_of
from quire.training.settings import TrainingSettings
from quire.training.verdict import verdict


def show_ending(run: Run, as_json: bool) -> int:
    """The end of a training, for a person or (--json) for a program; of several processes one shows it."""
    if not processes.leads():
        return 0
    metrics = run.metrics()
    evaluated = [row for row in metrics if row.get("validation_loss") is not None]
    best, last = min(evaluated, key=lambda row: row["validation_loss"]), metrics[-1]
    loss, bits = best["validation_loss"], best["validation_bits_per_byte"]
    seconds = last["seconds"]
    before = {}  # of a fine-tuning: the model that it began with, on the same text
    if "finetuned_from" in run.manifest:
        before = {"before": {"validation_loss": evaluated[0]["validation_loss"],
                             "bits_per_byte": evaluated[0]["validation_bits_per_byte"]}}  # fmt: skip
    if as_json:
        figures = {"run": str(run.path), "steps": last["step"], "tokens": last["tokens"], "seconds": seconds}
        print_json({**figures, "validation_loss": loss, "bits_per_byte": bits, **before})
        return 0
    if length := run.config["training"].get("sample_tokens", TrainingSettings.sample_tokens):
        sample = sample_of(run, best["step"])
        if sample is None:
            writer = Writer(run)
            if run.pairs:
                sample = shown(writer, run.in_pairs(run.validation_tokens()))
            else:
                sample = writer.write([""], GenerationSettings(tokens=length, temperature=0.8))[0].text
        say(f"\nThe model writes:\n\n{sample}\n")
    rate = statistics.median(row["tokens_per_second"] or 0 for row in metrics)
    say(f"Trained {last['step']:,} steps on {last['tokens']:,} tokens in {seconds:.0f} s, at {rate:,.0f} tokens/s.")
    say(f"Validation loss {loss:.4f} nats per token, {bits:.4f} bits per byte (best, at step {best['step']}).", "bold")
    name, path = program(), shlex.quote(str(run.path))
    if before:
        was = before["before"]["bits_per_byte"]
        say(f"Before fine-tuning {run.manifest['finetuned_from']}: {was:.4f} bits per byte on the same text.", "bold")
    report = run.manifest["report"]
    epochs = last["tokens"] / max(
        1, report.get("predictions") or report["tokens"] - run.manifest["validation"]["tokens"]
    )
    say(verdict(metrics, epochs, f"{name} resume {path}", mixed=run.settings.kind == "ngram"))
    plot = run.path / "loss.png"
    say(f"Loss plot: {plot if plot.exists() else f'{name} plot {path}'}\n")
    translations = " --translations" if run.pairs else ""
    next_commands = {
        f"{name} generate {path}": "ask it to write",
        f"{name} evaluate {path}{translations}": "its figures again, or on another text",
        f"{name} resume {path} --minutes 5": "train it further",
        f"{name} train YOUR.txt --minutes 5": "a model of your own text",
    }
    width = max(map(len, next_commands))
    say("Next:  " + "\n       ".join(f"{command:{width}}   {what}" for command, what in next_commands.items()))
    return 0
