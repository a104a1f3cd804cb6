"""Eigenvalues of symmetric matrices, proved: the smallest from below, the largest from above, without eigh.

A Cholesky factor, a residual and a bound on the rounding of that residual prove an eigenvalue bound (surefoot, Prop. 30
and 33; the idea: Rump, Verification of positive definiteness, 2006). All told that costs about three factorisations
and works at sizes where eigh does not (it stops at n = 32,766).

What is taken for granted: IEEE-754 double precision rounded to nearest, matrix products that are sums of products in
any order (no Strassen, no TF32, no float64 put together from narrower numbers), and hardware without faults.

Shapes: K (n, n), its index n C + c where it is a Gram of C outputs a sample; W (p, q).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from surefoot.errors import InputError
from surefoot.measure.duplicates import equal_rows
from surefoot.measure.mapped import MappedShifted, require_disk
from surefoot.measure.measurement import Measurement
from surefoot.measure.memory import require
from surefoot.measure.rounding import TINY, down, gam, norm_up, power_of_two, sum_up, up
from surefoot.measure.shifted import BLOCK, TILE, Shifted, lanczos

Matrix = Tensor | np.ndarray
Level = Literal["verified", "estimate"]
Method = Literal["tight", "cheap"]

SLACK = 2.5e-7  # how far below the estimate to aim, relative
HEAVY = 5  # so many rows of a null vector are named
SEED = 2404  # of the Lanczos start
FULL = 4000  # up to here spectrum() works out all eigenvalues


def lambda_min(
    K: Matrix,
    *,
    level: Level = "verified",
    perturbation: float = 0.0,
    outputs: int = 1,
    name: str = "lambda_min(K)",
    folder: str | Path | None = None,
) -> Measurement:
    """Return a rigorous lower bound of the smallest eigenvalue, or an estimate of it.

    lambda_min(K) >= s - ||K - s I - L L^T||_2, with s just below an estimate from inverse Lanczos steps through a first
    Cholesky factor, L the factor of K - s I, and every rounding error counted. Where rounding leaves room the bound is
    within 1e-6 of the truth, relative. The allowance for rounding is about (256 + n/256) 2^-53 times the trace: a
    smaller eigenvalue cannot be told from 0.

    Args:
        K: (n, n), symmetric to the bit, float64; a tensor or an array, in memory or mapped from a file. Only read.
        level: "verified", or "estimate" for the value from the Lanczos steps alone.
        perturbation: a rigorous bound of ||K_true - K||_2 (surefoot, Prop. 31), 0 and up; it is subtracted, and the
            claim is then about K_true.
        outputs: C, where row n C + c of K belongs to output c of sample n: samples are named that way.
        name: what the measurement is called.
        folder: where the factor lies, in a temporary file of 8 n^2 bytes that is worked on in panels; None: in memory.

    Returns:
        the bound; it may be 0 or negative, and a note says so. `details["at_most"]` is a rigorous upper bound of the
        same eigenvalue (a Rayleigh quotient), and `error` the distance between the two. Without a positive bound
        `details` names the rows that make K singular: "suspects" (the heaviest of the near-null vector) and
        "duplicates" (groups of equal rows).

    Raises:
        InputError: K is not a square, symmetric float64 matrix of finite numbers, or its factor does not fit into
            memory (with a folder: on the disk).

    Example:
        >>> K = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> found = lambda_min(K)
        >>> 0.999999 < found.value <= 1 <= found.details["at_most"]
        True

    Source: surefoot, Prop. 30 (idea: Rump 2006); Prop. 29 for the upper bound.
    """
    K = _matrix(K, "K")
    _check(level=level, outputs=outputs, perturbation=perturbation, n=len(K))
    A = _shifted(K, folder)
    estimate, vector = _smallest(A)
    at_most = A.rayleigh(vector)
    details: dict[str, Any] = {"n": A.n, "perturbation": float(perturbation)}
    if level == "verified":
        value = _certify(A, estimate, details)
        value = down(value - perturbation) if perturbation else value
    else:
        value = estimate / A.c
    at_most = up(up(at_most / A.c) + perturbation)
    details |= {"at_most": at_most, "estimate": estimate / A.c, "factorisations": A.factorisations}
    notes = _why_not_positive(value, at_most, details, K, vector, outputs) if value <= 0 else []
    return Measurement(
        name,
        value,
        "lower bound" if level == "verified" else "estimate",
        level,
        "shifted Cholesky and its residual" if level == "verified" else "inverse Lanczos through a Cholesky factor",
        seed=_seed(level),
        error=_distance(at_most, value) if level == "verified" else None,
        cost=f"{A.factorisations} Cholesky factorisations of size {A.n:,}",
        notes=tuple(notes),
        details={key: v for key, v in details.items() if not isinstance(v, float) or math.isfinite(v)},
    )


def lambda_max(
    K: Matrix,
    *,
    level: Level = "verified",
    method: Method = "tight",
    name: str = "lambda_max(K)",
    folder: str | Path | None = None,
) -> Measurement:
    """Return a rigorous upper bound of the largest eigenvalue, or an estimate of it.

    -lambda_max(K) = lambda_min(-K), bounded as in `lambda_min`; or min(||K||_F, ||K||_inf), which costs little.

    Args:
        K: (n, n), symmetric to the bit, float64. It is not changed.
        level: "verified", or "estimate" for the Lanczos value alone (in exact arithmetic a lower bound).
        method: "tight" (one Cholesky factorisation and a residual) or "cheap". An estimate has only one way.
        name: what the measurement is called.
        folder: where the factor lies, as in `lambda_min`.

    Raises:
        InputError: K is not a square, symmetric float64 matrix of finite numbers, or its factor does not fit into
            memory (with a folder: on the disk).

    Example:
        >>> K = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
        >>> 3 <= lambda_max(K).value < 3.000003
        True

    Source: surefoot, Prop. 33.
    """
    K = _matrix(K, "K")
    _check(level=level, method=method, n=len(K))
    A = _shifted(K, folder, sign=-1) if level == "verified" and method == "tight" else Shifted(K, sign=-1)
    details: dict[str, Any] = {"n": A.n}
    cheap = min(A.frobenius, _rows_up(K, A.c)) / -A.c
    if level == "verified" and method == "cheap":
        how, value, cost = "the smaller of ||K||_F and ||K||_inf", cheap, ""
    else:
        largest, _ = lanczos(lambda v: -A.multiply(v), _start(K))
        value, how, cost = largest / -A.c, "Lanczos", ""
        details["estimate"] = value
        if level == "verified":
            value = min(-_certify(A, -largest, details), cheap)
            how = "shifted Cholesky and its residual"
            cost = f"{A.factorisations} Cholesky factorisations of size {A.n:,}"
    kind = "upper bound" if level == "verified" else "estimate"
    finite = {key: v for key, v in details.items() if math.isfinite(v)}
    return Measurement(name, value + 0.0, kind, level, how, seed=_seed(level), cost=cost, details=finite)


def spectral_norm(
    W: Matrix, *, level: Level = "verified", method: Method = "tight", name: str = "||W||_2"
) -> Measurement:
    """Return a rigorous upper bound of the largest singular value, or an estimate of it.

    ||W||_2^2 <= lambda_max(fl(G)) + ||fl(G) - G||_2 with G the smaller of W W^T and W^T W; or
    min(||W||_F, sqrt(||W||_1 ||W||_inf)), which costs little.

    Args:
        W: (p, q), finite; float64, or a narrower floating type (which is converted without error). It is not changed.
        level: "verified", or "estimate" for the Lanczos value alone.
        method: "tight" or "cheap". An estimate has only one way.
        name: what the measurement is called.

    Raises:
        InputError: W is no matrix of finite floating-point numbers, or its Gram does not fit into memory.

    Example:
        >>> W = torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
        >>> 4 <= spectral_norm(W).value < 4.000004
        True
        >>> spectral_norm(W, method="cheap").value < 4.0000001
        True

    Source: surefoot, Prop. 33.
    """
    W = tensor(W, "W")
    if W.dim() != 2 or not W.numel() or not W.is_floating_point():
        raise InputError(
            f"W of shape {tuple(W.shape)} and dtype {W.dtype} is no matrix of floating-point numbers; give (p, q)"
        )
    _check(level=level, method=method, n=min(W.shape))
    W = W if len(W) <= W.shape[1] else W.T
    top = float(torch.linalg.vector_norm(W, math.inf).double())
    if not math.isfinite(top):
        raise InputError(f"W of shape {tuple(W.shape)} holds NaN or infinite numbers; leave them out")
    kind = "upper bound" if level == "verified" else "estimate"
    scale = power_of_two(top) if top else 1.0
    V = W.double() * scale
    lost = V.numel() * TINY  # what scaling may have lost
    cheap = up(up(min(norm_up(V), up(math.sqrt(up(_rows_up(V) * _rows_up(V.T))))) + lost) / scale) if top else 0.0
    if top == 0.0 or (level == "verified" and method == "cheap"):
        return Measurement(name, cheap, kind, level, "the smaller of ||W||_F and sqrt(||W||_1 ||W||_inf)")
    if level == "estimate":
        square, _ = lanczos(lambda v: V @ (V.T @ v), _start(V))
        return Measurement(name, math.sqrt(max(square, 0.0)) / scale, kind, level, "Lanczos", seed=SEED)
    require(16 * len(W) ** 2, f"W of shape {tuple(W.shape)}: its Gram and a factor")
    G, error = gram(V)
    square = lambda_max(G)
    tight = up(up(up(math.sqrt(sum_up(square.value, error))) + lost) / scale)
    how = "shifted Cholesky of the smaller Gram and its residual"
    return Measurement(name, min(tight, cheap), kind, level, how, cost=square.cost)


def spectrum(K: Matrix, *, k: int = 6, name: str = "condition(K)") -> Measurement:
    """Estimate the ends of the spectrum, and all of it up to n = 4000.

    Args:
        K: (n, n), symmetric to the bit, float64. It is not changed.
        k: how many eigenvalues at each end, 1 to n.
        name: what the measurement is called.

    Returns:
        lambda_max / lambda_min (infinite where lambda_min <= 0), an estimate; `details["smallest"]` and
        `details["largest"]` hold k eigenvalues each in ascending order, `details["all"]` all of them where n <= 4000.

    Raises:
        InputError: K is not a square, symmetric float64 matrix of finite numbers; k is out of range; n > 4000 and SciPy
            is missing.

    Example:
        >>> print(spectrum(torch.diag(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)), k=1).details["smallest"])
        [1.0]
    """
    K = _matrix(K, "K")
    if not 1 <= k <= len(K):
        raise InputError(f"k={k!r} eigenvalues of a matrix of size {len(K)}; choose 1 to {len(K)}")
    details: dict[str, Any]
    if len(K) <= FULL:
        Shifted(K)  # checks
        values = torch.linalg.eigvalsh(K).tolist()
        details = {"smallest": values[:k], "largest": values[-k:], "all": values}
        how = "LAPACK eigvalsh"
    else:
        details = _ends(K, k)
        how = "ARPACK, inverted through a Cholesky factor for the smallest"
    least, most = details["smallest"][0], details["largest"][-1]
    return Measurement(name, most / least if least > 0 else math.inf, "estimate", "estimate", how, details=details)


def gram(V: Tensor) -> tuple[Tensor, float]:
    """Return fl(V V^T), symmetric to the bit, and a rigorous bound of ||fl(V V^T) - V V^T||_2.

    Proposition 31 (surefoot), summed in blocks: gam(256 + q/256 + 1) ||V||_F^2.

    Args:
        V: (p, q), float64, no number above 1 by much (scale by a power of two first).
    """
    p, q = V.shape
    G = torch.zeros(p, p, dtype=V.dtype, device=V.device)
    for i in range(0, p, TILE):
        rows = slice(i, min(i + TILE, p))
        for k in range(0, q, BLOCK):  # on and below the diagonal
            columns = slice(k, min(k + BLOCK, q))
            G[i:, rows].add_(torch.mm(V[i:, columns], V[rows, columns].mT))
        corner = G[rows, rows]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        G[rows, rows.stop :] = G[rows.stop :, rows].mT
    size = norm_up(V)
    roundings = min(BLOCK, q) + math.ceil(q / BLOCK) + 1
    return G, sum_up(up(gam(roundings) * up(size * size)), up(8.0 * p * (q + 8) * TINY))


def _shifted(K: Tensor, folder: str | Path | None, sign: int = 1) -> Shifted:
    """Return K with room for its factor, in memory or in a file."""
    what = f"K of shape {tuple(K.shape)}: its factor"
    if folder is None:
        require(8 * K.numel(), what)
        return Shifted(K, sign=sign)
    if not Path(folder).is_dir():
        raise InputError(f"folder={str(folder)!r} is no folder; make it, or give another")
    require_disk(8 * K.numel(), Path(folder), what)
    return MappedShifted(K, Path(folder), sign=sign)


def _smallest(A: Shifted) -> tuple[float, Tensor]:
    """Return an estimate of lambda_min(c K) and of its vector, through the first factor of c K + t I that exists."""
    if A.top == 0.0:
        return 0.0, torch.ones(A.n, dtype=torch.float64, device=A.K.device)
    t = max(A.expected_allowance(), -2 * float(A.diagonal.min()))
    shift = 0.0
    while not A.factor(shift):
        shift, t = -t, 64 * t
    return _nearest(A)


def _nearest(A: Shifted) -> tuple[float, Tensor]:
    """Return the eigenvalue of c K just above the shift that A is factored at, and its unit vector, about."""
    inverse, vector = lanczos(A.solve, _start(A.K))
    return A.shift + 1 / inverse, vector


def _certify(A: Shifted, estimate: float, details: dict[str, Any]) -> float:
    """Return a rigorous lower bound of lambda_min(c K) / |c|, from a shift just below the estimate."""
    if A.top == 0.0:
        return 0.0
    step, again = _gap(A, estimate), False
    while not A.factor(estimate - step):  # the estimate was too high
        step, again = 16 * step, True
    if again:  # a factor so near sees the eigenvalue more sharply
        found = A.shift
        better, _ = _nearest(A)
        if not A.factor(better - 2 * _gap(A, better)):
            A.factor(found)
    bound, residual, allowance = A.bound(A.shift)
    size = abs(A.c)
    details |= {"shift": A.shift / A.c, "residual": residual / size, "allowance": allowance / size}
    value = bound / size
    return value if value * size == bound else down(value)  # dividing by a power of two is exact but for underflow


def _gap(A: Shifted, estimate: float) -> float:
    """Return how far below the estimate to aim: so little that it hardly costs, and so much that a factor exists."""
    return max(SLACK * abs(estimate), A.expected_allowance(estimate) / 8)


def _why_not_positive(
    value: float, at_most: float, details: dict[str, Any], K: Tensor, vector: Tensor, outputs: int
) -> list[str]:
    """Say why there is no positive bound and name the rows to blame, in `details` too."""
    if at_most <= 0:
        notes = [f"no positive bound: K is not positive definite, its smallest eigenvalue is at most {at_most:.3g}"]
    else:
        lost = details.get("allowance", 0.0) + details.get("residual", 0.0) + details["perturbation"]
        notes = [
            f"no positive bound: rounding and perturbation come to {lost:.3g}, the eigenvalue to {at_most:.3g} at most"
        ]
    groups = equal_rows(K)
    if groups:
        named = ", ".join("{" + ", ".join(_row(i, outputs) for i in group[:HEAVY]) + "}" for group in groups[:HEAVY])
        notes.append(f"equal rows of K in {len(groups)} groups: {named}")
        details["duplicates"] = groups
    weights = vector.square()
    heavy = [i for i in weights.argsort(descending=True)[:HEAVY].tolist() if weights[i] >= 0.01]
    if heavy:
        notes.append(
            f"the near-null vector is heaviest on {', '.join(_row(i, outputs) for i in heavy)}: near-duplicate inputs?"
        )
    details["suspects"] = [
        {"row": i, "sample": i // outputs, "output": i % outputs, "weight": float(weights[i])} for i in heavy
    ]
    return notes


def _row(i: int, outputs: int) -> str:
    return f"sample {i // outputs} output {i % outputs}" if outputs > 1 else f"sample {i}"


def _ends(K: Tensor, k: int) -> dict[str, Any]:
    """Return k eigenvalues at each end, by ARPACK."""
    try:
        from scipy.sparse.linalg import LinearOperator, eigsh
    except ImportError as error:
        raise InputError(f"a spectrum of size {len(K)} needs SciPy: pip install 'surefoot[measure]'") from error
    require(8 * K.numel(), f"K of shape {tuple(K.shape)}: its factor")
    A = Shifted(K)
    _smallest(A)  # leaves A factored at a shift below all eigenvalues

    def ends(apply: Callable[[Tensor], Tensor]) -> np.ndarray:
        def matvec(v: np.ndarray) -> np.ndarray:
            return apply(torch.tensor(v.reshape(-1), device=K.device)).cpu().numpy()

        operator: Any = LinearOperator(K.shape, matvec=matvec, dtype=np.float64)  # pyright: ignore[reportCallIssue]
        return np.sort(eigsh(operator, k, which="LA", v0=_start(K).cpu().numpy(), return_eigenvectors=False))

    largest = ends(A.multiply) / A.c
    smallest = (A.shift + 1 / ends(A.solve)[::-1]) / A.c
    return {"smallest": smallest.tolist(), "largest": largest.tolist()}


def _rows_up(K: Tensor, c: float = 1.0) -> float:
    """Return an upper bound of ||c K||_inf, the largest sum of a row's absolute values."""
    most = max(float((K[i : i + TILE] * c).abs().sum(1).max()) for i in range(0, len(K), TILE))
    return up(up(most * up(1 + gam(K.shape[1] + 1))) + K.shape[1] * TINY)


def _distance(above: float, below: float) -> float | None:
    return up(above - below) if math.isfinite(above - below) else None


def _seed(level: str) -> int | None:
    return SEED if level == "estimate" else None  # a bound holds whatever the start was


def _start(K: Tensor) -> Tensor:
    """Return a random vector, the same every time, from a generator of its own."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randn(len(K), dtype=torch.float64, generator=generator).to(K.device)


def tensor(K: Any, argument: str) -> Tensor:
    """Return a dense tensor or array as a tensor without a graph, not copied."""
    if isinstance(K, np.ndarray):
        if any(stride < 0 for stride in K.strides):
            K = K.copy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a mapped file may be read-only: it is only read
            K = torch.from_numpy(K)
    if not isinstance(K, Tensor) or K.layout != torch.strided:
        raise InputError(
            f"{argument} of type {type(K).__name__} is no dense matrix; give a torch tensor or a NumPy array"
        )
    return K.detach()


def _matrix(K: Any, argument: str) -> Tensor:
    """Return K as a tensor; whether it is symmetric and finite is seen when it is read."""
    K = tensor(K, argument)
    if K.dim() != 2 or K.shape[0] != K.shape[1] or not len(K):
        raise InputError(f"{argument} of shape {tuple(K.shape)} is no square matrix; give (n, n) with n >= 1")
    if K.dtype != torch.float64:
        raise InputError(
            f"{argument} of dtype {K.dtype} proves nothing: a Gram's rounding in float32 (TF32 even more) is often "
            "larger than its smallest eigenvalue; work it out in float64, from inputs and weights in float64"
        )
    return K


def _check(*, level: str, n: int, method: str = "tight", outputs: int = 1, perturbation: float = 0.0) -> None:
    if level not in ("verified", "estimate"):
        raise InputError(f"level={level!r} is no level; choose 'verified' or 'estimate'")
    if method not in ("tight", "cheap"):
        raise InputError(f"method={method!r} is no method; choose 'tight' or 'cheap'")
    if not isinstance(perturbation, (int, float)) or not 0 <= perturbation < math.inf:
        raise InputError(f"perturbation={perturbation!r} bounds nothing; give a finite number from 0 up")
    if not isinstance(outputs, int) or outputs < 1 or n % outputs:
        raise InputError(f"outputs={outputs!r} does not divide the {n} rows of K; give the number of outputs a sample")
