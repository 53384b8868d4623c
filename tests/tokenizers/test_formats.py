"""Byte-level BPE in files: written and read back, those of other tools, and damaged ones, each with its sentence."""

import base64
import json
import random

import pytest
import tokenizers

from quire.errors import UserError
from quire.tokenizers import ByteBPETokenizer, load_tokenizer
from quire.tokenizers.formats import LETTERS, from_ranks, write_ranks
from quire.tokenizers.hugging_face import from_hugging_face
from quire.tokenizers.tokenizer import PADDING, SEPARATOR


@pytest.fixture(scope="module")
def small(texts) -> ByteBPETokenizer:
    return ByteBPETokenizer.train(texts(400, seed=40), 400, "cl100k")


def same(one: ByteBPETokenizer, other: ByteBPETokenizer, parts: list[str]) -> None:
    assert one.tokens == other.tokens and one.merges == other.merges and one.pattern == other.pattern
    assert [one.encode_array(text).tolist() for text in parts] == [other.encode_array(text).tolist() for text in parts]


# ---- written and read back ----


@pytest.mark.parametrize("name", ["gpt2", "cl100k", "cl100k-hf"])
def test_a_saved_tokenizer_is_the_same(name, texts, tmp_path):
    ours = ByteBPETokenizer.train(texts(400, seed=41), 500, name)
    ours.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path)
    assert isinstance(again, ByteBPETokenizer)
    same(ours, again, texts(300, seed=42))
    assert (again.separator, again.padding, again.specials) == (ours.separator, ours.padding, ours.specials)
    again.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_ranks_are_written_and_read_back(small, texts, tmp_path):
    write_ranks(small, tmp_path / "own.cl100k.tiktoken")
    again = load_tokenizer(tmp_path / "own.cl100k.tiktoken")
    assert isinstance(again, ByteBPETokenizer)
    assert again.merges == small.merges and not again.whole
    for text in texts(300):
        assert again.encode(text, special="text") == small.encode(text, special="text")
    assert again.tokens[again.separator] == b"" and SEPARATOR in again.specials


def test_published_ranks_are_written_as_they_were(published_pair, shared, tmp_path):
    write_ranks(published_pair["cl100k"][0], tmp_path / "again.tiktoken")
    assert (tmp_path / "again.tiktoken").read_bytes() == shared("cl100k_base.tiktoken").read_bytes()
    ours = published_pair["cl100k"][0]
    assert ours.specials["<|endoftext|>"] == 100257 and ours.vocabulary_size == 100277


def test_gpt2_from_its_merges_alone_has_the_ids_of_its_encoder(published_pair, shared, tmp_path):
    (tmp_path / "vocab.bpe").write_bytes(shared("gpt2_vocab.bpe").read_bytes())
    alone = load_tokenizer(tmp_path / "vocab.bpe")
    ours, _ = published_pair["gpt2"]
    assert isinstance(alone, ByteBPETokenizer)
    assert alone.tokens == ours.tokens and alone.merges == ours.merges
    assert alone.specials == {"<|endoftext|>": 50256} and alone.separator == 50256 and alone.vocabulary_size == 50257


def test_the_letters_of_bytes_are_those_of_hugging_face():
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert sorted(LETTERS) == sorted(alphabet) and len(set(LETTERS)) == 256
    spelled = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    text = "".join(map(chr, range(0x800)))
    [(letters, _)] = spelled.pre_tokenize_str(text)
    assert letters == "".join(LETTERS[byte] for byte in text.encode())


# ---- files of others ----


def theirs(pattern: str, texts: list[str], size: int = 600) -> tokenizers.Tokenizer:
    """A byte-level BPE that Hugging Face's own trainer has made."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, special_tokens=[pattern], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def test_a_tokenizer_that_hugging_face_has_trained_gives_its_ids(texts, tmp_path):
    other = theirs("<|endoftext|>", texts(500, seed=43))
    other.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    assert isinstance(ours, ByteBPETokenizer) and ours.separator == other.token_to_id("<|endoftext|>")
    for text in texts(1000, seed=44):
        assert ours.encode(text, special="text") == other.encode(text).ids


def test_a_whole_piece_that_merges_would_not_make_is_its_own_token_where_the_file_says_so(tmp_path, monkeypatch):
    """ignore_merges, as in Llama 3: some merge makes `abc`, but the merges before it never leave its parts."""
    spelled = {letter: number for number, letter in enumerate(LETTERS)}
    vocabulary = {**spelled, "ab": 256, "bc": 257, "abc": 258, "xyz": 300, "é": spelled["é"]}
    model = {"type": "BPE", "vocab": vocabulary, "merges": ["b c", "a b", "ab c"], "ignore_merges": True}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    base = {"version": "1.0", "added_tokens": [], "normalizer": None, "post_processor": None, "decoder": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps({**base, "pre_tokenizer": split, "model": model}))
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path)
    for _ in range(2):  # with the core and without
        for text in ("abc", "abcd", "xyz", " xyz", "xyz.abc", "abc" * 30, "ab"):
            assert ours.encode(text) == other.encode(text).ids
        monkeypatch.setattr("quire.tokenizers.core.fast", None)
    ours.save(tmp_path / "again.json")
    assert load_tokenizer(tmp_path / "again.json").encode("abc xyz abcd") == ours.encode("abc xyz abcd")


def test_a_merge_may_come_before_those_that_make_its_parts_and_use_any_id(monkeypatch):
    spelled = {letter: number for number, letter in enumerate(LETTERS)}
    vocabulary = {**spelled, "ab": 4000, "abc": 257, "cc": 258, "abcabc": 256}
    merges = ["abc abc", "ab c", "c c", "a b"]
    table = {"model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "quire": {"pattern": "gpt2"}}}
    ours = from_hugging_face(table)
    rng = random.Random(0)
    texts = ["".join(rng.choices("abc", k=rng.choice([3, 7, 47, 48, 49, 90]))) for _ in range(300)]
    ids = [ours.encode(text) for text in texts]
    monkeypatch.setattr("quire.tokenizers.core.fast", None)
    assert ids == [ours.encode(text) for text in texts]
    assert [ours.decode(row) for row in ids] == texts


# ---- damaged files ----


def lines(tokens: dict[bytes, int]) -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in tokens.items())


BYTES = {bytes([byte]): byte for byte in range(256)}


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", r"is not a list of ranks"),
        (b"YQ== 0\nYg==\n", r"bad\.gpt2\.tiktoken, line 2, is not a token in base64 and its rank"),
        (b"YQ== 0\nY?== 1\n", r"line 2, is not a token in base64"),
        (b"YQ== x\n", r"line 1, is not a token in base64"),
        (b"YQ== 0\nYg== 0\n", r"some rank is negative, or stands twice"),
        (b"YQ== -1\n", r"some rank is negative"),
        (b"YQ== 0\nYg== 99999999999\n", r"2 tokens and a rank 99999999999"),
        (b"YQ== 0\nYWE= 1\n", r"lacks a token for some byte"),
        (lines({token: rank for token, rank in BYTES.items() if rank != 77}), r"lacks a token for some byte"),
        (lines({**BYTES, b"za": 300}).replace(b"eg== 122\n", b""), r"lacks a token for some byte"),
        (b"\xff\xfe\x00", r"line 1, is not a token in base64"),
    ],
)
def test_damaged_ranks(data, sentence, tmp_path):
    (tmp_path / "bad.gpt2.tiktoken").write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(tmp_path / "bad.gpt2.tiktoken")


def test_ranks_need_a_pattern(tmp_path):
    (tmp_path / "own.tiktoken").write_bytes(lines(BYTES))
    with pytest.raises(UserError, match=r"how its text is split\. .*: rename it to own\.gpt2\.tiktoken or"):
        load_tokenizer(tmp_path / "own.tiktoken")
    with pytest.raises(UserError, match=r"--pattern 'gtp2' is not known\. Did you mean gpt2"):
        from_ranks(BYTES, "gtp2", {})
    (tmp_path / "own.tiktoken").rename(tmp_path / "own.gpt2.tiktoken")
    assert load_tokenizer(tmp_path / "own.gpt2.tiktoken").decode([104, 105]) == "hi"


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"#version: 0.2\na b c\n", r"vocab\.bpe is not a vocab\.bpe"),
        (b"#version: 0.2\nab\n", r"is not a vocab\.bpe"),
        (b"\xff\xff", r"is not a vocab\.bpe"),
        ("#version: 0.2\n森 林\n".encode(), r"vocab\.bpe"),
        (b"#version: 0.2\nab c\n", r"vocab\.bpe"),
    ],
)
def test_damaged_merges_of_gpt2(data, sentence, tmp_path):
    (tmp_path / "vocab.bpe").write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        load_tokenizer(tmp_path / "vocab.bpe")


@pytest.mark.parametrize(
    "data", [b"[1, 2]", b'{"a": "b"}', b'{"a": null}', b"{", b"\xff", b'{"!": 0}', b'{"a": Infinity}']
)
def test_a_damaged_encoder_of_gpt2(data, tmp_path):
    (tmp_path / "vocab.bpe").write_bytes(b"#version: 0.2\na b\n")
    (tmp_path / "encoder.json").write_bytes(data)
    with pytest.raises(UserError, match=r"encoder\.json|vocab\.bpe"):
        load_tokenizer(tmp_path / "vocab.bpe")


def changed(table: dict, **model: object) -> dict:
    """The contents of a good file with keys of its model changed, and without our own key."""
    inner = {key: value for key, value in {**table["model"], **model}.items() if key != "quire"}
    return {**table, "model": inner}


def damaged_tables(good: dict) -> dict[str, tuple[object, str]]:
    vocabulary, merges = good["model"]["vocab"], good["model"]["merges"]
    incomplete = {spelling: number for spelling, number in vocabulary.items() if spelling != "~"}
    first_made = next(spelling for spelling, number in vocabulary.items() if number == 256)
    split = good["pre_tokenizer"]["pretokenizers"][0]
    return {
        "WordPiece": (changed(good, type="WordPiece"), "WordPiece tokenizer that is not byte-level BPE"),
        "SentencePiece": (changed(good, byte_fallback=True), "for SentencePiece's tokens in a way"),
        "end marks": (changed(good, end_of_word_suffix="</w>"), "not byte-level BPE"),
        "no vocabulary": (changed(good, vocab={}), "not a tokenizer"),
        "a list for a vocabulary": (changed(good, vocab=[["a", 1]]), "not a tokenizer"),
        "a letter of no byte": (changed(good, vocab={**vocabulary, "森": 400}), "not spelled in GPT-2's letters"),
        "a byte without a token": (changed(good, vocab=incomplete), "lacks|not a"),
        "an id below 0": (changed(good, vocab={**vocabulary, "zzzz": -3}), "not a tokenizer"),
        "an id beyond memory": (changed(good, vocab={**vocabulary, "zzzz": 10**15}), "not a tokenizer"),
        "an id that is none": (changed(good, vocab={**vocabulary, "zzzz": None}), "not a tokenizer"),
        "an infinite id": (changed(good, vocab={**vocabulary, "zzzz": float("inf")}), "not a tokenizer"),
        "two tokens of one id": (changed(good, vocab={**vocabulary, "zzzz": 258}), "damaged"),
        "a merge of nothing": (changed(good, merges=[*merges, "森 林"]), "not a tokenizer"),
        "a merge of three": (changed(good, merges=[*merges, "a b c"]), "not a tokenizer"),
        "a merge into a special": (
            {**changed(good), "added_tokens": [{"id": 256, "content": first_made}]}, "damaged"
        ),
        "merges that are none": (changed(good, merges=7), "not a tokenizer"),
        "another way to split": (
            {**changed(good), "pre_tokenizer": {**split, "pattern": {"Regex": r"\w+"}}}, "neither GPT-2's nor cl100k's"
        ),
        "no way to split": ({**changed(good), "pre_tokenizer": None}, "neither GPT-2's nor cl100k's"),
        "a list as a way to split": ({**changed(good), "pre_tokenizer": [split]}, "not a tokenizer"),
        "a prefix space": (
            {**changed(good), "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "neither GPT-2's"
        ),
        "a normalizer": ({**changed(good), "normalizer": {"type": "NFKC"}}, "a normalizer: NFKC"),
        "specials that are none": ({**changed(good), "added_tokens": ["<eos>"]}, "not a tokenizer"),
        "a special without a name": ({**changed(good), "added_tokens": [{"id": 3, "content": ""}]}, "special"),
        "no model": ({**good, "model": None}, "not a tokenizer"),
        "a model that is a list": ({**good, "model": [1]}, "not a tokenizer"),
    }  # fmt: skip


def test_damaged_files_of_hugging_face(small, tmp_path):
    good = small.to_table()
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(changed(good)))
    assert load_tokenizer(file).encode("the same") == small.encode("the same")
    for name, (table, sentence) in damaged_tables(good).items():
        file.write_text(json.dumps(table))
        with pytest.raises(UserError, match=sentence) as caught:
            load_tokenizer(file)
            pytest.fail(f"{name} was taken")
        assert "tokenizer.json" in str(caught.value), name


def test_a_changed_byte_of_a_saved_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    ByteBPETokenizer.train(["banana bandana"], 262).save(path)
    whole, rng = path.read_bytes(), random.Random(0)
    marks = [whole.index(word) + i for word in (b'"quire"', b'"crc32"', b'"model"', b'"padding"') for i in range(8)]
    for place in [*marks, *range(20), *rng.sample(range(len(whole)), 300), *range(len(whole) - 20, len(whole))]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            load_tokenizer(path)
            pytest.fail(f"byte {place} of {len(whole)}: {bytes(damaged[place - 20 : place + 20])!r}")
    for length in rng.sample(range(len(whole)), 60):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"tokenizer\.json"):
            load_tokenizer(path)


def test_padding_may_be_the_separator(texts):
    specials = {"<|endoftext|>": 256}
    ours = from_ranks(BYTES, "gpt2", specials)
    assert ours.padding == ours.separator == 256
    ids, mask = ours.batch(["abc", ""])
    assert ids.tolist() == [[97, 98, 99], [256] * 3] and mask.tolist() == [[True] * 3, [False] * 3]
    assert PADDING not in ours.specials
