"""Recurrent models: torch.nn's own stack where plain, and mistakes in their settings."""

from typing import Any

import pytest
import torch
from torch import nn

from quire.config import from_table
from quire.errors import UserError
from quire.models.recurrent import Recurrent, RecurrentSettings


@pytest.mark.parametrize("hidden", [0, 5])
@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_without_residuals_it_is_torch_s_stack(cell, hidden):
    torch.manual_seed(1)
    shape: dict[str, Any] = {"embedding_size": 4, "hidden_size": hidden, "layers": 3, "residual": False}
    model = Recurrent(RecurrentSettings(vocabulary_size=7, cell=cell, **shape)).double()
    theirs = getattr(nn, cell.upper())(4, hidden or 4, 3, batch_first=True).double()
    for layer, block in enumerate(model.blocks):
        for name, parameter in block.inner.named_parameters():
            getattr(theirs, name.replace("l0", f"l{layer}")).data = parameter.data.clone()
    tokens, targets = torch.randint(7, (2, 2, 9))
    states, _ = theirs(nn.functional.embedding(tokens, model.token_embedding.weight.detach()))
    logits = states @ model.head.weight.detach().T
    torch.testing.assert_close(model(tokens), logits, rtol=0, atol=1e-10)
    nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
    model(tokens, targets).backward()
    for layer, block in enumerate(model.blocks):
        for name, parameter in block.inner.named_parameters():
            expected = getattr(theirs, name.replace("l0", f"l{layer}")).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-10)


def test_residual_layers_add_to_what_they_read():
    """Where a layer adds nothing, the model is its embedding, normalized."""
    model = Recurrent(RecurrentSettings(vocabulary_size=7, cell="gru", embedding_size=4, layers=2))
    with torch.no_grad():
        for block in model.blocks[:-1]:
            for parameter in block.inner.parameters():
                parameter.zero_()
        tokens = torch.arange(7).unsqueeze(0)
        expected = nn.functional.rms_norm(model.token_embedding.weight, (4,), eps=1e-6) @ model.head.weight.T
        torch.testing.assert_close(model(tokens)[0], expected)


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"cell": "gur"}, "model.cell must be one of rnn, lstm, gru, not 'gur'"),
        ({"cell": 3}, "model.cell must be one of rnn, lstm, gru"),
        ({"layer": 3}, "model has no setting 'layer'. Did you mean layers?"),
        ({"layers": 0}, "--model.layers must be at least 1, not 0"),
        ({"embedding_size": 0}, "--model.embedding-size must be at least 1"),
        ({"hidden_size": -1}, "--model.hidden-size must be at least 0"),
        ({"context_length": 1}, "--model.context-length must be at least 2"),
        ({"dropout": 1.0}, "--model.dropout must be at least 0 and below 1"),
        ({"tied": True, "hidden_size": 300}, "--model.tied needs states of the embedding's size: .*300 is not .*256"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(table, says):
    with pytest.raises(UserError, match=says):
        from_table(RecurrentSettings, table, "model")
