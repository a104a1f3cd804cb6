"""Gradients of the whole loss, and what they say about a point: the PL ratio, and how the residual lies to the kernel.

Letters: w the weights (P,), f the loss, J (n, P) the Jacobian of all outputs at all samples, K = J J^T (n, n) the Gram
of the tangent kernel, r (n,) the residual, index n*C + c, E = ‖r‖^2 / 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.measurement import Kind, Level, Measurement
from surefoot.measure.objective import LossFn, Objective

_LEVELS: tuple[Level, ...] = ("estimate", "verified", "audited")


def full_gradient(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    params: Sequence[str | nn.Parameter] | None = None,
    rows: int | None = None,
    output: Callable[[Any], Any] | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[float, Tensor]:
    """Return the mean loss over all data and its gradient, summed in float64.

    f = sum_b (n_b / N) loss_b, and grad f likewise, over the batches b of n_b samples.

    Args:
        model: in the mode in which it is to be measured. It is left as it is, and so are its gradients, the running
            statistics of batch norm, the random numbers and torch's settings.
        loss_fn: (outputs, targets) -> the mean loss of a batch.
        data: a pair (inputs, targets), or batches of such pairs: a list or a loader. Batches count by their samples.
        params: names of parameters or modules, or parameters themselves; None: all that require a gradient.
        rows: evaluate at most so many samples at a time; None: batch by batch.
        output: takes the outputs out of what the model returns; None: itself, or its logits.
        dtype: torch.float64 or torch.float32 to calculate in; None: that of the model.

    Returns:
        f, and the gradient (P,) in float64: the parameters in the order of model.named_parameters(), each flattened.

    Raises:
        InputError: the data are empty or do not fit; the loss is not finite, no scalar or not deterministic; no
            parameter requires a gradient.

    Example:
        >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> full_gradient(model, torch.nn.functional.mse_loss, data)  # of (w^2 + 9 w^2) / 2
        (5.0, tensor([10.], dtype=torch.float64))
    """
    return _gradient(Objective(model, loss_fn, data, params=params, rows=rows, output=output, dtype=dtype))


def pl_ratio(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    infimum: float = 0.0,
    params: Sequence[str | nn.Parameter] | None = None,
    rows: int | None = None,
    output: Callable[[Any], Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Measurement:
    """Measure ‖grad f‖^2 / (2 (f - f*)) at the weights the model has.

    It is the largest mu for which ‖grad f‖^2 / 2 >= mu (f - f*) holds at this point, so no region that contains the
    point satisfies the PL inequality with a larger one.

    Args:
        model: see `full_gradient`, as for loss_fn, data, params, rows, output and dtype.
        loss_fn: (outputs, targets) -> the mean loss of a batch.
        data: a pair (inputs, targets), or batches of such pairs.
        infimum: f*, or a number that f is known never to fall below; with such a number the ratio is too small.
        params: names of parameters or modules, or parameters themselves; None: all that require a gradient.
        rows: evaluate at most so many samples at a time; None: batch by batch.
        output: takes the outputs out of what the model returns; None: itself, or its logits.
        dtype: torch.float64 or torch.float32; None: that of the model.

    Returns:
        The ratio, infinite where f = f*. Its details: "loss", "infimum", "gradient_norm".

    Raises:
        InputError: as `full_gradient`; the loss lies below infimum.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> data = torch.ones(4, 1), torch.ones(4, 1)
        >>> round(pl_ratio(model, torch.nn.functional.mse_loss, data, dtype=torch.float64).value, 6)  # (w - 1)^2
        2.0
    """
    if not math.isfinite(infimum):
        raise InputError(f"infimum={infimum!r} must be a finite number that the loss never falls below")
    objective = Objective(model, loss_fn, data, params=params, rows=rows, output=output, dtype=dtype)
    loss, g = _gradient(objective)
    if loss < infimum:
        raise InputError(
            f"infimum={infimum!r} lies above the loss, {loss!r}; give a number that the loss never falls below"
        )
    norm = torch.linalg.vector_norm(g).item()
    return Measurement(
        "‖grad f‖^2 / (2 (f - f*))",
        norm**2 / (2 * (loss - infimum)) if loss > infimum else math.inf,
        "exact",
        "estimate",
        "one gradient over all data",
        samples=objective.samples,
        dtype=str(objective.dtype).removeprefix("torch."),
        cost=f"{len(objective.pieces)} gradients",
        notes=(f"with f* = {infimum:g}; a PL constant that holds here is at most this",),
        details={"loss": loss, "infimum": float(infimum), "gradient_norm": norm},
    )


def jacobian_conditioning(
    K: Tensor | None = None, *, smallest: Measurement | None = None, largest: Measurement | None = None
) -> Measurement:
    """Measure sqrt(lambda_max(K) / lambda_min(K)), the condition number of the Jacobian J of K = J J^T.

    What is proved about the two eigenvalues is proved about their ratio: a lower bound of lambda_min and an upper bound
    of lambda_max make an upper bound, the reverse a lower bound, rounded outwards; anything else makes an estimate.

    Args:
        K: (n, n), as `tangent_gram` gives it: for the eigenvalues that are not given.
        smallest: lambda_min(K).
        largest: lambda_max(K).

    Returns:
        The condition number, infinite where lambda_min is 0 or below.

    Raises:
        InputError: an eigenvalue is missing, K is no Gram, or lambda_max is negative.

    Example:
        >>> print(jacobian_conditioning(torch.diag(torch.tensor([9.0, 1.0], dtype=torch.float64))).value)
        3.0
    """
    if K is None and (smallest is None or largest is None):
        raise InputError("K=None needs both smallest= and largest=; give K, or both eigenvalues")
    if K is not None and (smallest is None or largest is None):
        eigenvalues = torch.linalg.eigvalsh(_checked_gram(K)).tolist()
        smallest = smallest or _eigenvalue("lambda_min(K)", eigenvalues[0])
        largest = largest or _eigenvalue("lambda_max(K)", eigenvalues[-1])
    assert smallest is not None
    assert largest is not None
    if largest.value < 0:
        raise InputError(f"largest={largest.value!r} is negative; the eigenvalues of a Gram J J^T are not")
    kind = _ratio_kind(smallest.kind, largest.kind)
    level: Level = "estimate"
    if "bound" in kind:
        level = _LEVELS[min(_LEVELS.index(m.level) for m in (smallest, largest))]
    value = math.inf
    if smallest.value > 0:
        value = math.sqrt(largest.value) / math.sqrt(smallest.value)
        if "bound" in kind:
            # Three roundings, each of half an ulp at most.
            for _ in range(4):
                value = math.nextafter(value, math.inf if kind == "upper bound" else 0.0)
    return Measurement(
        "sqrt(lambda_max(K) / lambda_min(K))",
        value,
        kind,
        level,
        f"{largest.name}, {largest.kind}, {largest.level}; {smallest.name}, {smallest.kind}, {smallest.level}",
        samples=smallest.samples,
        dtype=smallest.dtype if smallest.dtype == largest.dtype else "float32",
        details={"smallest": smallest.to_json()["value"], "largest": largest.to_json()["value"]},
    )


def alignment(K: Tensor, residual: Tensor, *, lr: float | None = None) -> Measurement:
    """Measure how much of the residual lies along the small eigenvectors of the kernel.

    With u_i the eigenvectors of K and c_i = <u_i, r>, gradient descent on E = ‖r‖^2 / 2 shrinks c_i at the rate
    lambda_i. The effective eigenvalue is that of the residual as a whole, between lambda_min and lambda_max:

        lambda_eff = r^T K r / ‖r‖^2 = sum_i lambda_i c_i^2 / ‖r‖^2 = ‖grad E‖^2 / (2 E)

    and the step w - lr grad E takes E to ‖(I - lr K) r‖^2 / 2, up to the curvature of the network.

    Args:
        K: (n, n), as `tangent_gram` gives it.
        residual: (n,), or (N, C): outputs minus targets at the same samples, in the same order.
        lr: a step size on E; 2 lr / n on the mean of squares.

    Returns:
        lambda_eff. Its details: "shares", the share of ‖r‖^2 along the smallest 1 %, 10 %, 25 %, 50 % and 90 % of the
        eigenvectors (at least one); "half": the eigenvalue up to which half of ‖r‖^2 lies; "smallest", "largest": of
        the eigenvalues; "loss": E; with lr "lr" and "predicted_decrease": of E in one step, as a share of E.

    Raises:
        InputError: K is no Gram, or the residual does not fit, is 0 or is not finite; lr is not positive.

    Example:
        >>> K = torch.diag(torch.tensor([1.0, 4.0], dtype=torch.float64))
        >>> found = alignment(K, torch.tensor([1.0, 1.0]), lr=0.1)
        >>> print(found.value, found.details["shares"]["50%"], round(found.details["predicted_decrease"], 4))
        2.5 0.5 0.415
    """
    K = _checked_gram(K)
    n = len(K)
    r = residual.detach().to(K.device, torch.float64).reshape(-1)
    if len(r) != n:
        raise InputError(
            f"residual of shape {tuple(residual.shape)} does not fit K of shape {tuple(K.shape)}; give {n} numbers"
        )
    if not torch.isfinite(r).all():
        raise InputError(f"residual holds {int((~torch.isfinite(r)).sum())} numbers that are NaN or infinite")
    total = torch.dot(r, r).item()
    if total == 0:
        raise InputError("residual is 0: there is nothing left to align")
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise InputError(f"lr={lr!r} must be positive, or None")
    eigenvalues, cumulative = spectral_weights(K, r)
    Kr = K @ r
    details: dict[str, Any] = {
        "shares": {f"{q}%": cumulative[max(1, n * q // 100) - 1].item() for q in (1, 10, 25, 50, 90)},
        "half": eigenvalues[int(torch.searchsorted(cumulative, 0.5).clamp(max=n - 1))].item(),
        "smallest": eigenvalues[0].item(),
        "largest": eigenvalues[-1].item(),
        "loss": total / 2,
    }
    notes = ()
    if lr is not None:
        after = r - lr * Kr
        details |= {"lr": float(lr), "predicted_decrease": 1 - torch.dot(after, after).item() / total}
        notes = (
            f"a step of {lr:g} on E takes off {details['predicted_decrease']:.3g} of it to first order in the outputs",
        )
    return Measurement(
        "r^T K r / ‖r‖^2",
        torch.dot(r, Kr).item() / total,
        "exact",
        "estimate",
        "the Gram and its eigenvectors",
        samples=n,
        notes=notes,
        details=details,
    )


def spectral_weights(K: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Return K's eigenvalues, rising, and the share of ‖r‖^2 that lies along the eigenvectors up to each: (n,), (n,).

    Args:
        K: (n, n), symmetric.
        residual: (n,), not 0.

    Example:
        >>> K = torch.diag(torch.tensor([4.0, 1.0], dtype=torch.float64))
        >>> spectral_weights(K, torch.tensor([3.0, 4.0], dtype=torch.float64))[1]
        tensor([0.6400, 1.0000], dtype=torch.float64)
    """
    eigenvalues, U = torch.linalg.eigh(K)
    c2 = (U.T @ residual).square()
    return eigenvalues, c2.cumsum(0) / c2.sum()


def _gradient(objective: Objective) -> tuple[float, Tensor]:
    total = torch.zeros(objective.size, dtype=torch.float64, device=objective.device)
    f = 0.0
    with objective.untouched():
        for piece in objective.pieces:
            loss = objective.loss(piece)
            g = torch.autograd.grad(loss, objective.params, materialize_grads=True)
            total.add_(torch.cat([part.reshape(-1) for part in g]), alpha=piece.weight)
            f += piece.weight * loss.item()
    if not torch.isfinite(total).all():
        raise InputError(
            f"loss_fn has a gradient that is NaN or infinite at a loss of {f}; keep away from such a point"
        )
    return f, total


def _checked_gram(K: Tensor) -> Tensor:
    if K.dim() != 2 or K.shape[0] != K.shape[1] or len(K) == 0:
        raise InputError(f"K of shape {tuple(K.shape)} is no square matrix; give the Gram (n, n)")
    K = K.detach()
    if K.dtype != torch.float64:
        raise InputError(f"K in {K.dtype} is too coarse for its small eigenvalues; calculate it in torch.float64")
    if not torch.isfinite(K).all():
        raise InputError(f"K holds {int((~torch.isfinite(K)).sum())} numbers that are NaN or infinite")
    if not torch.allclose(K, K.T, rtol=1e-9, atol=1e-12 * K.abs().max().item()):
        raise InputError(
            f"K of shape {tuple(K.shape)} is not symmetric; give the Gram of one set of samples with itself"
        )
    return (K + K.T) / 2


def _eigenvalue(name: str, value: float) -> Measurement:
    return Measurement(name, value, "estimate", "estimate", "eigvalsh")


def _ratio_kind(smallest: Kind, largest: Kind) -> Kind:
    if "assumed" in (smallest, largest):
        return "assumed"
    if smallest in ("lower bound", "exact") and largest in ("upper bound", "exact"):
        return "upper bound"
    if smallest in ("upper bound", "exact") and largest in ("lower bound", "exact"):
        return "lower bound"
    return "estimate"
