"""What a training writes down as it goes: metrics.jsonl, samples.md and loss.png."""

import json
import math
import re
import time
from typing import Any

import torch

from quire import files, processes
from quire.data.pairs import Examples, Pairs
from quire.devices import out_of_memory, peak_memory
from quire.evaluation.translations import shown
from quire.generation.generate import GenerationSettings, Writer
from quire.plots.loss import plot_losses
from quire.progress import Update, say
from quire.run import Run
from quire.training.curves import curve
from quire.training.settings import TrainingSettings
from quire.training.state import TrainingState

SAMPLE = re.compile(r"held-out loss .*\n\n(`{3,})text\n(.*?)\n\1\n", re.DOTALL)
PLOT_SECONDS = 30.0  # between two plots; a shorter training has none, since the first takes a second or two
SAMPLE_RATE = 2  # tokens of a sample at most for each second of --minutes


class Journal:
    """The logs of a run being trained. The state it is given knows their sizes, so that a resume can cut them back."""

    def __init__(self, run: Run, settings: TrainingSettings, device: torch.device, writes: bool = True) -> None:
        """`writes` is False in all processes of a training but one."""
        self.run, self.settings, self.device, self.writes = run, settings, device, writes
        self.alone = settings.parallel == "ddp" or processes.world_size() == 1  # with a model of its own
        self.logged = (0, 0.0)  # tokens and time at the last line of metrics.jsonl, or where training went on
        self.plotted = time.monotonic()

    def line(
        self,
        state: TrainingState,
        seconds: float,
        rate: float,
        gradient_norm: float,
        show: Update | None = None,
        **measured: float,
    ) -> None:
        """A line of metrics.jsonl at `seconds` since the command began: the training loss is the mean since the line
        before."""
        tokens, passed = state.tokens - self.logged[0], seconds - self.logged[1]
        line = {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "train_loss": state.loss_sum / state.loss_steps if state.loss_steps else None,
            **measured,
            "learning_rate": rate,
            "gradient_norm": gradient_norm if math.isfinite(gradient_norm) else None,
            "tokens_per_second": round(tokens / passed) if passed else None,
            "memory_bytes": peak_memory(self.device),
        }
        self.append(state, "metrics.jsonl", json.dumps(line))
        state.loss_sum, state.loss_steps = 0.0, 0
        self.logged = (state.tokens, seconds)
        if show is not None and line["train_loss"] is not None:
            best = {} if state.best_loss is None else {"held_out": f"{state.best_loss:.3f}"}
            speed = f"{line['tokens_per_second'] or 0:,}"
            show(state.progress, step=state.step, loss=f"{line['train_loss']:.3f}", **best, **{"tokens/s": speed})

    def first_line(self, state: TrainingState, loss: float, bits: float, seconds: float) -> None:
        """The line of step 0, for weights that come from another run."""
        line: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": round(seconds, 3), "train_loss": None}
        line |= {"validation_loss": loss, "validation_bits_per_byte": bits, "tokens_per_second": None}
        self.append(state, "metrics.jsonl", json.dumps(line))

    def sample(self, state: TrainingState, model: Any, validation: Examples, loss: float) -> None:
        """Add to samples.md what the model writes now; the same step and seed give the same sample."""
        model.eval()
        writer = Writer(self.run, self.device, model)
        try:
            if isinstance(validation, Pairs):
                text = shown(writer, validation)
            else:
                length, seed = self.settings.sample_tokens, self.settings.seed
                if state.minutes:
                    length = min(length, math.ceil(SAMPLE_RATE * 60 * state.minutes))
                text = writer.write([""], GenerationSettings(tokens=length, seed=seed, temperature=0.8))[0].text
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or not self.alone:
                raise
            say(f"Out of memory while writing a sample at step {state.step}: there is none this time.")
            return
        finally:
            model.train()
        fence = "`" * max(3, 1 + max((len(run) for run in text.split() if set(run) == {"`"}), default=0))
        self.append(
            state, "samples.md", f"## Step {state.step}: held-out loss {loss:.4f}\n\n{fence}text\n{text}\n{fence}\n"
        )

    def plot(self, state: TrainingState) -> None:
        """Draw loss.png at the end, and now and then before; a few seconds of --minutes have none, nor an older one."""
        if not self.writes:
            return
        picture = self.run.path / "loss.png"
        if 0 < 60 * state.minutes < PLOT_SECONDS:
            files.remove(picture)
            return
        if state.finished or time.monotonic() - self.plotted >= PLOT_SECONDS:
            plot_losses([curve(self.run, "step")], "step", picture)
            self.plotted = time.monotonic()

    def append(self, state: TrainingState, name: str, text: str) -> None:
        """Add to one of the run's logs."""
        if not self.writes:
            return
        path = self.run.path / name
        files.append_line(path, text)
        state.log_sizes[name] = path.stat().st_size

    def cut_back(self, state: TrainingState) -> None:
        """Drop what the logs say of steps after the state: they will be taken again."""
        if not self.writes:
            return
        for name in ("metrics.jsonl", "samples.md"):
            path, size = self.run.path / name, state.log_sizes.get(name, 0)
            if path.exists() and path.stat().st_size > size:
                files.write_bytes(path, path.read_bytes()[:size])
        record = self.run.path / "decisions.jsonl"  # which stay, but for a line that a full disk cut short
        if record.exists() and not (text := record.read_bytes()).endswith(b"\n"):
            files.write_bytes(record, text[: text.rfind(b"\n") + 1])


def sample_of(run: Run, step: int) -> str | None:
    """What the model wrote at an evaluation, read back from samples.md; None where that does not say."""
    path = run.path / "samples.md"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = SAMPLE.match(text.rpartition(f"## Step {step}: ")[2])
    return found[2] if found else None
