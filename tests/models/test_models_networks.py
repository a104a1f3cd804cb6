"""What each network computes, against a plain rewriting of it."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from surefoot.models.lstm import LSTM
from surefoot.models.mlp import ACTIVATIONS, mlp
from surefoot.models.resnet import PaddedShortcut
from surefoot.models.vae import VAE, elbo_loss, vae
from surefoot.models.vit import patch_size


@pytest.mark.parametrize(
    ("options", "hidden"),
    [
        ({}, [256, 256]),
        ({"depth": 3}, [256, 256, 256]),
        ({"width": (7,)}, [7]),
        ({"width": (7,), "depth": 3}, [7, 7, 7]),
        ({"width": (7, 5)}, [7, 5]),
        ({"width": (7, 5), "depth": 2}, [7, 5]),
    ],
)
def test_mlp_is_a_list_of_layers(options: dict, hidden: list[int]) -> None:
    model = mlp((2, 3), 4, **options)
    sizes = [6, *hidden, 4]
    assert type(model) is nn.Sequential
    assert [type(layer) for layer in model] == [nn.Flatten, *[nn.Linear, nn.ReLU] * len(hidden), nn.Linear]
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == list(itertools.pairwise(sizes))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_mlp_activation(name: str) -> None:
    x, model = torch.randn(5, 3), mlp((3,), 1, width=(8,), activation=name)
    function = {"leaky-relu": F.leaky_relu, "identity": lambda h: h}.get(name) or getattr(F, name, None)
    function = function or getattr(torch, name)
    first, last = model[1], model[3]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    torch.testing.assert_close(model(x), last(function(first(x))))


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 9)])
def test_padded_shortcut(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width)
    out = PaddedShortcut(3, 6, 2)(x)
    expected = torch.zeros(2, 6, -(-height // 2), -(-width // 2))
    for channel in range(3):
        expected[:, channel + 1] = x[:, channel, ::2, ::2]
    assert torch.equal(out, expected)
    # The convolutions beside it halve odd sizes the same way.
    assert nn.Conv2d(3, 6, 3, stride=2, padding=1)(x).shape == out.shape


@pytest.mark.parametrize(
    ("image", "patch"),
    [((224, 224), 16), ((64, 64), 16), ((32, 32), 8), ((28, 28), 7), ((8, 8), 2), ((96, 64), 16), ((48, 36), 6)],
)
def test_patch_size(image: tuple[int, int], patch: int) -> None:
    assert patch_size(*image) == patch


def test_padding_does_not_influence_the_lstm_classifier() -> None:
    model = LSTM(20, 4, width=8, layers=2, per_token=False).double()
    short = torch.randint(1, 20, (3, 5))
    alone = model(short)
    for extra in (1, 6):
        padded = F.pad(short, (0, extra), value=0)
        torch.testing.assert_close(model(padded), alone, rtol=0, atol=1e-12)
        # Not vacuous: real tokens in their place do change the result.
        assert not torch.allclose(model(F.pad(short, (0, extra), value=7)), alone, atol=1e-4)
    empty = model(torch.zeros(1, 4, dtype=torch.int64))
    torch.testing.assert_close(empty[0], model.head.bias)


def test_lstm_language_model_does_not_look_ahead_and_knows_token_zero() -> None:
    model = LSTM(20, 20, width=8, layers=2, per_token=True)
    tokens = torch.randint(0, 20, (2, 6))
    changed = tokens.clone()
    changed[:, 4:] = (changed[:, 4:] + 1) % 20
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:], atol=1e-4)
    assert model.embedding.padding_idx is None
    assert model.embedding.weight[0].abs().sum() > 0


@pytest.mark.parametrize("shape", [(1, 4, 5), (7,)])
def test_vae_shapes_and_modes(shape: tuple[int, ...]) -> None:
    model, x = vae(shape, width=(6, 5), latent=3), torch.randn(4, *shape)
    reconstruction, mu, logvar = model(x)
    assert reconstruction.shape == x.shape
    assert mu.shape == logvar.shape == (4, 3)
    torch.manual_seed(5)
    first = model(x)[0]
    assert not torch.equal(first, model(x)[0])  # it samples,
    torch.manual_seed(5)
    assert torch.equal(first, model(x)[0])  # from the global generator
    model.eval()
    state = torch.get_rng_state()
    reconstruction, mu, _ = model(x)
    assert torch.equal(reconstruction, model.decoder(mu))
    assert torch.equal(state, torch.get_rng_state())


def test_vae_default_sizes() -> None:
    model = vae((1, 28, 28))
    linear = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert linear == [(784, 50), (50, 50), (50, 50), (50, 50), (50, 50), (50, 50), (50, 784)]


def test_vae_samples_have_the_mean_and_variance_they_should() -> None:
    model = VAE((3,), hidden=(4,), latent=2)
    model.decoder = nn.Sequential()  # z itself
    with torch.no_grad():
        z, mu, logvar = model(torch.ones(40_000, 3))
    assert logvar.abs().max() > 0.05  # else exp(logvar) and exp(logvar/2) would look alike
    torch.testing.assert_close(z.mean(0), mu[0], rtol=0, atol=0.03)
    torch.testing.assert_close(z.var(0), logvar[0].exp(), rtol=0.04, atol=0)


def test_elbo_loss_against_distributions_and_loops() -> None:
    rows, latent = 3, 2
    x, reconstruction = torch.randn(2, rows, 4, 5, dtype=torch.float64)
    mu, logvar = torch.randn(2, rows, latent, dtype=torch.float64)
    total = 0.0
    for n in range(rows):
        for a, b in zip(x[n].flatten().tolist(), reconstruction[n].flatten().tolist(), strict=True):
            total += (a - b) ** 2 / 2
        for j in range(latent):
            posterior = torch.distributions.Normal(mu[n, j], torch.exp(logvar[n, j] / 2))
            prior = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
            total += torch.distributions.kl_divergence(posterior, prior).item()
    torch.testing.assert_close(elbo_loss((reconstruction, mu, logvar), x).item(), total / rows)


def test_elbo_loss_is_zero_only_at_a_perfect_fit_with_the_prior() -> None:
    x, nothing = torch.randn(3, 4), torch.zeros(3, 2)
    assert elbo_loss((x, nothing, nothing), x) == 0
    assert elbo_loss((x, nothing + 1, nothing), x) == 1  # 1/2 mu^2, twice
    assert elbo_loss((x + 1, nothing, nothing), x) == 2  # 1/2, four times
