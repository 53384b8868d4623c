"""SentencePiece's BPE: against the package sentencepiece and the definition, in streams, with unknown characters."""

import io
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.data.encode import stream
from quire.errors import UserError
from quire.tokenizers import SentencePieceTokenizer, load_tokenizer
from quire.tokenizers.gguf import BYTE, CONTROL, NORMAL, UNKNOWN, from_gguf
from quire.tokenizers.hugging_face import from_hugging_face
from quire.tokenizers.sentencepiece import SPACE

SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2}
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def of(learned: dict[str, float], prefix: str = "always", spelled: bool = True) -> SentencePieceTokenizer:
    """A tokenizer of pieces and their scores, with tokens for bytes or without."""
    pieces = [*SPECIALS, *(BYTES if spelled else []), *learned]
    scores = [0.0] * (len(pieces) - len(learned)) + list(learned.values())
    return SentencePieceTokenizer(pieces, SPECIALS, "</s>", "</s>", scores=scores, prefix=prefix, unknown_token="<unk>")


def test_ids_are_those_of_sentencepiece(texts):
    package = pytest.importorskip("sentencepiece", reason="the package sentencepiece is not installed")
    model, blocks = io.BytesIO(), [text.replace("\0", "") + " the owl calls 123" for text in texts(800, 70, 20)]
    package.SentencePieceTrainer.train(
        sentence_iterator=iter(blocks), model_writer=model, model_type="bpe", vocab_size=1600, byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, character_coverage=0.98, minloglevel=2,
        allow_whitespace_only_pieces=True,
    )  # fmt: skip
    theirs = package.SentencePieceProcessor(model_proto=model.getvalue())
    every = range(theirs.get_piece_size())
    kind: Callable[[int], int] = lambda i: (  # noqa: E731
        UNKNOWN if theirs.is_unknown(i) else CONTROL if theirs.is_control(i) else BYTE if theirs.is_byte(i) else NORMAL
    )
    pieces, scores = [theirs.id_to_piece(i) for i in every], [theirs.get_score(i) for i in every]
    ours, before = from_gguf("llama", pieces, [kind(i) for i in every], scores=scores, bos=1, eos=2)
    assert before == [1] and ours.separator == 2
    for text in texts(1500, seed=71):
        text = text.replace("\0", "")  # which ends a text there
        ids = theirs.encode(text)
        assert ours.encode(text, special="text") == ids and ours.decode(ids) == theirs.decode(ids) == text


def by_definition(tokenizer: SentencePieceTokenizer, text: str) -> list[str]:
    """Of all neighbours that make a piece, those that make the best one, the leftmost of them, again and again."""
    row = list((SPACE + text if text else text).replace(" ", SPACE))
    assert tokenizer.scores is not None
    while True:
        found = [
            (-tokenizer.scores[tokenizer.ids[row[i] + row[i + 1]]], i)
            for i in range(len(row) - 1)
            if row[i] + row[i + 1] in tokenizer.ids
        ]
        if not found:
            return row
        _, i = min(found)
        row[i : i + 2] = [row[i] + row[i + 1]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_best_piece_first_and_of_equal_ones_the_leftmost(data):
    """Scores that are often equal, pieces with spaces anywhere, and rows long enough for the lists of merges.py."""
    letters = data.draw(st.sampled_from(["ab", "ab ", "abc"]))
    rng = random.Random(data.draw(st.integers(0, 10**6)))
    learned = {letter.replace(" ", SPACE): -9.0 for letter in letters + " "}
    for _ in range(data.draw(st.integers(0, 12))):
        piece = "".join(rng.choices(list(learned), k=2))
        learned.setdefault(piece, float(-rng.randrange(data.draw(st.sampled_from([1, 3, 99])))))
    tokenizer = of(learned)
    for length in (3, 20, 70):
        text = "".join(rng.choices(letters, k=length))
        assert [tokenizer.pieces[i] for i in tokenizer.encode(text)] == by_definition(tokenizer, text)


def test_a_long_text_without_spaces_is_encoded_too():
    learned = {"a": 0.0, "b": 0.0, "ab": -1.0, "abab": -2.0, SPACE: -3.0}
    ids = of(learned).encode("ab" * 20_000)
    assert len(ids) == 10_001 and len(set(ids)) == 2


# ---- the space before a text ----


@pytest.mark.parametrize("prefix", ["never", "always", "missing", "first"])
def test_the_space_before_a_text_comes_and_goes(prefix):
    tokenizer = of({SPACE: 0.0, "a": 0.0, SPACE + "a": -1.0}, prefix)
    spelled = {text: [tokenizer.pieces[i] for i in tokenizer.encode(text)] for text in ("", "a", " a", " ", "a a")}
    mark = SPACE + "a"
    two = [SPACE, mark] if prefix == "always" else [mark]
    assert spelled == {
        "": [], "a": ["a"] if prefix == "never" else [mark], " a": two,
        " ": [SPACE] * len(two), "a a": ["a" if prefix == "never" else mark, mark],
    }  # fmt: skip
    for text in ("a", "a a", "", "森 a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode([1, *tokenizer.encode(text), 2]) == text
    after = tokenizer.encode("<s>a</s>a", special="token")
    assert [tokenizer.pieces[i] for i in after] == ["<s>", *(["a", "</s>", "a"] if prefix in ("never", "first") else [
        mark, "</s>", mark])]  # fmt: skip
    assert tokenizer.encode_more(" a").tolist() == [tokenizer.ids[mark]]
    assert tokenizer.encode_more("a").tolist() == [tokenizer.ids["a"]]


@pytest.mark.parametrize("name", ["llama2", "no-prefix"])
def test_a_stream_shows_whole_characters_and_drops_a_space_at_its_very_start_only(name, family, texts):
    ours = from_hugging_face(family(name))
    for text in texts(300, seed=72):
        ids = ours.encode(text, special="text")
        decoder, shown = ours.decoder(), ""
        for token in [1, *ids]:
            shown += decoder.push(token)
            assert ours.decode(ids).startswith(shown)
        assert shown + decoder.finish() == ours.decode(ids)
        written = ours.encode("The owl")
        going_on = ours.decoder(written)
        more = "".join(map(going_on.push, ours.encode_more(" " + text).tolist())) + going_on.finish()
        assert more == (" " + text).replace(SPACE, " ")
        assert ours.decode(written + ours.encode_more(" " + text).tolist()) == "The owl" + more


@pytest.mark.parametrize("name", ["llama2", "no-prefix"])
def test_every_text_comes_back(name, family, texts):
    ours = from_hugging_face(family(name))
    for text in texts(500, seed=73):
        assert ours.decode(ours.encode(text, special="text")) == text.replace(SPACE, " ")
    with pytest.raises(UserError, match="surrogate"):
        ours.encode("a\ud800")
    with pytest.raises(UserError, match="below the vocabulary size"):
        ours.decode([ours.vocabulary_size])


def test_a_document_that_comes_in_blocks_has_the_ids_of_the_whole(family):
    ours = from_hugging_face(family("llama2"))
    blocks = [(True, "The owl"), (False, " calls\n"), (False, "upon"), (True, "a night")]
    ids = np.concatenate(list(stream(ours, blocks))).tolist()
    assert ids == [2, *ours.encode("The owl calls\nupon"), 2, *ours.encode("a night")]


# ---- characters without a piece ----


def test_a_character_without_a_piece_is_spelled_by_its_bytes():
    tokenizer = of({SPACE: 0.0, "a": 0.0})
    assert [tokenizer.pieces[i] for i in tokenizer.encode("a森\n")] == [
        SPACE, "a", "<0xE6>", "<0xA3>", "<0xAE>", "<0x0A>"
    ]  # fmt: skip
    assert not tokenizer.unknown("a森\n")


def test_without_tokens_for_bytes_it_is_unknown():
    tokenizer = of({SPACE: 0.0, "a": 0.0}, spelled=False)
    with pytest.raises(UserError, match=r"lacks '森' \(U\+68EE\), 'b'"):
        tokenizer.encode("a森森 b")
    assert tokenizer.unknown("a森森 b") == {"森": 2, "b": 1}
    one, space = tokenizer.encode("a", "skip")[1], tokenizer.ids[SPACE]
    assert tokenizer.encode("a森森 b", "skip") == [space, one, space]
    assert tokenizer.encode("a森森 b", "replace") == [space, one, 0, space, 0]
    tokenizer.fuse_unknown = False
    assert tokenizer.encode("a森森 b", "replace") == [space, one, 0, 0, space, 0]


# ---- kept ----


def test_it_is_saved_and_loaded_and_not_fitted(family, tmp_path):
    for ours in (from_hugging_face(family("mistral")), of({SPACE: 0.0, "a": -0.1, SPACE + "a": 1e-9}, "never")):
        ours.save(tmp_path / "tokenizer.json")
        again = load_tokenizer(tmp_path)
        assert isinstance(again, SentencePieceTokenizer) and again.to_table() == ours.to_table()
        assert again.encode("a b 森") == ours.encode("a b 森") and again.specials == ours.specials
        assert again.name(2) == "</s>" and again.reserved() >= {0, 1, 2}
    data = bytearray((tmp_path / "tokenizer.json").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="cannot be fitted; choose byte-bpe"):
        SentencePieceTokenizer.train(["a text"])
