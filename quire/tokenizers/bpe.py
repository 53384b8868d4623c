"""Byte-pair encoding of words with end marks (Sennrich, Haddow and Birch 2016), first as steps, then as a tokenizer.

The steps, on a vocabulary of words whose symbols are separated by spaces (section 3.2 of the paper):

    vocab = build_vocab(corpus)                      {"l o w </w>": 5, "l o w e r </w>": 2, ...}
    for _ in range(merges):
        pairs = get_stats(vocab)                     {("l", "o"): 7, ("o", "w"): 7, ...}
        best = max(pairs, key=pairs.get)
        vocab = merge_vocab(best, vocab)             {"lo w </w>": 5, "lo w e r </w>": 2, ...}
    sorted_tokens = get_tokens(vocab)
    token2id = {token: number for number, token in enumerate(sorted_tokens)}
    tokenize("lower lows", sorted_tokens, token2id, return_strings=True)

BPETokenizer learns the same merges in a fraction of the time, keeps white space, and spells what it has not seen.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from quire.errors import UserError, choose
from quire.tokenizers import merges
from quire.tokenizers.patterns import splitter
from quire.tokenizers.pieces import PieceCounts
from quire.tokenizers.tokenizer import BytesTokenizer, Unknown, utf8
from quire.tokenizers.word import FIRST_BYTE, FIRST_PIECE, SPECIALS, ranked, room_for_pieces, spelled

END = "</w>"  # the end of a word
PAD, UNKNOWN = "<pad>", "<unk>"  # of `tokenize`

# ---- the published steps ------------------------------------------------------------------------------------------


def build_vocab(corpus: str) -> dict[str, int]:
    """The words of a text with their counts, each as its characters and an end mark, separated by spaces."""
    return dict(Counter(" ".join([*word, END]) for word in corpus.split()))


def get_stats(vocab: dict[str, int]) -> dict[tuple[str, str], int]:
    """How often each pair of neighbouring symbols occurs, in the order in which they are first met."""
    pairs: dict[tuple[str, str], int] = {}
    for word, count in vocab.items():
        symbols = word.split(" ")
        for pair in pairwise(symbols):
            pairs[pair] = pairs.get(pair, 0) + count
    return pairs


def merge_vocab(pair: tuple[str, str], vocab: dict[str, int]) -> dict[str, int]:
    """The vocabulary with the pair written as one symbol, wherever it stands."""
    apart, joined = " ".join(pair), "".join(pair)
    return {
        " ".join(merges.merged(word.split(" "), pair, joined)) if apart in word else word: count
        for word, count in vocab.items()
    }


def get_tokens(vocab: dict[str, int]) -> list[str]:
    """The distinct symbols of a vocabulary, the longest first; of equal length in the order of the alphabet."""
    symbols = {symbol for word in vocab for symbol in word.split(" ")}
    return sorted(symbols, key=lambda symbol: (-len(symbol.removesuffix(END)), symbol))


class Tokenized(NamedTuple):
    """Tokens, or their ids, a row for each text, and where they are tokens (1) and where padding (0)."""

    tokens: list[list[Any]]
    attention_mask: list[list[int]]


def tokenize(
    text: str | Sequence[str], sorted_tokens: Sequence[str], token2id: dict[str, int], return_strings: bool = False
) -> Tokenized:
    """Each word of a text as the longest token that fits, then the longest that fits what is left, and so on.

    Several texts make several rows, the short ones padded by `<pad>` (id: token2id["<pad>"], else 0). A character
    that no token covers is `<unk>`; a UserError where ids are asked for and token2id has none for it.
    """
    rows = []
    for one in [text] if isinstance(text, str) else text:
        rows.append([token for word in one.split() for token in _longest_first(word + END, sorted_tokens)])
    width = max(map(len, rows), default=0)
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    if return_strings:
        return Tokenized([row + [PAD] * (width - len(row)) for row in rows], mask)
    missing = sorted({token for row in rows for token in row if token not in token2id})
    if missing:
        raise UserError(f"token2id has no {missing[0]!r}: give it one, or take out of the text what no token covers.")
    padding = token2id.get(PAD, 0)
    return Tokenized([[token2id[token] for token in row] + [padding] * (width - len(row)) for row in rows], mask)


def _longest_first(word: str, sorted_tokens: Sequence[str]) -> list[str]:
    found, tokens, longest = [], set(sorted_tokens), max(map(len, sorted_tokens), default=0)
    while word:
        fits = (word[:length] for length in range(min(longest, len(word)), 0, -1))
        token = next((candidate for candidate in fits if candidate in tokens), UNKNOWN)
        found.append(token)
        word = word[1 if token == UNKNOWN else len(token) :]
        if word == END and END not in tokens:  # the mark of a word whose last letter no token covers
            break
    return found


# ---- the tokenizer ------------------------------------------------------------------------------------------------

Rule = Literal["published", "subword-nmt"]
RULES: dict[Rule, tuple[merges.Ties, bool]] = {  # which of equally frequent pairs, and whether the mark stands alone
    "published": ("first", True),  # the steps above: max() takes the first; "l o w </w>"
    "subword-nmt": ("largest", False),  # the authors' own program: the largest; "l o w</w>"
}
SIZE = 4096  # tokens, where no size is given
SPACES = 32  # runs of white space that become tokens, at most


class BPETokenizer(BytesTokenizer):
    """Words as the parts that merging has made of them. White space is kept, each frequent run of it a token.

    A character that training has not seen is spelled by its UTF-8 bytes. `rule` says how pairs are chosen and where
    the end mark stands (RULES); `learned` are the merges, first to last.
    """

    kind = "bpe"
    padding, separator = range(FIRST_BYTE)

    def __init__(
        self,
        rule: Rule,
        spaces: list[str],
        characters: list[str],
        learned: list[tuple[str, str]],
        added: Sequence[str] = (),
    ) -> None:
        """`added` are characters that came later: their ids are the last ones, and no merge has them."""
        self.rule, self.spaces, self.characters, self.learned, self.added = rule, spaces, characters, learned, added
        made = [left + right for left, right in learned]
        alone = [END] if RULES[rule][1] else []
        pieces = list(dict.fromkeys([*spaces, *self._forms(characters), *alone, *made, *self._forms(added)]))
        self.tokens = [b"" for _ in SPECIALS] + [bytes([byte]) for byte in range(256)]
        self.tokens += [utf8(piece.removesuffix(END)) for piece in pieces]
        self.vocabulary_size = len(self.tokens)
        self._ids = {piece: number for number, piece in enumerate(pieces, FIRST_PIECE)}
        self._names = pieces
        self._ranks = {pair: (rank, both) for rank, (pair, both) in enumerate(zip(learned, made))}
        self._cache: dict[str, list[int]] = {}

    def _forms(self, characters: Sequence[str]) -> list[str]:
        """The symbols that a character can be: itself, and with a mark that does not stand alone, the marked one."""
        return list(characters) if RULES[self.rule][1] else [form for c in characters for form in (c, c + END)]

    @classmethod
    def train(
        cls, texts: Iterable[str], vocabulary_size: int = 0, rule: Rule = "subword-nmt", count: int = 0
    ) -> "BPETokenizer":
        """`count` merges, or as many as fill the vocabulary; of the pieces those count for which pieces.py has room."""
        choose("--rule", rule, list(RULES))
        pieces = PieceCounts[str]().add(texts, splitter("space").findall).counts
        spaces = Counter({piece: number for piece, number in pieces.items() if piece.isspace()})
        words = {piece: number for piece, number in pieces.items() if not piece.isspace()}
        seen: Counter[str] = Counter()
        for word, number in words.items():
            for character in word:
                seen[character] += number
        room = room_for_pieces(cls.kind, vocabulary_size or SIZE)
        if count:
            room = 1 << 60
        blanks = ranked(spaces)[: min(SPACES, room // 2)]
        characters = ranked(seen)[: (room - len(blanks)) // 4]
        base = cls(rule, blanks, characters, [])
        ties, _ = RULES[rule]
        rows = {base._symbols(word): number for word, number in words.items()}
        wanted = count or room + FIRST_PIECE - base.vocabulary_size
        learned = merges.learn(_within(rows, base._ids), max(0, wanted), lambda left, right, _: left + right, ties)
        return cls(rule, blanks, characters, learned)

    def encode_array(self, text: str, unknown: Unknown = "error") -> np.ndarray:
        utf8(text)
        ids: list[int] = []
        for piece in splitter("space").findall(text):
            if (known := self._cache.get(piece)) is None:
                known = self._encode_piece(piece)
                if len(self._cache) >= 1 << 16:
                    self._cache.clear()
                self._cache[piece] = known
            ids += known
        return np.array(ids, dtype=np.int32)

    def _encode_piece(self, piece: str) -> list[int]:
        if piece.isspace():
            if piece in self._ids:
                return [self._ids[piece]]
            return [number for character in piece for number in spelled(character, self._ids)]
        ids: list[int] = []
        for symbol in merges.apply(self._symbols(piece), self._ranks):
            known = self._ids.get(symbol)
            ids += [known] if known is not None else spelled(symbol.removesuffix(END), {})
        return ids

    def _symbols(self, word: str) -> tuple[str, ...]:
        alone = RULES[self.rule][1]
        return (*word, END) if alone else (*word[:-1], word[-1] + END)

    def name(self, token: int) -> str:
        return self._names[token - FIRST_PIECE] if token >= FIRST_PIECE else super().name(token)

    def unknown(self, text: str) -> Counter[str]:
        known = {*self.characters, *self.spaces, *self.added}
        return Counter(character for character in text if character not in known)

    def grown(self, pieces: Iterable[str]) -> "BPETokenizer":
        new = sorted(set(pieces) - {*self.characters, *self.spaces, *self.added})
        return BPETokenizer(self.rule, self.spaces, self.characters, self.learned, [*self.added, *new])

    def to_table(self) -> dict[str, Any]:
        return {
            "rule": self.rule,
            "spaces": self.spaces,
            "characters": self.characters,
            "merges": [list(pair) for pair in self.learned],
            "added": list(self.added),
        }

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> "BPETokenizer":
        learned = [(left, right) for left, right in table["merges"]]
        return cls(table["rule"], table["spaces"], table["characters"], learned, table["added"])


def _within(rows: dict[tuple[str, ...], int], known: dict[str, int]) -> dict[tuple[str, ...], int]:
    """The words, cut where a character is too rare to be a token: no merge may touch it."""
    parts: Counter[tuple[str, ...]] = Counter()
    for row, number in rows.items():
        part: list[str] = []
        for symbol in row:
            if symbol in known:
                part.append(symbol)
            else:
                parts[tuple(part)] += number
                part = []
        parts[tuple(part)] += number
    return parts
