"""Whether the last layer alone can fit every sample: the features of any model with a linear head, and their rank.

Shapes: N samples, H (N, m) the inputs of the head in eval mode, Phi = [H, 1] (N, p), p = m + 1 columns, C outputs.
"""

from __future__ import annotations

import math
import tempfile
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.certificates.last_layer import find_head
from surefoot.errors import InputError
from surefoot.measure.capture import float64_copy
from surefoot.measure.duplicates import equal_rows
from surefoot.measure.eigen import gram, lambda_max, lambda_min
from surefoot.measure.features import FeatureRank, feature_rank
from surefoot.measure.inputs import count, duplicates, take
from surefoot.measure.measurement import Measurement
from surefoot.measure.memory import require
from surefoot.measure.rounding import TINY, gam, norm_up, power_of_two, sum_up, up

ROWS = 256  # samples in one forward pass
BLOCK = 8192  # rows of the features at a time, where they may lie on disk
MAX_MEMORY = 4 * 10**9  # bytes of features above which they are mapped from a file
PIVOTS = (1e-13, 1e-12, 1e-11, 1e-9, 1e-6)  # of a pivoted Cholesky, relative to the trace
STEPS = "steps of gradient descent on the last layer"


def expressivity(
    model: nn.Module,
    inputs: Any,
    *,
    head: str | None = None,
    bounds: bool = False,
    max_memory: float = MAX_MEMORY,
    rows: int = ROWS,
) -> FeatureRank:
    """Decide whether the features of a model's linear head have rank N, [H, 1], so that the head alone fits anything.

    Worth asking of the untrained network: with analytic activations (tanh, softplus, GELU, not ReLU) rank N at one
    point means rank N almost everywhere (surefoot, Prop. 12). The model is copied in float64 and evaluated in eval
    mode; it stays as it is. Equal samples have equal features, whatever rounding says.

    Args:
        model: ends in an nn.Linear with a bias, on features (N, m).
        inputs: every sample that is trained on (each augmented copy is one): a tensor, or a tuple or dictionary.
        head: the name of the head, to be sure which it is; None: the layer whose outputs the model returns.
        bounds: where N > m + 1 counting decides, and nothing else is worked out unless this is True: then also a
            verified s_1, equal features and a lower bound of the rank.
        max_memory: bytes of features above which they are kept in a temporary file that is mapped.
        rows: samples in one forward pass.

    Returns:
        the rank, as `surefoot.measure.feature_rank` gives it; the least width that can do is in its notes.

    Raises:
        InputError: there is no such head, it is used twice or shared, the features are random (dropout that eval() does
            not turn off) or not finite, or the Gram does not fit into memory.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 60), nn.Softplus(), nn.Linear(60, 3))
        >>> expressivity(net, torch.randn(50, 4)).status, expressivity(net, torch.randn(70, 4)).status
        ('PROVED', 'REFUTED')

    Source: surefoot, Prop. 12 (idea: Kawaguchi and Sun, arXiv 2104.05785).
    """
    name = head_name(model, inputs, head)
    width, N = linear(model, name).in_features, count(inputs)
    if width + 1 < N and not bounds:
        return _counted(N, width, _groups(duplicates(inputs)), Measurement(
            "s_1(Phi)", math.inf, "upper bound", "verified", "not worked out: counting decides"
        ))  # fmt: skip
    return rank_of(collect(model, inputs, name, max_memory=max_memory, rows=rows))


def head_name(model: nn.Module, inputs: Any, head: str | None = None) -> str:
    """Return the name of the linear layer whose outputs the model returns.

    Args:
        model: evaluated on a few samples, as a copy in float64 and in eval mode.
        inputs: samples.
        head: what it should be.

    Raises:
        InputError: there is none, or another; it is used twice, shares its weights or lacks a bias; features are
            random in eval mode.
    """
    check_has_linear(model)
    if head is not None:
        linear(model, head)
    _check_finite(model, inputs)
    twin = float64_copy(model).eval()
    few = take(inputs, slice(0, 3))
    calls: dict[nn.Module, int] = {}

    def note(m: nn.Module, _args: Any, _out: Any) -> None:
        calls[m] = calls.get(m, 0) + 1

    hooks = [m.register_forward_hook(note) for m in twin.modules() if isinstance(m, nn.Linear)]
    layer, first = find_head(twin, few)
    for hook in hooks:
        hook.remove()
    name = next(n for n, m in twin.named_modules() if m is layer)
    if head is not None and head != name:
        raise InputError(f"head={head!r} is not the layer whose outputs the model returns; that is {name!r}")
    if calls[layer] > 1:
        raise InputError(
            f"the last layer {name!r} is used {calls[layer]} times in one forward pass: training it alone is no linear "
            "problem; give the outputs a layer of their own"
        )
    check_not_shared(model, name)
    again = find_head(twin, few)[1]
    if not torch.equal(first, again):
        random = [f"{n} ({type(m).__name__})" for n, m in twin.named_modules() if "Dropout" in type(m).__name__]
        raise InputError(
            f"model={type(model).__name__} has random features in eval mode, so there is nothing to freeze; turn off "
            f"dropout that eval() does not reach (F.dropout without training=self.training?); dropouts: {random[:5]}"
        )
    return name


def check_has_linear(model: nn.Module) -> list[str]:
    """Return the names of the model's linear layers.

    Raises:
        InputError: there is none; what it is made of is said.
    """
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    if not names:
        kinds = sorted({type(m).__name__ for m in model.modules() if not list(m.children())})
        raise InputError(
            f"model={type(model).__name__} has no nn.Linear for a last layer; it is made of {', '.join(kinds)}"
        )
    return names


def linear(model: nn.Module, name: str) -> nn.Linear:
    """Return the linear layer of that name.

    Raises:
        InputError: there is none.
    """
    modules = dict(model.named_modules())
    found = modules.get(name)
    if not isinstance(found, nn.Linear):
        names = [n for n, m in modules.items() if isinstance(m, nn.Linear)]
        what = "does not exist" if found is None else f"is a {type(found).__name__}"
        raise InputError(f"head={name!r} {what}; the model's linear layers are {names[-5:]}")
    return found


def check_not_shared(model: nn.Module, name: str) -> None:
    """Refuse a head whose numbers are also used elsewhere in the model.

    Raises:
        InputError: they are; where is said.
    """
    own = {f"{name}.weight" if name else "weight", f"{name}.bias" if name else "bias"}
    everyone = dict(model.named_parameters(remove_duplicate=False))
    places = {everyone[n].data_ptr() for n in own if n in everyone}
    others = [n for n, p in everyone.items() if n not in own and p.data_ptr() in places]
    if others:
        raise InputError(
            f"the last layer {name!r} shares its weights with {others}: frozen there and trained here cannot be; untie "
            "them (for transformers: tie_word_embeddings=False)"
        )


def collect(model: nn.Module, inputs: Any, head: str, *, max_memory: float = MAX_MEMORY, rows: int = ROWS) -> Tensor:
    """Return the features H (N, m) of all samples in float64, on the CPU; above `max_memory` mapped from a file.

    The file is temporary and has no name: it goes away with the tensor.

    Raises:
        InputError: features are NaN or infinite.
    """
    _check_finite(model, inputs)
    twin = float64_copy(model).eval()
    N, m = count(inputs), linear(model, head).in_features
    if 8 * N * m > max_memory:
        with tempfile.TemporaryFile() as file:
            H = torch.from_numpy(np.memmap(file, np.float64, "w+", shape=(N, m)))
    else:
        require(8 * N * m, f"features of shape ({N}, {m}) (or give a smaller max_memory)")
        H = torch.empty(N, m, dtype=torch.float64)
    bad: list[int] = []
    for start in range(0, N, rows):
        here = slice(start, min(start + rows, N))
        H[here] = find_head(twin, take(inputs, here), rows)[1]
        bad += [start + i for i in (~torch.isfinite(H[here])).any(1).nonzero().flatten().tolist()]
    if bad:
        raise InputError(
            f"the features of {len(bad)} samples are NaN or infinite, the first {bad[:5]}; leave these out, or look at "
            "the weights"
        )
    for group in duplicates(inputs):  # a product may be rounded otherwise in another place of a batch
        H[group] = H[group[0]].clone()
    return H


def rank_of(H: Tensor) -> FeatureRank:
    """Return the rank of [H, 1]: `feature_rank`, or where N > m + 1 the same from passes over blocks of rows.

    Of a tall H `rank_at_least.details["s_columns"]` is a verified lower bound of the p-th singular value, where it is
    positive: the columns are then independent, and the squared loss of the last layer is strongly convex.
    """
    N, m = H.shape
    if m + 1 >= N:
        return feature_rank(H)
    p = m + 1
    require(24 * p * p, f"features of shape {(N, m)}: the Gram of {p:,} columns and its factor")
    scale = power_of_two(max(1.0, *(float(H[i : i + BLOCK].abs().max()) for i in range(0, N, BLOCK))))
    G = torch.zeros(p, p, dtype=torch.float64)
    errors, sizes = [], []
    for start in range(0, N, BLOCK):
        part = H[start : start + BLOCK]
        V = torch.cat([part, part.new_ones(len(part), 1)], 1).mul_(scale)  # (rows, p)
        block, error = gram(V.mT)
        G += block
        size = norm_up(V)
        errors.append(error)
        sizes.append(up(size * size))
    summing = up(gam(len(sizes)) * sum_up(*sizes, *errors))  # |G_b|_F <= |V|_F^2 + its error
    perturbation = sum_up(*errors, summing)
    lost = N * p * TINY
    largest = up(math.sqrt(sum_up(lambda_max(G).value, perturbation)))
    s_max = Measurement(
        "s_1(Phi)", up(up(largest + lost) / scale), "upper bound", "verified",
        "shifted Cholesky of the columns' Gram and its residual",
    )  # fmt: skip
    rank, s_columns = _independent_columns(G, perturbation)
    # dividing by a power of two is exact
    details = {"s_columns": max(0.0, math.nextafter(s_columns - lost, 0.0)) / scale} if rank == p else {}
    least = Measurement(
        "rank(Phi)", rank, "lower bound", "verified",
        "so many columns are independent: the smallest eigenvalue of their Gram is verified", samples=N,
        details=details,
    )  # fmt: skip
    return _counted(N, m, _groups(equal_rows(H)), s_max, least)


def _check_finite(model: nn.Module, inputs: Any) -> None:
    """Refuse NaN and infinities where they come from.

    Raises:
        InputError: samples or weights hold some, or there is no sample.
    """
    if not count(inputs):
        raise InputError("inputs hold no sample; give at least one")
    parts = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else [inputs]
    for x in parts:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim():
            bad = (~torch.isfinite(x)).reshape(len(x), -1).any(1).nonzero().flatten().tolist()
            if bad:
                raise InputError(
                    f"inputs hold NaN or infinite numbers in {len(bad)} samples, the first {bad[:5]}; leave them out"
                )
    for name, w in model.state_dict().items():
        if w.is_floating_point() and not torch.isfinite(w).all():
            raise InputError(f"model has NaN or infinite numbers in {name!r}: it has diverged; train with a smaller lr")


def _groups(found: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, found))


def _counted(
    N: int, m: int, groups: tuple[tuple[int, ...], ...], s_max: Measurement, least: Measurement | None = None
) -> FeatureRank:
    """Return the verdict of counting: N rows in m + 1 < N columns."""
    reason = f"{m + 1:,} columns, the constant included, for {N:,} samples"
    notes = [f"{m:,} features cannot have rank {N:,}: a width of {N - 1:,} is the least that can"]
    if groups:
        named = ", ".join(str(list(group[:5])) for group in groups[:5])
        notes.append(f"samples that are equal, {len(groups)} groups: {named}: no width tells them apart")
    return FeatureRank(
        N,
        m + 1,
        "REFUTED",
        Measurement("s_N(Phi)", 0.0, "exact", "verified", f"rank < N: {reason}"),
        s_max,
        least or Measurement("rank(Phi)", 1, "lower bound", "verified", "the column of ones", samples=N),
        Measurement("rank(Phi)", m + 1, "upper bound", "verified", reason, samples=N),
        Measurement(STEPS, math.inf, "upper bound", "verified", "rank < N: not every target can be reached"),
        groups,
        (),
        tuple(notes),
    )


def _independent_columns(G: Tensor, perturbation: float) -> tuple[int, float]:
    """Return how many columns are shown to be independent, and a lower bound of their smallest singular value."""
    found = lambda_min(G, perturbation=perturbation).value
    if found > 0:
        return len(G), math.nextafter(math.sqrt(found), 0.0)
    try:
        from scipy.linalg.lapack import dpstrf  # pyright: ignore[reportAttributeAccessIssue]
    except ImportError as error:
        raise InputError("the rank of deficient features needs SciPy: pip install 'surefoot[measure]'") from error
    tried = 0
    for level in PIVOTS:
        _, order, rank, _ = dpstrf(G.numpy(), tol=level * float(G.trace()), lower=1)
        some = torch.from_numpy(order[:rank].astype(np.int64) - 1).sort().values
        if rank and rank != tried:
            found = lambda_min(G[some][:, some].contiguous(), perturbation=perturbation).value
            if found > 0:
                return int(rank), math.nextafter(math.sqrt(found), 0.0)
        tried = rank
    return 1, 0.0  # the column of ones
