"""What is certified verifies: the margins on our side cover how the checker bounds the same things."""

from pathlib import Path

import pytest
import torch
from certificates_nets import D
from torch import nn

from surefoot.certificates.certify import certify
from surefoot.check import verify


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
def test_wide_square_layers(activation: type[nn.Module], seed: int, tmp_path: Path) -> None:
    """Random square matrices: their singular values lie so close that a power iteration does not end."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Linear(16, 256), activation(), nn.Linear(256, 256), activation(), nn.Linear(256, 3)
    ).double()  # fmt: skip
    x, y = torch.randn(12, 16, dtype=D), torch.randn(12, 3, dtype=D)
    verdict = certify(net, x, y, polish=True)
    assert verdict, verdict
    found = verify(verdict.certificate.save(tmp_path / "c"))
    assert found, found


def test_large_convolution_and_offsets(tmp_path: Path) -> None:
    """Inputs with a mean, shared weights at many places, overlapping windows."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 5, padding=2), nn.SiLU(), nn.Conv2d(16, 16, 3, stride=2), nn.Tanh(), nn.AvgPool2d(3, 2),
        nn.Flatten(), nn.Linear(64, 2),
    ).double()  # fmt: skip
    x, y = 1 + torch.randn(10, 3, 12, 12, dtype=D), torch.randn(10, 2, dtype=D)
    verdict = certify(net, x, y, polish=True)
    assert verdict, verdict
    found = verify(verdict.certificate.save(tmp_path / "c"))
    assert found, found
