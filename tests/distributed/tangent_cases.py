"""What every rank runs: the tangent Gram, shared out, in memory and on disk. python tangent_cases.py FOLDER [KILL]."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from surefoot.errors import InputError
from surefoot.measure.tangent import tangent_gram

TILE = 5
FORMS = ("full", "class blocks", "sample blocks", "sum of outputs")


def model_and_samples() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return the same on every rank."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))
    return model, torch.randn(23, 1, 8), torch.randn(11, 1, 8)


def main(folder: Path, kill: bool) -> None:
    """Leave in the folder what this rank got."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model, x, y = model_and_samples()

    def die(done: int, total: int, left: float) -> None:
        if kill and done == 4:
            os.kill(os.getpid(), signal.SIGKILL)

    path = folder / "K.npy"
    seen: list[tuple[int, int]] = []
    found = {"file": tangent_gram(model, x, tile=TILE, path=path, progress=die)}
    for form in FORMS:
        progress = lambda done, total, left: seen.append((done, total))  # noqa: E731
        found[form] = tangent_gram(model, x, form=form, tile=TILE, progress=progress if form == "full" else None)
    found["cross"] = tangent_gram(model, x, y, tile=TILE)
    found["by itself"] = tangent_gram(model, x)
    messages = []
    for options in ({"inputs": x + rank}, {"inputs": x, "max_memory": "1 kB" if rank else None}):
        try:
            tangent_gram(model, **options)  # type: ignore[arg-type]
        except InputError as error:
            messages.append(str(error))
    torch.save({"found": found, "seen": seen, "messages": messages}, folder / f"rank-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), len(sys.argv) > 2)
