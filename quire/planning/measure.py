"""A text's measure: how large it is, how well counting predicts it, and a small network after a few steps."""

import math
from dataclasses import dataclass

import numpy as np

from quire.data.prepare import Prepared
from quire.errors import UserError
from quire.layers.kneser_ney import kneser_ney
from quire.planning.pilot import pilot

ORDERS = (2, 3, 4, 5, 6)  # of the counted n-grams, in characters
COUNTED, HELD_OUT = 1_000_000, 100_000  # characters that are counted at most, and that are predicted from them
FEWEST_BITS = 1e-3  # per byte; a text that repeats itself costs none, which has no logarithm


@dataclass(frozen=True)
class Measure:
    """`bytes` of UTF-8 to train on, about, its `characters`, how many are different in what was counted, and the bits
    per byte on the beginning of the held-out text that counting reaches at the orders 2 to 6, and that the `pilot` of
    pilot.py does (0: it was not asked)."""

    bytes: int
    characters: int
    different: int
    counted: tuple[float, ...]
    pilot: float = 0.0


def measure(prepared: Prepared, piloted: bool) -> Measure:
    """The measure of a prepared text, a network's too where it is `piloted`: of a long text the part before what is
    held out is counted, and learned from.

    Raises UserError where there is too little to count.
    """
    each = prepared.report["characters"] / max(1, prepared.report["tokens"])  # characters a token
    learned = text(prepared, prepared.training, -math.ceil(COUNTED / each))[-COUNTED:]
    held_out = text(prepared, prepared.validation, math.ceil(HELD_OUT / each))[:HELD_OUT]
    if len(learned) < max(ORDERS):
        raise UserError(
            f"The training text has {len(learned)} characters: too few to foretell anything from."
            f" Give a text of at least {max(ORDERS)}; some hundred say more."
        )
    points = np.frombuffer((learned + held_out).encode("utf-32-le"), dtype="<u4")
    characters, numbers = np.unique(points, return_inverse=True)
    nats = kneser_ney(numbers[: len(learned)], numbers[len(learned) :], len(characters), max(ORDERS))
    size = len(held_out.encode())
    bits = nats[np.array(ORDERS) - 1] * len(held_out) / math.log(2) / size
    bits = bits.clip(min=FEWEST_BITS)
    share = 1 - prepared.report["held_out"]
    total = round(prepared.report["characters"] * share)
    network = max(FEWEST_BITS, pilot(learned, held_out)) if piloted else 0.0
    counted = tuple(float(value) for value in bits)
    return Measure(round(total * size / len(held_out)), total, len(characters), counted, network)


def text(prepared: Prepared, tokens: object, count: int) -> str:
    """The first `count` tokens of a stream as text, or of a negative count the last."""
    part = tokens[:count] if count > 0 else tokens[max(0, len(tokens) + count) :]  # type: ignore[index, arg-type]
    separator = prepared.tokenizer.separator
    return prepared.tokenizer.decode(part[part != separator])
