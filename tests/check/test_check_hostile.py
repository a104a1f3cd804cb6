"""Files written with bad intentions: a falsy result with a message, no traceback, no memory on their word."""

import json
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_cases import Case, case
from safetensors.numpy import load

from surefoot.check import verify
from surefoot.check.__main__ import main

MEMORY = 2**31


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return case("tanh").write(tmp_path / "certificate")


def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "certificate.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def refused(folder: Path, *words: str) -> str:
    tracemalloc.start()
    result = verify(folder, memory=MEMORY)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not result
    assert result.message, result
    assert not result.statement
    assert peak < 2**28, f"{peak:,} bytes for a small file"
    for word in words:
        assert word in result.message
    assert len(result.message) < 2000
    return result.message


def test_it_holds_before_anybody_touches_it(folder: Path) -> None:
    assert verify(folder, memory=MEMORY)


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = path

    def change(document: dict[str, Any]) -> None:
        at: Any = document
        for key in keys:
            at = at[key]
        at[last] = value

    return change


BAD: dict[str, Callable[[dict[str, Any]], None]] = {
    "another format": _set("format", "zip"),
    "version 2": _set("version", 2),
    "version 1.0 as a flag": _set("version", True),
    "an unknown field": _set("extra", 1),
    "no claims": lambda d: d.pop("claims"),
    "a claim too many": _set("claims", "trust", 1.0),
    "kind is a list": _set("kind", ["interpolation"]),
    "loss unknown": _set("loss", "hinge"),
    "cross-entropy of a whole network": _set("loss", "cross-entropy"),
    "NaN": _set("claims", "residual", float("nan")),
    "infinity": _set("claims", "residual", float("inf")),
    "negative residual": _set("claims", "residual", -1.0),
    "zero sigma_min": _set("claims", "sigma_min", 0),
    "a claim below what is bounded": _set("claims", "residual", 1e-200),
    "a claim that is text": _set("claims", "residual", "0"),
    "a claim that is true": _set("claims", "epsilon", True),
    "a number that is no float64": _set("claims", "jacobian_norm", 2**53 + 1),
    "a huge whole number": _set("claims", "jacobian_norm", 10**400),
    "claims is a list": _set("claims", []),
    "tensors is a number": _set("tensors", 3),
    "tensors is a list of the right names": _set("tensors", ["file", "sha256", "bytes"]),
    "another file": _set("tensors", "file", "../../etc/passwd"),
    "sha256 is null": _set("tensors", "sha256", None),
    "negative bytes": _set("tensors", "bytes", -1),
    "data is null": _set("data", None),
    "negative samples": _set("data", "samples", -4),
    "huge samples": _set("data", "samples", 2**39),
    "samples is true": _set("data", "samples", True),
    "inputs is a path": _set("data", "inputs", "/etc/passwd"),
    "inputs is a list": _set("data", "inputs", ["inputs"]),
    "inputs are the targets": _set("data", "inputs", "targets"),
    "gram is empty": _set("gram", []),
    "gram names an activation": _set("gram", [1]),
    "gram names one twice": _set("gram", [0, 0]),
    "gram is far out": _set("gram", [10**12]),
    "gram holds lists": _set("gram", [[0]]),
    "gram is a flag": _set("gram", [True]),
    "units is a list": _set("units", []),
    "units negative": _set("units", "lr_max", -1.0),
    "network is empty": _set("network", []),
    "network is an object": _set("network", {}),
    "an operation is text": _set("network", 1, "tanh"),
    "an operation without op": _set("network", 1, {"name": "tanh"}),
    "op is a list": _set("network", 1, "op", ["activation"]),
    "an unknown op": _set("network", 1, {"op": "exec", "code": "1/0"}),
    "op leaky_relu": _set("network", 1, {"op": "leaky_relu", "name": "x", "slope": 1.0}),
    "name is a list": _set("network", 1, "name", ["tanh"]),
    "name is a dunder": _set("network", 1, "name", "__class__"),
    "leaky_relu without a slope": _set("network", 1, "name", "leaky_relu"),
    "a slope of tanh": _set("network", 1, "slope", 0.1),
    "trainable is 1": _set("network", 0, "trainable", 1),
    "weight is null": _set("network", 0, "weight", None),
    "weight is missing": _set("network", 0, "weight", "nothing"),
    "tied weights": _set("network", 2, "weight", "0.w"),
    "bias of another shape": lambda d: d["network"][0].update(bias="2.b") or d["network"][2].update(bias="0.b"),
    "an empty branch": _set("network", 1, {"op": "residual", "branch": []}),
    "a branch that is text": _set("network", 1, {"op": "residual", "branch": "tanh"}),
    "a branch that is null": _set("network", 1, {"op": "residual", "branch": None}),
    "pooling of vectors": _set("network", 1, {"op": "avg_pool2d", "kernel": [2, 2], "stride": [1, 1]}),
    "pooling by nothing": _set("network", 1, {"op": "avg_pool2d", "kernel": [0, 2], "stride": [1, 1]}),
    "a stride of flags": _set("network", 1, {"op": "avg_pool2d", "kernel": [1, 1], "stride": [True, True]}),
    "a kernel of three": _set("network", 1, {"op": "avg_pool2d", "kernel": [1, 1, 1], "stride": [1, 1]}),
    "a factor that is text": _set("network", 1, {"op": "scale", "factor": "2"}),
    "a factor out of range": _set("network", 1, {"op": "scale", "factor": 1e300}),
    "deep": lambda d: d.update(made_by=eval("[" * 40 + "]" * 40)),
    "a statement that is a list": _set("statement", []),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_a_bad_document_is_refused(folder: Path, name: str) -> None:
    edit(folder, BAD[name])
    refused(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "cannot be read"),
        (b"\xff\xfe{}", "cannot be read"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, "cannot be read"),
        (b"[" * 200 + b"]" * 200, "nested"),
        (b'{"format": 1, "format": 2}', "named twice"),
        (b"9" * 10_000, "cannot be read"),
        (b" " * (2**24 + 1), "at most"),
    ],
)
def test_what_is_no_document_is_refused(folder: Path, text: bytes, words: str) -> None:
    (folder / "certificate.json").write_bytes(text)
    refused(folder, words)


def test_every_truncation_is_refused(folder: Path) -> None:
    for name in ("certificate.json", "tensors.safetensors"):
        whole = (folder / name).read_bytes()
        for keep in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
            (folder / name).write_bytes(whole[:keep])
            assert not verify(folder, memory=MEMORY)
        (folder / name).write_bytes(whole)
    assert verify(folder, memory=MEMORY)


def with_tensors(folder: Path, raw: bytes) -> None:
    """Replace the tensors and have the document vouch for them."""
    import hashlib

    (folder / "tensors.safetensors").write_bytes(raw)
    edit(folder, lambda d: d["tensors"].update(sha256=hashlib.sha256(raw).hexdigest(), bytes=len(raw)))


def safetensors_file(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def test_hostile_tensor_files_are_refused(folder: Path) -> None:
    whole = (folder / "tensors.safetensors").read_bytes()
    (size,) = struct.unpack("<Q", whole[:8])
    header, data = json.loads(whole[8 : 8 + size]), whole[8 + size :]
    header.pop("__metadata__", None)

    def changed(name: str, **more: Any) -> dict[str, Any]:
        return header | {name: header[name] | more}

    files = {
        "a header longer than the file": struct.pack("<Q", 2**40) + whole[8:],
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + whole[8:],
        "no header": struct.pack("<Q", 0) + data,
        "a header that is no JSON": safetensors_file(b"{" * 50, data),
        "a deep header": safetensors_file(b'{"a":' * 2000 + b"1" + b"}" * 2000, data),
        "overlapping offsets": safetensors_file(
            changed("0.b", data_offsets=header["0.w"]["data_offsets"][:1] * 2), data
        ),
        "offsets outside": safetensors_file(changed("0.b", data_offsets=[0, 2**50]), data),
        "negative offsets": safetensors_file(changed("0.b", data_offsets=[-8, 0]), data),
        "a shape that is larger": safetensors_file(changed("0.b", shape=[2**40]), data),
        "a shape that overflows": safetensors_file(changed("0.b", shape=[2**32, 2**32]), data),
        "a negative shape": safetensors_file(changed("0.b", shape=[-9]), data),
        "integers": safetensors_file(changed("0.b", dtype="I64"), data),
        "an unknown dtype": safetensors_file(changed("0.b", dtype="F1024"), data),
        "bfloat16": safetensors_file(changed("0.b", dtype="BF16", shape=[36]), data),
        "eight bit floats": safetensors_file(changed("0.b", dtype="F8_E4M3", shape=[72]), data),
        "one tensor less": safetensors_file({k: v for k, v in header.items() if k != "0.b"}, data),
        "bytes nobody claims": whole + b"\0" * 8,
        "a path for a name": safetensors_file({("../../x" if k == "0.b" else k): v for k, v in header.items()}, data),
        "one name twice": safetensors_file(
            json.dumps(header)[:-1].encode() + b', "0.b": ' + json.dumps(header["0.w"]).encode() + b"}", data
        ),
        "a pickle": b"cos\nsystem\n(S'touch pwned'\ntR.",
    }
    for name, raw in files.items():
        with_tensors(folder, raw)
        assert refused(folder), name
    with_tensors(folder, whole)
    assert verify(folder, memory=MEMORY)
    assert not list(folder.parent.glob("**/pwned"))


def test_numbers_that_cannot_be_bounded_are_refused(tmp_path: Path) -> None:
    for value in (np.nan, np.inf, -np.inf, 1e200, 1e-200, 5e-324):
        for name in ("0.w", "inputs", "targets"):
            c = case("tanh")
            c.tensors[name].flat[1] = value
            refused(c.write(tmp_path), name)
    for dtype in (np.float32, np.int64):
        c = case("tanh")
        c.tensors["0.b"] = c.tensors["0.b"].astype(dtype)
        refused(c.write(tmp_path), "0.b")


def test_huge_but_allowed_numbers_do_not_crash_it(tmp_path: Path) -> None:
    for name in ("tanh", "gelu", "silu", "softplus", "elu", "relu", "cnn", "residual"):
        for value in (1e100, -1e100, 1e-100, 0.0):
            c = case(name)
            for tensor in c.tensors:
                changed = c.copy()
                changed.tensors[tensor] = np.full_like(changed.tensors[tensor], value)
                result = verify(changed.write(tmp_path), memory=MEMORY)
                assert not result or tensor == "targets", (name, tensor, value, str(result))


def test_a_bias_without_dimensions_is_refused(tmp_path: Path) -> None:
    """It would broadcast: the operation must see that there is one number for each value."""
    for name, tensor in (("tanh", "0.b"), ("cnn", "0.b"), ("cnn", "1.b"), ("cnn", "1.m"), ("tanh", "2.w")):
        c = case(name)
        c.tensors[tensor] = np.array(0.25)
        folder = c.write(tmp_path)
        assert load((folder / "tensors.safetensors").read_bytes())[tensor].shape == ()
        refused(folder, "do not take")


CONV: dict[str, dict[str, Any]] = {
    "padding": {"padding": [4096, 4096]},
    "padding beyond": {"padding": [2**39, 0]},
    "padding negative": {"padding": [-1, 0]},
    "stride": {"stride": [2**39, 2**39], "padding": [4096, 4096]},
    "dilation": {"dilation": [2**39, 1]},
    "no stride": {"stride": [0, 1]},
    "stride is a float": {"stride": [1.0, 1]},
}


@pytest.mark.parametrize("name", sorted(CONV))
def test_a_geometry_cannot_be_a_memory_bomb(tmp_path: Path, name: str) -> None:
    c = case("odd")
    c.operations[0].update(CONV[name])
    refused(c.write(tmp_path))


def test_many_trainable_operations_cannot_be_a_memory_bomb(tmp_path: Path) -> None:
    c = case("tanh")
    width = 9
    for i in range(3000):
        name = f"x{i}"
        c.tensors[name] = np.eye(width)
        c.operations.insert(1, {"op": "linear", "weight": name, "bias": None, "trainable": True})
    c.gram = [0]
    refused(c.write(tmp_path), "at most")


def test_no_more_than_the_estimate_is_allocated(tmp_path: Path) -> None:
    for name in ("tanh", "gelu", "odd", "cnn", "residual"):
        folder = case(name).write(tmp_path / name)
        low, high = 2**20, 2**34
        while high > low * 1.1:  # the least memory with which it is checked
            middle = (low + high) // 2
            low, high = (low, middle) if verify(folder, memory=middle) else (middle, high)
        tracemalloc.start()
        assert verify(folder, memory=high)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= high


def test_links_pipes_devices_and_folders(folder: Path, tmp_path: Path) -> None:
    whole = tmp_path / "elsewhere"
    for name in ("certificate.json", "tensors.safetensors"):
        path = folder / name
        path.rename(whole)
        refused(folder, "cannot be read")
        path.symlink_to(whole)
        assert verify(folder, memory=MEMORY)  # a link to a plain file is a file
        path.unlink()
        path.symlink_to("/dev/zero")
        refused(folder, "not a file")
        path.unlink()
        path.symlink_to(name)  # to itself
        refused(folder, "cannot be read")
        path.unlink()
        os.mkfifo(path)
        refused(folder, "not a file")
        path.unlink()
        path.mkdir()
        refused(folder, "not a file")
        path.rmdir()
        whole.rename(path)
    assert verify(folder, memory=MEMORY)


def test_another_tensors_file_is_refused(folder: Path) -> None:
    other = case("tanh", seed=1).write(folder.parent / "other")
    (folder / "tensors.safetensors").write_bytes((other / "tensors.safetensors").read_bytes())
    refused(folder, "SHA-256")


def test_text_of_the_certificate_never_reaches_the_terminal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(folder, _set("statement", "\x1b[2J VERIFIED by somebody"))
    edit(folder, _set("data", "inputs", "\x1b[2J"))
    assert main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "somebody" not in out
    assert "NOT VERIFIED" in out


def last_layer(entropy: bool, N: int = 6, m: int = 9) -> tuple[Case, dict[str, Any]]:
    rng = np.random.default_rng(0)
    H, y = rng.standard_normal((N, m)), np.eye(3)[np.arange(N) % 3]
    Phi = np.concatenate([H, np.ones((N, 1))], 1)
    W = np.linalg.lstsq(Phi, y, rcond=None)[0].T
    tensors = {"w": W[:, :m].copy(), "b": W[:, m].copy(), "inputs": H, "targets": y}
    s = np.linalg.svd(Phi, compute_uv=False)
    s0, L, rho, eps = s[-1] * (1 - 1e-7), s[0] * 2, 1e-10, 0.5
    claims = {"residual": rho, "sigma_min": s0, "ball": 1.0, "jacobian_norm": L, "beta": 0.0, "q": 0.0, "epsilon": eps}
    claims |= {"radius": rho / (0.49 * s0), "sigma_star": s0, "eta_max": 2 * eps / L**2 * (1 - 1e-9)}
    operations = [{"op": "linear", "weight": "w", "bias": "b", "trainable": True}]
    more: dict[str, Any] = {"kind": "last layer"}
    if entropy:
        more |= {"loss": "cross-entropy", "claims": {"sigma_min": float(s0)}, "units": {}}
    return Case(operations, tensors, {k: float(v) for k, v in claims.items()}, [0]), more


@pytest.mark.parametrize("entropy", [False, True])
def test_last_layer(tmp_path: Path, entropy: bool) -> None:
    c, more = last_layer(entropy)
    folder = c.write(tmp_path)
    edit(folder, lambda d: d.update(more))
    assert verify(folder, audit=True), verify(folder, audit=True)
    edit(folder, lambda d: d["claims"].update(sigma_min=c.claims["sigma_min"] * (1 + 1e-6)))
    assert not verify(folder)
    if entropy:
        c.tensors["targets"][0] = [0.5, 0.5, 0]
        c.write(tmp_path)
        edit(folder, lambda d: d.update(more))
        assert [x.claim for x in verify(folder).lines if not x.holds] == ["targets"]
    c, more = last_layer(entropy, N=12)  # more samples than features: no full rank
    c.claims["sigma_min"] = 1e-3
    c.write(tmp_path)
    edit(folder, lambda d: d.update(more))
    edit(folder, lambda d: d["claims"].update(sigma_min=1e-3))
    assert not verify(folder)


def test_an_activation_that_may_change_its_sign_is_not_proved(tmp_path: Path) -> None:
    c = case("relu", ball=1e-5)
    assert verify(c.write(tmp_path))
    c.claims["ball"] = 10.0
    refused(c.write(tmp_path), "may change its sign")


def test_exit_codes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    assert main([str(folder)]) == 0
    assert main([str(folder), "--audit"]) == 0
    assert "ball arithmetic" in capsys.readouterr().out
    for nothing, why in ((tmp_path / "nothing", "is no folder"), (tmp_path, "holds neither certificate.json nor")):
        assert main([str(nothing)]) == 2
        said = capsys.readouterr().err
        assert why in said
        assert "give the folder of a certificate" in said
    (folder / "certificate.json").rename(tmp_path / "aside")  # half a certificate is a damaged one
    assert main([str(folder)]) == 1
    assert "certificate.json cannot be read" in capsys.readouterr().out
    (tmp_path / "aside").rename(folder / "certificate.json")
    monkeypatch.setattr("surefoot.check.__main__.find_spec", lambda name: None)
    assert main([str(folder), "--audit"]) == 2
    assert "surefoot[audit]" in capsys.readouterr().err
    edit(folder, _set("claims", "residual", 1e-12))
    assert main([str(folder)]) == 1


def test_a_large_network_is_audited_in_its_scalars_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surefoot.check.audit.WORK", 10)
    result = verify(folder, audit=True)
    assert result
    assert "scalar claims audited only" in str(result)


def test_the_audit_would_notice(folder: Path) -> None:
    from surefoot.check.audit import audit_claims
    from surefoot.check.reading import read

    for claim in ("residual", "q", "jacobian_norm", "beta"):
        c = case("tanh")
        c.claims[claim] *= 1 - 1e-6 if claim != "jacobian_norm" else 0.5  # s_max(J) itself is what the audit bounds
        lines, _ = audit_claims(read(c.write(folder)))
        assert claim in [x.claim for x in lines if not x.holds]
    for claim in ("jacobian_norm", "beta"):
        c = case("tanh")
        c.claims[claim] *= 1 + 1e-6  # what follows from it no longer does
        lines, _ = audit_claims(read(c.write(folder)))
        assert not all(x.holds for x in lines)
    for claim in ("sigma_min", "radius", "sigma_star", "eta_max"):
        c = case("tanh")
        c.claims[claim] *= 1 + 1e-6 if claim != "radius" else 1 - 1e-6
        lines, _ = audit_claims(read(c.write(folder)))
        assert not all(x.holds for x in lines)
