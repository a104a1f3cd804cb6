"""The Gram of the tangent kernel: K = J J^T, with J the Jacobian of all outputs at all samples in the parameters."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.measure.capture import Network, call, exact_kernels
from surefoot.measure.forms import Form
from surefoot.measure.gram_file import GramFile, fingerprint
from surefoot.measure.inputs import take
from surefoot.measure.ranks import Ranks
from surefoot.measure.request import Gram, Method, check_options, check_path, prepare, random_state_kept
from surefoot.measure.tiles import (
    Pair,
    blocks_of,
    cost_of,
    default_memory,
    fits_whole,
    format_bytes,
    largest_tile,
    multiplications,
    pairs_of,
    parse_bytes,
    share_out,
    split,
    term_bytes,
    tile_memory,
)

Progress = Callable[[int, int, float], None]


def tangent_gram(
    model: nn.Module,
    inputs: Any,
    other: Any = None,
    *,
    form: Form = "full",
    classes: Sequence[int] | None = None,
    params: Sequence[str | nn.Parameter] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    method: Method = "auto",
    max_memory: int | float | str | None = None,
    tile: int | None = None,
    path: str | Path | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return the Gram of the tangent kernel, layer by layer and without ever forming the Jacobian.

    K[(n, c), (m, e)] = <dF_c(x_n)/dw, dF_e(x_m)/dw>, with F the C outputs (all numbers the model returns for a sample,
    in order) and w the chosen parameters; the index of (n, c) is n C + c. Exact up to rounding, whatever the layers:
    those without a rule of their own go through autograd, sample by sample.

    Everything is worked out in float64, on a float64 copy of the model: of a float32 model this is the Gram of the
    function that its weights mean, not of its rounded arithmetic. Nothing of the model, of its gradients and of the
    random state changes. What does not fit into the memory is worked out in tiles, pairs of blocks of samples; the
    numbers agree with the untiled ones to about 1e-13 relative, and the same tiles give the same bits, on one process
    or many. Where torch.distributed runs, every rank calls this with the same arguments, works on its share of the
    tiles and gets all of K.

    Args:
        model: in eval mode if it has batch norm or dropout.
        inputs: N samples: a tensor, or a tuple (positional) or dictionary (keyword arguments) of them, samples in
            front.
        other: M samples for the columns, like inputs; None: the same as the rows.
        form: which part of K,
            "full": all of it;
            "class blocks": K[c] of each output with itself, (C, N, N), the diagonal blocks of K sorted by outputs;
            "sample blocks": K[n] of each sample with itself, (N, C, C);
            "sum of outputs": the Gram of the single output sum_c F_c, (N, N). An approximation where it stands for K:
            its eigenvalues bound none of K's from below.
        classes: the outputs to take, 0 .. C - 1, in this order; None: all. C is then their number.
        params: names of parameters or modules, or parameters themselves; None: all that require a gradient.
        output: takes the outputs (N, ...) out of what the model returns; None: itself, or its logits.
        method: how layers with several places are contracted; "auto" counts, "ghost" and "materialise" are for
            comparing.
        max_memory: bytes that result and tiles may take together, or "4GB", besides about 100 MB of working space;
            None: half of what is available now. With `path` the result does not count.
        tile: samples in a block, from 1 on, whatever max_memory says; None: all if they fit, or as many as fit.
        path: of a .npy file that takes the result. A JSON beside it says which tiles are done: called again with the
            same arguments after it died, this goes on where it was, and after it ended returns at once.
        progress: called as progress(done, total, seconds_left) after each of this process's tiles.

    Returns:
        float64, on the CPU, symmetric to the bit if other is None. full: (N C, M C); "class blocks": (C, N, M); "sample
        blocks": (N, C, C); "sum of outputs": (N, M). With `path` it is read from the disk as it is used; writing to it
        does not change the file.

    Raises:
        InputError: samples, model or options that make no sense (each named, with the way out), NaN or infinite
            numbers, a result for which memory or disk are too small, or a file that holds another Gram.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> tangent_gram(model, torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([[5., 0., 2., 0.],
                [0., 5., 0., 2.],
                [2., 0., 1., 0.],
                [0., 2., 0., 1.]], dtype=torch.float64)

    Source: the layer-wise contraction of Jacobians (Novak, Sohl-Dickstein, Schoenholz, "Fast finite width neural
    tangent kernel", 2022), with the exact C x C Gram of weights used at several places.
    """
    memory = parse_bytes(max_memory)
    check_options(form, other, method, tile)
    file_path = None if path is None else check_path(Path(path))
    with random_state_kept(model):
        ranks = Ranks()
        gram = ranks.together(lambda: prepare(model, inputs, other, form, classes, params, output, method))
        sample, counts = _probe(gram)
        size = ranks.together(lambda: _choose_tile(gram, sample, memory, tile, file_path, ranks.count))
        size = min(ranks.gather(size))
        shape = gram.layout.shape(gram.n, gram.m)
        about = _about(gram, form, classes, output) if file_path is not None or ranks.count > 1 else {}
        if len({str([about.get(name) for name in ("model", "inputs", "other")]) for about in ranks.gather(about)}) > 1:
            raise InputError("model or inputs differ between the ranks; give all of them the same weights and samples")
        file = None if file_path is None else GramFile(file_path, shape, about, ranks.rank)
        finished: set[Pair] = set()
        if file is not None:
            size, finished = _open_file(file, size, tile, ranks)
        K = torch.zeros(shape, dtype=torch.float64) if file is None else None
        todo = _share(gram, size, counts, finished, ranks)
        ranks.together(lambda: _work(gram, size, todo, len(finished), K, file, progress))
        if file is None:
            assert K is not None
            ranks.add_up(K)
            return K
        if ranks.rank == 0 and ranks.count > 1:
            file.prepare(size)  # takes the other ranks' journals into its own
        ranks.gather(None)
        return file.tensor()


def jacobian_transpose_product(network: Network, inputs: Any, z: Tensor) -> dict[str, Tensor]:
    """Return J^T z = sum_{n, c} z[n, c] dF_c(x_n)/dw of each parameter, by one backward pass through all samples.

    Args:
        network: the model, its parameters and outputs.
        inputs: N samples in float64, as `to_float64` returns them.
        z: float64 (N, C) or (N C,); C counts the network's cotangents, if it has any.

    Returns:
        The parameters' names and their share, each shaped like the parameter.

    Raises:
        InputError: z has another size.
    """
    params = network.parameters
    for p in params.values():
        p.requires_grad_(True)
    try:
        with torch.enable_grad(), exact_kernels():
            F = network.output(call(network.model, inputs)).flatten(1)
            V = (
                torch.eye(F.shape[1], dtype=F.dtype, device=F.device)
                if network.cotangents is None
                else network.cotangents
            )
            if z.numel() != len(F) * V.shape[1]:
                raise InputError(
                    f"z of shape {tuple(z.shape)} does not fit {len(F)} samples with {V.shape[1]} outputs each"
                )
            seed = z.to(F).view(len(F), V.shape[1]) @ V.T
            found = torch.autograd.grad(F, list(params.values()), seed, allow_unused=True)
    finally:
        for p in params.values():
            p.requires_grad_(False)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(params.items(), found)}


def _probe(gram: Gram) -> tuple[int, tuple[float, float]]:
    """Return the bytes of one sample's terms, and what samples and pairs of them cost."""
    terms = gram.network.terms(take(gram.inputs, slice(0, 1)))
    return max(1, term_bytes(terms)), multiplications(terms)


def _choose_tile(gram: Gram, sample: int, memory: int | None, tile: int | None, path: Path | None, ranks: int) -> int:
    """Return how many samples a block has.

    Raises:
        InputError: the result, or the tile of a single sample, is larger than the memory.
    """
    layout, n, m = gram.layout, gram.n, gram.m
    size = layout.size(n, m)
    budget = default_memory(gram.device) if memory is None else memory
    what = f"max_memory={format_bytes(budget)}" + (" (half of what is available now)" if memory is None else "")
    if path is None and size > budget:
        fits = budget / size if layout.form == "sample blocks" or not layout.symmetric else (budget / size) ** 0.5
        raise InputError(
            f"{what} does not hold the result: {n:,} samples{'' if layout.symmetric else f' against {m:,}'} with "
            f"{layout.outputs:,} outputs take {format_bytes(size)}, and about {int(fits * n):,} samples would fit; "
            'give path= to have it on disk, fewer samples or classes, or form="class blocks"'
        )
    if tile is not None:
        return min(tile, max(n, m))
    whole = fits_whole(layout, sample, n, m, budget)
    found = max(n, m) if whole else largest_tile(layout, sample, max(n, m), budget - (0 if path else size))
    if found == 0:
        need = tile_memory(layout, sample, 1) + (0 if path else size)
        raise InputError(f"{what} does not do: the tile of a single sample and the result take {format_bytes(need)}")
    least = max(1 if path is None else 36, 1 if ranks == 1 else 4 * ranks)  # some to resume from, some to share
    return split(layout, found, max(n, m), least) if least > 1 else found


def _about(
    gram: Gram, form: Form, classes: Sequence[int] | None, output: Callable[[Any], Tensor] | None
) -> dict[str, Any]:
    """Return what the numbers follow from."""
    ends = sorted({0, gram.n - 1})
    code = None if output is None else getattr(output, "__qualname__", type(output).__qualname__)
    return {
        "model": fingerprint(gram.network.model),
        "inputs": fingerprint(gram.inputs),
        "other": None if gram.other is None else fingerprint(gram.other),
        "form": form,
        "classes": None if classes is None else [int(c) for c in classes],
        "params": sorted(gram.network.parameters),
        "output": code,
        "method": gram.method,
        "architecture": fingerprint(repr(gram.network.model)),
        "outputs": torch.cat([gram.network.outputs(take(gram.inputs, slice(i, i + 1)))[0, :32] for i in ends]).tolist(),
    }


def _open_file(file: GramFile, size: int, tile: int | None, ranks: Ranks) -> tuple[int, set[Pair]]:
    """Begin the file or go on with it; return the samples of a block in it, and the pairs of blocks that are done."""

    def prepare() -> None:
        if ranks.rank == 0:
            file.prepare(size)
            if tile is not None and file.tile != size:
                raise InputError(
                    f"tile={tile}: the file was begun with {file.tile}; leave tile out, or choose another path"
                )

    ranks.together(prepare)
    begun, done = ranks.gather((file.tile, file.done))[0]
    if ranks.rank:
        file.begin(begun)
    return begun, set(done)


def _share(
    gram: Gram, size: int, counts: tuple[float, float], finished: set[Pair], ranks: Ranks
) -> list[tuple[Pair, float]]:
    """Return this rank's pairs of blocks that are still to do, each with its cost."""
    rows, columns = blocks_of(gram.n, size), blocks_of(gram.m, size)
    pairs = [pair for pair in pairs_of(gram.layout, len(rows), len(columns)) if pair not in finished]
    costs = [cost_of((i, j), rows[i], columns[j], gram.layout, counts) for i, j in pairs]
    owners = share_out(costs, ranks.count)
    return [(pair, cost) for pair, cost, owner in zip(pairs, costs, owners) if owner == ranks.rank]


def _work(
    gram: Gram,
    size: int,
    todo: list[tuple[Pair, float]],
    done: int,
    K: Tensor | None,
    file: GramFile | None,
    progress: Progress | None,
) -> None:
    """Work out this process's pairs of blocks, into K or the file."""
    layout = gram.layout
    rows, columns = blocks_of(gram.n, size), blocks_of(gram.m, size)
    start, total, spent = time.monotonic(), sum(cost for _, cost in todo), 0.0
    for number, (pair, cost) in enumerate(todo, 1):
        here, there = rows[pair[0]], columns[pair[1]]
        diagonal = layout.symmetric and pair[0] == pair[1]
        whole = K is not None and gram.device.type == "cpu" and len(rows) == len(columns) == 1
        shape = layout.shape(here.stop - here.start, there.stop - there.start)
        block = K if whole and K is not None else torch.zeros(shape, dtype=torch.float64, device=gram.device)
        layout.fill(block, *gram.terms(here, there), diagonal=diagonal, method=gram.method)
        if not torch.isfinite(block.sum()):
            last = there.stop - 1 if layout.symmetric else f"{there.stop - 1} of other"
            raise InputError(
                "model: its outputs or their gradients are NaN or infinite at some of the samples "
                f"{here.start} .. {here.stop - 1} or {there.start} .. {last}; leave those out"
            )
        block = block.cpu()
        parts = [(layout.index(here, there), block)]
        if layout.symmetric and not diagonal:
            parts.append((layout.index(there, here), block.mT))
        if file is not None:
            file.write(pair, parts)
        elif K is not None and not whole:
            for index, numbers in parts:
                K[index] = numbers
        spent += cost
        if progress is not None:
            progress(done + number, done + len(todo), (time.monotonic() - start) * (total - spent) / spent)
