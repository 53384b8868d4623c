"""What needs no gradient: counting n-grams, and a compressor. Whoever trains a model of a small text answers to both.

    python benchmarks/baselines.py [TEXT ...]

Kneser-Ney counts the training part and predicts the held-out part. PPMd reads all of the text and goes on learning from
the held-out part while it reads it: its figure is the size of all less the size of the training part.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import numpy as np
from nanogpt import cut

KNESER_NEY_ORDER, PPMD_ORDER = 8, 6
PPMD_MEMORY = 1 << 28  # bytes; it forgets when they are full


def kneser_ney(text: str) -> float:
    """Nats per held-out character of an interpolated 8-gram model."""
    from quire.layers.kneser_ney import kneser_ney as counted

    parts = cut(text)
    letters = {letter: number for number, letter in enumerate(sorted(set(text)))}
    training, held_out = (np.array([letters[letter] for letter in part], dtype=np.int64) for part in parts)
    return float(counted(training, held_out, len(letters), KNESER_NEY_ORDER)[-1])


def ppmd(text: str) -> float:
    """Nats per held-out character of PPMd (variant I, order 6)."""
    try:
        import pyppmd
    except ImportError:
        sys.exit("PPMd needs the package pyppmd: pip install pyppmd")
    training, held_out = cut(text)
    whole, part = (
        len(pyppmd.compress(data.encode(), max_order=PPMD_ORDER, mem_size=PPMD_MEMORY, variant="I"))
        for data in (text, training)
    )
    return (whole - part) * 8 * math.log(2) / len(held_out)


BASELINES = {"Kneser-Ney, 8-grams": kneser_ney, "PPMd, order 6": ppmd}


def main() -> None:
    """Print both for each text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path, nargs="*", default=[Path("../shared/data/tinyshakespeare.txt")])
    for path in parser.parse_args().texts:
        text = path.read_text("utf-8")
        held_out = cut(text)[1]
        for name, measure in BASELINES.items():
            began = time.process_time()
            loss = measure(text)
            bits = loss / math.log(2) * len(held_out) / len(held_out.encode())
            print(f"{path.name:24}{name:22}{loss:8.4f} nats per character{bits:9.4f} bits per byte"
                  f"{time.process_time() - began:8.1f} s CPU", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
