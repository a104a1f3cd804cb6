"""Every rule against autograd: by each method, batched as one by one, with cross terms where weights are shared."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rules_reference import Net, Readout, assert_exact, difference, jacobian, naive_gram, randomise
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InputError
from surefoot.measure.capture import Network
from surefoot.measure.contraction import Outer
from surefoot.measure.rules import RULES, Use, bias_rows, outer, rule
from surefoot.measure.tangent import tangent_gram

randn = torch.randn


def alone(module: nn.Module, outputs: int = 2) -> nn.Module:
    """The module as the only one with parameters."""
    return randomise(nn.Sequential(module, Readout(outputs)))


# --------------------------------------------------------------------------------------------------- dense, biases


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 2)])
def test_linear(shape: tuple[int, ...], bias: bool) -> None:
    assert_exact(alone(nn.Linear(3, 4, bias=bias)), randn(4, *shape, 3))


@pytest.mark.parametrize("outputs", [1, 5])
def test_layers_in_a_row_and_any_number_of_outputs(outputs: int) -> None:
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, outputs))
    assert_exact(randomise(model), randn(6, 3))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Linear(3, 4), Readout()), randn(4, 3)),
        (nn.Sequential(nn.Linear(3, 4), Readout()), randn(4, 5, 3)),
        (nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), Readout()), randn(4, 2, 5, 4)),
        (nn.Sequential(nn.ConvTranspose1d(2, 3, 3, stride=2), Readout()), randn(4, 2, 5)),
        (nn.Sequential(nn.LayerNorm(3), Readout()), randn(4, 3)),
    ],
)
def test_a_bias_or_a_weight_alone(model: nn.Module, x: Tensor) -> None:
    model = randomise(model)
    whole = naive_gram(model, x)
    bias = assert_exact(model, x, params=["0.bias"])
    weight = assert_exact(model, x, params=["0.weight"])
    assert difference(bias + weight, whole) < 1e-13


# ------------------------------------------------------------------------------------------------- convolutions

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
SIZES = {1: (9,), 2: (6, 5), 3: (4, 3, 4)}


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"stride": 2},
        {"padding": 1},
        {"padding": "same"},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        {"dilation": 2, "padding": 2},
        {"groups": 2},
        {"groups": 4, "padding": 1, "stride": 2},
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 1, "padding_mode": "reflect", "stride": 2},
        {"padding": 2, "padding_mode": "replicate", "groups": 2},
        {"padding": "same", "padding_mode": "reflect"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # one-sided: worth a test
def test_convolution(d: int, options: dict[str, Any]) -> None:
    kernel = 2 if options.get("padding") == "same" else 3 if d < 3 or options.get("padding") else 2
    kernel = 2 if d == 3 and options.get("dilation") else kernel
    model = alone(CONVOLUTIONS[d](4, 4, kernel, **options))
    assert_exact(model, randn(3, 4, *SIZES[d]))


@pytest.mark.parametrize("d", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"stride": 2, "output_padding": 1},
        {"stride": 3, "padding": 1, "output_padding": 2},
        {"padding": 1},
        {"padding": 2},
        {"dilation": 2, "padding": 1},
        {"groups": 2, "stride": 2},
        {"groups": 2, "dilation": 2, "output_padding": 1},
    ],
    ids=str,
)
def test_transposed_convolution(d: int, options: dict[str, Any]) -> None:
    assert_exact(alone(TRANSPOSED[d](4, 2, 3, **options)), randn(3, 4, *[4, 3, 3][:d]))


def test_transposed_convolution_to_a_wanted_size() -> None:
    model = randomise(Net(lambda up, x: up(x, output_size=[10, 9]), nn.ConvTranspose2d(2, 3, 3, stride=2)))
    assert_exact(model, randn(3, 2, 4, 4))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[int, dict[str, Any], tuple[int, ...]]:
    d = draw(st.integers(1, 3))
    several = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(d))  # noqa: E731
    groups = draw(st.integers(1, 2))
    options = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": several(1, 3),
        "stride": several(1, 3),
        "padding": several(0, 2),
        "dilation": several(1, 2),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    return d, options, several(2, 7 - d)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(geometries(), st.sampled_from(["zeros", "circular", "reflect", "replicate"]))
def test_convolution_of_any_geometry(geometry: Any, mode: str) -> None:
    d, options, size = geometry
    for s, k, p, r in zip(size, options["kernel_size"], options["padding"], options["dilation"]):
        assume(s + 2 * p >= r * (k - 1) + 1)
        assume(p < s)  # reflect and circular want that
    assert_exact(alone(CONVOLUTIONS[d](**options, padding_mode=mode)), randn(3, options["in_channels"], *size))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(geometries(), st.data())
def test_transposed_convolution_of_any_geometry(geometry: Any, data: st.DataObject) -> None:
    d, options, size = geometry
    most = [max(s, r) - 1 for s, r in zip(options["stride"], options["dilation"])]
    options["output_padding"] = tuple(data.draw(st.integers(0, m)) for m in most)
    for i, k, s, p, r, o in zip(
        size, *(options[name] for name in ("kernel_size", "stride", "padding", "dilation", "output_padding"))
    ):
        assume((i - 1) * s - 2 * p + r * (k - 1) + o >= 0)
    x = randn(3, options["in_channels"], *size)
    model = alone(TRANSPOSED[d](**options))
    assume(jacobian(model, x)["0.weight"].abs().max() > 0)  # all of it may be cropped
    assert_exact(model, x)


# ----------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"padding_idx": -1}, {"sparse": True}], ids=str)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_embedding(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    model = randomise(Net(lambda e, x: e(x).flatten(1), nn.Embedding(5, 3, **options)))
    ids = torch.randint(0, 5, (6, *shape))
    ids.flatten()[:2] = torch.tensor([0, 4])  # the padding occurs
    assert_exact(model, ids)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=str)
@pytest.mark.parametrize("module", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_whose_gradient_is_no_derivative_is_refused(module: Any, option: dict[str, Any]) -> None:
    model = Net(lambda e, dense, x: dense(e(x)), module(5, 3, **option), nn.Linear(3, 2))
    ids = torch.randint(0, 5, (4, 6))
    (name,) = option
    with pytest.raises(InputError, match=f"{module.__name__} with {name}=.*leave the embedding out of params"):
        tangent_gram(model, ids)
    assert_exact(model, ids, params=["parts.1.weight", "parts.1.bias"])  # it is a function of the other parameters


# -------------------------------------------------------------------------------------------------- norms and gains


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4), (4, 3)),
        (nn.BatchNorm2d(4), (4, 3, 2)),
        (nn.BatchNorm3d(4), (4, 3, 2, 2)),
        (nn.SyncBatchNorm(4), (4, 3)),
        (nn.LayerNorm(4), (4,)),
        (nn.LayerNorm(4), (3, 4)),
        (nn.LayerNorm(4, bias=False), (3, 2, 4)),
        (nn.LayerNorm((3, 4)), (3, 4)),
        (nn.LayerNorm((3, 4)), (2, 3, 4)),
        (nn.RMSNorm(4), (4,)),
        (nn.RMSNorm((3, 4), eps=0.1), (2, 3, 4)),
        (nn.GroupNorm(2, 4), (4,)),
        (nn.GroupNorm(2, 4), (4, 3, 2)),
        (nn.GroupNorm(4, 4), (4, 5)),
        (nn.InstanceNorm1d(4, affine=True), (4, 5)),
        (nn.InstanceNorm2d(4, affine=True), (4, 3, 2)),
        (nn.InstanceNorm3d(4, affine=True), (4, 3, 2, 2)),
        (nn.InstanceNorm2d(4, affine=True, track_running_stats=True), (4, 3, 2)),
        (nn.PReLU(), (4,)),
        (nn.PReLU(), (4, 3, 2)),
        (nn.PReLU(4), (4,)),
        (nn.PReLU(4), (4, 3, 2)),
    ],
    ids=str,
)
def test_norms_and_gains(module: nn.Module, shape: tuple[int, ...]) -> None:
    assert_exact(alone(module).eval(), randn(4, *shape))


def test_a_gradient_that_is_zero_but_for_rounding_is_no_reason_to_distrust_a_rule() -> None:
    model = randomise(nn.Sequential(nn.Conv2d(2, 4, 2), nn.InstanceNorm2d(4, affine=True), Readout()))
    x = randn(4, 2, 4, 4)
    assert 0 < jacobian(model, x)["0.bias"].abs().max() < 1e-14  # the norm takes the convolution's bias away
    assert_exact(model, x)


# --------------------------------------------------------------------------------------------------- shared weights


def without_cross_terms(model: nn.Module, x: Tensor, split: Any) -> Tensor:
    """The naive Gram if every use of a weight were a weight of its own: `split` returns such a model."""
    return naive_gram(split(model), x)


def twice(module: Any, x: Tensor) -> Tensor:
    return module(torch.tanh(module(x)))


SHARED = {
    "linear": (lambda: nn.Linear(3, 3), (4, 3)),
    "linear with places": (lambda: nn.Linear(3, 3), (4, 2, 3)),
    "convolution": (lambda: nn.Conv2d(2, 2, 3, padding=1), (4, 2, 4, 4)),
    "grouped": (lambda: nn.Conv1d(4, 4, 3, padding=1, groups=2), (4, 4, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 2, 3, padding=1), (4, 2, 5)),
    "layer norm": (lambda: nn.LayerNorm(3), (4, 2, 3)),
    "prelu": (lambda: nn.PReLU(init=-0.3), (4, 3)),
}


@pytest.mark.parametrize("which", list(SHARED))
def test_a_module_used_twice(which: str) -> None:
    make, shape = SHARED[which]
    model, x = randomise(Net(twice, make())), randn(*shape).double()
    right = assert_exact(model, x)
    apart = Net(lambda one, other, x: other(torch.tanh(one(x))), make(), make()).double()
    for part in apart.parts:
        part.load_state_dict(model.get_submodule("parts.0").state_dict())
    assert torch.equal(apart(x), model(x))
    assert difference(naive_gram(apart, x), right) > 1e-3  # cross terms matter here


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3)])
def test_a_weight_shared_between_modules(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), Readout())
    model = randomise(model)
    apart = naive_gram(model, randn(*shape))
    model[2].weight = model[0].weight  # the biases stay two
    x = randn(*shape)
    right = assert_exact(model, x)
    assert difference(apart, right) > 1e-3
    assert len(dict(model.named_parameters())) == 3


def test_only_the_bias_is_shared() -> None:
    model = randomise(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), Readout()))
    model[2].bias = model[0].bias
    assert_exact(model, randn(4, 3))


def test_an_embedding_tied_to_the_output_layer() -> None:
    embedding, head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    head.weight = embedding.weight
    model = randomise(Net(lambda e, h, x: h(torch.tanh(e(x)).mean(1)), embedding, head, outputs=3))
    ids = torch.randint(0, 5, (5, 4))
    J = jacobian(model, ids)
    assert_exact(model, ids)
    assert list(J) == ["parts.0.weight"]


def test_a_convolution_seen_by_two_sizes_of_image() -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    model = randomise(Net(lambda c, x: F.avg_pool2d(c(x), 2) * c(F.avg_pool2d(x, 2)), conv))
    assert_exact(model, randn(4, 2, 4, 4))


def test_a_weight_used_transposed_elsewhere() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.readout = nn.Linear(4, 3), Readout()

        def forward(self, x: Tensor) -> Tensor:
            return self.readout(F.linear(torch.tanh(self.down(x)), self.down.weight.T))

    # The second use is no module's: autograd tells, and per-sample gradients take over.
    assert_exact(randomise(Autoencoder()), randn(4, 4), fallback=["down.weight"])


# ------------------------------------------------------------------------------- what happens around the modules


def test_outputs_overwritten_in_place() -> None:
    def careless(one: Any, two: Any, x: Tensor) -> Tensor:
        h = one(x)
        F.relu_(h)
        return two(h).mul_(h).add_(1.0)

    assert_exact(randomise(Net(careless, nn.Linear(3, 4), nn.Linear(4, 4))), randn(4, 3))


def test_an_input_overwritten_after_its_use() -> None:
    """Autograd keeps a copy where it needs one; a rule that kept the input itself would see the wrong numbers."""

    def overwrite(norm: Any, x: Tensor) -> Tensor:
        x = x * 1.0
        z = norm(x)
        with torch.no_grad():
            x.add_(1.0)
        return z

    class OwnNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x.clone() * self.weight

    try:

        @rule(OwnNorm)
        def own_norm(module: Any, x: Tensor, output: Tensor) -> list[Use]:
            return [Use("weight", lambda B: bias_rows(B * x, output.dim() - 1))]

        assert_exact(randomise(Net(overwrite, OwnNorm())), randn(4, 3, 4))
    finally:
        del RULES[OwnNorm.forward]


@pytest.mark.parametrize("T", [3, 5, 6])
def test_samples_behind_the_places(T: int) -> None:
    """Samples are recognised in the second dimension too, also where T is a multiple of their number."""
    model = Net(lambda dense, norm, x: norm(dense(x.transpose(0, 1))).transpose(0, 1), nn.Linear(3, 4), nn.LayerNorm(4))
    assert_exact(randomise(model), randn(T, T, 3))
    assert_exact(randomise(model), randn(2, T, 3))


def test_places_folded_into_the_samples() -> None:
    model = Net(lambda dense, x: dense(x.flatten(0, 1)).unflatten(0, x.shape[:2]), nn.Linear(3, 4))
    assert_exact(randomise(model), randn(4, 5, 3))


def test_places_before_the_samples_in_one_dimension() -> None:
    model = Net(
        lambda dense, x: dense(x.transpose(0, 1).flatten(0, 1)).unflatten(0, x.shape[1::-1]).transpose(0, 1),
        nn.Linear(3, 4),
    )
    assert_exact(randomise(model), randn(4, 5, 3))


def test_positions_that_all_samples_share() -> None:
    def add_positions(positions: Any, x: Tensor) -> Tensor:
        return x * positions(torch.arange(x.shape[1]))

    def add_one_row_of_positions(positions: Any, x: Tensor) -> Tensor:
        return x * positions(torch.arange(x.shape[1])[None])

    for function in (add_positions, add_one_row_of_positions):
        assert_exact(randomise(Net(function, nn.Embedding(6, 3))), randn(4, 5, 3))


def test_what_all_samples_share_and_cannot_be_repeated_is_left_to_autograd() -> None:
    def relative(bias: Any, x: Tensor) -> Tensor:
        T = x.shape[1]
        table = bias(torch.arange(T)[:, None] - torch.arange(T) + T)  # (T, T, heads)
        return torch.einsum("hij,nj->nhi", table.permute(2, 0, 1), x)

    model = randomise(Net(relative, nn.Embedding(10, 2)))
    assert_exact(model, randn(4, 5), fallback=["parts.0.weight"])


def test_parameters_of_no_known_module() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gain

    model = randomise(nn.Sequential(nn.Linear(3, 4), Scale(), nn.Linear(4, 4), Readout()))
    assert_exact(model, randn(4, 3), fallback=["1.gain"])


def test_a_subclass_with_its_own_forward_is_not_taken_for_its_base() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)

    class Renamed(nn.Linear):
        pass

    model = randomise(nn.Sequential(Standardised(2, 3, 2), nn.Flatten(), Renamed(12, 2), Readout()))
    assert_exact(model, randn(4, 2, 3, 3), fallback=["0.weight", "0.bias"])


def test_weight_norm_is_left_to_autograd() -> None:
    dense = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    model = nn.Sequential(dense, Readout()).double()
    names = [f"0.parametrizations.weight.original{i}" for i in (0, 1)]
    K = tangent_gram(model, randn(4, 3).double())
    assert set(Network(model, randn(4, 3).double()).fallback) == set(names)
    assert K.shape == (8, 8)


def test_a_wrong_rule_is_found_out() -> None:
    class Odd(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    try:

        @rule(Odd)
        def odd(module: Any, x: Tensor, output: Tensor) -> list[Use]:
            return [Use("weight", lambda B: outer(x, B)), Use("bias", lambda B: bias_rows(2 * B, output.dim() - 1))]

        assert_exact(randomise(nn.Sequential(Odd(3, 4), Readout())), randn(4, 3), fallback=["0.weight"])
    finally:
        del RULES[Odd.forward]


def test_float32_inside_a_model_is_lifted_to_float64() -> None:
    """Models are careful with half precision, and their float32 would leave 1e-8 in the Gram."""

    def careful(dense: Any, x: Tensor) -> Tensor:
        z, positions = dense(x), torch.arange(4)
        phase = torch.sin(z.to(torch.float32) * positions.float()) + z.type(torch.float32).square()
        return (phase + F.softmax(z, -1, dtype=torch.float32)).to(dtype=torch.float32).to(x.dtype)

    def plain(dense: Any, x: Tensor) -> Tensor:
        z, positions = dense(x), torch.arange(4)
        return torch.sin(z * positions) + z.square() + F.softmax(z, -1)

    model, x = randomise(Net(careful, nn.Linear(3, 4))), randn(5, 3).double()
    twin = randomise(Net(plain, nn.Linear(3, 4)))
    twin.load_state_dict(model.state_dict())
    assert 1e-10 < difference(naive_gram(model, x), naive_gram(twin, x)) < 1e-5
    assert difference(tangent_gram(model, x), naive_gram(twin, x)) < 1e-13


def test_a_state_that_a_model_makes_in_the_default_dtype() -> None:
    """A float32 network may make its zeros without saying of what dtype; so may its float64 copy."""

    def run(cell: Any, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 4)
        for t in range(x.shape[1]):
            h = cell(x[:, t], h)
        return h

    cell = nn.GRUCell(3, 4)
    x = randn(3, 4, 3)
    dtype, fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    K = tangent_gram(nn.Sequential(Net(run, cell)), x.double())
    assert (torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()) == (dtype, fast)
    twin = Net(lambda cell, x: cell(x[:, 3], cell(x[:, 2], cell(x[:, 1], cell(x[:, 0])))), cell)
    assert difference(K, naive_gram(twin, x)) < 1e-12


def test_a_model_of_many_kinds_of_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.GroupNorm(2, 4),
        nn.PReLU(4),
        nn.ConvTranspose2d(4, 3, 2, stride=2),
        nn.Flatten(),
        nn.Linear(192, 6),
        nn.LayerNorm(6),
        nn.SiLU(inplace=True),
        nn.Linear(6, 3),
    )
    assert_exact(randomise(model, 0.3).eval(), randn(5, 2, 9, 9))


@pytest.mark.parametrize("method", ["auto", "ghost", "materialise"])
def test_both_sides_may_have_places_of_different_number(method: str) -> None:
    model = randomise(Net(lambda dense, x: dense(x).mean(1), nn.Linear(3, 4)))
    long, short = randn(3, 6, 3).double(), randn(2, 4, 3).double()
    J, S = (torch.cat(list(jacobian(model, x).values()), 1) for x in (long, short))
    assert difference(tangent_gram(model, long, short, method=method), J @ S.T) < 1e-12


def test_the_rules_work_in_several_forms_at_once() -> None:
    """Outer terms with and without bias, in groups and not, are told apart by autograd's check alone."""
    for groups, bias in itertools.product((1, 2), (True, False)):
        network = Network(alone(nn.Conv1d(2, 2, 2, groups=groups, bias=bias)), randn(3, 2, 5).double())
        terms = network.terms(randn(3, 2, 5).double())
        assert len(terms) == 1
        assert isinstance(terms[0], Outer)
        assert terms[0].inputs.shape[1] == groups
        assert terms[0].inputs.shape[3] == 2 // groups * 2 + bias  # a bias is folded in
