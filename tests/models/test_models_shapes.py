"""The check before training: what it finds, and that it leaves no trace."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.models import build, check_shapes

CLASSES = {"task": "classification", "outputs": 3, "loss": "cross-entropy"}
VALUES = {"task": "regression", "outputs": 2, "loss": "mse"}
TOKENS = {"task": "language", "outputs": 11, "loss": "cross-entropy"}
ELBO = {"task": "classification", "outputs": 3, "loss": "elbo"}


class Returns(nn.Module):
    """A model that returns a fixed thing made from its input."""

    def __init__(self, make: Any) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x)


@pytest.mark.parametrize(
    ("name", "x", "y", "wanted"),
    [
        ("mlp", torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), CLASSES),
        ("mlp", torch.randn(1, 4), torch.tensor([2]), CLASSES),
        ("mlp", torch.randn(5, 4), torch.randn(5, 2), VALUES),
        ("resnet20", torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]), CLASSES),
        ("lstm", torch.randint(11, (5, 6)), torch.tensor([0, 1, 2, 0, 1]), CLASSES),
        ("lstm", torch.randint(11, (5, 6)), torch.randint(11, (5, 6)), TOKENS),
        ("vae", torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1]), ELBO),
    ],
)
def test_models_that_fit(name: str, x: Tensor, y: Tensor, wanted: dict) -> None:
    kind = {2: "table", 4: "image"}[x.ndim] if x.is_floating_point() else "text"
    data = {"kind": kind, "input_shape": tuple(x.shape[1:]), "vocabulary_size": 11 if kind == "text" else None}
    model = build(name, **data, task=wanted["task"], outputs=wanted["outputs"])
    check_shapes(model, x, y, **wanted)


X, LABELS = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])


@pytest.mark.parametrize(
    ("model", "y", "wanted", "words"),
    [
        (nn.Linear(4, 7), LABELS, CLASSES, ["(2, 7)", "(2, 3)", "cross-entropy", "last layer"]),
        (nn.Linear(4, 1), torch.randn(5, 2), VALUES, ["(2, 1)", "needs (2, 2)"]),
        (Returns(lambda x: x.sum(1)), torch.randn(5, 1), VALUES, ["has shape (2,)", "needs (2, 1)"]),
        (nn.Linear(4, 11), torch.randint(11, (5, 6)), TOKENS, ["(2, 11)", "(2, 6, 11)"]),
        (nn.Linear(3, 3), LABELS, CLASSES, ["shape (2, 4)", "RuntimeError", "shapes cannot be multiplied", "(4,)"]),
        (nn.Embedding(9, 3), LABELS, CLASSES, ["torch.float32", "RuntimeError"]),
        (Returns(lambda x: {"logits": x}), LABELS, CLASSES, ["returns a dict", "(2, 3)", "tensor"]),
        (Returns(lambda x: (x, x, x)), LABELS, CLASSES, ["returns a tuple", "elbo"]),
        (nn.Linear(4, 4), LABELS, ELBO, ["(reconstruction, mu, logvar)", "returns a Tensor"]),
        (Returns(lambda x: (x, x)), LABELS, ELBO, ["(reconstruction, mu, logvar)", "tuple"]),
        (Returns(lambda x: (x[:, 1:], x, x)), LABELS, ELBO, ["(2, 3)", "(2, 4)", "reconstruction"]),
        (Returns(lambda x: (x, x, x[:, 1:])), LABELS, ELBO, ["(2, 4)", "(2, 3)", "logvar"]),
        (Returns(lambda x: (x, x[0], x[0])), LABELS, ELBO, ["(4,)", "(2, latent)"]),
    ],
)
def test_models_that_do_not_fit(model: nn.Module, y: Tensor, wanted: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        check_shapes(model, X, y, **wanted)
    for word in words:
        assert word in str(caught.value)
    if "RuntimeError" in words:
        assert isinstance(caught.value.__cause__, RuntimeError)


class Careless(nn.Module):
    """Changes everything it can reach: weights, buffers, its input and every random generator."""

    def __init__(self, fail: bool) -> None:
        super().__init__()
        self.fail = fail
        self.layer = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(4, track_running_stats=True)
        self.drop = nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("replaced", torch.tensor([float("nan"), 1.0]))
        self.register_buffer("view", torch.ones(1).expand(3))

    def forward(self, x: Tensor) -> Tensor:
        self.train()
        self.norm(x)
        x.mul_(0)
        self.layer.weight.data.clamp_(-0.01, 0.01)
        self.calls += 1
        self.replaced = torch.zeros(5)
        self.register_buffer("added", torch.zeros(2))
        torch.rand(3), random.random(), np.random.rand()
        if self.fail:
            raise ValueError("no")
        return self.layer(self.drop(x))


@pytest.mark.parametrize("fail", [False, True])
def test_leaves_no_trace(fail: bool) -> None:
    model = Careless(fail).train()
    model.norm.eval()  # flags that differ between modules
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])

    def bits(tensor: Tensor) -> bytes:
        return tensor.numpy().tobytes()

    def state() -> tuple[Any, ...]:
        return (
            [(name, bits(tensor)) for name, tensor in model.state_dict().items()],
            [(name, id(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())],
            [(name, module.training) for name, module in model.named_modules()],
            [parameter.grad for parameter in model.parameters()],
            (bits(x), bits(torch.get_rng_state()), torch.is_grad_enabled()),
            (random.getstate(), str(np.random.get_state())),
        )

    before = state()
    if fail:
        with pytest.raises(InputError, match="ValueError: no"):
            check_shapes(model, x, y, **CLASSES)
    else:
        check_shapes(model, x, y, **CLASSES)
    assert state() == before


def test_the_careless_model_does_leave_traces_by_itself() -> None:
    model, x = Careless(fail=False), torch.randn(5, 4)
    weight, mean, rng = model.layer.weight.clone(), model.norm.running_mean.clone(), torch.get_rng_state()
    model(x)
    assert not torch.equal(model.layer.weight, weight)
    assert not torch.equal(model.norm.running_mean, mean)
    assert not torch.equal(torch.get_rng_state(), rng)
    assert (x == 0).all()
