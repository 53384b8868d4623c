"""The corpora known by name, for `quire train NAME`. To add one: a line in the table of sources.py."""

from quire.sources import SOURCES, Source

CORPORA: dict[str, Source] = SOURCES
