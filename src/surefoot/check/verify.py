"""Is a certificate true? Everything is recomputed from its weights and data; the page on the format has the claims."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from surefoot.check.gram import Gram
from surefoot.check.network import Block, Network
from surefoot.check.operations import Unproved
from surefoot.check.reading import BadCertificate, Certificate, read
from surefoot.check.rounding import Array, U, gam, norm, total, up


@dataclass(frozen=True)
class Line:
    """One claim: what was claimed, what was found, and whether that is enough."""

    claim: str
    claimed: float
    holds: bool
    text: str


@dataclass(frozen=True)
class CheckResult:
    """The outcome; true if and only if every claim holds."""

    path: Path
    lines: tuple[Line, ...] = ()  # a line a claim
    message: str = ""  # why nothing could be checked, if so
    statement: str = ""  # what has been proved, in words; empty unless every claim holds
    seconds: float = 0.0
    audit: str = ""  # what was repeated in ball arithmetic; empty if nothing was asked for

    def __bool__(self) -> bool:
        return bool(self.lines) and not self.message and all(line.holds for line in self.lines)

    def __str__(self) -> str:
        rows = [f"  {'holds' if x.holds else 'FAILS'}  {x.claim:14} {x.claimed:<24.17g} {x.text}" for x in self.lines]
        end = f"{'VERIFIED' if self else 'NOT VERIFIED'} in {self.seconds:.1f} s: {self.path}"
        return "\n".join([*rows, *(x for x in (self.audit, self.message, self.statement) if x), end])


def verify(path: str | Path, audit: bool = False, *, memory: int | None = None) -> CheckResult:
    """Check a certificate: True only if every claim in it is confirmed by this program's own arithmetic.

    Args:
        path: the certificate's folder.
        audit: repeat the scalar claims, a small network's residual and sigma_min too, in ball arithmetic.
        memory: the most bytes that it may take; None: what the machine has.

    Returns:
        CheckResult: truthy if and only if every claim holds. Damaged or hostile files give a falsy one with a message.

    Example:
        >>> bool(verify("no-such-folder"))
        False
    """
    start = time.perf_counter()
    lines: list[Line] = []
    message, said, statement = "", "", ""
    try:
        certificate = read(path, memory)
        with np.errstate(over="raise", invalid="raise", divide="raise", under="ignore"):
            lines = check(certificate)
        if audit:
            from surefoot.check.audit import audit_claims

            more, said = audit_claims(certificate)
            lines += more
        if all(line.holds for line in lines):
            statement = stated(certificate)
    except (BadCertificate, Unproved) as error:
        message = str(error)
    except (FloatingPointError, OverflowError, MemoryError, np.linalg.LinAlgError) as error:
        message = f"the numbers cannot be worked out: {type(error).__name__}: {error}"
    return CheckResult(Path(path), tuple(lines), message, statement, time.perf_counter() - start, said)


def check(certificate: Certificate) -> list[Line]:
    """Return a line for each claim."""
    c, document, y = certificate.claims, certificate.document, certificate.targets
    if document["loss"] == "cross-entropy":
        one_hot = bool(np.all((y == 0) | (y == 1)) and np.all(y.sum(1) == 1))
        return [
            sigma_min(certificate, features_gram(certificate)),
            Line("targets", float(one_hot), one_hot, "are one-hot, so that the infimum of the cross-entropy is 0"),
        ]
    network = Network(document["network"], certificate.tensors, c["ball"])
    end = network.forward(certificate.inputs)
    residual = float(up(norm(end.h - y) + norm(end.dh) + U * norm(np.abs(end.h) + np.abs(y))))
    tops = np.array([top_eigenvalue(Q) for Q in end.Q])
    beta = float(up(np.sqrt(total(tops**2)))) if tops.any() else 0.0
    reach = float(up(np.sqrt(total(end.e**2))))
    if document["kind"] == "last layer":
        gram = features_gram(certificate)
    else:
        wanted = set(document["gram"])
        gram = Gram(
            len(y), y.shape[1], (block for block in network.backward(len(y), y.shape[1]) if block.position in wanted)
        )
    # ||K||_inf says something about all of J only if all of J is in K.
    if set(document["gram"]) == set(network.trainable):
        reach = min(reach, float(up(gram.jacobian_norm() + beta * c["ball"])))
    return [
        at_least("residual", c, residual, "||F(w0) - y|| <="),
        sigma_min(certificate, gram),
        at_least("jacobian_norm", c, reach, "s_max(J) on the ball <="),
        at_least("beta", c, beta, "Lipschitz constant of J on the ball <="),
        *scalar_claims(certificate),
    ]


def features_gram(certificate: Certificate) -> Gram:
    """Return K = H H^T + 1 1^T of a last layer on features H; all of J J^T is K (x) I."""
    N = len(certificate.inputs)
    block = Block(0, certificate.inputs[:, None], np.ones((N, 1, 1, 1)), True, False, np.zeros(N))
    return Gram(N, 1, [block])


def sigma_min(certificate: Certificate, gram: Gram) -> Line:
    """Check the claim on the smallest singular value. The Gram is used up."""
    s0 = certificate.claims["sigma_min"]
    return Line("sigma_min", s0, gram.proves(s0), "<= s_min(J(w0)), by a shifted Cholesky factor of J J^T")


def top_eigenvalue(Q: Array) -> float:
    """Return an upper bound of lambda_max of a symmetric matrix with entries >= 0: max_l (Q x)_l / x_l, any x > 0."""
    if not Q.any():
        return 0.0
    x, best = np.ones(len(Q)), float("inf")
    for _ in range(30):
        y = Q @ x
        best = min(best, float(up((y / x).max() * (1 + gam(len(Q) + 2)))))
        x = y / y.max() + 1e-6
    return best


def scalar_claims(certificate: Certificate) -> list[Line]:
    """Check the claims that follow from others, exactly: rational arithmetic on the claimed float64 numbers."""
    c = {name: Fraction(value) for name, value in certificate.claims.items()}
    rho, s0, L, beta, eps, S = (c[k] for k in ("residual", "sigma_min", "jacobian_norm", "beta", "epsilon", "radius"))
    enough = beta * S < s0 and (1 - eps) * (s0 * S - beta * S**2 / 2) >= rho
    rules = {
        "q": (c["q"] * s0**2 >= beta * rho, ">= beta residual / sigma_min^2"),
        "epsilon": (0 < eps < 1, "lies between 0 and 1"),
        "ball": (c["ball"] >= S, ">= radius"),
        "radius": (enough, "is enough: (1 - epsilon)(sigma_min S - beta S^2/2) >= residual"),
        "sigma_star": (c["sigma_star"] <= s0 - beta * S, "<= sigma_min - beta radius"),
        "eta_max": (c["eta_max"] * (L**2 + beta * rho) <= 2 * eps, "<= 2 epsilon/(L^2 + beta residual)"),
    }
    lines = [Line(name, certificate.claims[name], holds, text) for name, (holds, text) in rules.items()]
    lr, n = float(certificate.document["units"]["lr_max"]), certificate.targets.size
    holds = Fraction(lr) <= Fraction(n, 2) * c["eta_max"]
    return [*lines, Line("lr_max", lr, holds, "<= n/2 eta_max: the same step on torch's mean squared error")]


def stated(certificate: Certificate) -> str:
    """Return what a certificate whose claims all hold proves."""
    c, (N, C) = certificate.claims, certificate.targets.shape
    if certificate.document["loss"] == "cross-entropy":
        return f"The last layer can take any logits at the {N} samples: the infimum of the cross-entropy over it is 0."
    return (
        f"Within {c['radius']:.6g} of these weights some take the given values at all {N} samples ({C} outputs each)"
        f" exactly. Gradient steps of at most {c['eta_max']:.6g} each on 1/2 ||F - y||^2 stay that near."
    )


def at_least(name: str, claims: Mapping[str, float], found: float, text: str) -> Line:
    """Return the line of a claimed upper bound."""
    return Line(name, claims[name], claims[name] >= found, f"{text} {found:.17g}")
