"""What everybody knows of any model: its kind, its vocabulary and its context."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from quire.data.shards import TokenStream
from quire.layers.kneser_ney import KneserNey


@dataclass(frozen=True)
class ModelSettings:
    """The part of the settings that trainer, generator and evaluator read; each model's file adds its own."""

    reads_source: ClassVar[bool] = False  # an encoder reads a source before the tokens

    kind: str = "gpt"  # which architecture: a name in MODELS
    vocabulary_size: int = 0  # tokens; when training, taken from the tokenizer
    context_length: int = 1024  # tokens a model sees at once
    separator: int = -1  # id of the token that begins a document; when training, taken from the tokenizer
    separate_documents: bool = False  # attention never crosses from one document into another in its window

    def document_begins(self, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
        """True on the separators among `tokens` (B, T), each of which begins a document; None where all is one."""
        if not self.separate_documents:
            return None
        begins = tokens == self.separator
        return begins if mask is None else begins & mask

    def sized(self, tokens: int) -> "ModelSettings":
        """The same for a training text of so many tokens, where a size is to follow from that."""
        return self

    def count(self, tokens: np.ndarray | TokenStream) -> KneserNey | None:
        """What the model wants counted in the training text before it is trained, to be given it as its `counts`."""
        return None

    @property
    def named(self) -> str:
        """Its kind as a sentence has it: "a gpt model"."""
        return f"{'an' if self.kind[0] in 'aeiou' or self.kind[:2] == 'ng' else 'a'} {self.kind} model"
