"""Reading a certificate that anybody may have written: no code of it runs, nothing is allocated on its word alone."""

import hashlib
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from surefoot.check.network import COLUMNS, WORKSPACE
from surefoot.check.operations import ACTIVATIONS, NAMES, OPERATIONS, Fields, Refused, Shape, Tensors, flattened, need
from surefoot.check.rounding import BLOCK, LARGEST, SMALLEST, Array

FILES = ("certificate.json", "tensors.safetensors")
MACHINE = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 2**34
JSON_BYTES, DEPTH = 2**24, 32
KINDS = {
    "any": lambda v: True,
    "text": lambda v: isinstance(v, str),
    "text?": lambda v: v is None or isinstance(v, str),
    "activation": lambda v: v in (*ACTIVATIONS, "relu", "leaky_relu"),
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
KNOWN = (("interpolation", "squared error"), ("last layer", "squared error"), ("last layer", "cross-entropy"))
FORMS = {  # the fields of an object and the kind of each
    "certificate": "format:text version:count kind:text statement:text loss:text network:any gram:counts data:any "
    "tensors:any claims:any units:any levels:any assumptions:any made_by:any",
    "data": "samples:count outputs:count inputs:text targets:text source:text",
    "tensors": "file:text sha256:text bytes:count",
    "claims of squared error": "residual:number>0 sigma_min:number>0 ball:number>0 jacobian_norm:number>0 "
    "beta:number>=0 q:number>=0 epsilon:number>0 radius:number>=0 sigma_star:number>0 eta_max:number>0",
    "units of squared error": "lr_max:number>0",
    "claims of cross-entropy": "sigma_min:number>0",
    "units of cross-entropy": "",
}


class Certificate(NamedTuple):
    """What the two files hold, checked for form."""

    document: dict[str, Any]
    tensors: Tensors
    claims: dict[str, float]
    inputs: Array
    targets: Array


def read(path: str | Path, memory: int | None = None) -> Certificate:
    """Read and check a certificate folder, or raise Refused; `memory` bytes may be taken, files included."""
    memory = MACHINE if memory is None else memory
    document = _document(_bytes(Path(path) / FILES[0], JSON_BYTES))
    raw = _bytes(Path(path) / FILES[1], memory // 4)  # the file, its tensors, and looking at them
    tensors = _tensors(raw, document)
    data, last, network = document["data"], document["kind"] == "last layer", document["network"]
    inputs, targets, N, C = tensors[data["inputs"]], tensors[data["targets"]], data["samples"], data["outputs"]
    need(inputs.shape[:1] == (N,) and (inputs.ndim == 2 or (inputs.ndim > 2 and not last)), f"inputs {inputs.shape}")
    need(targets.shape == (N, C), f"targets have shape {targets.shape}, not {(N, C)}")
    end, numbers = _follow(network, tensors, inputs.shape[1:], 1 if last else C)
    need(end == (C,), f"the network ends in values of shape {end}, not {(C,)}")
    n, L = (N if last else N * C), sum("trainable" in o for o in flattened(network))
    gram = n * (n + 8 * max(BLOCK, C) + 4 * min(WORKSPACE // n + 1, COLUMNS))
    most = 12 * len(raw) + 8 * (gram + N * (numbers + 8 * (L + 1) ** 2))
    need(most <= memory, f"checking this may take {most:.3g} bytes; at most {memory:.3g} may be taken")
    return Certificate(document, tensors, {k: float(v) for k, v in document["claims"].items()}, inputs, targets)


def _bytes(path: Path, most: int) -> bytes:
    """Read a regular file once: what is hashed is what is used."""
    try:
        info = path.stat()
        need(stat.S_ISREG(info.st_mode) and info.st_size <= most, f"{path.name} is not a file of at most {most} bytes")
        with path.open("rb") as file:
            return file.read(info.st_size)
    except OSError as error:
        raise Refused(f"{path.name} cannot be read: {error.strerror}") from error


def _document(raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len(dict(pairs)) == len(pairs), "a field is named twice")
        return dict(pairs)

    try:
        document = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise Refused(f"certificate.json cannot be read: {error}") from error
    level = [document]
    for _ in range(DEPTH):
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x if isinstance(x, list) else ())]
    need(not level, f"certificate.json is nested more than {DEPTH} deep")
    _fields(document, "certificate", FORMS["certificate"])
    need((document["format"], document["version"]) == ("surefoot-certificate", 1), "not a certificate of version 1")
    what = (document["kind"], document["loss"])
    need(what in KNOWN, f"kind and loss are {what!r:.200}")
    for name in ("data", "tensors", "claims", "units"):
        _fields(document[name], name, FORMS.get(name) or FORMS[f"{name} of {what[1]}"])
    need(document["tensors"]["file"] == FILES[1], f"tensors.file is not {FILES[1]}")
    _operations(document["network"])
    operations, gram = flattened(document["network"]), document["gram"]
    trainable = {i for i, o in enumerate(operations) if o.get("trainable")}
    need(0 < len(set(gram)) == len(gram) and set(gram) <= trainable, f"gram is {gram!r:.200}, of {trainable!r:.200}")
    alone = len(operations) == 1 and operations[0]["op"] == "linear" and operations[0]["bias"] is not None
    need(alone or what == KNOWN[0], "a last layer is one linear with a bias")
    return document


def _fields(value: Any, name: str, form: str) -> None:
    """See that an object has the fields of its form and no others, each of its kind."""
    kinds = dict(field.split(":") for field in form.split())
    need(isinstance(value, dict), f"{name} is not an object")
    need(set(value) == set(kinds), f"{name}: fields missing or unknown: {sorted(set(value) ^ set(kinds))[:5]!r:.200}")
    for field, kind in kinds.items():
        need(KINDS[kind](value[field]), f"{name}.{field} is {value[field]!r:.200}")


def _operations(operations: Any) -> None:
    need(isinstance(operations, list) and bool(operations), "network: a list of operations is missing")
    for o in operations:
        op = str(o.get("op")) if isinstance(o, dict) else ""
        need(op in (*OPERATIONS, "residual"), f"network: operation {o!r:.200}")
        form = OPERATIONS[op][0] if op != "residual" else "branch:any"
        slope = " slope:number" if op == "activation" and o.get("name") == "leaky_relu" else ""
        _fields(o, op, "op:text " + form + slope)
        if op == "residual":
            _operations(o["branch"])


def _tensors(raw: bytes, document: dict[str, Any]) -> dict[str, Array]:
    fits = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}.items() <= document["tensors"].items()
    need(fits, f"{FILES[1]} is not the file with this size and SHA-256")
    try:
        tensors = load(raw)
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refused(f"{FILES[1]} cannot be read: {error!r:.200}") from error
    names = [document["data"][k] for k in ("inputs", "targets")]
    names += [o[k] for o in flattened(document["network"]) for k in NAMES if o.get(k) is not None]
    need(len(set(names)) == len(names), "a tensor is used twice; tied weights have no rule")
    need(set(names) == set(tensors), f"tensors missing or unused: {sorted(set(names) ^ set(tensors))[:5]!r:.200}")
    for name, x in tensors.items():
        need(x.dtype == np.float64 and x.size > 0, f"tensor {name!r:.200} is {x.dtype} {x.shape}, not float64")
        a = np.abs(x)  # NaN fails
        fine = bool(np.all((a == 0) | ((a >= SMALLEST) & (a <= LARGEST))))
        need(fine, f"tensor {name!r:.200}: NaN or beyond [{SMALLEST}, {LARGEST}], where rounding is not bounded")
    return tensors


def _follow(operations: list[Fields], tensors: Tensors, shape: Shape, C: int) -> tuple[Shape, int]:
    """Follow a sample's shape through the operations; return the last, and how many numbers these may take a sample."""
    numbers = 0
    for o in operations:
        W = tensors[o["weight"]].shape if "weight" in o else ()
        vectors = [tensors[o[k]].shape for k in NAMES[1:] if o.get(k) is not None]
        if o["op"] == "residual":
            after, extra = _follow(o["branch"], tensors, shape, C)
            fits = after == shape
        else:
            after, extra = OPERATIONS[o["op"]][1](o, W, shape), 0
            fits = after != () and all(v == after[:1] for v in vectors)
        need(fits, f"{o['op']}: weights {W}, {vectors} do not take values {shape} to {after}")
        if "stride" in o:  # the windows' contents
            c, T, taps = shape[0], math.prod(after[1:]), math.prod(o.get("kernel", W[2:]))
            extra = 8 * taps * (c * (T + C) + T) + 3 * C * (c * T + math.prod(shape))
        numbers += extra + (12 + 4 * C) * (math.prod(shape) + math.prod(after))
        shape = after
    return shape, numbers
