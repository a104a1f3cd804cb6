"""surefoot: training with gradient clipping whose convergence you can check."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from surefoot._version import __version__

if TYPE_CHECKING:
    from surefoot.certificates import certify
    from surefoot.optim import DeltaGClip, GClip, MixedClip, NormalizedGD, SmoothClip, clip_grad_
    from surefoot.train.explore_exploit import ExploreExploit

# Where each public name lives: loaded on first use (PEP 562), so that `import surefoot` stays cheap.
_HOME = {
    "DeltaGClip": "surefoot.optim",
    "ExploreExploit": "surefoot.train.explore_exploit",
    "GClip": "surefoot.optim",
    "MixedClip": "surefoot.optim",
    "NormalizedGD": "surefoot.optim",
    "SmoothClip": "surefoot.optim",
    "certify": "surefoot.certificates",
    "clip_grad_": "surefoot.optim",
}
_PACKAGES = ("certificates", "check", "measure", "optim", "testing", "theorems", "tune")

__all__ = [
    "DeltaGClip",
    "ExploreExploit",
    "GClip",
    "MixedClip",
    "NormalizedGD",
    "SmoothClip",
    "__version__",
    "certify",
    "clip_grad_",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _PACKAGES:
        value = import_module(f"surefoot.{name}")
    else:
        raise AttributeError(f"module 'surefoot' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_PACKAGES})
