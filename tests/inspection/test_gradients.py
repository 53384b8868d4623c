"""The gradient walk: what it tells of a pass is what torch tells of it, for every kind of model and from a run."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quire.errors import UserError
from quire.inspection import gradients as inspected
from quire.inspection.calls import COLUMNS, ROWS, picture
from quire.inspection.gradients import AGREES, IDLE, LayerCall, Pass, gradients, walk
from quire.inspection.written import code, derivation, equation, places
from quire.layers.layer import Block, Layer, recording
from quire.layers.linear import Linear
from quire.layers.normalization import LayerNorm
from quire.layers.recurrent import LSTM
from quire.models import MODELS
from quire.models.encoder_decoder import PostNormDecoderBlock
from quire.run import Run


def ids(count: int, seed: int = 2) -> Tensor:
    return torch.randint(12, (1, count), generator=torch.Generator().manual_seed(seed))


def arguments(model: Any, length: int = 8) -> dict[str, Tensor]:
    row = ids(length + 1)
    source = {"source": ids(7, seed=5)} if model.settings.reads_source else {}
    return {"tokens": row[:, :-1], "targets": row[:, 1:], **source}


@pytest.fixture
def built(small_model) -> Any:
    """A small model of a kind in float64."""
    return lambda kind, **changes: small_model(kind, **changes).double()


# ---- every kind of model ----


@pytest.mark.parametrize("kind", MODELS)
def test_every_call_of_every_model_agrees(kind, built):
    model = built(kind, dropout=0.3)
    called: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, Layer):
            module.register_forward_hook(lambda *_, name=name: called.update([name]), always_call=True)
    given = arguments(model)
    with recording(model):
        model(**given)
    expected = Counter(called)
    found = walk(model, given)
    assert Counter(call.name for call in found.calls) == expected
    assert [call.number for call in found.calls] == list(range(len(found.calls)))
    for call in found.calls:
        if call.verdict == IDLE:
            assert call.kind.__name__ == "SinusoidalPositions"
            continue
        assert call.verdict == AGREES and not call.apart, call
        assert call.autograd_difference is not None and call.autograd_difference < 1e-10
        assert call.numerical_difference is None or call.numerical_difference < 1e-6
        if call.parent is not None:
            around = found.calls[call.parent]
            assert around.number < call.number and all(source < call.number for source in call.sources)
    assert sum(call.numerical_difference is None for call in found.calls if call.verdict == AGREES) <= 1, "kinks"


@pytest.mark.parametrize("kind", MODELS)
def test_norms_are_those_of_a_plain_pass_by_autograd(kind, built):
    """Without dropout or smoothing: the loss, the whole gradient, and every layer's output and its gradient."""
    model = built(kind, dropout=0.0, label_smoothing=0.0, layers=2)
    given = arguments(model)
    outputs: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if output.requires_grad and not any(output is known for known in inputs):
                output.retain_grad()
                outputs.setdefault(name, []).append(output)

        return hook

    watched = [name for name, m in model.named_modules() if isinstance(m, (Linear, LayerNorm, Block)) or name == "loss"]
    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in watched]
    loss = model(**given)
    loss.backward()
    for hook in hooks:
        hook.remove()
    whole = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
    found = walk(model, given)
    assert found.loss == pytest.approx(float(loss.detach()), rel=1e-12)
    assert found.gradient_norm == pytest.approx(whole, rel=1e-10)
    assert outputs
    for name, tensors in outputs.items():
        calls = [call for call in found.calls if call.name == name]
        for call, tensor in zip(calls, tensors, strict=True):
            assert call.outputs == (tuple(tensor.shape),)
            assert call.activation_norm == pytest.approx(float(tensor.detach().norm()), rel=1e-10)
            assert call.gradient_norm == pytest.approx(float(tensor.grad.norm()), rel=1e-10)


def test_the_calls_of_a_gpt_and_whose_results_they_read(built):
    found = walk(built("gpt", layers=2, dropout=0.1), arguments(built("gpt")))
    assert len(found.calls) == 7 + 2 * 15  # model, embedding, positions, dropout, norm, head, loss; 15 in a block

    def reads(name: str, occurrence: int = 0) -> set[str]:
        call = [call for call in found.calls if call.name == name][occurrence]
        return {found.calls[source].name for source in call.sources}

    assert reads("token_embedding") == set()
    assert reads("dropout") == {"token_embedding", "positions"}
    assert reads("blocks.0.attention_norm") == {"dropout"}
    assert reads("blocks.0.attention.key") == {"blocks.0.attention_norm"}
    assert reads("blocks.0.attention.attend") == {f"blocks.0.attention.{part}" for part in ("query", "key", "value")}
    assert reads("blocks.0.attention.output") == {"blocks.0.attention.attend"}
    assert reads("blocks.0.dropout") == {"blocks.0.attention.output"}
    assert reads("blocks.0.feedforward_norm") == {"dropout", "blocks.0.dropout"}, "the stream is a sum"
    assert reads("blocks.0.dropout", 1) == {"blocks.0.feedforward.down"}
    assert reads("norm") == {"dropout", "blocks.0.dropout", "blocks.1.dropout"}
    assert reads("loss") == {"head"}
    query = next(call for call in found.calls if call.name == "blocks.1.attention.query")
    assert found.calls[query.parent or 0].name == "blocks.1.attention"
    assert [p.name for p in query.parameters] == ["weight", "bias"] and query.parameters[0].shape == (16, 16)
    assert query.activation_picture is not None and len(query.activation_picture) == 8
    assert query.gradient_picture is not None and len(query.gradient_picture[0]) == 16


def test_head_and_loss_are_seen_apart_where_training_takes_them_together(built):
    model = built("gpt", vocabulary_size=1100, layers=1)
    assert model.loss.together(model.head)
    found = walk(model, arguments(model))
    head, loss = (next(call for call in found.calls if call.name == name) for name in ("head", "loss"))
    assert head.verdict == loss.verdict == AGREES and head.outputs == ((1, 8, 1100),)
    assert model.loss.together(model.head)


def test_shared_layers_are_several_calls(built):
    found = walk(built("modern", layers=1), arguments(built("modern")))
    turns = [call for call in found.calls if call.name == "rotary"]
    assert len(turns) == 2 and {turn.verdict for turn in turns} == {AGREES}
    assert turns[0].inputs[0] != turns[1].inputs[0], "queries and the fewer keys"


@pytest.mark.parametrize("kind", ["gpt", "encoder-decoder"])
def test_nothing_is_changed(kind, built):
    model = built(kind, dropout=0.2, layers=1).eval()
    for block in (block for block in model.modules() if isinstance(block, Block)):
        block.recomputed = True
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, two = walk(model, arguments(model)), walk(model, arguments(model))
    assert one == two, "the same dropout each time"
    assert all(call.verdict in (AGREES, IDLE) for call in one.calls)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    for module in model.modules():
        assert not {"forward", "backward"} & set(vars(module))
        assert not isinstance(module, Layer) or module.tape is None
        assert not isinstance(module, Block) or module.recomputed


def test_frozen_parameters_and_tied_ones(built):
    model = built("gpt", layers=1, tied=True)
    model.blocks[0].requires_grad_(False)
    found = walk(model, arguments(model))
    assert {call.verdict for call in found.calls} == {AGREES}
    frozen = next(call for call in found.calls if call.name == "blocks.0.attention.query")
    assert [p.gradient_norm for p in frozen.parameters] == [None, None]
    head, embedding = (next(call for call in found.calls if call.name == name) for name in ("head", "token_embedding"))
    shares = [call.parameters[0].gradient_norm for call in (head, embedding)]
    assert None not in shares and shares[0] != shares[1], "each call tells its own share of the shared gradient"


def test_a_picture_of_much_keeps_what_stands_out():
    value = torch.rand(1, 60, 200)
    value[0, 31, 151] = -7.0
    small = picture(value)
    assert small is not None and (len(small), len(small[0])) == (ROWS, COLUMNS)
    assert [(r, c) for r, row in enumerate(small) for c, x in enumerate(row) if x == 7] == [(12, 36)]


def named(found: Pass, name: str) -> LayerCall:
    return next(call for call in found.calls if call.name == name)


# ---- what is written about a layer ----


def test_equation_code_and_place_are_read_from_the_source():
    assert (
        equation(Linear)
        == "y = x W^T + b, for x of shape (..., inputs); parameters named and shaped as in torch.nn.Linear."
    )
    assert all(f"def {name}(" in code(LSTM, "backward") for name in ("backward", "slopes", "step_back"))
    assert "dc_{t-1} = dc_t f" in derivation(LSTM) and "#" not in derivation(LSTM)[:1]
    assert [name for name, _ in places(LSTM)] == ["RNN.backward", "LSTM.slopes", "LSTM.step_back"]
    assert [name for name, _ in places(PostNormDecoderBlock)] == ["DecoderBlock.backward", "PostNormBlock.undo_add"]
    where, line = places(LayerNorm)[0][1].rsplit(":", 1)
    with open(where, encoding="utf-8") as file:
        assert "def backward" in file.read().splitlines()[int(line) - 1]


def test_a_layer_without_a_file_has_no_code():
    made: dict[str, Any] = {"LayerNorm": LayerNorm}
    exec("class Typed(LayerNorm):\n    def backward(self, grad):\n        return super().backward(grad)", made)
    assert code(made["Typed"], "backward").startswith("def backward(self, grad: Tensor)"), "what it inherits is in one"
    assert equation(made["Typed"]) == equation(LayerNorm)


# ---- a run's prompt ----


def test_a_run_reads_the_prompt_and_foresees_its_end(tiny: Run) -> None:
    found = gradients(tiny, "The owl")
    assert found.tokens == list("The owl") and found.left_out == 0 and found.source == []
    assert not found.wrong and named(found, "token_embedding").inputs == ((1, 6),)


def test_a_long_prompt_keeps_its_end(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "The owl calls upon a night and speaks to none but rivers run below"
    assert gradients(tiny, text).tokens == list(text[-33:]), "a context of 32, and the one foreseen after it"
    monkeypatch.setattr(inspected, "LONGEST", 10)
    found = gradients(tiny, text)
    assert found.tokens == list(text[-11:]) and found.left_out == len(text) - 11


def test_what_an_imported_model_puts_before_a_prompt(tiny: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "prompt_prefix", lambda self: [3])
    assert gradients(tiny, "T").tokens == [tiny.tokenizer.name(3), "T"]


def test_an_encoder_decoder_reads_the_prompt_and_foresees_the_target(tiny: Run, small_model) -> None:
    shape = {"vocabulary_size": tiny.tokenizer.vocabulary_size, "separator": tiny.tokenizer.separator}
    model = small_model("encoder-decoder", context_length=12, layers=1, **shape)
    found = gradients(tiny, "The owl", "calls", model=model)
    separator = tiny.tokenizer.name(tiny.tokenizer.separator)
    assert found.source == list("The owl") and found.tokens == [separator, *"calls", separator]
    assert not found.wrong and found.left_out == 0
    cut = gradients(tiny, "The owl calls upon", "a night and speaks", model=model)
    assert cut.source == list("l calls upon")
    assert len(cut.tokens) == 13 and cut.left_out == 6 + 7
    with pytest.raises(UserError, match="Give that as --target"):
        gradients(tiny, "The owl", model=model)


@pytest.mark.parametrize(
    "prompt, target, says",
    [("", None, "prompt is empty"), ("T", None, "single token"), ("The", "owl", "leave --target out")],
)
def test_prompts_that_cannot_be(tiny: Run, prompt: str, target: str | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        gradients(tiny, prompt, target)
