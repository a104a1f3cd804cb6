"""certify: what it proves, what it refuses, what it says when something is short."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from certificates_nets import Block, D, Skip, settle
from torch import Tensor, nn

from surefoot.certificates import certificate as certificate_module
from surefoot.certificates.attempt import Attempt
from surefoot.certificates.certificate import Certificate
from surefoot.certificates.certify import certify
from surefoot.certificates.layers import read_layers, run
from surefoot.certificates.module import to_module
from surefoot.certificates.polish import polish
from surefoot.check import verify
from surefoot.errors import InputError
from surefoot.models.mlp import mlp
from surefoot.theorems.verdict import Outcome, Verdict


def net_and_data(samples: int = 8, outputs: int = 2, width: int = 40) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, outputs)).double()
    return net, torch.randn(samples, 5, dtype=D), torch.randn(samples, outputs, dtype=D)


def remedies(verdict: Verdict) -> str:
    return " ".join(f.remedy for f in verdict.findings)


def reasons(verdict: Verdict) -> str:
    return " ".join(f"{f.hypothesis}: {f.reason}" for f in verdict.findings)


class Picture(nn.Module):
    """A small network with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.block, self.pool = Block(4), nn.AvgPool2d(2)
        self.head = nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(torch.tanh(self.norm(self.first(x))))
        x = self.pool(x)
        return self.head(x.view(x.size(0), -1))


class Functions(nn.Module):
    """Every function the reader takes from a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 30), nn.Linear(30, 30), nn.Linear(30, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.a(torch.flatten(x, start_dim=1)))
        x = x + F.silu(self.b(x)) * 0.5
        return self.c(torch.sigmoid(x.tanh()))


# ------------------------------------------------------------------------------------------------------------- proved


@pytest.mark.parametrize(
    "activation",
    [nn.Tanh(), nn.Sigmoid(), nn.Softplus(), nn.GELU(), nn.SiLU(), nn.ELU(), nn.ReLU(), nn.LeakyReLU(0.1)],
    ids=lambda a: type(a).__name__,
)
def test_every_activation_is_certified_and_verified(activation: nn.Module, tmp_path: Path) -> None:
    _, x, y = net_and_data()
    net = nn.Sequential(nn.Linear(5, 60), activation, nn.Linear(60, 2)).double()
    verdict = certify(net, x, y, polish=True)
    assert verdict, verdict
    assert verdict.certificate.claims["q"] < 0.1
    assert verdict.certificate.claims["radius"] < 1e-3
    found = verify(verdict.certificate.save(tmp_path / "c"))
    assert found, found


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (Picture, (1, 6, 6)),
        (Functions, (3, 2, 2)),
        (lambda: nn.Sequential(nn.Linear(4, 30), nn.BatchNorm1d(30), nn.Tanh(), Skip(30), nn.Linear(30, 2)), (4,)),
        (
            lambda: nn.Sequential(
                nn.Conv2d(1, 6, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)), nn.SiLU(), nn.AvgPool2d(3, 1),
                nn.AdaptiveAvgPool2d((1, 2)), nn.Dropout(0.5), nn.Flatten(), nn.Linear(12, 2),
            ),
            (1, 6, 6),
        ),
        (lambda: mlp((1, 3, 3), 2, width=(20, 20), activation="gelu"), (1, 3, 3)),
    ],
    ids=["traced cnn", "traced functions", "skip", "conv", "mlp"],
)  # fmt: skip
def test_networks(make: Any, shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = settle(make())
    x, y = torch.randn(6, *shape, dtype=D), torch.randn(6, 2, dtype=D)
    verdict = certify(net, x, y, polish=True)
    assert verdict, verdict
    saved = verdict.certificate.save(tmp_path / "c")
    found = verify(saved)
    assert found, found
    again = Certificate.load(saved)
    assert float((run(again.operations, dict(again.tensors), x) - y).norm()) <= again.claims["residual"] < 1e-3


def test_without_polish_a_trained_network_is_certified() -> None:
    """First-order training alone, here torch's own, until the certificate fires."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 100), nn.Tanh(), nn.Linear(100, 1)).double()
    x, y = torch.randn(5, 5, dtype=D), 0.5 * torch.randn(5, 1, dtype=D)
    before = certify(net, x, y)
    assert before.outcome is Outcome.UNDECIDED
    assert "polish=True" in remedies(before)
    assert "orders of magnitude" in remedies(before)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        F.mse_loss(net(x), y).backward()
        optimizer.step()
    after = certify(net, x, y)
    assert after, after
    assert after.certificate.claims["residual"] > 1e-9


def test_polish_stops_where_the_certificate_fires() -> None:
    net, x, y = net_and_data()
    read = read_layers(net, x[:1])
    module, parameters = to_module(read)
    attempt = Attempt(read, module, parameters, x, y, None, None)
    found = polish(module, x, y, done=attempt.likely)
    assert found.message == "certifiable"
    assert attempt.verdict("", found)
    assert found.residuals == sorted(found.residuals, reverse=True)
    assert found.grams < 10


def test_a_float32_model_is_certified_as_the_float64_network_with_its_numbers(tmp_path: Path) -> None:
    net, x, y = net_and_data()
    single = net.float()
    verdict = certify(single, x.float(), y.float(), polish=True)
    assert verdict
    assert all(t.dtype == D for t in verdict.certificate.tensors.values())
    assert torch.equal(verdict.certificate.tensors["inputs"], x.float().double())
    assert verify(verdict.certificate.save(tmp_path / "c"))


def test_the_model_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    net = settle(Picture()).float()
    net.head.weight.grad = torch.ones_like(net.head.weight)
    net.first.bias.requires_grad_(True)
    x, y = torch.randn(4, 1, 6, 6), torch.randn(4, 2)
    before = {n: t.clone() for n, t in net.state_dict().items()}
    grads = {n: (p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in net.named_parameters()}
    state, copies = torch.get_rng_state(), (x.clone(), y.clone())
    assert certify(net, x, y, polish=True)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(x, copies[0])
    assert torch.equal(y, copies[1])
    for n, p in net.named_parameters():
        assert p.requires_grad == grads[n][0]
        assert (p.grad is None) == (grads[n][1] is None)
        assert p.dtype == torch.float32
    assert not net.training


# ------------------------------------------------------------------------------------------- hypotheses that are broken


def test_equal_inputs_with_different_targets_are_refuted() -> None:
    net, x, y = net_and_data()
    x[6] = x[2]
    verdict = certify(net, x, y, polish=True)
    assert verdict.outcome is Outcome.REFUTED
    least = float((y[6] - y[2]).square().sum()) / 4
    assert "[2, 6]" in reasons(verdict)
    assert f"{least:.4g}" in reasons(verdict)


def test_equal_inputs_with_equal_targets_are_refuted() -> None:
    net, x, y = net_and_data()
    x[6], y[6] = x[2], y[2]
    verdict = certify(net, x, y, polish=True)
    assert verdict.outcome is Outcome.REFUTED
    assert "[2, 6]" in reasons(verdict)
    assert "equal rows" in reasons(verdict)


def test_too_few_parameters_are_refuted() -> None:
    net = nn.Sequential(nn.Linear(5, 1), nn.Tanh(), nn.Linear(1, 2)).double()
    _, x, y = net_and_data()
    verdict = certify(net, x, y)
    assert verdict.outcome is Outcome.REFUTED
    assert "10 trainable parameters are fewer than the 16 residuals" in reasons(verdict)


def test_near_duplicates_are_named() -> None:
    net, x, y = net_and_data()
    x[6] = x[2] + 1e-9
    verdict = certify(net, x, y)
    assert verdict.outcome is Outcome.UNDECIDED
    assert "samples 2 and 6 (distance" in reasons(verdict)
    assert verdict.certificate is None


def test_a_relu_at_its_kink_is_undecided() -> None:
    _, x, _ = net_and_data()
    net = nn.Sequential(nn.Linear(5, 60), nn.ReLU(), nn.Linear(60, 2)).double()
    y = net(x).detach() + 1e-6
    with torch.no_grad():
        net[0].bias[3] -= net[0](x)[4, 3]
    y = net(x).detach() + 1e-6
    verdict = certify(net, x, y)
    assert verdict.outcome is Outcome.UNDECIDED
    assert [f.outcome for f in verdict.findings][-2:] == [Outcome.UNDECIDED] * 2 or "ReLU" in reasons(verdict)
    assert "smooth activation" in remedies(verdict)
    # and the same without the kink is proved
    with torch.no_grad():
        net[0].bias[3] += 0.05
    assert certify(net, x, net(x).detach() + 1e-9)


def test_one_hot_targets_with_an_output_bias() -> None:
    """Without care polishing takes the sum of the head's rows to 0, and K is singular: more samples than features."""
    torch.manual_seed(0)
    N, width, C = 60, 24, 10
    net = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, C))
    net = net.double()
    for m in (net[0], net[2]):
        nn.init.normal_(m.weight, std=1.5 / math.sqrt(m.in_features))
    x, labels = torch.randn(N, 16, dtype=D), torch.arange(N) % C
    y = F.one_hot(labels, C).double()
    careless = to_module(read_layers(net, x[:1]))[0]
    polish(careless, x, y, max_steps=25)
    with torch.no_grad():
        assert float((careless(x) - y).norm()) < 1e-6
        assert float(careless[-1].weight.sum(0).norm()) < 1e-3
    # Its certificate must not be: and the verdict says why.
    verdict = certify(careless, x, y)
    assert verdict.outcome is Outcome.UNDECIDED
    assert "output bias" in remedies(verdict)
    assert "polish=True" in remedies(verdict)
    proved = certify(net, x, labels, polish=True)
    assert proved, proved
    assert proved.certificate.claims["sigma_min"] > 1e-3


def test_what_is_short_is_said() -> None:
    net, x, y = net_and_data()
    verdict = certify(net, x, y)
    assert verdict.outcome is Outcome.UNDECIDED
    text = str(verdict)
    for word in ("orders of magnitude", "residual", "s_min(J)", "curvature bound", "polish=True"):
        assert word in text
    assert json.loads(json.dumps(verdict.to_json()))["outcome"] == "undecided"


# ---------------------------------------------------------------------------------------------- what has no rule, named


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Two(Sum):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return self.a(x) + y


class Branching(Sum):
    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


def tied() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    net[2].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5)), ("1:", "LayerNorm")),
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.Unflatten(1, (1, 2, 2)), nn.MaxPool2d(2)), ("1:", "Unflatten")),
        (tied, ("2.weight", "0.weight", "tied")),
        (lambda: nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.1)).train(), ("1 (Dropout)", "train mode", "eval()")),
        (lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)).train(), ("BatchNorm1d", "train mode")),
        (lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, affine=False)), ("1:", "batch norm")),
        (lambda: nn.Sequential(nn.Linear(5, 5), nn.GELU("tanh")), ("1:", "GELU")),
        (lambda: nn.Sequential(nn.Linear(5, 5), nn.ELU(2.0)), ("1:", "ELU")),
        (Sum, ("addition of two branches",)),
        (Two, ("2 inputs",)),
        (Branching, ("Branching", "cannot be traced")),
    ],
)
def test_modules_without_a_rule_are_named(model: Any, words: tuple[str, ...]) -> None:
    net = model()
    train = any(m.training for m in net.modules() if isinstance(m, (nn.Dropout, nn.BatchNorm1d)))
    net = net if train and "train mode" in words else net.eval()
    with pytest.raises(InputError) as caught:
        certify(net.double(), torch.randn(2, 5), torch.randn(2, 3))
    for word in words:
        assert word in str(caught.value)
    if "train mode" not in words:
        assert "layers='last'" in str(caught.value)


def test_shapes_without_a_rule_are_named() -> None:
    sequence = nn.Sequential(nn.Linear(5, 5), nn.Flatten(), nn.Linear(15, 2))
    with pytest.raises(InputError, match=r"0: no rule for a Linear on values of shape \(3, 5\).*layers='last'"):
        certify(sequence, torch.randn(2, 3, 5), torch.randn(2, 2))
    groups = nn.Sequential(nn.Conv2d(2, 2, 1, groups=2), nn.Flatten())
    with pytest.raises(InputError, match=r"0: no rule for groups=2.*layers='last'"):
        certify(groups, torch.randn(2, 2, 2, 2), torch.randn(2, 8))
    with pytest.raises(InputError, match=r"end it with nn.Flatten"):
        certify(nn.Conv2d(1, 1, 1), torch.randn(2, 1, 2, 2), torch.randn(2, 4))
    with pytest.raises(InputError, match=r"do not fit 0 \(Linear"):
        certify(nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 5), torch.randn(2, 2))
    frozen = nn.Linear(5, 2).requires_grad_(False)
    with pytest.raises(InputError, match="no trainable parameter"):
        certify(frozen, torch.randn(2, 5), torch.randn(2, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": "first"}, "layers='first'"),
        ({"loss": "hinge"}, "loss='hinge'"),
        ({"loss": "cross-entropy"}, "layers='last'"),
        ({"epsilon": 1.0}, "epsilon=1.0"),
        ({"inputs": torch.randn(5)}, r"inputs must be a tensor \(N, ...\)"),
        ({"inputs": [1.0]}, "not list"),
        ({"targets": torch.randn(7, 2)}, "do not fit 8 samples"),
        ({"targets": torch.randn(8, 3)}, "targets have 3 columns and the model 2"),
        ({"targets": torch.arange(8)}, "classes 0 to 7 and the model has 2 outputs"),
        ({"targets": torch.full((8, 2), math.nan)}, "NaN"),
        ({"inputs": torch.full((8, 5), math.inf)}, "NaN or infinite"),
    ],
)
def test_requests_that_make_no_sense(change: dict[str, Any], words: str) -> None:
    net, x, y = net_and_data()
    with pytest.raises(InputError, match=words):
        certify(**{"model": net, "inputs": x, "targets": y, **change})


# --------------------------------------------------------------------------------------------------- the certificate


@pytest.fixture(scope="module")
def proof() -> Certificate:
    torch.manual_seed(0)
    net, x, y = net_and_data(samples=6)
    found = certify(net, x, y, polish=True, source="drawn at random")
    assert found
    return found.certificate


def test_save_and_load(proof: Certificate, tmp_path: Path) -> None:
    folder = proof.save(tmp_path / "deep" / "c")
    assert sorted(p.name for p in folder.iterdir()) == ["certificate.json", "tensors.safetensors"]
    again = Certificate.load(folder)
    assert again.claims == dict(proof.claims)
    assert again.operations == proof.operations
    assert again.statement == proof.statement
    assert again.units == proof.units
    assert again.data["source"] == "drawn at random"
    assert all(torch.equal(t, again.tensors[n]) for n, t in proof.tensors.items())
    again.save(tmp_path / "again")
    for name in ("certificate.json", "tensors.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_save_is_all_or_nothing(proof: Certificate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    with pytest.raises(InputError, match="not an empty folder"):
        proof.save(tmp_path / "full")
    assert (tmp_path / "full" / "mine").read_text() == "keep"

    def disk_full(path: Path) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(certificate_module, "_sha256", disk_full)
    with pytest.raises(OSError, match="no space"):
        proof.save(tmp_path / "c")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full"]
    (tmp_path / "empty").mkdir()
    monkeypatch.undo()
    assert verify(proof.save(tmp_path / "empty"))


def test_load_refuses_what_is_none(proof: Certificate, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no certificate"):
        Certificate.load(tmp_path / "nothing")
    folder = proof.save(tmp_path / "c")
    document = json.loads((folder / "certificate.json").read_text())
    for change, words in (({"version": 2}, "version|not 1"), ({"claims": None}, "")):
        (folder / "certificate.json").write_text(json.dumps({**document, **change}))
        if words:
            with pytest.raises(InputError, match=words):
                Certificate.load(folder)
    del document["claims"]
    (folder / "certificate.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="KeyError"):
        Certificate.load(folder)
    (folder / "certificate.json").write_text(json.dumps({**document, "claims": {}}))
    (folder / "tensors.safetensors").write_bytes(b"not these")
    with pytest.raises(InputError, match="holds no certificate"):
        Certificate.load(folder)


def test_contraction(proof: Certificate) -> None:
    eta = proof.claims["eta_max"]
    assert proof.contraction(0.0) == 1.0
    assert proof.contraction(eta) < proof.contraction(eta / 2) < 1
    for step in (-1e-9, eta * 1.01, math.nan):
        with pytest.raises(InputError, match="step="):
            proof.contraction(step)


def test_units_against_torch(proof: Certificate) -> None:
    """lr_max on the mean squared error is eta_max on E, and gamma likewise: by autograd."""
    net = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 2)).double()
    net.load_state_dict({n: t for n, t in proof.tensors.items() if n[0].isdigit()})
    x, y = proof.tensors["inputs"], proof.tensors["targets"] + 0.1
    ours = torch.autograd.grad((net(x) - y).square().sum() / 2, list(net.parameters()))
    theirs = torch.autograd.grad(F.mse_loss(net(x), y), list(net.parameters()))
    for g, m in zip(ours, theirs):
        torch.testing.assert_close(proof.units["lr_max"] * m, proof.claims["eta_max"] * g, rtol=1e-12, atol=0)
    norm = math.sqrt(sum(float(g.square().sum()) for g in ours))
    mean = math.sqrt(sum(float(m.square().sum()) for m in theirs))
    assert proof.gamma_on_mean_squared_error(norm) == pytest.approx(mean, rel=1e-12)


def test_a_claim_that_is_moved_does_not_verify(proof: Certificate, tmp_path: Path) -> None:
    """The numbers are no better than they have to be: a little beyond them the checker says no."""
    folder = proof.save(tmp_path / "c")
    document = json.loads((folder / "certificate.json").read_text())
    for name, factor in (("residual", 0.1), ("sigma_min", 1.01), ("jacobian_norm", 0.9), ("beta", 0.9)):
        changed = {**document, "claims": {**document["claims"], name: document["claims"][name] * factor}}
        (folder / "certificate.json").write_text(json.dumps(changed))
        assert not verify(folder), name


@pytest.mark.nightly
def test_300_digits_with_and_without_a_free_output_bias() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    x = torch.tensor(digits.data[:300], dtype=D)
    x = x - x.mean(0)
    x = x / x.norm(dim=1, keepdim=True) * math.sqrt(8)
    labels = torch.tensor(digits.target[:300])
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10)).double()
    for m in (net[0], net[2]):
        nn.init.normal_(m.weight, std=1.5 / math.sqrt(m.in_features))
    assert certify(net, x, labels, polish=True)
    careless = to_module(read_layers(net, x[:1]))[0]
    polish(careless, x, F.one_hot(labels, 10).double(), max_steps=12)
    verdict = certify(careless, x, labels)
    assert verdict.outcome is Outcome.UNDECIDED
    assert verdict.measurements[1].value == 0.0
    assert "output bias" in remedies(verdict)
