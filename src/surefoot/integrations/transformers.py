"""Telemetry in the logs of Hugging Face's Trainer, and a smoothness probe around its steps."""

# The library of this adapter is an extra, and pyright is run without it as well.
# pyright: reportMissingImports=false
from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from surefoot.errors import InputError
from surefoot.integrations.scalars import scalars, unwrap
from surefoot.measure.smoothness import SmoothnessProbe
from surefoot.measure.smoothness_fit import POINTS
from surefoot.optim import ClippedOptimizer

try:
    from accelerate.utils import find_batch_size
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


class SmoothnessCallback(TrainerCallback):
    """Measures the (L0, L1)-smoothness along the steps that a Trainer takes; training goes on bit for bit as without.

    It attaches itself. The loss is the Trainer's own `compute_loss`, on the step's batch, piece by piece under gradient
    accumulation (the gradient noise is measured then too). It runs in the mode and with the random numbers of the
    moment; whatever `compute_loss` changes beside the model, such as counters of its own, is changed more often.

    Args:
        trainer: whose steps are probed.
        every: probe steps every, 2 every, ...
        points: fractions of the step at which the gradient is taken; see `SmoothnessProbe`.

    Attributes:
        probe: the `SmoothnessProbe`: `callback.probe.fit()` gives L0 and L1.

    Raises:
        InputError: the parameters are cut up over ranks.

    Example:
        >>> from surefoot.integrations.transformers import SmoothnessCallback
        >>> # probe = SmoothnessCallback(trainer, every=50).probe, then trainer.train(), then print(probe.fit())
    """

    def __init__(self, trainer: Any, *, every: int = 50, points: Sequence[float] = POINTS) -> None:
        half = trainer.args.bf16 or trainer.args.fp16
        eps = torch.finfo(torch.bfloat16 if trainer.args.bf16 else torch.float16).eps if half else None
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        reduce = torch.distributed.all_reduce if ranks else None
        self.probe = SmoothnessProbe(trainer.model, every=every, points=points, eps=eps, all_reduce=reduce)
        self._trainer = trainer
        self._pieces: list[tuple[dict[str, Any], Any]] = []  # inputs and items of the batch, for each piece
        self._training_step = trainer.training_step
        trainer.training_step = self._step
        trainer.add_callback(self)

    def _step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        if self.probe.due(self._trainer.state.global_step + 1):
            self._pieces.append((dict(inputs), num_items_in_batch))  # compute_loss takes labels out of its own
        return self._training_step(model, inputs, num_items_in_batch)

    def _losses(self) -> Iterator[tuple[Any, int]]:
        """Yield loss and rows of each piece, scaled so that their mean over rows is the loss that is trained."""
        trainer = self._trainer
        sizes = [find_batch_size(inputs) or 1 for inputs, _ in self._pieces]
        for (inputs, items), rows in zip(self._pieces, sizes):
            with trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(
                    trainer.model, trainer._prepare_inputs(dict(inputs)), num_items_in_batch=items
                )
            summed = trainer.loss_is_scaled_for_ga
            if summed is None:
                summed = (
                    trainer.model_accepts_loss_kwargs and items is not None
                ) or trainer.compute_loss_func is not None
            yield loss * (sum(sizes) / (rows * (1 if summed else len(sizes)))), rows

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the gradient before the step."""
        self.probe.before(self._losses, state.global_step + 1)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the gradients along the step."""
        self.probe.after()
        self._pieces.clear()
