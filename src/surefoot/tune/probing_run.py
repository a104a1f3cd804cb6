"""The short run that is measured: gradient steps of length 1/L, with the L that the steps before showed; without trace.

Letters: x_t the weights, g_t the gradient of batch t, L_t = ||grad f_t(x_t - h_t g_t) - g_t|| / ||h_t g_t||.

    h_{t+1} = min(2 h_t, 1/L_t),    h_0 so small that ||h_0 g_0|| is a thousandth of ||x_0||

(a step with h_t L_t > 4, twice what is stable, or one that led to no finite number, is taken back once it is measured)
as in adaptive gradient descent (Malitsky and Mishchenko, arXiv 1910.09529), but with both gradients of one batch, so
that the noise between batches does not enter.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.noise import gradient_noise
from surefoot.measure.smoothness import SmoothnessProbe
from surefoot.measure.smoothness_fit import Observation

LossFn = Callable[[nn.Module, Any], Tensor]
LEAST = 25  # gradients, if a step takes one: twelve steps, and one to see that a gradient repeats
_FIRST = 1e-3  # length of the first step over that of the weights
NOISE = 6  # batches whose gradients are taken at one point, for the noise
ENOUGH_FOR_NOISE = 6 * NOISE  # gradients, from which on these are affordable
_GROW = 2.0
_UNSTABLE = 4.0  # h L beyond which a step is measured and then taken back: twice what is stable on a quadratic


@dataclass
class ProbingRun:
    """What was seen.

    Attributes:
        probe: its observations, one a step.
        steps: h_t, one an observation.
        sigma: standard deviation of a batch's gradient at the last point; None where it was not measured.
        mean_norm: norm of the mean gradient of those batches, less its noise; None likewise.
        unknown: why they were not measured, or "".
        cost: gradients that were taken.
        stopped: why the run ended early, or "".
    """

    probe: SmoothnessProbe
    steps: list[float] = field(default_factory=list)
    sigma: float | None = None
    mean_norm: float | None = None
    cost: int = 0
    stopped: str = ""
    unknown: str = ""


def probing_run(
    model: nn.Module, loss_fn: LossFn, loader: Any, gradients: int, *, accumulate: int = 1, eps: float | None = None
) -> ProbingRun:
    """Take steps of length 1/L for `gradients` gradients in all, and put everything back.

    Args:
        model: moved meanwhile; weights, buffers, gradients, modes and random states come back bit for bit.
        loss_fn: (model, batch) -> mean loss of the batch.
        loader: what one loops over to train; its generators and its own numbers come back.
        gradients: of a batch of the loader, how many may be taken: at least LEAST times accumulate.
        accumulate: batches of the loader in a step.
        eps: relative error of the gradients' arithmetic, as for `SmoothnessProbe`.

    Raises:
        InputError: a loader that cannot be gone through again or is empty, a loss that is not finite
            at the start or not a function of the weights and the batch alone.
    """
    noise = NOISE if gradients >= ENOUGH_FOR_NOISE and accumulate == 1 else 0
    count = (gradients - noise * accumulate - accumulate) // (2 * accumulate)
    assert gradients >= LEAST * accumulate
    with everything_put_back(model, loader):
        batches = _Endless(loader)
        probe = SmoothnessProbe(model, points=(1.0,), eps=eps)
        run = ProbingRun(probe)
        params = [p for p in model.parameters() if p.requires_grad]
        h = _First(model)
        for _ in range(count):
            group = [next(batches) for _ in range(accumulate)]
            _go_on_drawing()
            before = [p.detach().clone() for p in params]
            seen = _descend(probe, h, _closure(run, model, loss_fn, group))
            if not run.steps and (seen.outcome == "not finite" or not seen.grad_norm > 0):
                _refuse(seen)
            run.steps.append(h.value if isinstance(h, _First) else h)
            if seen.outcome == "not finite" or run.steps[-1] * seen.smoothness > _UNSTABLE:
                with torch.no_grad():
                    for p, value in zip(params, before):
                        p.copy_(value)
            if not (math.isfinite(seen.loss) and math.isfinite(seen.grad_norm)):
                run.stopped = f"the loss or gradient of step {len(run.steps)} is not finite"
                break
            if seen.outcome == "not finite":
                h = run.steps[-1] / 10
                continue
            if seen.outcome == "no step":
                run.stopped = f"the gradient vanished at step {len(run.steps)}"
                break
            if seen.outcome == "measured":
                h = 1 / seen.smoothness if len(run.steps) == 1 else min(_GROW * run.steps[-1], 1 / seen.smoothness)
            else:
                h = _GROW * run.steps[-1]
        if noise and not run.stopped:
            group = [next(batches) for _ in range(noise)]
            if batches.only_one:
                run.unknown = "the loader gives one batch, there is no other to compare it with"
            else:
                _measure_noise(run, model, loss_fn, group)
        elif not run.stopped:
            run.unknown = (
                f"it takes a budget of {ENOUGH_FOR_NOISE} gradients"
                if accumulate == 1
                else "batches are accumulated (accumulate > 1)"
            )
    return run


class _First:
    """h_0, once the gradient is known."""

    def __init__(self, model: nn.Module) -> None:
        self.size = math.hypot(*[float(p.detach().double().norm()) for p in model.parameters() if p.requires_grad])
        self.value = math.nan

    def __call__(self, norm: float) -> float:
        self.value = _FIRST * (self.size or 1.0) / norm if norm > 0 else 1.0
        return self.value


def _descend(probe: SmoothnessProbe, h: float | _First, closure: Callable[[], Any]) -> Observation:
    try:
        return probe.descend(h, closure)
    except InputError as error:
        raise InputError(str(error).replace("closure", "loss_fn")) from error


def _refuse(seen: Observation) -> NoReturn:
    if not math.isfinite(seen.loss):
        raise InputError(
            f"loss_fn gives a loss of {seen.loss} before the first step; look at the data and the initial weights "
            "(surefoot skips steps that are not finite, and cannot tune them)"
        )
    if not (seen.grad_norm > 0 and math.isfinite(seen.grad_norm)):
        raise InputError(
            f"loss_fn has a gradient of norm {seen.grad_norm} before the first step; there is nothing to measure"
        )
    raise InputError(
        "loss_fn gives a gradient that is not finite after a step of a thousandth of the weights; look at it"
    )


def _measure_noise(run: ProbingRun, model: nn.Module, loss_fn: LossFn, group: list[Any]) -> None:
    params = [p for p in model.parameters() if p.requires_grad]
    total, norms = [torch.zeros_like(p, dtype=torch.float64) for p in params], []
    with torch.random.fork_rng(), _buffers_put_back(model):
        for batch in group:
            found = torch.autograd.grad(_loss(run, model, loss_fn, batch), params, allow_unused=True)
            norms.append(math.hypot(*[float(g.double().norm()) for g in found if g is not None]))
            total = [t if g is None else t.add_(g) for t, g in zip(total, found)]
    norm = math.hypot(*[float(t.norm()) for t in total]) / len(group)
    if not all(map(math.isfinite, norms)):
        run.unknown = "a gradient at the last point was not finite"
        return
    sigma2 = max(0.0, gradient_noise(norms, [1] * len(norms), norm))  # each batch is one sample of the batch gradient
    run.sigma = math.sqrt(sigma2)
    run.mean_norm = math.sqrt(max(0.0, norm * norm - sigma2 / len(norms)))


def _loss(run: ProbingRun, model: nn.Module, loss_fn: LossFn, batch: Any) -> Tensor:
    """Return a batch's loss, of which a gradient will be taken."""
    loss = loss_fn(model, batch)
    run.cost += 1
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        detached = isinstance(loss, Tensor) and loss.numel() == 1
        raise InputError(
            f"loss_fn gives a loss {'without a gradient' if detached else f'of {what}'}; return the mean loss of the "
            "batch as the model gives it, a tensor of one element that was not detached"
        )
    return loss.reshape(())


def _go_on_drawing() -> None:
    """Give the step draws of its own: the probe puts the random states back, and each step would see the same masks."""
    seed = int(torch.randint(2**31, ()))
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    np.random.seed(seed)


def _closure(run: ProbingRun, model: nn.Module, loss_fn: LossFn, group: list[Any]) -> Callable[[], Any]:
    if len(group) == 1:
        return lambda: _loss(run, model, loss_fn, group[0])
    return lambda: ((_loss(run, model, loss_fn, batch), 1) for batch in group)


class _Endless:
    """A loader gone through again and again."""

    def __init__(self, loader: Any) -> None:
        self._loader, self._passes = loader, 0
        self._pass = iter(())
        self._given = 0

    @property
    def only_one(self) -> bool:
        """Whether there were several passes, of one batch each."""
        return self._given == self._passes > 1

    def __next__(self) -> Any:
        for fresh in (False, True):
            if fresh:
                self._pass = iter(self._loader)
                self._passes += 1
            for batch in self._pass:
                self._given += 1
                return batch
        raise InputError(f"loader={type(self._loader).__name__} gives no batch")


@contextmanager
def _buffers_put_back(model: nn.Module) -> Iterator[None]:
    kept = [
        (m, name, b, b.detach().clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer
                buffer.copy_(value)


@contextmanager
def everything_put_back(model: nn.Module, loader: Any) -> Iterator[None]:
    """Put weights, buffers, gradients, random states and the loader back at the end, also after an exception."""
    if isinstance(loader, Iterator):
        raise InputError(
            f"loader={type(loader).__name__} is an iterator: what is taken from it is gone for the training; give "
            "what it was made from (a DataLoader, a list of batches)"
        )
    held = _parts(loader)
    numbers = [(part, dict(vars(part))) for part in held]
    inside = {id(v): v for _, d in numbers for v in d.values()}.values()
    draws = [(v, getattr(v, get)()) for v in inside for kind, get, _ in _DRAWS if isinstance(v, kind)]
    draws += [(v.bit_generator, v.bit_generator.state) for v in inside if isinstance(v, np.random.Generator)]
    orders = [(v, list(v)) for v in inside if isinstance(v, list)]
    weights = [(p, p.detach().clone(), p.grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    cpu, python, numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    try:
        for p, _, _ in weights:
            p.grad = None
        with _buffers_put_back(model):
            yield
    finally:
        with torch.no_grad():
            for p, value, grad in weights:
                p.copy_(value)
                p.grad = grad
        for module, mode in modes:
            module.training = mode
        for part, before in numbers:
            vars(part).update(before)
        for order, entries in orders:
            order[:] = entries
        for drawn, state in draws:
            _set_draws(drawn, state)
        torch.set_rng_state(cpu)
        random.setstate(python)
        np.random.set_state(numpy)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


_DRAWS = (  # what a loader may draw from: its type, how its state is read, how it is set
    (torch.Generator, "get_state", "set_state"),
    (random.Random, "getstate", "setstate"),
    (np.random.RandomState, "get_state", "set_state"),
)


def _set_draws(drawn: Any, state: Any) -> None:
    for kind, _, put in _DRAWS:
        if isinstance(drawn, kind):
            getattr(drawn, put)(state)
            return
    drawn.state = state  # a NumPy bit generator


def _parts(loader: Any) -> list[Any]:
    """Return the loader, its samplers, its data set and what that is a subset of."""
    found = [loader]
    for part in found:
        inner = (getattr(part, name, None) for name in ("sampler", "batch_sampler", "dataset"))
        found += [x for x in inner if x is not None and all(x is not y for y in found)]
    return [part for part in found if hasattr(part, "__dict__")]
