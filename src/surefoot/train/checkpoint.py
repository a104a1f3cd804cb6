"""Everything a run needs to go on bit for bit: weights, optimizer, random numbers, position."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim import Optimizer

from surefoot.errors import InputError
from surefoot.train.config import plain
from surefoot.train.distributed import Team, part_like, whole
from surefoot.train.files import TEMPORARY, write_folder

KEEP = 2


def save_checkpoint(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    progress: dict[str, Any],
    team: Team,
    extra: dict[str, Tensor] | None = None,
) -> Path:
    """Write `folder`/step-NNNNNNNN with model.safetensors, optimizer.safetensors and state.json; keep the newest two.

    Args:
        folder: the run's checkpoints folder.
        step: number of steps taken.
        model: its state dictionary is saved; tensors that share memory are saved once.
        optimizer: its state dictionary is saved.
        progress: what else the loop needs, as strict JSON.
        team: every rank hands in its parts, rank 0 writes them whole: a checkpoint knows nothing of ranks.
        extra: more tensors, in extra.safetensors; see `load_extra`.
    """
    weights, aliases = _unique(_whole_state(model))
    state = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for index, entries in sorted(state["state"].items()):  # all ranks in the same order, which a loaded state is not in
        for name, value in sorted(entries.items()):
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = whole(value)
            else:
                numbers[f"{index}.{name}"] = value
    for name, value in state.items():
        if isinstance(value, Tensor):
            tensors[name] = value
    tensors.update(_random_state())
    document = {
        "step": step,
        "aliases": aliases,
        "optimizer": numbers,
        "param_groups": [{k: _group_value(v) for k, v in group.items()} for group in state["param_groups"]],
        "python_random": _to_lists(random.getstate()),
        "progress": progress,
    }
    path = folder / f"step-{step:08d}"

    def write() -> None:
        if path.exists():
            return
        write_folder(
            path,
            {
                "model.safetensors": save(weights),
                "optimizer.safetensors": save({k: v.detach().contiguous().clone() for k, v in tensors.items()}),
                "state.json": json.dumps(document, allow_nan=False).encode(),
                **({"extra.safetensors": save(extra)} if extra else {}),
            },
        )
        for old in checkpoints(folder)[:-KEEP]:
            shutil.rmtree(old)

    team.on_main(write)
    return path


def checkpoints(folder: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    return sorted(folder.glob("step-*")) if folder.is_dir() else []


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> tuple[int, dict[str, Any]]:
    """Bring model, optimizer and random numbers to where they were; return the step and the loop's own progress."""
    try:
        document = json.loads((path / "state.json").read_text(encoding="utf-8"))
        weights = load((path / "model.safetensors").read_bytes())
        tensors = load((path / "optimizer.safetensors").read_bytes())
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"checkpoint {path} cannot be read ({error}); delete it to go on from the one before"
        ) from error
    for alias, name in document["aliases"].items():
        weights[alias] = weights[name]
    own = model.state_dict()
    model.load_state_dict({name: part_like(w, own[name]) if name in own else w for name, w in weights.items()})
    _restore_random(tensors, document["python_random"])
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in [*tensors.items(), *document["optimizer"].items()]:
        index, dot, entry = name.partition(".")
        if dot:
            value = part_like(value, params[int(index)]) if isinstance(value, Tensor) else value
            state.setdefault(int(index), {})[entry] = value
        else:
            top[name] = value
    groups = [{k: float("inf") if v == "inf" else v for k, v in group.items()} for group in document["param_groups"]]
    optimizer.load_state_dict({**top, "state": state, "param_groups": groups})
    return document["step"], document["progress"]


def load_extra(path: Path) -> dict[str, Tensor]:
    """Return the `extra` tensors of a checkpoint; none where it was saved without."""
    file = path / "extra.safetensors"
    try:
        return load(file.read_bytes()) if file.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"checkpoint {path} cannot be read ({error}); delete it to go on from the one before"
        ) from error


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process had not finished writing."""
    for path in [*folder.glob(f"{TEMPORARY}*"), *(folder / "checkpoints").glob(f"{TEMPORARY}*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _whole_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state dictionary with every tensor whole; those that are one parameter stay one tensor."""
    one = {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    found: dict[Any, Tensor] = {}
    state = {}
    for name, value in model.state_dict().items():
        key = one.get(name, name)
        if key not in found:
            found[key] = whole(value)
        state[name] = found[key]
    return state


def _unique(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    weights: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, value in state.items():
        key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            weights[name] = value.detach().contiguous().clone()
    return weights, aliases


def _group_value(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.item()
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else plain(value)


def _random_state() -> dict[str, Tensor]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert name == "MT19937"
    state = {
        "torch_random": torch.get_rng_state(),
        "numpy_random": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_random_rest": torch.tensor([float(position), float(has_gauss), float(gauss)], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state |= {f"cuda_random_{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def _restore_random(tensors: dict[str, Tensor], python_state: list[Any]) -> None:
    torch.set_rng_state(tensors.pop("torch_random"))
    keys = tensors.pop("numpy_random").numpy().astype(np.uint32)
    position, has_gauss, gauss = tensors.pop("numpy_random_rest").tolist()
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), gauss))
    version, internal, gauss_next = python_state
    random.setstate((version, tuple(internal), gauss_next))
    for name in [n for n in tensors if n.startswith("cuda_random_")]:
        torch.cuda.set_rng_state(tensors.pop(name), int(name.rsplit("_", 1)[1]))


def _to_lists(value: Any) -> Any:
    return [_to_lists(v) for v in value] if isinstance(value, tuple) else value
