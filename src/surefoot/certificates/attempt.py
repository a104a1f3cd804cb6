"""The constants of a network at its weights, all of them proved, and the verdict that follows; or what is short."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.certificates.bounds import BallBounds, BoundedNetwork
from surefoot.certificates.certificate import Certificate
from surefoot.certificates.layers import Layers, count_parameters
from surefoot.certificates.polish import Polished
from surefoot.errors import InputError
from surefoot.measure.eigen import lambda_min
from surefoot.measure.measurement import Kind, Measurement
from surefoot.measure.shifted import Shifted, lanczos
from surefoot.measure.tangent import tangent_gram
from surefoot.theorems.path_length import PathLengthNumbers, check_path_length, path_length
from surefoot.theorems.verdict import Finding, Outcome, Verdict

SLACK = 1 + 1e-7  # on every constant: room for the checker's own rounding analysis
ROUNDING = 4  # times our own bound of the Jacobian's rounding: likewise
ENOUGH = 0.1  # q at which polishing has done its work
TILE = 1024


class Attempt:
    """The constants of a network at the weights its module has at the moment, and what follows from them.

    Args:
        read: the network.
        module: the same in torch, with `parameters` by name; its weights may move between two calls.
        X: inputs (N, ...), Y: targets (N, C), both float64.
        epsilon: as for the path-length theorem.
        max_memory: for the Gram.
    """

    def __init__(
        self,
        read: Layers,
        module: nn.Module,
        parameters: dict[str, nn.Parameter],
        X: Tensor,
        Y: Tensor,
        epsilon: float | None,
        max_memory: int | str | None,
    ) -> None:
        self.read, self.module, self.parameters = read, module, parameters
        self.X, self.Y, self.epsilon, self.max_memory = X, Y, epsilon, max_memory

    def bounds(self) -> BoundedNetwork:
        """Return the bounds at the module's weights."""
        tensors = {**self.read.tensors, **{name: p.detach() for name, p in self.parameters.items()}}
        return BoundedNetwork(self.read.operations, tensors, self.X)

    def residual(self, bounded: BoundedNetwork) -> float:
        """Return an upper bound of ||F - y||.

        Raises:
            InputError: it is no number.
        """
        # a difference is rounded once: SLACK covers that
        rho = (float((bounded.outputs - self.Y).norm()) + float(bounded.error.norm())) * SLACK + 1e-90
        if not math.isfinite(rho):
            raise InputError(f"the residual is {rho}: the network's outputs must be finite numbers")
        return rho

    def floor(self) -> float:
        """Return the residual below which rounding decides: polishing further brings nothing."""
        return 0.1 * float(self.bounds().error.norm())

    def likely(self, factor: Shifted) -> bool:
        """Whether the certificate would fire with room to spare, were K still what it was when it was factored."""
        bounded = self.bounds()
        rho, at_most = self.residual(bounded), float(factor.diagonal.min()) / factor.c
        if not at_most > 0 or bounded.on_ball(0.0).beta * rho > ENOUGH * at_most:
            return False
        inverse, _ = lanczos(factor.solve, torch.ones_like(factor.diagonal), steps=12, tol=1e-2)
        smallest = (factor.shift + 1 / inverse) / factor.c
        if not smallest > 0:
            return False
        ball, numbers = self._fixed_point(bounded, rho, 0.9 * math.sqrt(smallest), math.inf)
        return numbers is not None and numbers.q < ENOUGH and ball.cell < 1

    def verdict(self, source: str, moved: Polished | None) -> Verdict:
        """Measure everything, rigorously, and conclude."""
        bounded = self.bounds()
        rho = self.residual(bounded)
        K = tangent_gram(self.module, self.X, max_memory=self.max_memory)
        widest = max(float(K[i : i + TILE].abs().sum(1).max()) for i in range(0, len(K), TILE))
        rounding = bounded.gram_rounding(float(K.diagonal().sum()))
        smallest = lambda_min(K, perturbation=rounding, outputs=self.Y.shape[1])
        del K
        dJ = ROUNDING * bounded.on_ball(0.0).rounding
        s0 = max(0.0, math.sqrt(max(0.0, smallest.value)) - dJ) / SLACK
        top = math.sqrt(widest * SLACK + rounding) + dJ
        ball, numbers = self._fixed_point(bounded, rho, s0, top)
        L = min(ball.jacobian_norm, top + ball.beta * ball.radius) * SLACK
        constants = (
            _verified("||F(w0) - y||", rho, "upper bound", "forward pass with running error bounds"),
            _verified("s_min(J(w0))", s0, "lower bound", "shifted Cholesky factor of the tangent Gram", smallest.notes),
            _verified("Lipschitz constant of J on the ball", ball.beta * SLACK, "upper bound", "layer-wise recursion"),
            _verified("||J|| on the ball", L, "upper bound", "layer-wise recursion, or the Gram's row sums"),
        )
        verdict = check_path_length(*constants, ball=ball.radius, epsilon=None if numbers is None else numbers.epsilon)
        more = [_cell(ball)] if ball.cell > 0 else []
        if not s0 > 0:
            more.append(self._singular(smallest, dJ))
        elif not verdict and moved is None:
            more.append(_unpolished())
        elif not verdict and rho < 100 * float(bounded.error.norm()):
            more.append(_at_the_floor(rho))
        elif not verdict and moved is not None:
            more.append(_polish_ended(moved))
        verdict = _with_findings(verdict, more)
        if not verdict:
            return verdict
        return verdict.with_certificate(self._certificate(constants, ball.radius, verdict, source, moved))

    def _fixed_point(
        self, bounded: BoundedNetwork, rho: float, s0: float, top: float
    ) -> tuple[BallBounds, PathLengthNumbers | None]:
        """Find a ball on which the bounds give a radius that lies inside it: R <- S(beta(R)), upwards from 0."""
        ball = bounded.on_ball(0.0)
        for _ in range(60):
            L = min(ball.jacobian_norm, top + ball.beta * ball.radius) * SLACK
            if not math.isfinite(ball.beta * SLACK + L):
                break
            numbers = path_length(rho, s0, ball.beta * SLACK, L, self.epsilon)
            if numbers is None:
                break
            if 0 < numbers.radius <= ball.radius:
                return ball, numbers
            ball = bounded.on_ball(numbers.radius * 1.02)
        return ball, None

    def _singular(self, smallest: Measurement, dJ: float) -> Finding:
        """Say why s_min(J) has no positive lower bound, as far as that can be seen."""
        rounding = f"lambda_min(K) >= {smallest.value:.3g} only, and the Jacobian is rounded by up to {dJ:.3g}"
        reason = "; ".join(smallest.notes) or rounding
        hidden = self._head_inputs()
        if constant_sum(self.Y) and hidden is not None and hidden + 1 < len(self.Y):
            remedy = (
                "all targets' rows have the same sum, which the output bias fits alone: training then takes the sum of "
                f"the head's rows to 0, and K is singular with more samples ({len(self.Y):,}) than the head has "
                f"inputs ({hidden:,}) and the bias; polish=True keeps that bias fixed on the way; or leave it out "
                "of the model, or train with it frozen"
            )
        else:
            remedy = "remove such samples, or take a wider layer or normalised inputs"
        near = self._nearest([row["sample"] for row in smallest.details.get("suspects", [])])
        return Finding("K = J J^T is positive definite", Outcome.UNDECIDED, reason + near, remedy)

    def _head_inputs(self) -> int | None:
        """Return how many inputs the head has, if it is a linear layer with a bias and trained."""
        last = self.read.operations[-1]
        trained = last["op"] == "linear" and last["bias"] is not None and last["trainable"]
        return self.read.tensors[last["weight"]].shape[1] if trained else None

    def _nearest(self, suspects: list[int]) -> str:
        """Name the samples nearest to the suspects, if they are much nearer than samples usually are."""
        X = self.X.flatten(1)
        usual = float((X - X.mean(0)).norm(dim=1).median())
        pairs: dict[tuple[int, int], float] = {}
        for i in suspects:
            distance = (X - X[i]).norm(dim=1)
            distance[i] = math.inf
            k = int(distance.argmin())
            if distance[k] < 0.01 * usual:
                pairs[min(i, k), max(i, k)] = float(distance[k])
        named = ", ".join(f"{i} and {k} (distance {d:.2g})" for (i, k), d in list(pairs.items())[:3])
        return f"; near-duplicates: samples {named}, where {usual:.2g} is usual" if named else ""

    def _certificate(
        self, constants: tuple[Measurement, ...], ball: float, verdict: Verdict, source: str, moved: Polished | None
    ) -> Certificate:
        rho, s0, beta, L = (m.value for m in constants)
        claims = {"residual": rho, "sigma_min": s0, "ball": ball, "jacobian_norm": L, "beta": beta, **verdict.numbers}
        N, C = self.Y.shape
        tensors = {**self.read.tensors, **{name: p.detach().clone() for name, p in self.parameters.items()}}
        tensors |= {"inputs": self.X, "targets": self.Y}
        eta = claims["eta_max"]
        statement = (
            f"Within {claims['radius']:.6g} of the {count_parameters(self.read):,} trainable numbers of this network "
            f"there are weights at which it takes the given values at all {N:,} samples exactly ({C} outputs each): an "
            f"exact global minimum of the squared error. Every sequence of gradient steps of at most {eta:.6g} on "
            f"1/2 ||F - y||^2 ({eta * N * C / 2:.6g} on the mean squared error), clipped, scheduled or random, stays "
            "that close, and it converges to such a minimum if its steps sum up to infinity."
        )
        if moved is not None:
            statement += (
                f" The weights were polished by {len(moved.residuals) - 1} Gauss-Newton steps: they moved by "
                f"{moved.distance:.4g}, and the residual fell from {moved.residuals[0]:.4g} to "
                f"{moved.residuals[-1]:.4g}."
            )
        return Certificate(
            claims,
            self.read.operations,
            tensors,
            {"samples": N, "outputs": C, "inputs": "inputs", "targets": "targets", "source": source},
            trainable_positions(self.read.operations),
            statement=statement,
        )


def constant_sum(Y: Tensor) -> bool:
    """Whether all rows of targets (N, C), C > 1, have the same sum, as one-hot rows do."""
    sums = Y.sum(1)
    return Y.shape[1] > 1 and bool(torch.all((sums - sums[0]).abs() <= 1e-12 * (1 + sums[0].abs())))


def trainable_positions(operations: list[dict[str, Any]]) -> list[int]:
    """Return the flattened positions of the trainable operations."""

    def flat(ops: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [p for o in ops for p in (o, *flat(o.get("branch", [])))]

    return [i for i, o in enumerate(flat(operations)) if o.get("trainable")]


def _verified(name: str, value: float, kind: Kind, how: str, notes: tuple[str, ...] = ()) -> Measurement:
    return Measurement(name, value, kind, "verified", how, notes=notes)


def _cell(ball: BallBounds) -> Finding:
    """Return what is to be said about the kinks of piecewise linear activations."""
    hypothesis = "no argument of a ReLU changes its sign on the ball"
    share = f"by at most {ball.cell:.3g} of its distance from the kink" if ball.cell < 1e200 else "and lies at a kink"
    reason = f"on the ball of radius {ball.radius:.3g} an argument moves {share}"
    if ball.cell < 1:
        return Finding(hypothesis, Outcome.PROVED, reason)
    remedy = "train longer or polish (a smaller residual makes a smaller ball), or take a smooth activation"
    return Finding(hypothesis, Outcome.UNDECIDED, reason, remedy)


def _unpolished() -> Finding:
    return Finding(
        "the weights are near enough to a minimum",
        Outcome.UNDECIDED,
        "certificates seldom fire at an initialisation or early in training",
        "certify(..., polish=True) moves a copy nearer by Gauss-Newton steps",
    )


def _polish_ended(moved: Polished) -> Finding:
    first, last = moved.residuals[0], moved.residuals[-1]
    return Finding(
        "polishing brought the weights near enough",
        Outcome.UNDECIDED,
        f"it ended at a residual of {last:.3g} ({first:.3g} at the start): {moved.message}",
        "train first, normalise the inputs (mean 0, norms alike), or take a wider layer",
    )


def _at_the_floor(rho: float) -> Finding:
    return Finding(
        "the residual is not at its rounding floor",
        Outcome.UNDECIDED,
        f"{rho:.3g} is what float64 can tell from 0 here: no training makes it smaller",
        "s_min(J) is what is short: a wider layer, normalised inputs, no near-duplicates; or fewer samples",
    )


def _with_findings(verdict: Verdict, more: list[Finding]) -> Verdict:
    findings = (*verdict.findings, *more)
    if verdict and any(f.outcome is not Outcome.PROVED for f in more):
        return replace(verdict, outcome=Outcome.UNDECIDED, conclusion="", numbers={}, findings=findings)
    return replace(verdict, findings=findings)
