"""Curvature: the ends of the spectrum of a loss's Hessian or Gauss-Newton matrix, by products with vectors.

    H = D^2 f(w)                                       Hessian, (P, P)
    G = sum_b (n_b / N) J_b^T (D^2 loss_b) J_b         Gauss-Newton, (P, P); J_b = D outputs_b(w)

Either is the derivative of something that is built once and kept: Hv of the gradient, J v of u -> J^T u. A product is
then one pass over a graph that is there already.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.measurement import Measurement
from surefoot.measure.objective import LossFn, Objective, Piece

if TYPE_CHECKING:
    import numpy as np

Operator = Literal["hessian", "gauss-newton"]
Which = Literal["largest", "both ends"]
Product = Callable[[Sequence[Tensor]], Sequence[Tensor]]

DENSE = 200  # parameters up to which the whole matrix is decomposed
_NAMES = {"hessian": "Hessian", "gauss-newton": "Gauss-Newton matrix"}


def sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    k: int = 1,
    which: Which = "largest",
    operator: Operator = "hessian",
    tolerance: float = 1e-3,
    params: Sequence[str | nn.Parameter] | None = None,
    rows: int | None = None,
    output: Callable[[Any], Any] | None = None,
    lr: float | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    max_products: int = 1000,
) -> Measurement:
    """Measure the largest eigenvalue of the loss's Hessian or Gauss-Newton matrix at the weights the model has.

    lambda_max = max over ‖v‖ = 1 of v^T H v, by Lanczos (scipy's eigsh); with few parameters by decomposing H whole.
    The value is a Rayleigh quotient v^T H v / v^T v, its error the residual ‖Hv - lambda v‖ / ‖v‖: in exact arithmetic
    an eigenvalue lies within the error, and lambda_max is not below the value. It is an estimate, since Lanczos may
    miss an eigenvector that is nearly orthogonal to its random start.

    Args:
        model: in the mode in which it is to be measured. It is left as it is, and so are its gradients, the running
            statistics of batch norm, the random numbers and torch's settings.
        loss_fn: (outputs, targets) -> the mean loss of a batch. Twice differentiable, except for kinks like ReLU's, at
            which autograd takes one side.
        data: a pair (inputs, targets), or batches of such pairs: a list or a loader. Batches count by their samples.
        k: how many eigenvalues, at each end.
        which: "largest", or "both ends": the largest and the smallest (most negative).
        operator: "hessian" or "gauss-newton": J^T (D^2 loss) J, without the curvature of the network itself; for a loss
            that is convex in the outputs it has no negative eigenvalue.
        tolerance: where Lanczos stops: the residual against the eigenvalue (against lambda_max - lambda_min for the
            smallest), > 0.
        params: names of parameters or modules, or parameters themselves, to take derivatives in; None: all that require
            a gradient.
        rows: None keeps the graph of all data. With a number the graphs of so many samples are built anew in every
            product: about twice the time, and the memory of so few.
        output: takes the outputs out of what the model returns; None: itself, or its logits.
        lr: a step size to compare with: the details then hold lr times the sharpness, beside 2.
        dtype: torch.float64 or torch.float32; None: that of the model.
        seed: of Lanczos's start.
        max_products: about how many products with H Lanczos may take.

    Returns:
        The largest eigenvalue. Its details: "eigenvalues", falling, and their "residuals"; "products"; "parameters";
        "operator"; with lr "lr", "sharpness_times_lr" and "edge_of_stability" (2).

    Raises:
        InputError: an argument is out of range; the data are empty or do not fit; the loss is not finite, no scalar,
            not deterministic or not differentiable twice; Lanczos did not converge within max_products; scipy is
            missing.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> found = sharpness(model, torch.nn.functional.mse_loss, (x, torch.zeros(2, 1)), lr=0.1)
        >>> round(found.value, 4)  # the loss is (w_1^2 + 9 w_2^2) / 2
        9.0
        >>> round(found.details["sharpness_times_lr"], 4)
        0.9
    """
    _check_arguments(k, which, operator, tolerance, lr, max_products)
    objective = Objective(model, loss_fn, data, params=params, rows=rows, output=output, dtype=dtype)
    P, wanted = objective.size, k if which == "largest" else 2 * k
    if wanted > P or (wanted >= P > DENSE):
        raise InputError(f"k={k} with which={which!r} is too many eigenvalues of {P} parameters; choose fewer")
    matrix = CurvatureMatrix(objective, operator)
    if dense := P <= DENSE:
        vectors = _decomposed(matrix, k, which)
        error_note = ()
    else:
        vectors = _lanczos(matrix, k, which, tolerance, seed, max_products)
        error_note = ("Lanczos may have missed a larger one",)
    pairs = [_rayleigh(matrix, v) for v in vectors]
    pairs.sort(reverse=True)
    eigenvalues, residuals = [p[0] for p in pairs], [p[1] for p in pairs]
    details: dict[str, Any] = {
        "eigenvalues": eigenvalues,
        "residuals": residuals,
        "products": matrix.products,
        "parameters": P,
        "operator": operator,
    }
    notes = ("an eigenvalue lies within the error, and the largest is not below the value, up to rounding", *error_note)
    if lr is not None:
        details |= {"lr": float(lr), "sharpness_times_lr": lr * eigenvalues[0], "edge_of_stability": 2.0}
        notes += (f"sharpness x lr = {lr * eigenvalues[0]:.3g}, beside 2",)
    return Measurement(
        f"lambda_max({_NAMES[operator]})",
        eigenvalues[0],
        "estimate",
        "estimate",
        f"eigh of the whole {_NAMES[operator]}" if dense else f"Lanczos on {_NAMES[operator]}-vector products",
        samples=objective.samples,
        seed=None if dense else seed,
        dtype=str(objective.dtype).removeprefix("torch."),
        error=residuals[0],
        cost=f"{matrix.products} {_NAMES[operator]}-vector products",
        notes=notes,
        details=details,
    )


class CurvatureMatrix:
    """The Hessian or Gauss-Newton matrix of an objective, as a product: (P,) -> (P,), in and out in float64 on the CPU.

    Args:
        objective: its weights in the order of `objective.names`, each flattened, make up the vectors.
        operator: "hessian" or "gauss-newton".

    Raises:
        InputError: the loss cannot be differentiated twice.

    Example:
        >>> import torch
        >>> from surefoot.measure.objective import Objective
        >>> data = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1)
        >>> objective = Objective(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss, data)
        >>> CurvatureMatrix(objective)(torch.tensor([1.0, 0.0]))  # of ((w + b)^2 + (3w + b)^2) / 2
        tensor([10.,  4.], dtype=torch.float64)
    """

    def __init__(self, objective: Objective, operator: Operator = "hessian") -> None:
        self.objective = objective
        self.operator = operator
        self.products = 0
        self._sizes = [p.numel() for p in objective.params]
        self._kept: list[Product] | None = None
        if objective.rows is None:
            with objective.untouched(), self._differentiated_twice():
                self._kept = [self._build(piece) for piece in objective.pieces]

    def __call__(self, v: Tensor) -> Tensor:
        """Return the matrix times v.

        Raises:
            InputError: the product is not finite.
        """
        o = self.objective
        self.products += 1
        parts = v.to(o.device).split(self._sizes)
        vs = [part.to(p.dtype).view_as(p) for part, p in zip(parts, o.params)]
        total = torch.zeros(o.size, dtype=torch.float64, device=o.device)
        with o.untouched(), self._differentiated_twice():
            for i, piece in enumerate(o.pieces):
                product = self._kept[i] if self._kept is not None else self._build(piece)
                flat = torch.cat([part.reshape(-1) for part in product(vs)])
                total.add_(flat, alpha=piece.weight)
        if not torch.isfinite(total).all():
            raise InputError(
                f"loss_fn and model={type(o.model).__name__} have second derivatives that are NaN or infinite here, as "
                "a square root or a norm has at 0; keep away from such a point, for instance by an eps inside the root"
            )
        return total.cpu()

    def _build(self, piece: Piece) -> Product:
        o = self.objective
        if self.operator == "hessian":
            return hessian_product(o.loss(piece), o.params)
        outputs = o.outputs(piece)
        if not isinstance(outputs, Tensor):
            raise InputError(f"output gives a {type(outputs).__name__}; the Gauss-Newton matrix needs one tensor")
        return gauss_newton_product(outputs, lambda z: o.loss_of(z, piece), o.params)

    @contextmanager
    def _differentiated_twice(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not re.search("derivative for .* not implemented|differentiate twice", str(error)):
                raise
            what = f"model={type(self.objective.model).__name__} with its loss_fn"
            raise InputError(f"{what} cannot be differentiated twice: {error}") from error


def hessian_product(loss: Tensor, params: Sequence[Tensor]) -> Product:
    """Return v -> H v, H the Hessian of loss () in params; the gradient's graph is built here and kept."""
    g = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    return _transposed_product(g, params, params)


def gauss_newton_product(outputs: Tensor, loss_of: Callable[[Tensor], Tensor], params: Sequence[Tensor]) -> Product:
    """Return v -> J^T (D^2 loss) J v, J the Jacobian of the outputs in params.

    J^T u is linear in u, so J v is v times its derivative: two backward passes in place of a forward one.
    """
    u = torch.zeros_like(outputs, requires_grad=True)
    Jt_u = torch.autograd.grad(outputs, params, u, create_graph=True, materialize_grads=True)
    z = outputs.detach().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(z), [z], create_graph=True, materialize_grads=True)
    J, curve = _transposed_product(Jt_u, params, [u]), _transposed_product([slope], [z], [z])

    def product(v: Sequence[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(outputs, params, curve(J(v))[0], retain_graph=True, materialize_grads=True)

    return product


def _transposed_product(g: Sequence[Tensor], like: Sequence[Tensor], inputs: Sequence[Tensor]) -> Product:
    """Return v -> (D g)^T v, with g's graph kept; what is constant adds nothing."""
    _check_graph(g)
    varying = [i for i, part in enumerate(g) if part.requires_grad]

    def product(v: Sequence[Tensor]) -> Sequence[Tensor]:
        if not varying:
            return [torch.zeros_like(x) for x in inputs]
        return torch.autograd.grad(
            [g[i] for i in varying], inputs, [v[i] for i in varying], retain_graph=True, materialize_grads=True
        )

    return product


def _check_graph(g: Sequence[Tensor]) -> None:
    """Refuse a graph in which a part is marked as not differentiable.

    autograd.grad does not visit that part, since no parameter lies behind it, and leaves its share out without a word.

    Raises:
        InputError: an autograd.Function in it is once_differentiable.
    """
    seen: set[Any] = set()
    todo = [part.grad_fn for part in g]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name().endswith("::Error"):
            raise InputError(
                "model or loss_fn cannot be differentiated twice: an autograd.Function in it is marked "
                "once_differentiable; use torch's own operations in its place while you measure"
            )
        todo += [following for following, _ in node.next_functions]


# ---------------------------------------------------------------------------------------------------- eigenvectors


def _decomposed(matrix: CurvatureMatrix, k: int, which: Which) -> list[Tensor]:
    """Return eigenvectors from the whole matrix."""
    P = matrix.objective.size
    H = torch.stack([matrix(e) for e in torch.eye(P, dtype=torch.float64)])
    V = torch.linalg.eigh((H + H.T) / 2).eigenvectors
    columns = [*range(P - k, P), *(range(k) if which == "both ends" else ())]
    return [V[:, i] for i in columns]


def _lanczos(
    matrix: CurvatureMatrix, k: int, which: Which, tolerance: float, seed: int, max_products: int
) -> list[Tensor]:
    """Return approximate eigenvectors by Lanczos."""
    P = matrix.objective.size
    start = torch.randn(P, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if not matrix(start).any():  # the loss is linear: Lanczos has nothing to start from
        return list(torch.eye(k if which == "largest" else 2 * k, P, dtype=torch.float64))
    vectors = _eigsh(lambda v: matrix(v), start, k, tolerance, max_products)
    if which == "both ends":
        # The smallest are the largest of lambda_max - H, which is well scaled where lambda_min is 0.
        top = max(_rayleigh(matrix, v)[0] for v in vectors)
        vectors += _eigsh(lambda v: top * v - matrix(v), start, k, tolerance, max_products - matrix.products)
    return vectors


def _eigsh(
    product: Callable[[Tensor], Tensor], start: Tensor, k: int, tolerance: float, max_products: int
) -> list[Tensor]:
    """Return the eigenvectors of the k largest eigenvalues."""
    try:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
    except ImportError as error:
        raise InputError("sharpness needs scipy: pip install 'surefoot[measure]'") from error
    P = len(start)
    basis = min(P, 2 * k + 8)  # few enough to notice early that it has converged

    def matvec(v: np.ndarray) -> np.ndarray:
        return product(torch.from_numpy(v.ravel())).numpy()

    solve: Any = eigsh  # whose stub takes tol for an integer
    try:
        _, V = solve(
            LinearOperator((P, P), matvec=matvec, dtype="float64"),  # type: ignore[call-arg]
            k,
            which="LA",
            v0=start.numpy(),
            ncv=basis,
            tol=tolerance,
            maxiter=max(1, (max_products - basis) // (basis - k)),
        )
    except ArpackNoConvergence as error:
        raise InputError(
            f"max_products={max_products} were not enough: {len(error.eigenvalues)} of {k} eigenvalues have converged "
            f"to tolerance={tolerance:g}; raise either"
        ) from error
    return list(torch.from_numpy(V.T.copy()))


def _rayleigh(matrix: CurvatureMatrix, v: Tensor) -> tuple[float, float]:
    """Return the Rayleigh quotient of v and the norm of its residual."""
    v = v / torch.linalg.vector_norm(v)
    Hv = matrix(v)
    value = torch.dot(v, Hv)
    return value.item(), torch.linalg.vector_norm(Hv - value * v).item()


def _check_arguments(k: int, which: str, operator: str, tolerance: float, lr: float | None, max_products: int) -> None:
    if not isinstance(k, int) or k < 1:
        raise InputError(f"k={k!r} must be a positive integer")
    if which not in get_args(Which):
        raise InputError(f"which={which!r} is unknown; choose one of {get_args(Which)}")
    if operator not in get_args(Operator):
        raise InputError(f"operator={operator!r} is unknown; choose one of {get_args(Operator)}")
    if not (math.isfinite(tolerance) and tolerance > 0):
        raise InputError(f"tolerance={tolerance!r} must be positive, such as 1e-3")
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise InputError(f"lr={lr!r} must be positive, or None")
    if not isinstance(max_products, int) or max_products < 1:
        raise InputError(f"max_products={max_products!r} must be a positive integer")
