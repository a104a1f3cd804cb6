"""Rank of the last hidden features, proved: the condition under which training the last layer alone reaches any target.

Phi = [H, 1] has rank N iff its N-th singular value s_N is positive. Two routes to a rigorous lower bound of s_N:

    Gram       s_N^2 >= lambda_min(fl(Phi Phi^T)) - ||fl(Phi Phi^T) - Phi Phi^T||: sees s_N down to 1e-6 s_1 or so
    residual   s_N >= (1 - ||I - Phi R||) / ||R|| for ANY R with ||I - Phi R|| < 1, here Phi's pseudo-inverse by QR:
               down to 1e-11 s_1 or so, for there nothing is squared

Rank < N is proved by counting alone: fewer distinct columns than samples, or samples with equal features.

Shapes: H (N, m) features, one row a sample; Phi (N, p) with p = m + 1 columns, or m without a bias.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from surefoot.errors import InputError
from surefoot.measure import mapped
from surefoot.measure.duplicates import equal_columns, equal_rows
from surefoot.measure.eigen import Matrix, gram, lambda_max, lambda_min, spectral_norm, tensor
from surefoot.measure.measurement import Measurement
from surefoot.measure.memory import fits, require
from surefoot.measure.rounding import TINY, down, gam, norm_up, power_of_two, sum_up, up
from surefoot.measure.shifted import BLOCK

Status = Literal["PROVED", "REFUTED", "UNDECIDED"]

ROWS = 1024  # of the features at a time, for passes that only read them
TOLERANCE = 1e-6  # gradient descent steps are counted until the residual has shrunk by this
NAMED = 5  # groups and samples named in a note


@dataclass(frozen=True)
class FeatureRank:
    """Whether the features of N samples have rank N, and how far they are from less.

    Attributes:
        samples: N.
        columns: p, the ones included.
        status: "PROVED" (rank N), "REFUTED" (rank < N) or "UNDECIDED" (no proof either way).
        s_min: a lower bound of s_N(Phi), 0 where none is known.
        s_max: an upper bound of s_1(Phi).
        rank_at_least: a verified lower bound of the rank.
        rank_at_most: an upper bound of the rank, by counting.
        steps: how many steps of gradient descent on the last layer, with the squared loss and the largest step that is
            safe, shrink the residual by 1e-6: (s_1 / s_N)^2 log(1e6) are enough (surefoot, Prop. 14).
        duplicates: groups of samples with equal features.
        suspects: the samples on which a near-null vector is heaviest; empty where rank N is proved or refuted.
        notes: what a reader has to know besides.
    """

    samples: int
    columns: int
    status: Status
    s_min: Measurement
    s_max: Measurement
    rank_at_least: Measurement
    rank_at_most: Measurement
    steps: Measurement
    duplicates: tuple[tuple[int, ...], ...] = ()
    suspects: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = {"PROVED": "is proved", "REFUTED": "is refuted", "UNDECIDED": "is not proved either way"}[self.status]
        numbers = (self.s_min, self.s_max, self.rank_at_least, self.rank_at_most, self.steps)
        head = f"rank {self.samples:,} of {self.samples:,} samples in {self.columns:,} columns {words}"
        return "\n  ".join([head, *map(str, numbers), *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold."""
        return {
            key: value.to_json() if isinstance(value, Measurement) else _lists(value)
            for key, value in vars(self).items()
        }


def feature_rank(
    features: Matrix, *, bias: bool = True, max_memory: float | None = None, folder: str | Path | None = None
) -> FeatureRank:
    """Decide whether Phi = [H, 1] has rank N, with a verified smallest singular value instead of a tolerance.

    Args:
        features: H, (N, m): the last hidden features, one row a sample; float64, or a narrower floating type (which is
            converted without error: the claim is then about these very numbers). It is not changed.
        bias: whether the last layer has one, which is one more column of ones.
        max_memory: bytes that the work may take beside the features; None: what is available. In memory it takes
            8 N p + 16 min(N, p)^2 (24 N^2 where p = N: 9.6 GB at N = 20,000). Where that is more and p >= N, the Gram
            and its factor, 16 N^2, lie in temporary files (40 GB at N = 50,000) and go through memory in panels of
            16 kB (2 p + 3 N) (4 GB there); features mapped from a file of your own are only read. The sharper residual
            of a pseudo-inverse is left out then: a condition s_1/s_N beyond 1e6 or so stays undecided.
        folder: where these files lie; None: the system's folder for temporary files.

    Returns:
        the rank and what it rests on. s_min is exactly 0 where rank N is refuted.

    Raises:
        InputError: features are no matrix of finite floating-point numbers; or memory and disk do not suffice.

    Example:
        >>> found = feature_rank(torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]]))
        >>> found.status, found.rank_at_least.value
        ('PROVED', 3.0)

    Source: surefoot, Prop. 12-14 and 30-33 (idea of the condition: Kawaguchi and Sun, arXiv 2104.05785).
    """
    H = _features(features)
    N, p = len(H), H.shape[1] + bias
    top = max(float(torch.linalg.vector_norm(H, math.inf).double()), float(bias))
    scale = power_of_two(top) if top else 1.0
    lost = N * p * TINY  # what scaling may have lost of ||Phi||_F
    place = _place(H, p, max_memory, folder)

    def rows(here: slice) -> Tensor:
        part = torch.empty(len(H[here]), p, dtype=torch.float64, device=H.device)
        part[:, : H.shape[1]] = H[here]
        part[:, H.shape[1] :] = 1.0
        return part.mul_(scale)

    groups = equal_rows(H)
    most, reason = _count(H, bias, groups)
    notes = _notes(H, groups, bias)
    if place is None:
        Phi = rows(slice(0, N))
        G, error = gram(Phi if p >= N else Phi.mT)
    else:
        Phi = None
        G, error = mapped.mapped_gram(rows, (N, p), place)
        notes.append(f"the Gram and its factor lay in files in {str(place)!r}: {16 * N * N / 1e9:.3g} GB")
    s_max = up(up(up(math.sqrt(sum_up(lambda_max(G, folder=place).value, error))) + lost) / scale)
    suspects: list[int] = []
    if most < N:
        status, s_min = "REFUTED", Measurement("s_N(Phi)", 0.0, "exact", "verified", f"rank < N: {reason}")
    else:
        bound, how, suspects = _smallest(Phi, G, error, place)
        s_min = Measurement("s_N(Phi)", max(0.0, down(down(bound - lost) / scale)), "lower bound", "verified", how)
        status = "PROVED" if s_min.value > 0 else "UNDECIDED"
    if status == "PROVED":
        least, how = N, "s_N(Phi) > 0"
    else:
        del G
        least, how = (int(top > 0), "not worked out: too large for it") if Phi is None else _independent(Phi, most)
    if status == "UNDECIDED":
        notes.append(
            "rank N is neither proved nor refuted: s_N(Phi) cannot be told from 0 in float64; a near-null vector is "
            f"heaviest on samples {suspects}: near-duplicates?"
        )
    return FeatureRank(
        N,
        p,
        status,
        s_min,
        Measurement("s_1(Phi)", s_max, "upper bound", "verified", "shifted Cholesky of the Gram and its residual"),
        Measurement("rank(Phi)", least, "lower bound", "verified", how, samples=N),
        Measurement("rank(Phi)", most, "upper bound", "verified", reason, samples=N),
        _steps(s_max, s_min.value),
        tuple(map(tuple, groups)),
        tuple(suspects) if status == "UNDECIDED" else (),
        tuple(notes),
    )


def _place(H: Tensor, p: int, max_memory: float | None, folder: str | Path | None) -> Path | None:
    """Return where Gram and factor lie: None in memory, else a folder.

    Raises:
        InputError: there is no room for them, or the options make no sense.
    """
    N = len(H)
    if max_memory is not None and not max_memory > 0:
        raise InputError(f"max_memory={max_memory!r} must be a number of bytes above 0")
    k = min(N, p)
    need = 8 * N * p + 16 * k * k
    most = math.inf if max_memory is None else max_memory
    what = f"features of shape {tuple(H.shape)}"
    if need <= most and fits(need):
        return None
    if p < N or H.device.type != "cpu":  # the Gram is that of the columns: to halve the rows helps little
        require(need, f"{what}: a copy, the Gram of size {k:,} and its factor (take fewer rows?)")
        if need > most:
            raise InputError(f"{what} need {need / 1e9:.3g} GB of memory and max_memory={most:.3g}; allow as much")
        return None
    place = Path(tempfile.gettempdir() if folder is None else folder)
    if not place.is_dir():
        raise InputError(f"folder={str(folder)!r} is no folder; make it, or give another")
    require(8 * min(mapped.PANEL, N) * (2 * p + 3 * N), f"{what}: the panels of a Gram in files (take fewer rows?)")
    mapped.require_disk(16 * N * N, place, f"{what}: the Gram of size {N:,} and its factor")
    return place


def _features(features: Matrix) -> Tensor:
    H = tensor(features, "features")
    if H.dim() != 2 or not len(H) or not H.is_floating_point():
        raise InputError(
            f"features of shape {tuple(H.shape)} and dtype {H.dtype} are no matrix of floating-point numbers; give "
            "(N, m), one row a sample (flatten(1) what has more dimensions)"
        )
    if not H.shape[1]:
        raise InputError(f"features of shape {tuple(H.shape)} have no column; give (N, m) with m >= 1")
    bad: list[int] = []
    for start in range(0, len(H), ROWS):
        here = (~torch.isfinite(H[start : start + ROWS])).any(1).nonzero().flatten()
        bad += (here + start).tolist()
    if bad:
        raise InputError(
            f"features hold NaN or infinite numbers in {len(bad)} samples, the first {bad[:5]}; leave them out"
        )
    return H


def _count(H: Tensor, bias: bool, groups: list[list[int]]) -> tuple[int, str]:
    """Return an upper bound of the rank and what was counted: distinct rows and columns of Phi, without zeros."""
    N, m = H.shape
    zeros, ones = torch.ones(2, m, dtype=torch.bool, device=H.device)
    zero_row = False
    for start in range(0, N, ROWS):
        part = H[start : start + ROWS]
        zeros &= (part == 0).all(0)
        ones &= (part == 1).all(0)
        zero_row |= bool((part == 0).all(1).any())
    rows = N - sum(len(group) - 1 for group in groups) - (zero_row and not bias)
    columns = m + bias - sum(len(group) - 1 for group in equal_columns(H))
    columns -= int(zeros.any()) + int(bias and bool(ones.any()))
    return min(rows, columns), f"{rows:,} distinct rows and {columns:,} distinct columns, zeros left out"


def _notes(H: Tensor, groups: list[list[int]], bias: bool) -> list[str]:
    N, m = H.shape
    notes = []
    if H.dtype != torch.float64:
        notes.append(
            f"the features came as {H.dtype}: the claim is about these numbers, not about the network without rounding"
        )
    if m + bias < N:
        notes.append(f"{m:,} features cannot have rank {N:,}: a width of {N - bias:,} is the least that can")
    if groups:
        named = ", ".join(str(group[:NAMED]) for group in groups[:NAMED])
        notes.append(f"samples with equal features, {len(groups)} groups: {named}: such samples get equal outputs")
    return notes


def _smallest(Phi: Tensor | None, G: Tensor, error: float, place: Path | None = None) -> tuple[float, str, list[int]]:
    """Return the better lower bound of s_N(Phi), how it came about, and whom to blame where it is not positive."""
    found = lambda_min(G, perturbation=error, folder=place)
    square = down(math.sqrt(found.value)) if found.value > 0 else 0.0
    if found.value > 0 and found.details["at_most"] < 1.001 * found.value:
        return square, "shifted Cholesky of the Gram and its residual", []
    suspects = [row["sample"] for row in found.details.get("suspects", [])]
    if Phi is None or not fits(24 * (Phi.numel() + len(G) ** 2)):
        return square, "shifted Cholesky of the Gram; no memory for the sharper residual of a pseudo-inverse", suspects
    direct = _by_residual(Phi)
    if max(direct, square) <= 0:
        return 0.0, "neither the Gram nor the residual of a pseudo-inverse gives a positive bound", suspects
    if direct > square:
        return direct, "the residual of a pseudo-inverse, by QR", []
    return square, "shifted Cholesky of the Gram and its residual", []


def _by_residual(Phi: Tensor) -> float:
    """Return (1 - ||I - Phi R||) / ||R|| rounded down, or 0."""
    N, p = Phi.shape
    Q, T = torch.linalg.qr(Phi.mT)  # (p, N), (N, N)
    R = torch.linalg.solve_triangular(T.mT, Q, upper=False, left=False)  # (p, N): Phi R ~ I
    size = norm_up(R)
    if not math.isfinite(size):
        return 0.0
    E = torch.eye(N, dtype=Phi.dtype, device=Phi.device)
    for k in range(0, p, BLOCK):
        E -= Phi[:, k : k + BLOCK] @ R[k : k + BLOCK]
    roundings = min(BLOCK, p) + math.ceil(p / BLOCK) + 1
    rounding = up(gam(roundings) * sum_up(up(norm_up(Phi) * size), 1.0))
    off = sum_up(norm_up(E), rounding, up(8.0 * N * (p + 8) * TINY))
    return down(down(1.0 - off) / spectral_norm(R).value) if off < 1 else 0.0


def _independent(Phi: Tensor, most: int) -> tuple[int, str]:
    """Return a verified lower bound of the rank: rows chosen by a pivoted QR that are shown to be independent."""
    try:
        from scipy.linalg import qr
    except ImportError as error:
        raise InputError("the rank of deficient features needs SciPy: pip install 'surefoot[measure]'") from error
    found: Any = qr(Phi.mT.cpu().numpy(), mode="r", pivoting=True, check_finite=False)
    triangle, order = found
    pivots = torch.from_numpy(abs(triangle.diagonal()))
    tried = 0
    for tolerance in (1e-14, 1e-13, 1e-12, 1e-11, 1e-9, 1e-6, 1e-3, 0.5):
        r = min(int((pivots > tolerance * pivots[0]).sum()), most)
        if not r:
            break
        rows = Phi[torch.from_numpy(order[:r]).to(Phi.device).long()]
        if r != tried and _smallest(rows, *gram(rows))[0] > 0:
            return r, "rows chosen by pivoted QR are independent: their s_min is verified"
        tried = r
    return 0, "no row was shown to be independent"


def _steps(s_max: float, s_min: float) -> Measurement:
    ratio = up(s_max / s_min) if s_min else math.inf
    steps = up(up(ratio * ratio) * up(math.log(1 / TOLERANCE)))
    return Measurement(
        "steps of gradient descent on the last layer",
        math.ceil(steps) if math.isfinite(steps) else math.inf,
        "upper bound",
        "verified",
        f"(s_1/s_N)^2 log(1/{TOLERANCE:g}), squared loss, step N/s_1^2",
        details={"tolerance": TOLERANCE},
    )


def _lists(value: Any) -> Any:
    return [_lists(v) for v in value] if isinstance(value, tuple) else value
