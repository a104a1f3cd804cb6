"""The GPT-2-shaped decoder: size, causality, precision, second derivatives, requests that make no sense."""

import sys

import pytest
import torch

from surefoot.errors import InputError
from surefoot.models import build

TEXT = {"kind": "text", "task": "language", "input_shape": (7,), "outputs": 11, "vocabulary_size": 11}
SMALL = {"width": (24,), "depth": 2}


def test_has_the_number_of_parameters_by_hand() -> None:
    data = {**TEXT, "input_shape": (128,), "outputs": 65, "vocabulary_size": 65}
    with torch.device("meta"):
        model = build("gpt", **data)
    w = 256
    attention, hidden = 4 * w * w + 4 * w, 8 * w * w + 5 * w
    by_hand = (65 + 128) * w + 12 * (attention + hidden + 4 * w) + 2 * w
    assert sum(p.numel() for p in model.parameters()) == by_hand == 9_527_040


def test_an_output_depends_on_the_tokens_up_to_its_own() -> None:
    model = build("gpt", **TEXT, **SMALL)
    tokens = torch.randint(11, (3, 7))
    out = model(tokens)
    assert out.shape == (3, 7, 11)
    changed = tokens.clone()
    changed[:, 4] = (tokens[:, 4] + 1) % 11
    other = model(changed)
    assert torch.equal(out[:, :4], other[:, :4])
    assert not torch.isclose(out[:, 4:], other[:, 4:]).all(-1).any()


def test_no_dropout_by_default() -> None:
    model, tokens = build("gpt", **TEXT, **SMALL), torch.randint(11, (3, 7))
    assert model.training
    assert torch.equal(model(tokens), model(tokens))


def test_every_parameter_has_a_gradient_and_a_second_derivative() -> None:
    model = build("gpt", **TEXT, **SMALL)
    parameters = list(model.parameters())
    first = torch.autograd.grad(model(torch.randint(11, (3, 7))).square().sum(), parameters, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), parameters)
    assert all(g.isfinite().all() for g in second)


def test_float64_agrees_with_float32() -> None:
    model, tokens = build("gpt", **TEXT, **SMALL), torch.randint(11, (3, 7))
    low, high = model(tokens), model.double()(tokens)
    assert high.dtype == torch.float64
    torch.testing.assert_close(low.double(), high, rtol=1e-3, atol=1e-4)


def test_same_seed_same_weights() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed)
        return list(build("gpt", **TEXT, **SMALL).parameters())

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ({**TEXT, "task": "classification"}, {}, ["task='classification'", "lstm"]),
        ({**TEXT, "vocabulary_size": None}, {}, ["vocabulary_size=None"]),
        ({**TEXT, "outputs": 10}, {}, ["outputs=10", "vocabulary_size=11"]),
        (TEXT, {"width": (100,)}, ["width=100", "64 or 128"]),
        (TEXT, {"width": (64, 64)}, ["width=(64, 64)", "one"]),
        (TEXT, {"activation": "relu"}, ["activation='relu'", "no effect"]),
    ],
)
def test_requests_that_make_no_sense(data: dict, options: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        build("gpt", **data, **options)
    for word in words:
        assert word in str(caught.value)


def test_without_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'surefoot\[transformers\]'"):
        build("gpt", **TEXT)
