"""No network, and a cache of our own: reading what is on this machine needs neither."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every way out raises, and is recorded: a library may swallow the error."""
    calls: list[str] = []

    def refuse(*args: Any, **_: Any) -> None:
        calls.append(str(args[-2:]))
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return calls


@pytest.fixture
def network_calls(_no_network: list[str]) -> list[str]:
    """What was asked of the network so far."""
    return _no_network


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """Writes a random image and returns its bytes."""
    rng = np.random.default_rng(0)

    def write(path: Path, size: tuple[int, int] = (6, 4), mode: str = "L") -> np.ndarray:
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
        values = rng.integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(values).save(path)
        return values

    return write
