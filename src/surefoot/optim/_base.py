"""The one `step()`: norm, multiplier, non-finite policy, telemetry, update. A rule adds its checks and a scale."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from surefoot.optim import norm as norms
from surefoot.optim.telemetry import Telemetry

NONFINITE = ("skip", "raise", "propagate")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


def check_number(
    name: str, value: object, low: float, high: float, *, open_low: bool = False, inf: bool = False, fix: str = ""
) -> None:
    """Raise TypeError or ValueError unless `value` is a number in [low, high] (or (low, high] with `open_low`).

    An infinite bound is not itself in the range, unless `inf` lets infinity in.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a number")
    within = (low < value if open_low else low <= value) and value <= high
    if not within or (abs(value) == math.inf and not inf):
        left = f"({low:g}" if open_low or low == -math.inf else f"[{low:g}"
        right = "inf)" if high == math.inf and not inf else f"{high:g}]"
        raise ValueError(f"{name}={value!r} is outside {left}, {right}{'; ' + fix if fix else ''}")


def floor_threshold(gamma: float, delta: float) -> float:
    """Return γ/δ, the norm from which the floor acts: infinite for δ = 0."""
    return gamma / delta if delta > 0 else math.inf


def nonfinite_message(grads: Sequence[Tensor], norm: float) -> str:
    """Say which of the gradients are not finite."""
    bad = [i for i, g in enumerate(grads) if not torch.isfinite(g).all()]
    where = (
        f"{len(bad)} of {len(grads)} gradients hold NaN or infinity (the first: number {bad[0]}, shape "
        f"{tuple(grads[bad[0]].shape)})"
        if bad
        else "the gradients are finite but their norm overflows"
    )
    return f"gradient norm is {norm}: {where}; lower lr, or use nonfinite='skip' to leave out such steps"


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: list[Tensor | None],
    scales: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float,
    nesterov: bool,
    weight_decay: float,
    decoupled_weight_decay: bool,
    maximize: bool,
) -> None:
    """Update `params` and `buffers` in place; the gradients are only read.

        d = scale g + λ w           (w <- (1 - lr λ) w first and d = scale g, if decoupled)
        b = μ b + (1 - τ) d         (b = d at first)
        w <- w - lr b               (d + μ b in place of b with Nesterov)

    the rule of `torch.optim.SGD` for the gradient scale g. A missing buffer (None) is filled in.
    """
    for i, (w, g, scale) in enumerate(zip(params, grads, scales)):
        d = g * scale
        if maximize:
            d = d.neg_()
        if weight_decay != 0:
            if decoupled_weight_decay:
                w.mul_(1 - lr * weight_decay)
            else:
                d = d.add_(w, alpha=weight_decay)
        if momentum != 0:
            b = buffers[i]
            if b is None:
                b = buffers[i] = d.clone()
            else:
                b.mul_(momentum).add_(d, alpha=1 - dampening)
            d = d.add_(b, alpha=momentum) if nesterov else b
        w.add_(d * -lr if isinstance(lr, Tensor) else d, alpha=1 if isinstance(lr, Tensor) else -lr)


class ClippedOptimizer(Optimizer, ABC):
    """SGD whose gradient is multiplied by a function of its own norm. Subclasses say which function."""

    # Each parameter group holds these options of `sgd_` and the letters of its rule.
    _shared = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "decoupled_weight_decay", "maximize")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        rule: dict[str, Any],
        *,
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        scope: str = "global",
        nonfinite: str = "skip",
        maximize: bool = False,
    ) -> None:
        check_choice("scope", scope, norms.SCOPES)
        check_choice("nonfinite", nonfinite, NONFINITE)
        self.scope = scope
        self.nonfinite = nonfinite
        self._telemetry = Telemetry()
        sgd = dict(
            zip(self._shared, (lr, momentum, dampening, nesterov, weight_decay, decoupled_weight_decay, maximize))
        )
        super().__init__(params, {**sgd, **rule})

    @abstractmethod
    def _scale(self, norm: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the multiplier for each norm: (K,) -> (K,)."""

    @abstractmethod
    def _thresholds(self, group: dict[str, Any]) -> tuple[float, float]:
        """Return the norm above which a step counts as clipped, and the one from which the floor acts."""

    @abstractmethod
    def _check_rule(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError if the rule's own options are out of range."""

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("momentum", group["momentum"], 0.0, math.inf)
        check_number("dampening", group["dampening"], -math.inf, math.inf)
        check_number("weight_decay", group["weight_decay"], 0.0, math.inf)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True needs momentum > 0 and dampening = 0, not momentum={group['momentum']}, "
                f"dampening={group['dampening']}"
            )
        self._check_rule(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options; a rejected group leaves the optimizer as it was."""
        whole = {**self.defaults, **param_group}
        check_number("lr", whole["lr"], 0.0, math.inf, open_low=True)
        self._check_group(whole)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; the gradients are read, never written.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: with nonfinite="raise", when the norm is not finite; nothing has been touched.
            ValueError: an option of a group was rewritten to something out of range; nothing has been touched.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        grads = [[cast(Tensor, p.grad) for p in params] for params in groups]
        everything = [g for group in grads for g in group]
        if not everything:
            return loss
        for g in everything:
            if g.is_sparse:
                raise TypeError(
                    f"a sparse gradient of shape {tuple(g.shape)}: build the embedding with sparse=False, "
                    "or give these parameters an optimizer of their own"
                )
        for group in self.param_groups:
            # schedules warm up from lr = 0, and torch's LinearLR ends a rounding error below it
            check_number("lr", group["lr"], -math.inf, math.inf)
            self._check_group(group)
        per_tensor = norms.tensor_norms(everything)
        judged = norms.judged(per_tensor, [len(g) for g in grads], self.scope)
        scales = [self._scale(n, group).to(n) for n, group in zip(judged, self.param_groups)]
        total = norms.combine(per_tensor)
        finite = self.nonfinite == "propagate" or bool(torch.isfinite(total))
        if not finite and self.nonfinite == "raise":
            raise FloatingPointError(nonfinite_message(everything, float(total)))
        if not finite:  # nothing moves, whichever norm it was
            judged = [total.expand_as(n) for n in judged]
            scales = [torch.zeros_like(s) for s in scales]
        self._record(per_tensor, judged, scales, [len(g) for g in grads])
        if finite:
            for group, params, group_grads, scale in zip(self.param_groups, groups, grads, scales):
                self._update(group, params, group_grads, scale)
        return loss

    def _record(self, per_tensor: Tensor, judged: list[Tensor], scales: list[Tensor], sizes: list[int]) -> None:
        used = [i for i, size in enumerate(sizes) if size]
        thresholds = [self._thresholds(self.param_groups[i]) for i in used]
        lengths = [
            norms.combine(self.param_groups[i]["lr"] * scales[i] * n)
            for i, n in enumerate(per_tensor.split(sizes))
            if sizes[i]
        ]
        if self.scope == "global" and len(set(thresholds)) == 1:
            used, thresholds = used[:1], thresholds[:1]  # one norm, one rule: one verdict a step
        counts = [judged[i].numel() for i in used]
        limits = torch.tensor(thresholds, dtype=torch.float64, device=per_tensor.device)
        limits = limits.repeat_interleave(torch.tensor(counts, device=per_tensor.device), dim=0)
        self._telemetry.record(
            torch.cat([judged[i] for i in used]),
            torch.cat([scales[i] for i in used]),
            limits[:, 0],
            limits[:, 1],
            norms.combine(torch.stack(lengths)),
        )

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], scale: Tensor) -> None:
        buffers: list[Tensor | None] = [self.state[p].get("momentum_buffer") for p in params]
        scales = list(scale.expand(len(params)).unbind())
        sgd_(params, grads, buffers, scales, **{name: group[name] for name in self._shared})
        if group["momentum"] != 0:
            for p, buffer in zip(params, buffers):
                self.state[p]["momentum_buffer"] = buffer

    def telemetry(self, *, reset: bool = True) -> dict[str, float]:
        """Return what the steps since the last call did, as plain numbers.

        `steps`; how many norms were `unclipped` (norm <= γ), `clipped`, `floored` (norm >= γ/δ) and `skipped` (not
        finite): one a step with scope="global" (one a group where the groups differ in γ or δ), else one a group or
        tensor; `clip_fraction` and `floor_fraction` of all of them; `norm_min`, `norm_mean`, `norm_max` over the
        finite ones; `path_length`, the sum of h ||g||, which is the length of the path when there is neither momentum
        nor decay; the last step's largest `norm` and smallest `scale` (NaN before the first, 0 if it was skipped).

        Args:
            reset: begin to count anew (the default).
        """
        return self._telemetry.read(reset=reset)

    def __getstate__(self) -> dict[str, Any]:  # torch's pickles nothing but defaults, state and groups
        own = {"scope": self.scope, "nonfinite": self.nonfinite, "_telemetry": self._telemetry}
        return {**super().__getstate__(), **own}

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dictionary with the counts under "telemetry"."""
        return {**super().state_dict(), "telemetry": self._telemetry.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave; one of `torch.optim.SGD` for the same parameters is welcome too."""
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):  # torch says so if not
            own = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
            groups = [{**mine, **saved} for mine, saved in zip(own, groups)]
        super().load_state_dict({"state": state_dict["state"], "param_groups": groups})
        self._telemetry.load(state_dict.get("telemetry"))
