"""Hugging Face's Trainer: telemetry in its logs, a smoothness probe around its steps, explore/exploit by its loop."""

# The library of this adapter is an extra, and pyright is run without it as well.
# pyright: reportMissingImports=false
from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surefoot.errors import InputError
from surefoot.integrations.phases import Phases, check_full_batch, innermost, whole
from surefoot.integrations.scalars import scalars, unwrap
from surefoot.measure.smoothness import SmoothnessProbe
from surefoot.measure.smoothness_fit import POINTS
from surefoot.optim import ClippedOptimizer
from surefoot.theorems.verdict import Verdict
from surefoot.train.explore_exploit import ExploreExploit

try:
    from accelerate.utils import find_batch_size
    from transformers import TrainerCallback
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
except ImportError as error:
    raise InputError(
        "surefoot.integrations.transformers needs transformers and accelerate: pip install 'surefoot[transformers]'"
    ) from error

logger = logging.getLogger(__name__)
KEPT = "surefoot_explore_exploit.pt"  # beside Trainer's files in a checkpoint


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


class ExploreExploitCallback(TrainerCallback):
    """Trains in two phases: everything by the Trainer's optimizer, then the last linear layer alone, under a verdict.

    It attaches itself. After tau of the Trainer's `max_steps` (steps of the optimizer, however many batches each adds
    up) the features of the whole training set are worked out, in its order and in eval mode, the hidden weights are
    perturbed and frozen, and the rank of the features is verified; the Trainer then goes on with the last layer.
    Checkpoints hold the state as a file beside Trainer's own, and `trainer.train(resume_from_checkpoint=...)` goes on
    bit for bit in either phase. At the end everything may be trained again.

    Args:
        trainer: whose training it is.
        data: all samples as (inputs, targets), inputs a dictionary of tensors; None: `trainer.train_dataset`, put
            together by the Trainer's collator as one batch.
        options: of `ExploreExploit`: tau, noise, head, seed, loss, exploit, full_batch, allow_deficient, max_memory,
            rows. `loss` is what the model makes of its labels: "cross-entropy" (the default) or "mse".

    Attributes:
        explore_exploit: the `ExploreExploit`, from the start of training on.
        verdict: what is guaranteed, once training has ended; None before, and if it ended while exploring.

    Raises:
        InputError: here, an unknown option; at the start of training, what `ExploreExploit` refuses, several processes,
            fp16, load_best_model_at_end, a stream of samples, full_batch=True where a step sees only a part of them or
            is clipped; at a resume, a checkpoint of other samples or without the state.

    Example:
        >>> from surefoot.integrations.transformers import ExploreExploitCallback
        >>> # callback = ExploreExploitCallback(trainer, tau=0.6), then trainer.train(), then print(callback.verdict)

    Source: K. Kawaguchi and Q. Sun, arXiv 2104.05785 (the idea); surefoot, Prop. 12 to 15.
    """

    def __init__(self, trainer: Any, *, data: tuple[dict[str, Tensor], Tensor] | None = None, **options: Any) -> None:
        self.verdict: Verdict | None = None
        self._trainer, self._data, self._phases = trainer, data, Phases(options)
        self._checkpoint: str | None = None
        self._train = trainer.train
        trainer.train = self._from_checkpoint
        trainer.add_callback(self)

    @property
    def explore_exploit(self) -> ExploreExploit:
        """The state machine."""
        return self._phases.machine

    def _from_checkpoint(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, and remember where the state is: Trainer tells its callbacks only the number of the step."""
        found = resume_from_checkpoint
        self._checkpoint = get_last_checkpoint(self._trainer.args.output_dir) if found is True else found or None
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Check what can be checked before any work, and load the state of a checkpoint."""
        trainer = self._trainer
        for what, there in {
            "several processes or GPUs": args.world_size > 1 or args.n_gpu > 1,
            "FSDP or DeepSpeed": trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled,
            "fp16=True (bf16=True does)": args.fp16,
            "hyperparameter_search": state.is_hyper_param_search,
            "load_best_model_at_end=True, which would put other weights in place of the verdict's":
                args.load_best_model_at_end,
        }.items():  # fmt: skip
            if there:
                raise InputError(f"ExploreExploitCallback does not go with {what}")
        kept = None
        if self._checkpoint is not None:
            file = Path(self._checkpoint) / KEPT
            if not file.is_file():
                raise InputError(f"resume_from_checkpoint={self._checkpoint!r} has no {KEPT}: it was made without this")
            kept = torch.load(file, map_location="cpu", weights_only=True)
        self._loader, self.verdict = train_dataloader, None
        if self._phases.full_batch:
            check_full_batch({
                "a batch is smaller than the training set": trainer._train_batch_size < len(self._samples()[1]),
                "gradients of several batches are added up": args.gradient_accumulation_steps > 1,
                f"max_grad_norm={args.max_grad_norm} clips the gradient before the optimizer": args.max_grad_norm,
                "bf16=True rounds the gradient": args.bf16,
                "label_smoothing_factor or compute_loss_func changes the loss":
                    args.label_smoothing_factor or trainer.compute_loss_func is not None,
            })  # fmt: skip
        self._phases.start(trainer.model, innermost(optimizer), state.max_steps, self._samples, kept)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the second phase when it is due."""
        self._phases.begin_if_due()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state into the checkpoint."""
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        torch.save(self._phases.state_dict(), folder / KEPT)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what is guaranteed, and thaw the model."""
        self.verdict = self._phases.finish()

    def _samples(self) -> tuple[dict[str, Tensor], Tensor]:
        if self._data is not None:
            return self._data
        batch = {name: x for name, x in dict(whole(self._loader)).items() if x is not None}
        labels = [name for name in self._trainer.label_names if name in batch]
        if len(labels) != 1:
            raise InputError(
                f"the training set has the columns {sorted(batch)} and one of {self._trainer.label_names} has to be "
                "there for the targets; name it in TrainingArguments(label_names=...), or give data=(inputs, targets)"
            )
        targets = batch.pop(labels[0])
        return batch, targets
