"""Is a certificate true? Everything is recomputed from its weights and data; the page on the format has the claims."""

import time
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np

from surefoot.check.network import Gram, Network
from surefoot.check.operations import Refused
from surefoot.check.reading import Certificate, read
from surefoot.check.rounding import norm, spectral_norm, up


class Line(NamedTuple):
    """One claim: what was claimed, whether what was found is enough, and that in words."""

    claim: str
    claimed: float
    holds: bool
    text: str


class CheckResult(NamedTuple):
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
    """Check a certificate's folder with this program's own arithmetic; damaged or hostile files give a message.

    `audit` repeats the claims that follow from others, of a small network all of them, in ball arithmetic; `memory` is
    the most bytes that it may take (None: what the machine has).
    """
    start, lines, message, audited, statement = time.perf_counter(), [], "", "", ""
    try:
        certificate = read(path, memory)
        with np.errstate(over="raise", invalid="raise", divide="raise", under="ignore"):
            lines = check(certificate)
        if audit:
            from surefoot.check.audit import audit_claims

            more, audited = audit_claims(certificate)
            lines += more
        if all(line.holds for line in lines):
            statement = stated(certificate)
    except (Refused, FloatingPointError, OverflowError, MemoryError, np.linalg.LinAlgError) as error:
        message = str(error) if isinstance(error, Refused) else f"the numbers cannot be worked out: {error!r}"
    return CheckResult(Path(path), tuple(lines), message, statement, time.perf_counter() - start, audited)


def check(certificate: Certificate) -> list[Line]:
    """Return a line for each claim; what follows from other claims by rational arithmetic on the claimed numbers."""
    c, document, x, y = certificate.claims, certificate.document, certificate.inputs, certificate.targets
    last = document["kind"] == "last layer"  # K = H H^T + 1 1^T, and all of J J^T is K (x) I: one output is enough
    N, C = len(y), 1 if last else y.shape[1]
    network = Network(document["network"], certificate.tensors, c.get("ball", 1.0))
    end = network.forward(x)
    blocks = network.backward(N, C)
    gram = Gram(N, C, [next(blocks)] if last else (block for block in blocks if block.position in document["gram"]))
    spectrum = "<= s_min(J(w0)), by a shifted Cholesky factor of J J^T"
    if document["loss"] == "cross-entropy":
        one_hot = bool(np.all((y == 0) | (y == 1)) and np.all(y.sum(1) == 1))
        targets = Line("targets", float(one_hot), one_hot, "are one-hot, so that the infimum of the cross-entropy is 0")
        return [targets, Line("sigma_min", c["sigma_min"], gram.proves(c["sigma_min"]), spectrum)]
    residual, reach = float(up(norm(end.h - y) + norm(end.dh))), norm(end.e)
    slope = norm(np.array([spectral_norm(Q) for Q in end.Q])) if end.Q.any() else 0.0  # Q >= 0: its norm is lambda_max
    if set(document["gram"]) == set(network.trainable):  # all of J is in K
        reach = min(reach, float(up(gram.jacobian_norm() + slope * c["ball"])))
    claims = {name: Fraction(value) for name, value in (c | document["units"]).items()}
    rho, s0, R, L, beta = (claims[k] for k in ("residual", "sigma_min", "ball", "jacobian_norm", "beta"))
    eps, S, eta = (claims[k] for k in ("epsilon", "radius", "eta_max"))
    enough = beta * S < s0 and (1 - eps) * (s0 * S - beta * S**2 / 2) >= rho
    rules = {
        "residual": (rho >= residual, f"||F(w0) - y|| <= {residual:.17g}"),
        "sigma_min": (gram.proves(c["sigma_min"]), spectrum),
        "jacobian_norm": (reach <= L, f"s_max(J) on the ball <= {reach:.17g}"),
        "beta": (beta >= slope, f"Lipschitz constant of J on the ball <= {slope:.17g}"),
        "q": (claims["q"] * s0**2 >= beta * rho, ">= beta residual / sigma_min^2"),
        "epsilon": (0 < eps < 1, "lies between 0 and 1"),
        "ball": (S <= R, ">= radius"),
        "radius": (enough, "is enough: (1 - epsilon)(sigma_min S - beta S^2/2) >= residual"),
        "sigma_star": (claims["sigma_star"] <= s0 - beta * S, "<= sigma_min - beta radius"),
        "eta_max": (eta * (L**2 + beta * rho) <= 2 * eps, "<= 2 epsilon/(L^2 + beta residual)"),
        "lr_max": (claims["lr_max"] <= y.size * eta / 2, "<= n/2 eta_max: the same step on torch's mean squared error"),
    }
    return [Line(name, float(claims[name]), bool(holds), text) for name, (holds, text) in rules.items()]


def stated(certificate: Certificate) -> str:
    """Return what a certificate whose claims all hold proves."""
    c, (N, C) = certificate.claims, certificate.targets.shape
    if "radius" not in c:
        return f"The last layer can take any logits at the {N} samples: the infimum of the cross-entropy over it is 0."
    end = f"Gradient steps of at most {c['eta_max']:.6g} each on 1/2 ||F - y||^2 stay that near."
    return f"Within {c['radius']:.6g} of these weights some take the given values ({N} x {C}) exactly. {end}"
