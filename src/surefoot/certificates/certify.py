"""certify: from a network and data to a certificate, or to the reason why there is none and what would help."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surefoot.certificates.attempt import Attempt, constant_sum
from surefoot.certificates.data import check_inputs, check_options, check_targets, refute
from surefoot.certificates.last_layer import certify_last_layer
from surefoot.certificates.layers import Layers, count_parameters, read_layers
from surefoot.certificates.module import to_module
from surefoot.certificates.polish import Polished
from surefoot.certificates.polish import polish as polish_module
from surefoot.errors import InputError
from surefoot.theorems.verdict import Outcome, Verdict

THEOREM = "an exact global minimum lies nearby (path length)"


def certify(
    model: nn.Module,
    inputs: Any,
    targets: Tensor,
    *,
    loss: str = "mse",
    layers: Literal["all", "last"] = "all",
    polish: bool = False,
    epsilon: float | None = None,
    max_memory: int | str | None = None,
    source: str = "",
    progress: Callable[[str], None] | None = None,
) -> Verdict:
    """Try to prove that an exact global minimum of the squared error lies near a model's weights.

    Args:
        model: in eval mode; layers as the certificate format has them (layers="last": any backbone with a linear
            head). It is left as it is: everything happens in float64 on a copy, and the certificate is about the
            float64 network with the same numbers.
        inputs: (N, ...); with layers="last" whatever the model takes: a tensor, or a tuple or dictionary of them.
        targets: (N, C), or (N,) class numbers, which become one-hot.
        loss: "mse", or "cross-entropy" with layers="last".
        layers: "all" for the whole network's trainable parameters, "last" for the last linear layer on frozen features.
        polish: first move the copy by Gauss-Newton steps to where the certificate fires; the certificate holds the
            moved weights. layers="last" does not need it.
        epsilon: in (0, 1); None: the best for the guaranteed rate.
        max_memory: for the Gram, see `surefoot.measure.tangent_gram`. All told 16 n^2 bytes are needed, n = N C.
        source: where the data come from, in words.
        progress: told a line now and then.

    Returns:
        Verdict: PROVED with `.certificate`, whose `save(path)` writes the proof; else what is short and would help.

    Raises:
        InputError: a module without a rule (by name), shapes that do not fit, a model in train mode.

    Example:
        >>> net = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 1)).double()
        >>> x, y = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 1, dtype=torch.float64)
        >>> bool(certify(net, x, y, polish=True))
        True
    """
    check_options(loss, epsilon, layers)
    tell = progress or (lambda line: None)
    if layers == "last":
        return certify_last_layer(model, inputs, targets, loss=loss, epsilon=epsilon, source=source)
    X = check_inputs(inputs)
    read = read_layers(model, X[:1])
    Y = check_targets(targets, len(X), read.outputs, loss)
    if (finding := refute(X, Y, count_parameters(read))) is not None:
        return Verdict(THEOREM, Outcome.REFUTED, findings=(finding,))
    module, parameters = to_module(read)
    _same_network(model, module, X)
    attempt = Attempt(read, module, parameters, X, Y, epsilon, max_memory)
    moved: Polished | None = None
    if polish:
        moved = _polish(attempt, tell)
    verdict = attempt.verdict(source, moved)
    tell(str(verdict).splitlines()[0])
    return verdict


def _polish(attempt: Attempt, tell: Callable[[str], None]) -> Polished:
    """Polish an attempt's module; count what that did from the weights as they came."""
    module, X, Y = attempt.module, attempt.X, attempt.Y
    start = [p.detach().clone() for p in module.parameters()]
    with torch.no_grad():
        before = float((module(X) - Y).norm())
    held = hold_output_bias(attempt.read, attempt.parameters, Y)
    with torch.no_grad():
        centred = float((module(X) - Y).norm())
    if centred != before:
        tell(f"polish: output bias taken to mean 0, residual {before:.3g} -> {centred:.3g}")
    moved = polish_module(
        module, X, Y, progress=tell, max_memory=attempt.max_memory, done=attempt.likely, tolerance=attempt.floor()
    )
    for p in held:
        p.requires_grad_(True)
    moved.residuals[0] = before
    moved.distance = math.hypot(*(float((p.detach() - s).norm()) for p, s in zip(module.parameters(), start)))
    return moved


def hold_output_bias(read: Layers, parameters: dict[str, nn.Parameter], Y: Tensor) -> list[nn.Parameter]:
    """Keep the output bias from fitting the sum of the outputs while a network is polished, and return it.

    One-hot targets sum to 1. An output bias fits that by itself, so training takes the sum of the head's rows to 0;
    then nothing but the head moves the sum of the outputs, and K is singular as soon as there are more samples than
    features and the bias. With a bias of mean 0 that is not moved the hidden layers have to make the sum.
    """
    last = read.operations[-1]
    if not constant_sum(Y) or last["op"] != "linear" or last["bias"] is None or not last["trainable"]:
        return []
    bias = parameters[last["bias"]]
    with torch.no_grad():
        bias.sub_(bias.mean())
    bias.requires_grad_(False)
    return [bias]


def _same_network(model: nn.Module, module: nn.Module, X: Tensor) -> None:
    """The operations must compute what the model computes.

    Raises:
        InputError: they do not.
    """
    few = X[:8]
    dtype = next(p.dtype for p in model.parameters())
    with torch.no_grad():
        mine, theirs = module(few), model(few.to(dtype)).double()
    scale = max(1.0, float(theirs.abs().max()))
    close = 1e-7 if dtype == torch.float64 else 1e-3 if dtype == torch.float32 else 0.1
    if mine.shape != theirs.shape or not float((mine - theirs).abs().max()) <= close * scale:
        raise InputError(
            f"model={type(model).__name__} does not compute what its layers say (or not finite numbers); "
            "certify(..., layers='last') takes any backbone"
        )
