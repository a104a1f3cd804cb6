"""Every model by name: sizes, shapes, determinism, and requests that make no sense."""

import doctest
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from surefoot.errors import InputError
from surefoot.models import MODELS, build

IMAGE = {"kind": "image", "task": "classification", "input_shape": (3, 8, 12), "outputs": 10}
DIGITS = {"kind": "image", "task": "classification", "input_shape": (1, 8, 8), "outputs": 10}
TABLE = {"kind": "table", "task": "regression", "input_shape": (6,), "outputs": 2}
SENTENCES = {"kind": "text", "task": "classification", "input_shape": (7,), "outputs": 3, "vocabulary_size": 11}
CHARACTERS = {"kind": "text", "task": "language", "input_shape": (7,), "outputs": 11, "vocabulary_size": 11}
SMALL_VIT = {"width": (24,), "depth": 2}

# name, data, options: each model on each kind of data it takes
CASES = [
    ("mlp", IMAGE, {}),
    ("mlp", TABLE, {"width": (5, 4), "activation": "tanh"}),
    ("resnet20", IMAGE, {"width": (4,)}),
    ("resnet20", DIGITS, {"width": (3,)}),
    ("resnet18", DIGITS, {"width": (4,)}),
    ("vit-tiny", IMAGE, SMALL_VIT),
    ("vit-tiny", DIGITS, SMALL_VIT),
    ("vit-tiny", {**IMAGE, "input_shape": (3, 64, 64)}, SMALL_VIT),
    ("lstm", SENTENCES, {"width": (9,)}),
    ("lstm", {**SENTENCES, "task": "regression"}, {"depth": 1}),
    ("lstm", CHARACTERS, {"width": (9,), "depth": 3}),
]
IDS = [f"{name}-{data['kind']}-{data['task']}-{index}" for index, (name, data, _) in enumerate(CASES)]


def rows(data: dict[str, Any], n: int) -> torch.Tensor:
    if data["kind"] == "text":
        return torch.randint(1, data["vocabulary_size"], (n, *data["input_shape"]))
    return torch.randn(n, *data["input_shape"])


def size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "side", "parameters"),
    [
        ("resnet20", 32, 269_722),
        ("resnet18", 32, 11_173_962),
        ("vit-tiny", 64, 5_526_346),
        ("vit-tiny", 224, 5_526_346),
    ],
)
def test_has_the_published_number_of_parameters(name: str, side: int, parameters: int) -> None:
    with torch.device("meta"):
        model = build(name, kind="image", task="classification", input_shape=(3, side, side), outputs=10)
    assert size(model) == parameters


def test_resnet20_size_by_hand() -> None:
    # A convolution 3x3 from a to b channels has 9ab weights, a batch norm over b has 2b.
    def stage(a: int, b: int) -> int:
        return 9 * a * b + 2 * b + 5 * (9 * b * b + 2 * b)

    w, classes, channels = 6, 4, 2
    stem, head = 9 * channels * w + 2 * w, 4 * w * classes + classes
    by_hand = stem + stage(w, w) + stage(w, 2 * w) + stage(2 * w, 4 * w) + head
    data = {**IMAGE, "input_shape": (channels, 9, 11), "outputs": classes}
    assert size(build("resnet20", **data, width=(w,))) == by_hand


@pytest.mark.parametrize(("name", "data", "options"), CASES, ids=IDS)
def test_output_shape_and_a_gradient_for_every_parameter(name: str, data: dict, options: dict) -> None:
    model = build(name, **data, **options)
    assert model.training
    out = model(rows(data, 3))
    per_token = data["input_shape"] if data["task"] == "language" else ()
    assert out.shape == (3, *per_token, data["outputs"])
    out.square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize(("name", "data", "options"), [*CASES, ("vae", TABLE, {})], ids=[*IDS, "vae"])
def test_same_seed_same_weights(name: str, data: dict, options: dict) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(build(name, **data, **options).parameters())

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("name", "data", "options"), CASES, ids=IDS)
def test_runs_in_float64_and_agrees_with_float32(name: str, data: dict, options: dict) -> None:
    model, x = build(name, **data, **options).eval(), rows(data, 3)
    low = model(x)
    high = model.double()(x if x.dtype == torch.int64 else x.double())
    assert high.dtype == torch.float64
    torch.testing.assert_close(low.double(), high, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet20", "resnet18"])
def test_batch_norm_makes_rows_independent_in_eval_mode_alone(name: str) -> None:
    model, x = build(name, **DIGITS, width=(4,)), rows(DIGITS, 6)
    assert not torch.allclose(model(x)[:2], model(x[:2]), atol=1e-3)  # so the next line is not vacuous
    model.eval()
    torch.testing.assert_close(model(x)[:2], model(x[:2]), rtol=1e-4, atol=1e-5)


def test_vit_has_second_derivatives() -> None:
    data = {**IMAGE, "input_shape": (3, 64, 64)}
    model = build("vit-tiny", **data, **SMALL_VIT)
    parameters = list(model.parameters())
    first = torch.autograd.grad(model(rows(data, 2)).square().sum(), parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
    assert all(g.isfinite().all() for g in second)


@pytest.mark.parametrize(
    ("name", "data", "options", "words"),
    [
        ("resnet20", TABLE, {}, ["model='resnet20'", "table", "(6,)", "mlp, vae"]),
        ("vit-tiny", SENTENCES, {}, ["model='vit-tiny'", "text", "lstm"]),
        ("lstm", IMAGE, {}, ["model='lstm'", "image", "(3, 8, 12)", "mlp, resnet20, resnet18, vit-tiny, vae"]),
        ("mlp", SENTENCES, {}, ["model='mlp'", "text", "there is lstm"]),
        ("vae", SENTENCES, {}, ["model='vae'", "text", "lstm"]),
        ("resnet20", IMAGE, {"activation": "tanh"}, ["activation='tanh'", "no effect", "mlp"]),
        ("resnet18", IMAGE, {"depth": 5}, ["depth=5", "no effect", "mlp, vit-tiny, lstm, gpt, vae"]),
        ("mlp", IMAGE, {"latent": 5}, ["latent=5", "no effect", "vae"]),
        ("resnet-20", IMAGE, {}, ["'resnet-20'", "did you mean 'resnet20'", "file.py:factory"]),
        ("transformer", IMAGE, {}, ["'transformer'", "mlp, resnet20"]),
        ("mlp", TABLE, {"activation": "leaky_relu"}, ["'leaky_relu'", "did you mean 'leaky-relu'", "softplus"]),
        ("mlp", TABLE, {"activation": "zzz"}, ["'zzz'", "relu, leaky-relu"]),
        ("mlp", TABLE, {"width": (5, 4), "depth": 3}, ["width=(5, 4)", "depth=3"]),
        ("mlp", TABLE, {"width": ()}, ["width=()"]),
        ("mlp", TABLE, {"width": (5, 0)}, ["width=(5, 0)"]),
        ("mlp", TABLE, {"depth": 0}, ["depth=0"]),
        ("vae", TABLE, {"latent": -1}, ["latent=-1"]),
        ("resnet20", IMAGE, {"width": (4, 8)}, ["width=(4, 8)", "one"]),
        ("vit-tiny", IMAGE, {"width": (100,)}, ["width=100", "64 or 128"]),
        ("vit-tiny", {**IMAGE, "input_shape": (3, 31, 32)}, {}, ["31x32", "24x32"]),
        ("resnet20", {**IMAGE, "input_shape": (3, 8, 7)}, {}, ["8x7", "8x8"]),
        ("lstm", {**SENTENCES, "vocabulary_size": None}, {}, ["vocabulary_size=None"]),
        ("lstm", {**CHARACTERS, "outputs": 10}, {}, ["outputs=10", "vocabulary_size=11"]),
        ("mlp", {**TABLE, "task": "language"}, {}, ["task='language'", "table"]),
        ("mlp", {**TABLE, "task": "ranking"}, {}, ["task='ranking'", "regression"]),
        ("mlp", {**TABLE, "kind": "sound"}, {}, ["kind='sound'", "table"]),
        ("mlp", {**TABLE, "input_shape": (2, 3)}, {}, ["input_shape=(2, 3)", "(d)"]),
        ("mlp", {**TABLE, "outputs": 0}, {}, ["outputs=0"]),
        ("mlp", {**TABLE, "vocabulary_size": 0}, {}, ["vocabulary_size=0"]),
    ],
)
def test_requests_that_make_no_sense(name: str, data: dict, options: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        build(name, **data, **options)
    for word in words:
        assert word in str(caught.value)


def test_vit_without_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'surefoot\[transformers\]'"):
        build("vit-tiny", **IMAGE)


@pytest.mark.parametrize("name", MODELS)
def test_table_of_models_names_only_what_the_makers_take(name: str) -> None:
    make: Callable[..., nn.Module] = MODELS[name].make
    names = inspect.signature(make).parameters
    assert set(names) == {*MODELS[name].facts, *MODELS[name].options}


@pytest.mark.parametrize("module", ["build", "mlp"])
def test_examples_in_docstrings(module: str) -> None:
    result = doctest.testmod(importlib.import_module(f"surefoot.models.{module}"))
    assert result.attempted > 0
    assert result.failed == 0
