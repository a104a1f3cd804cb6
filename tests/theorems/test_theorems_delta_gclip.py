"""The δ-GClip theorem on problems whose constants are known: every bound at every step, and what breaks it.

The problems are E = 1/2 ||F - y||^2 with F(w) = A w + s sin(B w), n < P, which is not convex for s > 0:
J = A + s diag(cos Bw) B, so s_min(J) >= s_min(A) - s ||B||, ||J|| <= ||A|| + s ||B||, and D^2F is at most s ||B||^2.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surefoot import DeltaGClip
from surefoot.errors import InputError
from surefoot.measure.measurement import Measurement
from surefoot.theorems.delta_gclip import (
    SCOPES,
    block_cosine,
    check_delta_gclip,
    check_stochastic_delta_gclip,
    delta_gclip,
    effective_delta,
    largest_lr,
    radii,
    stochastic_delta_gclip,
    uncovered,
)
from surefoot.theorems.refutations import fewer_parameters, first
from surefoot.theorems.verdict import Outcome, Verdict

SLACK = 1 + 1e-9  # the runs are in float64, the theorem in exact arithmetic
BLOCKS = ("group", "tensor", "unit", "coordinate")


@dataclass
class Problem:
    """E = 1/2 ||A w + s sin(B w) - y||^2 with constants on the ball of radius `ball` around w0."""

    A: np.ndarray
    B: np.ndarray
    s: float
    y: np.ndarray
    w0: np.ndarray

    def __post_init__(self) -> None:
        sizes = np.linalg.svd(self.A, compute_uv=False)
        norm_B = np.linalg.norm(self.B, 2) * (1 + 1e-12)
        least, self.L = sizes[-1] * (1 - 1e-12) - self.s * norm_B, sizes[0] * (1 + 1e-12) + self.s * norm_B
        assert least > 0
        self.mu = least**2
        rho = np.linalg.norm(self.residual(self.w0))
        self.loss = rho**2 / 2 * (1 + 1e-12)
        self.ball = 20 * rho / least
        self.beta = self.L**2 + self.s * norm_B**2 * (rho + self.L * self.ball) * (self.s > 0)

    def residual(self, w: np.ndarray) -> np.ndarray:
        return self.A @ w + self.s * np.sin(self.B @ w) - self.y

    def both(self, w: np.ndarray) -> tuple[float, np.ndarray]:
        r = self.residual(w)
        J = self.A + self.s * np.cos(self.B @ w)[:, None] * self.B
        return float(r @ r) / 2, J.T @ r


def problem(rng: np.random.Generator, s: float | None = None) -> Problem:
    n, P = int(rng.integers(2, 6)), int(rng.integers(8, 30))
    U, _, V = np.linalg.svd(rng.standard_normal((n, P)), full_matrices=False)
    A = U * rng.uniform(0.5, 3, n) @ V
    B = rng.standard_normal((n, P))
    B /= np.linalg.norm(B, 2)
    amount = rng.choice([0.0, 0.1, 0.3]) if s is None else s
    return Problem(A, B, amount, 3 * rng.standard_normal(n), rng.standard_normal(P))


def blocks_of(scope: str, P: int, rng: np.random.Generator) -> np.ndarray:
    """Which block each weight belongs to."""
    if scope == "global":
        return np.zeros(P, dtype=int)
    if scope == "coordinate":
        return np.arange(P)
    return np.sort(rng.integers(0, 4, P))


def multipliers(g: np.ndarray, block: np.ndarray, gamma: float, delta: float) -> np.ndarray:
    norms = np.sqrt(np.bincount(block, g * g))
    with np.errstate(divide="ignore"):
        scale = np.minimum(1, np.maximum(delta, np.where(norms > 0, gamma / norms, np.inf)))
    return scale[block]


@dataclass
class Seen:
    """What acted, over all runs."""

    clipped: int = 0
    floored: int = 0
    runs: int = 0
    nearest: float = 0.0  # max path/radius


def hold(p: Problem, rng: np.random.Generator, scope: str, seen: Seen, steps: int = 150) -> None:
    """Run δ-GClip with random options and hold every bound at every step."""
    loss, g = p.both(p.w0)
    norm = float(np.linalg.norm(g))
    gamma = norm * 10 ** rng.uniform(-1.5, 0.2)
    delta = float(rng.choice([0.0, 10 ** rng.uniform(-3, 0)]))
    lr = rng.uniform(0.2, 1.5) / p.beta
    found = delta_gclip(p.loss, p.mu, p.beta, lr=lr, gamma=gamma, delta=delta, scope=scope)
    if scope != "global" and found is not None and found.radius > p.ball:
        delta = 0.5
        found = delta_gclip(p.loss, p.mu, p.beta, lr=lr, gamma=gamma, delta=delta, scope=scope)
    assert found is not None
    if found.radius > p.ball:
        lr = 1 / p.beta
        found = delta_gclip(p.loss, p.mu, p.beta, lr=lr, gamma=gamma, delta=delta, scope=scope)
    assert found is not None
    assert found.radius <= p.ball
    block = blocks_of(scope, len(p.w0), rng)
    w, path, active = p.w0.copy(), 0.0, 0
    for t in range(steps):
        loss, g = p.both(w)
        size = np.linalg.norm(g)
        assert loss <= found.loss_after(t) * SLACK + 1e-25
        assert path + math.sqrt(2 * loss / p.mu) <= found.radius * SLACK
        assert np.linalg.norm(w - p.w0) <= path * SLACK
        assert size <= found.gradient * SLACK
        if loss < 1e-20 * p.loss:
            break
        h = lr * multipliers(g, block, gamma, delta)
        assert h.min() >= lr * found.delta_eff * (1 - 1e-12)
        v = h * g
        assert g @ v >= found.cosine * size * np.linalg.norm(v) * (1 - 1e-12)
        active += bool(h.min() < lr)
        seen.clipped += bool((h < lr).any())
        seen.floored += bool(delta > 0 and (h <= lr * delta * (1 + 1e-12)).any() and delta < 1)
        w = w - v
        path += float(np.linalg.norm(v))
        after, _ = p.both(w)
        assert after <= loss * (1 - found.drop) * SLACK + 1e-25
        if h.min() == lr:
            assert after <= loss * (1 - found.drop_plain) * SLACK + 1e-25
    assert active <= found.clipped_steps
    seen.nearest = max(seen.nearest, path / found.radius)
    seen.runs += 1


def campaign(runs: int, seed: int) -> Seen:
    rng, seen = np.random.default_rng(seed), Seen()
    for i in range(runs):
        hold(problem(rng), rng, ("global", "global", *BLOCKS)[i % 6], seen)
    assert seen.runs == runs
    assert seen.clipped > 5 * runs
    assert seen.floored > runs
    assert seen.nearest > 0.3
    return seen


def test_every_bound_holds_at_every_step() -> None:
    campaign(150, seed=0)


@pytest.mark.nightly
def test_every_bound_holds_at_every_step_of_many_problems() -> None:
    campaign(1500, seed=1)


def test_the_problems_are_not_convex() -> None:
    p = problem(np.random.default_rng(0), s=0.3)
    e = 1e-4
    H = np.array([(p.both(p.w0 + e * d)[1] - p.both(p.w0 - e * d)[1]) / (2 * e) for d in np.eye(len(p.w0))])
    assert np.linalg.eigvalsh(H + H.T)[0] / 2 < -1e-3
    assert np.linalg.eigvalsh(H + H.T)[-1] / 2 <= p.beta


def test_a_function_of_one_variable_that_is_not_convex() -> None:
    # E = w^2 + 3 sin^2 w: |E''| = |2 + 6 cos 2w| <= 8, and 1/2 E'^2 >= E/32 (checked below on a grid)
    w = np.linspace(-20, 20, 400_001)
    E, g = w**2 + 3 * np.sin(w) ** 2, 2 * w + 3 * np.sin(2 * w)
    assert (g**2 / 2 >= E / 32).all()
    assert (2 + 6 * np.cos(2 * w)).min() < 0
    for start in np.linspace(-10, 10, 21):
        for lr, gamma, delta in ((0.125, 1.0, 0.0), (0.125, 1.0, 0.2), (0.2, 3.0, 0.01), (0.05, 0.5, 0.5)):
            w = float(start)
            E0 = w**2 + 3 * math.sin(w) ** 2
            found = delta_gclip(E0, 1 / 32, 8.0, lr=lr, gamma=gamma, delta=delta)
            assert found is not None
            path = 0.0
            for t in range(100):
                E, g = w**2 + 3 * math.sin(w) ** 2, 2 * w + 3 * math.sin(2 * w)
                assert found.loss_after(t) * SLACK + 1e-300 >= E
                assert path <= found.radius * SLACK
                h = lr * min(1, max(delta, gamma / abs(g))) if g else lr
                path += abs(h * g)
                w -= h * g


def test_the_rate_is_exact_for_a_parabola() -> None:
    # E = mu/2 w^2, beta = mu: one step multiplies E by (1 - lr mu)^2, which is 1 - 2 (1 - eps) mu lr
    for mu, lr in ((1.0, 0.5), (3.0, 0.1), (0.25, 2.0)):
        found = delta_gclip(1.0, mu, mu, lr=lr, gamma=math.inf, delta=0.0)
        assert found is not None
        assert 1 - found.drop == pytest.approx((1 - lr * mu) ** 2, rel=1e-14)
        assert found.clipped_steps == 0
        assert found.delta_eff == found.cosine == 1
    tight = delta_gclip(2.0, 1.0, 1.0, lr=1e-6, gamma=math.inf, delta=0.0)
    assert tight is not None
    assert tight.radius == pytest.approx(2.0, rel=1e-5)  # |w0| = 2: the path goes straight to 0


def test_steps_to_a_target_are_enough() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        p = problem(rng)
        norm = np.linalg.norm(p.both(p.w0)[1])
        lr, gamma, delta = 1 / p.beta, norm * rng.uniform(0.05, 0.5), 0.01
        found = delta_gclip(p.loss, p.mu, p.beta, lr=lr, gamma=gamma, delta=delta)
        assert found is not None
        target = p.loss / 100
        steps = found.steps_to(target)
        assert found.loss_after(int(steps)) <= target * (1 + 1e-10)
        if steps > 20_000:
            continue
        w = p.w0.copy()
        for _ in range(int(steps)):
            g = p.both(w)[1]
            w -= lr * multipliers(g, np.zeros(len(w), dtype=int), gamma, delta) * g
        assert p.both(w)[0] <= target


def test_counting_beats_the_uniform_rate_of_plain_clipping() -> None:
    found = delta_gclip(100.0, 1.0, 1.0, lr=1.0, gamma=0.1, delta=0.0)
    assert found is not None
    assert found.drop < 0.01
    assert found.steps_to(1e-12) <= found.clipped_steps + 1
    assert found.loss_after(10_000) < 1e-12 < found.loss * (1 - found.drop) ** 3000


@settings(max_examples=60, deadline=None)
@given(
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 10),
    st.floats(1, 100),
    st.floats(0.001, 1),
    st.floats(1e-3, 1e3),
    st.floats(0.01, 0.99),
)
def test_the_numbers_agree_with_each_other(
    loss: float, mu: float, ratio: float, delta: float, gamma: float, part: float
) -> None:
    beta = mu * ratio
    found = delta_gclip(loss, mu, beta, lr=2 * part / beta, gamma=gamma, delta=delta)
    assert found is not None
    assert found.radius == pytest.approx(math.sqrt(2 * loss / mu) / (1 - part), rel=1e-12)
    assert found.delta_eff == pytest.approx(max(delta, min(1, gamma / math.sqrt(2 * beta * loss))), rel=1e-12)
    assert delta <= found.delta_eff <= 1
    # R2 is never above the others (the order in theory: delta <= sqrt(beta/mu), always so)
    rs = radii(loss, mu, beta, delta, jacobian_norm=math.sqrt(beta))
    assert rs["R2"] <= rs["R1"] * (1 + 1e-12)
    assert rs["R2"] <= rs["R1'"] * (1 + 1e-12)
    half = delta_gclip(loss, mu, beta, lr=1 / beta, gamma=gamma, delta=delta)
    assert half is not None
    assert half.radius == pytest.approx(rs["R2"], rel=1e-9)
    # the largest lr for a ball is that at which the radius is the ball
    lr = largest_lr(loss, mu, beta, found.radius)
    assert lr == pytest.approx(2 * part / beta, rel=1e-6)
    for scope in BLOCKS:
        block = delta_gclip(loss, mu, beta, lr=2 * part / beta, gamma=gamma, delta=delta, scope=scope)
        assert block is not None
        assert block.radius >= found.radius
        assert block.cosine == pytest.approx(block_cosine(block.delta_eff))


def test_the_other_convention_of_pl() -> None:
    # ||grad E||^2 >= mu' E is mu = mu'/2
    prime, loss, beta, delta = 0.5, 2.0, 4.0, 0.25
    rs = radii(loss, prime / 2, beta, delta)
    assert rs["R2"] == pytest.approx(4 * math.sqrt(loss / prime))
    assert rs["R1"] == pytest.approx(4 * math.sqrt(2 * beta * loss) / (delta * prime))


def test_blocks_are_covered_by_gamma_too_where_delta_is_0() -> None:
    found = delta_gclip(0.5, 1.0, 1.0, lr=0.5, gamma=0.25, delta=0.0, scope="tensor")
    assert found is not None
    assert found.delta_eff == 0.25
    assert found.cosine == pytest.approx(0.8)
    assert delta_gclip(0.5, 1.0, 1.0, lr=0.5, gamma=0.0, delta=0.0, scope="tensor") is None
    assert effective_delta(0.1, 0.0, 5.0) == 0.1


# ----------------------------------------------------------------------------------------------------------------------


def upper(name: str, value: float, level: str = "verified") -> Measurement:
    return Measurement(name, value, "upper bound", level, "by hand")  # type: ignore[arg-type]


def lower(name: str, value: float, level: str = "verified") -> Measurement:
    return Measurement(name, value, "lower bound", level, "by hand")  # type: ignore[arg-type]


def check(**changes: object) -> Verdict:
    options: dict[str, object] = {
        "loss": upper("E", 2.0),
        "mu": lower("mu", 0.25),
        "beta": upper("beta", 4.0),
        "lr": 0.25,
        "gamma": 1.0,
        "delta": 0.5,
        "ball": 8.5,
    } | changes
    return check_delta_gclip(**options)  # type: ignore[arg-type]


def test_it_is_proved_with_its_numbers() -> None:
    verdict = check(target=1e-6, gradient_bound=upper("sup ||grad E||", 3.0))
    assert verdict
    assert verdict.numbers["radius"] == 8.0
    assert verdict.numbers["delta_eff"] == 0.5
    assert verdict.numbers["gradient"] == 3.0
    assert verdict.numbers["drop"] == 0.25 * 0.5 * 0.25
    # M = floor(8/0.25) = 32 steps clipped, all others by 1/16: fewer than all by 1/32
    assert verdict.numbers["steps"] == 32 + math.ceil(math.log(2e6) / -math.log1p(-1 / 16))
    assert verdict.numbers["steps"] < math.log(2e6) / -math.log1p(-1 / 32)
    assert "8" in verdict.conclusion
    assert verdict.criteria["the clip can act (gamma < G0)"]
    assert verdict.criteria["the floor can act, and delta improves the rate (delta > gamma/G0)"]
    assert not verdict.criteria["the radius of the paper's form fits the ball (R1)"]
    assert len(verdict.measurements) == 4
    assert check(delta=0.0)
    assert check(scope="tensor", ball=20.0)


@pytest.mark.parametrize(
    ("changes", "outcome", "hypothesis"),
    [
        ({"loss": upper("E", 2.0, "estimate")}, "undecided", "E has a proved upper bound"),
        ({"mu": lower("mu", 0.25, "estimate")}, "undecided", "mu has a proved lower bound"),
        ({"mu": upper("mu", 0.25)}, "undecided", "mu has a proved lower bound"),
        ({"beta": lower("beta", 4.0)}, "undecided", "beta has a proved upper bound"),
        ({"beta": upper("beta", math.inf)}, "undecided", "lr < 2/beta"),
        ({"beta": upper("beta", 0.0)}, "undecided", "lr < 2/beta"),
        ({"loss": upper("E", math.inf)}, "undecided", "the bounds give a conclusion"),
        ({"mu": lower("mu", 0.0)}, "undecided", "mu > 0"),
        ({"mu": lower("mu", math.inf)}, "undecided", "the bounds give a conclusion"),
        ({"mu": lower("mu", -1.0)}, "undecided", "mu > 0"),
        ({"mu": lower("mu", 4.5)}, "undecided", "mu <= beta"),
        ({"lr": 0.5}, "undecided", "lr < 2/beta"),
        ({"ball": 7.9}, "undecided", "radius <= the ball on which mu and beta hold"),
        ({"ball": 3.0}, "undecided", "radius <= the ball on which mu and beta hold"),
        ({"scope": "tensor", "ball": 8.0}, "undecided", "radius <= the ball on which mu and beta hold"),
        ({"scope": "sample"}, "refuted", "the scope of the clip is covered"),
        ({"scope": "tensor", "gamma": 0.0, "delta": 0.0}, "refuted", "the scope of the clip is covered"),
        ({"gradient_bound": upper("G", 3.0, "estimate")}, "undecided", "G has a proved upper bound"),
        ({"momentum": 0.9}, "undecided", "no momentum"),
        ({"weight_decay": 1e-4}, "refuted", "no weight decay"),
        ({"dropout": True}, "refuted", "the loss is one function of the weights"),
        ({"minibatches": True}, "undecided", "a step sees the whole loss"),
        ({"refutations": first(fewer_parameters(3, 5))}, "refuted", "lambda_min(K) > 0"),
    ],
)
def test_breaking_a_hypothesis_changes_the_verdict(changes: dict[str, object], outcome: str, hypothesis: str) -> None:
    assert check()
    verdict = check(**changes)
    assert verdict.outcome.value == outcome
    assert not verdict.numbers
    assert not verdict.conclusion
    broken = [f for f in verdict.findings if f.outcome is not Outcome.PROVED]
    assert hypothesis in [f.hypothesis for f in broken]
    assert all(f.reason and f.remedy for f in broken)


def test_the_remedy_for_a_small_ball_helps() -> None:
    verdict = check(ball=7.0)
    (broken,) = [f for f in verdict.findings if f.outcome is not Outcome.PROVED]
    assert check(ball=7.0, lr=float(broken.remedy.split()[-1]) * 0.999)
    verdict = check(ball=3.0)
    (broken,) = [f for f in verdict.findings if f.outcome is not Outcome.PROVED]
    loss = float(broken.remedy.split("below ")[1].split()[0])
    assert check(ball=3.0, loss=upper("E", loss * 0.9), lr=1e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.0}, "lr=0.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"gamma": -1.0}, "gamma=-1.0"),
        ({"delta": 1.5}, "delta=1.5"),
        ({"scope": "layer"}, "scope='layer'"),
        ({"target": 0.0}, "target=0.0"),
    ],
)
def test_options_out_of_range(changes: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        check(**changes)


def test_every_scope_has_a_verdict() -> None:
    for scope in SCOPES:
        assert bool(check(scope=scope, ball=30.0)) is (scope != "sample")


# What the hypotheses keep out does go wrong.


def test_steps_that_are_too_long_diverge() -> None:
    assert delta_gclip(0.5, 1.0, 1.0, lr=2.1, gamma=math.inf, delta=0.0) is None
    assert abs(1 - 2.1) > 1


def test_a_mu_that_is_claimed_too_large_is_contradicted() -> None:
    # E = 1/2 w^2 has mu = 1; with 1.2 and beta = 2 the rate promised is not kept
    found = delta_gclip(0.5, 1.2, 2.0, lr=0.1, gamma=math.inf, delta=0.0)
    assert found is not None
    after = (1 - 0.1) ** 2 / 2
    assert after > 0.5 * (1 - found.drop)
    right = delta_gclip(0.5, 1.0, 2.0, lr=0.1, gamma=math.inf, delta=0.0)
    assert right is not None
    assert after <= 0.5 * (1 - right.drop)


def test_weight_decay_keeps_the_loss_up() -> None:
    # E = 1/2 (w - 1)^2 with decay 0.1 ends at w = 1/1.1
    w = 0.0
    found = delta_gclip(0.5, 1.0, 1.0, lr=0.5, gamma=1.0, delta=0.1)
    assert found is not None
    for _ in range(100):
        w -= 0.5 * ((w - 1) + 0.1 * w)
    assert (w - 1) ** 2 / 2 > found.loss_after(100)


def test_clipping_each_sample_goes_uphill() -> None:
    # E = 1/2 w^2 as the sum over samples with gradients 3w, -w, -w; at w = 1, clipped at 1: 1 - 1 - 1
    g = np.array([3.0, -1.0, -1.0])
    assert g.sum() > 0 > np.clip(g, -1, 1).sum()


def test_momentum_may_go_uphill() -> None:
    p = problem(np.random.default_rng(5))
    w, m, losses = p.w0.copy(), np.zeros_like(p.w0), []
    for _ in range(200):
        loss, g = p.both(w)
        losses.append(loss)
        m = 0.95 * m + g
        w = w - m / p.beta
    assert any(b > a for a, b in pairwise(losses))
    assert uncovered(momentum=0.95)


# The optimizer itself, in the units of torch's loss.


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("seed", range(4))
def test_the_optimizer_keeps_to_it_with_mse_loss(scope: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    N, d, C = 4, 12, 2
    X = torch.randn(N, d, dtype=torch.float64, generator=generator)
    y = torch.randn(N, C, dtype=torch.float64, generator=generator)
    model = torch.nn.Linear(d, C, dtype=torch.float64)
    n = N * C
    K = X @ X.T + 1  # of one output; the Gram of all is K o I
    values = torch.linalg.eigvalsh(K)
    mu, beta = 2 / n * float(values[0]) * (1 - 1e-9), 2 / n * float(values[-1]) * (1 + 1e-9)
    loss_fn = torch.nn.MSELoss()
    start = loss_fn(model(X), y)
    start.backward()
    gamma = 0.3 * math.hypot(*[float(p.grad.norm()) for p in model.parameters() if p.grad is not None])
    loss = float(start.detach()) * (1 + 1e-12)
    delta = 0.6 if seed % 2 else 0.05
    verdict = check_delta_gclip(
        upper("E", loss), lower("mu", mu), upper("beta", beta), lr=1 / beta, gamma=gamma, delta=delta, scope=scope
    )
    assert verdict
    found = delta_gclip(loss, mu, beta, lr=1 / beta, gamma=gamma, delta=delta, scope=scope)
    assert found is not None
    params = [{"params": [p]} for p in model.parameters()] if scope == "group" else model.parameters()
    opt = DeltaGClip(params, 1 / beta, gamma=gamma, delta=delta, scope=scope)
    begin = [p.detach().clone() for p in model.parameters()]
    for t in range(100):
        opt.zero_grad()
        now = loss_fn(model(X), y)
        assert float(now.detach()) <= found.loss_after(t) * SLACK + 1e-28
        now.backward()
        opt.step()
        moved = math.hypot(*[float((p.detach() - b).norm()) for p, b in zip(model.parameters(), begin)])
        assert moved <= found.radius * SLACK
    told = opt.telemetry()
    if scope == "global":
        assert 0 < told["clipped"] + told["floored"] <= found.clipped_steps
        assert told["path_length"] <= found.radius
        if delta > 0.5:
            assert told["floored"] > 0
    # with lr and gamma of the sum instead of the mean nothing is promised: 1/beta would be n/2 times too long
    assert delta_gclip(loss, mu, beta, lr=n / 2 / beta, gamma=gamma, delta=delta) is None


# Noise.


def mean_run(seed: int, scope: str, runs: int = 300, steps: int = 60) -> tuple[float, float]:
    """The two bounds of Prop. 4 as ratios of what was seen, the mean over `runs` runs at once, to the bound."""
    rng = np.random.default_rng(seed)
    P = 6
    beta, mu = 2.0, 0.5
    curvature = rng.uniform(mu, beta, P)  # E = 1/2 sum c_i w_i^2
    w = np.tile(3 * rng.standard_normal(P), (runs, 1))
    delta, sigma = rng.uniform(0.2, 0.9), rng.uniform(0.1, 2)
    lr = delta / (2 * beta) * rng.uniform(0.3, 1)
    gamma = 10 ** rng.uniform(-1, 0.5)
    E0 = float((curvature * w[0] ** 2).sum() / 2)
    found = stochastic_delta_gclip(E0, beta, sigma**2, lr=lr, delta=delta, steps=steps, mu=mu)
    assert found is not None
    squares, clipped = [], 0
    for _ in range(steps):
        g = curvature * w
        squares.append((g**2).sum(1).mean())
        # noise of variance sigma^2 that is skewed: rare and large, so that clipping is biased
        rare = rng.random((runs, 1)) < 0.1
        noise = np.where(rare, 3.0, -1 / 3) * sigma * np.ones(P) / math.sqrt(P)
        noisy = g + noise
        blocks = [slice(0, P)] if scope == "global" else [slice(0, 2), slice(2, P)]
        for b in blocks:
            norms = np.linalg.norm(noisy[:, b], axis=1, keepdims=True)
            scale = np.minimum(1, np.maximum(delta, gamma / norms))
            clipped += int((scale < 1).sum())
            w[:, b] = w[:, b] - lr * scale * noisy[:, b]
    assert clipped > 0
    E = float((curvature * w**2).sum(1).mean() / 2)
    return float(np.mean(squares)) / found.mean_square, E / found.loss


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_noisy_runs_stay_below_their_bounds(scope: str) -> None:
    ratios = np.array([mean_run(seed, scope) for seed in range(50)])
    assert ratios.max() < 1
    assert ratios.max() > 0.2  # not so far below that anything would do


def test_the_bias_of_clipping_is_there() -> None:
    # skewed noise around E' = 0: the clipped mean is not 0, so the bias term cannot be left out
    noise = np.array([3.0] + [-1 / 3] * 9)
    assert abs(noise.mean()) < 1e-15
    assert np.clip(noise, -0.3, 0.3).mean() < -0.2
    small = stochastic_delta_gclip(1.0, 1.0, 1.0, lr=1e-9, delta=0.1, steps=10**12)
    none = stochastic_delta_gclip(1.0, 1.0, 1.0, lr=1e-9, delta=1.0, steps=10**12)
    assert small is not None
    assert none is not None
    assert small.mean_square > small.bias > 40
    assert none.bias == 0
    assert none.mean_square < 0.01


def check_noisy(**changes: object) -> Verdict:
    options: dict[str, object] = {
        "gap": upper("E", 2.0),
        "beta": upper("beta", 4.0),
        "noise": upper("sigma^2", 0.5),
        "lr": 0.05,
        "delta": 0.5,
        "steps": 1000,
    } | changes
    return check_stochastic_delta_gclip(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({}, "proved"),
        ({"mu": lower("mu", 0.1), "scope": "group"}, "proved"),
        ({"noise": Measurement("sigma^2", 0.5, "estimate", "estimate", "pieces")}, "undecided"),
        ({"beta": upper("beta", 4.0, "estimate")}, "undecided"),
        ({"gap": upper("E", math.inf)}, "undecided"),
        ({"beta": upper("beta", 0.0)}, "undecided"),
        ({"lr": 0.07}, "undecided"),
        ({"delta": 0.0}, "undecided"),
        ({"mu": lower("mu", 0.0)}, "undecided"),
        ({"independent": False}, "undecided"),
        ({"momentum": 0.9}, "undecided"),
        ({"weight_decay": 0.1}, "refuted"),
        ({"scope": "sample"}, "refuted"),
    ],
)
def test_verdicts_on_noise(changes: dict[str, object], outcome: str) -> None:
    verdict = check_noisy(**changes)
    assert verdict.outcome.value == outcome
    assert bool(verdict.numbers) is bool(verdict)
    assert ("loss" in verdict.numbers) is (bool(verdict) and "mu" in changes)
    with pytest.raises(InputError, match="steps=0"):
        check_noisy(steps=0)
