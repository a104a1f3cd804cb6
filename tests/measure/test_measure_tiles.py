"""Tiles: their sizes and shares, memory, the file, and going on after a kill."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from surefoot.errors import InputError
from surefoot.measure import gram_file
from surefoot.measure.forms import Layout
from surefoot.measure.tangent import tangent_gram
from surefoot.measure.tiles import (
    blocks_of,
    format_bytes,
    largest_tile,
    pairs_of,
    parse_bytes,
    share_out,
    tile_memory,
)

MODEL = """
    import torch
    from torch import nn
    torch.set_num_threads(1)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))
    x = torch.randn(30, 5)
"""


def fixed() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(30, 5)


def run(code: str, *arguments: str) -> subprocess.Popen[str]:
    script = textwrap.dedent(MODEL) + textwrap.dedent(code)
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


# ---------------------------------------------------------------------------------------------------------- planning


@pytest.mark.parametrize(
    ("text", "number"),
    [("4GB", 4 * 10**9), ("1.5 GiB", 3 * 2**29), ("500 mb", 5 * 10**8), ("7", 7), ("2e3 kB", 2 * 10**6), (1e6, 10**6)],
)
def test_amounts_of_memory(text: str | float, number: int) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "4 XB", "1ib", 0, -5, float("nan"), float("inf"), True, "1.2.3MB"])
def test_no_amounts_of_memory(text: str | float) -> None:
    with pytest.raises(InputError, match="max_memory="):
        parse_bytes(text)


def test_memory_as_a_reader_writes_it() -> None:
    assert [format_bytes(n) for n in (12, 80e9, 2.5e15)] == ["12 bytes", "80 GB", "2.5e+03 TB"]


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.booleans(), st.integers(1, 4))
def test_pairs_cover_everything_once(n: int, m: int, tile: int, symmetric: bool, ranks: int) -> None:
    layout = Layout("full", 1, symmetric)
    rows, columns = blocks_of(n, tile), blocks_of(n if symmetric else m, tile)
    pairs = pairs_of(layout, len(rows), len(columns))
    K = torch.zeros(layout.shape(n, n if symmetric else m))
    for i, j in pairs:
        K[layout.index(rows[i], columns[j])] += 1
        if symmetric and i != j:
            K[layout.index(columns[j], rows[i])] += 1
    assert K.eq(1).all()
    owners = share_out([1.0 + i for i in range(len(pairs))], ranks)
    assert owners == sorted(owners)
    assert set(owners) <= set(range(ranks))


def test_shares_are_even() -> None:
    costs = [1.0, 3.0, 2.0] * 20
    owners = share_out(costs, 4)
    sums = [sum(cost for cost, owner in zip(costs, owners) if owner == rank) for rank in range(4)]
    assert max(sums) - min(sums) <= 6.0


def test_the_largest_tile_is_the_largest_that_fits() -> None:
    layout = Layout("full", 10, True)
    t = largest_tile(layout, 5_000, 10**6, 1e9)
    assert 1 < t < 10**6
    assert tile_memory(layout, 5_000, t) <= 1e9 < tile_memory(layout, 5_000, t + 1)
    assert largest_tile(layout, 5_000, 10**6, 100.0) == 0


def test_too_little_memory_makes_tiles_with_the_same_numbers() -> None:
    model, x = fixed()
    calls = []
    untiled = tangent_gram(model, x, progress=lambda *seen: calls.append(seen))
    assert calls == [(1, 1, 0.0)]
    calls.clear()
    tiled = tangent_gram(model, x, max_memory="85 kB", progress=lambda *seen: calls.append(seen))
    assert len(calls) > 3
    assert [done for done, _, _ in calls] == list(range(1, calls[0][1] + 1))
    assert calls[-1][2] == 0.0 < calls[0][2]
    assert (tiled - untiled).abs().max() < 1e-13 * untiled.abs().max()
    assert torch.equal(tiled, tangent_gram(model, x, max_memory="85 kB"))


def test_peak_memory(tmp_path: Path) -> None:
    """A result of 72 MB takes no more than 1.5 times that and two tiles; on disk, next to none of it."""
    code = """
        import resource, sys
        from surefoot.measure.tangent import tangent_gram
        # The process's own highest, in kB: ru_maxrss also knows what its parent held when it was forked.
        peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        model = nn.Sequential(nn.Linear(5, 512), nn.Tanh(), nn.Linear(512, 10))
        x = torch.randn(300, 5)
        tangent_gram(model, x[:8])
        for path in (sys.argv[1], None):
            before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
            K = tangent_gram(model, x, tile=50, path=path)
            print((1024 * peak() - before) / (8 * K.numel()))
    """
    process = run(code, str(tmp_path / "K.npy"))
    printed, _ = process.communicate()
    assert process.returncode == 0
    on_disk, in_memory = map(float, printed.split())
    tile = tile_memory(Layout("full", 10, True), 8 * 1024 * 11, 50) / (8 * 3000**2)
    assert tile < 0.4
    assert 0.9 < in_memory < 1.5 + tile
    assert on_disk < 0.7


# ---------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("form", ["full", "class blocks", "sample blocks", "sum of outputs"])
def test_the_file_holds_the_same_bits(tmp_path: Path, form) -> None:
    model, x = fixed()
    path = tmp_path / "K.npy"
    K = tangent_gram(model, x, form=form, tile=8)
    found = tangent_gram(model, x, form=form, tile=8, path=path)
    assert torch.equal(found, K)
    assert np.array_equal(np.load(path), K.numpy())
    found.zero_()  # stays in memory
    assert np.array_equal(np.load(path), K.numpy())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["K.npy", "K.npy.json"]
    calls = []
    again = tangent_gram(model, x, form=form, path=path, progress=lambda *seen: calls.append(seen))
    assert torch.equal(again, K)
    assert calls == []  # nothing was left to do


def test_a_file_larger_than_the_memory(tmp_path: Path) -> None:
    model, x = fixed()
    with pytest.raises(InputError, match="give path="):
        tangent_gram(model, x, max_memory="60 kB")
    found = tangent_gram(model, x, max_memory="60 kB", path=tmp_path / "K.npy")
    K = tangent_gram(model, x)
    assert json.loads((tmp_path / "K.npy.json").read_text())["tile"] < 30
    assert (found - K).abs().max() < 1e-13 * K.abs().max()


def test_goes_on_after_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "K.npy"
    code = f"""
        import time
        from surefoot.measure.tangent import tangent_gram
        def slowly(done, total, left):
            print(done, total, flush=True)
            time.sleep(60 if done == 4 else 0)
        tangent_gram(model, x, tile=7, path={str(path)!r}, progress=slowly)
    """
    process = run(code)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("4 "):
            break
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()
    done = json.loads((tmp_path / "K.npy.json").read_text())["done"]
    assert len(done) == 4
    # A tile that was being written when the process died is worked out again, whatever lies there.
    array = np.load(path, mmap_mode="r+")
    for name in ("K.npy.new", "K.npy.json.new", "K.npy.1.json.new"):
        (tmp_path / name).write_text("torn")
    assert (array[-21:, -21:] == 0).all()
    array[-21:, -21:] = 7.0
    array.flush()
    finished = array[:21, :21].copy()

    model, x = fixed()
    calls = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = tangent_gram(model, x, path=path, progress=lambda done, total, left: calls.append((done, total)))
        straight = tangent_gram(model, x, tile=7)
    finally:
        torch.set_num_threads(threads)
    assert calls == [(k, 15) for k in range(5, 16)]
    assert torch.equal(found, straight)
    assert np.array_equal(found.numpy()[:21, :21], finished)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["K.npy", "K.npy.json"]


@pytest.mark.parametrize("tiles", [None, 0, 5])
def test_goes_on_after_a_kill_at_any_time(tmp_path: Path, tiles: int | None) -> None:
    """Killed as soon as the journal is there (None), or names more tiles than that: amid whatever follows."""
    path = tmp_path / "K.npy"
    journal = tmp_path / "K.npy.json"
    code = f"""
        from surefoot.measure.tangent import tangent_gram
        print("ready", flush=True)
        tangent_gram(model, x, tile=2, path={str(path)!r})
    """
    process = run(code)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    until = time.monotonic() + 60
    while time.monotonic() < until:
        if journal.exists() and (tiles is None or len(json.loads(journal.read_text())["done"]) > tiles):
            break
    process.kill()
    assert process.wait() == -signal.SIGKILL  # before it was through
    process.stdout.close()
    model, x = fixed()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(tangent_gram(model, x, tile=2, path=path), tangent_gram(model, x, tile=2))
    finally:
        torch.set_num_threads(threads)


def test_never_mixes_two_grams(tmp_path: Path) -> None:
    model, x = fixed()
    path = tmp_path / "K.npy"
    K = tangent_gram(model, x, tile=8, path=path).clone()
    with torch.no_grad():
        model[0].bias[0] += 1e-6
    with pytest.raises(InputError, match=r"holds another Gram: model differ; .*K\.npy\.json"):
        tangent_gram(model, x, path=path)
    model, _ = fixed()
    for options, word in [
        ({"inputs": x + 1e-6}, "inputs"),
        ({"other": x}, "other"),
        ({"form": "sum of outputs"}, "form"),
        ({"classes": [0, 1]}, "classes"),
        ({"params": ["2"]}, "params"),
        ({"method": "ghost"}, "method"),
        ({"output": lambda found: found * 2}, "output"),
        ({"model": nn.Sequential(model[0], nn.ReLU(), model[2])}, "architecture"),
    ]:
        with pytest.raises(InputError, match=rf"holds another Gram: .*{word}"):
            tangent_gram(**{"model": model, "inputs": x, "path": path, **options})
    with pytest.raises(InputError, match=r"tile=5: the file was begun with 8"):
        tangent_gram(model, x, tile=5, path=path)
    assert torch.equal(tangent_gram(model, x, path=path), K)


def test_the_same_weights_in_another_function_are_another_gram(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        factor = 1.0

        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * self.factor

    _, x = fixed()
    model = Scaled(nn.Linear(5, 2))
    tangent_gram(model, x, path=tmp_path / "K.npy")
    model.factor = 1.001
    with pytest.raises(InputError, match=r"holds another Gram: outputs differ"):
        tangent_gram(model, x, path=tmp_path / "K.npy")


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    model, x = fixed()
    path = tmp_path / "K.npy"
    np.save(path, np.ones(3))
    with pytest.raises(InputError, match=r"no Gram of this program"):
        tangent_gram(model, x, path=path)
    assert np.array_equal(np.load(path), np.ones(3))
    for text, message in [
        ("{", "cannot be read"),
        ("[]", "not this program's"),
        ('{"format": "x"}', "not this program's"),
    ]:
        (tmp_path / "K.npy.json").write_text(text)
        with pytest.raises(InputError, match=message):
            tangent_gram(model, x, path=path)
    assert np.array_equal(np.load(path), np.ones(3))


def test_a_lost_or_spoilt_file(tmp_path: Path) -> None:
    model, x = fixed()
    path = tmp_path / "K.npy"
    K = tangent_gram(model, x, tile=8, path=path).clone()
    path.unlink()
    assert torch.equal(tangent_gram(model, x, path=path), K)  # begun anew, with the same tiles
    np.save(path, np.ones(3))
    with pytest.raises(InputError, match=r"does not have the shape \(90, 90\)"):
        tangent_gram(model, x, path=path)
    path.write_bytes(b"nothing")
    with pytest.raises(InputError, match=r"is no \.npy file"):
        tangent_gram(model, x, path=path)


def test_a_disk_too_small_is_seen_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = fixed()
    usage = type(gram_file.shutil.disk_usage(tmp_path))(10**6, 10**6 - 20_000, 20_000)
    monkeypatch.setattr(gram_file.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(InputError, match=r"takes 64\.8 kB and the disk has 20 kB, enough for 56% of the samples"):
        tangent_gram(model, x, path=tmp_path / "K.npy")
    assert list(tmp_path.iterdir()) == []
