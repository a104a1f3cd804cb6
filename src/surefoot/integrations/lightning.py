"""Telemetry in the loggers of Lightning."""

# The library of this adapter is an extra, and pyright is run without it as well.
# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any

from surefoot.errors import InputError
from surefoot.integrations.scalars import scalars, unwrap
from surefoot.optim import ClippedOptimizer

try:
    from lightning.pytorch import Callback
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
