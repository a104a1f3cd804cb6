"""Telemetry in the logs of Hugging Face's Trainer."""

# The library of this adapter is an extra, and pyright is run without it as well.
# pyright: reportMissingImports=false
from __future__ import annotations

import logging
from typing import Any

from surefoot.errors import InputError
from surefoot.integrations.scalars import scalars, unwrap
from surefoot.optim import ClippedOptimizer

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise InputError(
        "surefoot.integrations.transformers needs transformers and accelerate: pip install 'surefoot[transformers]'"
    ) from error

logger = logging.getLogger(__name__)


class TelemetryCallback(TrainerCallback):
    """Adds the optimizer's telemetry to each of Trainer's training logs, and lets nobody but the optimizer clip.

    The names are those of `surefoot.integrations.scalars.scalars`; they reach `trainer.state.log_history` and the
    callbacks that come after this one. `TrainingArguments.max_grad_norm` (1.0 by default) is 0 while the training
    lasts, with a warning when that changes anything: Trainer would clip the gradient before the optimizer sees it.

    Args:
        optimizer: the optimizer to ask; None takes Trainer's own, out of its wrappers.

    Raises:
        InputError: at the start of training, if there is no optimizer of surefoot to ask.

    Example:
        >>> from surefoot.integrations.transformers import TelemetryCallback
        >>> callback = TelemetryCallback()      # Trainer(..., optimizers=(optimizer, None), callbacks=[callback])
    """

    def __init__(self, optimizer: ClippedOptimizer | None = None) -> None:
        self._given = optimizer
        self._max_grad_norm: float | None = None  # what was switched off
        self._warned = False

    def _find(self, optimizer: Any) -> ClippedOptimizer:
        asked = self._given if self._given is not None else optimizer
        found = unwrap(asked)
        if found is None:
            raise InputError(
                f"TelemetryCallback finds no optimizer of surefoot: optimizer={type(asked).__name__}; "
                "pass one to Trainer(optimizers=(optimizer, scheduler)), or to TelemetryCallback(optimizer)"
            )
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Find the optimizer and switch Trainer's own clipping off."""
        found = self._find(optimizer)
        if args.max_grad_norm and args.max_grad_norm > 0:
            if not self._warned:
                logger.warning(
                    "TrainingArguments.max_grad_norm=%g is switched off for this training: %s clips by itself "
                    "(max_grad_norm=0 says so without this word)",
                    args.max_grad_norm,
                    type(found).__name__,
                )
                self._warned = True
            self._max_grad_norm = args.max_grad_norm
            args.max_grad_norm = 0.0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give the arguments back as they were."""
        if self._max_grad_norm is not None:
            args.max_grad_norm, self._max_grad_norm = self._max_grad_norm, None

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, Any] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add what the steps since the last training log did."""
        if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
            return
        seen = scalars(self._find(optimizer).telemetry())
        logs.update(seen)
        state.log_history[-1].update(seen)  # Trainer.log has just put a copy of the logs there
