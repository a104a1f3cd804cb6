"""δ-GClip for JAX, as optax transformations: the same rule, regimes and non-finite policy as `surefoot.DeltaGClip`."""

# The libraries of this adapter are an extra, and pyright is run without them as well.
# pyright: reportMissingImports=false
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from surefoot.errors import InputError

try:
    import jax
    import jax.numpy as jnp
    import optax
except ImportError as error:
    raise InputError("surefoot.integrations.optax needs optax and jax: pip install 'surefoot[optax]'") from error


class ScaleByDeltaGClipState(NamedTuple):
    """Counts since the start and the last step's norm and multiplier; all () arrays on the device."""

    steps: jax.Array
    unclipped: jax.Array
    clipped: jax.Array
    floored: jax.Array
    skipped: jax.Array
    norm: jax.Array
    scale: jax.Array


class DeltaGClipState(NamedTuple):
    """The counts of `scale_by_delta_gclip`, the momentum buffers and the place in the schedule."""

    clip: ScaleByDeltaGClipState
    momentum: Any
    schedule: Any


def scale_by_delta_gclip(gamma: float, delta: float) -> optax.GradientTransformation:
    """Multiply the updates by min{1, max{δ, γ/||g||}}, with ||g|| over all of them; δ = 0 is `clip_by_global_norm`.

    If ||g|| is not finite, the updates become zero and the step counts as skipped. What follows in an `optax.chain`
    still acts then, momentum for one; `delta_gclip` leaves out the whole step.

    Args:
        gamma: threshold γ in (0, inf]; inf never clips.
        delta: floor δ in [0, 1].

    Raises:
        ValueError: gamma or delta is out of range (arrays, as `optax.inject_hyperparams` gives, are not looked at).

    Example:
        >>> transform = scale_by_delta_gclip(gamma=1.0, delta=0.1)
        >>> grads = {"w": jnp.array([3.0, 4.0])}
        >>> updates, state = jax.jit(transform.update)(grads, transform.init(grads))
        >>> [round(float(u), 6) for u in updates["w"]], telemetry(state)["clipped"]
        ([0.6, 0.8], 1)

    Source: Tucat, Mukherjee, Sen, Sun, Rivasplata, arXiv 2404.08624, Definition 2.
    """
    _check("gamma", gamma, lambda gamma: gamma > 0, "(0, inf]")
    _check("delta", delta, lambda delta: 0 <= delta <= 1, "[0, 1]")

    def init(params: optax.Params) -> ScaleByDeltaGClipState:
        zero, nan = jnp.zeros((), jnp.int32), jnp.full((), jnp.nan, _accumulator(params))
        return ScaleByDeltaGClipState(zero, zero, zero, zero, zero, nan, nan)

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[optax.Updates, Any]:
        del params
        norm = _norm(updates).astype(state.norm.dtype)
        finite = jnp.isfinite(norm)
        above = norm > gamma
        # the floor acts from γ/δ on, for δ = 0 never
        floored = finite & above & (norm >= jnp.where(delta > 0, gamma / jnp.where(delta > 0, delta, 1.0), jnp.inf))
        # γ/||g|| only where it is below 1: γ may be infinite and ||g|| zero
        scale = jnp.where(above, jnp.maximum(delta, gamma / jnp.where(above, norm, 1.0)), 1.0).astype(norm.dtype)
        scale = jnp.where(finite, scale, 0.0)
        new = ScaleByDeltaGClipState(
            steps=state.steps + 1,
            unclipped=state.unclipped + (finite & ~above),
            clipped=state.clipped + (finite & above & ~floored),
            floored=state.floored + floored,
            skipped=state.skipped + ~finite,
            norm=norm,
            scale=scale,
        )

        def scaled(g: jax.Array) -> jax.Array:
            wide = jnp.promote_types(g.dtype, scale.dtype)  # a half-precision g is rounded once, after multiplying
            return jnp.where(finite, (g.astype(wide) * scale).astype(g.dtype), jnp.zeros_like(g))

        return jax.tree.map(scaled, updates), new

    return optax.GradientTransformation(init, update)


def delta_gclip(
    learning_rate: optax.ScalarOrSchedule,
    *,
    gamma: float,
    delta: float,
    momentum: float | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformation:
    """δ-GClip: w <- w - h g with h = η min{1, max{δ, γ/||g||}}; the steps of `surefoot.DeltaGClip`.

    Momentum acts on the clipped gradient: b <- μ b + scale g, and the step is η b, or η (scale g + μ b) with Nesterov.
    A step whose ||g|| is not finite is left out whole: no update, the momentum as it was; it is counted, and the
    schedule moves on.

    Args:
        learning_rate: η, a number or a schedule: a function of the number of steps.
        gamma: threshold γ in (0, inf].
        delta: floor δ in [0, 1]: 0 is plain clipping, 1 plain gradient descent.
        momentum: μ; None keeps no buffer.
        nesterov: whether to use Nesterov momentum.

    Raises:
        ValueError: an option is out of range, or nesterov without momentum.

    Example:
        >>> optimizer = delta_gclip(1.0, gamma=1.0, delta=0.1)
        >>> w = jnp.array([3.0, 4.0])
        >>> state = optimizer.init(w)
        >>> updates, state = optimizer.update(w, state)     # the gradient of ||w||²/2 is w
        >>> [round(float(x), 6) for x in optax.apply_updates(w, updates)]
        [2.4, 3.2]
        >>> telemetry(state)["clip_fraction"]
        1.0

    Source: Tucat, Mukherjee, Sen, Sun, Rivasplata, arXiv 2404.08624, Definition 2.
    """
    if not callable(learning_rate):
        _check("learning_rate", learning_rate, lambda lr: 0 < lr < math.inf, "(0, inf)")
    if momentum is not None:
        _check("momentum", momentum, lambda mu: 0 <= mu < math.inf, "[0, inf)")
    elif nesterov:
        raise InputError("nesterov=True needs momentum > 0, not momentum=None")
    clip = scale_by_delta_gclip(gamma, delta)
    trace = optax.identity() if momentum is None else optax.trace(momentum, nesterov=nesterov)
    rate = optax.scale_by_learning_rate(learning_rate)

    def init(params: optax.Params) -> Any:
        counts: Any = clip.init(params)
        return DeltaGClipState(counts, trace.init(params), rate.init(params))

    def update(updates: optax.Updates, state: Any, params: optax.Params | None = None) -> tuple[optax.Updates, Any]:
        clipped: Any
        updates, clipped = clip.update(updates, state.clip, params)
        updates, momenta = trace.update(updates, state.momentum, params)
        updates, schedule = rate.update(updates, state.schedule, params)
        taken = clipped.skipped == state.clip.skipped
        updates = jax.tree.map(lambda u: jnp.where(taken, u, jnp.zeros_like(u)), updates)
        momenta = jax.tree.map(lambda new, old: jnp.where(taken, new, old), momenta, state.momentum)
        return updates, DeltaGClipState(clipped, momenta, schedule)

    return optax.GradientTransformation(init, update)


def telemetry(state: Any) -> dict[str, float]:
    """Return what the steps did as plain numbers, under the names of `DeltaGClip.telemetry()`. Waits for the device.

    Args:
        state: the state of `delta_gclip` or `scale_by_delta_gclip`, or one that holds it: of `optax.chain`,
            `optax.MultiSteps`, `optax.inject_hyperparams`.

    Returns:
        `steps`, `unclipped`, `clipped`, `floored` and `skipped` since `init`; `clip_fraction` and `floor_fraction`,
        NaN before the first step; the last step's `norm` and `scale` (NaN before the first, 0 if it was skipped).

    Raises:
        InputError: the state holds none of ours, or several.

    Example:
        >>> state = delta_gclip(0.1, gamma=1.0, delta=0.1).init(jnp.zeros(3))
        >>> telemetry(state)["steps"], telemetry(state)["norm"]
        (0, nan)
    """

    def is_ours(node: Any) -> bool:
        return isinstance(node, ScaleByDeltaGClipState)

    found = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    if len(found) != 1:
        raise InputError(
            f"the state holds {len(found)} states of scale_by_delta_gclip; pass one that holds one, "
            "such as what delta_gclip(...).init(params) returns"
        )
    values = jax.device_get(found[0])
    counts = {name: int(getattr(values, name)) for name in ("steps", "unclipped", "clipped", "floored", "skipped")}
    steps = counts["steps"]
    return {
        **counts,
        "clip_fraction": counts["clipped"] / steps if steps else math.nan,
        "floor_fraction": counts["floored"] / steps if steps else math.nan,
        "norm": float(values.norm),
        "scale": float(values.scale),
    }


def _check(name: str, value: Any, within: Callable[[Any], Any], allowed: str) -> None:
    if not isinstance(value, jax.Array) and not within(value):
        raise InputError(f"{name}={value!r} is outside {allowed}")


def _accumulator(tree: Any) -> Any:
    """Return the dtype norms are worked out in: at least float32."""
    kinds = [jnp.finfo(leaf.dtype).dtype for leaf in jax.tree.leaves(tree)]
    return jnp.result_type(jnp.float32, *kinds)


def _norm(tree: Any) -> jax.Array:
    """Return ||g|| over all leaves, a () array: divided by the largest entry first, so that no square overflows."""
    dtype = _accumulator(tree)
    sizes = [jnp.abs(leaf).astype(dtype) for leaf in jax.tree.leaves(tree) if leaf.size]
    if not sizes:
        return jnp.zeros((), dtype)
    largest = jnp.max(jnp.stack([jnp.max(size) for size in sizes]))
    divisor = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1.0)
    return divisor * jnp.sqrt(sum(jnp.sum(jnp.square(size / divisor)) for size in sizes))
