import math
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from surefoot.errors import InputError
from surefoot.measure import eigen
from surefoot.measure.eigen import gram, lambda_max, lambda_min, spectral_norm, spectrum
from surefoot.measure.measurement import Measurement
from surefoot.measure.rounding import norm_up
from surefoot.measure.shifted import Shifted, lanczos

mpmath.mp.prec = 400  # conditions up to 1e15, and entries 2^-1000 beside 1, leave far more than 200 bits


def exact_eigenvalues(K: Tensor) -> list[mpmath.mpf]:
    """The eigenvalues of the matrix of these very floats, in ascending order."""
    values = mpmath.eigsy(mpmath.matrix(K.tolist()), eigvals_only=True)
    return sorted(values)


def random(n: int, m: int, seed: int) -> Tensor:
    return torch.randn(n, m, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def planted(values: list[float] | Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with about these eigenvalues, and a random basis."""
    values = torch.as_tensor(values, dtype=torch.float64)
    Q = torch.linalg.qr(random(len(values), len(values), seed)).Q
    K = (Q * values) @ Q.T
    return torch.tril(K) + torch.tril(K, -1).T


@given(
    n=st.integers(1, 10),
    exponents=st.tuples(st.floats(-15, 0), st.floats(-15, 0)),
    scale=st.sampled_from([-300, -40, 0, 40, 290]),
    seed=st.integers(0, 2**20),
)
@settings(deadline=None, max_examples=60)
def test_the_bound_is_below_the_truth_in_400_bits(
    n: int, exponents: tuple[float, float], scale: int, seed: int
) -> None:
    low, high = sorted(exponents)
    K = planted(10 ** torch.linspace(low, high, n, dtype=torch.float64), seed) * 2.0**scale
    truth = exact_eigenvalues(K)
    least = lambda_min(K)
    assert mpmath.mpf(least.value) <= truth[0] <= mpmath.mpf(least.details["at_most"])
    assert truth[-1] <= mpmath.mpf(lambda_max(K).value)
    assert truth[-1] <= mpmath.mpf(lambda_max(K, method="cheap").value)
    if high - low < 4:
        assert least.value >= float(truth[0]) * (1 - 1e-6)
    assert lambda_max(K).value <= float(truth[-1]) * (1 + 1e-6)


@pytest.mark.parametrize("condition", [1e8, 1e12, 1e14, 1e15, 1e16, 1e18])
@pytest.mark.parametrize("n", [5, 30])
def test_near_singular_in_400_bits(condition: float, n: int) -> None:
    K = planted(torch.logspace(-math.log10(condition), 0, n, dtype=torch.float64), n)
    truth = exact_eigenvalues(K)[0]
    found = lambda_min(K)
    assert mpmath.mpf(found.value) <= truth <= mpmath.mpf(found.details["at_most"])
    # not far below either: the allowance is a hundred roundings of the trace
    assert found.value >= float(truth) * (1 - 1e-6) - 2e-14 * float(K.trace())


@pytest.mark.parametrize(
    "eigenvalues", [[-1.0, 1.0, 2.0], [-1e-9, 1.0, 1.0, 5.0], [-3.0, -2.0], [0.0, 0.0, 1.0], [-1e6, 1.0]]
)
def test_indefinite_and_singular_in_400_bits(eigenvalues: list[float]) -> None:
    K = planted(eigenvalues)
    truth = exact_eigenvalues(K)[0]
    found = lambda_min(K)
    assert mpmath.mpf(found.value) <= truth <= mpmath.mpf(found.details["at_most"])
    assert found.value >= float(truth) * (1 + 1e-6) - 1e-12 * max(map(abs, eigenvalues))
    assert found.value < 0
    assert "no positive bound" in found.notes[0]


@pytest.mark.parametrize("n", [50, 257, 400])  # 257: one column more than a block
@pytest.mark.parametrize("least", [1.0, 1e-3, 1e-5])
def test_planted_eigenvalues(n: int, least: float) -> None:
    values = torch.linspace(1, 100, n, dtype=torch.float64)
    values[0] = least
    K = planted(values)
    truth = float(torch.linalg.eigvalsh(K)[0])  # good to 1e-13
    found = lambda_min(K)
    assert truth * (1 - 1e-6) - 1e-9 * (least < 1) <= found.value < truth + 1e-12
    assert found.error is not None
    assert truth - 1e-12 <= found.details["at_most"] <= found.value + found.error
    assert lambda_min(K, level="estimate").value == pytest.approx(truth, rel=1e-7)
    assert 100 - 1e-11 <= lambda_max(K).value <= 100.0001
    assert lambda_max(K, level="estimate").value == pytest.approx(100, rel=1e-7)


def test_a_wishart_edge_is_found_to_1e_6() -> None:
    """Eigenvalues that crowd at the edge, as a tangent kernel's do."""
    X = random(400, 420, 1)
    K = gram(X)[0]
    truth = float(torch.linalg.eigvalsh(K)[0])
    assert truth * (1 - 1e-6) < lambda_min(K).value < truth
    assert lambda_min(K).details["factorisations"] == 2


def test_a_cluster_that_lanczos_resolves_slowly() -> None:
    values = torch.linspace(1.0, 1.0 + 1e-5, 300, dtype=torch.float64)
    values[200:] = torch.linspace(2, 1e4, 100)
    K = planted(values)
    assert 1 - 1e-6 - 1e-8 < lambda_min(K).value < 1


@pytest.mark.parametrize("estimate", [1.01, 1.3, 5.0])
def test_too_high_an_estimate_is_mended(estimate: float) -> None:
    A = Shifted(planted(torch.linspace(1, 5, 40, dtype=torch.float64)))
    details: dict[str, float] = {}
    assert 1 - 1e-6 < eigen._certify(A, estimate, details) < 1
    assert A.factorisations > 2
    assert details["shift"] < 1


def test_where_the_mending_fails_the_last_good_factor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    A = Shifted(planted(torch.linspace(1, 5, 40, dtype=torch.float64)))
    monkeypatch.setattr(eigen, "_nearest", lambda A: (1.1, None))
    details: dict[str, float] = {}
    bound = eigen._certify(A, 1.001, details)
    assert 0.98 < details["shift"] < 1
    assert details["shift"] - 1e-10 < bound < 1


@given(seed=st.integers(0, 2**20), n=st.sampled_from([1, 3, 7, 300]), shift=st.floats(-2, 2), size=st.floats(0, 1e8))
@settings(deadline=None, max_examples=30)
def test_the_bound_holds_for_any_factor(seed: int, n: int, shift: float, size: float) -> None:
    K = planted(torch.linspace(1, 2, n, dtype=torch.float64), seed)
    A = Shifted(K)
    A.L.copy_(random(n, n, seed + 1) * size)  # garbage, right of the diagonal too
    assert A.bound(shift)[0] <= 1 + 1e-12
    A.factor(0.5)
    A.L.add_(random(n, n, seed) * 1e-3)
    assert A.bound(0.5)[0] <= 1 + 1e-12
    A.factor(0.5)
    assert 0.5 - 1e-9 < A.bound(0.5)[0] <= 0.5


@pytest.mark.parametrize("shift", [1.5, 2.5])
def test_a_shift_above_the_eigenvalue_proves_no_more(shift: float) -> None:
    A = Shifted(planted([1.0, 2.0, 3.0]))
    assert not A.factor(shift)
    assert A.bound(shift)[0] <= 1.0
    A.L.fill_(math.nan)
    assert A.bound(shift)[0] == -math.inf


def test_the_residual_is_the_whole_residual() -> None:
    """Against the plain formula, over several blocks: nothing of E is left out."""
    n = 600
    K, L = planted(torch.linspace(1, 2, n, dtype=torch.float64)), random(n, n, 3).tril()
    A = Shifted(K)
    A.L.copy_(L)
    bound, residual, allowance = A.bound(0.25)
    E = K - 0.25 * torch.eye(n, dtype=torch.float64) - L @ L.T
    assert residual == pytest.approx(float(E.norm()), rel=1e-10)
    assert residual >= float(E.norm()) * (1 - 1e-14)
    # Prop. 30 for sums in blocks of 256: a product goes through 256 roundings, three blocks and the shift
    formula = (256 + 3 + 2) * 2**-53 * float(L.square().sum() + K.norm() + 0.25)
    assert formula <= allowance <= formula * (1 + 1e-9)
    assert Fraction(bound) <= Fraction(0.25) - Fraction(residual) - Fraction(allowance)
    assert bound == pytest.approx(0.25 - residual - allowance, rel=1e-12)


def test_the_allowance_covers_the_rounding_of_the_residual() -> None:
    """The true residual, in 400 bits, lies within what was said of it."""
    n = 24
    K = planted(torch.logspace(-10, 0, n, dtype=torch.float64))
    A = Shifted(K)
    A.factor(-1e-3)
    _, residual, allowance = A.bound(-1e-3)
    exact = mpmath.matrix(K.tolist()) - mpmath.mpf(-1e-3) * mpmath.eye(n)
    L = mpmath.matrix(A.L.tolist())
    truth = mpmath.mnorm(exact - L * L.T, "f")
    assert 0 < truth <= residual + allowance


def test_one_by_one_zero_and_diagonal() -> None:
    def found(K: list[list[float]]) -> tuple[float, float]:
        matrix = torch.tensor(K, dtype=torch.float64)
        return lambda_min(matrix).value, lambda_max(matrix).value

    low, high = found([[3.0]])
    assert 3 * (1 - 1e-6) < low <= 3 <= high < 3 * (1 + 1e-6)
    low, high = found([[-3.0]])
    assert -3 * (1 + 1e-6) < low <= -3 <= high < -3 * (1 - 1e-6)
    assert found([[0.0]]) == found([[0.0] * 3] * 3) == (0.0, 0.0)
    low, high = found([[1.0, 0, 0], [0, 1e-12, 0], [0, 0, 5.0]])
    assert 0.9e-12 < low <= 1e-12
    assert 5 <= high < 5.00001


def test_rank_one_names_no_row_where_none_weighs() -> None:
    v = torch.arange(1.0, 31, dtype=torch.float64)
    found = lambda_min(torch.outer(v, v))
    assert -1e-8 < found.value <= 0
    assert "no positive bound" in found.notes[0]


def test_duplicates_are_named() -> None:
    J = random(12, 40, 5)
    J[7] = J[2]
    J[9] = J[4] + 1e-9  # nearly the same
    K = gram(J)[0]
    found = lambda_min(K, outputs=3)
    assert found.value <= 0
    assert found.details["duplicates"] == [[2, 7]]
    assert "sample 0 output 2, sample 2 output 1" in str(found)
    J[7] = J[2] + 1e-9
    J[9] = random(1, 40, 6)[0]
    found = lambda_min(gram(J)[0])
    assert "duplicates" not in found.details
    heaviest = found.details["suspects"]
    assert {row["sample"] for row in heaviest} == {2, 7}
    assert [row["weight"] for row in heaviest] == pytest.approx([0.5, 0.5], abs=1e-3)
    assert "sample 2" in str(found)
    assert Measurement.from_json(found.to_json()) == found


@pytest.mark.parametrize("scale", [2.0**-1000, 1e-300, 1e-100, 1e100, 1e300, 2.0**1021])
def test_extreme_scales(scale: float) -> None:
    K = planted([1.0, 2.0, 3.5]) * scale
    assert math.isfinite(float(K.abs().max()))
    truth = exact_eigenvalues(K)
    low, high = lambda_min(K), lambda_max(K)
    assert mpmath.mpf(low.value) <= truth[0] <= mpmath.mpf(low.details["at_most"])
    assert truth[-1] <= mpmath.mpf(high.value)
    assert low.value == pytest.approx(scale, rel=1e-6)
    assert high.value == pytest.approx(3.5 * scale, rel=1e-6)
    W = torch.tensor([[3.0, 0, 0], [0, 4.0, 0]], dtype=torch.float64) * (scale / 8)
    assert scale / 2 <= spectral_norm(W).value <= scale / 2 * (1 + 1e-6)


def test_small_numbers_lost_in_the_scaling_are_counted() -> None:
    K = torch.tensor([[1e300, 0.0], [0.0, 5e-324]], dtype=torch.float64)
    assert lambda_min(K).value <= 5e-324
    assert lambda_max(K).value >= 1e300


def test_a_perturbation_is_subtracted_and_the_true_gram_covered() -> None:
    J = random(20, 300, 8).float().double()
    K, error = gram(J)
    exact = mpmath.matrix(J.tolist()) * mpmath.matrix(J.tolist()).T
    difference = mpmath.mnorm(exact - mpmath.matrix(K.tolist()), "f")
    assert 0 < difference <= error
    truth = min(mpmath.eigsy(exact, eigvals_only=True))
    found = lambda_min(K, perturbation=error)
    assert mpmath.mpf(found.value) <= truth <= mpmath.mpf(found.details["at_most"])
    assert found.value <= lambda_min(K).value - error
    assert "no positive bound" in str(lambda_min(K, perturbation=1e6))


def test_k_is_only_read_whatever_holds_it(tmp_path: Path) -> None:
    K = planted(torch.linspace(1, 9, 70, dtype=torch.float64))
    reference = lambda_min(K).value
    np.save(tmp_path / "K.npy", K.numpy())
    mapped = np.load(tmp_path / "K.npy", mmap_mode="r")
    tensor = torch.from_file(str(tmp_path / "raw"), shared=True, size=70 * 70, dtype=torch.float64).view(70, 70)
    tensor.copy_(K)
    wide = torch.zeros(140, 140, dtype=torch.float64)
    wide[::2, ::2] = K
    for other in (K.numpy(), mapped, tensor, K.T, wide[::2, ::2], K.clone().requires_grad_(), K.numpy()[::-1, ::-1]):
        before = torch.as_tensor(np.array(other)) if isinstance(other, np.ndarray) else other.detach().clone()
        assert lambda_min(other).value == pytest.approx(reference, rel=1e-9)
        assert lambda_max(other).value >= 9 - 1e-9
        assert (
            torch.equal(torch.as_tensor(np.array(other)), before)
            if isinstance(other, np.ndarray)
            else torch.equal(other, before)
        )


def test_no_trace_is_left() -> None:
    state, dtype = torch.random.get_rng_state(), torch.get_default_dtype()
    K = planted([1.0, 2.0, 3.0])
    lambda_min(K)
    lambda_max(K)
    spectrum(K, k=2)
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.get_default_dtype() == dtype


BAD = torch.eye(3, dtype=torch.float64)
NOT_A_NUMBER, ASYMMETRIC = BAD.clone(), BAD.clone()
NOT_A_NUMBER[1, 2] = NOT_A_NUMBER[2, 1] = math.nan
ASYMMETRIC[2, 0] = 1e-300


@pytest.mark.parametrize("measure", [lambda_min, lambda_max, spectrum])
@pytest.mark.parametrize(
    ("K", "message"),
    [
        (BAD.float(), "float32 proves nothing.*TF32.*float64"),
        (BAD.numpy().astype(np.float32), "float32 proves nothing"),
        (BAD.to(torch.int64), "int64"),
        (BAD[:2], r"shape \(2, 3\)"),
        (BAD[0], r"shape \(3,\)"),
        (torch.zeros(0, 0, dtype=torch.float64), r"shape \(0, 0\)"),
        (NOT_A_NUMBER, r"K\[1, 2\]=nan"),
        (BAD * math.inf, r"K\[0, 0\]=inf|K\[0, 1\]=nan"),
        (ASYMMETRIC, r"K\[0, 2\]=0.0 and K\[2, 0\]=1e-300 differ.*\(K \+ K.T\) / 2"),
        (BAD.to_sparse(), "dense"),
        ([[1.0]], "list"),
    ],
)
def test_bad_matrices_are_refused(measure, K, message: str) -> None:
    options = {"k": 1} if measure is spectrum else {}
    with pytest.raises(InputError, match=message):
        measure(K, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "audited"}, "level='audited'"),
        ({"perturbation": -1.0}, "perturbation=-1.0"),
        ({"perturbation": math.nan}, "perturbation=nan"),
        ({"perturbation": "x"}, "perturbation='x'"),
        ({"outputs": 2}, "outputs=2 does not divide the 3"),
        ({"outputs": 0}, "outputs=0"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        lambda_min(BAD, **options)


def test_other_bad_options_are_refused() -> None:
    with pytest.raises(InputError, match="method='fast'"):
        lambda_max(BAD, method="fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="k=4 eigenvalues"):
        spectrum(BAD, k=4)
    for W in (torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(0, 3)):
        with pytest.raises(InputError, match="W of shape"):
            spectral_norm(W)
    with pytest.raises(InputError, match="NaN or infinite"):
        spectral_norm(torch.tensor([[math.nan, 1.0]]))


@given(
    p=st.integers(1, 8), q=st.integers(1, 8), seed=st.integers(0, 2**20), scale=st.sampled_from([1e-200, 1.0, 1e200])
)
@settings(deadline=None, max_examples=40)
def test_spectral_norm_in_400_bits(p: int, q: int, seed: int, scale: float) -> None:
    W = random(p, q, seed) * scale
    exact = mpmath.matrix(W.tolist())
    truth = mpmath.sqrt(max(mpmath.eigsy(exact * exact.T, eigvals_only=True)))
    tight, cheap = spectral_norm(W), spectral_norm(W, method="cheap")
    assert truth <= mpmath.mpf(tight.value) <= truth * mpmath.mpf(1 + 1e-6)
    assert tight.value <= cheap.value
    assert spectral_norm(W, level="estimate").value == pytest.approx(float(truth), rel=1e-8)


def test_spectral_norm_of_float32_zero_and_large() -> None:
    W = random(40, 300, 3).float()
    truth = float(torch.linalg.matrix_norm(W.double(), 2))
    for V in (W, W.T, W.numpy(), W.double()):
        assert truth * (1 - 1e-14) <= spectral_norm(V).value <= truth * (1 + 1e-6)
    assert spectral_norm(torch.zeros(3, 2)).value == 0.0
    assert norm_up(W) <= float(W.double().norm()) * (1 + 1e-12)


def test_spectrum() -> None:
    K = planted(torch.arange(1.0, 51, dtype=torch.float64))
    found = spectrum(K, k=3)
    assert found.value == pytest.approx(50)
    assert found.level == "estimate"
    assert found.details["smallest"] == pytest.approx([1, 2, 3])
    assert found.details["largest"] == pytest.approx([48, 49, 50])
    assert len(found.details["all"]) == 50
    assert spectrum(planted([-1.0, 1.0]), k=1).value == math.inf


@pytest.mark.parametrize("least", [1e-3, 0.0, -2.0])
def test_spectrum_of_a_large_matrix_is_the_same(monkeypatch: pytest.MonkeyPatch, least: float) -> None:
    values = torch.linspace(1, 100, 60, dtype=torch.float64)
    values[0] = least
    K = planted(values)
    whole = spectrum(K, k=3)
    monkeypatch.setattr("surefoot.measure.eigen.FULL", 10)
    found = spectrum(K, k=3)
    assert "all" not in found.details
    assert found.details["smallest"] == pytest.approx(whole.details["smallest"], abs=1e-8)
    assert found.details["largest"] == pytest.approx(whole.details["largest"])


def test_a_missing_scipy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surefoot.measure.eigen.FULL", 1)
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(InputError, match=r"surefoot\[measure\]"):
        spectrum(BAD, k=1)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surefoot.measure.memory.available", lambda: 50)
    with pytest.raises(InputError, match=r"K of shape \(3, 3\): its factor needs .* GB .* available"):
        lambda_min(BAD)


def test_lanczos_stops_in_an_invariant_subspace() -> None:
    K = torch.eye(5, dtype=torch.float64)
    value, vector = lanczos(lambda v: K @ v, torch.ones(5, dtype=torch.float64))
    assert value == pytest.approx(1)
    assert float(vector.norm()) == pytest.approx(1)


def test_one_buffer_of_the_size_of_k_is_all_the_memory() -> None:
    program = """
import resource, threading, time, torch
from surefoot.measure.eigen import lambda_min
torch.set_num_threads(1)
lambda_min(torch.eye(600, dtype=torch.float64))
n = 2400
K = torch.zeros(n, n, dtype=torch.float64)
K.fill_(1.0).diagonal().add_(1.0)
now = lambda: int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
before, most, running = now(), [0], [True]
def watch():
    while running:
        most[0] = max(most[0], now())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
lambda_min(K)
running.clear()
thread.join()
print((most[0] - before) / (8 * n * n))
"""
    if not Path("/proc/self/statm").exists():
        pytest.skip("no /proc to read the memory from")
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 0.5 < float(ran.stdout) < 1.9  # the factor, and panels of 256 columns
