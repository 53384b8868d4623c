"""The corpora known by name, for `quire train NAME`. To add an archive: a line in quire/sources/table.py."""

from dataclasses import dataclass

from quire.sources import SOURCES, Source


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face hub, read as it streams in."""

    name: str
    address: str  # hf:OWNER/NAME
    size: int  # bytes that are downloaded, about
    text_bytes: int
    description: str
    licence: str
    attribution: str


_OPENWEBTEXT = HubDataset(
    name="openwebtext",
    address="hf:Skylion007/openwebtext",
    size=12_880_000_000,
    text_bytes=39_769_494_896,
    description="The open counterpart of GPT-2's training text: 8,013,769 web pages, a document each.",
    licence="CC0 (the collection; its pages are their authors')",
    attribution="Text from OpenWebText (Gokaslan and Cohen 2019).",
)

CORPORA: dict[str, Source | HubDataset] = {
    **{name: source for name, source in SOURCES.items() if source.is_text},
    _OPENWEBTEXT.name: _OPENWEBTEXT,
}
