"""The one `step()`: norm, multiplier, non-finite policy, telemetry, update. A rule adds its checks and a scale."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from surefoot.optim import norm as norms
from surefoot.optim.checks import check_choice, check_number, nonfinite_message, refuse_sparse
from surefoot.optim.telemetry import Telemetry, on_device
from surefoot.optim.update import Kernel

NONFINITE = ("skip", "raise", "propagate")


@dataclass
class Work:
    """A parameter group and this rank's part of its gradients."""

    group: dict[str, Any]
    all_grads: list[Tensor | None]  # one for each of the group's parameters
    params: list[Tensor]  # those that have a gradient
    grads: list[Tensor]  # theirs
    letters: dict[str, Any] = field(init=False)  # the rule's, for this step: the group, unless some follow a norm

    def __post_init__(self) -> None:
        self.letters = self.group

    def by_scale(self, scales: Sequence[Any]) -> Iterator[tuple[list[Tensor], list[Tensor], Any]]:
        """Yield parameters and gradients that share a multiplier: all of them, or one tensor at a time."""
        if not self.params:
            return
        if len(scales) == 1:
            yield self.params, self.grads, scales[0]
        else:
            for p, g, s in zip(self.params, self.grads, scales):
                yield [p], [g], s


@dataclass
class Judgement:
    """For each group: the norms its multipliers follow, and the norms of its own pieces. Floats or () tensors."""

    judged: list[list[Any]]
    own: list[list[Any]]
    total: Any  # the norm over everything


class ClippedOptimizer(Optimizer, ABC):
    """SGD whose gradient is multiplied by a function of its own norm. Subclasses say which function.

    For a rule of one's own: `scale`, `thresholds` and `check_rule`, and letters handed to the constructor as `rule`, so
    that each parameter group holds its own. `surefoot.testing.OptimizerSuite` has the tests.

    `torch.compile(opt.step, fullgraph=True)` compiles the step into one graph, on the CPU too (not with
    nonfinite="raise", which has to look at the norm, and not the first step with dampening). The first two steps are
    compiled, since the first makes the state; a schedule that rewrites lr, a number or a tensor, compiles nothing anew.
    A scheduler of torch wraps `opt.step` in a function that the compiler passes over: leave `fullgraph=True` out where
    one has been built over the optimizer; the step within is one graph all the same.

    Under `torch.amp.GradScaler` unscaling is folded into the step, and the rule sees the norm of the unscaled gradient.
    A step for which the scaler found an overflow is left out whatever `nonfinite` says: it is how a scaler looks for
    its scale.

    The other options are those of `DeltaGClip`.

    Args:
        params: parameters or groups of them.
        lr: η > 0.
        rule: the letters of the rule with their defaults.
    """

    # Each parameter group holds these options and the letters of its rule.
    _shared = ("lr", "momentum", "dampening", "nesterov", "weight_decay", "decoupled_weight_decay", "maximize")
    _step_supports_amp_scaling = True  # GradScaler leaves unscaling and skipping to step()
    _all_ranks_finish = False  # whether a rank without gradients has to go on, to take part in another norm

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
        master_weights: bool = False,
    ) -> None:
        check_choice("scope", scope, norms.SCOPES)
        check_choice("nonfinite", nonfinite, NONFINITE)
        self.scope = scope
        self.nonfinite = nonfinite
        self._telemetry = Telemetry()
        self._kernel = Kernel(master_weights=master_weights)
        sgd = dict(
            zip(self._shared, (lr, momentum, dampening, nesterov, weight_decay, decoupled_weight_decay, maximize))
        )
        super().__init__(params, {**sgd, **rule})

    @abstractmethod
    def scale(self, norm: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the multiplier for each norm: (K,) -> (K,)."""

    @abstractmethod
    def thresholds(self, group: dict[str, Any]) -> tuple[float, float]:
        """Return the norm above which a step counts as clipped, and the one from which the floor acts."""

    @abstractmethod
    def check_rule(self, group: dict[str, Any]) -> None:
        """Raise ValueError or TypeError if the rule's own options are out of range."""

    def _settle(self, work: list[Work], norm: float | Tensor) -> None:
        """Set each `letters` for the norm over everything; NaN if the step is left out."""

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("momentum", group["momentum"], 0.0, math.inf)
        check_number("dampening", group["dampening"], -math.inf, math.inf)
        check_number("weight_decay", group["weight_decay"], 0.0, math.inf)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"nesterov=True needs momentum > 0 and dampening = 0, not momentum={group['momentum']}, "
                f"dampening={group['dampening']}"
            )
        self.check_rule(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options; a rejected group leaves the optimizer as it was."""
        whole = {**self.defaults, **param_group}
        check_number("lr", whole["lr"], 0.0, math.inf, open_low=True)
        self._check_group(whole)
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take one step; the gradients are read, never written.

        Args:
            closure: re-evaluates the model and returns the loss.

        Returns:
            The closure's loss, or None.

        Raises:
            FloatingPointError: with nonfinite="raise", when the norm is not finite; nothing has been touched.
            ValueError: an option of a group was rewritten to something out of range; nothing has been touched.
            TypeError: a sparse gradient; nothing has been touched.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._step()
        return loss

    def _step(self) -> None:
        work = [self._gather(group) for group in self.param_groups]
        units: list[Sequence[Tensor]] = [w.group["params"] for w in work]
        grads: list[Sequence[Tensor | None]] = [w.all_grads for w in work]
        if self.scope == "tensor":
            units = [[p] for params in units for p in params]
            grads = [[g] for found in grads for g in found]
        idle = not any(w.params for w in work)
        if idle and not any(norms.is_distributed(*params) for params in units):
            return
        for w in work:
            lr = w.group["lr"]
            waits = isinstance(lr, Tensor) and (lr.device.type != "cpu" or torch.compiler.is_compiling())
            if not waits or lr.numel() != 1:
                # schedules warm up from lr = 0, and torch's LinearLR ends a rounding error below it
                check_number("lr", lr, -math.inf, math.inf)
            self._check_group(w.group)
        sums = norms.sums_of_squares(units, grads)  # where parameters are cut up, every rank takes part in this
        if idle and not self._all_ranks_finish:
            return
        if all(isinstance(total, float) for total in sums):
            self._finish_on_host(work, sums)
        else:
            self._finish_on_device(work, sums)

    def _gather(self, group: dict[str, Any]) -> Work:
        everyone = group["params"]
        found = [p.grad for p in everyone]
        if norms.is_distributed(*everyone):
            found = [norms.local_gradient(p) for p in everyone]
        grads = [g for g in found if g is not None]
        params = everyone if len(grads) == len(found) else [p for p, g in zip(everyone, found) if g is not None]
        if any([g.is_sparse for g in grads]):
            refuse_sparse(next(g for g in grads if g.is_sparse))
        return Work(group, found, params, grads)

    def _judge(self, roots: list[Any], work: list[Work]) -> Judgement:
        """Sort the roots of the sums of squares (one a unit) by group."""
        if self.scope != "tensor":
            total = norms.hypot(roots)
            own = [[n] for n in roots]
            return Judgement([[total]] * len(work) if self.scope == "global" else own, own, total)
        rest = iter(roots)
        pieces = [[next(rest) for _ in w.all_grads] for w in work]
        own = [[n for n, g in zip(piece, w.all_grads) if g is not None] for piece, w in zip(pieces, work)]
        return Judgement(own, own, norms.hypot(roots))  # of all roots: also where this rank has no gradient

    def _finish_on_host(self, work: list[Work], sums: Sequence[Any]) -> None:
        """Take the step with norms that are plain numbers."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        unscale = 1.0 if grad_scale is None else 1.0 / float(grad_scale)
        overflow = found_inf is not None and float(found_inf) != 0
        j = self._judge([unscale * norms.root(total) for total in sums], work)
        finite = math.isfinite(j.total) and not overflow
        if not finite and not overflow and self.nonfinite == "raise":
            raise FloatingPointError(nonfinite_message([g for w in work for g in w.grads], j.total))
        skipped = not finite and (overflow or self.nonfinite == "skip")
        self._settle(work, math.nan if skipped else j.total)
        if skipped:
            why = j.total if not math.isfinite(j.total) else math.nan
            still = [[0.0] * len(ns) for ns in j.judged]
            self._telemetry.record(self._verdicts(work, [[why] * len(ns) for ns in j.judged], still), 0.0)
            return
        scales = [
            self.scale(torch.tensor(ns, dtype=torch.float64), w.letters).tolist() if ns else []
            for ns, w in zip(j.judged, work)
        ]
        lengths = [float(w.group["lr"]) * s * n for w, ss, ns in zip(work, scales, j.own) for s, n in zip(ss, ns)]
        self._telemetry.record(self._verdicts(work, j.judged, scales), norms.hypot(lengths))
        for w, ss in zip(work, scales):
            for params, grads, s in w.by_scale(ss):
                self._kernel.move(self.state, w.group, params, grads, s * unscale)

    def _finish_on_device(self, work: list[Work], sums: Sequence[Any]) -> None:
        """Take the step with norms that stay on the device: nothing waits, unless nonfinite="raise" asks it to."""
        device = next(total.device for total in sums if isinstance(total, Tensor))
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        unscale = 1.0 if grad_scale is None else 1.0 / grad_scale.to(device, torch.float64)
        sums = [on_device(total, device) for total in sums]
        j = self._judge([unscale * norms.root(total) for total in sums], work)
        bad = ~torch.isfinite(j.total)
        overflow = torch.zeros_like(bad) if found_inf is None else found_inf.to(device) != 0
        if self.nonfinite == "raise" and bool(bad & ~overflow):
            raise FloatingPointError(nonfinite_message([g for w in work for g in w.grads], float(j.total)))
        skip = overflow | bad if self.nonfinite == "skip" else overflow
        self._settle(work, j.total.masked_fill(skip, math.nan))
        scales = [list(self.scale(torch.stack(ns), w.letters).unbind()) if ns else [] for ns, w in zip(j.judged, work)]
        lengths = [w.group["lr"] * s * n for w, ss, ns in zip(work, scales, j.own) for s, n in zip(ss, ns)]
        verdicts = self._verdicts(work, j.judged, scales)
        self._telemetry.record_on_device(verdicts, norms.hypot(lengths), skip)
        for w, ss in zip(work, scales):
            for params, grads, s in w.by_scale(ss):
                self._kernel.move_on_device(self.state, w.group, params, grads, s * unscale, skip)

    def _verdicts(self, work: list[Work], judged: list[list[Any]], scales: list[list[Any]]) -> list[tuple[Any, ...]]:
        """Return norm, multiplier, threshold and floor of each unit that is counted."""
        used = [(ns, ss, self.thresholds(w.letters)) for w, ns, ss in zip(work, judged, scales) if w.params]
        if self.scope == "global" and all(_same(limits, used[0][2]) for _, _, limits in used):
            used = used[:1]  # one norm, one rule: one verdict a step
        return [(n, s, *limits) for ns, ss, limits in used for n, s in zip(ns, ss)]

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
        names = ("scope", "nonfinite", "_telemetry", "_kernel")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def state_dict(self) -> dict[str, Any]:
        """Return torch's state dictionary with the counts under "telemetry".

        Each `momentum_buffer` is the buffer of `torch.optim.SGD`. (Where it is kept up to a scalar, `momentum_scale`
        and `scaled_buffer` stand beside it, so that a resumed run goes on bit for bit.)
        """
        return {**self._kernel.plain_state(super().state_dict()), "telemetry": self._telemetry.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave; one of `torch.optim.SGD` for the same parameters is welcome too."""
        groups = state_dict["param_groups"]
        if len(groups) == len(self.param_groups):  # torch says so if not
            own = [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups]
            groups = [{**mine, **saved} for mine, saved in zip(own, groups)]
        super().load_state_dict({"state": state_dict["state"], "param_groups": groups})
        params = [p for group in self.param_groups for p in group["params"]]
        indices = [i for group in groups for i in group["params"]]
        saved = state_dict["state"]
        self._kernel.restore(self.state, [(p, saved[i]) for p, i in zip(params, indices) if i in saved])
        self._telemetry.load(state_dict.get("telemetry"))


def _same(limits: tuple[Any, Any], others: tuple[Any, Any]) -> bool:
    """Say whether two pairs of thresholds are the same; tensors are if they are one object, without looking inside."""
    return all(
        [x is y or (not isinstance(x, Tensor) and not isinstance(y, Tensor) and x == y) for x, y in zip(limits, others)]
    )
