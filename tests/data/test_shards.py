"""Token shards: the same stream however it is cut, in however many processes, killed or damaged on the way."""

import json
import os
import random
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.data import documents as on_disk
from quire.data import encode, shards
from quire.data import prepare as preparing
from quire.data.batches import Batches, Cursor
from quire.data.prepare import prepare
from quire.data.shards import TokenStream, plan
from quire.data.spool import Corpus
from quire.errors import UserError
from quire.layers.cross_entropy import IGNORED
from quire.tokenizers import CharacterTokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- a stream in parts ----


def in_parts(tokens: np.ndarray, size: int) -> TokenStream:
    return TokenStream([tokens[i : i + size] for i in range(0, len(tokens), size)])


@given(st.integers(0, 40), st.integers(1, 12), st.integers(-45, 45), st.integers(-45, 45))
def test_slices_across_parts_are_slices_of_the_whole(length, size, start, stop):
    tokens = np.arange(length, dtype=np.uint16)
    stream = in_parts(tokens, size)
    assert len(stream) == length and np.array_equal(np.asarray(stream), tokens) and list(stream) == list(tokens)
    for place in (slice(start, stop), slice(start, None), slice(None, stop)):
        assert isinstance(stream[place], np.ndarray) and np.array_equal(stream[place], tokens[place])
        assert stream[place].dtype == (tokens.dtype if length else stream.dtype)
    if -length <= start < length:
        assert stream[start] == tokens[start]
    else:
        with pytest.raises(IndexError):
            stream[start]


def test_the_order_of_examples_over_200_random_combinations():
    """No token skipped, none twice, in the order that one array gives, through any number of stops."""
    generator = random.Random(0)
    for _ in range(200):
        length, size = generator.randint(2, 400), generator.randint(1, 90)
        context, batch = generator.randint(1, 40), generator.randint(1, 9)
        seed, epoch = generator.randint(0, 10**9), generator.randint(0, 5)
        tokens = np.arange(length, dtype=np.uint16)
        whole, parted = Batches(tokens, context, seed), Batches(in_parts(tokens, size), context, seed)
        one, other = Cursor(epoch, 0), Cursor(epoch, 0)
        windows = len(whole.epoch(epoch)[1])
        stops = set(generator.choices(range(windows), k=generator.randint(0, 4)))
        seen: list[int] = []
        for taken in range(0, windows, batch):
            count = min(batch, windows - taken)
            if stops & set(range(taken, taken + count)):  # a resume: fresh objects, another cut into parts
                parted = Batches(in_parts(tokens, generator.randint(1, 90)), context, seed)
                other = Cursor(other.epoch, other.position)
            mine, theirs = whole.take(one, count), parted.take(other, count)
            assert mine.inputs.equal(theirs.inputs) and mine.targets.equal(theirs.targets) and one == other
            seen += theirs.targets[theirs.targets != IGNORED].tolist()
        assert sorted(seen) == list(range(1, length)) and one == Cursor(epoch + 1, 0)


# ---- what a shard holds ----

WORDS = st.lists(st.sampled_from(["a ", "bc. ", "éé\n", " ", "\n", "森 森"]), min_size=1, max_size=40).map("".join)


def pieces_of(text: str) -> list[str]:
    """What a tokenizer may take together at most: a word with a space before it; whitespace that no word takes."""
    return re.findall(r" ?[^\s]+|\s+(?!\S)|\s", text)


@settings(deadline=None, max_examples=60)
@given(st.lists(WORDS.filter(str.strip), min_size=1, max_size=8), st.integers(100, 200), st.integers(5, 90))
def test_the_spans_are_the_text_cut_where_encoding_does_not_notice(texts, size, block):
    texts = [text + "the end" for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHORT", 20)
        patch.setattr(on_disk, "BLOCK", block)
        patch.setattr(on_disk, "ROWS", 3)
        documents = Corpus.of(texts).documents
        spans = plan(documents, size)
        assert spans == plan(Corpus.of(texts).documents, size)
        assert spans[0][0] == (0, 0) and spans[-1][1] == (len(texts), 0)
        assert all(one[1] == other[0] for one, other in pairwise(spans))
        found: list[list[str]] = []
        for begin, end in spans:
            parts = list(documents.pieces(begin, end))
            assert 0 < sum(len(text.encode()) for _, text in parts) <= size + 100
            for begins, text in parts:
                if begins:
                    found.append([])
                found[-1].append(text)
    assert ["".join(parts) for parts in found] == texts
    for parts, text in zip(found, texts, strict=True):
        assert [piece for part in parts for piece in pieces_of(part)] == pieces_of(text)


def test_text_without_a_place_to_cut_is_cut_all_the_same():
    documents = Corpus.of(["森" * 1000]).documents
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SHORT", 20)
        spans = plan(documents, 100)
    parts = ["".join(text for _, text in documents.pieces(*span)) for span in spans]
    assert "".join(parts) == "森" * 1000 and max(map(len, parts)) <= 34


def test_long_stretches_are_held_in_blocks(monkeypatch):
    """A document of one letter, then of words, with small limits: nothing is lost, and no block is much longer."""
    monkeypatch.setattr(on_disk, "BLOCK", 10)
    monkeypatch.setattr(on_disk, "LONGEST_STRETCH", 50)
    text = "x" * 1234 + " and words" * 20
    blocks = list(Corpus.of([text]).documents.texts())
    assert "".join(blocks) == text and max(map(len, blocks)) <= 70


TEXTS = [f"Document {i}: " + "süß und kurz, " * (i % 7) + "\nEnde.\n" * (i % 3 + 1) for i in range(60)]
TEXTS[30] = "Ein langer Text mit vielen Wörtern, der nicht in ein Stück passt.\n" * 60


def expected(tokenizer: CharacterTokenizer, texts: list[str]) -> list[int]:
    return [token for text in texts for token in [tokenizer.separator, *tokenizer.encode(text)]]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("tokens/*/*")}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of about 1,000 bytes; documents of more than 500 are cut."""
    monkeypatch.setattr(shards, "SHARD", 1000)
    monkeypatch.setattr(shards, "SHORT", 500)


def test_shards_are_the_stream_in_one_process_or_in_three(small, cache, monkeypatch, tmp_path):
    monkeypatch.setattr(encode, "usable_cores", lambda: 1)
    corpus = Corpus.of(TEXTS)
    corpus.arguments = [("one", 0, 10), ("two", 10, 40), ("three", 40, 60)]
    found = prepare(corpus, "character")
    count = found.report["training_documents"]
    training, held_out = (list(part) for part in preparing.split(corpus.documents)[:2])
    assert found.training[:].tolist() == expected(found.tokenizer, training) and len(training) == count
    assert found.validation[:].tolist() == expected(found.tokenizer, held_out)
    assert len(found.training.parts) > 5 and found.training.dtype == np.uint16
    for name, first, last in corpus.arguments:
        assert found.ranges[name] == tuple(len(expected(found.tokenizer, training[:n])) for n in (first, last))
    one = contents(cache)
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(encode, "usable_cores", lambda: 3)
    prepare(Corpus.of(TEXTS), "character")
    assert contents(tmp_path / "other") == one and "finished.jsonl" not in one


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    found = {path.name: path.stat() for path in folder.glob("tokens/*/*-*")}
    return {name: (status.st_ino, status.st_mtime_ns) for name, status in found.items()}


KILLED = """
import json, os, signal, sys
from quire import files
from quire.data import encode, prepare, shards
from quire.data.spool import Corpus

shards.SHARD, shards.SHORT = 1000, 500
encode.usable_cores = lambda: int(sys.argv[2])
append_line = files.append_line

def append_and_die(path, line):
    append_line(path, line)
    os.kill(os.getpid(), signal.SIGKILL)

files.append_line = append_and_die
prepare.prepare(Corpus.of(json.loads(sys.argv[1])), "character")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="POSIX signals")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_call_after_a_kill_gives_the_same_bytes_and_repeats_nothing(small, cache, monkeypatch, tmp_path, processes):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", KILLED, json.dumps(TEXTS), str(processes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (log,) = cache.glob("tokens/*/finished.jsonl")
    names = [json.loads(line)["name"] for line in log.read_text().splitlines()]
    assert len(names) == 1
    before = {name: stamp for name, stamp in stamps(cache).items() if name.startswith(names[0])}
    assert len(before) == 2
    monkeypatch.setattr(encode, "usable_cores", lambda: 2)
    again = prepare(Corpus.of(TEXTS), "character")
    assert before.items() <= stamps(cache).items()
    monkeypatch.setenv("QUIRE_CACHE", str(tmp_path / "straight"))
    straight = prepare(Corpus.of(TEXTS), "character")
    assert contents(cache) == contents(tmp_path / "straight")
    assert np.array_equal(again.training, straight.training)
    assert len(contents(cache)) == 2 * len(straight.training.parts) + 2 * len(straight.validation.parts) + 2


@pytest.mark.parametrize("end", [".bin", ".starts"])
def test_only_what_is_damaged_is_done_again(small, cache, end):
    prepare(Corpus.of(TEXTS), "character")
    before, whole = stamps(cache), contents(cache)
    (path,) = cache.glob(f"tokens/*/training-00000{end}")
    data = bytearray(path.read_bytes())
    data[5] ^= 16
    path.write_bytes(data)
    prepare(Corpus.of(TEXTS), "character")
    after = stamps(cache)
    assert contents(cache) == whole
    assert {name for name in after if after[name] != before[name]} == {"training-00000.bin", "training-00000.starts"}


# ---- what goes wrong in another process ----


def test_a_mistake_found_by_another_process_is_a_mistake_here(small, monkeypatch, tmp_path):
    monkeypatch.setattr(encode, "usable_cores", lambda: 2)
    CharacterTokenizer.train(["".join(TEXTS).replace("ß", "")]).save(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match="lacks 'ß'"):
        prepare(Corpus.of(TEXTS), str(tmp_path / "tokenizer.json"), settled=True)  # nobody has looked before


def test_a_process_that_ends_is_told_of(small, monkeypatch):
    start = encode._start

    def ended(saved: Path) -> "subprocess.Popen[str]":
        worker = start(saved)
        worker.kill()
        return worker

    monkeypatch.setattr(encode, "usable_cores", lambda: 2)
    monkeypatch.setattr(encode, "_start", ended)
    with pytest.raises(UserError, match="A process that encoded the text ended"):
        prepare(Corpus.of(TEXTS), "character")


def test_a_process_that_encodes_imports_no_torch():
    script = "import sys, quire.data.encode, quire.data.prepare, quire.data.reading; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
