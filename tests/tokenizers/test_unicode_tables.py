"""The tables of letters, numbers and white space: what tiktoken says, and who says otherwise."""

import importlib.util
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from quire.tokenizers import unicode_tables
from quire.tokenizers.patterns import CLASS_OF, character_classes

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_unicode_tables.py"

# Where Hugging Face's tokenizers, of this version, puts a character into another class than tiktoken does: nowhere.
# Code points as in unicode_tables.py, FIRST-LAST or alone; of each class those that only one of the two has.
HUGGING_FACE_VERSION = "0.23.3"
ONLY_IN = {
    "LETTERS": {"tiktoken": "", "Hugging Face": ""},
    "NUMBERS": {"tiktoken": "", "Hugging Face": ""},
    "SPACES": {"tiktoken": "", "Hugging Face": ""},
}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_unicode_tables", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def committed(name: str) -> set[int]:
    ends = [run.split("-") for run in getattr(unicode_tables, name).split()]
    return {code for run in ends for code in range(int(run[0], 16), int(run[-1], 16) + 1)}


def spelled(script: ModuleType, codes: set[int]) -> str:
    return " ".join(f"{first:x}" if first == last else f"{first:x}-{last:x}" for first, last in script.ranges(codes))


def test_the_tables_are_what_tiktoken_says(script):
    asked = script.ask_tiktoken()
    versions = f"tiktoken {unicode_tables.TIKTOKEN_VERSION} was asked, {version('tiktoken')} is installed"
    for name, codes in asked.items():
        lost, new = spelled(script, committed(name) - codes), spelled(script, codes - committed(name))
        assert not lost and not new, f"{name}: {versions}. No longer in it: {lost or 'none'}; new: {new or 'none'}"
    assert script.source(asked, unicode_tables.TIKTOKEN_VERSION) == script.HOME.read_text(encoding="utf-8")


def test_the_tables_have_what_everyone_knows():
    letters, numbers, spaces = (committed(name) for name in ("LETTERS", "NUMBERS", "SPACES"))
    assert {ord(c) for c in "azAZßéſаאあ森한"} <= letters and not {ord(c) for c in "0_-'😀\u0301 "} & letters
    assert {ord(c) for c in "09²½Ⅷ٣"} <= numbers and not numbers & letters
    assert spaces == {*map(ord, "\t\n\x0b\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000"), *range(0x2000, 0x200B)}
    classes = character_classes()
    assert len(classes) == 0x110000
    for name, codes in (("LETTERS", letters), ("NUMBERS", numbers), ("SPACES", spaces)):
        assert {code for code, number in enumerate(classes) if number == CLASS_OF[name]} == codes


def test_where_hugging_face_differs(script):
    """Ids equal Hugging Face's wherever the classes do: here are the code points where not."""
    import tokenizers

    if tokenizers.__version__ != HUGGING_FACE_VERSION:
        pytest.skip(f"the list is of tokenizers {HUGGING_FACE_VERSION}, installed is {tokenizers.__version__}")
    text = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    for name, pattern in script.CLASSES.items():
        split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"{pattern}+"), "removed")
        theirs = set(map(ord, text)) - {ord(c) for piece, _ in split.pre_tokenize_str(text) for c in piece}
        found = {
            "tiktoken": spelled(script, committed(name) - theirs),
            "Hugging Face": spelled(script, theirs - committed(name)),
        }
        assert found == ONLY_IN[name]
