import json
import math
import shutil
import sys
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surefoot.errors import InputError
from surefoot.measure import features as module
from surefoot.measure import mapped
from surefoot.measure.eigen import lambda_max, lambda_min
from surefoot.measure.features import FeatureRank, feature_rank
from surefoot.measure.measurement import Measurement

mpmath.mp.prec = 400


def random(n: int, m: int, seed: int) -> Tensor:
    return torch.randn(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def singular_values(H: Tensor, bias: bool = True) -> list[mpmath.mpf]:
    """The singular values of [H, 1] in 400 bits, in descending order."""
    Phi = mpmath.matrix([row + [1.0] * bias for row in H.tolist()])
    small = Phi * Phi.T if Phi.rows <= Phi.cols else Phi.T * Phi
    return sorted((mpmath.sqrt(abs(v)) for v in mpmath.eigsy(small, eigvals_only=True)), reverse=True)


def planted(n: int, m: int, least: float, seed: int = 0) -> Tensor:
    """Features with singular values from 1 down to about `least`."""
    U, V = torch.linalg.qr(random(n, n, seed)).Q, torch.linalg.qr(random(m, n, seed + 1)).Q
    return (U * torch.logspace(0, math.log10(least), n, dtype=torch.float64)) @ V.T


@given(
    n=st.integers(1, 8),
    wider=st.integers(0, 5),
    exponent=st.floats(-16, 0),
    bias=st.booleans(),
    scale=st.sampled_from([1e-200, 1e-3, 1.0, 1e200]),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=60)
def test_the_bounds_hold_in_400_bits(n: int, wider: int, exponent: float, bias: bool, scale: float, seed: int) -> None:
    H = planted(n, n + wider, 10**exponent, seed) * scale
    truth = singular_values(H, bias)
    found = feature_rank(H, bias=bias)
    assert mpmath.mpf(found.s_min.value) <= truth[n - 1]
    assert truth[0] <= mpmath.mpf(found.s_max.value)
    assert found.rank_at_least.value <= n == found.rank_at_most.value
    # with a bias beside extreme features the condition is the scale's
    if exponent > -10 and (scale == 1.0 or not bias):
        assert found.status == "PROVED"
        assert found.s_min.value >= float(truth[n - 1]) * 0.98
    assert found.s_max.value <= float(truth[0]) * (1 + 1e-6)


@pytest.mark.parametrize("least", [1e-2, 1e-5, 1e-8, 1e-10, 1e-11])
def test_ill_conditioned_features_are_proved(least: float) -> None:
    H = planted(60, 80, least)
    truth = float(torch.linalg.svdvals(H)[-1])
    found = feature_rank(H, bias=False)
    assert found.status == "PROVED"
    assert truth * 0.9 - 1e-14 < found.s_min.value < truth + 1e-14
    assert ("pseudo-inverse" in found.s_min.how) == (least < 1e-4)
    assert found.rank_at_least.value == found.rank_at_most.value == 60
    assert found.steps.value == pytest.approx((found.s_max.value / found.s_min.value) ** 2 * math.log(1e6), rel=1e-5)


def test_the_steps_are_enough() -> None:
    """Prop. 14: gradient descent on the last layer itself, from a random target."""
    H = random(12, 40, 3)
    found = feature_rank(H)
    assert found.status == "PROVED"
    Phi = torch.cat([H, torch.ones(12, 1, dtype=torch.float64)], 1)
    W, y = torch.zeros(41, 1, dtype=torch.float64), torch.linalg.svd(Phi).U[:, -1:]  # the slowest direction
    for _ in range(int(found.steps.value)):
        W = W - Phi.T @ (Phi @ W - y) / found.s_max.value**2
    last = float((Phi @ W - y).norm() / y.norm())
    assert 1e-7 < last <= 1e-6


def test_the_residual_route_holds_for_any_pseudo_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    Phi = planted(10, 14, 1e-3)
    truth = float(torch.linalg.svdvals(Phi)[-1])
    assert truth * 0.999 < module._by_residual(Phi) <= truth
    qr = torch.linalg.qr
    for size in (1e-12, 1e-6, 1e-3, 1.0, math.inf):

        def wrong(A: Tensor, size: float = size) -> tuple[Tensor, Tensor]:
            Q, T = qr(A)
            return Q * (1 + size * random(*Q.shape, 5)), T

        monkeypatch.setattr(torch.linalg, "qr", wrong)
        assert 0 <= module._by_residual(Phi) <= truth


def test_too_many_samples_are_refuted_by_counting() -> None:
    found = feature_rank(random(300, 20, 1))
    assert found.status == "REFUTED"
    assert found.s_min.kind == "exact"
    assert found.s_min.value == 0
    assert found.rank_at_least.value == found.rank_at_most.value == 21
    assert found.steps.value == math.inf
    assert "a width of 299" in str(found)
    assert "a width of 300" in str(feature_rank(random(300, 20, 1), bias=False))


def test_equal_samples_are_refuted_and_named() -> None:
    H = random(20, 50, 2)
    H[7] = H[3]
    H[11] = H[3]
    H[19] = H[0]
    H[0, 0] = 0.0
    H[19, 0] = -0.0
    found = feature_rank(H)
    assert found.status == "REFUTED"
    assert found.duplicates == ((0, 19), (3, 7, 11))
    assert found.rank_at_least.value == found.rank_at_most.value == 17
    assert "[3, 7, 11]" in str(found)


def test_equal_and_dead_units_are_counted() -> None:
    H = random(20, 12, 2)
    H = torch.cat([H, H, torch.zeros(20, 3), torch.ones(20, 2)], 1)
    found = feature_rank(H)
    assert found.columns == 30
    assert found.status == "REFUTED"
    assert found.rank_at_most.value == found.rank_at_least.value == 13
    assert feature_rank(torch.zeros(4, 3), bias=False).rank_at_most.value == 0
    assert feature_rank(torch.zeros(4, 3)).rank_at_least.value == 1


def test_near_equal_samples_are_undecided_and_named() -> None:
    H = random(20, 50, 2)
    H[7] = H[3] + 1e-15
    assert not torch.equal(H[7], H[3])
    found = feature_rank(H)
    assert found.status == "UNDECIDED"
    assert found.s_min.value == 0
    assert found.s_min.kind == "lower bound"
    assert set(found.suspects) == {3, 7}
    assert found.rank_at_least.value == 19
    assert found.rank_at_most.value == 20
    assert "neither proved nor refuted" in str(found)


def test_a_dependence_that_counting_cannot_see_is_undecided() -> None:
    H = random(20, 50, 2)
    H[7] = 0.5 * H[3] + 0.5 * H[4]
    found = feature_rank(H)
    assert found.status == "UNDECIDED"
    assert set(found.suspects) == {3, 4, 7}
    assert found.rank_at_least.value == 19


def test_narrow_types_and_arrays_are_taken_as_they_stand() -> None:
    H = random(10, 30, 4).float()
    reference = feature_rank(H.double())
    for other in (H, H.numpy(), H.T.contiguous().T, H.clone().requires_grad_()):
        found = feature_rank(other)
        assert found.s_min.value == reference.s_min.value
        assert "float32" in str(found)
    assert "float32" not in str(reference)
    half = H.bfloat16()
    truth = singular_values(half.double())
    assert truth[-1] * 0.999999 <= feature_rank(half).s_min.value <= truth[-1]


def test_noise_on_equal_units_lifts_the_rank_and_says_what_it_costs() -> None:
    X, W = random(100, 10, 0), random(10, 60, 1)
    W = torch.cat([W, W], 1)
    assert feature_rank(torch.tanh(X @ W)).status == "REFUTED"
    small, large = (feature_rank(torch.tanh(X @ (W + nu * random(10, 120, 2)))) for nu in (1e-6, 1e-2))
    assert small.status == large.status == "PROVED"
    assert small.steps.value > 1e6 * large.steps.value > 1e9


def test_it_is_written_as_json() -> None:
    for H in (random(5, 9, 0), random(9, 3, 0)):
        found = feature_rank(H)
        document = json.loads(json.dumps(found.to_json(), allow_nan=False))
        assert document["status"] == found.status
        assert Measurement.from_json(document["s_max"]) == found.s_max
        assert set(document) == set(FeatureRank.__dataclass_fields__)


@pytest.mark.parametrize(
    ("H", "message"),
    [
        (torch.ones(3), r"features of shape \(3,\)"),
        (torch.ones(3, 2, 2), "flatten"),
        (torch.ones(0, 2), r"features of shape \(0, 2\)"),
        (torch.ones(2, 0), "no column"),
        (torch.ones(2, 2, dtype=torch.int64), "int64"),
        (torch.tensor([[1.0], [math.nan], [math.inf]]), r"in 2 samples, the first \[1, 2\]"),
        (np.ones((2, 2), dtype=np.int32), "int32"),
        ("x", "str"),
    ],
)
def test_bad_features_are_refused(H, message: str) -> None:
    with pytest.raises(InputError, match=message):
        feature_rank(H)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surefoot.measure.memory.available", lambda: 1000)
    with pytest.raises(InputError, match=r"features of shape \(10, 30\): the panels of a Gram in files.*are available"):
        feature_rank(random(10, 30, 0))
    with pytest.raises(InputError, match=r"features of shape \(30, 10\).*Gram of size 11.*GB are available"):
        feature_rank(random(30, 10, 0))


def test_what_fits_neither_memory_nor_disk_is_refused_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=400)
    monkeypatch.setattr("surefoot.measure.mapped.shutil.disk_usage", lambda folder: free)
    said = r"Gram of size 10 and its factor needs 1.6e-06 GB of disk in .* 4e-07 GB are free.*about 50% of them fit"
    with pytest.raises(InputError, match=said):
        feature_rank(random(10, 30, 0), max_memory=1, folder=tmp_path)
    monkeypatch.undo()
    with pytest.raises(InputError, match="is no folder"):
        feature_rank(random(10, 30, 0), max_memory=1, folder=tmp_path / "none")
    with pytest.raises(InputError, match=r"max_memory=1; allow as much"):
        feature_rank(random(30, 10, 0), max_memory=1)
    with pytest.raises(InputError, match="max_memory=0 must be"):
        feature_rank(random(10, 30, 0), max_memory=0)


# ------------------------------------------------------------------------------------------------------------- in files


@pytest.mark.parametrize("panel", [1, 7, 16, 64, 100])
@pytest.mark.parametrize("bias", [True, False])
def test_in_files_it_is_as_in_memory(panel: int, bias: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mapped, "PANEL", panel)
    H = planted(64, 80, 1e-4) * 1e3
    inside = feature_rank(H, bias=bias)
    found = feature_rank(H, bias=bias, max_memory=1, folder=tmp_path)
    assert not any("files" in note for note in inside.notes)
    assert any("in files" in note for note in found.notes)
    assert found.status == inside.status == "PROVED"
    truth = torch.linalg.svdvals(torch.cat([H, H.new_ones(64, bias)], 1))
    assert found.s_min.value == pytest.approx(inside.s_min.value, rel=1e-5)
    assert found.s_min.value <= float(truth[-1]) * (1 + 1e-9)
    assert found.s_max.value == pytest.approx(inside.s_max.value, rel=1e-6)
    assert float(truth[0]) <= found.s_max.value * (1 + 1e-12)
    assert found.rank_at_least.value == found.rank_at_most.value == 64
    assert list(tmp_path.iterdir()) == [], "the files have no name and go away"


@given(
    n=st.integers(1, 9),
    wider=st.integers(0, 5),
    exponent=st.floats(-9, 0),
    panel=st.integers(1, 10),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_in_files_the_bounds_hold_in_400_bits(n: int, wider: int, exponent: float, panel: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mapped, "PANEL", panel)
        patch.setattr("surefoot.measure.shifted.BLOCK", 3)
        patch.setattr("surefoot.measure.mapped.BLOCK", 3)
        H = planted(n, n + wider, 10**exponent, seed)
        truth, found = singular_values(H), feature_rank(H, max_memory=1)
    assert mpmath.mpf(found.s_min.value) <= truth[n - 1]
    assert truth[0] <= mpmath.mpf(found.s_max.value)
    if exponent > -5:
        assert found.status == "PROVED"


def test_features_mapped_from_a_file_in_a_narrow_type(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mapped, "PANEL", 16)
    H = random(50, 60, 0).float()
    np.save(tmp_path / "H.npy", H.numpy())
    found = feature_rank(np.load(tmp_path / "H.npy", mmap_mode="r"), max_memory=1)
    assert found.status == "PROVED"
    assert found.s_min.value == pytest.approx(feature_rank(H).s_min.value, rel=1e-5)


def test_in_files_what_is_deficient_is_refuted_or_undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "PANEL", 7)
    H = random(20, 30, 0)
    H[7] = H[3]
    found = feature_rank(H, max_memory=1)
    assert (found.status, found.duplicates, found.rank_at_most.value) == ("REFUTED", ((3, 7),), 19)
    assert found.rank_at_least.value == 1
    H = random(20, 30, 0)
    H[7] = (H[3] + H[5]) / 2
    found = feature_rank(H, max_memory=1)
    assert found.status == "UNDECIDED"
    assert {3, 5, 7} <= set(found.suspects)


def test_a_factor_in_a_file_solves_and_any_factor_gives_a_bound(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(mapped, "PANEL", 7)
    V = random(30, 40, 0)
    K = V @ V.T
    K = (K + K.T) / 2
    least = float(torch.linalg.eigvalsh(K)[0])
    A = mapped.MappedShifted(K, tmp_path)
    assert A.factor(least / 2)
    v = random(30, 1, 1)[:, 0]
    assert torch.allclose((K - least / 2 * torch.eye(30, dtype=K.dtype)) @ A.solve(v), v, atol=1e-8)
    assert torch.allclose(A.L @ A.L.T, K - least / 2 * torch.eye(30, dtype=K.dtype), atol=1e-10)
    good = A.bound(A.shift)[0]
    assert least / 2 * (1 - 1e-9) <= good <= least / 2
    A.L[20, 3] += 1.0  # a disk that lies: the bound is poor and still one
    assert A.bound(A.shift)[0] < good - 0.5
    assert not A.factor(least * 1.01)
    found = lambda_min(K, folder=tmp_path)
    assert found.value == pytest.approx(lambda_min(K).value, rel=1e-5)
    assert found.value <= least * (1 + 1e-12)
    assert lambda_max(K, folder=tmp_path).value == pytest.approx(lambda_max(K).value, rel=1e-6)
    with pytest.raises(InputError, match="is no folder"):
        lambda_min(K, folder=tmp_path / "none")


def test_a_sharper_route_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surefoot.measure.features.fits", lambda needed: False)
    found = feature_rank(planted(20, 30, 1e-8), bias=False)
    assert found.status == "UNDECIDED"
    assert "no memory" in found.s_min.how


def test_a_missing_scipy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.linalg", None)
    assert feature_rank(random(5, 9, 0)).status == "PROVED"
    with pytest.raises(InputError, match=r"surefoot\[measure\]"):
        feature_rank(random(9, 5, 0))


def test_the_features_are_only_read() -> None:
    H = random(30, 20, 0)
    before, state = H.clone(), torch.random.get_rng_state()
    feature_rank(H)
    assert torch.equal(H, before)
    assert torch.equal(state, torch.random.get_rng_state())
