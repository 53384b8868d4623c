"""The page of one forward and one backward pass: what is in it, and what it does in a real browser."""

import inspect
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from quire.layers.layer import Layer, recording
from quire.models import MODELS
from quire.plots.gradients_page import GraphNode

TOKENS = ["To", " be", "\n", "<script>alert(1)</script>", "</script>", "\"'&amp;", "שלום", "😀", "\u202e", "<!--"]


class Lineage(TorchFunctionMode):
    """What a torch function makes comes from the calls that its inputs came from."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        parts = [tensor for part in args for tensor in (part if isinstance(part, (tuple, list)) else [part])]
        sources = set().union(*(getattr(part, "sources", ()) for part in parts if isinstance(part, torch.Tensor)))
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, torch.Tensor) and sources:
                tensor.sources = sources
        return made


def calls(model: Layer, length: int, wrong: str = "") -> list[GraphNode]:
    """A real model's calls and norms; all gradients agree, but those of the call named `wrong`."""
    found: list[dict[str, Any]] = []
    inside: list[dict[str, Any]] = []
    names = {module: name for name, module in model.named_modules()}
    waiting: dict[Layer, list[dict[str, Any]]] = {}

    def before(layer: Layer, inputs: Any) -> None:
        parent = inside[-1]["number"] if inside else None
        read = set().union(*(getattr(x, "sources", ()) for x in inputs if isinstance(x, torch.Tensor)))
        call = {"number": len(found), "name": names[layer], "parent": parent, "sources": tuple(sorted(read))}
        call |= {
            "layer": type(layer).__name__,
            "leaf": True,
            "inputs": ", ".join(str(tuple(x.shape)) for x in inputs[:1]),
        }
        for outer in inside:
            outer["leaf"] = False
        found.append(call)
        inside.append(call)
        waiting.setdefault(layer, []).append(call)

    def after(layer: Layer, inputs: Any, output: torch.Tensor) -> None:
        call = inside.pop()
        call |= {"activation": output.detach(), "output": str(tuple(output.shape))}
        if call["leaf"]:
            output = output.view(output.shape)  # a layer may hand on its very input
            output.sources = {call["number"]}
            return output

    def undone(layer: Layer) -> Any:
        plain = layer.backward

        def backward(*grad: Any) -> Any:
            call, returned = waiting[layer].pop(), plain(*grad)
            first = returned[0] if isinstance(returned, tuple) else returned
            call |= {"grad": grad[0] if grad else 1.0, "returned": first}
            return returned

        return backward

    layers = [module for module in model.modules() if isinstance(module, Layer)]
    handles = [
        hook
        for layer in layers
        for hook in (layer.register_forward_pre_hook(before), layer.register_forward_hook(after))
    ]
    tokens = torch.arange(length).remainder(model.settings.vocabulary_size)[None]
    with torch.no_grad(), recording(model), Lineage():
        model(tokens, tokens.roll(-1))
        for layer in layers:
            layer.backward = undone(layer)
        model.backward(1.0)
    for layer, hook in zip(layers, handles):
        del layer.backward
    return [_node(call, model, wrong) for call in found]


def _node(call: dict[str, Any], model: Layer, wrong: str) -> GraphNode:
    layer = model.get_submodule(call["name"])
    code = inspect.getsource(type(layer).backward)
    comments = [line.strip() for line in code.splitlines() if line.strip().startswith("#")]
    norm = lambda x: float(x.norm()) if isinstance(x, torch.Tensor) else (None if x is None else abs(float(x)))
    picture = lambda x: x.abs()[0].flatten(1).tolist() if isinstance(x, torch.Tensor) and x.dim() >= 3 else None
    verdict = "agrees"
    if wrong:
        verdict = (
            "wrong"
            if call["name"] == wrong
            else "within"
            if not call["name"] or wrong.startswith(call["name"] + ".")
            else "agrees"
        )
    bad = verdict != "agrees"
    return GraphNode(
        number=call["number"],
        name=call["name"],
        layer=call["layer"],
        parent=call["parent"],
        sources=call["sources"],
        equation=inspect.getdoc(type(layer)).splitlines()[0],
        derivation="\n".join(comments),
        forward_code=inspect.getsource(type(layer).forward),
        backward_code=code,
        inputs=call["inputs"],
        output=call["output"],
        activation_norm=norm(call["activation"]),
        gradient_norm=norm(call.get("grad")),
        returned_norm=norm(call.get("returned")),
        autograd_difference=1.7 if bad else 3.1e-16,
        numerical_difference=1.7 if bad else 2.2e-9,
        verdict=verdict,
        parameters=tuple(
            (name, str(tuple(p.shape)), norm(p), norm(p.grad)) for name, p in layer.named_parameters(recurse=False)
        ),
        activation_picture=picture(call["activation"]),
        gradient_picture=picture(call.get("grad")),
    )


def model(kind: str = "gpt", **settings: Any) -> Layer:
    torch.manual_seed(1)
    made = MODELS[kind]
    shape = {"vocabulary_size": 11, "context_length": 32, "embedding_size": 32, "layers": 2, "heads": 4} | settings
    return made.model(made.settings(**shape)) if hasattr(made, "model") else made(made.Settings(**shape))
