"""The measurements of `surefoot measure`, each with what it costs on n samples."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from surefoot.errors import InputError
from surefoot.measure.curvature import sharpness
from surefoot.measure.duplicates import equal_rows
from surefoot.measure.eigen import lambda_max, lambda_min
from surefoot.measure.features import feature_rank
from surefoot.measure.gradient import alignment, full_gradient, jacobian_conditioning, pl_ratio
from surefoot.measure.measurement import Measurement
from surefoot.measure.memory import available
from surefoot.measure.noise import gradient_noise, mean_noise
from surefoot.measure.tangent import tangent_gram
from surefoot.train.budget import Task
from surefoot.train.last_layer import last_features
from surefoot.train.more_steps import FEWEST, continued_fit, recorded_fit
from surefoot.train.subject import Subject, at_checkpoint

CHUNK = 256  # rows that are differentiated together
PRODUCTS = 25  # that Lanczos takes for one eigenvalue to a hundredth, as a rule
MOST_PRODUCTS = 100  # that it may take
PIECES = 40  # of the data, for the noise
EIGH = 20_000  # rows of a matrix that LAPACK decomposes whole without trouble
GRAMS = 6  # matrices of K's size that are in memory at once
POINTS = 500  # of a line in the report


class Probes:
    """The measurements of a subject, and what they have found.

    Args:
        subject: what is measured.
        samples: of the Gram and the features; None: as many as the budget allows.
        seconds: the whole budget, of which a few percent go into finding out what things cost.
    """

    def __init__(self, subject: Subject, samples: int | None, seconds: float) -> None:
        self.subject, self.samples, self.seconds = subject, samples, seconds
        self.found: list[Measurement] = []
        self.series: dict[str, Any] = {}
        self.notes: list[str] = []
        self.expressivity: dict[str, Any] | None = None  # whether the last layer alone fits anything, in plain values
        self._algebra: tuple[int, float] | None = None
        if samples is not None and samples > subject.rows:
            raise InputError(f"--samples {samples} is more than the {subject.rows:,} training rows; give at most those")
        x, _, _ = subject.pick(1)
        with torch.no_grad():
            out = subject.job.model(x)
        self.outputs = 0 if subject.reconstructs else out.numel()  # C, numbers that the model returns for a row

    def tasks(self, names: tuple[str, ...]) -> list[Task]:
        """Return the tasks of these names, cheap ones first."""
        makers = {
            "gradient": self._gradient_task,
            "noise": self._noise_task,
            "features": self._features_task,
            "sharpness": self._sharpness_task,
            "gauss-newton": self._gauss_newton_task,
            "smoothness": self._smoothness_task,
            "gram": self._gram_task,
        }
        self.row_seconds = self._time_of_a_row()
        return [make() for name, make in makers.items() if name in names]

    # ------------------------------------------------------------------------------------------------------ duplicates

    def duplicates(self) -> None:
        """Count the training rows that are equal to another one, and say which."""
        groups = equal_rows(self.subject.job.data.train_x.flatten(1))
        targets = self.subject.job.data.train_y
        clashes = sum(any(not torch.equal(targets[g[0]], targets[i]) for i in g[1:]) for g in groups)
        notes = []
        if groups:
            shown = "; ".join(" = ".join(f"{i:,}" for i in g) for g in groups[:5])
            notes.append(
                f"equal training rows: {shown}" + (f" and {len(groups) - 5:,} more groups" * (len(groups) > 5))
            )
            notes.append("a Gram over samples that hold two equal rows is singular")
        if clashes:
            notes.append(f"{clashes:,} of these groups have different targets: no weights fit all rows")
        self.found.append(
            Measurement(
                "equal training rows",
                sum(len(g) - 1 for g in groups),
                "exact",
                "verified",
                "compared bit by bit; each row beyond the first of its kind counts",
                samples=self.subject.rows,
                notes=tuple(notes),
            )
        )

    # ------------------------------------------------------------------------------------- one pass over the data

    def _time_of_a_row(self) -> float:
        """Return the seconds that a row's share of a gradient takes."""
        s = self.subject
        params = [p for p in s.job.model.parameters() if p.requires_grad]
        rows = min(8, s.rows)
        more = min(CHUNK, s.rows)
        while True:
            x, y, _ = s.pick(rows)
            taken = math.inf
            for _ in range(2):  # what is done for the first time is slow
                began = time.perf_counter()
                torch.autograd.grad(s.loss(s.job.model(x), y), params, allow_unused=True)
                taken = min(taken, time.perf_counter() - began)
            if rows == more or taken * more / rows > 0.01 * self.seconds:
                return taken / rows
            rows = more

    def algebra(self, rows: int) -> float:
        """Return the seconds that all decompositions of a symmetric matrix take together, from those of a small one."""
        if self._algebra is None:
            size, taken = 0, 0.0
            for size in (100, 500):  # what is done for the first time is slow
                A = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
                K = A @ A.T
                K = (K + K.T) / 2 + torch.eye(size, dtype=torch.float64)
                began = time.perf_counter()
                for decompose in (lambda_min, lambda_max, torch.linalg.eigvalsh, torch.linalg.eigh):
                    decompose(K)
                taken = time.perf_counter() - began
            self._algebra = size, taken
        size, taken = self._algebra
        return taken * (rows / size) ** 3

    def _measured(self, measure: Callable[..., Any], n: int, **options: Any) -> Any:
        """Call one of `measure`'s functions on n rows, as the loss wants them."""
        s = self.subject
        x, y, _ = s.pick(n)
        output = (lambda found: found) if s.reconstructs else None
        return measure(s.job.model, s.loss, (x, y), rows=min(CHUNK, n), output=output, **options)

    def _gradient_task(self) -> Task:
        def run(n: int) -> None:
            ratio = self._measured(pl_ratio, n)
            about = {"how": "one gradient over these rows", "samples": ratio.samples, "dtype": ratio.dtype}
            loss, norm = ratio.details["loss"], ratio.details["gradient_norm"]
            self.found += [
                Measurement("f, the loss", loss, "exact", "estimate", **{**about, "how": "the mean over the rows"}),
                Measurement("‖grad f‖", norm, "exact", "estimate", **about),
                dataclasses.replace(ratio, how="one gradient over these rows"),
            ]

        rows = self.subject.rows
        return Task(
            "gradient", "loss and gradient", 1.0, min(rows, 32), rows, lambda n: 1.5 * n * self.row_seconds, run
        )

    def _noise_task(self) -> Task:
        def run(n: int) -> None:
            s = self.subject
            x, y, _ = s.pick(n)
            order = torch.randperm(n, generator=torch.Generator().manual_seed(s.job.config.seed))
            output = (lambda found: found) if s.reconstructs else None
            parts = [
                (len(rows), full_gradient(s.job.model, s.loss, (x[rows], y[rows]), output=output)[1])
                for rows in order.tensor_split(PIECES)
            ]
            values, total = [], torch.zeros_like(parts[0][1])
            for (a, g), (b, h) in zip(parts[::2], parts[1::2]):
                both = (a * g + b * h) / (a + b)
                values.append(gradient_noise([g.norm().item(), h.norm().item()], [a, b], both.norm().item()))
                total += (a * g + b * h) / n
            dtype = str(next(s.job.model.parameters()).dtype).removeprefix("torch.")
            noise = mean_noise(values, dtype=dtype)
            if noise is None:
                return
            norm = total.norm().item()
            notes = (f"the variance of one row's gradient, beside ‖grad f‖² = {norm**2:.3g}",)
            if norm > 0 and noise.value > 0:
                notes += (f"batches of fewer than {math.ceil(noise.value / norm**2):,} rows are mostly noise here",)
            how = f"unbiased, from the gradients of {PIECES} pieces of the rows"
            self.found.append(
                dataclasses.replace(
                    noise, how=how, samples=n, seed=s.job.config.seed, notes=notes, cost=f"{PIECES} gradients"
                )
            )

        rows = self.subject.rows
        least = min(rows, PIECES * 2)
        # A piece has its fixed cost: the model is copied and evaluated three times.
        cost = lambda n: PIECES * 0.01 + 4 * n * self.row_seconds  # noqa: E731
        return Task("noise", "gradient noise", 1.0, least, max(least, min(rows, 4000)), cost, run)

    # ------------------------------------------------------------------------------------------------------- curvature

    def _sharpness_task(self) -> Task:
        s = self.subject
        others = s.checkpoints[:-1]

        def run(n: int) -> None:
            lr = self._multiplier()
            found = self._measured(sharpness, n, tolerance=1e-2, max_products=MOST_PRODUCTS, lr=lr)
            self.found.append(found)
            points = [(s.step, found.value)]
            for path in others:
                model, step = at_checkpoint(s, path)
                x, y, _ = s.pick(n)
                output = (lambda outputs: outputs) if s.reconstructs else None
                options: Any = {"tolerance": 1e-2, "max_products": MOST_PRODUCTS, "output": output}
                there = sharpness(model, s.loss, (x, y), rows=min(CHUNK, n), **options)
                points.append((step, there.value))
            points.sort()
            self.series["sharpness"] = {"step": [p[0] for p in points], "value": [p[1] for p in points]}
            if line := self._stability():
                self.series["stability"] = {**line, "last": None if lr is None else 2 / lr}

        return Task("sharpness", "sharpness", 3.0, min(s.rows, 32), s.rows, self._lanczos_cost(3, len(others) + 1), run)

    def _gauss_newton_task(self) -> Task:
        def run(n: int) -> None:
            if self.subject.reconstructs:
                raise InputError("the loss of a variational autoencoder is no function of one tensor of outputs")
            self.found.append(
                self._measured(sharpness, n, operator="gauss-newton", tolerance=1e-2, max_products=MOST_PRODUCTS)
            )

        rows = self.subject.rows
        return Task("gauss-newton", "Gauss-Newton", 2.0, min(rows, 32), rows, self._lanczos_cost(4, 1), run)

    def _lanczos_cost(self, gradients: float, times: int) -> Callable[[int], float]:
        """Return what Lanczos costs on n rows; products on more rows than a chunk build their graph anew."""
        return lambda n: times * PRODUCTS * (0.002 + n * self.row_seconds * gradients * (1 if n <= CHUNK else 1.7))

    def _multiplier(self) -> float | None:
        """Return h, the gradient's multiplier: its median over the last steps, or lr where none were taken."""
        config = self.subject.job.config
        if config.optimizer in ("adam", "adamw"):
            self.notes.append(
                f"{config.optimizer} scales each coordinate by itself: there is no 2/h to hold sharpness against."
            )
            return None
        if config.momentum:
            self.notes.append(f"With momentum {config.momentum:g} the edge is at 2 (1 + momentum)/h, not at 2/h.")
        steps = self.subject.steps_taken()
        if steps is None:
            return config.lr
        taken = [a * b for a, b in zip(steps.columns["lr"], steps.columns["scale"]) if a * b > 0][-100:]
        return statistics.median(taken) if taken else None

    def _stability(self) -> dict[str, list[Any]] | None:
        """Return 2/h along the run."""
        steps = self.subject.steps_taken()
        if steps is None or self.subject.job.config.optimizer in ("adam", "adamw"):
            return None
        h = [a * b for a, b in zip(steps.columns["lr"], steps.columns["scale"])]
        picked = (
            sorted({round(i * (len(h) - 1) / (POINTS - 1)) for i in range(POINTS)})
            if len(h) > POINTS
            else range(len(h))
        )
        return {
            "step": [steps.columns["step"][i] for i in picked],
            "value": [2 / h[i] if h[i] > 0 else None for i in picked],
        }

    # ------------------------------------------------------------------------------------------------------- features

    def _features_task(self) -> Task:
        s = self.subject
        if s.reconstructs:
            return _impossible("features", "feature rank", "a variational autoencoder has no last layer before a loss")
        H, _, _ = last_features(s.job.model, s.pick(1)[0])
        tokens, columns = len(H), H.shape[1] + 1

        def cost(n: int) -> float:
            short, long = sorted((n * tokens, columns))
            return 2 * n * self.row_seconds + self.algebra(short) * long / short

        most = self.samples or s.rows
        return Task("features", "feature rank", 1.0, self.samples or min(most, 10), most, cost, self._features)

    def _features(self, n: int) -> None:
        H, layer, is_last = last_features(self.subject.job.model, self.subject.pick(n)[0])
        bias = layer[1].bias is not None
        found = feature_rank(H, bias=bias)
        what = "[H, 1]" if bias else "H"
        notes = [
            f"Phi = {what} is {found.samples:,} x {found.columns:,}, H what goes into layer {layer[0]}",
            *found.notes,
        ]
        if not is_last:
            notes.append(f"layer {layer[0]} is the last dense layer, and something follows it")
        verdict = {"PROVED": "is proved", "REFUTED": "is refuted", "UNDECIDED": "could be neither proved nor refuted"}
        notes.append(
            f"rank {found.samples:,}, with which the last layer alone fits any targets, {verdict[found.status]}"
        )
        self.expressivity = {
            "status": found.status,
            "samples": n,
            "rows": self.subject.rows,
            "columns": found.columns,
            "width": found.samples - bias,
            "s_min": found.s_min.value,
            "layer": layer[0],
            "duplicates": [list(group) for group in found.duplicates],
        }
        self.found += [dataclasses.replace(found.rank_at_least, notes=tuple(notes)), found.rank_at_most]
        self.found += [dataclasses.replace(m, samples=n) for m in (found.s_min, found.s_max)]
        if math.isfinite(found.steps.value):
            self.found.append(dataclasses.replace(found.steps, samples=n))

    # ------------------------------------------------------------------------------------------------------ smoothness

    def _smoothness_task(self) -> Task:
        job = self.subject.job
        cost = lambda n: 0.1 + n * (0.01 + 9 * job.batch_size * self.row_seconds)  # noqa: E731
        return Task("smoothness", "smoothness along steps", 2.0, FEWEST + 2, 60, cost, self._smoothness, unit="steps")

    def _smoothness(self, n: int) -> None:
        if (fit := recorded_fit(self.subject)) is not None:
            where = "along the run itself (--probe-smoothness)"
        else:
            fit = continued_fit(self.subject, n)
            start = "after the newest checkpoint" if self.subject.checkpoints else "from the initial weights"
            where = f"along {n} steps {start}, taken on a copy in eval mode"
        self.found.append(dataclasses.replace(fit.L0, notes=(*fit.L0.notes, where, fit.advice)))
        self.found.append(dataclasses.replace(fit.L1, notes=("see L0",)))

    # ---------------------------------------------------------------------------------------------------- tangent Gram

    def _gram_task(self) -> Task:
        s, C = self.subject, self.outputs
        if s.reconstructs:
            return _impossible(
                "gram", "tangent Gram", "the loss of a variational autoencoder has no residual of outputs"
            )
        fits = _rows_that_fit(C)
        if self.samples is not None and self.samples > fits:
            size = 8 * GRAMS * (self.samples * C) ** 2 / 1e9
            raise InputError(
                f"--samples {self.samples}: the Gram of {self.samples:,} samples with {C:,} outputs each takes about "
                f"{size:,.3g} GB in all, more than is available; "
                + (f"--samples {fits} fits" if fits else "not one fits")
            )
        if fits < 1:
            why = f"one sample has {C:,} outputs, and its Gram does not fit into the memory"
            return _impossible("gram", "tangent Gram", why)
        most = self.samples or min(s.rows, fits)
        contraction = self._gram_seconds()

        def cost(n: int) -> float:
            return self.algebra(n * C) + contraction(n)

        return Task("gram", "tangent Gram", 8.0, self.samples or 1, most, cost, self._gram, whole=s.rows)

    def _gram(self, n: int) -> None:
        s, C = self.subject, self.outputs
        x, y, chosen = s.pick(n)
        K = tangent_gram(s.job.model, x)
        smallest, largest = lambda_min(K, outputs=C), lambda_max(K)
        notes = [
            "proved of the matrix K as it was computed; the rounding of its numbers themselves is not counted",
            f"K at {n:,} of {s.rows:,} training rows, {n * C:,} x {n * C:,}",
        ]
        if n * C > s.parameters:
            notes.append(
                f"K has {n * C:,} rows and rank {s.parameters:,} at most, the number of parameters: it is singular"
            )
        if equal := equal_rows(x.flatten(1)):
            first = equal[0]
            notes.append(
                f"training rows {int(chosen[first[0]]):,} and {int(chosen[first[1]]):,} are equal: K is singular"
            )
        about = {"samples": n}
        self.found.append(dataclasses.replace(smallest, notes=(*smallest.notes, *notes), **about))
        self.found.append(dataclasses.replace(largest, **about))
        self.found.append(dataclasses.replace(jacobian_conditioning(smallest=smallest, largest=largest), **about))
        if len(K) > EIGH:
            self.notes.append(
                f"Alignment and spectrum are left out above {EIGH:,} rows of K; fewer --samples bring them back."
            )
            return
        with torch.no_grad():
            outputs = s.job.model(x)
        r = s.residual(outputs, y).flatten()
        if r.any():
            found = alignment(K, r)
            what = (
                "r = F - y"
                if s.job.objective.loss == "mse"
                else "r = softmax(F) - y, the loss's gradient in the outputs"
            )
            shares = f"{found.details['shares']['50%']:.2%} of ‖r‖² lies along the smaller half of K's eigenvectors"
            self.found.append(dataclasses.replace(found, samples=n, notes=(*found.notes, what, shares)))
        values = torch.linalg.eigvalsh(K).flip(0).tolist()
        index = _evenly(len(values))
        self.series["spectrum"] = {
            "index": [i + 1 for i in index],
            "value": [values[i] for i in index],
            "bound": smallest.value if smallest.proves and smallest.kind == "lower bound" else None,
            "total": len(values),
            "samples": n,
            "outputs": C,
        }

    def _gram_seconds(self) -> Callable[[int], float]:
        """Time Grams of more and more samples; return what larger ones take."""
        s, C = self.subject, self.outputs
        n, taken = 1, 2 * C * self.row_seconds
        limit = 0.02 * self.seconds
        while taken * 2 < limit and n < s.rows and self.algebra(n * C) < self.seconds:
            n = min(2 * n, s.rows)
            began = time.perf_counter()
            tangent_gram(s.job.model, s.pick(n)[0])
            taken = time.perf_counter() - began
        return lambda m: taken * max(m / n, (m / n) ** 2)


def _rows_that_fit(outputs: int) -> int:
    """Return how many samples' Gram fits into the memory, with what is needed beside it."""
    there = available()
    return 10**9 if there is None else int(math.sqrt(there / (8 * GRAMS)) / max(outputs, 1))


def _evenly(rows: int) -> list[int]:
    """Return at most POINTS of the numbers below `rows`, the first and the last among them."""
    return list(range(rows)) if rows <= POINTS else [round(i * (rows - 1) / (POINTS - 1)) for i in range(POINTS)]


def _impossible(name: str, title: str, why: str) -> Task:
    def run(n: int) -> None:
        raise InputError(why)

    return Task(name, title, 0.01, 1, 1, lambda n: 0.0, run)
