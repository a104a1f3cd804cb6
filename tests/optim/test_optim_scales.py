"""The pure functions: multipliers from norms, and norms from gradients."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from surefoot.optim import norm as norms
from surefoot.optim import scales

NORMS = st.floats(0.0, 1e300)
POSITIVE = st.floats(1e-6, 1e6)
FAST = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def one(scale: torch.Tensor) -> float:
    assert scale.shape == (1,)
    return scale.item()


def tensor(x: float) -> torch.Tensor:
    return torch.tensor([x], dtype=torch.float64)


@FAST
@given(NORMS, POSITIVE, st.floats(0.0, 1.0))
def test_delta_gclip_stays_between_the_floor_and_one(norm: float, gamma: float, delta: float) -> None:
    assert delta <= one(scales.delta_gclip(tensor(norm), gamma, delta)) <= 1.0


@FAST
@given(NORMS, POSITIVE, st.floats(0.0, 1.0))
def test_delta_gclip_has_the_step_lengths_of_its_regimes(norm: float, gamma: float, delta: float) -> None:
    length = one(scales.delta_gclip(tensor(norm), gamma, delta)) * norm
    if norm <= gamma:
        assert length == norm
    elif delta == 0 or norm < gamma / delta:
        assert length == pytest.approx(gamma, rel=1e-15)
    else:
        assert length == pytest.approx(delta * norm, rel=1e-15)
        assert length >= gamma * (1 - 1e-15)


@FAST
@given(st.lists(NORMS, min_size=2, max_size=2).map(sorted), POSITIVE, st.floats(0.0, 1.0))
def test_a_longer_gradient_has_no_larger_multiplier_and_no_shorter_step(
    pair: list[float], gamma: float, delta: float
) -> None:
    short, long = (one(scales.delta_gclip(tensor(n), gamma, delta)) for n in pair)
    assert long <= short
    assert long * pair[1] >= short * pair[0] * (1 - 1e-15)


@FAST
@given(NORMS, POSITIVE)
def test_gclip_is_delta_gclip_without_floor_and_gamma_infinite_never_clips(norm: float, gamma: float) -> None:
    assert one(scales.gclip(tensor(norm), gamma)) == one(scales.delta_gclip(tensor(norm), gamma, 0.0))
    assert one(scales.delta_gclip(tensor(norm), math.inf, 0.0)) == 1.0
    assert one(scales.delta_gclip(tensor(norm), gamma, 1.0)) == 1.0


@FAST
@given(NORMS, POSITIVE)
def test_normalized_is_clipping_up_to_a_factor_of_two(norm: float, beta: float) -> None:
    h = one(scales.normalized(tensor(norm), beta))
    clipped = one(scales.gclip(tensor(norm), beta)) / beta
    assert clipped / 2 * (1 - 1e-15) <= h <= clipped * (1 + 1e-15)


@FAST
@given(NORMS, POSITIVE, POSITIVE)
def test_smooth_clip_is_normalized_with_beta_L0_over_L1(norm: float, L0: float, L1: float) -> None:
    left = one(scales.smooth_clip(tensor(norm), L0, L1))
    assert left == pytest.approx(one(scales.normalized(tensor(norm), L0 / L1)) / L1, rel=1e-14)


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (lambda n: scales.delta_gclip(n, 2.0, 0.25), [1.0, 1.0, 1.0, 0.5, 0.25, 0.25, 0.25]),
        (lambda n: scales.gclip(n, 2.0), [1.0, 1.0, 1.0, 0.5, 0.25, 0.125, 0.0]),
        (lambda n: scales.normalized(n, 0.0), [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625, 0.0]),
        (lambda n: scales.smooth_clip(n, 1.0, 0.5), [1.0, 1 / 1.5, 0.5, 1 / 3, 0.2, 1 / 9, 0.0]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_multipliers_at_zero_at_the_thresholds_and_at_infinity(scale, expected: list[float], dtype) -> None:
    norm = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 16.0, math.inf], dtype=dtype)
    got = scale(norm)
    assert got.dtype == dtype
    torch.testing.assert_close(got, torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=0.0)
    assert scale(torch.tensor(math.nan, dtype=dtype)).isnan()
    assert scale(norm[3]).shape == ()


def exact_norm(grads: list[torch.Tensor]) -> float:
    square = sum((Fraction(x) ** 2 for g in grads for x in g.double().flatten().tolist()), Fraction(0))
    # an integer root with 80 bits to spare
    return math.isqrt(int(square * 2**400)) / 2**200


@pytest.mark.parametrize(
    ("dtype", "bulk"),
    [(torch.float32, 1.0), (torch.float32, 1e19), (torch.bfloat16, 1.0), (torch.bfloat16, 1e30), (torch.float16, 6e4)],
)
def test_the_norm_of_many_low_precision_gradients_is_right_to_2e_7(dtype: torch.dtype, bulk: float) -> None:
    g = torch.Generator().manual_seed(1)
    grads = [(torch.rand(40, generator=g).add(0.05) * bulk).to(dtype) for _ in range(60)]
    got = norms.global_norm(grads)
    assert got.dtype == torch.float64
    assert got.item() == pytest.approx(exact_norm(grads), rel=2e-7)


def test_the_norm_of_a_million_equal_float32_entries_is_right_to_1e_6() -> None:
    grad = torch.full((1000, 1000), 0.1)
    assert norms.global_norm([grad]).item() == pytest.approx(1000 * grad[0, 0].item(), rel=1e-6)


def test_norms_of_nothing_of_empties_and_of_scalars() -> None:
    assert norms.squares([]) == 0.0
    assert norms.global_norm([]).item() == 0.0
    grads = [torch.zeros(0), torch.tensor(-3.0), torch.zeros(2, 0)]
    assert [norms.squares([g]) for g in grads] == [0.0, 9.0, 0.0]
    assert norms.sums_of_squares([grads, grads[:1]], [[grads[0], None, grads[1]], [None]]) == [9.0, 0.0]


def test_small_and_large_tensors_add_up_across_row_borders() -> None:
    sizes = [1, norms.SMALL, norms.SMALL + 1, norms.ROW, norms.ROW + 1, 90 * norms.ROW + 7, *[1000] * 200]
    g = torch.Generator().manual_seed(4)
    grads = [torch.randn(n, generator=g) for n in sizes]
    exact = math.sqrt(math.fsum(float(x.double().square().sum()) for x in grads))
    assert norms.global_norm(grads).item() == pytest.approx(exact, rel=2e-7)


@pytest.mark.parametrize("size", [1e-22, 1e-30, 1e25])
def test_squares_beyond_float32_are_counted_in_float64(size: float) -> None:
    grad = torch.full((5000,), size)
    assert norms.global_norm([grad]).item() == pytest.approx(math.sqrt(5000) * float(grad[0]), rel=1e-9)


def test_the_norm_of_a_complex_gradient_counts_both_parts() -> None:
    assert norms.global_norm([torch.tensor([3.0 + 4.0j]), torch.tensor([12.0])]).item() == pytest.approx(13, rel=1e-15)


def test_the_norm_reads_any_memory_layout() -> None:
    g = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = g.flatten().norm().item()
    for view in (g.permute(3, 1, 0, 2), g.contiguous(memory_format=torch.channels_last), g[:, :, ::1].flip(0)):
        assert norms.global_norm([view]).item() == pytest.approx(expected, rel=1e-14)
    assert norms.global_norm([torch.tensor(2.0).expand(3, 3)]).item() == pytest.approx(6.0, rel=1e-15)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_norm_with_a_bad_entry_is_bad(bad: float) -> None:
    assert not math.isfinite(norms.global_norm([torch.tensor([1.0, bad]), torch.tensor([3.0, 4.0])]))
