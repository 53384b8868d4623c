"""One forward and one backward pass, call by call: what each layer read and gave, and whether its gradient is right.

The forward is the recorded one that the engine `manual` does, in training mode: dropout and label smoothing take part.
All is done in float64, where rounding is far below any mistake.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quire.errors import UserError
from quire.inspection.calls import Call, Forward, Provenance, norm, watched
from quire.inspection.local_check import Apart
from quire.inspection.undoing import Backward, Undone
from quire.layers.head_loss import HeadLoss
from quire.layers.layer import Block, Layer, recording
from quire.progress import bar
from quire.run import Run
from quire.tokenizers.tokenizer import Unknown

LONGEST = 64  # tokens that are read, at most: more can neither be drawn nor checked soon

AGREES, WRONG, WITHIN = "agrees", "wrong", "within"
IDLE = "nothing to learn"  # no gradient can go on from it to a parameter, and its backward was not called
UNCALLED = "its backward was not called"


@dataclass(frozen=True)
class ParameterFacts:
    """A parameter that a layer has itself, the norm of its weights, and of the gradient that this call gave it."""

    name: str
    shape: tuple[int, ...]
    weight_norm: float
    gradient_norm: float | None


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer in the forward pass, and its backward.

    `name` is the module's path, "" for the model; `parent` the number of the call within which it was made; `sources`
    those of the calls without calls of their own whose results it read, directly or through arithmetic.

    The differences are relative, the largest over the gradients of this call; None where there is nothing to compare.
    `verdict`: AGREES; WRONG, where its own backward disagrees; WITHIN, where that of a call within it does; IDLE;
    UNCALLED. `notes` say more. `apart` has the differences gradient by gradient, of wrong calls or where asked for.
    """

    number: int
    name: str
    kind: type[Layer]
    parent: int | None
    sources: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    activation_norm: float
    gradient_norm: float | None
    returned_norm: float | None
    parameters: tuple[ParameterFacts, ...]
    autograd_difference: float | None
    numerical_difference: float | None
    verdict: str
    notes: tuple[str, ...]
    apart: tuple[Apart, ...]
    activation_picture: list[list[float]] | None
    gradient_picture: list[list[float]] | None


@dataclass(frozen=True)
class Pass:
    """A forward and a backward pass: the loss in nats per token, the norm of its gradient by all parameters, calls."""

    loss: float
    gradient_norm: float
    calls: list[LayerCall]

    @property
    def wrong(self) -> list[LayerCall]:
        """The calls whose own backward is wrong."""
        return [call for call in self.calls if call.verdict == WRONG]


@dataclass(frozen=True)
class Gradients(Pass):
    """The pass of a run's model over a prompt.

    `tokens` were read, the last ones `predicted` too; of a model with an encoder `source` is what that read. `left_out`
    counts the tokens cut off the front of what was too long.
    """

    source: list[str]
    tokens: list[str]
    left_out: int


def gradients(
    run: Run | str,
    prompt: str,
    target: str | None = None,
    *,
    unknown: Unknown = "error",
    apart: bool = False,
    model: Any = None,
) -> Gradients:
    """Step a run's model, loaded unless it is given, through one forward and backward pass over `prompt`, on the CPU.

    A model that reads a source reads the prompt, and is to write `target`. What is longer than the context, or than
    LONGEST tokens, loses its beginning. A prompt of fewer than two tokens, which leaves nothing to foresee, is a
    UserError.

    >>> gradients("runs/shakespeare", "To be, or not").wrong  # doctest: +SKIP
    []
    """
    run = run if isinstance(run, Run) else Run(run)
    settings, tokenizer = run.settings if model is None else model.settings, run.tokenizer
    room = min(LONGEST, settings.context_length)
    ids = tokenizer.encode(prompt, unknown, "text")
    if not ids:
        raise UserError("The prompt is empty: there is nothing to read. Give some text as --prompt.")
    source: list[int] = []
    if settings.reads_source:
        if not target:
            raise UserError(
                f"{run.path} is {settings.named}: it reads the prompt, and its loss is that of what it should then"
                " write. Give that as --target."
            )
        source, whole = ids, tokenizer.encode(target, unknown, "text")
        source, left_out = source[-room:], max(0, len(source) - room)
        kept = whole[: room - 1]
        left_out += len(whole) - len(kept)
        ids = [tokenizer.separator, *kept, tokenizer.separator]
    else:
        if target is not None:
            raise UserError(f"{run.path} is {settings.named}, which reads no source: leave --target out.")
        prefix = run.prompt_prefix()
        left_out = max(0, len(ids) + len(prefix) - room - 1)
        ids = [*prefix, *ids[left_out:]]
        if len(ids) < 2:
            raise UserError(
                "The prompt is a single token: the loss is of tokens foreseen from those before them, so that there"
                " must be two at least. Give more text as --prompt."
            )
    arguments = {"tokens": torch.tensor([ids[:-1]]), "targets": torch.tensor([ids[1:]])}
    if settings.reads_source:
        arguments["source"] = torch.tensor([source])
    model = (run.model("cpu") if model is None else copy.deepcopy(model)).double()
    found = walk(model, arguments, apart=apart)
    names = [[tokenizer.name(i) for i in row] for row in (source, ids)]
    return Gradients(found.loss, found.gradient_norm, found.calls, names[0], names[1], left_out)


def walk(model: Layer, arguments: dict[str, Tensor], *, seed: int = 0, apart: bool = False) -> Pass:
    """One forward and backward pass of a model in float64, on the CPU: `model(**arguments)` is its loss.

    `arguments` are tokens and targets (1, T), and what the model takes besides. The model's `.grad` are None
    afterwards; nothing else of it has changed. `apart`: tell each gradient's difference for every call.
    """
    with as_in_training(model, seed):
        loss, calls, backward = one_pass(model, arguments, seed, None, False, apart)
        gradient = norm([p.grad for p in model.parameters() if p.grad is not None])
        bad = [calls[number] for number, undone in backward.undone.items() if undone.findings.bad]
        # Faults of a call and of one within it may cancel: what is around a bad one is looked at again too.
        suspects = {call.number for call in bad}.union(*map(backward.around, bad))
        again = one_pass(model, arguments, seed, suspects, True, apart)[2].undone if bad else {}
    repaired = {number: undone for number, undone in again.items() if number in suspects}
    found: list[LayerCall] = []
    for call in reversed(calls):
        inner = [other for other in found if other.parent == call.number]
        found.append(described(call, backward.undone.get(call.number), repaired.get(call.number), inner))
    return Pass(loss, gradient, found[::-1])


def one_pass(
    model: Layer, arguments: dict[str, Tensor], seed: int, checked: set[int] | None, repair: bool, apart: bool
) -> tuple[float, list[Call], Backward]:
    """Forward and backward; the loss, the calls, and what the backward pass found. `checked` None: all calls."""
    forward = Forward(model)
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    with torch.no_grad(), recording(model):
        with watched(model, "forward", forward.call), Provenance():
            loss = float(model(**arguments))
        calls = forward.calls
        numbers = {call.number for call in calls} if checked is None else checked
        with bar("Checking") as update:
            backward = Backward(calls, numbers, repair, apart, update)
            with watched(model, "backward", backward.call):
                model.backward(torch.tensor(1.0, dtype=torch.float64))
    return loss, calls, backward


@contextmanager
def as_in_training(model: Layer, seed: int) -> Iterator[None]:
    """Training mode, no block recomputed, head and loss apart, no gradients; put back afterwards, the random generator
    too."""
    assert all(p.dtype == torch.float64 and p.device.type == "cpu" for p in model.parameters()), "a model in float64"
    blocks = [block for block in model.modules() if isinstance(block, Block)]
    losses = [layer for layer in model.modules() if isinstance(layer, HeadLoss)]
    before = model.training, torch.get_rng_state(), [block.recomputed for block in blocks]
    try:
        model.train()
        for block in blocks:
            block.recomputed = False
        for loss in losses:
            loss.apart = True
        yield
    finally:
        model.train(before[0])
        torch.set_rng_state(before[1])
        for block, recomputed in zip(blocks, before[2], strict=True):
            block.recomputed = recomputed
        for loss in losses:
            loss.apart = False
        model.zero_grad(set_to_none=True)


def described(call: Call, undone: Undone | None, repaired: Undone | None, inner: list[LayerCall]) -> LayerCall:
    """What is told of a call: as the pass found it, and judged as it is once everything within it is right."""
    judged = repaired if repaired is not None else undone
    if undone is None or judged is None:
        verdict = UNCALLED if call.learns else IDLE
    elif judged.findings.bad:
        verdict = WITHIN if judged.doubtful else WRONG
    else:
        verdict = WITHIN if any(other.verdict in (WRONG, WITHIN) for other in inner) else AGREES
    shown = judged if verdict == AGREES else undone  # a right layer that was given nonsense shows what it is worth
    findings = shown.findings if shown is not None else None
    parameters = tuple(
        ParameterFacts(name, tuple(p.shape), norm([p.detach()]), undone.parameters.get(name) if undone else None)
        for name, p in call.layer.named_parameters(recurse=False)
    )
    notes: list[str] = []
    if judged is not None and verdict in (WRONG, AGREES):
        notes = judged.findings.notes + judged.findings.remarks
    return LayerCall(
        number=call.number,
        name=call.name,
        kind=type(call.layer),
        parent=call.parent,
        sources=tuple(sorted(source for source in call.sources if source >= 0)),
        inputs=tuple(call.shapes),
        outputs=tuple(call.outputs),
        activation_norm=call.norm,
        gradient_norm=undone.gradient if undone else None,
        returned_norm=undone.returned if undone else None,
        parameters=parameters,
        autograd_difference=findings.autograd if findings else None,
        numerical_difference=findings.numerical if findings else None,
        verdict=verdict,
        notes=tuple(notes),
        apart=tuple(judged.findings.apart) if judged else (),
        activation_picture=call.picture,
        gradient_picture=undone.picture if undone else None,
    )
