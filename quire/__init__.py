"""Quire trains a language model of your own on text of your own, from scratch, on the machine you have.

    import quire
    run = quire.train("book.txt", minutes=5)
    print(quire.generate(run, prompt="Once")[0].text)

Names are imported when first used, so that `import quire` is quick.
"""

from importlib import import_module
from typing import Any

from quire.devices import set_memory_policy, set_thread_policy

__version__ = "0.1.0"

set_thread_policy()  # both work only before torch is imported, which nothing above does
set_memory_policy()

_FACE = {
    "Run": "quire.run",
    "ModelSettings": "quire.models",
    "TrainingSettings": "quire.training.settings",
    "DataSettings": "quire.data.reading",
    "UserError": "quire.errors",
    "train": "quire.planning.train",
    "resume": "quire.training.resume",
    "finetune": "quire.training.finetune",
    "plan": "quire.planning.plan",
    "generate": "quire.generation.generate",
    "evaluate": "quire.evaluation.evaluate",
    "load_tokenizer": "quire.tokenizers",
    "TOKENIZERS": "quire.tokenizers",
    "MODELS": "quire.models",
    "CORPORA": "quire.data.corpora",
    "PRESETS": "quire.config",
    "ENGINES": "quire.training.engines",
    "OPTIMIZERS": "quire.training.optimizers",
    "SCHEDULES": "quire.training.schedules",
}

__all__ = list(_FACE)


def __getattr__(name: str) -> Any:
    if name not in _FACE:
        raise AttributeError(f"module 'quire' has no attribute {name!r}")
    return getattr(import_module(_FACE[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_FACE])
