"""What the tests of the adapters share."""

import os
import sys
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

REQUIRED = os.environ.get("SUREFOOT_REQUIRE_INTEGRATIONS", "") not in ("", "0")


def need(name: str) -> Any:
    """Import a library, or skip the file that asks; with SUREFOOT_REQUIRE_INTEGRATIONS=1 its absence is a failure."""
    if REQUIRED:
        return import_module(name)
    return pytest.importorskip(name, reason=f"{name} is not installed: make test-integrations")


def forget_accelerator() -> None:
    """Let the next Accelerator choose its precision: it is one a process, shared by all who make one."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


class Small(nn.Module):
    """A regression network that speaks Trainer's dialect: keyword inputs, loss first."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out = self.body(x)
        return {"logits": out} if labels is None else {"loss": (out - labels).square().mean(), "logits": out}


def small() -> Small:
    """The same network every time."""
    torch.manual_seed(1)
    return Small()


def rows(n: int = 48) -> list[dict[str, Tensor]]:
    """The same data every time: targets whose gradients begin large and end small."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(n, 4, generator=generator)
    return [{"x": a, "labels": 3 * a[:1]} for a in x]


def weights(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
