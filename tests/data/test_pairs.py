"""Pairs: what is read as such, what is held out, what a model is given, in which order."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.data.batches import Batch, Cursor
from quire.data.encode import stream
from quire.data.pairs import ALIKE, Pairs
from quire.data.prepare import Prepared, prepare, split
from quire.data.reading import DataSettings, read
from quire.data.spool import Corpus
from quire.errors import UserError
from quire.layers.cross_entropy import IGNORED
from quire.tokenizers import CharacterTokenizer

quick = settings(max_examples=60, deadline=None)
SEPARATOR = 0
PAIRS = st.lists(
    st.tuples(*[st.lists(st.integers(1, 9), min_size=1, max_size=7)] * 2), min_size=1, max_size=30
)  # of token ids


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and an empty cache."""
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- reading ----


def documents(name: str, data: bytes | str, **how: str) -> list[str]:
    Path(name).write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read([name], DataSettings(pairs=name, **how)).documents)


def test_a_line_is_a_source_a_tab_and_a_target():
    assert documents("a.tsv", "one\teins\ntwo \t zwei\n") == ["one", "eins", "two ", " zwei"]
    assert documents("b.txt", "one\teins\n\n   \ntwo\tzwei") == ["one", "eins", "two", "zwei"]  # blank lines: nothing
    assert documents("c.tsv", b"\xef\xbb\xbfone\teins\r\ntwo\tzwei\r\n") == ["one", "eins", "two", "zwei"]
    assert documents("d.tsv", "über\tfi\n".encode("latin-1"), encoding="latin-1") == ["über", "fi"]


def test_a_jsonl_line_has_both_fields():
    lines = [{"source": "a\tb\nc", "target": "x", "more": 1}, {"target": "z", "source": "y"}]
    assert documents("a.jsonl", "\n\n".join(map(json.dumps, lines))) == ["a\tb\nc", "x", "y", "z"]


MISTAKES = {
    "no tab": ("a.tsv", "one\teins\ntwo zwei\n", r"a\.tsv, line 2, has no tab. A line .* is: source, tab, target"),
    "two tabs": ("a.tsv", "one\teins\tuno\n", r"line 1, has 2 tabs.*\.jsonl"),
    "no source": ("a.tsv", "one\teins\n\tzwei\n", "line 2: the source is empty. Give it a text, or take the line out"),
    "no target": ("a.tsv", "one\t \n", "line 1: the target is empty"),
    "nothing": ("a.tsv", "\n\n", "holds nothing but whitespace"),
    "an empty file": ("a.tsv", "", "is empty"),
    "binary": ("a.tsv", b"one\t\x00\x01eins\n", "binary"),
    "no JSON": ("a.jsonl", "one\teins\n", "line 1, is not JSON"),
    "no object": ("a.jsonl", '["one", "eins"]', "line 1, is not a JSON object"),
    "a field less": ("a.jsonl", '{"source": "one"}', "line 1: 'target' is missing. A line of pairs is"),
    "a number": ("a.jsonl", '{"source": 1, "target": "eins"}', "line 1: 'source' is not a text"),
    "an empty field": ("a.jsonl", '{"source": "one", "target": ""}', "line 1: the target is empty"),
    "parquet": ("a.parquet", "", r"from \.tsv and \.jsonl files, not from a\.parquet"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_line_that_is_no_pair_is_named(name):
    path, data, sentence = MISTAKES[name]
    with pytest.raises(UserError, match=sentence):
        documents(path, data)


def test_a_file_that_is_not_there_and_a_task_misspelt():
    with pytest.raises(UserError, match=r"no file of pairs named 'revers'. Did you mean reverse.* Known tasks: copy, "):
        read(["revers"], DataSettings(pairs="revers"))
    with pytest.raises(UserError, match="no file, folder or corpus named 'reverse'"):
        read(["reverse"], DataSettings())  # a task is no text
    with pytest.raises(UserError, match="no file of pairs named 'shakespeare'"):
        read(["shakespeare"], DataSettings(pairs="shakespeare"))  # and a text is no task


# ---- what is held out ----


def corpus(pairs: list[tuple[str, str]]) -> Corpus:
    return Corpus.of((text for pair in pairs for text in pair), group=2)


@quick
@given(
    st.lists(st.tuples(st.text("ab", min_size=1, max_size=9), st.text("xy", min_size=1, max_size=9)), min_size=2,
             max_size=60)
)  # fmt: skip
def test_whole_pairs_are_held_out_and_their_sources_not_trained_on(pairs):
    training, held_out, how = split(corpus(pairs).documents)
    aside = list(zip(*[iter(held_out)] * 2, strict=True))
    assert aside == pairs[len(pairs) - len(aside) :] and len(aside) >= 1
    assert how == ("the last pair" if len(aside) == 1 else f"the last {len(aside)} pairs")
    room, sizes = sum(len(a + b) for a, b in pairs) / 10, [len(a + b) for a, b in aside]
    assert len(aside) == 1 or sum(sizes) <= room
    if len(aside) < len(pairs):
        before = pairs[len(pairs) - len(aside) - 1]
        assert sum(sizes) + len("".join(before)) > room or len(aside) == 1
    sources = {source for source, _ in aside}
    assert list(zip(*[iter(training)] * 2, strict=True)) == [
        pair for pair in pairs[: len(pairs) - len(aside)] if pair[0] not in sources
    ]


def test_pairs_that_all_have_one_source_are_refused_for_that():
    with pytest.raises(UserError, match="No pair is left to train on: every source is that of a pair held out"):
        prepare(corpus([("the same source", "y")] * 300), "character")


def test_pairs_of_a_validation_file_are_left_out_by_their_sources():
    training = corpus([("a", "1"), ("b", "2"), ("a", "3"), ("c", "4"), ("1", "a")])
    digest = training.digest
    assert training.leave_out(corpus([("a", "9"), ("d", "c")]).documents.marks()) == 2
    assert list(training.documents) == ["b", "2", "c", "4", "1", "a"]
    assert training.digest != digest


def prepared(count: int = 40) -> Prepared:
    return prepare(corpus([(f"source {i}", f"target {i}") for i in range(count)]), "character")


def test_prepared_pairs_are_a_stream_of_sources_and_targets():
    found = prepared()
    tokens, separator = found.training[:], found.tokenizer.separator
    texts = [found.tokenizer.decode(part) for part in np.split(tokens, np.flatnonzero(tokens == separator))[1:]]
    assert texts[:4] == ["source 0", "target 0", "source 1", "target 1"]
    assert str(found).startswith("40 pairs, ")
    assert found.report["held_out_as"] == "the last 3 pairs"
    assert len(texts) == 74


# ---- what a model is given ----


def pairs_of(pairs: list[tuple[list[int], list[int]]], context: int = 100, seed: int = 0, **how: bool) -> Pairs:
    ids = [number for source, target in pairs for number in (SEPARATOR, *source, SEPARATOR, *target)]
    return Pairs(np.array(ids, dtype=np.uint16), SEPARATOR, context, seed, **{"reads_source": True, **how})


def rows(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Source and target of each row, after checking how they are laid out for an encoder-decoder."""
    assert batch.source is not None
    found = []
    for source, inputs, targets in zip(batch.source, batch.inputs, batch.targets, strict=True):
        source, counted = source[source != IGNORED].tolist(), targets != IGNORED
        target = targets[counted].tolist()
        assert target[-1] == SEPARATOR and inputs[counted].tolist() == [SEPARATOR, *target[:-1]]
        assert (counted[:-1] | ~counted[1:]).all() and (inputs[~counted] == 0).all()  # filled up on the right
        found.append((source, target[:-1]))
    return found


def test_an_encoder_reads_the_source_and_a_decoder_one_row():
    pairs = [([5, 6, 7], [8]), ([9], [4, 3])]
    batch = pairs_of(pairs).batch([0, 1])
    assert batch.source.tolist() == [[5, 6, 7], [9, IGNORED, IGNORED]]
    assert batch.inputs.tolist() == [[0, 8, 0], [0, 4, 3]]
    assert batch.targets.tolist() == [[8, 0, IGNORED], [4, 3, 0]]
    assert batch.counted == 5
    row = pairs_of(pairs, reads_source=False).batch([0, 1])
    assert row.source is None and row.counted == 5
    assert row.inputs.tolist() == [[0, 5, 6, 7, 0, 8], [0, 9, 0, 4, 3, 0]]
    i = IGNORED
    assert row.targets.tolist() == [[i, i, i, i, 8, 0], [i, i, 4, 3, 0, i]]
    assert row.inputs.dtype == row.targets.dtype == batch.source.dtype == torch.int64


@quick
@given(PAIRS, st.integers(1, 9), st.booleans())
def test_pairs_that_do_not_fit_the_context_are_left_out(pairs, context, reads_source):
    found = pairs_of(pairs, context, reads_source=reads_source)

    def fits(source: list[int], target: list[int]) -> bool:
        if reads_source:
            return len(source) <= context and len(target) + 1 <= context
        return len(source) + len(target) + 2 <= context

    kept = [pair for pair in pairs if fits(*pair)]
    assert [found.ids(row) for row in range(found.examples())] == kept
    assert found.left_out == len(pairs) - len(kept)
    assert len(found) == sum(len(target) + 1 for _, target in kept)


@quick
@given(PAIRS, st.integers(0, 99), st.integers(0, 3))
def test_each_epoch_takes_every_pair_once(pairs, seed, epoch):
    found, cursor = pairs_of(pairs, seed=seed), Cursor(epoch, 0)
    taken = rows(found.take(cursor, len(pairs)))
    assert sorted(taken) == sorted(pairs)
    assert cursor == Cursor(epoch + 1, 0)


@quick
@given(PAIRS, st.integers(1, 7), st.integers(1, 12), st.data())
def test_from_any_cursor_the_same_pairs_follow(pairs, size, count, data):
    found, cursor, places = pairs_of(pairs), Cursor(), []
    taken = []
    for _ in range(count):
        places.append(replace(cursor))
        taken.append(rows(found.take(cursor, size)))
    again = data.draw(st.integers(0, count - 1))
    fresh = pairs_of(pairs)  # as after a resume
    assert [rows(fresh.take(places[again], size)) for _ in range(again, count)] == taken[again:]


def test_epochs_differ_and_so_do_seeds_and_lengths_stand_together():
    generator = np.random.default_rng(1)
    pairs = [([1] * int(n), [2] * int(n)) for n in generator.integers(1, 50, size=3000)]
    found = pairs_of(pairs)
    orders = [found.epoch(number).copy() for number in range(3)]
    assert not any(np.array_equal(orders[a], orders[b]) for a, b in [(0, 1), (1, 2), (0, 2)])
    assert not np.array_equal(pairs_of(pairs, seed=1).epoch(0), orders[0])
    cursor = Cursor()
    widths = [found.take(cursor, ALIKE).source.shape[1] for _ in range(20)]
    filled = [(found.take(Cursor(0, at), ALIKE).source == IGNORED).float().mean() for at in range(0, 1280, ALIKE)]
    assert np.mean(filled) < 0.1  # of unsorted ones about half
    assert widths != sorted(widths)


@quick
@given(PAIRS, st.integers(1, 200))
def test_measuring_takes_every_pair_once(pairs, tokens):
    batches = list(pairs_of(pairs).whole(tokens))
    assert sorted(pair for batch in batches for pair in rows(batch)) == sorted(pairs)
    for batch in batches:
        width = len(batch.source[0]) + 1 + len(batch.inputs[0])
        assert len(batch.source) == 1 or len(batch.source) * width <= tokens + 16 * len(batch.source)


def test_target_bytes_are_those_of_the_targets():
    texts = [("one", "eins"), ("two", "zwei größer"), ("three", "森")]
    made = corpus(texts)
    tokenizer = CharacterTokenizer.train(made.documents, 0)
    tokens = np.concatenate(list(stream(tokenizer, made.documents.pieces())))
    found = Pairs(tokens, tokenizer.separator, 20, 0, True)
    assert found.target_bytes(tokenizer) == sum(len(target.encode()) for _, target in texts)
