"""Counting pieces in bounded memory: nothing is lost while there is room, and then the frequent ones stay."""

import random
from collections import Counter

import pytest

from quire.tokenizers import BPETokenizer, WordTokenizer, core, pieces
from quire.tokenizers.patterns import character_classes
from quire.tokenizers.pieces import PIECE, PieceCounts

compiled = pytest.mark.skipif(core.fast is None, reason="the C core is not compiled")


def texts(seed: int, number: int = 40, size: int = 300) -> list[bytes]:
    """Random words, and a few frequent ones in between; `size` words each."""
    rng = random.Random(seed)
    found = []
    for _ in range(number):
        words = ["".join(rng.choices("abcdefgh", k=rng.randrange(1, 14))) for _ in range(size)]
        words += rng.choices(["the", "water", "森林", "x" * 70], k=size // 4)
        rng.shuffle(words)
        found.append(" ".join(words).encode())
    return found


def size(counts: Counter) -> int:
    return sum(len(piece) + PIECE for piece in counts)


def kept_naively(counted: list[Counter], room: int) -> Counter:
    """The rule, share by share: the first that have room in half of it, in the order of their counts."""
    total: Counter = Counter()
    for counts in counted:
        total.update(counts)
        if size(total) > room:
            order = sorted(total, key=lambda piece: total[piece], reverse=True)
            while size(Counter(order)) > room // 2:
                order.pop()
            total = Counter({piece: total[piece] for piece in order})
    return total


def test_everything_is_counted_while_there_is_room(monkeypatch):
    parts = texts(0)
    everything: Counter = Counter()
    for part in parts:
        everything.update(part.split())
    for share in (1, 1000, 1 << 20):
        monkeypatch.setattr(pieces, "SHARE", share)
        assert PieceCounts[bytes](size(everything)).add(parts, bytes.split).counts == everything
        assert PieceCounts[bytes](size(everything) - 1).add(parts, bytes.split).counts != everything


@pytest.mark.parametrize("room", [2000, 5000, 20_000])
def test_the_most_frequent_and_of_those_the_first_stay(room, monkeypatch):
    monkeypatch.setattr(pieces, "SHARE", 1)
    parts = texts(1, 12, 100)
    kept = PieceCounts[bytes](room).add(parts, bytes.split).counts
    expected = kept_naively([Counter(part.split()) for part in parts], room)
    assert list(kept.items()) == list(expected.items())
    assert 0 < size(kept) <= room
    assert {b"the", b"water"} <= set(kept)


def test_a_text_without_repetition_is_counted_too(monkeypatch):
    """Its first pieces, rather than none."""
    monkeypatch.setattr(pieces, "SHARE", 1)
    parts = [b"%d" % number for number in range(5000)]
    kept = PieceCounts[bytes](2000).add(parts, bytes.split).counts
    assert size(kept) > 900 and b"0" in kept and b"50" in kept


def test_long_pieces_are_counted_in_parts(monkeypatch):
    monkeypatch.setattr(pieces, "LONGEST", 10)
    counts = PieceCounts[str]().add(["a" * 25 + " " + "abcdefghijklm a"], str.split).counts
    assert counts == {"a" * 10: 2, "a" * 5: 1, "abcdefghij": 1, "klm": 1, "a": 1}


@compiled
@pytest.mark.parametrize("room", [1500, 6000, 40_000])
@pytest.mark.parametrize("longest", [5, 40, 1 << 16])
def test_the_core_keeps_what_the_reference_keeps(room, longest, monkeypatch):
    monkeypatch.setattr(pieces, "SHARE", 3000)
    monkeypatch.setattr(pieces, "LONGEST", longest)
    parts = texts(2)
    fast = [core.learn(parts, "gpt2", 400, threads, room) for threads in (1, 2, 3, 7)]
    unbounded = core.learn(parts, "gpt2", 400)
    monkeypatch.setattr(core, "fast", None)
    plain = core.learn(parts, "gpt2", 400, 0, room)
    assert fast == [plain] * 4
    assert plain and plain != unbounded


@compiled
def test_a_count_in_the_core_holds_no_more_memory_however_long_the_text_is():
    fast, classes, room = core.fast, character_classes(), 20_000
    held = {}
    for bound in (room, 1 << 40):
        total = fast.counter()
        held[bound] = []
        for part in texts(3, 80):
            share = fast.counter()
            fast.count(share, part, classes, 0, pieces.LONGEST)
            fast.join(total, share, bound)
            held[bound].append(fast.held(total))
    most = 12 * (room + 5000) + 50_000  # a piece takes 9 of the room and 96 bytes, a table that is new 50,000
    assert max(held[room]) < most < held[1 << 40][-1]


def test_words_and_bpe_are_learned_from_what_has_room(monkeypatch):
    parts = [part.decode() for part in texts(4)]
    monkeypatch.setattr(pieces, "SHARE", 3000)
    for kind in (WordTokenizer, BPETokenizer):
        whole = kind.train(parts, 700)
        with monkeypatch.context() as patched:
            patched.setattr(pieces, "ROOM_IN_PYTHON", 3000)
            bounded = kind.train(parts, 700)
        assert bounded.to_table() != whole.to_table()
        assert bounded.decode(bounded.encode_array(parts[0])) == parts[0]
