"""Bounds on a ball around the weights, layer by layer: Lipschitz constant of the Jacobian, its norm, rounding errors.

A rule a kind of operation (the operations are those of the certificate format): `measure_OP` looks at one operation at
the weights themselves and returns a `Step`, all that its bounds depend on; `Step.through` takes the state of a ball of
radius R through it. To add an operation: one such function and one test (and the same in the checker, independently).

For each of the N samples, with L trainable operations and a the vector of the norms of a direction's parts:

    ||Dh d|| <= e . a,     ||D^2 h(d, d)|| <= a^T Q a     everywhere on the ball.

H = ||h(w0)|| + R ||e|| bounds h there, and de is e's twin for the error of the computed Jacobian at the weights.

surefoot, Props. 24, 26, 27, 28 and 32 (theory in docs/theorems).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surefoot.errors import InputError
from surefoot.measure.eigen import spectral_norm

U = 2.0**-53
MARGIN = 1 + 1e-12  # a factor on every short computation with non-negative numbers: far above its rounding error
NORM = 1 + 1e-2  # on spectral norms: whoever checks bounds them by a power iteration of his own, less sharply
SLOPE = 1024 * U  # of a computed sigma'; the checker allows a quarter of it

# sigma, sup |sigma'|, Lipschitz constant of sigma', and r, a: the computed sigma(z) is off by at most
# u (r |sigma(z)| + a).
# An elementary function is good to 8 units in the last place, 16 u; the checker, whose formulas have few operations
# around it, allows half of what stands here. gelu: torch's 1 + erf cancels, 16 u of 1 times |z|/2 <= 4.2, beyond which
# the value itself is below 1e-16.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], float, float, float, float]] = {
    "tanh": (torch.tanh, 1.0, 0.7699, 32, 0),
    "sigmoid": (torch.sigmoid, 0.25, 0.0963, 64, 0),
    "softplus": (lambda z: torch.logaddexp(torch.zeros_like(z), z), 1.0, 0.25, 80, 0),
    "gelu": (F.gelu, 1.13, 0.8, 64, 160),
    "silu": (F.silu, 1.1, 0.5, 64, 0),
    "elu": (F.elu, 1.0, 1.0, 32, 0),
    "identity": (lambda z: z, 1.0, 0.0, 0, 0),
}


def gam(k: int) -> float:
    """Return twice k u: the bound for a dot product of k terms, with room for the checker's own analysis."""
    return 2 * k * U


@dataclass(frozen=True)
class Step:
    """What one operation does, measured at the weights.

    Attributes:
        slot: which of the L trainable operations it is; None if it is not.
        w: bound of its Lipschitz constant in h at the weights.
        grow: how much w grows with R.
        mixed: coefficient of u e^T + e u^T in Q.
        places: coefficient of H^2, and the constant, under the root of the new entry of e.
        curve: s2, the Lipschitz constant of the derivative of an activation.
        off: bound of the rounding error of its linear part, relative to ||h||_2 or ||B||_2.
        slope_error: (N,) of an activation's slope at the computed argument.
        gap: (N,) smallest |argument| of a piecewise linear activation, or None.
        size: (N,) bound of ||h(w0)|| at its end.
        error: (N,) bound of ||computed h - h|| at its beginning.
        reach: (N,) and its growth: if the new entry of e is made of something else than H.
        terms: how many numbers an entry of this operation's Gram is summed from, in one order or another.
        shared: whether its parameters act at several places, whose shares may cancel in the Jacobian.
        branch: of a residual.
    """

    op: str
    slot: int | None
    w: float
    grow: float = 0.0
    mixed: float = 0.0
    places: tuple[float, float] = (0.0, 0.0)
    curve: float = 0.0
    off: float = 0.0
    slope_error: Tensor | None = None
    gap: Tensor | None = None
    size: Tensor | None = None
    error: Tensor | None = None
    reach: tuple[Tensor, float] | None = None
    terms: int = 0
    shared: bool = False
    branch: tuple[Step, ...] = ()

    def through(self, s: State, R: float) -> State:
        """Take the state of the ball of radius R through this operation."""
        if self.op == "residual":
            r = s
            for step in self.branch:
                r = step.through(r, R)
            assert self.size is not None
            e, de = s.e + r.e, s.de + r.de
            return State(e * MARGIN, (s.Q + r.Q) * MARGIN, (de + 2 * U * e) * MARGIN, self.size, r.flips)
        w = (self.w + (self.grow * R if self.slot is not None else 0.0)) * MARGIN
        e, Q, de = w * s.e, w * s.Q, w * s.de + self.off * (s.e + s.de)
        flips = s.flips
        if self.gap is not None:
            flips = torch.maximum(flips, R * s.lengths() * MARGIN / self.gap.clamp(min=1e-300))
        if self.slope_error is not None:
            de = de + self.slope_error[:, None] * (s.e + s.de)
        if self.curve:
            Q = Q + self.curve * s.e[:, :, None] * s.e[:, None, :]
        if self.slot is not None:
            assert self.error is not None
            nu, T = self.places
            H = self.reach[0] + self.reach[1] * R * s.lengths() if self.reach else s.size + R * s.lengths()
            e[:, self.slot] += torch.sqrt(nu * H * H + T) * MARGIN
            Q[:, self.slot, :] += self.mixed * s.e
            Q[:, :, self.slot] += self.mixed * s.e
            de[:, self.slot] += math.sqrt(nu) * self.error * 2
        assert self.size is not None
        return State(e * MARGIN, Q * MARGIN, de * MARGIN, self.size, flips)


@dataclass(frozen=True)
class State:
    """The bounds between two operations: e (N, L), Q (N, L, L), de (N, L), ||h(w0)|| (N,), flips (N,).

    `flips` is the largest ratio so far of what an argument of a piecewise linear activation may move to its distance
    from the kink: the cell condition is flips < 1.
    """

    e: Tensor
    Q: Tensor
    de: Tensor
    size: Tensor
    flips: Tensor

    def lengths(self) -> Tensor:
        """Return ||e||: (N,)."""
        return torch.linalg.vector_norm(self.e, dim=1) * MARGIN


@dataclass(frozen=True)
class BallBounds:
    """What holds on the ball of radius R.

    Attributes:
        radius: R.
        beta: upper bound of the Lipschitz constant of the Jacobian.
        jacobian_norm: upper bound of its norm.
        rounding: upper bound of ||computed J - J||_F at the weights.
        cell: what an argument of a piecewise linear activation may move, relative to its distance from the kink, at
            most; from 1 on the other numbers hold nothing.
    """

    radius: float
    beta: float
    jacobian_norm: float
    rounding: float
    cell: float


class BoundedNetwork:
    """The operations of a network measured once at its weights; `on_ball` then costs next to nothing.

    Args:
        operations: the list of the certificate format.
        tensors: name -> float64 tensor.
        inputs: (N, ...) float64.

    Attributes:
        outputs: F(w0), (N, C), as computed.
        error: (N,) bound of ||computed F - F|| a sample.
    """

    def __init__(self, operations: list[dict[str, Any]], tensors: dict[str, Tensor], inputs: Tensor) -> None:
        self.tensors = tensors
        self.slots = 0
        self.inputs_size = _norms(inputs)
        self.outputs, self.error, _, steps = self._measure(
            operations, inputs, torch.zeros(len(inputs), dtype=torch.float64), self.inputs_size
        )
        self.steps = tuple(steps)

    def on_ball(self, R: float) -> BallBounds:
        """Return the bounds on the ball of radius R around the weights."""
        s = self._end(R)
        C = self.outputs.shape[1]
        return BallBounds(
            R,
            beta=float(torch.linalg.vector_norm(top_eigenvalue(s.Q))) * MARGIN,
            jacobian_norm=float(torch.linalg.vector_norm(s.e)) * MARGIN,
            rounding=float(torch.linalg.vector_norm(s.de)) * math.sqrt(C) * MARGIN,
            cell=float(s.flips.max()),
        )

    def gram_rounding(self, trace: float) -> float:
        """Return a generous bound of ||computed K - J J^T|| for a J made of the computed factors, whoever computes it.

        A sum of k products is off by at most gam(k) times the sum of their absolute values (surefoot, Prop. 31): the
        trace where every parameter acts once, else what e allows the places' shares to add up to.
        """
        N, C = self.outputs.shape
        trainable = {step.slot: step for step in _flat(self.steps) if step.slot is not None}
        longest = max((step.terms for step in trainable.values()), default=0)
        found = (20_000 + 2 * N * C + 4 * longest) * trace
        e = self._end(0.0).e
        for slot, step in trainable.items():
            if step.shared:
                found += 4 * step.terms * C * float(e[:, slot].square().sum())
        return U * found * MARGIN

    def _end(self, R: float) -> State:
        N, L = len(self.outputs), self.slots
        zero = self.outputs.new_zeros(N, L)
        s = State(zero, zero.new_zeros(N, L, L), zero, self.inputs_size, zero.new_zeros(N))
        for step in self.steps:
            s = step.through(s, R)
        return s

    def _measure(
        self, operations: list[dict[str, Any]], h: Tensor, dh: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, list[Step]]:
        steps: list[Step] = []
        for o in operations:
            slot = None
            if o.get("trainable"):
                slot, self.slots = self.slots, self.slots + 1
            if o["op"] == "residual":
                end, dend, _, branch = self._measure(o["branch"], h, dh, size)
                h = h + end
                dh = (dh + dend + U * _norms(h)) * MARGIN
                step = Step("residual", None, 1.0, branch=tuple(branch))
            elif (rule := RULES.get(o["op"])) is not None:
                h, dh, step = rule(o, self.tensors, h, dh, size)
                step = replace(step, slot=slot)
            else:
                raise InputError(f"operation {o['op']!r} has no rule; there are {sorted([*RULES, 'residual'])}")
            size = (_norms(h) + dh) * MARGIN
            steps.append(replace(step, size=size))
        return h, dh, size, steps


def top_eigenvalue(Q: Tensor) -> Tensor:
    """Return upper bounds of the largest eigenvalues of matrices >= 0, (N, L, L) -> (N,), by Collatz-Wielandt."""
    x = torch.ones(Q.shape[:2], dtype=Q.dtype)
    best = torch.full((len(Q),), math.inf, dtype=Q.dtype)
    for _ in range(40):
        y = torch.einsum("nij,nj->ni", Q, x)
        best = torch.minimum(best, (y / x).amax(1))
        x = y / y.amax(1, keepdim=True).clamp(min=1e-300) + 1e-6
    return best * MARGIN


def _flat(steps: tuple[Step, ...]) -> list[Step]:
    return [found for step in steps for found in (step, *_flat(step.branch))]


Operation = dict[str, Any]
Tensors = dict[str, Tensor]
Measured = tuple[Tensor, Tensor, Step]  # h at the end, (N,) its error, the step
Rule = Callable[[Operation, Tensors, Tensor, Tensor, Tensor], Measured]
RULES: dict[str, Rule] = {}


def rule(op: str) -> Callable[[Rule], Rule]:
    """Register the rule of an operation.

    It is called with the operation's fields, the tensors, h (N, ...) at its beginning as computed, dh (N,), a bound of
    the error of h, and size (N,), a bound of the norm of the exact h.
    """

    def add(function: Rule) -> Rule:
        RULES[op] = function
        return function

    return add


@rule("flatten")
def measure_flatten(o: Operation, tensors: Tensors, h: Tensor, dh: Tensor, size: Tensor) -> Measured:
    """The same numbers."""
    return h.flatten(1), dh, Step("flatten", None, 1.0)


@rule("scale")
def measure_scale(o: Operation, tensors: Tensors, h: Tensor, dh: Tensor, size: Tensor) -> Measured:
    """A fixed factor."""
    w = abs(float(o["factor"]))
    return o["factor"] * h, w * dh + 4 * U * w * size, Step("scale", None, w, off=4 * U * w)


@rule("linear")
def measure_linear(o: Operation, tensors: Tensors, h: Tensor, dh: Tensor, size: Tensor) -> Measured:
    """W h + b: ||d(W h)|| <= ||W|| ||dh|| + sqrt(||h||^2 + 1) ||d(W, b)||."""
    W, b = tensors[o["weight"]], _bias(o, tensors)
    w, fro = norm_of(W), float(torch.linalg.vector_norm(W)) * MARGIN
    end, rounding = accurate(F.linear, h, W, b)
    off = gam(max(W.shape) + 3) * fro
    places = (1.0, float(b is not None))
    step = Step("linear", None, w, 1.0, 1.0, places, off=off, error=dh, terms=sum(W.shape))
    return end, (w * dh + rounding) * MARGIN, step


@rule("conv2d")
def measure_conv2d(o: Operation, tensors: Tensors, h: Tensor, dh: Tensor, size: Tensor) -> Measured:
    """A convolution: a pixel lies in at most nu windows, so that ||T_U h|| <= sqrt(nu) ||U||_F ||h||."""
    W, b = tensors[o["weight"]], _bias(o, tensors)
    nu = math.prod(math.ceil(k / (s // math.gcd(s, r))) for k, s, r in zip(W.shape[2:], o["stride"], o["dilation"]))
    root, fro = math.sqrt(nu), float(torch.linalg.vector_norm(W)) * MARGIN

    def convolved(h: Tensor, W: Tensor) -> Tensor:
        return F.conv2d(h, W, None, tuple(o["stride"]), tuple(o["padding"]), tuple(o["dilation"]))

    end, rounding = accurate(convolved, h, W, None if b is None else b[:, None, None], root)
    T = end[0, 0].numel()
    taps = sum(norm_of(W[:, :, i, j]) for i in range(W.shape[2]) for j in range(W.shape[3]))
    w = min(root * norm_of(W.flatten(1)), taps) * MARGIN
    k = W[0].numel() + len(W) + math.ceil(nu) + 4
    # A row of the Jacobian is a sum over T places: its rounding counts as an error of what is summed.
    error = dh + gam(T + 3) * torch.sqrt(size * size + T / nu)
    return (
        end,
        (w * dh + rounding) * MARGIN,
        Step(
            "conv2d",
            None,
            w,
            grow=root,
            mixed=root,
            places=(float(nu), float(T) if b is not None else 0.0),
            off=gam(k) * root * fro,
            error=error,
            terms=W.numel() + W[0].numel() + T * (len(W) + 3),
            shared=T > 1,
        ),
    )


@rule("batch_norm")
def measure_batch_norm(o: Operation, tensors: Tensors, h: Tensor, dh: Tensor, size: Tensor) -> Measured:
    """Eval mode: g (h - mean)/sqrt(var + eps) + b, an affine map a channel."""
    g, b, mean, var = (tensors[o[name]].view(1, -1, *[1] * (h.dim() - 2)) for name in ("weight", "bias", "mean", "var"))
    root = torch.sqrt(var + float(o["eps"]))
    x = (h - mean) / root
    T = h[0, 0].numel()
    m, w = float(1 / root.min()) * MARGIN, float((g.abs() / root).max()) * MARGIN
    dx = m * dh + 16 * U * (_norms(x) + m * (size + math.sqrt(T) * float(mean.norm())))
    end = x * g + b
    dh_end = float(g.abs().max()) * dx + 16 * U * (_norms(x * g) + math.sqrt(T) * float(b.norm()))
    return (
        end,
        dh_end * MARGIN,
        Step(
            "batch_norm",
            None,
            w,
            grow=m,
            mixed=m,
            places=(1.0, float(T)),
            off=16 * U * w,
            error=dx + gam(T + 3) * torch.sqrt(_norms(x) ** 2 + T),
            reach=((_norms(x) + dx) * MARGIN, m),
            terms=2 * g.numel() + 3 * T,
            shared=T > 1,
        ),
    )


@rule("activation")
def measure_activation(o: Operation, tensors: Tensors, h: Tensor, dh: Tensor, size: Tensor) -> Measured:
    """Sigma entry by entry; a piecewise linear one has s2 = 0 as long as no argument changes its sign."""
    name, entries = o["name"], h[0].numel()
    if name in ("relu", "leaky_relu"):
        slope = float(o.get("slope", 0.0))
        gap = (h.abs().flatten(1).amin(1) - 2 * dh).clamp(min=0.0)
        end, s1 = torch.where(h > 0, h, slope * h), max(1.0, abs(slope))
        return end, (s1 * dh + 4 * U * _norms(end)) * MARGIN, Step("activation", None, s1, gap=gap)
    sigma, s1, s2, relative, absolute = ACTIVATIONS[name]
    end = sigma(h)
    dh_end = s1 * dh + U * (relative * _norms(end) + absolute * math.sqrt(entries))
    slope_error = 2 * s2 * dh + (0.0 if name == "identity" else SLOPE)
    return end, dh_end * MARGIN, Step("activation", None, s1, curve=s2, off=8 * U * s1, slope_error=slope_error)


@rule("avg_pool2d")
def measure_avg_pool2d(o: Operation, tensors: Tensors, h: Tensor, dh: Tensor, size: Tensor) -> Measured:
    """Mean over windows."""
    kernel, stride = o["kernel"], o["stride"]
    area = math.prod(kernel)
    w = math.sqrt(math.prod(math.ceil(k / s) for k, s in zip(kernel, stride)) / area) * MARGIN
    off = gam(area + 4) * max(1.0, w) * math.sqrt(area)
    end = F.avg_pool2d(h, tuple(kernel), tuple(stride))
    return end, (w * dh + off * size) * MARGIN, Step("avg_pool2d", None, w, off=off)


def accurate(
    apply: Callable[[Tensor, Tensor], Tensor], h: Tensor, W: Tensor, b: Tensor | None, root: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return apply(h, W) + b, rounded as if it were worked out in one piece, and (N,) bounds of its error.

    An entry of apply(h, W) is a sum of k products, and ||apply(h, W)|| <= root ||h|| ||W||_F. With h = h1 + h2 and
    W = W1 + W2, exactly, the leading bits in h1 and W1, apply(h1, W1) is exact in every order: the products are whole
    numbers in one unit, no partial sum of which passes 2^53. The rest is some 2^-22 as large, and so is its rounding.

    Args:
        apply: bilinear in h (N, ...) and W (b, ...), k the numbers in a W[0].
        h: (N, ...).
        W: (b, ...).
        b: what fits the value, or None.
        root: as above.
    """
    k = W[0].numel()
    bits = (53 - k.bit_length()) // 2
    h1, W1 = _leading(h, bits), _leading(W, bits)
    h2, W2 = h - h1, W - W1
    z = apply(h1, W1) + (apply(h1, W2) + apply(h2, W))
    end = z if b is None else z + b
    rest = root * (_norms(h1) * float(W2.norm()) + _norms(h2) * float(W.norm()))
    return end, (gam(k + 2) * rest + 2 * U * (_norms(z) + _norms(end))) * MARGIN + 1e-120


def _leading(x: Tensor, bits: int) -> Tensor:
    """Return x rounded to multiples of a power of two for each first index, at most 2^bits of them a number."""
    top = x.abs().flatten(1).amax(1).clamp(min=1e-130)
    unit = top / torch.frexp(top).mantissa * 2.0**-bits  # the quotient is a power of two above top
    unit = unit.view(-1, *[1] * (x.dim() - 1))
    return torch.round(x / unit) * unit


def norm_of(W: Tensor) -> float:
    """Return a verified upper bound of ||W||_2."""
    return float(spectral_norm(W)) * NORM


def _bias(o: Operation, tensors: Tensors) -> Tensor | None:
    return None if o["bias"] is None else tensors[o["bias"]]


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.flatten(1), dim=1) * MARGIN
