"""Last-layer certificates: any backbone, its head found, both losses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from certificates_nets import D
from torch import Tensor, nn

from surefoot.certificates.certify import certify
from surefoot.certificates.last_layer import find_head
from surefoot.check import verify
from surefoot.errors import InputError
from surefoot.models.resnet import resnet18
from surefoot.theorems.verdict import Outcome


class Lstm(nn.Module):
    """A classifier of sequences of numbers 0 to 19."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Embedding(20, 8), nn.LSTM(8, 40, batch_first=True), nn.Linear(40, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0][:, -1])


class Wrapped(nn.Module):
    """A model inside a model, with a second head that runs after the first and does not count."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.auxiliary = inner, nn.Linear(3, 2)

    def forward(self, ids: Tensor) -> Tensor:
        out = self.inner(ids)
        self.auxiliary(out)
        return out


def features_model(width: int = 30) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 3))
    return net.eval(), torch.randn(20, 3, 4)


def distance_to_a_minimum(claims: Any, tensors: Any) -> float:
    """How far the nearest zero of the squared error is: the pseudo-inverse says it."""
    H = tensors["inputs"]
    Phi = torch.cat([H, torch.ones(len(H), 1, dtype=D)], 1)
    r = H @ tensors["head.weight"].T + tensors["head.bias"] - tensors["targets"]
    return float((torch.linalg.pinv(Phi) @ r).norm())


@pytest.mark.parametrize("loss", ["mse", "cross-entropy"])
def test_any_backbone(loss: str, tmp_path: Path) -> None:
    net, x = features_model()
    labels = torch.arange(20) % 3
    verdict = certify(net, x, labels, loss=loss, layers="last")
    assert verdict, verdict
    assert verify(verdict.certificate.save(tmp_path / "c"))
    claims = verdict.certificate.claims
    if loss == "mse":
        distance = distance_to_a_minimum(claims, verdict.certificate.tensors)
        assert distance <= claims["radius"] < 1000 * distance
        assert verdict.certificate.units["lr_max"] == pytest.approx(30 * claims["eta_max"], rel=1e-9)
    else:
        assert set(claims) == {"sigma_min"}
        assert verdict.numbers["infimum"] == 0
    H = verdict.certificate.tensors["inputs"]
    exact = torch.linalg.svdvals(torch.cat([H, torch.ones(20, 1, dtype=D)], 1))[-1]
    assert 0.999 * float(exact) < claims["sigma_min"] <= float(exact)


def test_head_training_keeps_what_the_certificate_says() -> None:
    net, x = features_model()
    y = torch.randn(20, 3)
    certificate = certify(net, x, y, layers="last", epsilon=0.5).certificate
    H, Y = certificate.tensors["inputs"], certificate.tensors["targets"]
    W, b = certificate.tensors["head.weight"].clone(), certificate.tensors["head.bias"].clone()
    h = certificate.claims["eta_max"]
    first = rho = float((H @ W.T + b - Y).norm())
    path, factor = 0.0, certificate.contraction(h)
    for _ in range(300):
        r = H @ W.T + b - Y
        gW, gb = r.T @ H, r.sum(0)
        W, b = W - h * gW, b - h * gb
        path += h * math.hypot(float(gW.norm()), float(gb.norm()))
        after = float((H @ W.T + b - Y).norm())
        assert after <= factor * rho * (1 + 1e-12)
        rho = after
    assert rho < 0.5 * first
    assert path <= certificate.claims["radius"]


def test_lstm_and_wrapped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, ids = Lstm().eval(), torch.randint(0, 20, (25, 6))
    for model in (net, Wrapped(net)):
        verdict = certify(model, ids, torch.arange(25) % 3, loss="cross-entropy", layers="last")
        assert verdict, verdict
        head, H = find_head(model, ids, rows=7)
        assert head is net.head
        assert H.shape == (25, 40)
    assert verify(verdict.certificate.save(tmp_path / "c"))


def test_resnet(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = resnet18((3, 32, 32), 4).eval()
    x = torch.randn(12, 3, 32, 32)
    verdict = certify(net, x, torch.arange(12) % 4, layers="last")
    assert verdict, verdict
    assert verify(verdict.certificate.save(tmp_path / "c"))


def test_transformers_vit(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=8,
        num_labels=3,
    )  # fmt: skip
    net = transformers.ViTForImageClassification(config).eval()
    x = torch.randn(16, 3, 16, 16)
    labels = torch.arange(16) % 3
    before = {n: t.clone() for n, t in net.state_dict().items()}
    for inputs in (x, {"pixel_values": x}):
        verdict = certify(net, inputs, labels, loss="cross-entropy", layers="last")
        assert verdict, verdict
    assert verify(verdict.certificate.save(tmp_path / "c"))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())


def test_what_cannot_be() -> None:
    net, x = features_model(width=8)
    narrow = certify(net, x, torch.randn(20, 3), layers="last")
    assert narrow.outcome is Outcome.REFUTED
    assert "at least 19 units" in str(narrow)
    net, x = features_model()
    x[7] = x[3]
    equal = certify(net, x, torch.randn(20, 3), layers="last")
    assert equal.outcome is Outcome.REFUTED
    assert "[3, 7]" in str(equal)
    x[7] = x[3] + 1e-7
    near = certify(net.double(), x.double(), torch.randn(20, 3), layers="last")
    assert near.outcome is Outcome.UNDECIDED
    assert "sample 3" in str(near)
    assert near.certificate is None


def test_a_head_that_the_features_use_is_refused() -> None:
    net = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
    net[2].weight = net[0].weight
    with pytest.raises(InputError, match="shares its weights with 0"):
        certify(net, torch.randn(5, 12), torch.randn(5, 12), layers="last")


def test_requests_that_make_no_sense() -> None:
    net, x = features_model()
    with pytest.raises(InputError, match="one-hot"):
        certify(net, x, torch.rand(20, 3), loss="cross-entropy", layers="last")
    with pytest.raises(InputError, match="classes 0 to 3 and the model has 3"):
        certify(net, x, torch.arange(20) % 4, layers="last")
    with pytest.raises(InputError, match="do not fit 20 samples"):
        certify(net, x, torch.arange(19) % 3, layers="last")
    with pytest.raises(InputError, match="does not end in a linear layer"):
        certify(nn.Sequential(net, nn.Tanh()), x, torch.randn(20, 3), layers="last")
    with pytest.raises(InputError, match="train mode"):
        certify(nn.Sequential(nn.Dropout(0.1), net).train(), x, torch.randn(20, 3), layers="last")
    with pytest.raises(InputError, match="no bias"):
        certify(nn.Sequential(nn.Flatten(), nn.Linear(12, 3, bias=False)), x, torch.randn(20, 3), layers="last")
