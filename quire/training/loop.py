"""The training loop, read from top to bottom. Nothing in it knows which model it trains.

Trainer.fit         until finished: a step, the clock, what is due (a line, an evaluation, a checkpoint)
Trainer.update      one optimizer step
Trainer.evaluate    both losses, a sample, the plot, the checkpoints
"""

import math
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quire import checkpoint, processes
from quire.data.batches import Batch, Batches, Cursor
from quire.data.pairs import Pairs
from quire.data.shards import TokenStream
from quire.devices import generators, out_of_memory, release_memory
from quire.errors import UserError
from quire.evaluation.evaluate import bits_per_byte
from quire.evaluation.loss import total_loss
from quire.layers.dropout import drops
from quire.layers.layer import Block
from quire.progress import Update, bar, say
from quire.run import Run
from quire.training import non_finite
from quire.training.clock import Clock, default_interval
from quire.training.curriculum import Curriculum
from quire.training.distributed import World, join
from quire.training.engines import ENGINES
from quire.training.journal import Journal
from quire.training.optimizers import OPTIMIZERS, set_learning_rates, split_tables
from quire.training.precision import Precision, compiled
from quire.training.saving import Saving
from quire.training.schedules import SCHEDULES, warmed_up
from quire.training.settings import TrainingSettings
from quire.training.sharded import in_float32, shard
from quire.training.signals import Signals, Stopped
from quire.training.state import TrainingState
from quire.training.threads import Watch

LINE_STEPS = 10  # a line of metrics.jsonl at least so often
SAVES, SAVE_SECONDS = 5, 600.0  # checkpoints at least so often in a run, and at least after so much time


class Trainer:
    """A run being trained: its model, optimizers, data and state. `began` is time.time() at the command's start."""

    def __init__(
        self,
        run: Run,
        settings: TrainingSettings,
        tokens: np.ndarray | TokenStream,
        device: torch.device,
        began: float,
        world: World | None = None,
    ) -> None:
        """`world`: the processes that train it together; None: those of this launch."""
        self.run, self.settings, self.device = run, settings, device
        self.world = world or join(settings.timeout)
        self.world.share(settings.batch_size * settings.accumulation_steps)  # or refused, before anything is changed
        self.world.assemble()
        self.sharded = settings.parallel == "fsdp"
        self.precision = Precision(settings.precision, device)
        self.scaler = self.precision.scaler
        self.engine = ENGINES[settings.engine]
        self.model = self.fresh_model().train()
        for module in self.model.modules():
            if isinstance(module, Block):
                module.recomputed = settings.gradient_checkpointing
        if self.sharded:
            self.model = shard(self.model, self.world, self.precision)
        self.optimizers = OPTIMIZERS[settings.optimizer](self.model, settings)
        # n-gram tables are left out: their Adagrad scales each gradient by its own history in any case.
        _, self.clipped = split_tables(self.model)
        self.tokens, ranges = tokens, run.manifest.get("ranges", {})
        context, examples = run.settings.context_length, run.examples(tokens, settings.seed)
        self.curriculum = Curriculum(settings.curriculum, examples, context, settings.seed, ranges)
        self.validation = run.examples(run.validation_tokens())
        self.state = TrainingState()
        self.began = began
        self.journal = Journal(run, settings, device, self.world.leads)
        self.saving = Saving(run, self.model, self.optimizers, self.scaler, self.world, settings)
        self.saved = 0.0  # seconds of the run at its last checkpoint
        self.signals = Signals()
        self.signal, self.now = 0, began  # what any process was sent, and the first one's time, as of the last step
        self.wrapped: Any = None  # the model as the engine calls it, perhaps compiled; made when training starts

    # ---- the loop ----

    def fit(self) -> None:
        """Train until the stretch is finished; a signal saves, and raises Stopped."""
        state = self.state
        record = self.run.path / "decisions.jsonl"
        self.clock = Clock(self.began - state.seconds, record, torch.get_num_threads(), self.world)
        if self.wrapped is None:
            self.wrap_model()
        if self.world.size > 1 and drops(self.model):
            say("Each process drops out other parts: with dropout, curves differ with the number of processes.")
        self.clock.start_measuring(state.step)
        watch = Watch()
        self.saved = self.clock.elapsed()
        self.journal.logged = state.tokens, self.saved
        with self.signals, bar(self.run.path.name) as show:
            while not state.finished:
                before = state.progress
                self.update()
                self.advance()
                if state.finished or state.step == state.next_evaluation:
                    self.evaluate()
                else:
                    if state.step % LINE_STEPS == 0:
                        self.log(show)
                        if processes.local_size() == 1 and (sentence := watch.sentence()):
                            say(sentence, "yellow")
                    fifth = math.floor(state.progress * SAVES) > math.floor(before * SAVES)
                    if fifth or state.seconds - self.saved > SAVE_SECONDS:
                        self.save("last")
                signal = self.signal if self.world.size > 1 else self.signals.received
                if signal and not state.finished:
                    self.save("last")
                    self.saving.finish()
                    said = f"Stopped at step {state.step} and saved. Go on: quire resume {self.run.path}"
                    raise Stopped(signal, said)
            self.saving.finish()

    def wrap_model(self) -> None:
        """Compile the model where that is asked for or pays; refuse one that the engine cannot train. Of several
        processes that have a copy each, let autograd make their gradients one."""
        model, shape, settings = self.model, self.run.settings, self.settings
        rows = settings.batch_size * settings.accumulation_steps
        windows = rows // self.world.size // self.world.parts(rows, settings.accumulation_steps)
        self.wrapped = compiled(model, settings, self.precision, (windows, shape.context_length), shape.vocabulary_size)
        self.engine.check(self.wrapped)
        if self.world.size > 1 and self.settings.engine == "autograd" and not self.sharded:
            self.wrapped = self.world.wrapped(self.wrapped, self.device)

    def update(self) -> None:
        """One optimizer step on the next batch_size x accumulation_steps windows of the context length, or as many
        tokens in shorter ones; each token weighs the same, in whichever process it is."""
        state, settings = self.state, self.settings
        self.rate_share = self.learning_rate_share()
        set_learning_rates(self.optimizers, self.rate_share)
        self.enter_stage()
        rows = self.curriculum.rows(state.stage, settings.batch_size) * settings.accumulation_steps
        batch = self.batches.take(state.cursor, rows, self.world.share(rows))
        loss = self.gradients(batch, rows)
        self.engine.synchronize(self.model, self.world.size)
        if self.device.type == "cuda":
            self.world.meet()  # what is still computed there would wait for one that hangs until nccl loses patience
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        clip = settings.gradient_clip or math.inf
        norm: Any = nn.utils.clip_grad_norm_(self.clipped, clip)
        self.gradient_norm = float(norm.full_tensor() if self.sharded else norm)
        losses, signals, times = self.world.told(float(loss), self.signals.received, time.time())
        self.signal, self.now = int(max(signals)), times[0]
        self.step_optimizers(sum(losses))
        self.model.zero_grad(set_to_none=True)
        state.step += 1
        state.tokens += batch.among

    def gradients(self, batch: Batch, rows: int) -> Tensor | float:
        """Fill in the gradients of this process's share of a batch of so many rows, and give its share of the mean
        loss; where memory runs out, and there is one process, in smaller parts from here on."""
        state, windows = self.state, len(batch.inputs)
        drawn = list(generators(self.device).values())
        while True:
            parts = self.world.parts(rows, self.settings.accumulation_steps * state.divided)
            try:
                return self.accumulated(batch.split(parts))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or parts == windows or self.world.size > 1:
                    raise
            self.model.zero_grad(set_to_none=True)
            release_memory(self.device)
            for before, put in drawn:  # dropout: the step is done again as if for the first time
                put(before)
            state.divided *= 2
            self.saved = -math.inf  # a resume is to begin with what was learned here: save at the end of this step
            now, then = (-(-windows // min(windows, count)) for count in (parts, 2 * parts))
            say(
                f"Out of memory at step {state.step}: from here on {then} of its {windows} windows at a time go through"
                f" the model, not {now}. The gradient is the same; a step may take longer."
            )

    def accumulated(self, parts: list[Batch]) -> Tensor | float:
        """The gradients and the mean loss over all n counted targets, part by part: L = sum of (n_i / n) L_i.

        Processes have parts of that sum, and the mean of their gradients is taken: hence their number in the scale.
        """
        loss: Tensor | float = 0.0
        for number, part in enumerate(parts, 1):
            share = part.counted / part.among
            scale = share * self.world.size * self.precision.loss_scale()
            with self.precision.autocast(), self.world.of_step(self.wrapped, number == len(parts)):
                loss = loss + share * self.engine.backpropagate(self.wrapped, part.to(self.device), scale)
        return loss

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
        shape = settings.warmup_steps, state.progress, settings.decay_floor, settings.decay_share
        return state.lowered * warmed_up(schedule, step, *shape)

    def step_optimizers(self, loss: float) -> None:
        """Apply the gradients, unless the loss is not to be trusted: then the policy says what happens."""
        state = self.state
        if not non_finite.trusted(self, loss):
            non_finite.pass_over(self, loss)
            self.scaler.update()
            return
        state.passed_over = 0
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
        self.scaler.update()
        state.loss_sum += loss
        state.loss_steps += 1

    def roll_back(self) -> None:
        """Weights and optimizer of the best checkpoint (or the first weights); steps, data and clock go on.

        Not of the last one: where that stands depends on when training was stopped.
        """
        folder = self.run.folder("best")
        self.saving.finish()
        if checkpoint.exists(folder):
            self.saving.load(folder)
        else:
            checkpoint.load_model_tensors(self.model, checkpoint.model_tensors(self.fresh_model()), folder)
            for optimizer in self.optimizers:
                optimizer.state.clear()
        self.state.lowered /= 2

    def advance(self) -> None:
        """Let progress follow the step just taken; under --minutes the clock may correct it."""
        state = self.state
        state.seconds = self.now - self.clock.began
        if state.end:
            state.progress = (state.step - state.start) / (state.end - state.start)
        else:
            self.clock.measure(state)
            state.progress += state.rate
            if state.step != state.next_evaluation:  # there the clock decides after the evaluation
                self.clock.decide(state, self.foreseen_evaluation)
        state.finished = state.progress > 1 - 1e-9

    def foreseen_evaluation(self) -> float:
        """The seconds that measuring the held-out text is going to take, by its first batches, after one to warm up."""
        model = self.measured()
        for batches in (1, 2):
            began = time.monotonic()
            _, count = self.held_out_total(model, batches * self.world.size)
        return self.world.first(time.monotonic() - began) * max(1.0, len(self.validation) / count)

    # ---- what is due now and then ----

    def evaluate(self) -> None:
        """Measure the held-out loss, keep the best, write a sample and the plot, and save."""
        state, began = self.state, self.clock.elapsed()
        loss, bits = self.held_out_loss(model := self.measured())
        if not math.isfinite(loss):
            non_finite.blame(self, "the held-out loss is not finite", stop=state.best_loss is None)
            loss, bits = self.held_out_loss(model := self.measured())
        improved = state.best_loss is None or loss < state.best_loss
        if improved:
            state.best_loss, state.best_step, state.stale = loss, state.step, 0
        else:
            self.be_patient()
        self.log(None, validation_loss=loss, validation_bits_per_byte=bits)
        if self.settings.sample_tokens and (self.world.leads or self.sharded):
            self.journal.sample(state, model, self.validation, loss)
        del model
        if not state.end and not state.finished:
            # So far it has neither drawn nor saved: where the last one took longer in all, that is the better guess.
            self.clock.evaluation_seconds = max(self.clock.evaluation_seconds, self.clock.elapsed() - began)
            self.clock.decide(state, self.foreseen_evaluation)
            state.finished = state.progress > 1 - 1e-9
        self.journal.plot(state)
        if not state.end and state.finished:
            self.clock.end(state)
        if state.end:
            state.next_evaluation = min(state.end, state.step + self.interval())
        state.seconds = self.clock.elapsed()
        if improved:
            self.save("best")
        self.save("last")
        self.clock.evaluation_seconds = self.clock.elapsed() - began
        self.clock.start_measuring(state.step)
        self.journal.logged = (state.tokens, self.clock.elapsed())  # evaluating is not training: it counts in no speed

    def measured(self) -> Any:
        """The model as it measures and writes: in float32, also where its parts are gathered in another precision."""
        if not self.sharded or self.precision.dtype is torch.float32:
            return self.model
        release_memory(self.device)  # also of the one before
        return in_float32(self.model, self.run.settings, self.world, self.device)

    def held_out_loss(self, model: Any) -> tuple[float, float]:
        """Nats per token and bits per byte over the whole held-out text."""
        total, count = self.held_out_total(model)
        return total / count, bits_per_byte(total, self.run.manifest["validation"]["bytes"])

    def held_out_total(self, model: Any, most_batches: int | None = None) -> tuple[float, int]:
        """Nats of the held-out text, or of its first batches, and how many tokens those are."""
        shape = self.run.settings
        sizes = shape.context_length, shape.vocabulary_size
        share = self.world.rank, self.world.size
        own = total_loss(model, self.validation, *sizes, self.device, None, most_batches, share)
        total, count = self.world.sum(*own)
        return total, int(count)

    def interval(self) -> int:
        """Steps between evaluations in a stretch whose length is known."""
        return self.settings.evaluation_interval or default_interval(self.state.end - self.state.start)

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
        """A line of metrics.jsonl."""
        rate = self.settings.learning_rate * self.rate_share
        self.journal.line(self.state, self.clock.elapsed(), rate, self.gradient_norm, show, **measured)

    def save(self, which: str) -> None:
        """Write the checkpoint `best` or `last`."""
        self.saving.save(which, self.state)
        self.saved = self.state.seconds

    # ---- starting ----

    def fresh_model(self) -> Any:
        """The model as the seed initializes it, the same in all processes; what they drop out differs."""
        seed = self.settings.seed
        model = self.run.fresh_model(seed, torch.device("cpu") if self.sharded else self.device)  # sharding moves it
        if self.world.rank:
            torch.manual_seed(int(np.random.SeedSequence([seed, self.world.rank]).generate_state(1)[0]))
        return model

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

    def stretch(self, steps: int, minutes: float) -> None:
        """Begin a stretch of so many steps, or of so much time."""
        state = self.state
        state.start, state.end, state.minutes = state.step, state.step + steps if steps else 0, minutes
        state.launch = processes.launch()
        state.seconds_before = state.seconds
        state.progress, state.rate, state.lowered, state.stale, state.finished = 0.0, 0.0, 1.0, 0, False
        state.next_evaluation = min(state.end, state.step + self.interval()) if steps else 0

    def load(self) -> bool:
        """Take up the last checkpoint; False where the run was stopped before its first, and begins anew."""
        folder = self.run.last_folder()
        if folder is None and "finetuned_from" in self.run.manifest:
            base = self.run.manifest["finetuned_from"]
            raise UserError(f"{self.run.path} has none of the weights of {base} yet. Delete it, and fine-tune again.")
        if folder is None:
            self.begin()
        else:
            self.state = self.saving.load(folder)
        return folder is not None
