"""Mixed precision and compilation: both wrap a model from outside, which knows nothing of them."""

import contextlib
import os
from typing import Any

import torch
from torch import nn

from quire import files
from quire.errors import UserError
from quire.models import ModelSettings
from quire.progress import say
from quire.training.settings import TrainingSettings

COMPILE_STEPS, COMPILE_MINUTES = 2000, 5.0  # a run this long gains more by compiling than that costs


class Precision:
    """How numbers are held in forward and backward: an autocast to enter, and a scaler for float16's narrow range."""

    def __init__(self, name: str, device: torch.device) -> None:
        if name == "auto":
            name = "bfloat16" if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "float32"
        if name == "float16" and device.type == "cpu":
            raise UserError("--precision float16 needs a GPU. On a CPU choose float32 or bfloat16.")
        self.name, self.device = name, device
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "float16")

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, matrix products are computed in this precision; parameters stay float32."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def loss_scale(self) -> float:
        """What a loss is multiplied by before backward, so that float16 can hold its gradients; else 1."""
        if not self.scaler.is_enabled():
            return 1.0
        self.scaler.scale(torch.zeros((), device=self.device))  # the scale comes into being with its first use
        return self.scaler.get_scale()


def compiled(
    model: nn.Module, settings: TrainingSettings, precision: Precision, shape: tuple[int, int], vocabulary: int
) -> Any:
    """The model, called with tokens of a `shape` (B, T), compiled where the settings ask for it or it pays, else as it
    is; a failure is said and survived.

    What was compiled is kept in the user's cache folder, where the next run of the same shape finds it.
    """
    long = settings.minutes >= COMPILE_MINUTES or settings.steps >= COMPILE_STEPS
    pays = precision.device.type == "cuda" and long and settings.engine == "autograd"
    if settings.compile == "no" or (settings.compile == "auto" and not pays):
        return model
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(files.cache_folder() / "torch-inductor"))
    faster = torch.compile(model)
    cuda = [precision.device] if precision.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda), precision.autocast():
            tokens = torch.randint(vocabulary, shape, device=precision.device)
            source = {"source": tokens} if getattr(model, "settings", ModelSettings).reads_source else {}
            faster(tokens, tokens, **source).backward()
    except (RuntimeError, OSError, ImportError, AssertionError, torch._dynamo.exc.TorchDynamoException) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        say(f"torch.compile does not work here ({reason}); training goes on without it.")
        return model
    finally:
        model.zero_grad(set_to_none=True)
    return faster
