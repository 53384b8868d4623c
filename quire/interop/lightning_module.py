"""Any Quire model as a LightningModule: loss, optimizer and schedule, what it logs, what its checkpoints hold."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy, XLAStrategy
from torch import Tensor, nn

from quire.config import Table, to_table
from quire.devices import generators
from quire.errors import UserError
from quire.evaluation.evaluate import bits_per_byte
from quire.interop.lightning_checkpoints import Checked, aliases, arguments_of, check_model, is_local
from quire.interop.lightning_data import TextData
from quire.interop.lightning_loaders import Place, taken
from quire.interop.lightning_runs import (
    GPT2_SEPARATOR,
    GPT2_VOCABULARY,
    KEY,
    PREFIX,
    Kept,
    contents,
    counts_of,
    tables_of,
)
from quire.layers.cross_entropy import IGNORED
from quire.layers.layer import Block
from quire.layers.ngram_embedding import NgramEmbedding
from quire.models import ModelSettings, build_model
from quire.progress import say
from quire.training.eager import Eager
from quire.training.optimizers import OPTIMIZERS, Optimizers, set_learning_rates, split_tables
from quire.training.schedules import SCHEDULES, warmed_up
from quire.training.settings import LENGTHS, TrainingSettings, layered, typed


class LanguageModel(pl.LightningModule):
    """Any Quire model for Lightning's Trainer.

    A batch is what TextData gives, or that of any other loader: (tokens, targets), a dictionary of "tokens", "targets"
    and, for a model with an encoder, "source", or a quire Batch; integers, (B, T). Every target of a step but IGNORED
    weighs the same, also where its batches, or the processes of a training, have different numbers of them.

    Logs loss, perplexity, learning_rate and gradient_norm of each step, and of each validation validation_loss,
    validation_perplexity and, on a TextData, validation_bits_per_byte.
    """

    def __init__(
        self,
        model: ModelSettings | Table,
        training: TrainingSettings | Table | None = None,
        hyperparameters: Table | None = None,
    ) -> None:
        """`model` is of any kind in MODELS, with its vocabulary_size: see TextData.fitted. Of `training` what makes the
        weights and the steps counts: seed, optimizer, its rates, decays and momentum, the schedule (over `steps`; 0: as
        many as the Trainer makes), gradient_clip (where the Trainer has no gradient_clip_val), gradient_checkpointing;
        the rest is the Trainer's. `hyperparameters` are what a subclass is built from again."""
        super().__init__()
        tables = {"model": plain(model), "training": plain(training or TrainingSettings())}
        self.whole = typed(tables)
        self.save_hyperparameters(hyperparameters or tables)
        check_settings(self.settings, self.training_settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training_settings.seed)
            self.model = build_model(self.settings)
        for module in self.model.modules():
            if isinstance(module, Block):
                module.recomputed = self.training_settings.gradient_checkpointing
        self.kept = Kept()
        self.drawn: dict[str, Tensor] = {}  # random generators of a checkpoint: (processes, state), by kind
        self.place = Place()
        self.step: list[tuple[Tensor, Tensor]] = []  # mean loss and targets of each batch of the step
        self.gauge = self.loss = torch.ones(())  # targets that weigh 1; mean loss of the last step
        self.held_out: list[tuple[Tensor, Tensor]] = []  # mean loss and targets of each batch of the held-out text

    @property
    def settings(self) -> ModelSettings:
        """The model's settings."""
        return self.whole.model

    @property
    def training_settings(self) -> TrainingSettings:
        """How it is trained."""
        return self.whole.training

    def forward(self, tokens: Tensor, targets: Tensor | None = None, **more: Any) -> Tensor:
        """Logits (B, T, V) of `tokens` (B, T), or the mean loss where targets are given."""
        return self.model(tokens, targets, **more)

    # ---- training ----

    def setup(self, stage: str) -> None:
        """Learn of the text what a run of this model will need to know; check what Lightning is about to read."""
        check_strategy(strategy := self.trainer.strategy)
        if not isinstance(strategy.checkpoint_io, Checked):
            strategy.checkpoint_io = Checked(strategy.checkpoint_io)
        data = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and isinstance(data, TextData):
            self.kept = data.kept(self.kept)
            if hasattr(self.model, "counts") and self.model.counts is None:
                counted = self.settings.count(data.loaded[0].training)
                self.model.counts = counts_of(self.settings, counted.tables() if counted is not None else {})
        for module in self.model.modules():
            if isinstance(module, NgramEmbedding):
                module.sparse = self.trainer.world_size == 1  # DDP takes sparse gradients of torch's own layers alone

    def on_fit_start(self) -> None:
        """Seed what dropout and loaders draw from, or put back to where a checkpoint had drawn."""
        torch.manual_seed(self.training_settings.seed + self.global_rank)
        if self.trainer.ckpt_path is None:
            self.drawn, self.place = {}, Place()
        self.put_back()
        self.place.fit_begins()
        self.step = []

    def put_back(self) -> None:
        """Every random generator is again as in the checkpoint."""
        for kind, (_, put) in generators(self.device).items():
            if self.global_rank < len(self.drawn.get(kind, ())):
                put(self.drawn[kind][self.global_rank].clone())  # of a row of others torch would read another, or crash

    def on_train_start(self) -> None:
        """Go on in a loader's epoch; say where the schedule is longer than the training."""
        if self.place.train_begins(self.trainer):
            self.put_back()
        steps, growing = self.trainer.estimated_stepping_batches, self.training_settings.warmup_steps
        if steps <= growing:
            say(f"The learning rate grows over {growing:,} steps, and the training ends before: give warmup_steps=N.")

    def on_train_epoch_start(self) -> None:
        """Remember what a loader's order is drawn from."""
        self.place.epoch_begins(self.trainer)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The mean loss of a batch, times its targets as a share of those of the step's first batch (that of all
        processes, on average): a sum over tokens up to a factor, which `weigh` takes away."""
        arguments = taken(batch, self.settings, look=batch_idx == 0)
        loss, count = self.model(**arguments), (arguments["targets"] != IGNORED).sum().float()
        if not self.step:
            self.gauge = (self.summed(count.clone()) / self.trainer.world_size).clamp(min=1)
        self.step.append((loss.detach(), count))
        self.place.batches = batch_idx + 1
        return loss * (count / self.gauge)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Once the last batch of a step is done, every token of it weighs the same."""
        assert optimizer_closure is not None

        def closure() -> Any:
            found = optimizer_closure()
            self.weigh()
            return found

        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    @torch.no_grad()
    def weigh(self) -> None:
        """From the sum over tokens, which Lightning has divided by batches and processes, to the mean over them."""
        own = [torch.stack([mean.float() * count for mean, count in self.step]).sum(),
               torch.stack([count for _, count in self.step]).sum()]  # fmt: skip
        total, count = self.summed(torch.stack(own))
        self.step, self.loss = [], total / count.clamp(min=1)
        factor = self.gauge * self.trainer.world_size * self.trainer.accumulate_grad_batches / count.clamp(min=1)
        for parameter in self.parameters():
            if parameter.grad is not None:
                parameter.grad *= factor

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all processes."""
        return self.trainer.strategy.reduce(tensor, reduce_op="sum")

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: int | float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradient as Quire does, all of it but n-gram tables at once, and log the step."""
        limit = self.training_settings.gradient_clip if gradient_clip_val is None else gradient_clip_val
        by_value = gradient_clip_algorithm == "value"
        _, clipped = split_tables(self.model)
        norm = nn.utils.clip_grad_norm_(clipped, math.inf if by_value else limit or math.inf)
        if by_value and limit:
            nn.utils.clip_grad_value_(clipped, limit)
        peak, groups = self.training_settings.learning_rate, optimizer.param_groups
        rate = next((group["lr"] for group in groups if group["peak"] == peak), groups[0]["lr"])
        self.log("loss", self.loss, prog_bar=True)
        self.log("perplexity", self.loss.exp())
        self.log("learning_rate", rate)
        self.log("gradient_norm", norm)

    def configure_optimizers(self) -> Any:
        """Quire's optimizer, and its schedule step by step."""
        training = self.training_settings
        schedule, floor = SCHEDULES[training.schedule], training.decay_floor
        if not training.steps and self.trainer.max_steps == self.trainer.max_epochs == -1:
            raise UserError("Say how long the learning rate's schedule is: Trainer(max_steps=N), or training steps=N.")

        @cache
        def steps() -> float:  # asked for only when there are loaders: to make them early would draw early too
            return training.steps or self.trainer.estimated_stepping_batches

        def share(step: int) -> float:
            progress = step / steps() if step else 0.0
            return warmed_up(schedule, step, training.warmup_steps, progress, floor, training.decay_share)

        parts = OPTIMIZERS[training.optimizer](self.model, training)
        set_learning_rates(parts, 1.0)
        optimizer = Together(parts)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # ---- validation ----

    def on_validation_epoch_start(self) -> None:
        """Nothing is measured yet."""
        self.held_out = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """The mean loss of a batch, and its tokens."""
        arguments = taken(batch, self.settings, look=batch_idx == 0)
        self.held_out.append((self.model(**arguments), (arguments["targets"] != IGNORED).sum()))

    def on_validation_epoch_end(self) -> None:
        """The loss over all tokens of all processes."""
        found = [(float(mean), int(count)) for mean, count in self.held_out]
        total, count = sum(mean * count for mean, count in found), sum(count for _, count in found)
        if self.trainer.world_size > 1:
            sums = torch.tensor([total, count], dtype=torch.float64, device=self.device)
            total, count = self.summed(sums).tolist()
        if not count:
            return
        self.log("validation_loss", total / count, prog_bar=True, sync_dist=True)  # it is the same in every process
        self.log("validation_perplexity", math.exp(min(total / count, 700)), sync_dist=True)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TextData) and count == data.predictions:  # the bytes are those of all of it
            self.log("validation_bits_per_byte", bits_per_byte(total, data.validation_bytes), sync_dist=True)

    # ---- checkpoints ----

    def on_save_checkpoint(self, checkpoint: Table) -> None:
        """Add what Quire needs; a tied weight is there once."""
        for alias in aliases(self.model):
            checkpoint["state_dict"].pop(PREFIX + alias, None)  # some strategies gather it in one process alone
        drawn = {kind: self.gathered(state) for kind, (state, _) in generators(self.device).items()}
        batches, state = self.place.known(self.trainer)
        place = {"batches": batches, "drawn": None if state is None else self.gathered(state)}
        checkpoint[KEY] = {**tables_of(self.whole, self.kept, self.model), "random": drawn, "place": place}

    def gathered(self, state: Tensor) -> Tensor:
        """A generator's state in every process: (processes, state), on the CPU."""
        return self.trainer.strategy.all_gather(state.to(self.device)).reshape(-1, len(state)).cpu()

    def on_load_checkpoint(self, checkpoint: Table) -> None:
        """The inverse."""
        state = checkpoint["state_dict"]
        for alias, name in aliases(self.model).items():
            if PREFIX + name in state:
                state[PREFIX + alias] = state[PREFIX + name]
        check_model(checkpoint, self.settings, self.model)
        about = checkpoint[KEY]
        place = about.get("place", {"batches": 0, "drawn": None})  # of an older Quire: an epoch begins again
        self.kept, self.drawn, rows = Kept.from_table(about), about["random"], place["drawn"]
        known = rows is not None and self.global_rank < len(rows)
        self.place = Place(place["batches"], rows[self.global_rank].clone() if known else None)
        if about["counts"]:
            self.model.counts = counts_of(self.settings, about["counts"])

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *arguments: Any, **more: Any) -> "LanguageModel":
        """The model of a checkpoint that Lightning wrote: of tensors and plain values only, and checked where it is a
        file. Further arguments are those of LightningModule.load_from_checkpoint."""
        if is_local(checkpoint_path):
            more = {**arguments_of(contents(checkpoint_path), cls), **more}
        return super().load_from_checkpoint(checkpoint_path, *arguments, **{**more, "weights_only": True})


def plain(settings: Any) -> Table:
    """Settings as a table."""
    return settings if isinstance(settings, dict) else to_table(settings)


def check_settings(model: ModelSettings, training: TrainingSettings) -> None:
    """Refuse settings with which Lightning cannot train, or that it would pass over."""
    if model.vocabulary_size < 1 or (model.separate_documents and model.separator < 0):
        raise UserError(
            "The model's vocabulary_size and separator follow from the tokenizer of its text. Take them from there:"
            " LanguageModel(data.fitted(settings)) with data = TextData(...)."
        )
    if training.engine != "autograd":
        raise UserError(f"Lightning trains by autograd. For the engine {training.engine} take quire.train.")
    if training.curriculum:
        raise UserError("A curriculum needs Quire's own loop: take quire.train, or leave curriculum out.")
    if given := [name for name in LENGTHS if name != "steps" and getattr(training, name)]:
        raise UserError(
            f"Lightning's Trainer says how long to train, not {given[0]}: Trainer(max_steps=N), max_epochs or max_time."
        )


def check_strategy(strategy: Any) -> None:
    """Refuse what would train, but not this model: shards have no matrices to decay, nor the norm of the whole."""
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)) or isinstance(strategy, OTHER):
        raise UserError(
            f"A LanguageModel trains on one device, or with a copy in each process, not by {type(strategy).__name__}."
            ' Take strategy="ddp", or for a model in parts quire train --parallel fsdp.'
        )


OTHER = (DeepSpeedStrategy, XLAStrategy)  # kinds of DDPStrategy by inheritance alone


class Together(Eager):
    """The optimizers that share a model's parameters between them, as one: Lightning's loop takes a single one."""

    def __init__(self, parts: Optimizers) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self.share_out()

    def share_out(self) -> None:
        """Let each part work on these very groups and states."""
        begin = 0
        for part in self.parts:
            end = begin + len(part.param_groups)
            part.param_groups, part.state, begin = self.param_groups[begin:end], self.state, end

    def load_state_dict(self, state_dict: Table) -> None:
        """As any optimizer's, which makes new groups."""
        super().load_state_dict(state_dict)
        self.share_out()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """A step of each; `closure` computes the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


class GPT2(LanguageModel):
    """GPT-2 and the recipe of the preset gpt2: 124 million parameters; a cosine over 600,000 steps, the first 2,000 of
    them to warm up, down to a tenth."""

    def __init__(
        self,
        max_len: int = 1024,
        emb_dim: int = 768,
        num_layers: int = 12,
        num_heads: int = 12,
        model_dim: int | None = None,
        vocab_size: int = GPT2_VOCABULARY,
        weight_decay: float = 0.1,
        dropout: float = 0.0,
        **training: Any,
    ) -> None:
        """Context length, width of the embeddings, blocks, heads of each, width of the blocks (that of the embeddings),
        tokens (50,257: GPT-2's tokenizer), decay of matrices, dropout; `training` are fields of TrainingSettings, for
        example learning_rate, warmup_steps, steps (of the schedule), seed."""
        if model_dim not in (None, emb_dim):
            raise UserError(
                f"model_dim {model_dim} is not emb_dim {emb_dim}: the blocks of GPT-2 are as wide as its embeddings."
                " Give both the same number, or leave model_dim out."
            )
        model = {
            "vocabulary_size": vocab_size,
            "context_length": max_len,
            "embedding_size": emb_dim,
            "layers": num_layers,
            "heads": num_heads,
            "dropout": dropout,
            "separator": GPT2_SEPARATOR if vocab_size == GPT2_VOCABULARY else -1,
        }
        tables = layered("gpt2", None, {"model": model, "training": {"weight_decay": weight_decay, **training}})
        arguments = {"max_len": max_len, "emb_dim": emb_dim, "num_layers": num_layers, "num_heads": num_heads,
                     "model_dim": emb_dim, "vocab_size": vocab_size, "weight_decay": weight_decay,
                     "dropout": dropout, **training}  # fmt: skip
        super().__init__(tables["model"], tables["training"], arguments)
