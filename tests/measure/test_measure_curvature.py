"""The curvature products against explicit float64 matrices by torch.func, and what sharpness makes of them."""

import builtins
import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy, mse_loss

from surefoot.errors import InputError
from surefoot.measure.curvature import DENSE, CurvatureMatrix, sharpness
from surefoot.measure.objective import Objective

F64 = torch.float64


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.out = nn.Embedding(7, 4), nn.Linear(4, 12), nn.Linear(4, 3)
        self.norm = nn.LayerNorm(4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        return self.out((x + nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(x)[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def cnn() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    )
    model(torch.randn(8, 1, 6, 6))  # running statistics that are not 0 and 1
    return model.eval()


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    logp = outputs.log_softmax(-1).gather(1, targets[:, None])
    return -((1 - logp.exp()) ** 2 * logp).mean()


def labels(n: int, classes: int = 3) -> Tensor:
    return torch.arange(n) % classes


CASES: dict[str, Callable[[], tuple[nn.Module, Any, Any, Tensor]]] = {
    "mlp mse": lambda: (mlp(), mse_loss, torch.randn(7, 4, dtype=F64), torch.randn(7, 3, dtype=F64)),
    "mlp cross-entropy": lambda: (mlp(), cross_entropy, torch.randn(7, 4, dtype=F64), labels(7)),
    "mlp own loss": lambda: (mlp(), focal, torch.randn(7, 4, dtype=F64), labels(7)),
    "cnn": lambda: (cnn(), cross_entropy, torch.randn(5, 1, 6, 6, dtype=F64), labels(5)),
    "attention": lambda: (Attention(), cross_entropy, torch.randint(7, (6, 4)), labels(6)),
    "lstm": lambda: (Recurrent(), mse_loss, torch.randn(5, 3, 2, dtype=F64), torch.randn(5, 2, dtype=F64)),
    "tied": lambda: (Tied(), mse_loss, torch.randn(5, 4, dtype=F64), torch.randn(5, 4, dtype=F64)),
}


def jacrev2(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return jacrev(jacrev(f))


def explicit(model: nn.Module, loss_fn: Any, x: Any, y: Tensor, operator: str) -> Tensor:
    """The matrix by torch.func, entry by entry: (P, P)."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in weights.values()]

    def outputs(flat: Tensor) -> Tensor:
        parts = {name: part.view_as(weights[name]) for name, part in zip(weights, flat.split(sizes))}
        with sdpa_kernel(SDPBackend.MATH):
            return functional_call(model, parts, (x,))

    flat = torch.cat([p.reshape(-1) for p in weights.values()])
    if operator == "hessian":
        return jacrev2(lambda w: loss_fn(outputs(w), y))(flat)
    z = outputs(flat)
    J = jacrev(outputs)(flat).flatten(0, -2)
    inner = jacrev2(lambda v: loss_fn(v.view_as(z), y))(z.flatten())
    return J.T @ inner @ J


def assembled(matrix: CurvatureMatrix) -> Tensor:
    return torch.stack([matrix(e) for e in torch.eye(matrix.objective.size, dtype=F64)], 1)


def by_differences(model: nn.Module, loss_fn: Any, x: Any, y: Tensor) -> Tensor:
    """The Hessian by central differences of the gradient, extrapolated to step 0: right to about 1e-10."""
    flat = nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    def g(w: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(w, model.parameters())
        return nn.utils.parameters_to_vector(torch.autograd.grad(loss_fn(model(x), y), list(model.parameters())))

    def differences(h: float) -> Tensor:
        return torch.stack([(g(flat + h * e) - g(flat - h * e)) / (2 * h) for e in torch.eye(len(flat), dtype=F64)])

    found = (4 * differences(1e-4) - differences(2e-4)) / 3
    g(flat)
    return found


@pytest.mark.parametrize("operator", ["hessian", "gauss-newton"])
@pytest.mark.parametrize("case", CASES)
def test_products_are_those_of_the_explicit_matrix(case: str, operator: Any) -> None:
    model, loss_fn, x, y = CASES[case]()
    model = model.double()
    if case == "attention" and operator == "hessian":
        model.norm.weight.requires_grad_(False)  # whose second derivative torch 2.13's torch.func gets wrong
    right = explicit(model, loss_fn, x, y, operator)
    found = assembled(CurvatureMatrix(Objective(model, loss_fn, (x, y)), operator))
    assert right.abs().max() > 1e-3
    assert torch.allclose(found, right, rtol=0, atol=1e-12)
    if operator == "gauss-newton":
        curved = explicit(model, loss_fn, x, y, "hessian")
        assert (curved - right).abs().max() > 1e-3 * right.abs().max(), "the network is curved"


@pytest.mark.parametrize("case", CASES)
def test_products_are_differences_of_gradients(case: str) -> None:
    model, loss_fn, x, y = CASES[case]()
    model = model.double()
    found = assembled(CurvatureMatrix(Objective(model, loss_fn, (x, y))))
    assert torch.allclose(found, by_differences(model, loss_fn, x, y), rtol=0, atol=1e-8)


# ---------------------------------------------------------------------------------------------- what is differentiated


def test_frozen_parameters_are_left_out() -> None:
    model, data = mlp().double(), (torch.randn(7, 4, dtype=F64), labels(7))
    model[0].requires_grad_(False)  # type: ignore[index]
    objective = Objective(model, cross_entropy, data)
    assert objective.names == ["2.weight", "2.bias"]
    right = explicit(model, cross_entropy, *data, "hessian")
    assert right.shape == (21, 21)
    assert torch.allclose(assembled(CurvatureMatrix(objective)), right, rtol=0, atol=1e-14)


@pytest.mark.parametrize("by_name", [True, False])
def test_chosen_parameters_alone_even_frozen_ones(by_name: bool) -> None:
    model, data = mlp().double(), (torch.randn(7, 4, dtype=F64), labels(7))
    model.requires_grad_(False)
    params = ["0"] if by_name else list(model[0].parameters())  # type: ignore[index]
    found = assembled(CurvatureMatrix(Objective(model, cross_entropy, data, params=params)))
    assert not any(p.requires_grad for p in model.parameters())
    model.requires_grad_(True)
    assert torch.allclose(found, explicit(model, cross_entropy, *data, "hessian")[:30, :30], rtol=0, atol=1e-14)


@pytest.mark.parametrize("operator", ["hessian", "gauss-newton"])
def test_batches_and_rows_equal_the_whole(operator: Any) -> None:
    model, x, y = mlp().double(), torch.randn(11, 4, dtype=F64), labels(11)
    v = torch.randn(51, dtype=F64)
    whole = CurvatureMatrix(Objective(model, cross_entropy, (x, y)), operator)(v)
    assert whole.norm() > 0.1
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    for data, rows in (((x, y), 4), (batches, None), (batches, 2), (iter(batches), None)):
        found = CurvatureMatrix(Objective(model, cross_entropy, data, rows=rows), operator)(v)
        assert torch.allclose(found, whole, rtol=0, atol=1e-14)


def test_a_loader_is_read_once_and_inputs_come_in_any_form() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(2, 3), nn.Linear(2, 3)

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"logits": self.left(a) * self.right(b)}

    model, a, b, y = TwoInputs(), torch.randn(8, 2), torch.randn(8, 2), labels(8)
    v = torch.randn(18, dtype=F64)
    right = CurvatureMatrix(Objective(model, cross_entropy, ((a, b), y)))(v)
    named = CurvatureMatrix(Objective(model, cross_entropy, ({"a": a, "b": b}, y), rows=3))(v)
    assert torch.allclose(named, right, atol=1e-6)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.cat([a, b], 1), y), 3, shuffle=True)
    flat = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    state = torch.get_rng_state()
    found = sharpness(flat, cross_entropy, loader, dtype=F64)
    assert torch.equal(torch.get_rng_state(), state)
    whole = sharpness(flat, cross_entropy, [torch.cat([a, b], 1), y], dtype=F64)  # a list, as a loader's batch is
    assert found.samples == whole.samples == 8
    assert found.value == pytest.approx(whole.value, rel=1e-10)


# ------------------------------------------------------------------------------------------------- the eigenvalues


class Quadratic(nn.Module):
    """f(w) = w^T A w / 2 + b^T w."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.w, self.A = nn.Parameter(torch.randn(len(A), dtype=A.dtype)), A

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.w @ self.A @ self.w / 2 + self.w.sum())


def mean(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.mean()


ONE = torch.ones(1, dtype=F64), torch.ones(1, dtype=F64)


def rotated(eigenvalues: Tensor) -> Tensor:
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), dtype=F64)).Q
    return Q @ torch.diag(eigenvalues) @ Q.T


@pytest.mark.parametrize("P", [30, DENSE, DENSE + 1, 300])
@pytest.mark.parametrize("which", ["largest", "both ends"])
def test_known_quadratics(P: int, which: Any) -> None:
    eigenvalues = torch.cat(
        [torch.tensor([-7.0, -3.0, 10.0, 20.0], dtype=F64), torch.linspace(-1, 1, P - 4, dtype=F64)]
    )
    found = sharpness(Quadratic(rotated(eigenvalues)), mean, ONE, k=2, which=which, tolerance=1e-9)
    right = [20.0, 10.0] + ([-3.0, -7.0] if which == "both ends" else [])
    assert found.details["eigenvalues"] == pytest.approx(right, rel=1e-8)
    assert found.value == found.details["eigenvalues"][0]
    assert found.error is not None
    assert found.error == found.details["residuals"][0] < 1e-6
    assert (found.kind, found.level, found.samples) == ("estimate", "estimate", 1)
    assert found.seed == (None if P <= DENSE else 0)
    if P <= DENSE:
        assert found.details["products"] == P + len(right)


def test_the_error_holds_and_the_value_is_below() -> None:
    eigenvalues = torch.linspace(0, 1, 400, dtype=F64)  # no gap to speak of
    model = Quadratic(rotated(eigenvalues))
    for tolerance in (0.3, 1e-1, 1e-2, 1e-3):
        found = sharpness(model, mean, ONE, tolerance=tolerance)
        assert found.error is not None
        assert 0 < found.error <= 1.001 * tolerance
        assert found.value <= 1 + 1e-12
        assert (eigenvalues - found.value).abs().min() <= found.error


def test_both_ends_of_a_singular_matrix() -> None:
    model, x = nn.Linear(250, 1).double(), torch.randn(5, 250, dtype=F64)
    found = sharpness(model, mse_loss, (x, torch.zeros(5, 1, dtype=F64)), which="both ends", operator="gauss-newton")
    X = torch.cat([x, torch.ones(5, 1, dtype=F64)], 1)
    top = torch.linalg.eigvalsh(X @ X.T)[-1].item() * 2 / 5
    assert found.details["eigenvalues"] == pytest.approx([top, 0], rel=1e-5, abs=1e-3 * top)


@pytest.mark.parametrize("width", [2, 200])
@pytest.mark.parametrize("operator", ["hessian", "gauss-newton"])
def test_a_linear_loss_has_no_curvature(width: int, operator: Any) -> None:
    model = nn.Linear(width, 2)
    found = sharpness(model, mean, (torch.randn(3, width), torch.zeros(3)), operator=operator, k=2)
    assert found.value == found.error == 0
    assert found.details["eigenvalues"] == [0, 0]


def test_multiple_eigenvalues_of_a_small_matrix() -> None:
    found = sharpness(Quadratic(torch.eye(6, dtype=F64) * 4), mean, ONE, k=6)
    assert found.details["eigenvalues"] == pytest.approx([4] * 6)


def test_lr_is_put_beside_two() -> None:
    found = sharpness(Quadratic(rotated(torch.arange(1, 11, dtype=F64))), mean, ONE, lr=0.3)
    assert found.details["sharpness_times_lr"] == pytest.approx(3.0)
    assert found.details["edge_of_stability"] == 2
    assert "sharpness x lr = 3, beside 2" in str(found)
    assert "lr" not in sharpness(Quadratic(torch.eye(2, dtype=F64)), mean, ONE).details


def test_float32_says_so_and_float64_is_finer() -> None:
    model, data = mlp(), (torch.randn(7, 4), labels(7))
    coarse, fine = sharpness(model, cross_entropy, data), sharpness(model, cross_entropy, data, dtype=F64)
    assert (coarse.dtype, fine.dtype) == ("float32", "float64")
    assert coarse.error is not None
    assert fine.error is not None
    assert fine.error < 1e-12 < coarse.error
    assert coarse.value == pytest.approx(fine.value, rel=1e-5)
    half = sharpness(copy.deepcopy(model).bfloat16(), cross_entropy, (data[0].bfloat16(), data[1]))
    assert half.dtype == "float32"
    assert half.value == pytest.approx(fine.value, rel=0.1)


def test_the_same_seed_gives_the_same_number() -> None:
    model = Quadratic(rotated(torch.linspace(0, 1, 300, dtype=F64)))
    first, again, other = (sharpness(model, mean, ONE, tolerance=0.1, seed=s) for s in (3, 3, 4))
    assert first == again
    assert first.value != other.value
    assert type(first).from_json(first.to_json()) == first


# ------------------------------------------------------------------------------------------------------ no trace


def test_nothing_is_left_behind() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(32, 3))
    x, y = torch.randn(6, 1, 6, 6), labels(6)
    cross_entropy(model(x), y).backward()
    model[4].bias.requires_grad_(False)  # type: ignore[union-attr]
    model[1].eval()
    model[1].train()

    def snapshot() -> list[Any]:
        return [
            *[
                t.detach().clone()
                for t in (*model.state_dict().values(), *(p.grad for p in model.parameters()))
                if t is not None
            ],
            [p.requires_grad for p in model.parameters()],
            [p._version for p in model.parameters()],
            [m.training for m in model.modules()],
            [len(m._forward_hooks) for m in model.modules()],
            torch.get_rng_state(),
            np.random.get_state()[1],
            random.getstate(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.mha.get_fastpath_enabled(),
        ]

    grads = [p.grad for p in model.parameters()]
    before = snapshot()
    with torch.no_grad():
        for operator in ("hessian", "gauss-newton"):
            sharpness(model, cross_entropy, [(x[:3], y[:3]), (x[3:], y[3:])], operator=operator)  # type: ignore[arg-type]
    after = snapshot()
    assert all(p.grad is g for p, g in zip(model.parameters(), grads))
    assert len(before) == len(after) > 15
    for a, b in zip(before, after):
        assert (
            torch.equal(a, b)
            if isinstance(a, Tensor)
            else np.array_equal(a, b)
            if isinstance(a, np.ndarray)
            else a == b
        )


def test_batch_norm_is_measured_in_the_mode_it_is_in() -> None:
    model, x, y = cnn().double(), 3 + torch.randn(5, 1, 6, 6, dtype=F64), labels(5)
    evaluated = sharpness(model, cross_entropy, (x, y)).value
    assert evaluated == pytest.approx(torch.linalg.eigvalsh(explicit(model, cross_entropy, x, y, "hessian"))[-1].item())
    model.train()
    trained = sharpness(model, cross_entropy, (x, y)).value
    assert trained != pytest.approx(evaluated, rel=0.05)
    right = torch.linalg.eigvalsh(by_differences(model, cross_entropy, x, y))[-1].item()
    assert trained == pytest.approx(right, rel=1e-8)


def test_a_compiled_model_is_measured() -> None:
    model, data = mlp(), (torch.randn(7, 4), labels(7))
    assert sharpness(torch.compile(model, backend="eager"), cross_entropy, data) == sharpness(
        model, cross_entropy, data
    )  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- bad input


def good() -> dict[str, Any]:
    return {"model": mlp(), "loss_fn": cross_entropy, "data": (torch.randn(4, 4), labels(4))}


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 2


class OnceLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)  # type: ignore[no-any-return]


X, Y = torch.randn(4, 4), labels(4)
DROPOUT = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout(0.5)), nn.Linear(4, 3))
BAD: list[tuple[dict[str, Any], str]] = [
    ({"data": []}, "data=list is empty"),
    ({"data": X}, "data=Tensor has no targets"),
    ({"data": 3}, "data=int has no targets"),
    ({"data": torch.utils.data.TensorDataset(X, Y)}, "DataLoader"),
    ({"data": [(X, Y), (X, Y, Y)]}, "batch 1 is a tuple"),
    ({"data": (X[:0], Y[:0])}, "batch 0 holds no sample"),
    ({"data": (torch.randn(4, 5), Y)}, r"inputs of shape \(4, 5\) in float32"),
    ({"data": (X, Y[:3])}, r"targets of shape \(3,\) in int64"),
    ({"data": [(X, Y), (X, Y[:3])]}, "batch 1 has 4 samples and 3 targets"),
    ({"data": (X.double(), Y)}, "float64"),
    ({"data": [(X, Y), (X / 0, Y)]}, "nan on batch 1"),
    ({"loss_fn": lambda z, y: z.sum(1)}, r"a tensor of shape \(4,\); it must return a scalar"),
    ({"loss_fn": lambda z, y: 3.0}, "returns a float"),
    ({"loss_fn": lambda z, y: (z.sum() * 0 - 1).log()}, "loss_fn returns nan on batch 0"),
    ({"loss_fn": lambda z, y: z.sum().detach()}, "does not depend"),
    ({"loss_fn": nn.CrossEntropyLoss(reduction="sum"), "rows": 2}, "sums over the samples"),
    ({"loss_fn": lambda z, y: (z - z.detach()).square().sum().sqrt()}, "NaN or infinite"),
    ({"model": mlp().requires_grad_(False)}, "no parameter requires a gradient"),
    ({"params": ["nothing"]}, "params='nothing'"),
    ({"model": DROPOUT}, r"in train mode: 1\.0 \(Dropout\)"),
    ({"model": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "rows": 2}, "rows=2 would change .*: 1; call"),
    ({"model": nn.Sequential(nn.Linear(4, 4), OnceLayer(), nn.Linear(4, 3))}, "cannot be differentiated twice"),
    ({"k": 0}, "k=0"),
    ({"k": 52}, "k=52"),
    ({"k": 26, "which": "both ends"}, "k=26"),
    ({"model": nn.Linear(4, 60), "k": 300}, "k=300"),
    ({"which": "smallest"}, "which='smallest'"),
    ({"operator": "fisher"}, "operator='fisher'"),
    (
        {"output": lambda z: (z, z), "loss_fn": lambda z, y: z[0].mean(), "operator": "gauss-newton"},
        "output gives a tuple",
    ),
    ({"tolerance": 0.0}, "tolerance=0.0"),
    ({"tolerance": float("nan")}, "tolerance=nan"),
    ({"lr": -1.0}, "lr=-1.0"),
    ({"rows": 0}, "rows=0"),
    ({"dtype": torch.float16}, "dtype=torch.float16"),
    ({"max_products": 0}, "max_products=0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        sharpness(**(good() | changes))


def test_the_good_input_is_good() -> None:
    assert sharpness(**good()).value > 0


def test_what_has_not_converged_is_refused() -> None:
    model = Quadratic(rotated(torch.linspace(0, 1, 400, dtype=F64)))
    with pytest.raises(InputError, match="max_products=30 were not enough: 0 of 1"):
        sharpness(model, mean, ONE, tolerance=1e-12, max_products=30)


def test_without_scipy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InputError, match=r"surefoot\[measure\]"):
        sharpness(Quadratic(rotated(torch.linspace(0, 1, 300, dtype=F64))), mean, ONE)
