"""Telemetry in the loggers of Lightning, and a smoothness probe around its steps."""

# The library of this adapter is an extra, and pyright is run without it as well.
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from surefoot.errors import InputError
from surefoot.integrations.scalars import scalars, unwrap
from surefoot.measure.smoothness import SmoothnessProbe
from surefoot.measure.smoothness_fit import POINTS
from surefoot.optim import ClippedOptimizer

try:
    from lightning.pytorch import Callback
    from lightning.pytorch.utilities.data import extract_batch_size
except ImportError as error:
    raise InputError(
        "surefoot.integrations.lightning needs the package lightning: pip install 'surefoot[lightning]'"
    ) from error


class TelemetryCallback(Callback):
    """Logs the optimizer's telemetry with the module's other metrics, every `Trainer(log_every_n_steps=...)` steps.

    The names are those of `surefoot.integrations.scalars.scalars`; where several of the module's optimizers are ours,
    each name ends with the number of its optimizer: `clip_fraction/0`. They reach every logger and
    `trainer.callback_metrics`.

    Raises:
        InputError: at the start of `fit`, if no optimizer is one of surefoot, or if `Trainer(gradient_clip_val=...)`
            would clip the gradient before the optimizer sees it.

    Example:
        >>> from surefoot.integrations.lightning import TelemetryCallback
        >>> callback = TelemetryCallback()      # Trainer(..., callbacks=[callback])
    """

    def __init__(self) -> None:
        self._optimizers: list[ClippedOptimizer] = []
        self._step = 0

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Find the optimizers, and see that nobody else clips."""
        self._optimizers = [found for opt in trainer.optimizers if (found := unwrap(opt)) is not None]
        if not self._optimizers:
            names = ", ".join(type(opt).__name__ for opt in trainer.optimizers) or "none"
            raise InputError(
                f"TelemetryCallback finds no optimizer of surefoot: configure_optimizers gave {names}; "
                "return one from there, or leave the callback out"
            )
        if trainer.gradient_clip_val:
            raise InputError(
                f"Trainer(gradient_clip_val={trainer.gradient_clip_val}) would clip the gradient before "
                f"{type(self._optimizers[0]).__name__}, which clips by itself, sees it; leave gradient_clip_val out"
            )

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Begin where a loaded checkpoint left off."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what the steps since the last log did."""
        stepped = trainer.global_step != self._step  # a batch whose gradient is only added up writes no log
        self._step = trainer.global_step
        if not (stepped and trainer._logger_connector.should_update_logs):  # as Lightning's own monitors do
            return
        for number, opt in enumerate(self._optimizers):
            end = f"/{number}" if len(self._optimizers) > 1 else ""
            seen = {name + end: float(value) for name, value in scalars(opt.telemetry()).items()}
            pl_module.log_dict(seen, on_step=True, on_epoch=False)


class SmoothnessCallback(Callback):
    """Measures the (L0, L1)-smoothness along the steps of a module; training goes on bit for bit as without.

    The loss is the module's `training_step` on the step's batch (all its batches under gradient accumulation: then the
    gradient noise is measured too), with logging switched off meanwhile. Metrics that `training_step` keeps by other
    means are updated more often than without; give `loss` where that matters.

    Args:
        every: probe steps every, 2 every, ...
        points: fractions of the step at which the gradient is taken; see `SmoothnessProbe`.
        loss: loss(module, batch) in place of `training_step`.

    Attributes:
        probe: the `SmoothnessProbe`, from the start of `fit` on: `callback.probe.fit()` gives L0 and L1.

    Raises:
        InputError: at the start of `fit`, with manual optimization or several optimizers: which step is meant?

    Example:
        >>> from surefoot.integrations.lightning import SmoothnessCallback
        >>> callback = SmoothnessCallback(every=50)      # Trainer(..., callbacks=[callback])
    """

    probe: SmoothnessProbe

    def __init__(
        self, *, every: int = 50, points: Sequence[float] = POINTS, loss: Callable[[Any, Any], Any] | None = None
    ) -> None:
        self._every, self._points, self._loss = every, points, loss
        self._batches: list[tuple[Any, int]] = []
        self._resumed: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the probe."""
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise InputError(
                "SmoothnessCallback needs automatic optimization and one optimizer; here are "
                f"{len(trainer.optimizers)}, automatic_optimization={pl_module.automatic_optimization}; use "
                "surefoot.measure.SmoothnessProbe around the step that you mean"
            )
        half = {"16": torch.float16, "bf": torch.bfloat16}.get(str(trainer.precision)[:2])
        ranks = trainer.world_size > 1
        self.probe = SmoothnessProbe(
            pl_module,
            every=self._every,
            points=self._points,
            eps=torch.finfo(half).eps if half else None,
            all_reduce=torch.distributed.all_reduce if ranks else None,
        )
        if self._resumed is not None:
            self.probe.load_state_dict(self._resumed)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the batch until its step has been taken."""
        if self.probe.due(trainer.global_step + 1):
            self._batches.append((batch, batch_idx))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Take the gradient before the step."""
        self.probe.before(lambda: self._losses(trainer, pl_module), trainer.global_step + 1)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Take the gradients along the step, if there was one."""
        if self.probe.after() is not None:
            self._batches.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return self.probe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._resumed = state_dict

    def _losses(self, trainer: Any, pl_module: Any) -> Iterator[tuple[Any, int]]:
        """Yield loss and rows of each batch, scaled so that their mean over rows is the mean of the losses."""
        sizes = [extract_batch_size(batch) for batch, _ in self._batches]
        with _silent(pl_module):
            for (batch, index), rows in zip(self._batches, sizes):
                with trainer.precision_plugin.train_step_context():
                    out = self._loss(pl_module, batch) if self._loss else pl_module.training_step(batch, index)
                loss = out["loss"] if isinstance(out, dict) else out
                yield loss * (sum(sizes) / (rows * len(sizes))), rows


@contextmanager
def _silent(module: Any) -> Iterator[None]:
    """Let the module log nothing."""
    for name in ("log", "log_dict"):
        module.__dict__[name] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del module.__dict__[name]
