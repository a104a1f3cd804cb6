"""Thresholds that follow the gradient norms: an object in place of the number γ.

`DeltaGClip`, `GClip` and `clip_grad_` ask it for γ once a step, with the norm over all gradients (where they are spread
over ranks, the reduced one, so that every rank has the same γ). A norm that is NaN or infinite never enters the
statistics, nor does that of a step that is left out. Nothing waits for the device.

=============  ==============================================  ===================
threshold      γ                                               source
=============  ==============================================  ===================
Percentile     p-th percentile of the norms so far             arXiv 2007.14469
ZScore         mean + (z²/zscore) std at a spike, else ∞       arXiv 2504.02507
Measured       1.5 median of the last 50 norms, min(1, reach)  surefoot (docs/threshold.md)
=============  ==============================================  ===================
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor

from surefoot.optim.checks import check_number


class Threshold(ABC):
    """A γ that follows the norms; a subclass says with which statistics it starts and how a norm changes them.

    Public attributes are the options of the rule: they are what `repr` shows and what a checkpoint is held against.
    An optimizer takes a copy, so that no two share statistics; its own is `opt.param_groups[0]["gamma"]`.

    Example:
        >>> class TwiceTheMean(Threshold):
        ...     def start(self):
        ...         return {"count": torch.zeros((), dtype=torch.float64), "sum": torch.zeros((), dtype=torch.float64)}
        ...     def update(self, norm, state):
        ...         count, total = state["count"] + 1, state["sum"] + norm
        ...         return 2 * total / count, {"count": count, "sum": total}
        >>> gamma = TwiceTheMean()
        >>> [gamma.threshold(norm) for norm in (1.0, 3.0, float("nan"), 5.0)]
        [2.0, 4.0, 4.0, 6.0]
    """

    _state: dict[str, Tensor] | None = None

    @abstractmethod
    def start(self) -> dict[str, Tensor]:
        """Return the statistics before the first norm, on the CPU. The name "gamma" is taken."""

    @abstractmethod
    def update(self, norm: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return γ for a finite norm, and the statistics after it: a pure function of tensors on one device.

        It must not look at values (no `if`, no `.item()`), which would wait for the device; `surefoot.testing.NoSync`
        finds out.

        Args:
            norm: () float64.
            state: the statistics; not to be changed in place.

        Returns:
            γ >= 0, () float64, infinite for no clipping; and new tensors of the same names and shapes.
        """

    @overload
    def threshold(self, norm: float) -> float: ...
    @overload
    def threshold(self, norm: Tensor) -> Tensor: ...
    @torch.no_grad()
    def threshold(self, norm: float | Tensor) -> float | Tensor:
        """Take in a norm and return γ for it: a float for a float, a () tensor for a () tensor.

        A norm that is not finite changes nothing: the γ before it comes back, infinite if there was none.
        """
        if isinstance(norm, Tensor):
            return self._follow(norm.to(torch.float64), check=False)
        if not math.isfinite(norm):
            return self.gamma
        return float(self._follow(torch.tensor(norm, dtype=torch.float64), check=True))

    def _follow(self, norm: Tensor, *, check: bool) -> Tensor:
        state = self._ready(norm.device)
        finite = torch.isfinite(norm)
        before = {name: value for name, value in state.items() if name != "gamma"}
        # masked_fill, here and below: torch.where would copy a number to the device, and wait
        gamma, after = self.update(norm.masked_fill(~finite, 0.0), before)
        if after.keys() != before.keys():
            raise ValueError(f"{self!r}: update() returned {sorted(after)}, but start() has {sorted(before)}")
        if check and not gamma >= 0:
            raise ValueError(
                f"{self!r}: update() returned gamma={gamma.item()} for norm={norm.item()}; it must be >= 0"
            )
        for name, value in {"gamma": gamma, **after}.items():
            state[name].copy_(torch.where(finite, value, state[name]))  # in place, so that a captured graph goes on
        return state["gamma"].clone()

    def _ready(self, device: torch.device) -> dict[str, Tensor]:
        """Return the state on the device."""
        if self._state is None:
            self._state = {"gamma": torch.tensor(math.inf, dtype=torch.float64), **self.start()}
        if self._state["gamma"].device != device:
            self._state = {name: value.to(device) for name, value in self._state.items()}
        return self._state

    @property
    def gamma(self) -> float:
        """The last γ, infinite before the first. Reading it waits for the device."""
        return math.inf if self._state is None else self._state["gamma"].item()

    def state(self) -> dict[str, Tensor]:
        """Return copies of the statistics and of the last γ, for a checkpoint."""
        state = self._state or self._ready(torch.device("cpu"))
        return {name: value.clone() for name, value in state.items()}

    def load(self, state: Mapping[str, Tensor] | None) -> None:
        """Go on from what `state()` gave; None begins anew.

        Raises:
            ValueError: the names or shapes are not those of this threshold.
        """
        if state is None:
            self._state = None
            return
        own = {"gamma": torch.tensor(0.0), **self.start()}
        if state.keys() != own.keys():
            raise ValueError(f"{self!r} has the statistics {sorted(own)}, not {sorted(state)}")
        for name, value in own.items():
            if value.numel() and state[name].shape != value.shape:  # what starts empty grows
                raise ValueError(
                    f"{self!r}: {name} has the shape {tuple(state[name].shape)} instead of {tuple(value.shape)}; "
                    "load it into a threshold with the options it was saved with"
                )
        self._state = {name: state[name].detach().clone() for name in own}

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({options})"


class Percentile(Threshold):
    """AutoClip: γ is the p-th percentile of the gradient norms so far, the current one included.

        γ_t = percentile_p {||g_1||, ..., ||g_t||},   with linear interpolation between norms

    The first step is never clipped; later about 1 - p/100 of the steps are, as long as the norms keep their size. γ
    is 0 once more than p percent of the norms are exactly 0.

    Args:
        percentile: p in [0, 100]: 0 clips to the smallest norm so far, 100 never clips.
        history: how many of the last norms count. None keeps all, as the paper does, in memory and time that grow
            with the number of steps (8 bytes a step); a CUDA graph or `torch.compile` needs a number.

    Example:
        >>> gamma = Percentile(50)
        >>> [gamma.threshold(norm) for norm in (1.0, 5.0, 2.0)]
        [1.0, 3.0, 2.0]
        >>> from surefoot import GClip
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> opt = GClip([w], lr=0.1, gamma=Percentile(10))
        >>> for _ in range(5):
        ...     opt.zero_grad()
        ...     (w.square().sum() / 2).backward()
        ...     opt.step()
        >>> opt.telemetry()["clipped"], opt.param_groups[0]["gamma"]
        (0, Percentile(percentile=10, history=None))

    Source: Seetharaman, Wichern, Pardo, Le Roux, AutoClip, arXiv 2007.14469.
    """

    def __init__(self, percentile: float = 10.0, history: int | None = None) -> None:
        check_number("percentile", percentile, 0.0, 100.0, fix="10 clips nine steps in ten, 100 none")
        if history is not None:
            _check_count("history", history)
        self.percentile = percentile
        self.history = history

    def start(self) -> dict[str, Tensor]:
        """Return no norms: room for `history` of them in the order of arrival, or an empty sorted list."""
        norms = torch.full((self.history or 0,), math.inf, dtype=torch.float64)
        return {"norms": norms, "count": torch.zeros((), dtype=torch.int64)}

    def _ready(self, device: torch.device) -> dict[str, Tensor]:
        state = super()._ready(device)
        if self.history is None:  # room for one more; it stays infinite if the norm is not finite
            state["norms"] = torch.nn.functional.pad(state["norms"], (0, 1), value=math.inf)
        return state

    def update(self, norm: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Insert the norm and read the percentile off."""
        norms, count = state["norms"], state["count"]
        if self.history is None:
            # Into a sorted list: every place takes the middle one of itself, its left neighbour and the new norm.
            left = torch.nn.functional.pad(norms[:-1], (1, 0), value=-math.inf)
            norms = ordered = torch.minimum(norms, torch.maximum(left, norm))
            last = count
        else:
            norms = _put(norm, norms, count)
            ordered = norms.sort().values
            last = count.clamp(max=self.history - 1)
        return _between(ordered, last, self.percentile / 100), {"norms": norms, "count": count + 1}


class ZScore(Threshold):
    """ZClip: clip only spikes, norms far above their running mean, and those the more the farther they are.

        zscore = (||g|| - mean) / std
        zscore > z:   a spike:  γ = mean + (z²/zscore) std;   the statistics take in γ
        otherwise:    no clipping, γ = ∞;                     the statistics take in ||g||

    The first `warmup` norms are not clipped and give mean and std as they are; after that, with x what they take in,

        mean <- α mean + (1 - α) x,   std² <- α std² + (1 - α) (x - mean)²   (the new mean)

    While std is exactly 0 there is nothing to measure a spike by, and nothing is one. (The authors' code adds 1e-6 to
    std, so that its spikes depend on the unit of the loss, and can add a fixed bound on the norm; ours has neither.)

    Args:
        z: how many standard deviations above the mean a spike begins, > 0.
        alpha: α in [0, 1], the weight of the past; the mean looks back over about 1/(1 - α) steps.
        warmup: number of norms from which the first mean and std are taken, >= 1.

    Example:
        >>> gamma = ZScore(z=2.0, warmup=4)
        >>> [gamma.threshold(norm) for norm in (1.0, 3.0, 1.0, 3.0)]   # mean 2, std 1
        [inf, inf, inf, inf]
        >>> gamma.threshold(10.0)                                      # zscore 8: 2 + 2²/8
        2.5

    Source: Kumar, Owen, Chowdhury, Güra, ZClip, arXiv 2504.02507.
    """

    def __init__(self, z: float = 2.5, alpha: float = 0.97, warmup: int = 25) -> None:
        check_number("z", z, 0.0, math.inf, open_low=True)
        check_number("alpha", alpha, 0.0, 1.0)
        _check_count("warmup", warmup)
        self.z = z
        self.alpha = alpha
        self.warmup = warmup

    def start(self) -> dict[str, Tensor]:
        """Return count, mean and std, all 0."""
        return {
            "count": torch.zeros((), dtype=torch.int64),
            "mean": torch.zeros((), dtype=torch.float64),
            "std": torch.zeros((), dtype=torch.float64),
        }

    def update(self, norm: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Judge the norm by the statistics before it, then let them take it in."""
        count, mean, std = state["count"], state["mean"], state["std"]
        warming = count < self.warmup
        bound = self.z * std
        spike = ~warming & (std > 0) & (norm - mean > bound)
        limit = mean + bound * (bound / (norm - mean))
        x = torch.where(spike, limit, norm)
        # Welford's running mean and std, then the exponential ones. hypot: a square could overflow.
        share = 1 / (count + 1).double()
        weight = share.masked_fill(~warming, 1 - self.alpha)
        spread = (share * (1 - share)).sqrt().masked_fill(~warming, self.alpha * math.sqrt(1 - self.alpha))
        after = {
            "count": count + 1,
            "mean": mean + weight * (x - mean),
            "std": torch.hypot((1 - weight).sqrt() * std, spread * (x - mean)),
        }
        return limit.masked_fill(~spike, math.inf), after


class Measured(Threshold):
    """γ follows the gradient norms, and falls where steps of this lr have become too long for the curvature measured.

        γ_t = times · median {||g_{t-history+1}||, ..., ||g_t||} · min(1, reach),    reach = 2 (1 - β) / (lr L)

    with L the smoothness measured last: `observe` is told the reach, by `surefoot.tune.Online` or a loop of yours; it
    is 1 before. Up to the edge of stability, lr = 2 (1 - β) / L, only norms that stand out are clipped; beyond it the
    longest step, lr γ, is what it would be at the edge. A heuristic. `gamma="measured"` stands for `Measured()`.

    Args:
        times: > 0, γ over the median.
        history: how many of the last norms count.

    Example:
        >>> gamma = Measured()
        >>> [gamma.threshold(norm) for norm in (1.0, 3.0, 2.0)]
        [1.5, 3.0, 3.0]
        >>> gamma.observe(0.5)
        >>> gamma.threshold(2.0)
        1.5
    """

    def __init__(self, times: float = 1.5, history: int = 50) -> None:
        check_number("times", times, 0.0, math.inf, open_low=True)
        _check_count("history", history)
        self.times = times
        self.history = history

    def start(self) -> dict[str, Tensor]:
        """Return no norms, and a reach of 1."""
        return {
            "norms": torch.full((self.history,), math.inf, dtype=torch.float64),
            "count": torch.zeros((), dtype=torch.int64),
            "reach": torch.ones((), dtype=torch.float64),
        }

    def update(self, norm: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Take the norm into the median."""
        count, reach = state["count"], state["reach"]
        norms = _put(norm, state["norms"], count)
        median = _between(norms.sort().values, count.clamp(max=self.history - 1), 0.5)
        return self.times * median * reach.clamp(max=1.0), {"norms": norms, "count": count + 1, "reach": reach.clone()}

    @torch.no_grad()
    def observe(self, reach: float | Tensor) -> None:
        """Take 2 (1 - β) / (lr L) for what was measured last; nothing waits for the device.

        Args:
            reach: >= 0, a number or a () tensor.

        Raises:
            ValueError: a number below 0 or NaN.
        """
        if not isinstance(reach, Tensor):
            check_number("reach", reach, 0.0, math.inf, inf=True)
        device = torch.device("cpu") if self._state is None else self._state["gamma"].device
        kept = self._ready(device)["reach"]
        if isinstance(reach, Tensor):
            kept.copy_(reach)
        else:
            kept.fill_(reach)


def _put(norm: Tensor, norms: Tensor, count: Tensor) -> Tensor:
    """Return the last norms, in the order of arrival, with one more in the place of the oldest."""
    return norms.index_copy(0, (count % len(norms)).view(1), norm.view(1))


def _between(ordered: Tensor, last: Tensor, part: float) -> Tensor:
    """Return the quantile of ordered[0], ..., ordered[last], with linear interpolation."""
    place = last.double() * part
    below, above = ordered.index_select(0, torch.stack([place.floor(), place.ceil()]).long()).unbind()
    return below + (above - below) * (place - place.floor())


def as_threshold(gamma: object) -> Any:
    """Return a new `Measured()` for "measured", anything else as it is."""
    return Measured() if isinstance(gamma, str) and gamma == "measured" else gamma


def check_gamma(gamma: object, scope: str) -> None:
    """Raise TypeError or ValueError unless γ is a number in (0, inf], or a threshold object and one norm is taken."""
    if not isinstance(gamma, Threshold):
        check_number("gamma", gamma, 0.0, math.inf, open_low=True, inf=True)
    elif scope != "global":
        raise ValueError(f"gamma={gamma!r} follows the norm over everything: it needs scope='global', not {scope!r}")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}; give a whole number")
    if value < 1:
        raise ValueError(f"{name}={value!r} is less than 1")
