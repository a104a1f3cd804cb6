"""δ-GClip: clipping with a floor (arXiv 2404.08624)."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from surefoot.optim import scales
from surefoot.optim._base import ClippedOptimizer, Work
from surefoot.optim.checks import check_number, floor_threshold
from surefoot.optim.thresholds import Threshold, as_threshold, check_gamma


class DeltaGClip(ClippedOptimizer):
    """δ-GClip: w <- w - h g with h = η min{1, max{δ, γ/||g||}}.

    ==========  ===================  ==========  ================
    regime      when                 h           length of step
    ==========  ===================  ==========  ================
    unclipped   ||g|| <= γ           η           η ||g|| <= η γ
    clipped     γ < ||g|| < γ/δ      η γ/||g||   η γ
    floored     ||g|| >= γ/δ         η δ         η δ ||g|| >= η γ
    skipped     ||g|| not finite     0           0
    ==========  ===================  ==========  ================

    With d = scale g + λ w, momentum and Nesterov act on d exactly as in `torch.optim.SGD`, so δ = 0 is
    `clip_grad_norm_(max_norm=γ)` followed by SGD in every option. (The authors' code also multiplies the decay by the
    scale and so shrinks it on clipped steps; ours does not.)

    Args:
        params: parameters or groups of them; each group may have its own lr, gamma, delta and so on.
        lr: η > 0. The longest clipped step has length η γ.
        gamma: threshold γ in (0, inf] on the gradient norm; inf never clips. Or an object that follows the norms:
            `surefoot.optim.Percentile` (AutoClip), `ZScore` (ZClip), `Measured` ("measured") or a `Threshold` of
            your own, with the global scope. It is copied; its statistics are part of `state_dict()`.
        delta: floor δ in [0, 1]: h never falls below η δ. 0 is plain clipping, 1 plain gradient descent.
        momentum: μ >= 0; 0 keeps no buffer.
        dampening: τ, the gradient enters the buffer with weight 1 - τ.
        nesterov: step along d + μ b; needs momentum > 0 and dampening = 0.
        weight_decay: λ >= 0. Any decay voids the convergence theorem.
        decoupled_weight_decay: shrink w by lr λ before the step, as AdamW does, untouched by clipping.
        scope: "global" takes one norm over every parameter of every group (the theorem's case), "group" one a group,
            "tensor" one a tensor.
        nonfinite: "skip" leaves parameters and state untouched and counts the step, "raise" raises
            FloatingPointError before touching anything, "propagate" lets NaN through as torch does.
        maximize: ascend instead of descend.
        master_weights: keep a float32 copy of half-precision parameters in the state and step that.

    Example:
        >>> import torch
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = DeltaGClip([w], lr=1.0, gamma=1.0, delta=0.1)
        >>> (w.square().sum() / 2).backward()
        >>> opt.step()
        >>> w.detach()                       # ||g|| = 5, so the step has length η γ = 1
        tensor([2.4000, 3.2000])
        >>> opt.telemetry()["clipped"]
        1

    Source: Tucat, Mukherjee, Sen, Sun, Rivasplata, arXiv 2404.08624, Definition 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        *,
        gamma: float | Threshold | str,
        delta: float,
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
        super().__init__(
            params,
            lr,
            {"gamma": copy.deepcopy(as_threshold(gamma)), "delta": delta},
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            scope=scope,
            nonfinite=nonfinite,
            maximize=maximize,
            master_weights=master_weights,
        )

    def check_rule(self, group: dict[str, Any]) -> None:
        check_gamma(group["gamma"], self.scope)
        check_number("delta", group["delta"], 0.0, 1.0, fix="0 is plain clipping, 1 plain gradient descent")

    def scale(self, norm: Tensor, group: dict[str, Any]) -> Tensor:
        return scales.delta_gclip(norm, group["gamma"], group["delta"])

    def thresholds(self, group: dict[str, Any]) -> tuple[float, float]:
        return group["gamma"], group.get("floor_at", floor_threshold(group["gamma"], group["delta"]))

    def _settle(self, work: list[Work], norm: float | Tensor) -> None:
        asked: dict[int, Any] = {}  # one object may serve several groups, but takes in one norm a step
        settled: dict[Any, dict[str, Any]] = {}
        for w in work:
            own, delta = w.group["gamma"], w.group["delta"]
            if isinstance(own, Threshold):
                if id(own) not in asked:
                    asked[id(own)] = own.threshold(norm)
                if (id(own), delta) not in settled:
                    gamma = asked[id(own)]
                    settled[id(own), delta] = {
                        "gamma": gamma,
                        "delta": delta,
                        "floor_at": floor_threshold(gamma, delta),
                    }
                w.letters = settled[id(own), delta]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group after checking its options; a threshold object in it is copied."""
        gamma = as_threshold(param_group.get("gamma"))
        if isinstance(gamma, Threshold):
            param_group = {**param_group, "gamma": copy.deepcopy(gamma)}
        super().add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the base class's dictionary.

        Where γ of group number i follows the norms, the group names the threshold ("gamma": "ZScore(z=2.5, ...)") and
        its statistics stand beside the counts as `threshold<i>_<name>`.
        """
        state = super().state_dict()
        for i, group in enumerate(state["param_groups"]):
            own = group["gamma"]
            if isinstance(own, Threshold):
                group["gamma"] = repr(own)
                state |= {f"threshold{i}_{name}": value for name, value in own.state().items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave; one of `torch.optim.SGD` for the same parameters is welcome too.

        A threshold object is not rebuilt from its name: the optimizer must have been built with the same.

        Raises:
            ValueError: the dictionary names another threshold than the one that is here; nothing has been touched.
        """
        own = [group["gamma"] for group in self.param_groups]
        for i, (mine, saved) in enumerate(zip(own, state_dict["param_groups"])):
            name = saved.get("gamma")
            if isinstance(name, str) and name != repr(mine):
                raise ValueError(
                    f"param_groups[{i}] was saved with gamma={name}, here it is gamma={mine!r}; build the optimizer "
                    "with the threshold it was saved with"
                )
        super().load_state_dict(state_dict)
        for i, (group, mine) in enumerate(zip(self.param_groups, own)):
            if isinstance(group["gamma"], (str, Threshold)):  # what was saved is a name, what torch put there a copy
                group["gamma"] = mine
                prefix = f"threshold{i}_"
                found = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
                mine.load(found or None)
