"""The variational autoencoder with fully connected layers.

Source: Kingma, Welling, Auto-Encoding Variational Bayes, arXiv 1312.6114.
"""

import math

import torch
from torch import Tensor, nn

from surefoot.models.mlp import dense
from surefoot.models.widths import layer_widths


class VAE(nn.Module):
    """x -> (reconstruction, mu, logvar); in train mode z = mu + exp(logvar/2) eps, eps ~ N(0, I), in eval mode z = mu.

    eps comes from torch's global random generator.

    Args:
        input_shape: The shape of one row, without the batch.
        hidden: The widths of the encoder's hidden layers; the decoder's are the same in reverse.
        latent: The dimension of z.
    """

    def __init__(self, input_shape: tuple[int, ...], *, hidden: tuple[int, ...], latent: int) -> None:
        super().__init__()
        size = math.prod(input_shape)
        self.encoder = nn.Sequential(nn.Flatten(), *dense((size, *hidden), nn.ReLU), nn.ReLU())
        self.mu = nn.Linear(hidden[-1], latent)
        self.logvar = nn.Linear(hidden[-1], latent)
        self.decoder = nn.Sequential(*dense((latent, *reversed(hidden), size), nn.ReLU), nn.Unflatten(1, input_shape))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, *input_shape) -> reconstruction (N, *input_shape), mu (N, latent), logvar (N, latent)."""
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        z = mu + torch.exp(logvar / 2) * torch.randn_like(mu) if self.training else mu
        return self.decoder(z), mu, logvar


def vae(
    input_shape: tuple[int, ...],
    *,
    width: tuple[int, ...] | None = None,
    depth: int | None = None,
    latent: int = 50,
) -> VAE:
    """A VAE with ReLU layers; by default d-50-50-(50, 50)-50-50-d for rows of d numbers.

    Args:
        input_shape: The shape of one row, without the batch.
        width: Hidden widths of the encoder, default (50, 50).
        depth: The number of hidden layers of the encoder, when one width stands for all of them.
        latent: The dimension of z.

    Returns:
        A module (N, *input_shape) -> ((N, *input_shape), (N, latent), (N, latent)), see `VAE`.

    Raises:
        InputError: If `depth` contradicts `width`.
    """
    return VAE(input_shape, hidden=layer_widths(width, depth, default=(50, 50)), latent=latent)


def elbo_loss(output: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """The negative evidence lower bound, for values with Gaussian noise of variance 1, averaged over the rows.

        1/N sum_n [ 1/2 ||x_n - xhat_n||^2 + 1/2 sum_j (mu_nj^2 + exp(logvar_nj) - 1 - logvar_nj) ]

    The first term is -log p(x_n | z_n) without its constant d/2 log(2 pi); the second is KL(N(mu, diag exp logvar) ||
    N(0, I)). It suits inputs that were standardised; a Bernoulli likelihood would need inputs within [0, 1].

    Args:
        output: What a `VAE` returned for `x`.
        x: The inputs, (N, ...).

    Returns:
        The loss, (), at least 0.
    """
    reconstruction, mu, logvar = output
    fit = (x - reconstruction).square().flatten(1).sum(dim=1) / 2  # (N,)
    divergence = (mu.square() + logvar.exp() - 1 - logvar).sum(dim=1) / 2  # (N,)
    return (fit + divergence).mean()
