"""What the tests of tokenizers share: reference files, tiktoken as an oracle, and texts that are hard to split."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public
from tiktoken.load import data_gym_to_mergeable_bpe_ranks, load_tiktoken_bpe

from quire.tokenizers import ByteBPETokenizer, core, load_tokenizer

SHARED = Path(__file__).parents[3] / "shared" / "data"
SPACES = list("  \t\n\r\n\r\x0b\f\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000")
SPACES += ["\r\n", "\n\n", "   ", " \n ", "\n "]
BITS = [
    *SPACES, *SPACES, *"abcST0123456789''.,;!?-_<>/|()\"\\", *"éßæıÅçñŁſκ'Юяבא森林の한글ไทยहि", *"²½Ⅷ٣৭〇𝟘",
    *"\u0301\u200b\u200d\ufe0f", *"😀👩🏽🇩🇪", "'s", "'t", "'ll", "'ve", "'re", "'LL", "'S", "'\u017f", "’s", "the",
    "Hello", "world", "number", "2026", "</w>", "<|", "|>", "://", "->", "...", "aaaa", "森林",
]  # fmt: skip


def hard_text(rng: random.Random, length: int = 12) -> str:
    """A text that mixes scripts, contractions, numbers and white space of every kind, now and then any character."""
    parts = []
    for _ in range(rng.randrange(length + 1)):
        if rng.random() < 0.1:
            code = rng.randrange(0x110000 - 0x800)
            parts.append(chr(code if code < 0xD800 else code + 0x800))
        else:
            parts.append(rng.choice(BITS) * (rng.randrange(1, 60) if rng.random() < 0.03 else 1))
    return "".join(parts)


def hard_bytes(rng: random.Random, length: int = 12) -> bytes:
    """Bytes that are UTF-8 in part: pieces of characters, characters too long, surrogates, letters and line ends."""
    bits = [b"a", b" ", b"\n", b"'s", b"1", b".", b"\xe2\x82\xac", b"\xf0\x9f\x98\x80", b"\xc3\xa9", b"\xe2\x82"]
    bits += [
        b"\xf0",
        b"\x80",
        b"\xff",
        b"\xc0\x80",
        b"\xe0\x80\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xf5",
        b"\xc2",
    ]
    bits += [bytes([byte]) for byte in range(256)]
    return b"".join(rng.choice(bits[: rng.choice([19, len(bits)])]) for _ in range(rng.randrange(length + 1)))


@pytest.fixture(scope="session")
def texts() -> Callable[..., list[str]]:
    """texts(number, seed): hard texts, the same each time."""

    def make(number: int, seed: int = 0, length: int = 12) -> list[str]:
        rng = random.Random(seed)
        return [hard_text(rng, length) for _ in range(number)]

    return make


@pytest.fixture(scope="session")
def byte_texts() -> Callable[..., list[bytes]]:
    """byte_texts(number, seed): bytes of which many are not UTF-8."""

    def make(number: int, seed: int = 0, length: int = 12) -> list[bytes]:
        rng = random.Random(seed)
        return [hard_bytes(rng, length) for _ in range(number)]

    return make


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """shared(name): a file of ../shared/data; the test is skipped where it is absent."""

    def path(name: str) -> Path:
        if not (SHARED / name).is_file():
            pytest.skip(f"../shared/data/{name} is absent")
        return SHARED / name

    return path


@pytest.fixture(scope="session")
def shared_texts() -> list[tuple[str, str]]:
    """Name and contents of every text in ../shared/data."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data is absent")
    found = []
    for path in sorted(SHARED.iterdir()):
        try:
            found.append((path.name, path.read_bytes().decode()))
        except UnicodeDecodeError:
            continue
    return found


@pytest.fixture(scope="session")
def patterns() -> dict[str, str]:
    """The splitting patterns of gpt2 and cl100k, as tiktoken itself has them."""
    public, ask = tiktoken_ext.openai_public, pytest.MonkeyPatch()
    with ask.context() as patched:
        patched.setattr(public, "load_tiktoken_bpe", lambda *_, **__: {})  # no download: the pattern is all we want
        cl100k = public.cl100k_base()["pat_str"]
    return {"gpt2": public.r50k_pat_str, "cl100k": cl100k}


@pytest.fixture(scope="session")
def trained_pair(patterns: dict[str, str]) -> dict[str, tuple[ByteBPETokenizer, tiktoken.Encoding]]:
    """For each pattern a tokenizer of 1,500 tokens trained on hard texts, and tiktoken with the same tokens."""
    rng = random.Random(5)
    blocks = [hard_text(rng, 40) for _ in range(1500)]
    pairs = {}
    for name, pattern in patterns.items():
        ours = ByteBPETokenizer.train(blocks, 1500, name)
        ranks = {token: number for number, token in enumerate(ours.tokens) if token}
        pairs[name] = (
            ours,
            tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=dict(ours.specials)),
        )
    return pairs


@pytest.fixture(scope="session")
def published_pair(
    shared: Callable[[str], Path], patterns: dict[str, str]
) -> dict[str, tuple[ByteBPETokenizer, tiktoken.Encoding]]:
    """GPT-2's and cl100k's own tokens, read by Quire and by tiktoken."""
    merges, encoder = shared("gpt2_vocab.bpe"), shared("gpt2_encoder.json")
    ranks = shared("cl100k_base.tiktoken")
    with pytest.MonkeyPatch().context() as patched:
        patched.setenv("TIKTOKEN_CACHE_DIR", "")
        gpt2_ranks = data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder))
        cl100k_ranks = load_tiktoken_bpe(str(ranks))
    pairs = {}
    for name, path, oracle in (("gpt2", merges, gpt2_ranks), ("cl100k", ranks, cl100k_ranks)):
        ours = load_tokenizer(path)
        assert isinstance(ours, ByteBPETokenizer)
        pairs[name] = (
            ours,
            tiktoken.Encoding(name, pat_str=patterns[name], mergeable_ranks=oracle, special_tokens=dict(ours.specials)),
        )
    return pairs


@pytest.fixture
def no_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the C core is not compiled."""
    monkeypatch.setattr(core, "fast", None)
