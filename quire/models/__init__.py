"""Models: each file its settings, initialization, forward and backward. To add one: a file, and a line here."""

from typing import Any

from quire.errors import choose
from quire.models.gpt import GPT
from quire.models.modern import Modern
from quire.models.settings import ModelSettings
from quire.models.sparse import Sparse

MODELS: dict[str, Any] = {"gpt": GPT, "modern": Modern, "sparse": Sparse}


def build_model(settings: ModelSettings) -> Any:
    """A freshly initialized model of the kind that `settings` name."""
    return MODELS[choose("The model kind", settings.kind, list(MODELS))](settings)
