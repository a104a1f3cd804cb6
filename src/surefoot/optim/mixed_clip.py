"""Mixed clipping: a clipped average of the gradients and a clipped gradient, mixed (arXiv 2010.02519)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from surefoot.optim import norm as norms
from surefoot.optim import scales
from surefoot.optim._base import ClippedOptimizer, Work
from surefoot.optim.checks import check_number, nonfinite_message
from surefoot.optim.telemetry import on_device
from surefoot.optim.update import HALF


class MixedClip(ClippedOptimizer):
    """Mixed clipping: steps along a clipped average of the gradients and along the clipped gradient itself.

        m <- b m + (1 - b) g
        w <- w - η [ν min{1, γ/||m||} m + (1 - ν) min{1, γ/||g||} g]

    ν = 1 clips the momentum itself, ν = 0 is `GClip`. No step is longer than η γ. The paper writes min{η, γ'/||m||}
    with the longest step γ': its γ' is our η γ, so that here as in every other rule γ is a norm of gradients and a
    schedule of `lr` shortens all steps alike. (Its settings: lr=1, gamma=1 for CIFAR-10; lr=30, γ' = 5, which is
    gamma=1/6, for the language model.)

    m starts at 0 and is not corrected for it: it takes about 1/(1 - b) steps, a thousand by default, to come in.

    `telemetry()` judges by ||m|| (by ||g|| where ν = 0): `unclipped` and `clipped`, the norms and the scale are those
    of m. `path_length` adds up the lengths of both parts of a step, an upper bound on the step's own.

    Args:
        params: parameters or groups of them; each group may have its own lr, gamma, nu and so on.
        lr: η > 0.
        gamma: threshold γ in (0, inf] on the norms of m and g.
        nu: ν in [0, 1], the share of the average.
        momentum: b in [0, 1).
        weight_decay: λ >= 0, added to the gradient before both norms are taken (g + λ w), as the authors' code does.
        decoupled_weight_decay: shrink w by lr λ before the step instead, untouched by clipping.
        scope: "global" takes one norm over every parameter of every group, "group" one a group, "tensor" one a tensor.
        nonfinite: when ||g|| is not finite, "skip" leaves parameters and m untouched and counts the step, "raise"
            raises FloatingPointError before touching anything, "propagate" lets NaN through.
        maximize: ascend instead of descend.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = MixedClip([w], lr=1.0, gamma=1.0, nu=0.5, momentum=0.9)
        >>> (w.square().sum() / 2).backward()      # g = (3, 4), so m = (0.3, 0.4), which is not clipped
        >>> opt.step()
        >>> w.detach()                             # minus 0.5 (0.3, 0.4) and 0.5 (0.6, 0.8)
        tensor([2.5500, 3.4000])

    Source: B. Zhang, Jin, Fang, Wang, Improved Analysis of Clipping Algorithms for Non-convex Optimization,
    arXiv 2010.02519.
    """

    _step_supports_amp_scaling = False  # decay joins the gradient before its norm: GradScaler must unscale it first
    _all_ranks_finish = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        gamma: float,
        nu: float = 0.7,
        momentum: float = 0.999,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        scope: str = "global",
        nonfinite: str = "skip",
        maximize: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr,
            {"gamma": gamma, "nu": nu},
            momentum=momentum,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            scope=scope,
            nonfinite=nonfinite,
            maximize=maximize,
        )

    def check_rule(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError if gamma, nu or momentum is out of range, or an option has no effect here."""
        check_number("gamma", group["gamma"], 0.0, math.inf, open_low=True, inf=True)
        check_number("nu", group["nu"], 0.0, 1.0, fix="0 is plain clipping, 1 clips the momentum alone")
        if not group["momentum"] < 1:
            raise ValueError(f"momentum={group['momentum']!r} is outside [0, 1): m = b m + (1 - b) g is an average")
        for name in ("dampening", "nesterov"):
            if group[name]:
                raise ValueError(f"{name}={group[name]!r} has no meaning for MixedClip; leave it out")

    def scale(self, norm: Tensor, group: dict[str, Any]) -> Tensor:
        """Return min{1, γ/norm}, for the norms of m and of g alike."""
        return scales.gclip(norm, group["gamma"])

    def thresholds(self, group: dict[str, Any]) -> tuple[float, float]:
        """Return γ, and infinity for the floor that there is not."""
        return group["gamma"], math.inf

    def _gather(self, group: dict[str, Any]) -> Work:
        """Gather what the formula calls g: the gradient with its sign and its decay."""
        work = super()._gather(group)
        decay = 0.0 if group["decoupled_weight_decay"] else group["weight_decay"]
        if not work.params or not (decay or group["maximize"]):
            return work
        grads = list(torch._foreach_neg(work.grads)) if group["maximize"] else work.grads
        if decay:
            grads = list(torch._foreach_add(grads, [norms.local(p) for p in work.params], alpha=decay))
        rest = iter(grads)
        return Work(group, [None if g is None else next(rest) for g in work.all_grads], work.params, grads)

    def _finish_on_host(self, work: list[Work], sums: Sequence[Any]) -> None:
        roots = [norms.root(total) for total in sums]
        total = norms.hypot(roots)
        if not math.isfinite(total) and self.nonfinite == "raise":
            raise FloatingPointError(nonfinite_message([g for w in work for g in w.grads], total))
        if not math.isfinite(total) and self.nonfinite == "skip":
            judged = self._judge(roots, work).judged
            self._count(work, [[total] * len(ns) for ns in judged], [[0.0] * len(ns) for ns in judged], [0.0], None)
            return
        self._mix(work, roots, None)

    def _finish_on_device(self, work: list[Work], sums: Sequence[Any]) -> None:
        device = next(total.device for total in sums if isinstance(total, Tensor))
        roots = [norms.root(on_device(total, device)) for total in sums]
        total = norms.hypot(roots)
        bad = ~torch.isfinite(total)
        if self.nonfinite == "raise" and bool(bad):
            raise FloatingPointError(nonfinite_message([g for w in work for g in w.grads], float(total)))
        self._mix(work, roots, bad if self.nonfinite == "skip" else torch.zeros_like(bad))

    def _mix(self, work: list[Work], roots: list[Any], skip: Tensor | None) -> None:
        """Take the step for the norms of g, one a unit; `skip`, () bool, leaves it out where only the device knows."""
        for w in work:
            self._take_in(w, skip)
        found = [
            [None if g is None else self._average(p) for p, g in zip(w.group["params"], w.all_grads)] for w in work
        ]
        units = [w.group["params"] for w in work]
        if self.scope == "tensor":
            units = [[p] for params in units for p in params]
            found = [[m] for averages in found for m in averages]
        sums = norms.sums_of_squares(units, found)
        if skip is not None:
            sums = [on_device(total, skip.device) for total in sums]
        if not any(w.params for w in work):
            return
        of_g = self._judge(roots, work)
        of_m = self._judge([norms.root(total) for total in sums], work)
        s = [self._scales(ns, w) for ns, w in zip(of_g.judged, work)]
        t = [self._scales(ns, w) for ns, w in zip(of_m.judged, work)]
        lrs = [float(w.group["lr"]) if skip is None else w.group["lr"] for w in work]
        lengths = [
            lr * (w.group["nu"] * b * m + (1 - w.group["nu"]) * a * g)
            for lr, w, ss, ts, gs, ms in zip(lrs, work, s, t, of_g.own, of_m.own)
            for a, b, g, m in zip(_spread(ss, gs), _spread(ts, ms), gs, ms)
        ]
        told = [(m, b) if w.group["nu"] > 0 else (g, a) for w, g, m, a, b in zip(work, of_g.judged, of_m.judged, s, t)]
        self._count(work, [ns for ns, _ in told], [ss for _, ss in told], lengths, skip)
        for w, ss, ts in zip(work, s, t):
            for (params, grads, a), (_, _, b) in zip(w.by_scale(ss), w.by_scale(ts)):
                self._move(w.group, params, grads, a, b, skip)

    def _scales(self, judged: list[Any], w: Work) -> list[Any]:
        """Return the multiplier for each norm: floats for floats, () tensors for () tensors."""
        if not judged or isinstance(judged[0], Tensor):
            return list(self.scale(torch.stack(judged), w.group).unbind()) if judged else []
        return self.scale(torch.tensor(judged, dtype=torch.float64), w.group).tolist()

    def _count(
        self, work: list[Work], judged: list[list[Any]], s: list[list[Any]], lengths: list[Any], skip: Tensor | None
    ) -> None:
        verdicts = self._verdicts(work, judged, s)
        if skip is None:
            self._telemetry.record(verdicts, float(norms.hypot(lengths)))
        else:
            self._telemetry.record_on_device(verdicts, norms.hypot(lengths), skip)

    def _average(self, p: Tensor) -> Tensor:
        """Return this rank's part of m, at first 0; float32 for half-precision parameters, where 1 - b would vanish."""
        entry = self.state[p]
        if "average" not in entry:
            dtype = torch.float32 if p.dtype in HALF else p.dtype
            entry["average"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        return norms.local(entry["average"])

    def _take_in(self, w: Work, skip: Tensor | None) -> None:
        """Let the averages take in the gradients. With `skip` true they stay, and stand in for the gradients."""
        averages = [self._average(p) for p in w.params]
        w.grads = [g.to(m.dtype) for g, m in zip(w.grads, averages)]
        if skip is not None:  # not by a factor 0: NaN times 0 is NaN
            w.grads = [torch.where(skip.to(m.device), m, g) for g, m in zip(w.grads, averages)]
        for ms, gs in _alike(averages, w.grads):
            torch._foreach_lerp_(ms, gs, 1 - w.group["momentum"])

    def _move(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], s: Any, t: Any, skip: Tensor | None
    ) -> None:
        """Take the step for the multipliers s of the gradients and t of the averages."""
        lr, nu = group["lr"], group["nu"]
        keep = 1 - lr * group["weight_decay"] if group["decoupled_weight_decay"] else 1.0
        of_m, of_g = lr * nu * t, lr * (1 - nu) * s
        if skip is None:
            keep, of_m, of_g = float(keep), float(of_m), float(of_g)
        else:
            keep = keep * torch.ones_like(skip, dtype=torch.float64)
            keep = keep.masked_fill(skip, 1.0)
            of_m, of_g = of_m.masked_fill(skip, 0.0), of_g.masked_fill(skip, 0.0)
        averages = [self._average(p) for p in params]
        locals_ = [norms.local(p) for p in params]
        weights = [p.to(m.dtype) for p, m in zip(locals_, averages)]  # half precision is stepped in float32,
        for ws, ms, gs in _alike(weights, averages, grads):
            if group["decoupled_weight_decay"] and group["weight_decay"] != 0:
                torch._foreach_mul_(ws, _fit(keep, ws[0]))
            for xs, k, used in ((ms, of_m, nu > 0), (gs, of_g, nu < 1)):
                if used:
                    _subtract(ws, xs, k)
        for p, w in zip(locals_, weights):
            if p is not w:
                p.copy_(w)  # and rounded once

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        for p, i in zip(params, indices):
            saved = state_dict["state"].get(i, {})
            if "average" in saved:  # torch has just rounded it to the parameter's precision
                self.state[p]["average"] = saved["average"].to(p.device, copy=True)


def _spread(scales_: list[Any], own: list[Any]) -> list[Any]:
    """Return a multiplier for each piece: one for all, or one each."""
    return scales_ if len(scales_) == len(own) else scales_ * len(own)


def _alike(*columns: list[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Sort rows of tensors by device and dtype: yield the columns of those that one foreach kernel may take."""
    rows: dict[Any, list[tuple[Tensor, ...]]] = {}
    for row in zip(*columns):
        rows.setdefault((row[0].device, row[0].dtype), []).append(row)
    for found in rows.values():
        yield [list(column) for column in zip(*found)]


def _fit(k: Any, like: Tensor) -> Any:
    """Return a factor as a foreach kernel takes it: a float as it is, a () tensor beside the tensors."""
    return k.to(like.device, like.dtype) if isinstance(k, Tensor) else k


def _subtract(weights: list[Tensor], tensors: list[Tensor], k: Any) -> None:
    if isinstance(k, Tensor):
        torch._foreach_sub_(weights, torch._foreach_mul(tensors, _fit(k, weights[0])))
    else:
        torch._foreach_sub_(weights, tensors, alpha=k)
