"""Reading a certificate that anybody may have written: no code of it runs, nothing is allocated on its word alone."""

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surefoot.check.cholesky import BLOCK
from surefoot.check.gram import COLUMNS, WORKSPACE
from surefoot.check.network import Operations, flattened
from surefoot.check.operations import ACTIVATIONS
from surefoot.check.rounding import Array
from surefoot.check.windows import Windows

JSON_BYTES, DEPTH = 2**24, 32
SMALLEST, LARGEST = 1e-100, 1e100

KINDS = {
    "any": lambda v: True,
    "text": lambda v: isinstance(v, str),
    "text?": lambda v: v is None or isinstance(v, str),
    "flag": lambda v: isinstance(v, bool),
    "count": lambda v: type(v) is int and 1 <= v <= 2**40,
    "counts": lambda v: isinstance(v, list) and all(type(x) is int and 0 <= x <= 2**40 for x in v),
    "pair": lambda v: KINDS["counts"](v) and len(v) == 2 and min(v) > 0,
    "padding": lambda v: KINDS["counts"](v) and len(v) == 2 and max(v) <= 4096,
    # a number that rounding is bounded for, and that is the same number as a float64
    "number": lambda v: type(v) in (int, float) and (v == 0 or SMALLEST <= abs(v) <= LARGEST) and float(v) == v,
    "number>=0": lambda v: KINDS["number"](v) and v >= 0,
    "number>0": lambda v: KINDS["number"](v) and v > 0,
}
CLAIMS = (
    "residual:number>0 sigma_min:number>0 ball:number>0 jacobian_norm:number>0 beta:number>=0 q:number>=0 "
    "epsilon:number>0 radius:number>=0 sigma_star:number>0 eta_max:number>0"
)
DOCUMENT = (
    "format:text version:count kind:text statement:text loss:text network:any gram:counts data:any tensors:any "
    "claims:any units:any levels:any assumptions:any made_by:any"
)
OPERATIONS = {
    "flatten": "op:text",
    "linear": "op:text weight:text bias:text? trainable:flag",
    "conv2d": "op:text weight:text bias:text? trainable:flag stride:pair padding:padding dilation:pair",
    "batch_norm": "op:text weight:text bias:text mean:text var:text eps:number>=0 trainable:flag",
    "activation": "op:text name:text",
    "leaky_relu": "op:text name:text slope:number",
    "avg_pool2d": "op:text kernel:pair stride:pair",
    "scale": "op:text factor:number",
    "residual": "op:text branch:any",
}
NAMES = ("weight", "bias", "mean", "var")  # the fields that name tensors


class BadCertificate(ValueError):
    """The files are no certificate of this format; the message says where."""


@dataclass(frozen=True)
class Certificate:
    """What the two files hold, checked for form."""

    document: dict[str, Any]
    tensors: Mapping[str, Array]
    claims: Mapping[str, float]
    inputs: Array
    targets: Array


def read(path: str | Path, memory: int | None = None) -> Certificate:
    """Read and check a certificate folder.

    Args:
        path: the folder.
        memory: the most bytes that reading and checking may take, files included; None: what the machine has.

    Raises:
        BadCertificate: with what is wrong.
    """
    memory = machine_memory() if memory is None else memory
    document = _document(_bytes(Path(path) / "certificate.json", JSON_BYTES))
    raw = _bytes(Path(path) / "tensors.safetensors", memory // 4)  # the file, its tensors, and looking at them
    tensors = _tensors(raw, document)
    data, last = document["data"], document["kind"] == "last layer"
    inputs, targets, N, C = tensors[data["inputs"]], tensors[data["targets"]], data["samples"], data["outputs"]
    _need(inputs.ndim >= 2 and len(inputs) == N, f"inputs have shape {inputs.shape}, data.samples is {N}")
    _need(inputs.ndim == 2 or not last, f"features have shape {inputs.shape}, not (N, m)")
    _need(targets.shape == (N, C), f"targets have shape {targets.shape}, not {(N, C)}")
    shape, numbers = _follow(document["network"], inputs.shape[1:], tensors, N, 1 if last else C)
    _need(shape == (C,), f"the network ends in values of shape {shape}, not {(C,)}")
    n, L = (N if last else N * C), sum("trainable" in o for o in flattened(document["network"]))
    need = 4 * len(raw) + 8 * (n * n + 8 * BLOCK * n + numbers + 8 * N * (L + 1) ** 2 + 4 * min(WORKSPACE, n * COLUMNS))
    _need(need <= memory, f"checking this may take {need:.3g} bytes; at most {memory:.3g} may be taken")
    return Certificate(document, tensors, {k: float(v) for k, v in document["claims"].items()}, inputs, targets)


def machine_memory() -> int:
    """Return the bytes of memory of this machine; 16 GiB where that cannot be asked."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**34


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise BadCertificate(message)


def _bytes(path: Path, most: int) -> bytes:
    """Read a regular file once: what is hashed is what is used."""
    try:
        about = path.stat()
        _need(stat.S_ISREG(about.st_mode), f"{path.name} is not a file")
        _need(about.st_size <= most, f"{path.name} has {about.st_size} bytes; at most {most} are read")
        with path.open("rb") as file:
            raw = file.read(about.st_size + 1)
    except OSError as error:
        raise BadCertificate(f"{path.name} cannot be read: {error.strerror}") from error
    _need(len(raw) == about.st_size, f"{path.name} changes while it is read")
    return raw


def _fields(value: Any, form: str, where: str) -> None:
    """See that an object has these fields and no others, each of its kind."""
    kinds = dict(field.split(":") for field in form.split())
    _need(isinstance(value, dict), f"{where} is not an object")
    _need(set(value) == set(kinds), f"{where}: fields missing or unknown: {sorted(set(value) ^ set(kinds))[:5]!r:.200}")
    for name, kind in kinds.items():
        _need(KINDS[kind](value[name]), f"{where}.{name} is {value[name]!r:.200}")


def _document(raw: bytes) -> dict[str, Any]:
    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise BadCertificate(f"certificate.json cannot be read: {error}") from error
    level, depth = [document], 0
    while level:
        depth += 1
        _need(depth <= DEPTH, f"certificate.json is nested more than {DEPTH} deep")
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())]
    _fields(document, DOCUMENT, "certificate")
    _need((document["format"], document["version"]) == ("surefoot-certificate", 1), "not a certificate of version 1")
    what, last = (document["kind"], document["loss"]), document["kind"] == "last layer"
    _need(
        what == ("interpolation", "squared error") or (last and what[1] in LOSSES), f"kind and loss are {what!r:.200}"
    )
    entropy = document["loss"] == "cross-entropy"
    _fields(document["data"], "samples:count outputs:count inputs:text targets:text source:text", "data")
    _fields(document["tensors"], "file:text sha256:text bytes:count", "tensors")
    _need(document["tensors"]["file"] == "tensors.safetensors", "tensors.file is not tensors.safetensors")
    _fields(document["claims"], "sigma_min:number>0" if entropy else CLAIMS, "claims")
    _fields(document["units"], "" if entropy else "lr_max:number>0", "units")
    _operations(document["network"])
    operations, gram = flattened(document["network"]), document["gram"]
    trainable = [i for i, o in enumerate(operations) if o.get("trainable")]
    _need(
        0 < len(set(gram)) == len(gram) and set(gram) <= set(trainable), f"gram is {gram!r:.200}, of {trainable!r:.200}"
    )
    alone = len(operations) == 1 and operations[0]["op"] == "linear" and operations[0]["bias"] is not None
    _need(not last or (alone and trainable == [0]), "a last layer is one trainable linear with a bias")
    return document


LOSSES = ("squared error", "cross-entropy")


def _operations(operations: Any) -> None:
    _need(isinstance(operations, list) and bool(operations), "network: a list of operations is missing")
    for o in operations:
        op, name = (o.get("op"), o.get("name")) if isinstance(o, dict) else (None, None)
        form = OPERATIONS.get("leaky_relu" if (op, name) == ("activation", "leaky_relu") else str(op))
        _need(form is not None and op != "leaky_relu", f"network: operation {o!r:.200}")
        _fields(o, str(form), str(op))
        _need(op != "activation" or name in (*ACTIVATIONS, "relu", "leaky_relu"), f"activation {name!r:.200}")
        if op == "residual":
            _operations(o["branch"])


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _need(len(dict(pairs)) == len(pairs), "a field is named twice")
    return dict(pairs)


def _tensors(raw: bytes, document: dict[str, Any]) -> dict[str, Array]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    said = document["tensors"]
    _need(len(raw) == said["bytes"], f"tensors.safetensors has {len(raw)} bytes, not {said['bytes']}")
    _need(hashlib.sha256(raw).hexdigest() == said["sha256"], "tensors.safetensors is not the file with this SHA-256")
    try:
        tensors = load(raw)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCertificate(f"tensors.safetensors cannot be read: {error!r:.200}") from error
    names = [document["data"][k] for k in ("inputs", "targets")]
    names += [o[k] for o in flattened(document["network"]) for k in NAMES if o.get(k) is not None]
    _need(len(set(names)) == len(names), "a tensor is used twice; tied weights have no rule")
    _need(set(names) == set(tensors), f"tensors missing or unused: {sorted(set(names) ^ set(tensors))[:5]!r:.200}")
    for name, x in tensors.items():
        _need(x.dtype == np.float64 and x.size > 0, f"tensor {name!r:.200} is {x.dtype} {x.shape}, not float64")
        a = np.abs(x)  # NaN fails
        fine = bool(np.all((a == 0) | ((a >= SMALLEST) & (a <= LARGEST))))
        _need(fine, f"tensor {name!r:.200}: NaN or beyond [{SMALLEST}, {LARGEST}], where rounding is not bounded")
    return tensors


def _follow(
    operations: Operations, shape: tuple[int, ...], tensors: Mapping[str, Array], N: int, C: int
) -> tuple[tuple[int, ...], int]:
    """Follow a sample's shape through the operations; return the last, and how many numbers these may take."""
    numbers = 0
    for o in operations:
        op, start, extra = o["op"], shape, 0
        own: list[tuple[int, ...]] = [tensors[o[k]].shape if o.get(k) is not None else () for k in NAMES]
        W, fits = own[0], True
        if op == "flatten":
            shape = (math.prod(shape),)
        elif op == "linear":
            fits, shape = len(W) == 2 and shape == W[1:], W[:1]
        elif op in ("conv2d", "avg_pool2d"):
            conv = op == "conv2d"
            _need(len(shape) == 3 and (not conv or (len(W) == 4 and W[1] == shape[0])), f"{op}: {W} on values {shape}")
            windows = (
                Windows(W[2:], o["stride"], o["padding"], o["dilation"]) if conv else Windows(o["kernel"], o["stride"])
            )
            sizes, c = windows.positions(shape[1:]), shape[0]
            padded, T = math.prod(windows.padded(shape[1:])), math.prod(sizes)
            fits, shape = min(sizes) > 0, (W[0] if conv else c, *sizes)
            extra = c * ((2 + C) * padded + 4 * (T + C) * math.prod(windows.kernel) + C * T)
        elif op == "batch_norm":
            fits = len(shape) in (1, 3) and all(x == shape[:1] for x in own)
            _need(
                float((tensors[o["var"]] + float(o["eps"])).min()) >= SMALLEST, "batch_norm: var + eps is not positive"
            )
        elif op == "residual":
            shape, extra = _follow(o["branch"], shape, tensors, N, C)
            fits, extra = shape == start, extra // N
        fits = fits and (not own[1] or op == "batch_norm" or own[1] == shape[:1])
        _need(fits, f"{op}: weights {own} do not take values {start} to {shape}")
        numbers += N * (extra + (12 + 4 * C) * (math.prod(start) + math.prod(shape))) + 8 * math.prod(W)
    return shape, numbers
