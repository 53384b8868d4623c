"""Rows of logits may be padded inside the loss; nothing outside of it is: logits, weights, optimizer, checkpoint."""

from typing import Any

import pytest
import torch
from torch import Tensor

from quire import checkpoint
from quire.layers.cross_entropy import IGNORED
from quire.models.gpt import GPT, GPTSettings
from quire.training.optimizers import OPTIMIZERS
from quire.training.settings import TrainingSettings

VOCABULARY = 1061  # a prime


def model(**settings: Any) -> GPT:
    torch.manual_seed(1)
    size = {"context_length": 8, "embedding_size": 8, "layers": 1, "heads": 2}
    return GPT(GPTSettings(vocabulary_size=VOCABULARY, **{**size, **settings}))


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(2))
    targets = torch.randint(VOCABULARY, (3, 8), generator=torch.Generator().manual_seed(3))
    targets[0, 0], targets[1, 1] = VOCABULARY - 1, IGNORED
    return tokens, targets


def test_no_padded_id_is_ever_among_the_logits():
    ours, (tokens, _) = model(tied=False), batch()
    assert ours(tokens).shape == ours(tokens, cache=ours.new_cache(3)).shape == (3, 8, VOCABULARY)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_optimizer_and_checkpoint_have_the_true_size(optimizer, tied, tmp_path):
    ours, tensors = model(tied=tied), batch()
    optimizers = OPTIMIZERS[optimizer](ours, TrainingSettings(optimizer=optimizer))
    for _ in range(2):
        ours(*tensors).backward()
        for one in optimizers:
            one.step()
    rows = {len(value) for one in optimizers for state in one.state.values() for value in state.values() if value.dim()}
    assert VOCABULARY in rows and max(rows) == VOCABULARY
    checkpoint.save(tmp_path / "last", checkpoint.model_tensors(ours), {}, {})
    saved = checkpoint.load(tmp_path / "last").model
    large = {name for name, tensor in saved.items() if len(tensor) == VOCABULARY}
    assert large == ({"token_embedding.weight"} if tied else {"token_embedding.weight", "head.weight"})
    assert sum(tensor.numel() for tensor in saved.values()) == sum(p.numel() for p in ours.parameters())
    assert all(len(tensor) <= VOCABULARY for tensor in saved.values())
