"""The update rule, once: torch's own fused SGD kernel, handed numbers into which the multiplier is folded.

    d = s g + λ w                 s: the gradient's multiplier, λ: weight decay
    b = μ b + (1 - τ) d           μ: momentum, τ: dampening (b = d at first)
    w <- w - η b                  (η (d + μ b) with Nesterov)

The kernel knows no s. But s g + λ w = s (g + (λ/s) w), so the step of the formula is one pass of the kernel over
memory with other numbers, and the gradients are only read:

=================  ==========  ===========  ================  ================
case               lr          decay        momentum          1 - dampening
=================  ==========  ===========  ================  ================
no momentum        η s         λ/s          -                 -
momentum           η           λ/s          μ                 (1 - τ) s
Nesterov (τ = 0)   η s         λ/s          μ c/c'            s/c'
=================  ==========  ===========  ================  ================

Nesterov uses one momentum twice, so there the buffer is kept up to a scalar: b = c v, and the next c' is the one for
which both uses are right, c' = sqrt(c s): then c' v' = μ c v + s ĝ and η s (ĝ + (μ c/c') v') = η (s ĝ + μ c' v'),
with ĝ = g + (λ/s) w.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from surefoot.optim import norm as norms
from surefoot.optim.traced import traced_sgd_

# Outside this range λ/s and c/c' leave what float32 holds safely; the multiplier is then multiplied out first.
SMALLEST = 1e-18
# The kernel takes the dampening and subtracts it from 1: a share this small would have lost its digits.
LEAST_SHARE = {torch.float32: 1e-7, torch.float64: 1e-2, torch.float16: 1e-7, torch.bfloat16: 1e-7}
HALF = (torch.float16, torch.bfloat16)
FULL = (torch.float32, torch.float64)

State = MutableMapping[Any, dict[str, Any]]


class Kernel:
    """Moves parameters and keeps their state: `momentum_buffer`, with Nesterov `momentum_scale`, and `master`.

    Args:
        master_weights: keep a float32 copy of half-precision parameters and step that.
    """

    def __init__(self, *, master_weights: bool) -> None:
        self.master_weights = master_weights

    def move(self, state: State, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], s: float) -> None:
        """Take the step of the formula above for one multiplier s, finite or not, known to the host."""
        lr, mu, tau = float(group["lr"]), group["momentum"], group["dampening"]
        scaled = group["nesterov"] and mu != 0
        for batch in self._batches(state, group, params, grads):
            decay = batch.decouple(group, 1 - lr * group["weight_decay"])
            c = batch.scale if scaled else 1.0
            share = math.sqrt(s / c) if scaled else (1 - tau) * s if mu else 1.0  # 1 - dampening, as the kernel has it
            least = LEAST_SHARE[batch.weights[0].dtype]
            g, k = batch.grads, s
            if not (SMALLEST < s < 1 / SMALLEST and share > least):
                g, k = batch.multiplied(s), 1.0
            shared = {"weight_decay": decay / k, "nesterov": scaled, "maximize": group["maximize"]}
            if mu == 0:
                _fused(batch.weights, g, [], lr=lr * k, momentum=0.0, dampening=0.0, **shared)
            elif not scaled:
                first = 0.0 if batch.new else tau
                dampening = first if k == 1 else 1 - (1 - first) * k
                _fused(batch.weights, g, batch.buffers, lr=lr, momentum=mu, dampening=dampening, **shared)
            else:
                after = k if c == k else math.sqrt(c * k)
                dampening = 0.0 if after == k else 1 - k / after
                momentum = mu if after == c else mu * (c / after)
                _fused(batch.weights, g, batch.buffers, lr=lr * k, momentum=momentum, dampening=dampening, **shared)
                batch.rescale(state, after)
            batch.write_back()

    def move_on_device(
        self,
        state: State,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        s: Tensor,
        skip: Tensor,
    ) -> None:
        """The same for a multiplier that only the device knows, and `skip`, () bool, that leaves the step out."""
        lr, mu, tau = group["lr"], group["momentum"], group["dampening"]
        for batch in self._batches(state, group, params, grads):
            batch.unscale(state)
            device = batch.weights[0].device
            found_inf = skip.to(device, torch.float32)
            taken = (~skip).to(device, torch.float64)
            decay = batch.decouple(group, 1 - lr * group["weight_decay"] * taken)
            k = s.to(device)
            if isinstance(lr, Tensor) and device.type != "cpu" and lr.device.type != "cpu":
                lr = lr.to(torch.float32)  # what the kernel reads
            weights, grads = batch.weights, batch.grads
            options: dict[str, Any] = {"lr": lr, "weight_decay": decay, "momentum": mu, "dampening": tau}
            options |= {"nesterov": group["nesterov"], "maximize": group["maximize"]}
            if mu == 0 and decay == 0 and weights[0].dtype is not torch.float64:
                options["lr"] = (lr * k).to(torch.float32)
            else:
                grads = batch.multiplied(-k if group["maximize"] else k)
                options["maximize"] = False
            if mu != 0 and tau != 0 and batch.new:
                if bool(skip):  # dampening leaves the first step whole: this once, wait to see whether it is taken
                    batch.forget(state)
                    continue
                options["dampening"] = 0.0
            _fused(weights, grads, batch.buffers, found_inf=found_inf, **options)
            batch.write_back()

    def _batches(self, state: State, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Batch]:
        """Sort parameters into lists that the kernel may be given at once."""
        momentum = group["momentum"] != 0
        batch = self._one_batch(state, group, params, grads)
        if batch is not None:
            if not group["nesterov"]:
                batch.unscale(state)
            return [batch]
        batches: dict[Any, Batch] = {}
        for p, g in zip(params, grads):
            entry = state[p] if momentum or self.master_weights else {}
            w = norms.local(p)
            if self.master_weights and p.dtype in HALF:
                if "master" not in entry:
                    entry["master"] = p.detach().float()
                w = norms.local(entry["master"])
            new = momentum and "momentum_buffer" not in entry
            if new:
                like = entry.get("master", p)
                entry["momentum_buffer"] = torch.zeros_like(like, memory_format=torch.preserve_format)
            c = entry.get("momentum_scale", 1.0) if momentum else 1.0
            batch = batches.setdefault((w.dtype, w.device, c, new), Batch(c, new))
            batch.add(p, w, g, norms.local(entry["momentum_buffer"]) if momentum else None)
        if not group["nesterov"]:
            for batch in batches.values():
                batch.unscale(state)
        return list(batches.values())

    def _one_batch(
        self, state: State, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
    ) -> Batch | None:
        """Return everything as one batch if nothing about it is out of the ordinary (the quick way), else None."""
        dtype, device = params[0].dtype, params[0].device
        half = dtype in HALF and device.type != "cpu" and not self.master_weights
        if not (dtype in FULL or half) or norms.is_distributed(*params):
            return None
        if not all([p.dtype is dtype and p.is_contiguous() for p in params]):
            return None
        if not all([g.dtype is dtype and g.is_contiguous() for g in grads]):
            return None
        if device.type != "cpu" and not all([p.device == device for p in params]):
            return None
        batch = Batch(1.0, new=False)
        batch.params = batch.weights = params
        batch.grads = grads
        if group["momentum"] != 0:
            entries = [state[p] for p in params]
            if not all(["momentum_buffer" in e for e in entries]):
                return None
            batch.buffers = [e["momentum_buffer"] for e in entries]
            if not all([b.is_contiguous() and b.dtype is dtype for b in batch.buffers]):
                return None
            if group["nesterov"] or "momentum_scale" in entries[0]:
                scales = {e.get("momentum_scale", 1.0) for e in entries}
                if len(scales) > 1:
                    return None
                batch.scale = scales.pop()
        return batch

    @staticmethod
    def plain_state(state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a state dictionary in which every momentum buffer is b itself."""
        state = {}
        for index, entry in state_dict["state"].items():
            c = entry.get("momentum_scale", 1.0)
            if c != 1:
                v = entry["momentum_buffer"]
                entry = {**entry, "momentum_buffer": v * c, "scaled_buffer": v}
            state[index] = entry
        return {**state_dict, "state": state}

    @staticmethod
    def restore(state: Mapping[Any, dict[str, Any]], saved: Iterable[tuple[Tensor, dict[str, Any]]]) -> None:
        """Undo `plain_state` after loading, given each parameter with what was saved for it."""
        for p, entry in saved:
            if "master" in entry:  # torch has just rounded it and its buffers to the parameter's half precision
                state[p].update({k: v.to(p.device) for k, v in entry.items() if isinstance(v, Tensor)})
        for entry in state.values():
            scaled = entry.pop("scaled_buffer", None)
            if scaled is not None:
                entry["momentum_buffer"] = scaled
            elif "momentum_scale" in entry:  # a checkpointer that asks only for names it knows has left it out
                entry["momentum_scale"] = 1.0


class Batch:
    """Tensors of one dtype and device, real, dense and laid out alike: weights, gradients and buffers.

    Args:
        scale: c, the scalar of the buffers.
        new: whether the buffers have just been made.
    """

    def __init__(self, scale: float, new: bool) -> None:
        self.scale, self.new = scale, new
        self.params: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.grads: list[Tensor] = []
        self.buffers: list[Tensor] = []
        self.copies: list[tuple[Tensor, Tensor]] = []  # (what the kernel could not be given, what it was given)

    def add(self, p: Tensor, w: Tensor, g: Tensor, b: Tensor | None) -> None:
        """Take in a parameter p whose step is taken on w (p itself, its local part or its float32 master)."""
        self.params.append(p)
        if w is not p and p.dtype is not w.dtype:
            self.copies.append((norms.local(p), w))
        if w.is_complex():
            w, g = torch.view_as_real(w), torch.view_as_real(g)
            b = None if b is None else torch.view_as_real(b)
        # torch 2.13's kernel for the CPU leaves half-precision weights where they are (all but the last few of a
        # tensor): there the step is taken in float32 and rounded once.
        dtype = torch.float32 if w.dtype in HALF and w.device.type == "cpu" else w.dtype
        if w.dtype is not dtype or not norms.is_dense(w):
            w = self._copy(w, torch.empty_like(w, dtype=dtype))
        if g.dtype is not dtype or g.stride() != w.stride() or not norms.is_dense(g):
            g = torch.empty_like(w).copy_(g)
        if b is not None:
            if b.dtype is not dtype or b.stride() != w.stride():
                b = self._copy(b, torch.empty_like(w))
            self.buffers.append(b)
        self.weights.append(w)
        self.grads.append(g)

    def _copy(self, target: Tensor, copy: Tensor) -> Tensor:
        self.copies.append((target, copy.copy_(target)))
        return copy

    def multiplied(self, s: float | Tensor) -> list[Tensor]:
        """Return s g for every gradient, as new tensors."""
        if isinstance(s, Tensor) and self.grads[0].dtype in HALF:
            return [(g.float() * s).to(g.dtype) for g in self.grads]  # not s itself rounded to half precision
        if isinstance(s, Tensor):
            return list(torch._foreach_mul(self.grads, s.to(self.grads[0].dtype)))
        half = math.sqrt(s)  # in two factors: s itself may be beyond float32
        return list(torch._foreach_mul(torch._foreach_mul(self.grads, half), half))

    def decouple(self, group: dict[str, Any], keep: float | Tensor) -> float:
        """Apply decoupled decay, if that is what the group has; return the decay that is left for the gradient."""
        if group["weight_decay"] != 0 and group["decoupled_weight_decay"]:
            if not isinstance(keep, Tensor):
                torch._foreach_mul_(self.weights, keep)
            elif self.weights[0].dtype in HALF:
                for w in self.weights:
                    w.copy_(w.float() * keep)  # keep itself, rounded to half precision, is often 1
            else:
                torch._foreach_mul_(self.weights, keep.to(self.weights[0].dtype))
            return 0.0
        return group["weight_decay"]

    def rescale(self, state: State, c: float) -> None:
        """Note that the buffers are now v = b/c."""
        if c != self.scale:
            for p in self.params:
                state[p]["momentum_scale"] = c

    def unscale(self, state: State) -> None:
        """Make the buffers b themselves."""
        if self.scale != 1:
            torch._foreach_mul_(self.buffers, self.scale)
            self.rescale(state, 1.0)
            self.scale = 1.0

    def forget(self, state: State) -> None:
        """Drop buffers that were made for a step that was left out."""
        for p in self.params:
            del state[p]["momentum_buffer"]

    def write_back(self) -> None:
        """Copy what was stepped in a copy to where it belongs."""
        for target, copy in reversed(self.copies):
            target.copy_(copy)


def _fused(
    weights: list[Tensor], grads: list[Tensor], buffers: list[Tensor], *, lr: float | Tensor, **options: Any
) -> None:
    if torch.compiler.is_compiling():
        traced_sgd_(weights, grads, buffers, lr=lr, **options)
    else:
        torch._fused_sgd_(weights, grads, buffers, lr=lr, is_first_step=False, **options)
