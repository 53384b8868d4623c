"""A pilot: what a small network learns of a text in its first steps says what a larger one will in more.

Counting knows how often a text repeats itself, and not how hard that is for a network to find; sixty steps do.
"""

import torch
from torch import nn

from quire.data.batches import Batches, Cursor
from quire.evaluation.evaluate import bits_per_byte
from quire.evaluation.loss import total_loss
from quire.models import build_model
from quire.planning.recipes import table
from quire.tokenizers import ByteBPETokenizer
from quire.training.optimizers import OPTIMIZERS, set_learning_rates
from quire.training.schedules import linear, warmed_up
from quire.training.settings import layered, typed

RECIPE, PIECES, STEPS, WARMUP, SEED = "modern-1x64-64-pieces", 1024, 60, 10, 0
CPU = torch.device("cpu")


def pilot(learned: str, held_out: str) -> float:
    """Bits per byte of `held_out` by a network of one layer after STEPS steps on `learned`, always the same ones.

    About three seconds on one core. Nothing else draws from the random generator differently because of it.
    """
    tokenizer = ByteBPETokenizer.train([learned], PIECES)
    settings = typed(layered("default", flags=table()["recipes"][RECIPE])).with_model(
        vocabulary_size=tokenizer.vocabulary_size, separator=tokenizer.separator
    )
    shape, training = settings.model, settings.training
    ids, measured = (tokenizer.encode_array(text) for text in ("\n" + learned, "\n" + held_out))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = build_model(shape).train()
        optimizers = OPTIMIZERS[training.optimizer](model, training)
        batches, cursor = Batches(ids, shape.context_length, SEED), Cursor()
        for step in range(STEPS):
            set_learning_rates(optimizers, warmed_up(linear, step, WARMUP, step / STEPS, floor=0.0, share=0.0))
            model(**batches.take(cursor, training.batch_size).arguments()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), training.gradient_clip)
            for optimizer in optimizers:
                optimizer.step()
            model.zero_grad(set_to_none=True)
        nats, _ = total_loss(model, measured, shape.context_length, shape.vocabulary_size, CPU)
    return bits_per_byte(nats, len(held_out.encode()))
