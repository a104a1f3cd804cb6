"""`--from-certificate`: a run that begins at a certificate's weights, on its rows, by a rule that it covers."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surefoot.certificates import Certificate
from surefoot.certificates.layers import read_layers
from surefoot.errors import InputError
from surefoot.measure.measurement import Kind, Measurement
from surefoot.theorems.path_length import check_path_length
from surefoot.theorems.verdict import Verdict
from surefoot.train.certified_run import certified_lr, check_subject, describe, remove_certificate, write_certificate
from surefoot.train.config import LETTERS, TrainConfig, read_config
from surefoot.train.document import CERTIFIED
from surefoot.train.job import Job

ROWS = 1e-4  # what a certificate of a float32 run has as rows may differ so much from what is loaded in float64
OF_THE_RUN = (
    "data", "target", "task", "image_size", "context", "test_fraction", "limit", "model", "width", "depth",
    "activation", "loss", "optimizer", "gamma", "delta", "beta", "L0", "L1", "seed", "threads",
)  # fmt: skip


def certified_options(
    certificate: Path, config: TrainConfig | None = None, optimizer: str | None = None
) -> TrainConfig:
    """Return the options of a run that goes on from a certificate: full batches in float64, no momentum, no decay.

    Args:
        certificate: its folder.
        config: of the run whose certificate it is: data, model, loss and optimizer are taken from it; None: from the
            run in which the certificate lies, if it does.
        optimizer: another one than the run's, whose letters then do not fit.
    """
    if config is None and (certificate.parent / "run.json").is_file():
        config = read_config(certificate.parent / "config.json")
    taken: dict[str, Any] = {} if config is None else {name: getattr(config, name) for name in OF_THE_RUN}
    if config is not None and optimizer not in (None, config.optimizer):
        taken |= {name: None for name in LETTERS[config.optimizer] if name in taken} | {"optimizer": optimizer}
    return TrainConfig(**taken, dtype="float64", batch_size="full", from_certificate=str(certificate))


def with_covered_lr(config: TrainConfig) -> TrainConfig:
    """Return a configuration with the largest lr that its certificate covers, where it has none.

    Raises:
        InputError: there is no certificate of all layers.
    """
    certificate = read_certificate(config)
    lr = certified_lr(config.resolved(), certificate.units["lr_max"])
    path = str(Path(config.from_certificate or "").resolve())
    return dataclasses.replace(config, from_certificate=path, lr=lr if config.lr is None else config.lr)


def read_certificate(config: TrainConfig) -> Certificate:
    """Return the certificate that a configuration names.

    Raises:
        InputError: there is none there, or it is about the last layer alone.
    """
    path = config.from_certificate
    assert path is not None
    try:
        certificate = Certificate.load(path)
    except InputError as error:
        raise InputError(f"--from-certificate: {error}; give the folder of one, such as RUN/certificate") from error
    if certificate.kind != "interpolation":
        raise InputError(
            f"--from-certificate {path} is about the {certificate.kind} alone, on features that stay as they are; make "
            "one with surefoot certify RUN --layers all"
        )
    return certificate


def at_certificate(job: Job) -> Job:
    """Return a job with the certificate's weights, and its rows in place of the training rows.

    Raises:
        InputError: the model or the rows are others than the certificate's.
    """
    path, model, data = job.config.from_certificate, job.model, job.data
    certificate = read_certificate(job.config)
    check_subject(job, "all", "--from-certificate")
    X, Y = certificate.tensors["inputs"], certificate.tensors["targets"]
    operations = read_layers(copy.deepcopy(model).double().eval(), data.train_x[:1].double()).operations
    own = dict(model.named_parameters())
    if json.loads(json.dumps(operations)) != certificate.operations or any(
        name not in certificate.tensors or certificate.tensors[name].shape != p.shape for name, p in own.items()
    ):
        raise InputError(
            f"--from-certificate {path} is about another network than --model {job.config.model}; give the options "
            "of the run it was made of, for example with --config RUN/config.json"
        )
    x, y = data.train_x[: len(X)], data.train_y[: len(X)]
    wanted = job.objective.wanted(y, torch.float64)
    if not (_alike(x.double(), X) and _alike(wanted.double(), Y)):
        raise InputError(
            f"--from-certificate {path} is about other rows than the training rows of --data {job.config.data}; give "
            "the data options of the run it was made of, for example with --config RUN/config.json"
        )
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(certificate.tensors[name])
    targets = Y.to(y.dtype) if data.task == "regression" else y
    note = f"the training rows are the {len(X):,} of the certificate {path}"
    data = dataclasses.replace(data, train_x=X.to(x.dtype), train_y=targets, notes=(*data.notes, note))
    return dataclasses.replace(job, data=data, batch_size=min(job.batch_size, len(X)))


def begin(job: Job, folder: Path) -> Certificate:
    """Return the certificate that a run began at, of which the run keeps a copy, and write the verdict beside it."""
    if not (folder / CERTIFIED).is_file():
        remove_certificate(folder)
        certificate = read_certificate(job.config)
        verdict = _verdict(certificate).with_certificate(certificate)
        note = f"The run began at the weights of {job.config.from_certificate}."
        write_certificate(describe(verdict, job, 0, samples=len(job.data.train_x), notes=[note]), verdict, folder)
    return Certificate.load(folder / "certificate")


def _alike(x: Tensor, other: Tensor) -> bool:
    return x.shape == other.shape and float((x - other).abs().max()) <= ROWS * max(1.0, float(other.abs().max()))


def _verdict(certificate: Certificate) -> Verdict:
    """Return what follows from a certificate's constants."""
    c = certificate.claims
    constants: tuple[tuple[str, str, Kind], ...] = (
        ("||F(w0) - y||", "residual", "upper bound"),
        ("s_min(J(w0))", "sigma_min", "lower bound"),
        ("Lipschitz constant of J on the ball", "beta", "upper bound"),
        ("||J|| on the ball", "jacobian_norm", "upper bound"),
    )
    measured = [
        Measurement(name, c[claim], kind, "verified", "as the certificate claims") for name, claim, kind in constants
    ]
    verdict = check_path_length(*measured, ball=c["ball"], epsilon=c["epsilon"])
    if not verdict:
        raise InputError(f"--from-certificate: its conclusion does not follow from its constants: {verdict}")
    return verdict
