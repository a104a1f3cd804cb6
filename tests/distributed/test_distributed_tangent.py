"""The tangent Gram over two real processes has the bits of one process with the same tiles."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed_launch import run_all
from tangent_cases import FORMS, TILE, model_and_samples

from surefoot.measure.tangent import tangent_gram

SCRIPT = Path(__file__).with_name("tangent_cases.py")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
SECONDS = 300  # a case takes ten; beside other work ten times as long


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks have
    yield
    torch.set_num_threads(threads)


def test_two_ranks_give_the_bits_of_one_process(tmp_path: Path) -> None:
    [(code, printed)] = run_all([[*TORCHRUN, str(tmp_path)]], tmp_path, SECONDS)
    assert code == 0, printed
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]
    model, x, y = model_and_samples()
    for form in FORMS:
        alone = tangent_gram(model, x, form=form, tile=TILE)
        assert all(torch.equal(rank["found"][form], alone) for rank in ranks), form
    alone = tangent_gram(model, x, y, tile=TILE)
    assert all(torch.equal(rank["found"]["cross"], alone) for rank in ranks)
    alone = tangent_gram(model, x, tile=TILE)
    assert all(torch.equal(rank["found"]["file"], alone) for rank in ranks)
    assert np.array_equal(np.load(tmp_path / "K.npy"), alone.numpy())
    assert all((rank["found"]["by itself"] - alone).abs().max() < 1e-13 * alone.abs().max() for rank in ranks)
    shares = [len(rank["seen"]) for rank in ranks]
    assert sum(shares) == 15
    assert min(shares) >= 6  # neither idles
    assert sorted(path.name for path in tmp_path.glob("K.npy*")) == ["K.npy", "K.npy.json"]
    for rank in ranks:
        differ, too_large = rank["messages"]
        assert "differ between the ranks" in differ
        assert "max_memory=1 kB" in too_large


def test_what_killed_ranks_finished_is_used(tmp_path: Path) -> None:
    [(code, printed)] = run_all([[*TORCHRUN, str(tmp_path), "kill"]], tmp_path, SECONDS)
    assert code not in (0, None), printed
    done = [tuple(pair) for path in tmp_path.glob("K.npy*.json") for pair in json.loads(path.read_text())["done"]]
    assert 4 <= len(done) == len(set(done)) < 15
    model, x, _ = model_and_samples()
    calls = []
    found = tangent_gram(model, x, path=tmp_path / "K.npy", progress=lambda *seen: calls.append(seen))
    assert len(calls) == 15 - len(done)
    assert torch.equal(found, tangent_gram(model, x, tile=TILE))
    assert sorted(path.name for path in tmp_path.glob("K.npy*")) == ["K.npy", "K.npy.json"]
