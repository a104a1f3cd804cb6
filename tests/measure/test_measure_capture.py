"""What the capture believes, what it leaves to autograd and what it refuses; held against per-sample gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InputError
from surefoot.measure import rules
from surefoot.measure.capture import Network
from surefoot.measure.contraction import Outer, Term, add_gram, mirror
from surefoot.measure.inputs import count, take, to_float64
from surefoot.measure.rules import Use

D, T = 6, 4


def twin_gram(model: nn.Module, inputs: Any, chosen: Sequence[str] | None = None) -> Tensor:
    """Return the Gram by a backward pass for every output of every sample."""
    model = copy.deepcopy(model).double()
    params = [p for name, p in model.named_parameters() if (p.requires_grad if chosen is None else name in chosen)]
    for p in params:
        p.requires_grad_(True)
    rows = []
    for i in range(count(inputs)):
        one = take(inputs, slice(i, i + 1))
        found = model(**one) if isinstance(one, dict) else model(*one) if isinstance(one, tuple) else model(one)
        for f in found.flatten():
            grads = torch.autograd.grad(f, params, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [torch.zeros(p.numel()).double() if g is None else g.flatten() for g, p in zip(grads, params)]
                )
            )
    J = torch.stack(rows)
    return J @ J.T


def gram(network: Network, inputs: Any) -> Tensor:
    terms = network.terms(inputs)
    size = count(inputs) * _outputs(terms[0])
    K = torch.zeros(size, size, dtype=torch.float64)
    add_gram(K, terms, terms, symmetric=True)
    mirror(K)
    return K


def _outputs(term: Term) -> int:
    return term.rows.shape[1] if hasattr(term, "rows") and isinstance(term.rows, Tensor) else len(term.grads)  # type: ignore[union-attr]


def assert_exact(model: nn.Module, inputs: Any, *, fallback: Sequence[str] = (), **options: Any) -> Network:
    inputs = to_float64(inputs)
    network = Network(model, inputs, **options)
    assert network.fallback == tuple(fallback)
    right = twin_gram(model, inputs, options.get("params"))
    assert right.diagonal().max() > 0
    K = gram(network, inputs)
    assert (K - right).norm() <= 1e-12 * right.norm()
    assert torch.equal(K, K.T)
    some = gram(network, take(inputs, slice(0, 2)))
    assert (some - K[: len(some), : len(some)]).norm() <= 1e-13 * right.norm()
    return network


class Net(nn.Module):
    """A model from a function of its modules and the input."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = forward

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tokens(n: int = 6, places: int = T) -> Tensor:
    return torch.randint(0, 9, (n, places))


# ---------------------------------------------------------------------------------------------- where the samples are


def test_flattened_tokens_samples_first() -> None:
    model = Net(
        lambda m, x: m.head(m.fc(x.reshape(-1, D)).tanh().view(len(x), -1)),
        fc=nn.Linear(D, 5),
        head=nn.Linear(5 * T, 3),
    )
    assert_exact(model, torch.randn(6, T, D))


def test_flattened_tokens_places_first() -> None:
    model = Net(
        lambda m, x: m.head(
            m.fc(x.transpose(0, 1).reshape(-1, D)).tanh().view(T, len(x), -1).transpose(0, 1).flatten(1)
        ),
        fc=nn.Linear(D, 5),
        head=nn.Linear(5 * T, 3),
    )
    assert_exact(model, torch.randn(6, T, D))


@pytest.mark.parametrize("places", [2, 3, 4, 6])
def test_samples_second(places: int) -> None:
    model = Net(
        lambda m, x: m.head(m.norm(m.fc(x.transpose(0, 1))).tanh().sum(0)),
        fc=nn.Linear(D, 5),
        norm=nn.LayerNorm(5),
        head=nn.Linear(5, 3),
    )
    assert_exact(model, torch.randn(6, places, D))


@pytest.mark.parametrize("places", [2, 3, 4, 6])
@pytest.mark.parametrize("front", [False, True])
def test_positions_shared_by_all_samples(places: int, front: bool) -> None:
    """Also where there are as many places as samples."""

    def forward(m: Any, ids: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        return m.head((m.token(ids) + m.place(at[None] if front else at)).tanh().flatten(1))

    model = Net(forward, token=nn.Embedding(9, D), place=nn.Embedding(8, D), head=nn.Linear(D * places, 3))
    assert_exact(model, tokens(6, places))


def test_positions_that_cannot_be_repeated_go_to_autograd() -> None:
    model = Net(
        lambda m, ids: m.head((m.token(ids) + m.place(torch.arange(T))[None]).tanh().flatten(1)),
        token=nn.Embedding(9, D),
        place=nn.Embedding(8, D),
        head=nn.Linear(D * T, 3),
    )
    network = assert_exact(model, tokens(), fallback=["place.weight"])
    assert network._together


def test_one_sample() -> None:
    model = Net(
        lambda m, x: m.head(
            m.fc(x.transpose(0, 1).reshape(-1, D)).tanh().view(T, len(x), -1).transpose(0, 1).flatten(1)
        ),
        fc=nn.Linear(D, 5),
        head=nn.Linear(5 * T, 3),
    )
    network = Network(model, torch.randn(1, T, D).double())
    x = torch.randn(5, T, D).double()
    right = twin_gram(model, x)
    assert (gram(network, x) - right).norm() <= 1e-12 * right.norm()


# --------------------------------------------------------------------------------------- what the rules do not know


def test_weight_used_outside_its_module() -> None:
    model = Net(lambda m, ids: F.linear(m.emb(ids).mean(1).tanh(), m.emb.weight), emb=nn.Embedding(9, D))
    assert_exact(model, tokens(), fallback=["emb.weight"])


def test_wrong_rule_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(module: nn.Linear, x: Tensor, output: Tensor) -> list[Use]:
        return [
            Use("weight", lambda B: rules.outer(x * 1.000001, B)),
            Use("bias", lambda B: rules.bias_rows(B, 1), is_bias=True),
        ]

    monkeypatch.setitem(rules.RULES, nn.Linear.forward, wrong)
    model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 3))
    assert_exact(model, torch.randn(6, D), fallback=["0.weight", "2.weight"])


def test_rule_that_mixes_up_samples_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the sum over all samples would be right."""

    def wrong(module: nn.Linear, x: Tensor, output: Tensor) -> list[Use]:
        return [Use("weight", lambda B: rules.outer(x.roll(1, 0), B.roll(1, 1)))]

    monkeypatch.setitem(rules.RULES, nn.Linear.forward, wrong)
    assert_exact(nn.Linear(D, 3, bias=False), torch.randn(6, D), fallback=["weight"])


class Scale(nn.Module):
    """A module without a rule; `item` keeps torch.func out."""

    def __init__(self, item: bool) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(D))
        self.item = item

    def forward(self, x: Tensor) -> Tensor:
        if self.item and x.abs().max().item() > 1e9:
            return x
        return (x * self.gain).sin()


@pytest.mark.parametrize("item", [False, True])
@pytest.mark.parametrize("cotangents", [False, True])
def test_module_without_a_rule(item: bool, cotangents: bool) -> None:
    model = nn.Sequential(nn.Linear(D, D), Scale(item), nn.Linear(D, 3))
    x = torch.randn(40, D).double()
    V = torch.randn(3, 2).double() if cotangents else None
    network = Network(model, x, cotangents=V)
    assert network.fallback == ("1.gain",)
    assert network._together is not item
    right = twin_gram(model, x)
    if V is not None:
        right = torch.einsum("icje,ck,el->ikjl", right.view(40, 3, 40, 3), V, V).reshape(80, 80)
    assert (gram(network, x) - right).norm() <= 1e-12 * right.norm()


# ------------------------------------------------------------------------------------------- which parameters, how used


def test_in_place_operations() -> None:
    model = Net(
        lambda m, x: m.head(m.fc(x).mul_(2.0).add_(1.0).relu_()),
        fc=nn.Linear(D, 5),
        head=nn.Linear(5, 3),
    )
    assert_exact(model, torch.randn(6, D))


def test_input_overwritten_that_a_gradient_needs() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        h = x * 1.0
        z = m.fc(h)
        h.zero_()
        return m.head(z.tanh() + h[:, :5])

    model = Net(forward, fc=nn.Linear(D, 5), head=nn.Linear(5, 3))
    refused(model, torch.randn(6, D), "cannot be differentiated", "inplace")


def test_module_used_twice() -> None:
    model = Net(lambda m, x: m.head(m.fc(m.fc(x).tanh()).tanh()), fc=nn.Linear(D, D), head=nn.Linear(D, 3))
    assert_exact(model, torch.randn(6, D))


def test_tied_embedding_and_readout() -> None:
    model = Net(
        lambda m, ids: m.out(m.emb(ids).tanh().mean(1)), emb=nn.Embedding(9, D), out=nn.Linear(D, 9, bias=False)
    )
    model.get_submodule("out").weight = model.get_submodule("emb").weight
    assert_exact(model, tokens())


def test_frozen_and_chosen_parameters() -> None:
    model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
    model[2].requires_grad_(False)
    x = torch.randn(6, D)
    whole = gram(assert_exact(model, x), x.double())
    chosen = gram(assert_exact(model, x, params=["2.weight", "4.bias"]), x.double())
    assert (whole - chosen).norm() > 1e-3
    assert {p.requires_grad for p in model[2].parameters()} == {False}


def test_one_number_a_sample() -> None:
    model = Net(lambda m, x: m.fc(x)[:, 0], fc=nn.Linear(D, 1))
    assert_exact(model, torch.randn(6, D))


def test_many_outputs_in_pieces() -> None:
    """Backward passes for several outputs at once, and for one at a time, give the same."""
    model = nn.Sequential(nn.Linear(D, 5), nn.Tanh(), nn.Linear(5, 30))
    assert_exact(model, torch.randn(4, D))
    assert_exact(nn.Sequential(nn.Linear(D, 2000), nn.Tanh(), nn.Linear(2000, 7)), torch.randn(20, D))


def test_leaves_no_trace() -> None:
    model = nn.Sequential(nn.Linear(D, 5), nn.Dropout(0.0), nn.BatchNorm1d(5), nn.Linear(5, 3))
    model[2].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    assert_exact(model, torch.randn(6, D, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) and v.dtype == before[k].dtype for k, v in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert model.training
    assert not model[2].training
    assert not model[0]._forward_hooks
    assert not model[0]._forward_pre_hooks


# ------------------------------------------------------------------------------------------------- what is refused


def refused(model: nn.Module, inputs: Any, *words: str, **options: Any) -> None:
    with pytest.raises(InputError) as caught:
        Network(model, to_float64(inputs), **options)
    for word in words:
        assert word in str(caught.value)


def test_dropout() -> None:
    refused(
        nn.Sequential(nn.Linear(D, 50), nn.Dropout(0.5), nn.Linear(50, 3)), torch.randn(6, D), "1 (Dropout)", "eval"
    )


def test_batch_norm_in_train_mode() -> None:
    refused(nn.Sequential(nn.Linear(D, 5), nn.BatchNorm1d(5)), torch.randn(6, D), "1 (BatchNorm1d)", "eval")


class Centre(nn.Module):
    """Subtracts the mean over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(0)) * self.gain


def test_samples_that_depend_on_each_other() -> None:
    refused(nn.Sequential(nn.Linear(D, D), Centre(), nn.Linear(D, 3)), torch.randn(6, D), "alone", "1 (Centre)")


class Shorten(nn.Module):
    """Computes in float32 by a way that is not a plain .float(), which is left out."""

    def forward(self, x: Tensor) -> Tensor:
        return x.type("torch.FloatTensor").to(x.dtype) * x


def test_float32_inside() -> None:
    refused(nn.Sequential(nn.Linear(D, D), Shorten(), nn.Linear(D, 3)), torch.randn(6, D), "1 (Shorten)", "float32")


def test_outputs_without_a_graph() -> None:
    model = Net(lambda m, x: m.fc(x).detach(), fc=nn.Linear(D, 3))
    refused(model, torch.randn(6, D), "none of the chosen parameters")


def test_samples_averaged_away() -> None:
    refused(Net(lambda m, x: m.fc(x).mean(0, keepdim=True), fc=nn.Linear(D, 3)), torch.randn(6, D), "in front")


def test_parameters_that_are_not_there() -> None:
    refused(nn.Linear(D, 3), torch.randn(6, D), "nothing", params=["nothing"])
    refused(nn.Linear(D, 3).requires_grad_(False), torch.randn(6, D), "no parameter requires a gradient")


def test_outer_is_what_the_rules_return() -> None:
    """A weight and its bias are one term."""
    terms = Network(nn.Linear(D, 3), torch.randn(6, D).double()).terms(torch.randn(6, D).double())
    assert len(terms) == 1
    assert isinstance(terms[0], Outer)
    assert terms[0].inputs.shape == (6, 1, 1, D + 1)
