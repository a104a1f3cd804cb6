"""Lightning: telemetry in its loggers, a smoothness probe around its steps, explore/exploit by its loop."""

# The library of this adapter is an extra, and pyright is run without it as well.
# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from surefoot.errors import InputError
from surefoot.integrations.phases import Phases, Samples, check_full_batch, innermost, whole
from surefoot.integrations.scalars import scalars, unwrap
from surefoot.measure.smoothness import SmoothnessProbe
from surefoot.measure.smoothness_fit import POINTS
from surefoot.optim import ClippedOptimizer
from surefoot.theorems.verdict import Verdict
from surefoot.train.explore_exploit import ExploreExploit

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


class ExploreExploitCallback(Callback):
    """Trains in two phases: everything by the module's optimizer, then the last linear layer alone, under a verdict.

    After tau of the Trainer's steps (of the optimizer, however many batches each adds up) the features of the whole
    training set are worked out, in its order and in eval mode, the hidden weights are perturbed and frozen, and the
    rank of the features is verified; the Trainer then goes on with the last layer. Checkpoints hold the state, and
    `fit(ckpt_path=...)` goes on bit for bit in either phase. At the end everything may be trained again.

    Args:
        network: the attribute of the module that holds the network, which ends in a linear layer and has all
            parameters; "": the module itself, by its `forward`.
        split: (batch) -> (inputs, targets), of the whole training set as one batch; None: a pair as it is, or a
            dictionary with its "labels" taken out.
        data: all samples as (inputs, targets), in place of the data set of the Trainer's loader.
        options: of `ExploreExploit`: tau, noise, head, seed, loss, exploit, full_batch, allow_deficient, max_memory,
            rows. `loss` is what `training_step` returns: "cross-entropy" (the default) or "mse", over the batch.

    Attributes:
        explore_exploit: the `ExploreExploit`, from the start of training on.
        verdict: what is guaranteed, once training has ended; None before, and if it ended while exploring.

    Raises:
        InputError: here, an unknown option; at the start of training, what `ExploreExploit` refuses, several processes,
            16-mixed, manual optimization or several optimizers, training without end, a stream of samples,
            full_batch=True where a step sees only a part of them or is clipped; at a resume, a checkpoint of other
            samples.

    Example:
        >>> from surefoot.integrations.lightning import ExploreExploitCallback
        >>> callback = ExploreExploitCallback("net", tau=0.6)      # Trainer(..., callbacks=[callback])

    Source: K. Kawaguchi and Q. Sun, arXiv 2104.05785 (the idea); surefoot, Prop. 12 to 15.
    """

    def __init__(
        self,
        network: str = "",
        *,
        split: Callable[[Any], Samples] | None = None,
        data: Samples | None = None,
        **options: Any,
    ) -> None:
        self.verdict: Verdict | None = None
        self._network, self._split, self._data, self._phases = network, split, data, Phases(options)
        self._resumed: dict[str, Any] | None = None

    @property
    def explore_exploit(self) -> ExploreExploit:
        """The state machine."""
        return self._phases.machine

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what can be checked before any work, and load the state of a checkpoint."""
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise InputError(
                f"ExploreExploitCallback needs automatic optimization and one optimizer; here are "
                f"{len(trainer.optimizers)}, automatic_optimization={pl_module.automatic_optimization}; drive "
                "surefoot.train.explore_exploit.ExploreExploit in training_step yourself"
            )
        if trainer.world_size > 1 or str(trainer.precision).startswith("16"):
            raise InputError(
                f"ExploreExploitCallback does not go with {trainer.world_size} processes and precision="
                f"{trainer.precision!r}; take one process, and 'bf16-mixed' or '32-true'"
            )
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            raise InputError("the two phases are parts of all steps: give Trainer(max_epochs=...) or max_steps")
        model = pl_module.get_submodule(self._network)
        own = {id(p) for p in model.parameters()}
        if outside := [n for n, p in pl_module.named_parameters() if id(p) not in own]:
            raise InputError(
                f"network={self._network!r} lacks parameters of the module, {outside[:5]}; put them inside"
            )
        self._loader, self.verdict = trainer.train_dataloader, None
        if self._phases.full_batch:
            clip, precision = trainer.gradient_clip_val, trainer.precision
            N, size = len(self._samples()[1]), getattr(self._loader, "batch_size", None)
            check_full_batch({
                "a batch is smaller than the training set": trainer.num_training_batches != 1 or not size or size < N,
                f"gradient_clip_val={clip} clips the gradient before the optimizer": clip,
                f"precision={precision!r} rounds the gradient": str(precision)[:2] not in ("32", "64"),
            })  # fmt: skip
        self._phases.start(model, innermost(trainer.optimizers[0]), int(total), self._samples, self._resumed)
        self._resumed = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin the second phase when it is due."""
        self._phases.begin_if_due()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Say what is guaranteed, and thaw the model."""
        self.verdict = self._phases.finish()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return self._phases.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._resumed = state_dict or None

    def _samples(self) -> Samples:
        if self._data is not None:
            return self._data
        batch = whole(self._loader)
        if self._split is not None:
            return self._split(batch)
        if isinstance(batch, dict) and "labels" in batch:
            return {name: x for name, x in batch.items() if name != "labels"}, batch["labels"]
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        what = f"dictionary of {sorted(batch)}" if isinstance(batch, dict) else type(batch).__name__
        raise InputError(f"split=None cannot tell inputs from targets in a {what}; give split=(batch) -> (both)")


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
