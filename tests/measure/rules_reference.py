"""The Gram by the book: one backward pass for each sample and output, the Jacobian's rows, their product."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.measure.capture import Network
from surefoot.measure.contraction import add_gram, mirror
from surefoot.measure.tangent import tangent_gram

METHODS = ("auto", "ghost", "materialise")


def one_sample(inputs: Any, i: int) -> Any:
    if isinstance(inputs, dict):
        return {name: x[i : i + 1] for name, x in inputs.items()}
    return tuple(x[i : i + 1] for x in inputs) if isinstance(inputs, tuple) else inputs[i : i + 1]


def samples(inputs: Any) -> int:
    return len(
        next(iter(inputs.values())) if isinstance(inputs, dict) else inputs[0] if isinstance(inputs, tuple) else inputs
    )


def in_float64(inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return {name: in_float64(x) for name, x in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(in_float64(x) for x in inputs)
    return inputs.double() if inputs.is_floating_point() else inputs


def evaluate(model: nn.Module, inputs: Any) -> Tensor:
    found = (
        model(**inputs) if isinstance(inputs, dict) else model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    )
    return getattr(found, "logits", found)


def jacobian(model: nn.Module, inputs: Any, params: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Return every parameter's rows, (n C, p), from one sample at a time."""
    model = copy.deepcopy(model).double()
    inputs = in_float64(inputs)
    named = {name: p for name, p in model.named_parameters() if params is None or name in params}
    rows: dict[str, list[Tensor]] = {name: [] for name in named}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for i in range(samples(inputs)):
        outputs = evaluate(model, one_sample(inputs, i)).flatten()
        for F in outputs:
            grads = torch.autograd.grad(F, list(named.values()), retain_graph=True, allow_unused=True)
            for (name, p), g in zip(named.items(), grads):
                dense = torch.zeros_like(p) if g is None else g.to_dense() if g.is_sparse else g
                rows[name].append(dense.flatten())
    torch.backends.mha.set_fastpath_enabled(fastpath)
    return {name: torch.stack(r) for name, r in rows.items()}


def naive_gram(model: nn.Module, inputs: Any, params: Sequence[str] | None = None) -> Tensor:
    J = torch.cat(list(jacobian(model, inputs, params).values()), 1)
    return J @ J.T


def difference(K: Tensor, right: Tensor) -> float:
    """Return the largest difference relative to the largest entry."""
    assert K.shape == right.shape
    assert K.dtype == right.dtype == torch.float64
    return ((K - right).abs().max() / right.abs().max()).item()


def assert_exact(
    model: nn.Module,
    inputs: Any,
    *,
    params: Sequence[str] | None = None,
    fallback: Sequence[str] = (),
    tolerance: float = 1e-12,
) -> Tensor:
    """Hold the Gram against the naive one by each method, and say which parameters no rule may treat."""
    model = copy.deepcopy(model).double()
    inputs = in_float64(inputs)
    right = naive_gram(model, inputs, params)
    # Not vacuous: the diagonal is there, and samples or outputs have something to do with each other.
    assert right.diagonal().max() > 0
    assert len(right) == 1 or (right - right.diagonal().diag()).abs().max() > 1e-6 * right.abs().max()
    network = Network(model, inputs, params=params)
    assert set(network.fallback) == set(fallback)
    everything = network.terms(inputs)
    K = torch.zeros_like(right)
    for method in METHODS:
        add_gram(K.zero_(), everything, everything, symmetric=True, method=method)
        mirror(K)
        assert difference(K, right) <= tolerance, f"{method}: {difference(K, right):.1e}"
    # One sample at a time gives what all together give.
    n = samples(inputs)
    C = len(right) // n
    alone = [network.terms(one_sample(inputs, i)) for i in (0, n - 1)]
    for i, j in ((0, 0), (0, 1), (1, 0)):
        block = torch.zeros(C, C, dtype=torch.float64)
        add_gram(block, alone[i], alone[j], symmetric=False)
        here, there = (slice(k * (n - 1) * C, (k * (n - 1) + 1) * C) for k in (i, j))
        assert (block - K[here, there]).abs().max() <= 1e-13 * right.abs().max()
    K = tangent_gram(model, inputs, params=params)
    assert difference(K, right) <= tolerance
    assert torch.equal(K, K.T)
    return right


def randomise(model: nn.Module, scale: float = 0.5) -> nn.Module:
    """Give every parameter, norms' gains and zero biases too, random values; and statistics to batch norms."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(scale * torch.randn_like(p))
        for module in model.modules():
            mean, variance = getattr(module, "running_mean", None), getattr(module, "running_var", None)
            if mean is not None and variance is not None:
                mean.normal_()
                variance.uniform_(0.5, 2.0)
    return model.double()


class Readout(nn.Module):
    """Two outputs (or as many as asked for) from a tensor of any shape, with nothing to learn."""

    def __init__(self, outputs: int = 2) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(x).flatten(1)
        return x @ torch.cos(torch.arange(x.shape[1] * self.outputs, dtype=x.dtype)).view(x.shape[1], self.outputs)


class Net(nn.Module):
    """Modules and a function of them and the inputs, then `Readout`."""

    def __init__(self, function: Any, *parts: nn.Module, outputs: int = 2) -> None:
        super().__init__()
        self.parts, self.function, self.readout = nn.ModuleList(parts), function, Readout(outputs)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.readout(self.function(*self.parts, *inputs))
