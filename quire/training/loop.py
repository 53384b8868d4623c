"""The training loop, read from top to bottom. Nothing in it knows which model it trains.

Trainer.fit         until finished: a step, the clock, what is due (a line, an evaluation, a checkpoint)
Trainer.update      one optimizer step
Trainer.evaluate    both losses, a sample, the plot, the checkpoints
"""

import json
import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quire import checkpoint, files
from quire.data.batches import Batches, Cursor
from quire.data.pairs import Pairs
from quire.data.shards import TokenStream
from quire.devices import peak_memory
from quire.errors import UserError
from quire.evaluation.evaluate import bits_per_byte
from quire.evaluation.loss import total_loss
from quire.evaluation.translations import shown
from quire.generation.generate import GenerationSettings, Writer
from quire.layers.layer import Block
from quire.plots.loss import plot_losses
from quire.progress import Update, bar, say
from quire.run import Run
from quire.training import state as states
from quire.training.clock import Clock
from quire.training.curriculum import Curriculum
from quire.training.curves import curve
from quire.training.engines import ENGINES
from quire.training.optimizers import OPTIMIZERS, set_learning_rates, split_tables
from quire.training.precision import Precision, compiled
from quire.training.schedules import SCHEDULES, warmed_up
from quire.training.settings import TrainingSettings
from quire.training.signals import Signals, Stopped
from quire.training.state import TrainingState

LINE_STEPS = 10  # a line of metrics.jsonl at least so often
SAVES, SAVE_SECONDS = 5, 600.0  # checkpoints at least so often in a run, and at least after so much time
EXPLODED = 2.0  # times the first loss
PASSES = 10  # steps in a row that may be passed over before training stops


class Trainer:
    """A run being trained: its model, optimizers, data and state. `began` is time.time() at the command's start."""

    def __init__(
        self, run: Run, settings: TrainingSettings, tokens: np.ndarray | TokenStream, device: torch.device, began: float
    ) -> None:
        self.run, self.settings, self.device = run, settings, device
        self.precision = Precision(settings.precision, device)
        self.scaler = self.precision.scaler
        self.engine = ENGINES[settings.engine]
        self.model = run.fresh_model(settings.seed, device).train()
        for module in self.model.modules():
            if isinstance(module, Block):
                module.recomputed = settings.gradient_checkpointing
        self.optimizers = OPTIMIZERS[settings.optimizer](self.model, settings)
        self.tokens, ranges = tokens, run.manifest.get("ranges", {})
        context, examples = run.settings.context_length, run.examples(tokens, settings.seed)
        self.curriculum = Curriculum(settings.curriculum, examples, context, settings.seed, ranges)
        self.validation = run.examples(run.validation_tokens())
        self.state = TrainingState()
        self.began = began
        self.logged = (0, 0.0)  # tokens and time at the last line of metrics.jsonl
        self.saved = 0.0  # time of the last checkpoint
        self.wrapped: Any = None  # the model as the engine calls it, perhaps compiled; made when training starts

    # ---- the loop ----

    def fit(self) -> None:
        """Train until the stretch is finished; a signal saves, and raises Stopped."""
        state = self.state
        self.clock = Clock(self.began - state.seconds, self.run.path / "decisions.jsonl")
        self.wrap_model()
        self.clock.start_measuring(state.step)
        self.logged, self.saved = (state.tokens, self.clock.elapsed()), time.monotonic()
        with Signals() as signals, bar(self.run.path.name) as show:
            while not state.finished:
                before = state.progress
                self.update()
                self.advance()
                if state.finished or state.step == state.next_evaluation:
                    self.evaluate()
                else:
                    if state.step % LINE_STEPS == 0:
                        self.log(show)
                    fifth = math.floor(state.progress * SAVES) > math.floor(before * SAVES)
                    if fifth or time.monotonic() - self.saved > SAVE_SECONDS:
                        self.save("last")
                if signals.received and not state.finished:
                    self.save("last")
                    raise Stopped(
                        signals.received, f"Stopped at step {state.step} and saved. Go on: quire resume {self.run.path}"
                    )

    def wrap_model(self) -> None:
        """Compile the model where that is asked for or pays; refuse one that the engine cannot train."""
        model, shape = self.model, self.run.settings
        self.wrapped = compiled(model, self.settings, self.precision, shape.vocabulary_size, shape.context_length)
        self.engine.check(self.wrapped)

    def update(self) -> None:
        """One optimizer step on the next batch_size x accumulation_steps windows of the context length, or as many
        tokens in shorter ones; each token weighs the same."""
        state, settings, parts = self.state, self.settings, self.settings.accumulation_steps
        self.rate_share = self.learning_rate_share()
        set_learning_rates(self.optimizers, self.rate_share)
        self.enter_stage()
        rows = self.curriculum.rows(state.stage, settings.batch_size)
        batch = self.batches.take(state.cursor, rows * parts)
        loss: Tensor | float = 0.0  # L = sum of (n_i / n) L_i: the mean over all n counted targets, part by part
        for part in batch.split(parts):
            share = part.counted / batch.counted
            scale = share * self.precision.loss_scale()
            with self.precision.autocast():
                loss = loss + share * self.engine.backpropagate(self.wrapped, part.to(self.device), scale)
        self.engine.synchronize(self.model)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        clip = settings.gradient_clip or math.inf
        # n-gram tables are left out: their Adagrad scales each gradient by its own history in any case.
        self.gradient_norm = float(nn.utils.clip_grad_norm_(split_tables(self.model)[1], clip))
        self.step_optimizers(float(loss))
        self.model.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += batch.counted

    @property
    def batches(self) -> Batches | Pairs:
        """The examples of the stage in which training is."""
        return self.curriculum.batches[self.state.stage]

    def enter_stage(self) -> None:
        """Begin the curriculum's next stage where progress has come to it; a later stretch stays with the last."""
        state = self.state
        stage = self.curriculum.stage_at(1.0 if state.start else state.progress)
        if stage != state.stage:
            state.stage, state.cursor = stage, Cursor()
            say(self.curriculum.sentence(stage))

    def learning_rate_share(self) -> float:
        """The share of the peak learning rate at this step."""
        state, settings = self.state, self.settings
        schedule, step = SCHEDULES[settings.schedule], state.step - state.start
        share = warmed_up(
            schedule, step, settings.warmup_steps, state.progress, settings.decay_floor, settings.decay_share
        )
        return share * state.lowered

    def step_optimizers(self, loss: float) -> None:
        """Apply the gradients, unless the loss is not to be trusted: then the policy says what happens."""
        state = self.state
        if state.first_loss is None and math.isfinite(loss):
            state.first_loss = loss
        # An overflow of float16's range is not a fault: the scaler passes over the step and lowers its scale.
        overflow = self.scaler.is_enabled() and not math.isfinite(self.gradient_norm)
        finite = math.isfinite(loss) and (overflow or math.isfinite(self.gradient_norm))
        if not finite or loss > EXPLODED * max(state.first_loss or 0.0, 1.0):
            self.pass_over(loss)
            self.scaler.update()
            return
        state.passed_over = 0
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        state.loss_sum += loss
        state.loss_steps += 1

    def pass_over(self, loss: float) -> None:
        """Leave the weights alone; then stop, go on, or go back to the best checkpoint with half the learning rate."""
        state, settings = self.state, self.settings
        what = f"the loss became {loss:.4g}" if math.isfinite(loss) else "the loss is not finite"
        if math.isfinite(loss) and not math.isfinite(self.gradient_norm):
            what = "the gradient is not finite"
        state.passed_over += 1
        cause = f"The likeliest cause is a learning rate that is too high ({settings.learning_rate:g})"
        if settings.non_finite == "stop" or state.passed_over > PASSES:
            raise UserError(
                f"At step {state.step} {what}; training stopped, and the checkpoints from before are kept."
                f" {cause}: start anew with a lower --learning-rate, or with --non-finite rollback."
            )
        if settings.non_finite == "rollback":
            self.roll_back()
            say(f"At step {state.step} {what}: back to the best weights so far, at half the learning rate. {cause}.")

    def roll_back(self) -> None:
        """Weights and optimizer of the best checkpoint (or the first weights); steps, data and clock go on.

        Not of the last one: where that stands depends on when training was stopped.
        """
        folder = self.run.folder("best")
        if checkpoint.exists(folder):
            states.restore(checkpoint.load(folder), folder, self.model, self.optimizers, self.scaler)
        else:
            fresh = self.run.fresh_model(self.settings.seed, self.device)
            self.model.load_state_dict(fresh.state_dict())
            for optimizer in self.optimizers:
                optimizer.state.clear()
        self.state.lowered /= 2

    def advance(self) -> None:
        """Let progress follow the step just taken; under --minutes the clock may correct it."""
        state = self.state
        state.seconds = self.clock.elapsed()
        if state.end:
            state.progress = (state.step - state.start) / (state.end - state.start)
        else:
            self.clock.measure(state)
            state.progress += state.rate
            if state.step != state.next_evaluation:  # there the clock decides after the evaluation
                self.clock.decide(state, self.evaluation_steps())
        state.finished = state.progress > 1 - 1e-9

    def evaluation_steps(self) -> float:
        """What an evaluation will cost, in training steps: forward alone is about a third of a step's work."""
        per_step = self.settings.batch_size * self.settings.accumulation_steps * self.curriculum.whole.tokens_each()
        return 1.2 * len(self.validation) / 3 / per_step

    # ---- what is due now and then ----

    def evaluate(self) -> None:
        """Measure the held-out loss, keep the best, write a sample and the plot, and save."""
        state, began = self.state, time.monotonic()
        loss, bits = self.held_out_loss()
        improved = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        if improved:
            state.best_loss, state.best_step, state.stale = loss, state.step, 0
        else:
            self.be_patient()
        self.log(None, validation_loss=loss, validation_bits_per_byte=bits)
        if self.settings.sample_tokens:
            self.write_sample(loss)
        plot_losses([curve(self.run, "step")], "step", self.run.path / "loss.png")
        if not state.end and not state.finished:
            self.clock.evaluation_seconds = max(self.clock.evaluation_seconds, time.monotonic() - began)
            self.clock.decide(state)
            state.finished = state.progress > 1 - 1e-9
        if not state.end and state.finished:
            self.clock.end(state)
        if state.end:
            state.next_evaluation = min(state.end, state.step + self.interval())
        state.seconds = self.clock.elapsed()
        if improved:
            self.save("best")
        self.save("last")
        self.clock.evaluation_seconds = time.monotonic() - began
        self.clock.start_measuring(state.step)
        self.logged = (state.tokens, self.clock.elapsed())  # evaluating is not training: it counts in no speed

    def held_out_loss(self) -> tuple[float, float]:
        """Nats per token and bits per byte over the whole held-out text."""
        shape, size = self.run.settings, self.run.manifest["validation"]["bytes"]
        total, count = total_loss(self.model, self.validation, shape.context_length, shape.vocabulary_size, self.device)
        return total / count, bits_per_byte(total, size)

    def interval(self) -> int:
        """Steps between evaluations in a stretch whose length is known."""
        return self.settings.evaluation_interval or max(10, math.ceil((self.state.end - self.state.start) / 10))

    def be_patient(self) -> None:
        """Count evaluations without a better loss; past the patience, lower the learning rate or stop."""
        state, settings = self.state, self.settings
        state.stale += 1
        if not settings.patience or state.stale < settings.patience:
            return
        since = f"No better held-out loss for {state.stale} evaluations, since step {state.best_step}"
        state.stale = 0
        if settings.patience_action == "stop":
            say(f"{since}: training stops, the best is kept.")
            state.finished = True
        else:
            state.lowered /= 2
            say(f"{since}: the learning rate is halved.")

    def log(self, show: Update | None, **measured: float) -> None:
        """A line of metrics.jsonl: the training loss is the mean since the line before."""
        state = self.state
        tokens, seconds = state.tokens - self.logged[0], self.clock.elapsed() - self.logged[1]
        line = {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "train_loss": state.loss_sum / state.loss_steps if state.loss_steps else None,
            **measured,
            "learning_rate": self.settings.learning_rate * self.rate_share,
            "gradient_norm": self.gradient_norm if math.isfinite(self.gradient_norm) else None,
            "tokens_per_second": round(tokens / seconds) if seconds else None,
            "memory_bytes": peak_memory(self.device),
        }
        self.append("metrics.jsonl", json.dumps(line))
        state.loss_sum, state.loss_steps = 0.0, 0
        self.logged = (state.tokens, self.clock.elapsed())
        if show is not None and line["train_loss"] is not None:
            best = {} if state.best_loss is None else {"held_out": f"{state.best_loss:.3f}"}
            rate = f"{line['tokens_per_second'] or 0:,}"
            show(state.progress, step=state.step, loss=f"{line['train_loss']:.3f}", **best, **{"tokens/s": rate})

    def write_sample(self, loss: float) -> None:
        """Add to samples.md what the model writes now; the same step and seed give the same sample."""
        began = time.monotonic()
        self.model.eval()
        writer = Writer(self.run, self.device, self.model)
        if isinstance(self.validation, Pairs):
            text = shown(writer, self.validation)
        else:
            length, seed = self.settings.sample_tokens, self.settings.seed
            settings = GenerationSettings(tokens=length, seed=seed, temperature=0.8)
            text = writer.write([""], settings)[0].text
        self.model.train()
        fence = "`" * max(3, 1 + max((len(run) for run in text.split() if set(run) == {"`"}), default=0))
        self.append(
            "samples.md", f"## Step {self.state.step}: held-out loss {loss:.4f}\n\n{fence}text\n{text}\n{fence}\n"
        )
        self.clock.sample_seconds = time.monotonic() - began

    def append(self, name: str, text: str) -> None:
        """Add to one of the run's logs; the state knows its size, so that a resume can cut back what came after."""
        path = self.run.path / name
        files.append_line(path, text)
        self.state.log_sizes[name] = path.stat().st_size

    def save(self, which: str) -> None:
        """Write the checkpoint `best` or `last`."""
        states.save(self.run.folder(which), self.state, self.model, self.optimizers, self.scaler)
        self.saved = time.monotonic()

    # ---- starting ----

    def begin(self) -> None:
        """A new run: its length from the settings; an epoch is as many windows as cover the text, or all pairs."""
        settings, whole = self.settings, self.curriculum.whole
        per_step = settings.batch_size * settings.accumulation_steps
        steps = settings.steps
        if settings.epochs:
            steps = math.ceil(settings.epochs * whole.examples() / per_step)
        elif settings.tokens:
            steps = math.ceil(settings.tokens / (per_step * whole.tokens_each()))
        self.stretch(steps, settings.minutes)

    def measure_start(self) -> None:
        """Measure weights that come from another run before their first step: the best so far, and a checkpoint."""
        state = self.state
        state.best_loss, bits = self.held_out_loss()
        line = {"step": 0, "tokens": 0, "seconds": round(time.time() - self.began, 3), "train_loss": None}
        line |= {"validation_loss": state.best_loss, "validation_bits_per_byte": bits, "tokens_per_second": None}
        self.append("metrics.jsonl", json.dumps(line))
        say(f"Before training: {state.best_loss:.4f} nats per token, {bits:.4f} bits per byte on the held-out text.")
        self.save("best")
        self.save("last")

    def stretch(self, steps: int, minutes: float) -> None:
        """Begin a stretch of so many steps, or of so much time."""
        state = self.state
        state.start, state.end, state.minutes = state.step, state.step + steps if steps else 0, minutes
        state.seconds_before = state.seconds
        state.progress, state.rate, state.lowered, state.stale, state.finished = 0.0, 0.0, 1.0, 0, False
        state.next_evaluation = min(state.end, state.step + self.interval()) if steps else 0

    def load(self) -> bool:
        """Take up the last checkpoint; False where the run was stopped before its first, and begins anew."""
        found = self.run.checkpoint()
        if found is None:
            self.begin()
        else:
            self.state = states.restore(found, self.run.folder("last"), self.model, self.optimizers, self.scaler)
        return found is not None

    def cut_back_logs(self) -> None:
        """Drop what the logs say of steps after the state: they will be taken again."""
        for name in ("metrics.jsonl", "samples.md"):
            path, size = self.run.path / name, self.state.log_sizes.get(name, 0)
            if path.exists() and path.stat().st_size > size:
                files.write_bytes(path, path.read_bytes()[:size])
        record = self.run.path / "decisions.jsonl"  # which stay, but for a line that a full disk cut short
        if record.exists() and not (text := record.read_bytes()).endswith(b"\n"):
            files.write_bytes(record, text[: text.rfind(b"\n") + 1])

    def tensors(self) -> dict[str, Tensor]:
        """Everything that must be equal where two trainings are the same, as tensors by name."""
        own = {f"model.{name}": tensor.detach() for name, tensor in self.model.named_parameters()}
        training = states.training_tensors(self.model, self.optimizers, self.scaler)
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in {**own, **training}.items()}
        state, cursor = self.state, self.state.cursor
        return {**copies, "cursor": torch.tensor([state.stage, cursor.epoch, cursor.position, state.step])}
