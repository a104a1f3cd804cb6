"""γ measured while training: a smoothness probe every so many steps tells `Measured` how far steps may go."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.smoothness import Closure, SmoothnessProbe
from surefoot.measure.smoothness_fit import Observation
from surefoot.optim.thresholds import Measured

_RECENT = 5  # measured L whose median is taken


class Online:
    """Measures L along one step in `every` and tells γ = "measured" how far steps may go at the lr of that moment.

        reach = 2 (1 - β) / (lr L),    L the median of the last five that were measured

    Two extra gradients each time (and one more, once, to see that the closure repeats itself): 5% for every 40 steps.
    Training is otherwise left as it is, bit for bit, and the same steps give the same γ.

    Args:
        model: whose steps are measured; under DistributedDataParallel the bare one.
        optimizer: built with gamma="measured" (or `surefoot.optim.Measured`).
        every: steps from one measurement to the next, at least 1.
        eps: relative error of the gradients' arithmetic, as for `SmoothnessProbe`.
        all_reduce: adds a tensor up over ranks, as for `SmoothnessProbe`: torch.distributed's.

    Raises:
        InputError: no group of the optimizer has such a γ, or its momentum is 1 or more.

    Example:
        >>> from surefoot import DeltaGClip
        >>> w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        >>> opt = DeltaGClip([w], lr=0.5, gamma="measured", delta=0.0)
        >>> online = Online(nn.ParameterList([w]), opt, every=2)
        >>> loss = lambda: 5 * w.square().sum()  # L = 10, and a step of lr would be 2.5 times too long
        >>> for _ in range(3):
        ...     opt.zero_grad()
        ...     loss().backward()
        ...     seen = online.step(loss)
        >>> round(online.reach, 6), online.gradients
        (0.4, 3)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every: int = 40,
        eps: float | None = None,
        all_reduce: Callable[[Tensor], Any] | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.probe = SmoothnessProbe(model, every=every, points=(1.0,), eps=eps, all_reduce=all_reduce)
        self.gradients = 0
        if not self._thresholds():
            raise InputError(
                f"optimizer={type(optimizer).__name__} has no group that follows what is measured; build it with "
                'gamma="measured"'
            )
        for group in optimizer.param_groups:
            if not group.get("momentum", 0.0) < 1:
                raise InputError(f"optimizer has momentum={group['momentum']}; give less than 1: no lr is stable there")

    @property
    def cost(self) -> str:
        """What it takes, for the reader; `gradients` counts them."""
        return self.probe.cost

    @property
    def smoothness(self) -> float | None:
        """L, the median of the last five that were measured; None before the first."""
        found = [o.smoothness for o in self.probe.observations if o.outcome == "measured" and o.smoothness > 0]
        return median(found[-_RECENT:]) if found else None

    @property
    def reach(self) -> float:
        """2 (1 - β) / (lr L) at the lr of now, for the group whose steps go farthest; 1 before the first L."""
        L = self.smoothness
        groups = self.optimizer.param_groups
        longest = max(float(g["lr"]) / (1 - g.get("momentum", 0.0)) for g in groups)
        return 1.0 if L is None or longest <= 0 else 2 / (longest * L)

    def step(self, closure: Closure) -> Observation | None:
        """Take a step in place of `optimizer.step()`, with the gradients that are there; measure when it is due.

        Args:
            closure: works out the loss of the step's batch anew and returns it, without backward(); as for
                `SmoothnessProbe`.

        Returns:
            What was seen, or None where the step was not due.
        """

        def counted() -> Any:
            self.gradients += 1
            return closure()

        seen = self.probe.step(self.optimizer, counted)
        if seen is not None:
            for threshold in self._thresholds():
                threshold.observe(self.reach)
        return seen

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, beside the optimizer's own state: JSON."""
        return {"probe": self.probe.state_dict(), "gradients": self.gradients}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.probe.load_state_dict(state["probe"])
        self.gradients = state["gradients"]

    def _thresholds(self) -> list[Measured]:
        found = {
            id(g["gamma"]): g["gamma"] for g in self.optimizer.param_groups if isinstance(g.get("gamma"), Measured)
        }
        return list(found.values())
