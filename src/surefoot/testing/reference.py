"""Slow twins of the fast code: every formula spelled out, one number at a time, in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


def reference_scale(rule: str, norm: float, **letters: float) -> float:
    """Return the multiplier of a rule for one norm, from the formula as the paper prints it."""
    if rule == "delta_gclip":
        ratio = math.inf if norm == 0 else letters["gamma"] / norm
        return min(1.0, max(letters["delta"], ratio))
    if rule == "normalized":
        total = norm + letters["beta"]
        return 1.0 / total if total else 1.0
    if rule == "smooth_clip":
        return 1.0 / (letters["L0"] + letters["L1"] * norm)
    raise ValueError(f"rule={rule!r} is not delta_gclip, normalized or smooth_clip")


@dataclass
class ReferenceGroup:
    """One parameter group: float64 copies of its tensors and its options."""

    params: list[Tensor]
    options: dict[str, float]
    buffers: list[Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.params = [p.detach().to(torch.float64).clone() for p in self.params]
        self.buffers = [None] * len(self.params)


@dataclass
class ReferenceOptimizer:
    """The clipped SGD family in float64, without a thought for speed.

    Args:
        rule: "delta_gclip", "normalized" or "smooth_clip".
        groups: parameter groups, each with lr, momentum, dampening, nesterov, weight_decay, decoupled_weight_decay,
            maximize and the rule's letters in `options`.
        scope: "global", "group" or "tensor".
    """

    rule: str
    groups: list[ReferenceGroup]
    scope: str = "global"
    counts: dict[str, int] = field(
        default_factory=lambda: {"unclipped": 0, "clipped": 0, "floored": 0, "skipped": 0, "steps": 0}
    )
    path_length: float = 0.0

    def step(self, grads: list[list[Tensor | None]]) -> None:
        """Take one step along `grads`, one list a group, None for a parameter without a gradient."""
        exact = [[None if g is None else g.detach().to(torch.float64) for g in group] for group in grads]
        present = [g for group in exact for g in group if g is not None]
        if not present:
            return
        self.counts["steps"] += 1
        total = _norm(present)
        if not math.isfinite(total):
            self.counts["skipped"] += len(self._judged(exact))
            return
        length = 0.0
        for group, group_grads in zip(self.groups, exact):
            in_group = [g for g in group_grads if g is not None]
            for i, g in enumerate(group_grads):
                if g is None:
                    continue
                norm = {"global": total, "group": _norm(in_group), "tensor": _norm([g])}[self.scope]
                scale = self.scale(norm, group)
                length += (group.options["lr"] * scale * _norm([g])) ** 2
                self._move(group, i, g, scale)
        for norm, group in self._judged(exact):
            self._count(norm, group)
        self.path_length += math.sqrt(length)

    def scale(self, norm: float, group: ReferenceGroup) -> float:
        """Return the multiplier; a twin of another rule says here which."""
        return reference_scale(self.rule, norm, **self._letters(group))

    def _move(self, group: ReferenceGroup, i: int, g: Tensor, scale: float) -> None:
        o, w = group.options, group.params[i]
        d = scale * g
        if o.get("maximize"):
            d = -d
        if o.get("decoupled_weight_decay"):
            w = w - o["lr"] * o["weight_decay"] * w
        else:
            d = d + o.get("weight_decay", 0.0) * w
        mu = o.get("momentum", 0.0)
        if mu:
            old = group.buffers[i]
            b = d if old is None else mu * old + (1 - o.get("dampening", 0.0)) * d
            group.buffers[i] = b
            d = d + mu * b if o.get("nesterov") else b
        group.params[i] = w - o["lr"] * d

    def _letters(self, group: ReferenceGroup) -> dict[str, float]:
        names = {"delta_gclip": ("gamma", "delta"), "normalized": ("beta",), "smooth_clip": ("L0", "L1")}[self.rule]
        return {name: group.options[name] for name in names}

    def thresholds(self, group: ReferenceGroup) -> tuple[float, float]:
        """Return the norm above which a step counts as clipped, and the one from which the floor acts."""
        o = group.options
        if self.rule == "delta_gclip":
            return o["gamma"], (o["gamma"] / o["delta"] if o["delta"] else math.inf)
        if self.rule == "normalized":
            return o["beta"], math.inf
        return (o["L0"] / o["L1"] if o["L1"] else math.inf), math.inf

    def _count(self, norm: float, group: ReferenceGroup) -> None:
        gamma, floor_at = self.thresholds(group)
        regime = "unclipped" if norm <= gamma else "clipped" if norm < floor_at else "floored"
        self.counts[regime] += 1

    def _judged(self, grads: list[list[Tensor | None]]) -> list[tuple[float, ReferenceGroup]]:
        """Return the norms that are counted, each with the group whose thresholds it is held against."""
        used = [(group, [g for g in gs if g is not None]) for group, gs in zip(self.groups, grads)]
        used = [(group, gs) for group, gs in used if gs]
        if self.scope == "tensor":
            return [(_norm([g]), group) for group, gs in used for g in gs]
        if self.scope == "group":
            return [(_norm(gs), group) for group, gs in used]
        total = _norm([g for _, gs in used for g in gs])
        same_rule = len({self.thresholds(group) for group, _ in used}) == 1
        return [(total, group) for group, _ in (used[:1] if same_rule else used)]


def _norm(grads: list[Tensor]) -> float:
    # fsum: exactly rounded, whatever the order; scaled, so that no square overflows
    entries = [abs(x) for g in grads for x in g.flatten().tolist()]
    largest = max(entries, default=0.0)
    if largest == 0.0 or not math.isfinite(largest) or any(math.isnan(x) for x in entries):
        return math.nan if any(math.isnan(x) for x in entries) else largest
    return largest * math.sqrt(math.fsum((x / largest) ** 2 for x in entries))
