"""From a torch module to the list of operations of a certificate, and back."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from surefoot.errors import InputError

Operation = dict[str, Any]


class NoRule(InputError):
    """A module that the certificate format has no operation for."""


@dataclass
class Layers:
    """A network as operations and tensors.

    Attributes:
        operations: the list of the certificate format.
        tensors: name -> float64 copy; the names are the module's own.
        parameters: the trainable ones among these names, in the order of the operations.
        outputs: C, how many numbers a sample's value has in the end.
    """

    operations: list[Operation] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parameters: list[str] = field(default_factory=list)
    outputs: int = 0


ACTIVATIONS: dict[type[nn.Module], str] = {
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Softplus: "softplus",
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.ELU: "elu",
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
}
FUNCTIONS: dict[Any, str] = {
    torch.tanh: "tanh",
    torch.nn.functional.tanh: "tanh",
    torch.sigmoid: "sigmoid",
    torch.nn.functional.sigmoid: "sigmoid",
    torch.relu: "relu",
    torch.nn.functional.relu: "relu",
    torch.nn.functional.silu: "silu",
    torch.nn.functional.gelu: "gelu",
    "tanh": "tanh",
    "sigmoid": "sigmoid",
    "relu": "relu",
}
HELP = "the last-layer certificate still applies: certify(..., layers='last')"


def read_layers(model: nn.Module, sample: Tensor) -> Layers:
    """Return the operations of a model that is a chain of known modules, with residual additions.

    nn.Sequential is read as it is; any other module is traced by torch.fx, so that its own forward may call modules,
    activations, flatten and `x + branch(x)`.

    Args:
        model: in eval mode.
        sample: one input with the batch dimension, to learn the shapes.

    Raises:
        NoRule: what has no operation, by name.
        InputError: a module in train mode, nothing trainable, or values that are no vector in the end.
    """
    found = Layers()
    with torch.no_grad():
        found.operations, end = _Reader(found).module(model, "", sample.double())
    if not found.parameters:
        raise InputError("model has no trainable parameter; unfreeze the layers that training may move")
    if end.dim() != 2:
        raise InputError(
            f"model's values end in shape {tuple(end.shape[1:])}, not as a vector; end it with nn.Flatten()"
        )
    found.outputs = end.shape[1]
    return found


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Reader:
    def __init__(self, found: Layers) -> None:
        self.found = found
        self.seen: dict[int, str] = {}  # where a tensor's numbers lie -> its name

    def module(self, m: nn.Module, name: str, h: Tensor) -> tuple[list[Operation], Tensor]:
        """Return the operations of a module and its value at the sample."""
        if m.training and isinstance(m, (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)):
            raise InputError(f"{name} ({type(m).__name__}) is in train mode; call model.eval()")
        reader = READERS.get(type(m))
        if reader is not None:
            operations = reader(self, m, name, h)
            try:
                return operations, _double(m)(h)
            except (RuntimeError, ValueError) as error:
                raise InputError(
                    f"values of shape {tuple(h.shape[1:])} do not fit {name} ({m}): {str(error).splitlines()[0]}"
                ) from error
        if type(m) is nn.Sequential:
            operations = []
            for key, child in m.named_children():
                more, h = self.module(child, f"{name}.{key}".lstrip("."), h)
                operations += more
            return operations, h
        return self.traced(m, name, h)

    def tensor(self, m: nn.Module, name: str, which: str) -> str | None:
        value = getattr(m, which)
        if value is None:
            return None
        full = f"{name}.{which}".lstrip(".")
        if (place := value.data_ptr()) in self.seen:
            raise NoRule(f"{full} is the same tensor as {self.seen[place]}: no rule for tied weights; {HELP}")
        self.seen[place] = full
        self.found.tensors[full] = value.detach().double().clone()
        return full

    def weighted(self, m: nn.Module, name: str, op: str, **more: Any) -> Operation:
        weight, bias = self.tensor(m, name, "weight"), self.tensor(m, name, "bias")
        flags = {p.requires_grad for p in (m.weight, m.bias) if isinstance(p, Tensor)}
        if len(flags) > 1:
            raise NoRule(f"{name}: weight and bias must both be trained or both be frozen")
        trainable = flags.pop()
        if trainable:
            self.found.parameters += [x for x in (weight, bias) if x is not None]
        return {"op": op, "weight": weight, "bias": bias, "trainable": bool(trainable), **more}

    def traced(self, m: nn.Module, name: str, h: Tensor) -> tuple[list[Operation], Tensor]:
        """Read a module with a forward of its own from its graph: a chain, with x + branch(x)."""
        if type(m).__module__.startswith("torch.nn."):
            raise NoRule(f"{name or 'model'}: no rule for {type(m).__name__}; {HELP}")
        try:
            graph = _Tracer().trace(m)
        except Exception as error:  # torch.fx raises whatever the traced code does with a proxy
            raise NoRule(
                f"no rule for {name or type(m).__name__} ({type(m).__name__}), and its forward cannot be traced "
                f"({str(error).splitlines()[0]}); {HELP}"
            ) from error
        nodes = list(graph.nodes)
        starts = [n for n in nodes if n.op == "placeholder" and n.users]
        if len(starts) != 1:
            raise NoRule(f"{name or type(m).__name__} takes {len(starts)} inputs: no rule; {HELP}")
        end = next(n for n in nodes if n.op == "output").args[0]
        return self.chain(m, name, starts[0], end, h)

    def chain(self, m: nn.Module, name: str, start: fx.Node, end: Any, h: Tensor) -> tuple[list[Operation], Tensor]:
        """Return the operations on the way from one node to another."""
        if not isinstance(end, fx.Node):
            raise NoRule(f"{name or type(m).__name__} returns {end!r}, not one tensor; {HELP}")
        path: list[fx.Node] = []
        node = end
        while node is not start:
            path.append(node)
            if _is_addition(node):
                node = _fork(node, start, name)
            else:
                inputs = [n for n in node.all_input_nodes if not _is_batch_size(n)]
                if len(inputs) != 1:
                    raise NoRule(f"no rule for {node.format_node()} in {name or type(m).__name__}; {HELP}")
                node = inputs[0]
        operations: list[Operation] = []
        for node in reversed(path):
            if _is_addition(node):
                fork = _fork(node, start, name)
                branches = [a for a in node.args if a is not fork]
                branch, value = self.chain(m, name, fork, branches[0], h)
                operations.append({"op": "residual", "branch": branch})
                h = h + value
                continue
            more, h = self.node(m, name, node, h)
            operations += more
        return operations, h

    def node(self, m: nn.Module, name: str, node: fx.Node, h: Tensor) -> tuple[list[Operation], Tensor]:
        if node.op == "call_module":
            return self.module(m.get_submodule(str(node.target)), f"{name}.{node.target}".lstrip("."), h)
        if node.op in ("call_function", "call_method"):
            if node.target in FUNCTIONS and not any(k != "inplace" for k in node.kwargs):
                return [_activation(FUNCTIONS[node.target])], _value(FUNCTIONS[node.target])(h)
            if _is_flatten(node):
                return [{"op": "flatten"}], h.flatten(1)
            if node.target in (operator.mul, torch.mul) and any(isinstance(a, (int, float)) for a in node.args):
                factor = next(float(a) for a in node.args if isinstance(a, (int, float)))
                return [{"op": "scale", "factor": factor}], factor * h
        raise NoRule(f"no rule for {node.format_node()} in {name or type(m).__name__}; {HELP}")


def _is_addition(node: fx.Node) -> bool:
    tensors = [a for a in node.args if isinstance(a, fx.Node)]
    return (
        node.target in (operator.add, operator.iadd, torch.add, "add", "add_") and len(tensors) == 2 and not node.kwargs
    )


def _is_flatten(node: fx.Node) -> bool:
    """Whether a node is flatten(1) or view(batch size, -1), in one of their spellings."""
    if node.target in (torch.flatten, "flatten"):
        return (*node.args[1:], *node.kwargs.values()) == (1,) and set(node.kwargs) <= {"start_dim"}
    size = node.args[1:]
    return node.target in ("view", "reshape") and len(size) == 2 and _is_batch_size(size[0]) and size[1:] == (-1,)


def _is_batch_size(node: Any) -> bool:
    """Whether a node is x.size(0) or x.shape[0]."""
    if not isinstance(node, fx.Node):
        return False
    if node.target == "size":
        return tuple(node.args[1:]) == (0,)
    if node.target is not operator.getitem or node.args[1] != 0:
        return False
    shape = node.args[0]
    return isinstance(shape, fx.Node) and shape.target in (getattr, "size") and shape.args[1:] in ((), ("shape",))


def _fork(node: fx.Node, start: fx.Node, name: str) -> fx.Node:
    """Return which of an addition's two arguments the other one is made from."""
    one, other = (a for a in node.args if isinstance(a, fx.Node))
    if one is other:
        raise NoRule(f"no rule for {node.format_node()} in {name or 'the model'}: write 2 * x; {HELP}")
    if _comes_from(other, one):
        return one
    if _comes_from(one, other):
        return other
    raise NoRule(f"no rule for an addition of two branches ({node.format_node()}) in {name or 'the model'}; {HELP}")


def _comes_from(node: fx.Node, source: fx.Node) -> bool:
    seen, todo = set(), [node]
    while todo:
        n = todo.pop()
        if n is source:
            return True
        if n not in seen:
            seen.add(n)
            todo += n.all_input_nodes
    return False


def _activation(name: str, slope: float | None = None) -> Operation:
    return {"op": "activation", "name": name} | ({} if slope is None else {"slope": slope})


def _value(name: str) -> Callable[[Tensor], Tensor]:
    functions: dict[str, Any] = {"tanh": torch.tanh, "sigmoid": torch.sigmoid, "relu": torch.relu}
    return functions.get(name) or getattr(torch.nn.functional, name)


def _double(m: nn.Module) -> Callable[[Tensor], Tensor]:
    """Return the module as a function in float64; its own numbers stay as they are."""
    values = {
        name: t.detach().double() if t.is_floating_point() else t
        for name, t in [*m.named_parameters(), *m.named_buffers()]
    }
    return lambda h: torch.func.functional_call(m, values, (h,))


Reader = Callable[[_Reader, Any, str, Tensor], list[Operation]]
READERS: dict[type[nn.Module], Reader] = {}


def reader(*types: type[nn.Module]) -> Callable[[Reader], Reader]:
    """Register how a module type is written as operations."""

    def add(function: Reader) -> Reader:
        for kind in types:
            READERS[kind] = function
        return function

    return add


@reader(nn.Linear)
def _linear(r: _Reader, m: nn.Linear, name: str, h: Tensor) -> list[Operation]:
    if h.dim() != 2:
        raise NoRule(f"{name}: no rule for a Linear on values of shape {tuple(h.shape[1:])}, only on vectors; {HELP}")
    return [r.weighted(m, name, "linear")]


@reader(nn.Conv2d)
def _conv2d(r: _Reader, m: nn.Conv2d, name: str, h: Tensor) -> list[Operation]:
    if m.groups != 1 or m.padding_mode != "zeros" or isinstance(m.padding, str):
        raise NoRule(f"{name}: no rule for groups={m.groups}, padding={m.padding!r}, {m.padding_mode}; {HELP}")
    geometry = {k: [int(v) for v in getattr(m, k)] for k in ("stride", "padding", "dilation")}
    return [r.weighted(m, name, "conv2d", **geometry)]


@reader(nn.BatchNorm1d, nn.BatchNorm2d)
def _batch_norm(r: _Reader, m: nn.BatchNorm2d, name: str, h: Tensor) -> list[Operation]:
    if not m.affine or m.running_mean is None:
        raise NoRule(f"{name}: no rule for batch norm without gain and bias or without stored statistics; {HELP}")
    found = r.weighted(m, name, "batch_norm", eps=float(m.eps))
    return [found | {"mean": r.tensor(m, name, "running_mean"), "var": r.tensor(m, name, "running_var")}]


@reader(nn.AvgPool2d, nn.AdaptiveAvgPool2d)
def _avg_pool2d(r: _Reader, m: Any, name: str, h: Tensor) -> list[Operation]:
    size = list(h.shape[2:])
    if isinstance(m, nn.AdaptiveAvgPool2d):
        wanted = (m.output_size,) * 2 if not isinstance(m.output_size, tuple) else m.output_size
        out = [o or s for o, s in zip(wanted, size)]
        if any(s % o for s, o in zip(size, out)):
            raise NoRule(f"{name}: no rule for pooling {size} adaptively to {out}, whose windows overlap; {HELP}")
        kernel = [s // o for s, o in zip(size, out)]
        return [{"op": "avg_pool2d", "kernel": kernel, "stride": kernel}]
    pair = [[v, v] if isinstance(v, int) else list(v) for v in (m.kernel_size, m.stride or m.kernel_size)]
    padding = m.padding if isinstance(m.padding, int) else max(m.padding)
    if padding or m.ceil_mode or m.divisor_override:
        raise NoRule(f"{name}: no rule for average pooling with padding, ceil_mode or divisor_override; {HELP}")
    return [{"op": "avg_pool2d", "kernel": pair[0], "stride": pair[1]}]


@reader(nn.Flatten)
def _flatten(r: _Reader, m: nn.Flatten, name: str, h: Tensor) -> list[Operation]:
    if m.start_dim != 1 or m.end_dim not in (-1, h.dim() - 1):
        raise NoRule(f"{name}: no rule for Flatten({m.start_dim}, {m.end_dim}), only for Flatten(); {HELP}")
    return [{"op": "flatten"}]


@reader(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d)
def _nothing(r: _Reader, m: nn.Module, name: str, h: Tensor) -> list[Operation]:
    return []


@reader(*ACTIVATIONS)
def _activations(r: _Reader, m: Any, name: str, h: Tensor) -> list[Operation]:
    other = {
        nn.Softplus: lambda: m.beta != 1 or m.threshold < 20,
        nn.GELU: lambda: m.approximate != "none",
        nn.ELU: lambda: m.alpha != 1,
    }.get(type(m), lambda: False)
    if other():
        raise NoRule(f"{name}: no rule for {m}, only for {type(m).__name__}(); {HELP}")
    return [_activation(ACTIVATIONS[type(m)], float(m.negative_slope) if isinstance(m, nn.LeakyReLU) else None)]


def run(operations: list[Operation], tensors: dict[str, Tensor], h: Tensor) -> Tensor:
    """Return the network's outputs, worked out from its operations: what the certificate speaks of."""
    for o in operations:
        if o["op"] == "residual":
            h = h + run(o["branch"], tensors, h)
        else:
            h = _RUN[o["op"]](o, tensors, h)
    return h


def _run_batch_norm(o: Operation, t: dict[str, Tensor], h: Tensor) -> Tensor:
    g, b, mean, var = (t[o[k]].view(1, -1, *[1] * (h.dim() - 2)) for k in ("weight", "bias", "mean", "var"))
    return (h - mean) / torch.sqrt(var + o["eps"]) * g + b


def _run_activation(o: Operation, t: dict[str, Tensor], h: Tensor) -> Tensor:
    name = o["name"]
    if name == "leaky_relu":
        return torch.where(h > 0, h, o["slope"] * h)
    if name == "softplus":
        return torch.logaddexp(torch.zeros_like(h), h)
    return h if name == "identity" else _value(name)(h)


_RUN: dict[str, Callable[[Operation, dict[str, Tensor], Tensor], Tensor]] = {
    "flatten": lambda o, t, h: h.flatten(1),
    "linear": lambda o, t, h: nn.functional.linear(h, t[o["weight"]], None if o["bias"] is None else t[o["bias"]]),
    "conv2d": lambda o, t, h: nn.functional.conv2d(
        h,
        t[o["weight"]],
        None if o["bias"] is None else t[o["bias"]],
        tuple(o["stride"]),
        tuple(o["padding"]),
        tuple(o["dilation"]),
    ),
    "batch_norm": _run_batch_norm,
    "activation": _run_activation,
    "avg_pool2d": lambda o, t, h: nn.functional.avg_pool2d(h, tuple(o["kernel"]), tuple(o["stride"])),
    "scale": lambda o, t, h: o["factor"] * h,
}


def count_parameters(layers: Layers) -> int:
    """Return P, the number of trainable numbers."""
    return sum(math.prod(layers.tensors[name].shape) for name in layers.parameters)
