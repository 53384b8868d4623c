"""Everything the C core does, on nasty inputs, beside the reference: run by test_core.py, also under sanitizers.

python exercise_core.py PATH_OF_THE_COMPILED_CORE
"""

import importlib.util
import random
import sys
from collections import Counter
from types import ModuleType

import numpy as np

from quire.tokenizers import core, merges
from quire.tokenizers.patterns import character_classes

LENGTHS = [1, 2, 3, 7, 8, 9, 16, 17, 47, 48, 49, 64, 65, 257]
CLASSES = character_classes()


def load(path: str) -> ModuleType:
    """The compiled core at `path`."""
    spec = importlib.util.spec_from_file_location("_core", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(rng: random.Random) -> list[bytes]:
    """Empty, one byte, every byte, no UTF-8, characters cut off, pieces of every critical length, one long piece."""
    found = [b"", bytes(range(256)), bytes(range(255, -1, -1)) * 3]
    found += [bytes([byte]) for byte in range(256)]
    for character in ("é", "森", "😀", "\u2003"):
        encoded = character.encode()
        found += [encoded[:cut] for cut in range(1, len(encoded) + 1)] + [b"a" + encoded[:cut] for cut in (1, 2, 3)]
    found += [b"'", b"'s", b"'l", b"'ll", b"'\xc5", b"'\xc5\xbf", b" '", b"\r", b" \n", b" \n ", b"\n \n a"]
    for length in LENGTHS:
        for letters in (b"a", b"ab", b"acgt", b" ", b"\n", b"1", b".", b"\xff", bytes(range(128, 192))):
            found.append(bytes(rng.choice(letters) for _ in range(length)))
            found.append(b" " + found[-1] + b" x " + found[-1])
    for _ in range(120):
        letters = rng.choice([b"ab ", b"a1.' \n", bytes(range(256)), b"\xe2\x82\xac \xf0\x9f\x98\x80a"])
        found.append(bytes(rng.choice(letters) for _ in range(rng.randrange(200))))
    return found


def exact(data: bytes) -> memoryview:
    """The bytes in memory that ends where they end, so that reading one more is noticed."""
    return memoryview(np.frombuffer(data, dtype=np.uint8).copy()) if data else memoryview(b"")


def split_and_count(fast: ModuleType, parts: list[bytes], name: str) -> None:
    """Splitting, counting and joining counts."""
    number = core.IN_CORE.index(name)
    for data in parts:
        assert fast.split(exact(data), CLASSES, number) == list(core._pieces(data, name)), (name, data)
    one, other = fast.counter(), fast.counter()
    for index, data in enumerate(parts):
        fast.count(one if index % 2 else other, exact(data), CLASSES, number, 65536)
    fast.join(one, other, 1 << 30)
    counts: Counter[bytes] = Counter()
    for data in parts:
        counts.update(core._pieces(data, name))
    learned = np.frombuffer(fast.train(one, 300, 2), dtype=np.int32).reshape(-1, 2).tolist()
    expected = merges.learn(counts, 300, lambda left, right, rank: 256 + rank)
    assert [tuple(pair) for pair in learned] == expected, name


def encode(fast: ModuleType, parts: list[bytes], name: str, rng: random.Random) -> None:
    """Encoding with learned merges, with merges in an order that no training gives, with none, with whole tokens."""
    learned = core.learn(parts, name, 200, threads=2)
    ids = list(range(256))
    rng.shuffle(ids)
    tokens = [b""] * (600 + len(learned))
    for byte, number in enumerate(ids):
        tokens[number] = bytes([byte])
    triples, made = [], list(ids)
    for left, right in learned:
        both = 500 + len(triples)  # a gap before them
        triples.append((made[left], made[right], both))
        tokens[both] = tokens[made[left]] + tokens[made[right]]
        made.append(both)
    mixed = rng.sample(triples, len(triples))
    whole = {b"ab": 300, b" x": 301, b"a" * 49: 302, b"\xff" * 8: 303}
    for order, extra in ((triples, {}), (mixed, {}), ([], {}), (triples, whole)):
        encoder = core.Encoder([*tokens], order, extra, name)
        some = parts if order is triples else [data for data in parts if len(data) < 120]
        got, again = (
            [encoder.encode(exact(data)).tolist() for data in some] for _ in range(2)
        )  # again: from the cache
        core.fast = None
        assert got == again == [encoder.encode(data).tolist() for data in some], name
        core.fast = fast


def long_pieces(fast: ModuleType, size: int) -> None:
    """One piece of `size` bytes, learned from and encoded, and more distinct pieces than the cache holds."""
    rng = random.Random(2)
    for letters in (b"a", b"acgt", b" ", b"\n"):
        data = bytes(rng.choice(letters) for _ in range(size))
        counter = fast.counter()
        fast.count(counter, exact(data), CLASSES, 0, len(data))
        assert len(fast.train(counter, 20, 2)) == 20 * 8 or len(letters) == 1
        pairs = core.learn([data[:2000]], "gpt2", 50)
        tokens, triples = [bytes([byte]) for byte in range(256)], []
        for left, right in pairs:
            triples.append((left, right, len(tokens)))
            tokens.append(tokens[left] + tokens[right])
        encoder = core.Encoder(tokens, triples, {}, "gpt2")
        ids = encoder.encode(exact(data))
        assert b"".join(map(tokens.__getitem__, ids.tolist())) == data
        ids = encoder.encode(exact(data[:5000]))
        core.fast = None
        assert np.array_equal(encoder.encode(data[:5000]), ids)
        core.fast = fast
    numbers = b"".join(b" %d" % number for number in range(150_000))
    encoder = core.Encoder([bytes([byte]) for byte in range(256)], [], {}, "gpt2")
    for _ in range(2):
        assert encoder.encode(exact(numbers)).astype(np.uint8).tobytes() == numbers


if __name__ == "__main__":
    fast_core = load(sys.argv[1])
    core.fast = fast_core
    for pattern in core.IN_CORE:
        generator = random.Random(pattern)
        nasty = inputs(generator)
        split_and_count(fast_core, nasty, pattern)
        encode(fast_core, nasty, pattern, generator)
    long_pieces(fast_core, 50_000)
    print("the same as the reference")
