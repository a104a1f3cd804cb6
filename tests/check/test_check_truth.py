"""The checker's bounds against the truth: balls of 160 bits, sampled balls, and fine grids of the activations."""

import math

import numpy as np
import pytest
from check_cases import (
    SMOOTH,
    Case,
    balls,
    bits,
    case,
    is_smallest,
    networks,
    on_the_ball,
    sigma,
    true_residual,
    values_and_jacobian,
)

from surefoot.check import verify
from surefoot.check.network import Block, Gram, Network
from surefoot.check.operations import ACTIVATIONS, SLOPE, Refused, Share, Windows, places
from surefoot.check.rounding import U, gam, lower_bound, spectral_norm

SEEDS = [0, 1, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(2, 20))]
NAMES = sorted(networks())


@pytest.mark.parametrize("name", NAMES)
def test_a_case_verifies_with_the_audit_too(name: str, tmp_path) -> None:
    result = verify(case(name).write(tmp_path), audit=True)
    assert result, result
    assert "sigma_min, residual, jacobian_norm, beta repeated in ball arithmetic" in result.audit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_bounds_hold(name: str, seed: int, tmp_path) -> None:
    c = case(name, seed, ball=1e-5)
    true = float(true_residual(c).mid())
    assert true <= c.claims["residual"] < true * (1 + 1e-6) + 1e-12
    J = values_and_jacobian(c.operations, c.tensors, True)[1]
    s = float(np.linalg.svd(J.astype(float), compute_uv=False)[-1])
    assert is_smallest(c, c.claims["sigma_min"], J)
    assert not is_smallest(c, s * (1 + 1e-9), J)
    assert s * (1 - 1e-6) < c.claims["sigma_min"] <= s
    for wrong in (s * (1 + 1e-9), s * 1.001):
        changed = c.copy()
        changed.claims["sigma_min"] = wrong
        lines = {x.claim: x.holds for x in verify(changed.write(tmp_path)).lines}
        assert not lines["sigma_min"]


@pytest.mark.parametrize("name", NAMES)
def test_the_jacobian_and_its_rounding(name: str) -> None:
    c = case(name)
    y = c.tensors["targets"]
    network = Network(c.operations, c.tensors, c.claims["ball"])
    end = network.forward(c.tensors["inputs"])
    gram = Gram(*y.shape, network.backward(*y.shape))
    with bits(160):
        F, J = values_and_jacobian(c.operations, c.tensors, True)
        true = J @ J.T
        upper = np.triu_indices(len(gram.K))
        error = np.abs((true - balls(gram.K)).astype(float))[upper].max()
        assert error <= gram.off + gram.dJ * (2 * c.claims["jacobian_norm"] + gram.dJ)
        far = (F - balls(end.h).ravel()).astype(float).reshape(end.h.shape)
        assert np.all(np.linalg.norm(far, axis=1) <= end.dh)
        assert np.all(end.dh < 1e-11)
    assert np.linalg.norm(J.astype(float), 2) <= gram.jacobian_norm()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ball", [1e-3, 0.2])
def test_nothing_on_the_ball_exceeds_beta_and_L(name: str, ball: float) -> None:
    c = on_ball(name, ball)
    if c is None:
        return
    L, beta = on_the_ball(c, np.random.default_rng(5), tries=2)
    assert c.claims["jacobian_norm"] >= L
    assert beta <= c.claims["beta"] * (1 + 1e-6) + 1e-6  # differences of J are off by 1e-16/(R/10)


def on_ball(name: str, ball: float, seed: int = 0) -> Case | None:
    """Return a case's bounds on a ball however large: L from the recursion alone, no certificate."""
    c = case(name, seed)
    try:
        end = Network(c.operations, c.tensors, ball).forward(c.tensors["inputs"])
    except Refused:
        return None
    beta = float(np.linalg.norm([spectral_norm(Q) for Q in end.Q]))
    c.claims |= {"ball": ball, "jacobian_norm": float(np.linalg.norm(end.e)), "beta": beta}
    return c


@pytest.mark.nightly
def test_table_of_tightness(capsys: pytest.CaptureFixture[str]) -> None:
    """Print bound/true for every network: the table of docs/trust-base.md."""
    rows = []
    for name in NAMES:
        c = on_ball(name, 1e-3)
        tight = case(name, noise=1e-12)
        assert c is not None
        L, beta = on_the_ball(c, np.random.default_rng(1), tries=100)
        network = Network(c.operations, c.tensors, 1e-3)
        end = network.forward(c.tensors["inputs"])
        with bits(160):
            F, J = values_and_jacobian(c.operations, c.tensors, True)
            far = np.linalg.norm((F - balls(end.h).ravel()).astype(float))
        s = np.linalg.svd(J.astype(float), compute_uv=False)[-1]
        slope = c.claims["beta"] / beta if c.claims["beta"] else 1.0
        ratio = np.linalg.norm(end.dh) / far if far else np.inf
        top, least = c.claims["jacobian_norm"] / L, s / tight.claims["sigma_min"] - 1
        rows.append(f"| {name} | {top:.2f} | {slope:.2f} | {least:.0e} | {ratio:.0f} |")
    with capsys.disabled():
        print(
            "\n| network | L | beta | sigma_min, relative | rounding error of F |\n|---|---|---|---|---|",
            *rows,
            sep="\n",
        )


@pytest.mark.parametrize("name", SMOOTH)
def test_the_constants_of_the_activations(name: str) -> None:
    """On a grid of step h the derivative's differences are below s2 h, and s1 is not passed.

    Between two points of the grid sigma' moves by at most s2 h/2; beyond 40 every sigma' is monotone, within 1e-15 of
    its limit.
    """
    value, slope, s1, s2 = ACTIVATIONS[name][:4]
    z = np.linspace(-40, 40, 800_001)
    d, h = slope(z), z[1] - z[0]
    assert np.abs(d).max() + s2 * h / 2 <= s1 + (1e-4 if s1 in (1.0, 0.25) else 0)
    assert np.abs(d).max() <= s1
    steep = np.abs(np.diff(d)) / np.diff(z)
    assert steep.max() <= s2 * (1 + 1e-9) + 1e-10
    assert s1 <= np.abs(d).max() * 1.002  # not carelessly large
    assert s2 <= max(steep.max() * 1.003, 1e-9) or name == "identity"
    assert np.allclose(np.diff(value(z)) / h, (d[1:] + d[:-1]) / 2, atol=1e-7)
    # far out, hostile numbers included
    far = np.array([-1e100, -1e30, -745.2, -708.0, 708.0, 745.2, 1e30, 1e100])
    with np.errstate(over="raise", invalid="raise", divide="raise", under="ignore"):
        assert np.all(np.isfinite(value(far)))
        assert np.all(np.abs(slope(far)) <= s1)


@pytest.mark.parametrize("name", SMOOTH)
def test_the_activations_rounding_is_within_what_is_assumed(name: str) -> None:
    rng = np.random.default_rng(0)
    z = np.concatenate([rng.standard_normal(1500) * s for s in (1e-9, 1e-3, 1, 5, 30)])
    value, slope, _, _, relative, absolute = ACTIVATIONS[name]
    with bits(320):
        h, d = np.frompyfunc(sigma({"name": name}, True), 1, 2)(balls(z))
        off = np.abs((balls(value(z)) - h).astype(float))
        assert np.all(off <= U * (relative * np.abs(value(z)) + absolute) / 3)
        assert np.any(off > 0) or name == "identity"
        assert np.abs((balls(slope(z)) - d).astype(float)).max() <= SLOPE / 4


def test_lower_bound_is_one_and_is_tight() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 300, 1030, 2100):  # within a block, over one, over two
        V = np.linalg.qr(rng.standard_normal((n, min(n, 5))))[0]
        K = np.eye(n) * 2.0 - V @ V.T
        least = np.linalg.eigvalsh(K)[0]
        assert lower_bound(K.copy(), least * 1.01) == -np.inf
        found = lower_bound(K.copy(), least * (1 - 1e-7))
        assert least * (1 - 1e-6) <= found < least


def test_lower_bound_reads_no_more_than_it_says() -> None:
    rng = np.random.default_rng(0)
    A = rng.standard_normal((1500, 1600))
    K = A @ A.T
    garbage = K.copy()
    garbage[1024:, :1024] = np.nan
    assert lower_bound(garbage, 0.1) == lower_bound(K, 0.1) > 0


def test_spectral_norm_is_above_and_near() -> None:
    rng = np.random.default_rng(0)
    cases = [rng.standard_normal(s) * 10.0**e for s in ((1, 1), (1, 9), (9, 1), (3, 5), (40, 30)) for e in (-60, 0, 60)]
    cases += [np.zeros((3, 4)), np.array([[1.0, -1.0], [-1.0, 1.0]]), np.ones((6, 6)), np.eye(5)]
    for W in cases:
        true = np.linalg.norm(W / max(np.abs(W).max(), 1e-300), 2) * np.abs(W).max()
        found = spectral_norm(W)
        assert true <= found * (1 + 1e-13)
        assert found <= true * (1 + 1e-5) + 1e-129


def test_windows_overlap_is_what_counting_gives() -> None:
    rng = np.random.default_rng(0)
    for _ in range(60):
        k, s, p, d = (tuple(int(v) for v in rng.integers(a, b, 2)) for a, b in ((1, 5), (1, 5), (0, 3), (1, 4)))
        shape = (3, 14, 17)
        o = {"stride": s, "padding": p, "dilation": d}
        if not places(o, k, shape):
            continue
        w = Windows(o, k, shape)
        ones = np.ones((1, len(w.seen)))
        count = w.spread(lambda tap, ones=ones: ones)
        assert count.max() == w.overlap <= math.prod(-(-a // (b // math.gcd(b, c))) for a, b, c in zip(k, s, d))
        h = rng.standard_normal((2, *shape))
        A = w.patches(h)
        # spread is the transpose of patches
        B = rng.standard_normal(A.shape)
        G = B.reshape(2, len(w.seen), 3, -1)
        back = w.spread(lambda tap, G=G: G[..., tap].transpose(0, 2, 1))
        assert np.isclose((A * B).sum(), (h * back).sum())
        assert np.linalg.norm(A) ** 2 <= w.overlap * np.linalg.norm(h) ** 2 * (1 + 1e-12)


def test_gram_over_many_blocks_and_outputs_that_do_not_divide_them() -> None:
    rng = np.random.default_rng(0)
    for N, C in ((700, 3), (3, 1500), (1100, 1)):
        A, B = rng.standard_normal((N, 1, 4)), rng.standard_normal((N, C, 1, 2))
        gram = Gram(N, C, [Block(0, Share(A, np.zeros(N), 1.0, 1), B, np.zeros(N))])
        J = np.concatenate([B[:, :, 0, :, None] * A[:, :, None, :], B[:, :, 0, :, None]], 3).reshape(N * C, -1)
        K = J @ J.T
        for i in range(0, N * C, gram.tile):
            assert np.allclose(gram.K[i : i + gram.tile, i:], K[i : i + gram.tile, i:], atol=1e-12)
        top = np.linalg.norm(J, 2)
        assert top <= gram.jacobian_norm()


def test_gam() -> None:
    for k in (1, 10**3, 2**39):
        assert gam(k) >= k * U / (1 - k * U)
    with pytest.raises(OverflowError):
        gam(2**40)
