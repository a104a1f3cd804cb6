"""Positive initialisation: weights at which Chatterjee's criterion holds before the first step, with an explicit size.

A dense network of L layers with biases and one output, sigma(0) = 0, and the loss f = (1/N) sum (F_i - y_i)^2. W_1 = 0,
the entries of the hidden W_l are t, those of the last layer A, every bias 0. Then F = 0, so f0 = ||y||^2/N does not
depend on A, and on the ball of radius R < t around these weights every path through the network keeps its sign:

    M_1 = R sqrt(max ||x||^2 + 1),  M_l = (m_{l-1} t + R sqrt(m_{l-1})) max_{|z| <= M_{l-1}} |sigma| + R   bound |z_l|
    s_l = min_{|z| <= M_l} sigma'
    v   = s_1 ... s_{L-1} m_2 ... m_{L-1} (t - R)^(L-2) (A - R)     bounds the gradient in every z_1 from below
    alpha >= (4/N) lambda_min(X X^T + 1 1^T) m_1 v^2                    (Prop. 10)

    4 f0 < (1-eps)^2 R^2 alpha   <=>   A > R + ||y|| / ((1-eps) R s_N([X, 1]) sqrt(m_1) v/(A - R))

grad f is (2/N)(L_J^2 + beta_J ||y||)-Lipschitz on the ball where f <= f0; L_J and beta_J come from a recursion over the
layers (`layer_bounds`, Prop. 25), not from an estimate at the weights.

Source: surefoot, Prop. 10, 11 and 25 (idea of the initialisation: S. Chatterjee, arXiv 2203.16462).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.features import FeatureRank, feature_rank
from surefoot.measure.measurement import Measurement
from surefoot.measure.rounding import norm_up, up
from surefoot.theorems.local_pl import check_local_pl
from surefoot.theorems.verdict import Finding, Outcome, Verdict, conclude

THEOREM = "gradient descent reaches a global minimum from the positive initialisation"
SOURCE = "surefoot, Prop. 11 (idea: Chatterjee, arXiv 2203.16462)"
MARGIN = 1e-9  # for computations of at most some thousand operations on non-negative numbers: far above their rounding


@dataclass(frozen=True)
class Activation:
    """What the theorem needs of an activation with sigma(0) = 0.

    Attributes:
        size: M -> an upper bound of |sigma| on [-M, M].
        slope: M -> a lower bound of sigma' on [-M, M]; 0 where there is no positive one.
        s1: sup |sigma'|.
        s2: Lipschitz constant of sigma'.
        top: sup |sigma|.
    """

    size: Callable[[float], float]
    slope: Callable[[float], float]
    s1: float
    s2: float
    top: float = math.inf


def _silu_slope(M: float) -> float:
    # silu' grows on [-2.39, 2.39]
    if M > 2:
        return 0.0
    s = 1 / (1 + math.exp(M))
    return s * (1 - M * (1 - s))


def _gelu_slope(M: float) -> float:
    # gelu' grows on [-sqrt 2, sqrt 2]
    return 0.0 if M > 1.4 else math.erfc(M / math.sqrt(2)) / 2 - M * math.exp(-M * M / 2) / math.sqrt(2 * math.pi)


ACTIVATIONS: dict[type[nn.Module], Activation] = {
    nn.Tanh: Activation(math.tanh, lambda M: 1 / math.cosh(M) ** 2 if M < 300 else 0.0, 1.0, 0.7699, 1.0),
    nn.ELU: Activation(lambda M: M, lambda M: math.exp(-M), 1.0, 1.0),
    nn.SiLU: Activation(lambda M: M, _silu_slope, 1.1, 0.5),
    nn.GELU: Activation(lambda M: M, _gelu_slope, 1.13, 0.8),
    nn.Identity: Activation(lambda M: M, lambda M: 1.0, 1.0, 0.0),
}


@dataclass(frozen=True)
class PositiveInit:
    """What `positive_init_` has written, and what follows; true if and only if the verdict is proved.

    Attributes:
        verdict: what holds before the first step, of f = mean of (F - y)^2; its numbers are those of the local
            criterion and A, t, ball, smoothness and s_min, that of [X, 1].
        rank: of [X, 1], without which there is no such initialisation.
        A: the entries of the last layer.
        t: the entries of the hidden layers.
        ball: R.
        alpha: inf ||grad f||^2/f on the ball (lower).
        smoothness: Lipschitz constant of grad f on the ball where f <= f0 (upper).
        eta_max: the longest step on f, the mean of squares (lower).
    """

    verdict: Verdict
    rank: FeatureRank
    A: float = math.nan
    t: float = math.nan
    ball: float = math.nan
    alpha: float = 0.0
    smoothness: float = math.inf
    eta_max: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.verdict)

    def __str__(self) -> str:
        return str(self.verdict)


def path_gain(
    widths: Sequence[int], activations: Sequence[Activation], t: float, ball: float, input_norm: float
) -> float:
    """Return v/(A - R), a lower bound: what every path through the hidden layers carries at least; 0 if there is none.

    Args:
        widths: (m_1, ..., m_{L-1}), of the hidden layers.
        activations: one a hidden layer.
        t: entries of the hidden weights, > ball where there is more than one hidden layer.
        ball: R > 0.
        input_norm: max ||x||, an upper bound.

    Example:
        >>> round(path_gain([8], [ACTIVATIONS[nn.Tanh]], 1.0, 0.5, 0.0), 4)  # 1/cosh(1/2)^2
        0.7864
    """
    gain, M = 1.0, ball * math.hypot(input_norm, 1.0) * (1 + MARGIN)
    for k, (m, activation) in enumerate(zip(widths, activations)):
        if k:
            size = activations[k - 1].size(M) * (1 + MARGIN)
            M = ((widths[k - 1] * t + ball * math.sqrt(widths[k - 1])) * size + ball) * (1 + MARGIN)
            gain *= m * (t - ball)
        # the subtractions in a slope are exact to 1e-15 or so
        slope = activation.slope(M)
        gain *= slope - 1e-14 * (slope < 1)
        if gain <= 0:
            return 0.0
    return gain * (1 - MARGIN)


def least_output_weight(
    gain: float, ball: float, target_norm: float, s_min: float, first_width: int, epsilon: float = 0.5
) -> float:
    """Return the number that A must exceed for the criterion to hold (Prop. 11); infinite if none will do.

    Args:
        gain: of `path_gain`.
        ball: R.
        target_norm: ||y||, an upper bound.
        s_min: of [X, 1], a lower bound.
        first_width: m_1.
        epsilon: in [0, 1); 0 for the flow.

    Example:
        >>> round(least_output_weight(1.0, 1.0, 3.0, 2.0, 9), 6)  # 1 + 2 (3/(1 2 3))
        2.0
    """
    below = (1 - epsilon) * ball * s_min * math.sqrt(first_width) * gain
    return (ball + target_norm / below) * (1 + 4 * MARGIN) if below > 0 else math.inf


def layer_bounds(
    norms: Sequence[float],
    activations: Sequence[Activation],
    widths: Sequence[int],
    ball: float,
    samples: int,
    input_norm: float,
    input_spectral: float,
) -> tuple[float, float]:
    """Return upper bounds of ||J|| and of J's Lipschitz constant on the ball (Prop. 25), where h_l = 0 at its centre.

    With w_l = ||W_l||_2 + R, u_l the l-th unit vector; small letters for one sample, capitals for all of them:

        e_l = w_l s1 e_{l-1} + sqrt(H_{l-1}^2 + 1) u_l
        E_l = w_l s1 E_{l-1} + ||[H_{l-1}, 1]||_2 u_l
        H_l = min{s1 (w_l H_{l-1} + R), R s1 ||e_l||, sup|sigma| sqrt(m_l)},   ||[H_l, 1]||_2 <= sqrt(N) + R s1 ||E_l||
        Q_{l+1} = w_{l+1} (s1 Q_l + (s2/2)(e_l E_l^T + E_l e_l^T)) + s1 (u_{l+1} E_l^T + E_l u_{l+1}^T)

    and ||J|| <= ||E_L||, Lip J <= lambda_max(Q_L).

    Args:
        norms: ||W_l||_2 at the centre, (L,), upper bounds.
        activations: (L - 1,), with sigma(0) = 0.
        widths: (m_1, ..., m_{L-1}).
        ball: R.
        samples: N.
        input_norm: max ||x||, an upper bound.
        input_spectral: ||[X, 1]||_2, an upper bound.
    """
    L = len(norms)
    e, E, Q = np.zeros(L), np.zeros(L), np.zeros((L, L))
    H, stacked = input_norm, input_spectral
    for k, norm in enumerate(norms):
        w, s1 = norm + ball, 1.0
        if k:
            activation = activations[k - 1]
            s1 = activation.s1
            Q = s1 * Q + activation.s2 / 2 * (np.outer(e, E) + np.outer(E, e))
            Q = w * Q
            Q[k] += s1 * E
            Q[:, k] += s1 * E
        e, E = w * s1 * e, w * s1 * E
        e[k] += math.hypot(H, 1.0)
        E[k] += stacked
        if k < L - 1:
            s1 = activations[k].s1
            H = min(
                s1 * (w * H + ball),
                ball * s1 * float(np.linalg.norm(e)),
                activations[k].top * math.sqrt(widths[k]),
            )
            stacked = math.sqrt(samples) + ball * s1 * float(np.linalg.norm(E))
    return float(np.linalg.norm(E)) * (1 + MARGIN), _perron(Q) * (1 + MARGIN)


def positive_init_(
    model: nn.Sequential,
    X: Tensor,
    y: Tensor,
    *,
    t: float | None = None,
    epsilon: float = 0.5,
    target: float | None = None,
) -> PositiveInit:
    """Set a network's weights so that convergence to a global minimum is proved before the first step.

    A is the least over a grid of R (and of t up to 10). The verdict is about f = mean of (F - y)^2, which is torch's
    MSELoss, all samples in every step, in exact arithmetic. Train in float64: the curvature grows like A^2, so that
    steps are short.

    Args:
        model: nn.Sequential of an nn.Flatten or none, then nn.Linear, activation, ..., nn.Linear with biases, one or
            more hidden layers and one output; the activations tanh, ELU, SiLU, GELU or identity, for which
            sigma(0) = 0. All its parameters are set; nothing is where the verdict is not proved.
        X: (N, ...) inputs, N <= d + 1, whose [X, 1] must have rank N.
        y: (N,) or (N, 1) targets, not all 0.
        t: the entries of the hidden layers, > 0; None: the best. It has no effect with one hidden layer.
        epsilon: in (0, 1): trades A against the longest step.
        target: a loss > 0 to say the number of steps for.

    Returns:
        PositiveInit: the constants, and the verdict.

    Raises:
        InputError: the model is not of this form, some parameter is not trained, X or y do not fit it, or an option is
            out of its range.

    Example:
        >>> X, y = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1)).double()
        >>> found = positive_init_(model, X, y)
        >>> found.verdict.outcome.value, bool((model[2].weight == found.A).all()), model(X).detach().abs().max().item()
        ('proved', True, 0.0)
    """
    linears, activations = _layers(model)
    if not 0 < epsilon < 1:
        raise InputError(f"epsilon={epsilon!r} must lie between 0 and 1; 0.5 is a good choice")
    if t is not None and not 0 < t < math.inf:
        raise InputError(f"t={t!r} must be a finite number above 0, or None")
    inputs, targets = _data(X, y, linears[0].in_features)
    dtype = linears[0].weight.dtype
    widths = [layer.out_features for layer in linears[:-1]]
    N = len(inputs)
    rank = feature_rank(inputs)
    finding = _rank_finding(rank, inputs.shape[1])
    if finding.outcome is not Outcome.PROVED:
        verdict = conclude(THEOREM, (finding,), (rank.s_min,), conclusion="", numbers={}, source=SOURCE)
        return PositiveInit(verdict, rank)

    x_norm, y_norm = max(norm_up(x) for x in inputs), norm_up(targets)
    A, t, R, gain = _search(
        widths, activations, t, dtype, lambda gain, R: _need(gain, R, y_norm, rank, widths, epsilon), x_norm
    )
    if not math.isfinite(A):
        raise InputError(f"t={t!r} leaves no finite size for the last layer; leave t out")
    s_min = rank.s_min.value
    alpha = 4 / N * (s_min * gain * (A - R)) ** 2 * widths[0] * (1 - MARGIN)
    loss = up(up(y_norm * y_norm) / N)
    norms = [0.0] + [t * math.sqrt(a * b) * (1 + MARGIN) for a, b in pairwise(widths)]
    norms.append(A * math.sqrt(widths[-1]) * (1 + MARGIN))
    L, beta = layer_bounds(norms, activations, widths, R, N, x_norm, rank.s_max.value)
    smoothness = 2 / N * (L * L + beta * y_norm) * (1 + MARGIN)
    verdict = check_local_pl(
        Measurement("f(w0)", loss, "upper bound", "verified", "F(w0) = 0, so it is ||y||^2/N", samples=N),
        Measurement("alpha", alpha, "lower bound", "verified", "first-layer bound on positive weights", samples=N),
        Measurement("Lipschitz constant of grad f", smoothness, "upper bound", "verified", "recursion over the layers"),
        ball=R,
        epsilon=epsilon,
        target=target,
        refutations=(finding,),
    )
    numbers = verdict.numbers
    if verdict:
        numbers = {**numbers, "A": A, "t": t, "ball": R, "smoothness": smoothness, "s_min": s_min}
        _write(linears, t, A)
    verdict = replace(
        verdict, theorem=THEOREM, numbers=numbers, measurements=(rank.s_min, *verdict.measurements), source=SOURCE
    )
    return PositiveInit(verdict, rank, A, t, R, alpha, smoothness, verdict.numbers.get("eta_max", 0.0))


# ----------------------------------------------------------------------------------------------------------------------


def _need(gain: float, R: float, y_norm: float, rank: FeatureRank, widths: Sequence[int], epsilon: float) -> float:
    return least_output_weight(gain, R, y_norm, rank.s_min.value, widths[0], epsilon)


def _search(
    widths: Sequence[int],
    activations: Sequence[Activation],
    t: float | None,
    dtype: torch.dtype,
    need: Callable[[float, float], float],
    x_norm: float,
) -> tuple[float, float, float, float]:
    """Return A, t, R and the gain for the least A on the grid; A and t are numbers of the model's type."""
    if len(widths) == 1:
        sizes, shares = [1.0 if t is None else t], None
    else:
        sizes, shares = np.geomspace(1e-3, 10, 49) if t is None else [t], np.geomspace(1e-5, 0.9, 60)
    best = (math.inf, sizes[0], 0.0, 0.0)
    for size in sizes:
        held = torch.tensor(float(size), dtype=dtype).item()
        for R in np.geomspace(1e-8, 1e4, 601) if shares is None else held * shares:
            R = float(R)
            gain = path_gain(widths, activations, held, R, x_norm)
            best = min(best, (need(gain, R), held, R, gain))
    A, size, R, gain = best
    # a little above what is needed, also after rounding to the model's type
    A = torch.tensor(A * (1 + 1e-6), dtype=dtype).item()
    return A, float(size), R, gain


def _layers(model: nn.Module) -> tuple[list[nn.Linear], list[Activation]]:
    form = (
        "give nn.Sequential(nn.Linear(d, m), nn.Tanh(), ..., nn.Linear(m, 1)); an nn.Flatten may come first and the "
        f"activations are {', '.join(sorted(kind.__name__ for kind in ACTIVATIONS))}"
    )
    if not isinstance(model, nn.Sequential):
        raise InputError(f"model={type(model).__name__} is no nn.Sequential; {form}")
    parts = list(model)
    if parts and isinstance(parts[0], nn.Flatten):
        parts = parts[1:]
    linears: list[nn.Linear] = []
    activations: list[Activation] = []
    for k, part in enumerate(parts):
        if k % 2 == 0:
            if type(part) is not nn.Linear:
                raise InputError(f"model has {part} where a linear layer should be; {form}")
            linears.append(part)
        else:
            known = ACTIVATIONS.get(type(part))
            odd = isinstance(part, nn.ELU) and part.alpha != 1
            odd = odd or (isinstance(part, nn.GELU) and part.approximate != "none")
            if known is None or odd:
                raise InputError(f"model has the activation {part}, of which nothing is known here; {form}")
            activations.append(known)
    if len(linears) < 2 or len(parts) != 2 * len(linears) - 1:
        raise InputError(f"model has {len(linears)} linear layers, {len(parts)} parts; {form}")
    if linears[-1].out_features != 1:
        raise InputError(f"model has {linears[-1].out_features} outputs; the theorem is about one output; {form}")
    for layer in linears:
        if layer.bias is None:
            raise InputError(f"model has {layer} without a bias; bias=True")
    if frozen := [name for name, p in model.named_parameters() if not p.requires_grad]:
        raise InputError(f"model has parameters that are not trained: {frozen}; requires_grad_(True)")
    if len({id(p) for layer in linears for p in layer.parameters()}) != 2 * len(linears):
        raise InputError("model uses a layer twice; give every layer its own weights")
    return linears, activations


def _data(X: Tensor, y: Tensor, features: int) -> tuple[Tensor, Tensor]:
    inputs = X.detach().flatten(1).double() if X.dim() > 1 else X.detach().double().unsqueeze(1)
    targets = y.detach().double().flatten()
    if inputs.shape[1] != features:
        raise InputError(f"X of shape {tuple(X.shape)} has {inputs.shape[1]} numbers a row; the model takes {features}")
    if len(targets) != len(inputs) or not len(inputs):
        raise InputError(f"y of shape {tuple(y.shape)} for {len(inputs)} inputs; give one number a sample")
    if not (torch.isfinite(inputs).all() and torch.isfinite(targets).all()):
        raise InputError("X or y hold NaN or infinite numbers; leave those samples out")
    if not targets.any():
        raise InputError("y is 0 everywhere: the network with all weights 0 fits already")
    return inputs, targets


def _rank_finding(rank: FeatureRank, d: int) -> Finding:
    outcome = {"PROVED": Outcome.PROVED, "REFUTED": Outcome.REFUTED}.get(rank.status, Outcome.UNDECIDED)
    hypothesis = "rank [X, 1] = N"
    if outcome is Outcome.PROVED:
        return Finding(hypothesis, outcome, str(rank.s_min))
    if rank.samples > d + 1:
        remedy = f"at most {d + 1:,} samples of {d:,} numbers each, or more inputs a sample"
    else:
        remedy = "leave duplicates and near-duplicates out"
    return Finding(hypothesis, outcome, "; ".join((rank.s_min.how, *rank.notes)), remedy)


def _write(linears: Sequence[nn.Linear], t: float, A: float) -> None:
    with torch.no_grad():
        for k, layer in enumerate(linears):
            layer.weight.fill_(A if k == len(linears) - 1 else t if k else 0.0)
            layer.bias.zero_()


def _perron(Q: np.ndarray) -> float:
    """Return an upper bound of lambda_max of a non-negative symmetric matrix: max_i (Q x)_i/x_i, any x > 0."""
    x = np.ones(len(Q))
    least = math.inf
    for _ in range(60):
        step = Q @ x
        least = min(least, float((step / x).max()))
        top = float(step.max())
        if top == 0:
            return 0.0
        x = step / top + 1e-6
    return least
