"""Certificate: the proof as an object and as two files (docs/certificate-format.md)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surefoot._version import __version__
from surefoot.errors import InputError
from surefoot.theorems.path_length import PathLengthNumbers

FORMAT, VERSION = "surefoot-certificate", 1
ASSUMPTIONS = (
    "IEEE-754 double precision, round to nearest, no fast-math, no TF32, no reduced-precision emulation",
    "matrix products are sums of products in any order (no Strassen-like algorithm)",
    "exp, expm1, log1p, tanh and erfc are accurate to 8 units in the last place",
    "no overflow; underflow only where a product is below 1e-290",
)


@dataclass(frozen=True)
class Certificate:
    """A proof that an exact global minimum lies near the weights it holds.

    Attributes:
        claims: name -> float, as the format defines them: residual, sigma_min, ball, jacobian_norm, beta, q, epsilon,
            radius, sigma_star, eta_max; all for E = 1/2 sum r^2. A cross-entropy certificate claims sigma_min alone.
        operations: the network.
        tensors: weights, inputs and targets, float64.
        data: how the data are called: samples, outputs, inputs, targets, source.
        gram: positions of the operations that bound sigma_min.
        kind: "interpolation" or "last layer".
        loss: "squared error" or "cross-entropy".
        statement: in words.
    """

    claims: Mapping[str, float]
    operations: list[dict[str, Any]]
    tensors: Mapping[str, Tensor]
    data: Mapping[str, Any]
    gram: list[int]
    kind: str = "interpolation"
    loss: str = "squared error"
    statement: str = ""
    made_by: Mapping[str, str] = field(default_factory=lambda: {"surefoot": __version__, "torch": torch.__version__})

    @property
    def units(self) -> dict[str, float]:
        """The largest step in the units of torch's mean squared error: lr_max = n/2 eta_max, rounded down."""
        if "eta_max" not in self.claims:
            return {}
        n = self.data["samples"] * self.data["outputs"]
        return {"lr_max": self.claims["eta_max"] * (n / 2) * (1 - 2.0**-50)}

    def gamma_on_mean_squared_error(self, gamma: float) -> float:
        """Return 2 gamma/n: the threshold on the mean squared error's gradient that is `gamma` on the gradient of E."""
        return 2 * gamma / (self.data["samples"] * self.data["outputs"])

    def contraction(self, step: float) -> float:
        """Return the guaranteed factor on ||F - y|| of a step 0 <= h <= eta_max on E.

        Raises:
            InputError: the step is longer than eta_max.
        """
        names = ("q", "epsilon", "radius", "sigma_star", "eta_max")
        return PathLengthNumbers(**{n: self.claims[n] for n in names}).contraction(step)

    def save(self, path: str | Path) -> Path:
        """Write the certificate as a folder; it is whole or not there at all.

        Raises:
            InputError: the folder exists already.
        """
        from safetensors.torch import save_file

        folder = Path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"path={str(path)!r} exists and is not an empty folder; give another one")
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            file = work / "tensors.safetensors"
            save_file({k: v.detach().contiguous().clone() for k, v in self.tensors.items()}, file)
            document = {
                "format": FORMAT,
                "version": VERSION,
                "kind": self.kind,
                "statement": self.statement,
                "loss": self.loss,
                "network": self.operations,
                "gram": self.gram,
                "data": dict(self.data),
                "tensors": {"file": file.name, "sha256": _sha256(file), "bytes": file.stat().st_size},
                "claims": {k: float(v) for k, v in self.claims.items()},
                "units": self.units,
                "levels": dict.fromkeys(self.claims, "verified"),
                "assumptions": list(ASSUMPTIONS),
                "made_by": dict(self.made_by),
            }
            (work / "certificate.json").write_text(
                json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8"
            )
            if folder.exists():
                folder.rmdir()
            os.chmod(work, 0o755)
            work.rename(folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        return folder

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a certificate that `save` wrote. This does not verify it: `surefoot.check.verify` does.

        Raises:
            InputError: no certificate is there, or one of another version.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(path)
        try:
            document = json.loads((folder / "certificate.json").read_text(encoding="utf-8"))
            if (document["format"], document["version"]) != (FORMAT, VERSION):
                raise InputError(f"path={str(path)!r} holds {document['format']} {document['version']}, not {VERSION}")
            fields = [document[n] for n in ("data", "gram", "kind", "loss", "statement", "made_by")]
            tensors = load_file(folder / "tensors.safetensors")
            return cls(document["claims"], document["network"], tensors, *fields)
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(f"path={str(path)!r} holds no certificate ({type(error).__name__}: {error})") from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
