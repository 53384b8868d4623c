"""What training on cards elsewhere would take: the memory of each by part, the time of a step, days and dollars.

Nothing is measured: all of it follows from the formulas below, which docs/planning.md lists under "Past this machine",
with their errors on published runs.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass, replace

from quire.errors import UserError, choose
from quire.layers.head_loss import GPU_LOGITS, MULTIPLE, WORTH_IT
from quire.models.decoder import DecoderSettings
from quire.planning.cards import CARDS, NETWORK, NODE, REACHED, Card, link
from quire.planning.work import FLOAT, LOW, Work, work_of
from quire.training.settings import Settings

KINDS = ("gpt", "modern", "sparse")
CHINCHILLA = 20  # tokens for each parameter (Hoffmann et al. 2022), where the settings name no length in tokens
RESERVED = 0.05  # of a card's memory: CUDA's own, NCCL's, and what the allocator cannot use
MOST = 1 << 16  # windows at once, and cards
# Copies are recommended where parts need no less than this share of their time, and copies no more than that share of a
# card's memory for the model and its optimizer: they ask less of a network.
NEARLY, LITTLE = 0.95, 0.25
GPT2_VOCABULARY = 50257


@dataclass(frozen=True)
class Way:
    """One way to spread a training; memory of one card in bytes; what does not fit has no times."""

    parallel: str  # ddp, fsdp, or "" on one card
    gradient_checkpointing: bool
    memory: dict[str, int]  # by part, at this micro-batch
    fits: bool
    micro_batch: int  # windows that a card takes at once; it divides a card's share of a step
    accumulation_steps: int
    largest_micro_batch: int  # that fits, whether or not it divides that share
    seconds: dict[str, float] | None = None  # of a step, by part
    tokens_per_second: float | None = None  # of all cards
    utilization: float | None = None  # MFU: useful operations as a share of the cards' peak
    days: float | None = None
    cost: float | None = None  # in dollars

    @property
    def name(self) -> str:
        """As the table heads it."""
        return (self.parallel or "one card") + (", checkpointed" if self.gradient_checkpointing else "")

    @property
    def total_memory(self) -> int:
        """Of all parts, in bytes."""
        return sum(self.memory.values())


@dataclass(frozen=True)
class ClusterPlan:
    """All that `quire plan --devices N` says."""

    kind: str
    model: dict[str, int]
    vocabulary_size: int
    context_length: int
    parameters: dict[str, int]
    flops_per_token: int
    card: str
    devices: int
    nodes: int
    network: float  # gigabits a second between them, of each
    memory_limit: int
    peak: float
    share: float  # of the peak, that computing is taken to reach
    price: float  # of a card for an hour, in dollars
    windows: int  # of a step, over all cards
    steps: int
    tokens: int
    chinchilla: bool  # whether the length is 20 tokens for each parameter, the settings naming none in tokens
    ways: list[Way]
    enough: int  # cards, the fewest on which it fits; 0: on none

    @property
    def best(self) -> Way | None:
        """The fastest way that fits; ddp for a small model, where another would gain little."""

        def time(way: Way) -> float:
            held = sum(way.memory[part] for part in ("parameters", "gradients", "optimizer"))
            small = way.parallel == "ddp" and held <= LITTLE * self.memory_limit
            return (way.days or math.inf) * (NEARLY if small else 1)

        return min((way for way in self.ways if way.fits), key=time, default=None)


def planned(
    settings: Settings, devices: int, card: str = "h100", price: float = 0.0, network: float = NETWORK
) -> ClusterPlan:
    """The plan for so many cards; `price` is of one for an hour, 0: the table's; `network` in gigabits a second.

    Raises UserError for cards, prices, batches and models that no plan can be made for.
    """
    choose("--card", card, list(CARDS))
    if not 0 <= price < math.inf:
        raise UserError(f"--price must be the dollars of a card for an hour, or 0 for those of the table, not {price}.")
    if not 0 < network < math.inf:
        raise UserError(f"--network must be the gigabits a second that a machine sends to others, not {network}.")
    settings = check(settings, devices)
    return plan_of(work_of(settings), settings, devices, card, price, network)


def check(settings: Settings, devices: int) -> Settings:
    """The settings with a known vocabulary; a UserError where no plan can be made of them."""
    shape, training = settings.model, settings.training
    if not 1 <= devices <= MOST:
        raise UserError(f"--devices must be from 1 to {MOST}, or 0 to plan for this machine, not {devices}.")
    if devices > NODE and devices % NODE:
        raise UserError(f"More than {NODE} cards come in machines of {NODE}: --devices {devices} is no multiple of it.")
    if shape.kind not in KINDS:
        raise UserError(
            f"--devices plans for decoders ({', '.join(KINDS)}), not for {shape.named}. Leave it out to measure a step"
            " here, or take another --preset."
        )
    if training.engine != "autograd" or training.precision == "float32":
        raise UserError("--devices plans for bfloat16 and autograd. Leave out --precision and --engine.")
    if training.epochs:
        raise UserError(
            "--devices reads no text, and cannot tell how long it is. Give --tokens or --steps, no --epochs."
        )
    windows = training.batch_size * training.accumulation_steps
    if windows % devices:
        raise UserError(
            f"A step of {windows} windows (--batch-size {training.batch_size} x --accumulation-steps"
            f" {training.accumulation_steps}) cannot be shared evenly among {devices} cards. Take a multiple, for"
            f" example --batch-size {devices} --accumulation-steps {max(1, round(windows / devices))}."
        )
    vocabulary = shape.vocabulary_size or training.vocabulary_size
    if not vocabulary and training.tokenizer == "gpt2":
        vocabulary = GPT2_VOCABULARY
    if not vocabulary:
        raise UserError("The vocabulary is known only when a text is read. Give --model.vocabulary-size N.")
    return settings.with_model(vocabulary_size=vocabulary, separator=0)  # any token will do as separator


def plan_of(
    work: Work, settings: Settings, devices: int, card: str, price: float, network: float = NETWORK
) -> ClusterPlan:
    """The plan for what a model asks; the settings say how it is trained."""
    shape, training, chosen = settings.model, settings.training, CARDS[card]
    assert isinstance(shape, DecoderSettings)
    windows = training.batch_size * training.accumulation_steps
    tokens = training.tokens or training.steps * windows * work.context
    steps = math.ceil((tokens or CHINCHILLA * work.total) / (windows * work.context))
    names = ("layers", "embedding_size", "heads", "kv_heads", "feedforward_size")
    hourly = price or chosen.price
    cluster = Cluster(work, chosen, devices, windows // devices, training.gradient_clip > 0, network)
    return ClusterPlan(
        kind=shape.kind,
        model={name: getattr(shape, name) for name in names},
        vocabulary_size=work.vocabulary,
        context_length=work.context,
        parameters=work.parameters,
        flops_per_token=work.flops_per_token,
        card=card,
        devices=devices,
        nodes=-(-devices // NODE),
        network=network,
        memory_limit=int(chosen.memory),
        peak=chosen.peak,
        share=round(chosen.share(work.width), 4),
        price=hourly,
        windows=windows,
        steps=steps,
        tokens=steps * windows * work.context,
        chinchilla=not tokens,
        ways=[cluster.timed(way, steps, hourly) for way in cluster.ways(training.gradient_checkpointing)],
        enough=cluster.enough(),
    )


@dataclass(frozen=True)
class Cluster:
    """So many cards at a training: each takes `windows` windows of a step, some at a time."""

    work: Work
    card: Card
    devices: int
    windows: int
    clips: bool = True  # whether gradients are clipped
    network: float = NETWORK

    def ways(self, recomputed: bool) -> list[Way]:
        """The ways to spread it: ddp and fsdp (but for Muon, which wants whole matrices), or one card; and recomputing
        where it does not fit without, or is faster with it."""
        names = self.names()
        found = [self.way(name, recomputed) for name in names]
        if not recomputed:
            other, last = self.way(names[-1], True), found[-1]
            larger = other.micro_batch > last.micro_batch
            if not last.fits or (larger and self.step(other) < self.step(last)):
                found.append(other)
        return found

    def names(self) -> list[str]:
        """The values of --parallel that there are."""
        return [""] if self.devices == 1 else ["ddp"] if self.work.orthogonalizing else ["ddp", "fsdp"]

    def enough(self) -> int:
        """The fewest cards, 1 to 8 or whole machines, on which it fits in some way; 0: on none."""
        for devices in (*range(1, NODE), *range(NODE, MOST + 1, NODE)):
            cluster = replace(self, devices=devices)
            if sum(cluster.memory(cluster.names()[-1], True, 1).values()) <= self.card.memory:
                return devices
        return 0

    def way(self, parallel: str, recomputed: bool) -> Way:
        """A way with the largest micro-batch that fits and divides a card's windows; with one window, if none fits."""

        def total(micro_batch: int) -> int:
            return sum(self.memory(parallel, recomputed, micro_batch).values())

        largest = bisect_right(range(1, MOST), self.card.memory, key=total)
        fitting = range(1, min(self.windows, max(1, largest)) + 1)
        size = max(count for count in fitting if self.windows % count == 0)
        parts = self.memory(parallel, recomputed, size)
        return Way(parallel, recomputed, parts, largest > 0, size, self.windows // size, largest)

    def timed(self, way: Way, steps: int, price: float) -> Way:
        """The way with its times and what so many steps cost, at a price of a card for an hour; where it fits."""
        if not way.fits:
            return way
        step, tokens = self.step(way), self.devices * self.windows * self.work.context
        return replace(
            way,
            seconds=self.seconds(way),
            tokens_per_second=tokens / step,
            utilization=tokens * self.work.flops_per_token / step / (self.devices * self.card.peak),
            days=steps * step / 86400,
            cost=self.devices * price * steps * step / 3600,
        )

    # ---- memory ----

    def memory(self, parallel: str, recomputed: bool, windows: int) -> dict[str, int]:
        """Bytes on one card by part while it takes so many windows at once, at the worst moment: after the loss."""
        work, sharded = self.work, self.devices if parallel == "fsdp" else 1
        tokens, in_blocks, block = windows * work.context, work.blocks * work.block, sum(work.kept.values())
        # A recomputed block keeps its input, in float32; one at a time has all that it keeps.
        blocks = work.blocks * FLOAT * work.width + block if recomputed else work.blocks * block
        part = {
            "parameters": FLOAT * work.total // sharded,
            "gradients": FLOAT * work.total // sharded,
            "optimizer": FLOAT * work.optimizer // sharded,
            # autocast's, for as long as a forward and backward pass lasts; under fsdp they are what is gathered
            "weights in bfloat16": 0 if parallel == "fsdp" else LOW * in_blocks,
            "activations": tokens * (blocks + work.kept_beside),
            "logits": self.logits(tokens),
            "exchange": self.buffers(parallel),
            "reserved": int(RESERVED * self.card.memory),
        }
        return {name: size for name, size in part.items() if size}

    def logits(self, tokens: int) -> int:
        """Bytes of the output head's work.

        HeadLoss takes some rows at a time, in bfloat16 and float32; it has the head's gradient in float32, its weights
        and one product in bfloat16. Of a small vocabulary there are all rows, their logarithms and their gradient.
        """
        vocabulary = self.work.vocabulary
        if vocabulary < WORTH_IT:
            return tokens * vocabulary * (LOW + 2 * FLOAT)
        row, rows = vocabulary + -vocabulary % MULTIPLE, min(tokens, GPU_LOGITS // vocabulary)
        return rows * row * (LOW + FLOAT) + vocabulary * self.work.width * (FLOAT + 2 * LOW)

    def buffers(self, parallel: str) -> int:
        """Bytes that the exchange needs beside parameters and gradients.

        ddp: none, since gradients lie in its buckets. fsdp: two blocks (one ahead) and what is beside the blocks,
        gathered in bfloat16; the gradients of one block and of what is beside in bfloat16, and the block's in float32
        on its way.
        """
        work, beside = self.work, self.work.total - self.work.blocks * self.work.block
        if parallel == "fsdp":
            return LOW * 2 * work.block + (LOW + FLOAT) * work.block + 2 * LOW * beside
        return 0

    # ---- time ----

    def step(self, way: Way) -> float:
        """Seconds of a step."""
        return sum(self.seconds(way).values())

    def seconds(self, way: Way) -> dict[str, float]:
        """Seconds of a step by part: computing, the optimizer, and what is seen of the exchange."""
        work, card = self.work, self.card
        speed = card.peak * card.share(work.width)
        forward = way.micro_batch * work.context * work.flops_per_token / 3 / speed  # of one micro-batch
        backward = (3 if way.gradient_checkpointing else 2) * forward
        ring = (
            (self.devices - 1) / self.devices / link(card, self.devices, self.network)
        )  # seconds to gather, or to reduce, a byte
        gather, reduce = LOW * work.total * ring, FLOAT * work.total * ring
        if way.parallel == "fsdp":  # each forward and each backward gathers, and each backward scatters its gradients
            late = max(0.0, gather - forward) + max(0.0, gather + reduce - backward)
            seen = way.accumulation_steps * late
        else:  # an all-reduce is a reduction and a gathering (Patarasuk and Yuan 2009), once, behind the last backward
            seen = max(0.0, 2 * reduce - backward)
        # It reads weight, gradient and what is kept, and writes weight and what is kept; clipping reads the gradient
        # twice, and writes it.
        moved = FLOAT * (3 * work.total + 2 * work.optimizer + 3 * work.total * self.clips)
        shared = self.devices if way.parallel == "fsdp" else 1
        return {
            "computing": way.accumulation_steps * (forward + backward),
            "optimizer": moved / shared / (REACHED * card.bandwidth) + work.orthogonalizing / speed,
            "exchange": seen,
        }
