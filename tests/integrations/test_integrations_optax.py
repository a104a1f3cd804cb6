"""δ-GClip as an optax transformation: its steps are those of the torch optimizer, under jit."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from integrations_helpers import need

from surefoot import DeltaGClip
from surefoot.errors import InputError

jax = need("jax")
optax = need("optax")

import jax.numpy as jnp  # noqa: E402

from surefoot.integrations.optax import delta_gclip, scale_by_delta_gclip, telemetry  # noqa: E402

COUNTS = ("steps", "unclipped", "clipped", "floored", "skipped")


def problem() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logarithmically spaced scales: the norms go from far above γ/δ to far below γ."""
    random = np.random.default_rng(0)
    return random.normal(size=(6, 4)) * np.logspace(0, 0.7, 4), random.normal(size=6), 3 * random.normal(size=4)


def with_torch(steps: int, schedule: Any, **options: Any) -> tuple[np.ndarray, dict[str, float]]:
    A, b, start = (torch.from_numpy(x) for x in problem())
    w = torch.nn.Parameter(start.clone())
    c = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    opt = DeltaGClip([w, c], **{"lr": 1.0, **options})
    rates = torch.optim.lr_scheduler.LambdaLR(opt, schedule)
    for _ in range(steps):
        opt.zero_grad()
        ((A @ w - c * b).square().sum() / 2).backward()
        opt.step()
        rates.step()
    return torch.cat([w.detach(), c.detach()[None]]).numpy(), opt.telemetry()


def with_optax(steps: int, learning_rate: Any, **options: Any) -> tuple[np.ndarray, dict[str, float]]:
    A, b, start = (jnp.asarray(x) for x in problem())
    transform = delta_gclip(learning_rate, **options)
    params = {"w": start, "c": jnp.ones((), jnp.float64)}
    state = transform.init(params)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda p: jnp.sum((A @ p["w"] - p["c"] * b) ** 2) / 2)(params)
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return np.concatenate([params["w"], params["c"][None]]), telemetry(state)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
@pytest.mark.parametrize("delta", [0.0, 0.05, 1.0])
def test_the_steps_are_those_of_torch(options: dict[str, Any], delta: float) -> None:
    lr = 0.003 if delta == 1.0 else 0.02
    with jax.enable_x64(True):
        ours, seen = with_optax(60, lr, gamma=2.0, delta=delta, **options)
    theirs, counted = with_torch(60, lambda _: lr, gamma=2.0, delta=delta, **options)
    assert ours.dtype == np.float64
    assert np.abs(ours - theirs).max() <= 1e-12
    assert {name: seen[name] for name in COUNTS} == {name: counted[name] for name in COUNTS}
    assert seen["clip_fraction"] == counted["clip_fraction"]
    assert seen["norm"] == pytest.approx(counted["norm"], rel=1e-9)
    assert seen["scale"] == pytest.approx(counted["scale"], rel=1e-9)


def test_every_regime_is_in_the_parity_test() -> None:
    _, counted = with_torch(60, lambda _: 0.02, gamma=2.0, delta=0.05, momentum=0.9)
    assert min(counted["unclipped"], counted["clipped"], counted["floored"]) > 0


def test_a_schedule_with_warm_up() -> None:
    with jax.enable_x64(True):
        ours, _ = with_optax(
            40,
            lambda count: 0.02 * jnp.minimum(1.0, count.astype(jnp.float64) / 5),
            gamma=2.0,
            delta=0.05,
            momentum=0.9,
        )
    theirs, _ = with_torch(40, lambda step: 0.02 * min(1.0, step / 5), gamma=2.0, delta=0.05, momentum=0.9)
    assert np.abs(ours - theirs).max() <= 1e-12


def test_a_schedule_of_optax() -> None:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.02, 5, 40)
    rates = [float(schedule(jnp.int32(i))) for i in range(41)]
    assert rates[0] == 0
    with jax.enable_x64(True):
        ours, _ = with_optax(40, schedule, gamma=2.0, delta=0.05, momentum=0.9)
    theirs, _ = with_torch(40, lambda i: rates[i], gamma=2.0, delta=0.05, momentum=0.9)
    assert np.abs(ours - theirs).max() <= 1e-6  # optax works schedules out in float32


def test_x64_is_as_it_was() -> None:
    assert jnp.zeros(1, jnp.float32).dtype == jnp.asarray(1.0).dtype


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_step_is_left_out_whole(bad: float) -> None:
    transform = delta_gclip(lambda count: 0.1 * (count + 1), gamma=1.0, delta=0.1, momentum=0.9)
    params = {"w": jnp.ones(3), "v": jnp.ones(2)}
    good = {"w": jnp.full(3, 4.0), "v": jnp.full(2, 4.0)}
    update = jax.jit(transform.update)
    _, state = update(good, transform.init(params))
    updates, after = update({**good, "w": jnp.array([1.0, bad, 1.0])}, state)
    assert all(not np.any(u) for u in jax.tree.leaves(updates)), "momentum must not move the weights"
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(after.momentum), jax.tree.leaves(state.momentum)))
    seen = telemetry(after)
    assert (seen["steps"], seen["skipped"], seen["clipped"], seen["scale"]) == (2, 1, 1, 0.0)
    assert not math.isfinite(seen["norm"])
    third, last = update(good, after)
    assert telemetry(last)["clipped"] == 2
    # b = 0.9 b + scale g; the schedule is at its third value
    scale = 1 / math.sqrt(5 * 16)
    assert np.allclose(third["w"], -0.3 * (0.9 * scale * 4 + scale * 4), rtol=1e-5)


def test_the_multiplier_alone_gives_zero_for_a_bad_step() -> None:
    transform = scale_by_delta_gclip(1.0, 0.1)
    updates, state = jax.jit(transform.update)(jnp.array([math.nan, 1.0]), transform.init(jnp.zeros(2)))
    assert not np.any(updates)
    assert telemetry(state)["skipped"] == 1
    assert telemetry(state)["unclipped"] == 0


@pytest.mark.parametrize(("norm", "regime"), [(0.0, 0), (1.0, 0), (1.5, 1), (10.0, 2), (20.0, 2)])
def test_regimes_at_their_borders(norm: float, regime: int) -> None:
    transform = scale_by_delta_gclip(1.0, 0.1)
    updates, state = transform.update(jnp.array([norm, 0.0]), transform.init(jnp.zeros(2)))
    seen = telemetry(state)
    assert [seen["unclipped"], seen["clipped"], seen["floored"]] == [int(i == regime) for i in range(3)]
    assert float(updates[0]) == pytest.approx(norm * min(1, max(0.1, 1 / norm if norm else 1)), rel=1e-6)


def test_no_clipping_is_optax_clipping() -> None:
    grads = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([[12.0]])}
    ours, _ = scale_by_delta_gclip(2.0, 0.0).update(grads, scale_by_delta_gclip(2.0, 0.0).init(grads))
    theirs, _ = optax.clip_by_global_norm(2.0).update(grads, optax.EmptyState())
    assert all(np.allclose(a, b, rtol=1e-6) for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)))


def test_norms_that_overflow_when_squared() -> None:
    for size in (1e19, 1e-30):
        grads = jnp.full(128, size, jnp.float32)
        transform = scale_by_delta_gclip(size, 0.0)
        updates, state = transform.update(grads, transform.init(grads))
        assert telemetry(state)["norm"] == pytest.approx(size * math.sqrt(128), rel=1e-5)
        assert np.linalg.norm(np.asarray(updates, np.float64)) == pytest.approx(size, rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_accumulated_in_float32(dtype: str) -> None:
    grads = {str(i): jnp.full(1000, 1.0, dtype) for i in range(300)}
    transform = scale_by_delta_gclip(1.0, 0.0)
    updates, state = transform.update(grads, transform.init(grads))
    assert telemetry(state)["norm"] == pytest.approx(math.sqrt(300_000), rel=1e-6)
    assert all(u.dtype == dtype for u in updates.values())
    assert all(leaf.dtype != dtype for leaf in jax.tree.leaves(state))


def test_in_a_chain_and_in_wrappers() -> None:
    params = jnp.ones(3)
    grads = jnp.full(3, 5.0)
    chain = optax.chain(scale_by_delta_gclip(1.0, 0.1), optax.scale_by_adam(), optax.scale_by_learning_rate(1e-3))
    steps = optax.MultiSteps(delta_gclip(0.1, gamma=1.0, delta=0.1), every_k_schedule=2)
    hyper = optax.inject_hyperparams(delta_gclip)(learning_rate=0.1, gamma=1.0, delta=0.1)
    for transform, expected in ((chain, 4), (steps, 2), (hyper, 4)):
        state = transform.init(params)
        for _ in range(4):
            _, state = jax.jit(transform.update)(grads, state, params)
        assert telemetry(state)["steps"] == telemetry(state)["clipped"] == expected


def test_gamma_by_schedule() -> None:
    transform = optax.inject_hyperparams(delta_gclip)(learning_rate=1.0, gamma=lambda count: 1.0 + count, delta=0.0)
    grads = jnp.array([30.0, 40.0])
    state = transform.init(grads)
    for length in (1.0, 2.0, 3.0):
        updates, state = jax.jit(transform.update)(grads, state)
        assert np.linalg.norm(updates) == pytest.approx(length, rel=1e-6)


def test_an_infinite_gamma_never_clips() -> None:
    transform = scale_by_delta_gclip(math.inf, 0.5)
    updates, state = transform.update(jnp.array([1e30]), transform.init(jnp.zeros(1)))
    assert float(updates[0]) == pytest.approx(1e30)
    assert telemetry(state)["unclipped"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.0}, r"gamma=0.0 is outside \(0, inf\]"),
        ({"gamma": math.nan}, "gamma=nan is outside"),
        ({"delta": 2.0}, r"delta=2.0 is outside \[0, 1\]"),
        ({"learning_rate": math.nan}, "learning_rate=nan is outside"),
        ({"momentum": -0.1}, "momentum=-0.1 is outside"),
        ({"nesterov": True}, "nesterov=True needs momentum"),
    ],
)
def test_options_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        delta_gclip(**{"learning_rate": 0.1, "gamma": 1.0, "delta": 0.1, **change})


def test_telemetry_wants_one_state() -> None:
    state = scale_by_delta_gclip(1.0, 0.1).init(jnp.zeros(1))
    with pytest.raises(InputError, match="holds 2 states"):
        telemetry((state, state))
    with pytest.raises(InputError, match="holds 0 states"):
        telemetry(optax.EmptyState())
    assert math.isnan(telemetry(state)["clip_fraction"])
