"""What the explore/exploit callbacks share: the two phases driven by a trainer that calls `optimizer.step()` itself."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import IterableDataset

from surefoot.errors import InputError
from surefoot.measure.gram_file import fingerprint
from surefoot.theorems.verdict import Verdict
from surefoot.train.explore_exploit import ExploreExploit

Samples = tuple[Any, Tensor]  # inputs and targets
OPTIONS = sorted(set(inspect.signature(ExploreExploit).parameters) - {"model", "optimizer", "total_steps", "inputs"})


class Phases:
    """An `ExploreExploit` whose steps are those of a trainer's optimizer.

    Args:
        options: of `ExploreExploit`, without model, optimizer, total_steps and inputs.

    Attributes:
        machine: the `ExploreExploit`, from `start` on.

    Raises:
        InputError: an option that `ExploreExploit` does not have.
    """

    machine: ExploreExploit

    def __init__(self, options: Mapping[str, Any]) -> None:
        if unknown := sorted(set(options) - set(OPTIONS)):
            raise InputError(
                f"{unknown[0]}={options[unknown[0]]!r} is no option of ExploreExploit; there are {OPTIONS}"
            )
        self._options = dict(options)
        self._undo: Callable[[], None] | None = None
        self._resumed = False

    @property
    def full_batch(self) -> bool:
        """Whether the user says that each step sees all samples."""
        return bool(self._options.get("full_batch", False))

    def start(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        total_steps: int,
        read: Callable[[], Samples],
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """Begin, or go on from a state; from now on `optimizer.step()` is a step of the phase.

        Args:
            model: what ends in a linear layer; the optimizer holds its parameters.
            optimizer: torch's own, out of all wrappers.
            total_steps: T, steps of the optimizer.
            read: gives all samples, the same ones each time.
            state: what `state_dict()` returned.

        Raises:
            InputError: as `ExploreExploit` does; the state is that of other samples.
        """
        self._stop_driving()
        inputs, targets = read()
        self._read, self._samples = read, fingerprint((inputs, targets))
        if state is not None and state["samples"] != self._samples:
            raise InputError(
                "the training set is not the one that the checkpoint was made with: other samples, or the same ones "
                "augmented anew; give the same, or a finite one as data=(inputs, targets)"
            )
        self.machine = ExploreExploit(model, optimizer, total_steps, inputs=inputs, **self._options)
        if state is not None:
            self.machine.load_state_dict(state["explore_exploit"])
        self._resumed = self.machine.rank is not None
        self._drive(optimizer)

    def begin_if_due(self) -> None:
        """Perturb, freeze and verify where exploration is over. Call it before the forward pass of each step.

        Raises:
            InputError: as `ExploreExploit.begin_exploitation` does; the training set gives other numbers than before.
        """
        if not self.machine.due:
            return
        inputs, targets = self._read()
        if fingerprint((inputs, targets)) != self._samples:
            raise InputError(
                "the training set gives other numbers than at the start (augmentation?), and the guarantee is about a "
                "finite set: give it as data=(inputs, targets), every augmented copy a sample"
            )
        self.machine.begin_exploitation(inputs, targets)

    def finish(self) -> Verdict | None:
        """Give the optimizer and the model back to their owner; return the verdict, None if exploration never ended."""
        self._stop_driving()
        if self.machine.rank is None:
            return None
        if self._resumed:
            self.machine.attach(*self._read())
        verdict = self.machine.report()
        self.machine.release()
        return verdict

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, plain values and tensors; nothing before the start."""
        if not hasattr(self, "machine"):
            return {}
        return {"explore_exploit": self.machine.state_dict(), "samples": self._samples}

    def _drive(self, optimizer: Any) -> None:
        plain, instead = optimizer.step, vars(optimizer).get("step")  # a scheduler may have put its own there
        inside = False

        @functools.wraps(plain)
        def step(closure: Callable[[], Any] | None = None) -> Any:
            nonlocal inside
            if inside:  # this is ExploreExploit calling
                return plain() if closure is None else plain(closure)
            if self.machine.phase == "done":  # Trainer takes one more step when it resumes what had ended
                return None if closure is None else closure()
            inside = True
            try:
                return self.machine.step(closure)
            finally:
                inside = False
                optimizer._opt_called = True  # torch's schedulers look at it, and another optimizer may have stepped

        def undo() -> None:
            del optimizer.step
            if instead is not None:
                optimizer.step = instead

        optimizer.step = step
        self._undo = undo

    def _stop_driving(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None


def whole(loader: Any) -> Any:
    """Return all samples of a loader's data set as one batch, in their order; global random numbers stay as they are.

    Raises:
        InputError: it is a stream, or no data set with a length.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise InputError(
            f"the training set, {type(dataset).__name__}, is no finite data set with a length and numbers; give all "
            "samples as data=(inputs, targets)"
        )
    with _random_numbers_kept():
        return loader.collate_fn([dataset[i] for i in range(len(dataset))])


def innermost(optimizer: Any) -> Optimizer:
    """Return torch's own optimizer inside whatever wraps it as `.optimizer`."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    return optimizer


def check_full_batch(reasons: Mapping[str, Any]) -> None:
    """Refuse full_batch=True where a step is not the gradient of the mean over all samples.

    Args:
        reasons: what is in the way, and whether it is there.

    Raises:
        InputError: something is.
    """
    if found := [reason for reason, there in reasons.items() if there]:
        raise InputError(
            f"full_batch=True, but {found[0]}: then no step is the gradient over all samples, and there is no bound of "
            "the loss after it; change that, or leave full_batch out (the infimum is guaranteed all the same)"
        )


@contextmanager
def _random_numbers_kept() -> Iterator[None]:
    ours, theirs = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(theirs)
