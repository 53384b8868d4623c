"""Byte-pair encoding with end marks: the published steps, the authors' program, and texts that come back."""

import io

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

from quire.errors import UserError
from quire.tokenizers.bpe import (
    END,
    PAD,
    RULES,
    UNKNOWN,
    BPETokenizer,
    build_vocab,
    get_stats,
    get_tokens,
    merge_vocab,
    tokenize,
)
from quire.tokenizers.word import FIRST_BYTE, FIRST_PIECE

quick = settings(max_examples=50, deadline=None)
EXAMPLE = "low " * 5 + "lower " * 2 + "newest " * 6 + "widest " * 3  # of the paper's algorithm 1
words = st.text(st.sampled_from("aab bc\n</w>é森"), max_size=60)


def published(corpus: str, number: int) -> tuple[list[tuple[str, str]], dict[str, int]]:
    """The steps as they are published, one by one."""
    vocab, learned = build_vocab(corpus), []
    for _ in range(number):
        pairs = get_stats(vocab)
        if not pairs:
            break
        best = max(pairs, key=pairs.get)
        if pairs[best] < 2:
            break
        vocab = merge_vocab(best, vocab)
        learned.append(best)
    return learned, vocab


# ---- the published steps ----


def test_the_steps_on_the_example_of_the_paper():
    vocab = build_vocab(EXAMPLE)
    assert vocab == {"l o w </w>": 5, "l o w e r </w>": 2, "n e w e s t </w>": 6, "w i d e s t </w>": 3}
    pairs = get_stats(vocab)
    assert pairs["e", "s"] == pairs["s", "t"] == pairs["t", END] == 9 and pairs["l", "o"] == 7 and pairs["w", "e"] == 8
    assert list(pairs)[:3] == [("l", "o"), ("o", "w"), ("w", END)]
    learned, vocab = published(EXAMPLE, 10)
    assert learned[:5] == [("e", "s"), ("es", "t"), ("est", END), ("l", "o"), ("lo", "w")]
    assert vocab == {"low</w>": 5, "low e r </w>": 2, "newest</w>": 6, "wi d est</w>": 3}


def test_a_pair_is_merged_only_where_whole_symbols_stand():
    vocab = {"a b ab </w>": 2, "x a by </w>": 1, "a a a </w>": 1}
    assert merge_vocab(("a", "b"), vocab) == {"ab ab </w>": 2, "x a by </w>": 1, "a a a </w>": 1}
    assert merge_vocab(("a", "a"), vocab) == {"a b ab </w>": 2, "x a by </w>": 1, "aa a </w>": 1}


def test_tokens_of_texts_with_masks():
    _, vocab = published(EXAMPLE, 10)
    tokens = get_tokens(vocab)
    assert tokens == ["newest</w>", "est</w>", "low", "low</w>", "wi", "d", "e", "r", "</w>"]
    token2id = {token: number for number, token in enumerate(tokens)}
    shown = tokenize("lower lowest wide", tokens, token2id, return_strings=True)
    assert shown.tokens == [["low", "e", "r", END, "low", "est</w>", "wi", "d", "e", END]]
    assert shown.attention_mask == [[1] * 10]
    rows, mask = tokenize(["low newest", "", "we low"], tokens, {**token2id, PAD: 77, UNKNOWN: 78})
    assert mask == [[1, 1, 0, 0, 0][: len(rows[0])], [0] * len(rows[0]), [1] * len(rows[0])]
    assert rows[0] == [token2id["low</w>"], token2id["newest</w>"]] + [77] * (len(rows[0]) - 2)
    assert rows[1] == [77] * len(rows[0])
    assert rows[2] == [78, token2id["e"], token2id[END], token2id["low</w>"]]
    assert tokenize(["low", "low low"], tokens, token2id).tokens[0] == [token2id["low</w>"], 0]


def test_a_character_without_a_token_is_unknown_or_refused():
    tokens = ["a", END]
    assert tokenize("aéa é", tokens, {}, return_strings=True).tokens == [["a", UNKNOWN, "a", END, UNKNOWN, END]]
    with pytest.raises(UserError, match="token2id has no '<unk>'"):
        tokenize("aéa", tokens, {"a": 0, END: 1})
    assert tokenize("é", ["a"], {"a": 0, UNKNOWN: 1}).tokens == [[1]]
    assert tokenize("", tokens, {}).tokens == [[]] == tokenize([""], tokens, {}).attention_mask
    assert tokenize([], tokens, {}) == ([], [])


@quick
@given(st.text("ab c", max_size=40), st.integers(0, 15))
def test_the_rule_of_the_published_steps_learns_their_merges(corpus, number):
    expected, _ = published(corpus, number)
    assert BPETokenizer.train([corpus], rule="published", count=number or 1).learned[:number] == expected


def test_on_real_text_too(shared):
    text = shared("tinyshakespeare.txt").read_text(encoding="utf-8")[:60_000]
    expected, _ = published(text, 60)
    trained = BPETokenizer.train([text], rule="published", count=60)
    assert trained.learned == expected


# ---- the authors' own program ----


def theirs(text: str, number: int) -> tuple[list[tuple[str, str]], BPE]:
    out = io.StringIO()
    learn_bpe(io.StringIO(text), out, number)
    codes = out.getvalue()
    return [tuple(line.split()) for line in codes.splitlines()[1:]], BPE(io.StringIO(codes))


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "wikitext2_valid.txt", "lambada_test.jsonl"])
def test_the_merges_of_subword_nmt(name, shared):
    text = shared(name).read_text(encoding="utf-8")[:60_000]
    expected, their = theirs(text, 400)
    ours = BPETokenizer.train([text], rule="subword-nmt", count=400)
    assert ours.learned == expected
    for word in text.split()[:5000]:
        shown = [ours.name(number).removesuffix(END) for number in ours.encode(word)]
        if END not in word:
            assert shown == [part.removesuffix("@@") for part in their.segment(word).split()], word


# ---- the tokenizer ----


@pytest.mark.parametrize("rule", RULES)
@quick
@given(words, st.text(max_size=30) | words, st.integers(1, 60))
def test_any_text_comes_back_whatever_the_training(rule, training, text, room):
    tokenizer = BPETokenizer.train([training], FIRST_PIECE + room, rule)
    assert tokenizer.vocabulary_size <= FIRST_PIECE + room
    ids = tokenizer.encode(text, special="text")
    assert tokenizer.decode(ids) == text
    decoder = tokenizer.decoder()
    assert "".join(map(decoder.push, ids)) + decoder.finish() == text


@pytest.mark.parametrize("rule", RULES)
def test_a_text_that_holds_end_marks(rule):
    text = "a</w>b </w> </w></w>a</w\n>/w></w>\n"
    for training in (text * 20, "ab </w"):
        tokenizer = BPETokenizer.train([training], rule=rule)
        assert tokenizer.decode(tokenizer.encode(text)) == text
        again = BPETokenizer.from_table(tokenizer.to_table())
        assert again.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("rule", RULES)
def test_the_vocabulary_is_filled_where_there_is_enough_to_merge(rule, shared):
    text = shared("tinyshakespeare.txt").read_text(encoding="utf-8")[:100_000]
    for size in (500, 1000):
        tokenizer = BPETokenizer.train([text], size, rule)
        made = [left + right for left, right in tokenizer.learned]
        again_made = len(made) - len(set(made))  # two merges that make the same token share it
        assert tokenizer.vocabulary_size == size - again_made


def test_unseen_characters_are_spelled_by_their_bytes_and_white_space_is_kept():
    tokenizer = BPETokenizer.train(["low lower  newest\n" * 9])
    names = [tokenizer.name(number) for number in tokenizer.encode("low  lower\t\n")]
    assert names == ["low</w>", "  ", "lower</w>", "\t", "\n"]
    assert tokenizer.encode("森") == [FIRST_BYTE + byte for byte in "森".encode()]
    assert [tokenizer.name(number) for number in tokenizer.encode("é")] == ["\\xc3", "\\xa9"]
