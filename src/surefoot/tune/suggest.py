"""lr, γ, δ and the warm-up from a short probing run, each with the constant, the rule and the source behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.measurement import Measurement
from surefoot.measure.smoothness_fit import FEWEST as FEWEST_FOR_FIT
from surefoot.measure.smoothness_fit import SmoothnessFit
from surefoot.tune.probing_run import LEAST, NOISE, ProbingRun, probing_run
from surefoot.tune.rules import (
    DELTA,
    EDGE,
    MEAN_OF_SCHEDULE,
    REACH,
    clipping_bias,
    edge_lr,
    floor_delta,
    longest_step_gamma,
    proposition_7,
    zhang_2020,
)

OPTIMIZERS = ("delta-gclip", "gclip", "sgd")
DEFAULT_BUDGET = 0.1
_DRIFT = 2.0  # L or g of the last quarter over that of the quarter before it: beyond, they have not settled
_FAR = 5.0  # your lr over the one suggested, or the inverse: beyond, it is named
_RESAMPLES = 1000


@dataclass(frozen=True)
class Reason:
    """A suggested number and where it comes from.

    Attributes:
        name: "lr", "γ", "δ" or "warm-up".
        value: what is suggested.
        low: the lower end of its interval (95%, bootstrap over the steps measured); without one the value itself.
        high: the upper end.
        constants: the measured constants that led to it, as a reader would write them.
        rule: the formula.
        source: where the rule comes from.
    """

    name: str
    value: float
    low: float
    high: float
    constants: str
    rule: str
    source: str


@dataclass(frozen=True)
class Suggestion:
    """What `suggest` found. Everything in it is an estimate.

    Attributes:
        lr: η, the peak of the schedule.
        gamma: γ; infinite for optimizer "sgd".
        delta: δ.
        momentum: as given.
        schedule: as given.
        warmup: steps of linear warm-up.
        optimizer: as given.
        reasons: a row for each number.
        others: what other rules say: (rule, lr, γ, source).
        measurements: L, g, the noise and, if they can be told, L0 and L1.
        cost: gradients of a batch that were taken.
        steps: of the run that the suggestion is for.
        doubts: why some of this may be wrong, and what would help; empty where nothing speaks against it.
        notes: what else there is to know: how far off your own lr is, why the noise is unknown.
        fit: the line L0 + L1 g, None for fewer than ten points.
        observations: of each probing step: step, loss, gradient norm, smoothness, step size h.
        sure: False where the constants had not settled or could hardly be measured.
    """

    lr: float
    gamma: float
    delta: float
    momentum: float
    schedule: str
    warmup: int
    optimizer: str
    reasons: tuple[Reason, ...]
    others: tuple[tuple[str, float, float, str], ...]
    measurements: tuple[Measurement, ...]
    cost: int
    steps: int
    doubts: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fit: SmoothnessFit | None = None
    observations: tuple[dict[str, float], ...] = field(default=(), repr=False)

    @property
    def sure(self) -> bool:
        """Whether nothing speaks against the suggestion."""
        return not self.doubts

    def config(self) -> dict[str, Any]:
        """Return the suggestion as options of `surefoot train`."""
        found: dict[str, Any] = {"optimizer": self.optimizer, "lr": self.lr}
        if self.optimizer != "sgd":
            found["gamma"] = self.gamma
        if self.optimizer == "delta-gclip":
            found["delta"] = self.delta
        found["momentum"] = self.momentum
        if self.schedule != "constant":
            found["lr_schedule"] = self.schedule
        if self.warmup:
            found["warmup"] = self.warmup
        return found

    def to_json(self) -> dict[str, Any]:
        """Return a document that JSON can hold."""
        document = {
            "config": self.config(),
            "reasons": [asdict(r) for r in self.reasons],
            "others": [{"rule": r, "lr": lr, "gamma": g, "source": s} for r, lr, g, s in self.others],
            "measurements": [m.to_json() for m in self.measurements],
            "cost": self.cost,
            "steps": self.steps,
            "doubts": list(self.doubts),
            "notes": list(self.notes),
            "fit": None if self.fit is None else self.fit.to_json(),
            "observations": list(self.observations),
        }
        return _finite(document)

    def __str__(self) -> str:
        rows = [("", "value", "interval", "from", "rule", "source")]
        for r in self.reasons:
            span = "" if r.low == r.high else f"{r.low:.3g} to {r.high:.3g}"
            rows.append((r.name, f"{r.value:.4g}", span, r.constants, r.rule, r.source))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows]
        lines.append(f"cost: {self.cost:,} gradients, {self.cost / self.steps:.1%} of a run of {self.steps:,} steps")
        lines += [f"not sure: {doubt}" for doubt in self.doubts]
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"for comparison, {rule}: lr {lr:.3g}, γ {g:.3g} ({source})" for rule, lr, g, source in self.others]
        return "\n".join(lines)


def suggest(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    loader: Any,
    *,
    steps: int,
    budget: float | None = None,
    optimizer: str = "delta-gclip",
    schedule: str = "constant",
    momentum: float = 0.0,
    lr: float | None = None,
    accumulate: int = 1,
    eps: float | None = None,
    seed: int = 0,
) -> Suggestion:
    """Suggest lr, γ, δ and a warm-up for a training run, from `budget` times its gradients.

    A short run of gradient steps of length 1/L measures L, the smoothness along steps, and g, the gradient norm. Then

        mean of lr over the schedule = EDGE (1 - beta) / L,        lr γ = REACH (1 - beta) g / L,

    with the constants of `surefoot.tune.rules`: the edge of stability, and a step somewhat longer than a typical one
    there. Weights, buffers, gradients, random states and the loader are put back.

    Args:
        model: as it is before training.
        loss_fn: (model, batch) -> the mean loss of a batch, a tensor of one element.
        loader: what you loop over to train: a DataLoader, a list of batches; not an iterator.
        steps: of the run to come, at least 1.
        budget: in (0, 1]: the part of the run's gradients that may be spent. None: a tenth, but at least 25 gradients,
            which is as few as anything can be measured with.
        optimizer: "delta-gclip", "gclip" or "sgd".
        schedule: "constant", "linear" or "cosine": lr stays, or falls to 0 that way.
        momentum: beta in [0, 1), not dampened.
        lr: what you would have taken; the notes then say how far off that is. It does not enter the suggestion.
        accumulate: batches of the loader in one step of the optimizer.
        eps: relative error of the gradients' arithmetic: with autocast torch.finfo(torch.bfloat16).eps.
        seed: of the bootstrap.

    Returns:
        The suggestion; print it for the table of reasons. `doubts` says what speaks against it.

    Raises:
        InputError: an option out of its range, too small a budget, a loss that is not finite, a loader that cannot be
            gone through again, or a run in which nothing could be measured.

    Example:
        >>> import torch
        >>> model = nn.Linear(1, 1, bias=False)
        >>> batches = [torch.tensor([[1.0]]), torch.tensor([[-1.0]])]  # the loss w²/2 has the smoothness 1
        >>> found = suggest(model, lambda m, x: m(x).square().mean() / 2, batches, steps=1000)
        >>> round(found.lr, 3)  # EDGE / L
        1.5
    """
    _check(steps, budget, optimizer, schedule, momentum, lr, accumulate)
    allowed = max(int(steps * DEFAULT_BUDGET), LEAST) if budget is None else int(steps * budget + 1e-9)
    if allowed < LEAST:
        raise InputError(
            f"budget={budget!r} of steps={steps} is {allowed} gradients; measuring anything takes {LEAST}: "
            + (
                f"give budget={math.ceil(1000 * LEAST / steps) / 1000:g} or more"
                if steps >= LEAST
                else "give more steps"
            )
        )
    run = probing_run(model, loss_fn, loader, allowed * accumulate, accumulate=accumulate, eps=eps)
    seen = [o for o in run.probe.observations if o.outcome == "measured" and o.smoothness > 0]
    vanished = bool(run.probe.observations) and run.probe.observations[-1].outcome == "no step"
    if len(seen) < (1 if vanished else max(4, len(run.probe.observations) // 3)):
        why = (
            f"{run.stopped}; look at that batch, and at what the loss does there"
            if run.stopped
            else "rounding drowned the differences of the gradients. In half precision give "
            "eps=torch.finfo(torch.bfloat16).eps, or measure in float32"
        )
        raise InputError(f"loss_fn: only {len(seen)} of {len(run.probe.observations)} steps could be measured: {why}")
    half = seen[len(seen) // 2 :]
    smoothness = np.array([o.smoothness for o in half])
    norms = np.array([o.grad_norm for o in half])
    latest = smoothness[len(smoothness) // 2 :]
    L, g = max(float(np.median(smoothness)), float(np.median(latest))), float(np.median(norms))
    L_span, g_span = _interval(smoothness, seed), _interval(norms, seed)
    L_span = (min(L, L_span[0]), max(L, L_span[1]))
    fit = run.probe.fit() if len(seen) >= FEWEST_FOR_FIT else None
    identified = fit is not None and fit.decision not in ("not identifiable", "undecided")
    L1 = fit.L1.value if fit is not None and identified else 0.0
    eta = edge_lr(L, schedule=schedule, momentum=momentum)
    gamma = math.inf if optimizer == "sgd" else longest_step_gamma(L, g, eta, momentum=momentum)
    longest = max(o.grad_norm for o in seen)
    delta = floor_delta(eta, L1, longest, momentum=momentum) if optimizer == "delta-gclip" else 0.0
    warmup = _warmup(run, eta, schedule, momentum)
    beta = f" (1 - {momentum:g})" if momentum else ""
    mean = "lr" if schedule == "constant" else f"mean lr ({schedule})"
    reasons = [
        Reason(
            "lr", eta,
            edge_lr(L_span[1], schedule=schedule, momentum=momentum),
            edge_lr(L_span[0], schedule=schedule, momentum=momentum),
            f"L = {L:.3g}", f"{mean} = {EDGE:g}{beta} / L", "edge of stability",
        ),
    ]  # fmt: skip
    if optimizer != "sgd":
        reasons.append(
            Reason(
                "γ", gamma, gamma * g_span[0] / g, gamma * g_span[1] / g,
                f"L = {L:.3g}, g = {g:.3g}", f"lr γ = {REACH:g}{beta} g / L", "surefoot, heuristic",
            )
        )  # fmt: skip
    if optimizer == "delta-gclip":
        bias = f"; clipping bias {clipping_bias(delta, run.sigma):.3g}" if run.sigma else ""
        reasons.append(
            Reason(
                "δ", delta, delta, delta,
                (f"L1 = {L1:.3g}, max g = {longest:.3g}" if identified else f"max g = {longest:.3g}, L1 not identified")
                + bias,
                f"min({DELTA:g}, (1 - beta)/(3 lr L1 max g))", "surefoot, Prop. 8 and 4",
            )
        )  # fmt: skip
    reasons.append(
        Reason(
            "warm-up", warmup, warmup, warmup, f"L of the first steps, {len(seen)} measured",
            "while lr L > 4 before L settles", "edge of stability",
        )
    )  # fmt: skip
    return Suggestion(
        lr=_digits(eta),
        gamma=_digits(gamma),
        delta=_digits(delta),
        momentum=momentum,
        schedule=schedule,
        warmup=warmup,
        optimizer=optimizer,
        reasons=tuple(reasons),
        others=_others(fit),
        measurements=_measurements(run, L, L_span, g, g_span, fit, len(half)),
        cost=run.cost,
        steps=steps,
        doubts=tuple(_doubts(run, smoothness, norms, L_span)),
        notes=tuple(_notes(run, lr, eta)),
        fit=fit,
        observations=tuple(
            {
                "step": o.step,
                "loss": o.loss,
                "grad_norm": o.grad_norm,
                "smoothness": o.smoothness,
                "h": h,
            }
            for o, h in zip(run.probe.observations, run.steps)
        ),
    )


def _check(
    steps: int, budget: float | None, optimizer: str, schedule: str, momentum: float, lr: float | None, accumulate: int
) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps={steps!r} is no number of steps; give how many the run will take")
    if budget is not None and not 0 < budget <= 1:
        raise InputError(f"budget={budget!r} is outside (0, 1]; give the part of the run that may be spent, e.g. 0.1")
    if optimizer not in OPTIMIZERS:
        raise InputError(
            f"optimizer={optimizer!r} is none that the rules are about; choose one of {', '.join(OPTIMIZERS)}"
        )
    if schedule not in MEAN_OF_SCHEDULE:
        raise InputError(f"schedule={schedule!r} is unknown; choose one of {', '.join(MEAN_OF_SCHEDULE)}")
    if not 0 <= momentum < 1:
        raise InputError(f"momentum={momentum!r} is outside [0, 1); give for example 0.9")
    if lr is not None and not 0 < lr < math.inf:
        raise InputError(f"lr={lr!r} is no step size; give a positive number, or leave it out")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise InputError(f"accumulate={accumulate!r} is no number of batches; give at least 1")


def _interval(values: np.ndarray[Any, Any], seed: int) -> tuple[float, float]:
    """Return a 95% bootstrap interval of the median, resampled in blocks since neighbours are alike."""
    n = len(values)
    block = max(1, round(math.sqrt(n)))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, n, size=(_RESAMPLES, -(-n // block)))
    rows = (starts[:, :, None] + np.arange(block)) % n
    medians = np.median(values[rows.reshape(_RESAMPLES, -1)[:, :n]], axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    return float(low), float(high)


def _warmup(run: ProbingRun, lr: float, schedule: str, momentum: float) -> int:
    """Return the number of the last step before L settled at which a step of this lr would have been unstable."""
    mean_lr = lr * MEAN_OF_SCHEDULE[schedule] / (1 - momentum)
    early = run.probe.observations[: len(run.probe.observations) // 2]
    unstable = [i + 1 for i, o in enumerate(early) if o.outcome == "measured" and mean_lr * o.smoothness > 4]
    return max(unstable, default=0)


def _others(fit: SmoothnessFit | None) -> tuple[tuple[str, float, float, str], ...]:
    if fit is None or not fit.L0.value > 0:
        return ()
    L0, L1 = fit.L0.value, fit.L1.value
    return (
        ("Prop. 7", *proposition_7(L0, L1), "surefoot, Prop. 7, from the fitted L0 and L1"),
        ("J. Zhang 2020", *zhang_2020(L0, L1), "arXiv 1905.11881, theorem 3, from the fitted L0 and L1"),
    )


def _measurements(
    run: ProbingRun, L: float, L_span: tuple[float, float], g: float, g_span: tuple[float, float],
    fit: SmoothnessFit | None, samples: int,
) -> tuple[Measurement, ...]:  # fmt: skip
    def estimate(
        name: str, value: float, how: str, span: tuple[float, float] | None = None, n: int = samples
    ) -> Measurement:
        details = {} if span is None else {"interval": list(span)}
        return Measurement(name, value, "estimate", "estimate", how, samples=n, dtype="float64", details=details)

    found = [
        estimate("L along steps of 1/L", L, "the larger median of the run's last half and last quarter", L_span),
        estimate("gradient norm", g, "median over the second half of the probing run", g_span),
    ]
    if run.sigma is not None and run.mean_norm is not None:
        last = "batches at the last point"
        found.append(estimate("noise of a batch's gradient", run.sigma, last, n=NOISE))
        found.append(estimate("norm of the mean gradient", run.mean_norm, f"{last}, less their noise", n=NOISE))
    return (*found, fit.L0, fit.L1) if fit else tuple(found)


def _doubts(
    run: ProbingRun, smoothness: np.ndarray[Any, Any], norms: np.ndarray[Any, Any], span: tuple[float, float]
) -> Sequence[str]:
    found = []
    if run.stopped:
        found.append(f"the probing run ended early: {run.stopped}")
    middle = len(smoothness) // 2
    for name, values in (("L", smoothness), ("the gradient norm", norms)) if middle else ():
        before, after = float(np.median(values[:middle])), float(np.median(values[middle:]))
        ratio = max(before, after) / min(before, after)
        if ratio > _DRIFT:
            found.append(
                f"{name} went from {before:.3g} to {after:.3g} within the last half of the probing run and has not "
                "settled; give a larger budget, or suggest again after an epoch"
            )
    if span[1] > 2 * span[0]:
        found.append(
            f"L lies between {span[0]:.3g} and {span[1]:.3g}: batches differ; give a larger budget or larger batches"
        )
    return found


def _notes(run: ProbingRun, lr: float | None, eta: float) -> Sequence[str]:
    found = []
    if lr is not None and not 1 / _FAR <= lr / eta <= _FAR:
        size = f"{lr / eta:.3g} times as large as" if lr > eta else f"only {lr / eta:.2g} times"
        found.append(f"your lr of {lr:g} is {size} the one suggested, {_digits(eta):g}")
    if run.unknown:
        found.append(f"how far batches differ (the noise) is unknown: {run.unknown}")
    return found


def _digits(x: float) -> float:
    return float(f"{x:.4g}")


def _finite(value: Any) -> Any:
    """Return the document with infinities and NaN as words."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
