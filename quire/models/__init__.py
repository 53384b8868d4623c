"""Models: each file its settings, initialization, forward and backward. To add one: a file, and a line here."""

from typing import Any

from quire.errors import choose
from quire.models.encoder_decoder import EncoderDecoder
from quire.models.gpt import GPT
from quire.models.modern import Modern
from quire.models.ngram import Ngram
from quire.models.recurrent import Recurrent
from quire.models.settings import ModelSettings
from quire.models.sparse import Sparse
from quire.models.stack import Stack

MODELS: dict[str, Any] = {
    "gpt": GPT,
    "modern": Modern,
    "sparse": Sparse,
    "ngram": Ngram,
    "recurrent": Recurrent,
    "stack": Stack,
    "encoder-decoder": EncoderDecoder,
}


def build_model(settings: ModelSettings) -> Any:
    """A freshly initialized model of the kind that `settings` name."""
    return MODELS[choose("The model kind", settings.kind, list(MODELS))](settings)
