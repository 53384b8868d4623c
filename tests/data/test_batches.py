"""The order of training: every token once an epoch, at a place that depends on nothing but the seed and the cursor."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.data.batches import Batch, Batches, Cursor, cut
from quire.data.pairs import Pairs
from quire.layers.cross_entropy import IGNORED
from quire.training.distributed import World

quick = settings(max_examples=60, deadline=None)
lengths, contexts, seeds = st.integers(2, 60), st.integers(1, 17), st.integers(0, 1000)


def stream(length: int, context: int, seed: int = 0) -> Batches:
    """Token i is the number i, so that every window says where it comes from."""
    return Batches(np.arange(length, dtype=np.int32), context, seed)


def rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    return list(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True))


def whole_epoch(batches: Batches, number: int) -> Batch:
    return batches.take(Cursor(number, 0), len(batches.epoch(number)[1]))


@quick
@given(lengths, contexts, seeds, st.integers(0, 4))
def test_each_epoch_predicts_every_token_once(length, context, seed, epoch):
    batch = whole_epoch(stream(length, context, seed), epoch)
    counted = batch.targets != IGNORED
    assert sorted(batch.targets[counted].tolist()) == list(range(1, length))
    assert torch.equal(batch.inputs[counted], batch.targets[counted] - 1)  # predicted from what stands before it
    assert batch.counted == int(counted.sum()) == length - 1
    assert batch.inputs.shape == batch.targets.shape == (len(batch.inputs), context)
    assert counted.any(1).all()  # no window without a prediction
    assert (counted[:, :1].all(1) & (counted.int().diff(dim=1) <= 0).all(1)).all()  # filled up at the end only


@quick
@given(lengths, contexts, seeds, st.integers(1, 5), st.integers(1, 7), st.integers(1, 20))
def test_one_at_a_time_or_many_or_from_any_cursor(length, context, seed, epoch, size, count):
    """`count` batches of `size` are the same examples however they are taken, across the ends of epochs."""
    start = Cursor(epoch, 0)
    cursor = replace(start)
    batches = stream(length, context, seed)
    many = [batches.take(cursor, size) for _ in range(count)]

    other, single, places = stream(length, context, seed), replace(start), []
    for row in [row for batch in many for row in rows(batch)]:
        places.append(replace(single))
        assert rows(other.take(single, 1)) == [row]
    assert single == cursor

    for number in (0, len(places) // 2, len(places) - 1):  # a fresh object, as after a resume
        resumed = stream(length, context, seed).take(replace(places[number]), len(places) - number)
        assert rows(resumed) == [row for batch in many for row in rows(batch)][number:]


@quick
@given(lengths, contexts, seeds, st.integers(1, 4), st.integers(1, 4))
def test_accumulation_only_splits(length, context, seed, size, parts):
    cursor, together = Cursor(), Cursor()
    small = [stream(length, context, seed).take(cursor, size) for _ in range(parts)]
    whole = stream(length, context, seed).take(together, size * parts)
    split = whole.split(parts)
    assert [rows(batch) for batch in split] == [rows(batch) for batch in small]
    assert [batch.counted for batch in split] == [batch.counted for batch in small]
    assert sum(batch.counted for batch in split) == whole.counted
    assert cursor == together


@quick
@given(lengths, contexts, seeds)
def test_the_first_grid_begins_at_the_first_token(length, context, seed):
    batches = stream(length, context, seed)
    assert batches.epoch(0)[0] == 0
    assert batches.examples() == -(-(length - 1) // context)
    starts = {inputs[0] for inputs, _ in rows(whole_epoch(batches, 0))}
    assert starts == set(range(0, length - 1, context))


def test_epochs_and_seeds_differ():
    batches = stream(1000, 10, seed=1)
    orders = [rows(whole_epoch(batches, epoch)) for epoch in range(6)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    offsets = [batches.epoch(epoch)[0] for epoch in range(40)]
    assert set(offsets) == set(range(10))  # every place of the grid comes up
    assert rows(whole_epoch(stream(1000, 10, seed=2), 0)) != orders[0]
    assert rows(whole_epoch(stream(1000, 10, seed=1), 0)) == orders[0]
    assert sorted(orders[0]) != orders[0]  # shuffled


def test_cut_fills_up_with_what_is_ignored():
    batch = cut(np.array([5, 6, 7, 8], dtype=np.uint16), [slice(0, 3), slice(2, 3)], 3)
    assert batch.inputs.tolist() == [[5, 6, 7], [7, 0, 0]]
    assert batch.targets.tolist() == [[6, 7, 8], [8, IGNORED, IGNORED]]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.counted == 4


# ---- shared by several processes ----


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_each_process_reads_only_its_part(size):
    """Shares are disjoint, together they are the batch, and no token of another's is read."""

    class Watched(np.ndarray):
        read: set[int]

        def __getitem__(self, place: Any) -> Any:
            if isinstance(place, slice):
                self.read.update(range(*place.indices(len(self))))
            return np.asarray(super().__getitem__(place))

    tokens = np.arange(1000)
    after = Cursor(3, 100)
    whole = Batches(tokens, 8, 1).take(after, 30)
    inputs, reads = [], []
    for rank in range(size):
        watched = tokens.view(Watched)
        watched.read = set()
        cursor = Cursor(3, 100)
        batch = Batches(watched, 8, 1).take(cursor, 30, World(rank, size).share(30))
        assert batch.among == whole.counted and cursor == after
        assert batch.counted == int((batch.targets >= 0).sum())
        inputs.append(batch.inputs)
        reads.append(watched.read)
    assert torch.equal(torch.cat(inputs), whole.inputs)
    assert max(map(len, reads)) <= 9 * -(-30 // size)  # of 1,000 tokens, those of its own windows


def test_pairs_are_shared_too():
    tokens = np.array([0, 1, 2, 0, 3, 0, 4, 0, 5, 6, 0, 7, 7, 0, 8])
    whole = Pairs(tokens, 0, 8, 1, True).take(Cursor(), 3)
    parts = [Pairs(tokens, 0, 8, 1, True).take(Cursor(), 3, World(rank, 2).share(3)) for rank in range(2)]
    assert sum(part.counted for part in parts) == whole.counted == parts[0].among == parts[1].among
