"""The tangent Gram in all its forms against plain per-sample autograd."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InputError
from surefoot.measure.capture import Network
from surefoot.measure.inputs import duplicates
from surefoot.measure.tangent import jacobian_transpose_product, tangent_gram


def jacobian(model: nn.Module, x: Tensor, params: list[str] | None = None) -> Tensor:
    """The twin: every output of every sample differentiated by itself, in float64: (n C, P)."""
    twin = copy.deepcopy(model).double()
    chosen = [p for name, p in twin.named_parameters() if params is None or name in params]
    rows = []
    for i in range(len(x)):
        out = twin(x[i : i + 1].double() if x.is_floating_point() else x[i : i + 1]).flatten()
        for number in out:
            grads = torch.autograd.grad(number, chosen, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(chosen, grads)])
            )
    return torch.stack(rows)


def relative(found: Tensor, right: Tensor) -> float:
    return float((found - right).abs().max() / right.abs().max())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.gain = nn.Parameter(torch.ones(8))  # no rule knows it
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head((self.block(self.tokens(ids)) * self.gain).mean(1))


def dense() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(9, 6)


def convolutional() -> tuple[nn.Module, Tensor]:
    layers = [nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * 9, 3)), torch.randn(7, 2, 5, 5)


def attention() -> tuple[nn.Module, Tensor]:
    return Attention().eval(), torch.randint(0, 11, (6, 5))


CASES = {"dense": dense, "convolutional": convolutional, "attention": attention}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    return CASES[request.param]()


def test_full_gram_is_the_product_of_the_jacobians(case: tuple[nn.Module, Tensor]) -> None:
    model, x = case
    J = jacobian(model, x)
    right = J @ J.T
    assert torch.linalg.matrix_rank(J) > len(x)  # not the same row over and over
    K = tangent_gram(model, x)
    assert K.dtype == torch.float64
    assert relative(K, right) < 1e-12
    assert torch.equal(K, K.T)
    for method in ("ghost", "materialise"):
        assert relative(tangent_gram(model, x, method=method), right) < 1e-12


@pytest.mark.parametrize("tile", [None, 4, 1])
def test_forms_are_parts_of_the_full_gram(case: tuple[nn.Module, Tensor], tile: int | None) -> None:
    model, x = case
    n, C = len(x), 3
    full = tangent_gram(model, x)
    four = full.view(n, C, n, C)
    tiled = tangent_gram(model, x, tile=tile)
    assert relative(tiled, full) < 1e-13
    assert torch.equal(tiled, tiled.T)

    by_class = tangent_gram(model, x, form="class blocks", tile=tile)
    assert relative(by_class, torch.stack([four[:, c, :, c] for c in range(C)])) < 1e-13
    assert torch.equal(by_class, by_class.mT)

    by_sample = tangent_gram(model, x, form="sample blocks", tile=tile)
    assert relative(by_sample, torch.stack([four[i, :, i] for i in range(n)])) < 1e-13
    assert torch.equal(by_sample, by_sample.mT)

    summed = tangent_gram(model, x, form="sum of outputs", tile=tile)
    assert relative(summed, four.sum((1, 3))) < 1e-13

    few = [2, 0]
    chosen = tangent_gram(model, x, classes=few, tile=tile)
    assert relative(chosen, four[:, few][..., few].reshape(2 * n, 2 * n)) < 1e-13
    chosen = tangent_gram(model, x, form="class blocks", classes=np.array(few), tile=tile)
    assert relative(chosen, by_class[few]) < 1e-13
    chosen = tangent_gram(model, x, form="sum of outputs", classes=few, tile=tile)
    assert relative(chosen, four[:, few][..., few].sum((1, 3))) < 1e-13

    split = n // 2
    cross = tangent_gram(model, x[:split], x[split:], tile=tile)
    assert relative(cross, full[: split * C, split * C :]) < 1e-13
    cross = tangent_gram(model, x[:split], x[split:], form="class blocks", tile=tile)
    assert relative(cross, by_class[:, :split, split:]) < 1e-13
    cross = tangent_gram(model, x[:split], x[split:], form="sum of outputs", tile=tile)
    assert relative(cross, summed[:split, split:]) < 1e-13


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_any_shape(n: int, m: int, C: int, tile: int, single: bool, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, C)).to(torch.float32 if single else torch.float64)
    x, y = torch.randn(n, 3), torch.randn(m, 3)
    J, J2 = jacobian(model, x), jacobian(model, y)
    assert relative(tangent_gram(model, x, tile=tile), J @ J.T) < 1e-12
    assert relative(tangent_gram(model, x, y, tile=tile), J @ J2.T) < 1e-12


def test_some_parameters_only() -> None:
    model, x = dense()
    J = jacobian(model, x, ["2.weight", "2.bias"])
    assert relative(tangent_gram(model, x, params=["2"]), J @ J.T) < 1e-12
    with pytest.raises(InputError, match=r"params='nowhere'"):
        tangent_gram(model, x, params=["nowhere"])


def test_one_number_a_sample_counts_as_one_output() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1), nn.Flatten(0))
    x = torch.randn(5, 4)
    J = jacobian(model, x)
    assert model(x).shape == (5,)
    assert relative(tangent_gram(model, x), J @ J.T) < 1e-12
    assert tangent_gram(model, x, form="sample blocks").shape == (5, 1, 1)


def test_leaves_no_trace() -> None:
    model, x = attention()
    model.tokens.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    tangent_gram(model, x, form="sum of outputs")
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert torch.equal(state, torch.get_rng_state())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["tokens.weight"]
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
    assert model.head.weight.grad.eq(1).all()


def test_random_numbers_of_a_refused_model_come_back() -> None:
    model = nn.Sequential(nn.Linear(3, 50), nn.Dropout(0.5), nn.Linear(50, 2))
    state = torch.get_rng_state()
    with pytest.raises(InputError, match=r"not deterministic"):
        tangent_gram(model, torch.randn(4, 3, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(state, torch.get_rng_state())


def test_jacobian_transpose_product() -> None:
    model, x = convolutional()
    J = jacobian(model, x)
    z = torch.randn(len(x), 3, dtype=torch.float64)
    x = x.double()
    network = Network(model, x)
    found = jacobian_transpose_product(network, x, z)
    assert [*found] == [name for name, _ in model.named_parameters()]
    assert relative(torch.cat([g.flatten() for g in found.values()]), J.T @ z.flatten()) < 1e-12
    assert not any(p.requires_grad for p in network.parameters.values())
    V = torch.randn(3, 2, dtype=torch.float64)
    combined = jacobian_transpose_product(Network(model, x, cotangents=V), x, z[:, :2])
    right = J.T @ (z[:, :2] @ V.T).flatten()
    assert relative(torch.cat([g.flatten() for g in combined.values()]), right) < 1e-12
    with pytest.raises(InputError, match=r"z of shape \(7, 2\) does not fit 7 samples with 3 outputs"):
        jacobian_transpose_product(network, x, z[:, :2])


def test_duplicates_are_named() -> None:
    x = torch.randn(6, 2, 3)
    assert duplicates(x) == []
    x[4], x[5], x[3] = x[1], x[1], x[0]
    assert duplicates(x) == [[0, 3], [1, 4, 5]]
    assert duplicates({"x": x, "ids": torch.arange(6)}) == []
    assert duplicates((x, torch.tensor([0, 0, 0, 1, 0, 7]))) == [[1, 4]]
    assert duplicates(torch.tensor([[0.0], [-0.0]])) == [[0, 1]]


class Constant(nn.Module):
    """Outputs that no parameter has a say in."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Spoilt(nn.Module):
    """Finite for all samples but those whose first number is negative."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * x[:, :1].sqrt()


def nan_weights() -> nn.Module:
    model = nn.Linear(4, 2)
    nn.init.constant_(model.weight, float("nan"))
    return model


GOOD = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "inputs", "options", "message"),
    [
        (nn.Linear(4, 2), torch.zeros(0, 4), {}, r"inputs of shape \(0, 4\) hold no sample"),
        (nn.Linear(4, 2), torch.full((2, 4), torch.nan), {}, r"NaN or infinite numbers in 2 samples"),
        (nn.Linear(4, 2), "words", {}, r"inputs of type str hold no tensor"),
        (nn.Linear(4, 2), torch.ones(3, 4, dtype=torch.long), {}, r"inputs: .* int64 of shape \(2, 4\).*floats"),
        (nn.Embedding(5, 2), torch.zeros(3, 2), {}, r"inputs: .* float64 of shape \(2, 2\).*token ids"),
        (nn.Embedding(5, 2), torch.full((3, 2), 7), {}, r"inputs: .*int64.*out of range"),
        (nn.Linear(4, 2), torch.zeros(3, 5), {}, r"inputs: .*float64 of shape \(2, 5\)"),
        (nn.Linear(4, 2), GOOD, {"other": torch.zeros(3, 5)}, r"other: .*float64 of shape \(2, 5\)"),
        (nn.Conv1d(1, 1, 1), torch.ones(3, 1, 4), {"other": torch.ones(3, 1, 5)}, r"other: .* 5 outputs .* inputs 4"),
        (nn.Linear(4, 2), GOOD, {"output": lambda found: "none"}, r"output= gives str"),
        (nn.Linear(4, 2), GOOD, {"output": lambda found: found.argmax(1)}, r"output= gives torch.int64"),
        (nn.Linear(4, 2), GOOD, {"output": lambda found: found.mean()}, r"the samples have to be in front"),
        (nn.LSTM(4, 2), GOOD, {"output": lambda found: found}, r"output= gives tuple"),
        (nan_weights(), GOOD, {}, r"outputs are NaN or infinite for finite inputs"),
        (nn.Linear(4, 2).requires_grad_(False), GOOD, {}, r"no parameter requires a gradient"),
        (Constant(), GOOD, {}, r"depend on none of the chosen parameters"),
        (nn.Linear(4, 2), GOOD, {"form": "half"}, r"form='half' is no form"),
        (nn.Linear(4, 2), GOOD, {"form": "sample blocks", "other": GOOD}, r"other= has no sample blocks"),
        (nn.Linear(4, 2), GOOD, {"method": "magic"}, r"method='magic'"),
        (nn.Linear(4, 2), GOOD, {"classes": [2]}, r"classes=\[2\] .* 0 \.\. 1"),
        (nn.Linear(4, 2), GOOD, {"classes": []}, r"classes=\[\]"),
        (nn.Linear(4, 2), GOOD, {"classes": [1, 1]}, r"classes=\[1, 1\]"),
        (nn.Linear(4, 2), GOOD, {"classes": [0.0]}, r"classes=\[0.0\]"),
        (nn.Linear(4, 2), GOOD, {"tile": 0}, r"tile=0"),
        (nn.Linear(4, 2), GOOD, {"max_memory": "lots"}, r"max_memory='lots'"),
        (nn.Linear(4, 2), GOOD, {"max_memory": 0}, r"max_memory=0"),
        (
            nn.Linear(4, 2),
            GOOD,
            {"max_memory": "300 B"},
            r"5 samples with 2 outputs take 800 bytes, and about 3 samples",
        ),
        (nn.Linear(4, 2), GOOD, {"max_memory": "850 B"}, r"tile of a single sample and the result take"),
        (nn.Linear(4, 2), GOOD, {"path": "no/such/folder/K.npy"}, r"there is no folder 'no/such/folder'"),
        (nn.Linear(4, 2), GOOD, {"path": "."}, r"is a folder"),
    ],
    ids=lambda value: value.replace(" ", "-")[:40] if isinstance(value, str) else "",
)
def test_refuses_what_makes_no_sense(model: nn.Module, inputs: Tensor, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tangent_gram(model, inputs, **options)


def test_the_models_own_error_is_kept() -> None:
    with pytest.raises(InputError) as caught:
        tangent_gram(nn.Linear(4, 2), torch.ones(3, 4, dtype=torch.long))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_gram_with_nan_is_not_handed_out() -> None:
    x = torch.rand(8, 2) + 0.1
    assert tangent_gram(Spoilt(), x).isfinite().all()
    x[6, 0] = -1.0
    with pytest.raises(InputError, match=r"some of the samples 0 \.\. 3 or 4 \.\. 7"):
        tangent_gram(Spoilt(), x, tile=4)


def test_inputs_as_keyword_arguments_and_logits() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

        def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
            return {"logits": F.silu(self.a(x) + self.b(y)) * scale}

    model, x, y = Two(), torch.randn(5, 3), torch.randn(5, 2)
    named = tangent_gram(model, {"y": y, "x": x, "scale": 2.0}, tile=2)
    assert relative(named, 4 * tangent_gram(model, (x, y))) < 1e-13
