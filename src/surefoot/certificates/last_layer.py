"""Last-layer certificates: any backbone, kept as it is, with a linear head on its features.

Phi = [H, 1] (N, m + 1). If s_min(Phi) > 0 every matrix of outputs can be reached by the head, so that the squared
error has an exact zero at distance at most ||r||/s_min(Phi), and the infimum of the cross-entropy is 0 (surefoot,
Props. 12 to 14; idea: Kawaguchi and Sun 2021).

The features are numbers that the backbone gave once, in its own precision; the statement is about these numbers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.certificates.certificate import Certificate
from surefoot.certificates.data import check_targets
from surefoot.errors import InputError
from surefoot.measure.contraction import mirror
from surefoot.measure.duplicates import equal_rows
from surefoot.measure.eigen import lambda_min
from surefoot.measure.inputs import count, take
from surefoot.measure.measurement import Measurement
from surefoot.theorems.path_length import check_path_length
from surefoot.theorems.verdict import Finding, Outcome, Verdict, bounded, conclude

THEOREM = "the last layer reaches a global minimum of the whole network's loss"
SOURCE = "surefoot, Props. 12-14 (idea: Kawaguchi and Sun 2021)"
SLACK = 1 + 1e-7
U = 2.0**-53
TILE = 1024


def find_head(model: nn.Module, inputs: Any, rows: int = 512) -> tuple[nn.Linear, Tensor]:
    """Return a model's linear head and its inputs, the features (N, m), converted to float64 without error.

    The head is the nn.Linear, however deep inside the model, whose output is what the model returns (or its `logits`).

    Args:
        model: run as it is, in its own precision.
        inputs: what it takes: a tensor, or a tuple (positional) or dictionary (keyword arguments) of them.
        rows: samples at a time.

    Raises:
        InputError: there is none, or it has no bias.
    """
    ran: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def note(m: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        assert isinstance(m, nn.Linear)
        if args:
            ran.append((m, args[0].detach(), out.detach()))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, nn.Linear)]
    parts: list[Tensor] = []
    head: nn.Linear | None = None
    try:
        for start in range(0, count(inputs), rows):
            ran.clear()
            out = _run(model, take(inputs, slice(start, start + rows)))
            found = [r for r in reversed(ran) if r[1].dim() == 2 and _same_numbers(r[2], out)]
            if not found or (head is not None and found[0][0] is not head):
                names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
                raise InputError(
                    f"model={type(model).__name__} does not end in a linear layer on features (N, m); its linear "
                    f"layers are {names[-5:]}: let the model return the output of an nn.Linear"
                )
            head = found[0][0]
            parts.append(found[0][1].double().cpu())
    finally:
        for hook in hooks:
            hook.remove()
    if head is None:
        raise InputError("inputs hold no sample; give at least one")
    if head.bias is None:
        raise InputError("the model's last linear layer has no bias; the theorem needs one (nn.Linear(..., bias=True))")
    return head, torch.cat(parts)


def certify_last_layer(
    model: nn.Module, inputs: Any, targets: Tensor, *, loss: str, epsilon: float | None, source: str
) -> Verdict:
    """Certify the head on the features of a backbone that stays as it is; see `certify`."""
    if any(m.training for m in model.modules() if _depends_on_mode(m)):
        raise InputError(
            "model is in train mode, where its features are random or depend on the batch; call model.eval()"
        )
    head, H = find_head(model, inputs)
    _check_not_shared(model, head)
    if not torch.isfinite(H).all():
        rows = (~torch.isfinite(H)).any(1).nonzero().flatten().tolist()
        raise InputError(f"the features of {len(rows)} samples are NaN or infinite, the first {rows[:5]}")
    W, b = head.weight.detach().double().cpu(), head.bias.detach().double().cpu()
    Y = check_targets(targets.cpu() if isinstance(targets, Tensor) else targets, len(H), len(W), loss)
    if (finding := _refute(H)) is not None:
        return Verdict(THEOREM, Outcome.REFUTED, findings=(finding,), source=SOURCE)
    N, m = H.shape
    K = (H @ H.T).add_(1.0)  # Phi Phi^T: the column of ones comes last in every sum of products
    mirror(K)
    trace = float(K.diagonal().sum())
    widest = max(float(K[i : i + TILE].abs().sum(1).max()) for i in range(0, N, TILE))
    rounding = U * (20_000 + 2 * N + 4 * m) * trace
    smallest = lambda_min(K, perturbation=rounding)
    del K
    s0 = math.sqrt(max(0.0, smallest.value)) / SLACK
    how = "shifted Cholesky factor of the features' Gram"
    sigma = Measurement("s_min([H, 1])", s0, "lower bound", "verified", how, samples=N, notes=smallest.notes)
    if not s0 > 0:
        return Verdict(
            THEOREM, Outcome.UNDECIDED, findings=(_singular(smallest),), measurements=(sigma,), source=SOURCE
        )
    if loss == "cross-entropy":
        verdict, claims, statement = _cross_entropy(sigma, m)
    else:
        top = math.sqrt(widest * SLACK + rounding) * SLACK
        verdict, claims, statement = _squared_error(W, b, H, Y, sigma, top, epsilon)
    assert verdict, "a linear network is certified whenever its features are independent"
    data = {"samples": N, "outputs": len(W), "inputs": "inputs", "targets": "targets", "source": source}
    tensors = {"head.weight": W, "head.bias": b, "inputs": H, "targets": Y}
    operation = {"op": "linear", "weight": "head.weight", "bias": "head.bias", "trainable": True}
    return verdict.with_certificate(
        Certificate(claims, [operation], tensors, data, [0], kind="last layer", loss=_LOSS[loss], statement=statement)
    )


def _cross_entropy(sigma: Measurement, m: int) -> tuple[Verdict, dict[str, float], str]:
    N = sigma.samples
    verdict = conclude(
        THEOREM,
        (bounded(sigma, "lower bound"),),
        (sigma,),
        conclusion=(
            f"the features and the constant have rank {N:,}: the infimum of the cross-entropy over the last layer is 0"
        ),
        numbers={"sigma_min": sigma.value, "infimum": 0.0},
        source=SOURCE,
    )
    statement = (
        f"The {m:,} features and the constant have rank N = {N:,} over the samples: the last layer alone can bring the "
        "cross-entropy as near to 0 as one likes, which is the infimum for the whole network too."
    )
    return verdict, {"sigma_min": sigma.value}, statement


def _squared_error(
    W: Tensor, b: Tensor, H: Tensor, Y: Tensor, sigma: Measurement, top: float, epsilon: float | None
) -> tuple[Verdict, dict[str, float], str]:
    N, m = H.shape
    F = torch.addmm(b, H, W.T)
    sizes = float(W.norm()) * float(H.norm()) + math.sqrt(N) * float(b.norm()) + float(Y.norm())
    rho = (float((F - Y).norm()) + 4 * (m + 8) * U * sizes) * SLACK + 1e-90
    verdict = check_path_length(
        Measurement("||F(w0) - y||", rho, "upper bound", "verified", "forward pass with error bound"),
        sigma,
        Measurement("Lipschitz constant of J", 0.0, "exact", "verified", "F is linear in the last layer"),
        Measurement("||J||", top, "upper bound", "verified", "row sums of the features' Gram"),
        epsilon=epsilon,
    )
    n = verdict.numbers
    claims = {
        "residual": rho, "sigma_min": sigma.value, "ball": 2 * n["radius"], "jacobian_norm": top, "beta": 0.0, **n
    }  # fmt: skip
    statement = (
        f"Within {n['radius']:.6g} of the last layer's weights there are weights at which the network takes the given "
        f"values at all {N:,} samples exactly: a global minimum of the squared error. Gradient steps of at most "
        f"{n['eta_max']:.6g} on 1/2 ||F - y||^2 in the last layer, chosen in any way, reach one if they sum up to "
        "infinity."
    )
    return verdict, claims, statement


_LOSS = {"mse": "squared error", "cross-entropy": "cross-entropy"}


def _refute(H: Tensor) -> Finding | None:
    N, m = H.shape
    hypothesis = "rank [H, 1] = N"
    if m + 1 < N:
        reason = f"the features have {m:,} columns and the constant makes {m + 1:,}, fewer than the {N:,} samples"
        remedy = f"a last hidden layer of at least {N - 1:,} units, or at most {m + 1:,} samples"
        return Finding(hypothesis, Outcome.REFUTED, reason, remedy)
    if groups := equal_rows(H):
        reason = f"samples {groups[0]} have equal features ({len(groups)} such groups)"
        return Finding(hypothesis, Outcome.REFUTED, reason, "keep one sample of each group")
    return None


def _singular(smallest: Measurement) -> Finding:
    return Finding(
        "s_min([H, 1]) > 0",
        Outcome.UNDECIDED,
        "; ".join(smallest.notes) or f"its square is only known to be at least {smallest.value:.3g}",
        "remove near-duplicate samples, widen the last hidden layer, or perturb the hidden weights",
    )


def _depends_on_mode(m: nn.Module) -> bool:
    """Whether a module computes something else in train mode."""
    return isinstance(m, (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)) and getattr(m, "p", 1.0) > 0


def _run(model: nn.Module, piece: Any) -> Tensor:
    """Return the model's outputs, its inputs in the model's precision and on its device."""
    like = next(model.parameters())

    def fit(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return x.to(like) if x.is_floating_point() else x.to(like.device)

    with torch.no_grad():
        if isinstance(piece, dict):
            out = model(**{name: fit(x) for name, x in piece.items()})
        elif isinstance(piece, (tuple, list)):
            out = model(*[fit(x) for x in piece])
        else:
            out = model(fit(piece))
    return out.logits if hasattr(out, "logits") else out


def _check_not_shared(model: nn.Module, head: nn.Linear) -> None:
    """The features must stay as they are when the head moves.

    Raises:
        InputError: another module has the head's weights.
    """
    mine = {p.data_ptr() for p in head.parameters()}
    for name, m in model.named_modules():
        if m is not head and any(p.data_ptr() in mine for p in m.parameters(recurse=False)):
            raise InputError(f"the last layer shares its weights with {name}: training it would change the features")


def _same_numbers(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor) or one.numel() != other.numel():
        return False
    return torch.equal(one.flatten().double(), other.detach().flatten().double())
