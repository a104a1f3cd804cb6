"""The rivals of `tangent.py`, each in its best form: where it is not plain which is best, several.

Every way returns the Gram of all outputs at all samples; `Way.gram` brings it into our order, outside of the timing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tangent_cases import Case, Layer
from torch import Tensor
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from surefoot.measure.tangent import tangent_gram


@dataclass
class Way:
    """One form of one way to the Gram."""

    form: str  # what sets it apart from the way's other forms
    call: Callable[[], Any]
    gram: Callable[[Any], Tensor] | None = None  # None: nothing to compare (the floor)
    needs: int = 0  # bytes, about


def in_halves(rows: list[Tensor], size: int, panel: int = 512) -> Tensor:
    """Return sum R R^T, what lies above the diagonal worked out and copied below."""
    K = torch.zeros(size, size, dtype=torch.float64)
    for R in rows:
        for i in range(0, size, panel):
            K[i : i + panel, i:].addmm_(R[i : i + panel], R[i:].T)
    return K.triu_().add_(K.triu(1).T)


# ------------------------------------------------------------------------------------------------------ torch.func


def torch_func(case: Case) -> dict[str, list[Way]]:
    """Return the two ways of torch's tutorial on tangent kernels, and the Jacobian with matrix products."""
    x, N, C, P = case.x, len(case.x), case.outputs, case.parameters
    params = {name: p.detach() for name, p in case.model.named_parameters()}

    def single(params: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(case.model, params, (x[None],))[0]

    def jacobian() -> list[Tensor]:
        with sdpa_kernel(SDPBackend.MATH):
            return [j.flatten(2) for j in vmap(jacrev(single), (None, 0))(params, x).values()]

    def tutorial_contraction() -> Tensor:
        one, other = jacobian(), jacobian()
        return torch.stack([torch.einsum("Naf,Mbf->NMab", j, k) for j, k in zip(one, other)]).sum(0)

    def nested() -> Tensor:
        def pair(x1: Tensor, x2: Tensor) -> Tensor:
            output, pullback = vjp(lambda params: single(params, x1), params)

            def row(seed: Tensor) -> Tensor:
                return jvp(lambda params: single(params, x2), (params,), pullback(seed))[1]

            return vmap(row)(torch.eye(output.numel(), dtype=output.dtype))

        with sdpa_kernel(SDPBackend.MATH):
            return vmap(vmap(pair, (None, 0)), (0, None), chunk_size=1)(x, x)

    def columns_at_once(chunk: int) -> Tensor:
        def row(x1: Tensor, seed: Tensor) -> Tensor:
            tangent = vjp(lambda params: single(params, x1), params)[1](seed)
            return jvp(lambda params: functional_call(case.model, params, (x,)), (params,), tangent)[1]

        with sdpa_kernel(SDPBackend.MATH):
            over = vmap(row, chunk_size=chunk)
            return over(x.repeat_interleave(C, 0), torch.eye(C, dtype=x.dtype).repeat(N, 1))

    def gemm() -> Tensor:
        return in_halves([j.flatten(0, 1) for j in jacobian()], N * C)

    def order(K: Tensor) -> Tensor:
        return K.transpose(1, 2).reshape(N * C, N * C)

    # Of a row: the tangent, a parameter's worth of numbers, and its activations at all samples.
    row = 8 * (P + 2 * N * sum(layer.T * (layer.a + layer.b) for layer in case.layers))
    chunk = max(1, min(N * C, 2**29 // row))
    products = [
        Way(f"{chunk} rows at a time", lambda: columns_at_once(chunk), lambda K: K.flatten(1).view(N * C, N * C), 2**31)
    ]
    if 8 * N * N * C * P < 10**10:  # past that it takes minutes
        products.append(Way("nested as in the tutorial", nested, order, 2**31))
    return {
        "torch.func vmap(jacrev), einsum (the tutorial's)": [
            Way("", tutorial_contraction, order, 2 * case.jacobian_bytes + len(params) * 8 * (N * C) ** 2)
        ],
        "torch.func jvp of vjp (the tutorial's)": products,
        "torch.func Jacobian + GEMM": [Way("", gemm, lambda K: K, 2 * case.jacobian_bytes)],
    }


# ------------------------------------------------------------------------------------------ nngeometry, curvlinops


def nngeometry(case: Case) -> dict[str, list[Way]]:
    """Return nngeometry's Gram; its buffers take torch's default dtype, which must be float64 then."""
    from nngeometry.gram import GramMatrix
    from torch.utils.data import DataLoader, TensorDataset

    N, C = len(case.x), case.outputs
    data = TensorDataset(case.x, torch.zeros(N))

    def call(batch: int) -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            return GramMatrix(case.model, DataLoader(data, batch_size=batch)).data
        finally:
            torch.set_default_dtype(torch.float32)

    def order(K: Tensor) -> Tensor:
        return K.permute(1, 0, 3, 2).reshape(N * C, N * C)

    return {
        "nngeometry": [
            Way(f"batches of {b}", lambda b=b: call(b), order, 32 * N * case.parameters) for b in (N, N // 4)
        ]
    }


def curvlinops(case: Case) -> dict[str, list[Way]]:
    """Return the Gram from curvlinops' Jacobian operators, which see the batch as one."""
    from curvlinops import JacobianLinearOperator

    N, C, P = len(case.x), case.outputs, case.parameters
    params = list(case.model.parameters())

    def operator() -> Any:
        return JacobianLinearOperator(case.model, params, [(case.x, torch.zeros(N))], check_deterministic=False)

    def blocks(k: int) -> Iterator[tuple[slice, Tensor]]:
        eye = torch.eye(N * C, dtype=torch.float64)
        for i in range(0, N * C, k):
            yield slice(i, i + k), eye[:, i : i + k]

    def products(k: int) -> Tensor:
        K = torch.empty(N * C, N * C, dtype=torch.float64)
        with sdpa_kernel(SDPBackend.MATH):
            J = operator()
            Jt = J.adjoint()
            for at, columns in blocks(k):
                K[:, at] = J @ (Jt @ columns)
        return K

    def rows(k: int) -> Tensor:
        R = torch.empty(N * C, P, dtype=torch.float64)
        with sdpa_kernel(SDPBackend.MATH):
            Jt = operator().adjoint()
            for at, columns in blocks(k):
                R[at] = (Jt @ columns).T
        return in_halves([R], N * C)

    work = 8 * N * sum(layer.T * (layer.a + layer.b) for layer in case.layers) + 16 * P
    k = max(1, min(N * C, 2**30 // work))
    return {
        "curvlinops": [
            Way(f"J^T I, {k} columns at a time, + GEMM", lambda: rows(k), lambda K: K, case.jacobian_bytes + 2**32),
            Way(f"J (J^T I), {k} columns at a time", lambda: products(k), lambda K: K, 2**32),
        ]
    }


# ---------------------------------------------------------------------------------------------------- neural-tangents


def neural_tangents(case: Case) -> dict[str, list[Way]]:
    """Return neural-tangents' three implementations in float64, compiled, whole or in batches.

    It was written for older JAX: two names that structured derivatives use have moved since, and are put back.
    """
    import jax
    import jax.extend.source_info_util
    from jax.interpreters import ad

    jax.config.update("jax_enable_x64", True)
    ad.source_info_util, ad.config = jax.extend.source_info_util, jax.config
    import neural_tangents as nt

    assert case.twin is not None
    f, params, x = case.twin(case.x)
    N, C = len(case.x), case.outputs

    def order(K: Any) -> Tensor:
        return torch.from_numpy(np.asarray(K).transpose(0, 2, 1, 3).reshape(N * C, N * C).copy())

    def way(implementation: Any, per_sample: bool, size: int, needs: int) -> Way:
        kernel = nt.empirical_ntk_fn(
            f, trace_axes=(), vmap_axes=0 if per_sample else None, implementation=implementation
        )
        if size < N:
            call = nt.batch(kernel, batch_size=size, device_count=0)
        else:
            call = jax.jit(lambda x, other, params: kernel(x, other, params))
        form = f"{'per sample' if per_sample else 'whole batch'}, {size} samples at a time"
        return Way(form, lambda: call(x, None, params).block_until_ready(), order, needs)

    # The other combinations were slower on the two smallest networks, where all were tried.
    J, of = case.jacobian_bytes, nt.NtkImplementation
    return {
        "neural-tangents Jacobian contraction": [
            way(of.JACOBIAN_CONTRACTION, True, N, 3 * J),
            way(of.JACOBIAN_CONTRACTION, True, N // 4, J),
        ],
        "neural-tangents NTK-vector products": [
            way(of.NTK_VECTOR_PRODUCTS, False, N, 3 * J),
            way(of.NTK_VECTOR_PRODUCTS, True, N // 4, J),
        ],
        "neural-tangents structured derivatives": [
            way(of.STRUCTURED_DERIVATIVES, True, N, 2**31),
            way(of.STRUCTURED_DERIVATIVES, True, N // 4, 2**30),
        ],
    }


# -------------------------------------------------------------------------------------------------------- the floor


def floor(case: Case) -> dict[str, list[Way]]:
    """Return the float64 matrix products that the Gram takes and nothing else: no element-wise work, no copies.

    A layer's are those of its cheapest exact contraction, for the pairs of tiles on and above the diagonal: A A^T and
    B B^T where it is used once a sample; else the ghost's (G = A A^T, G B, <B, G B>) or the rows' own and their Gram.
    """
    N, C = len(case.x), case.outputs

    def products(layer: Layer, t: int) -> list[tuple[int, Tensor, Tensor]]:
        """Return how often which matrix product is due: (times, left, right)."""
        tiles = -(-N // t)
        pairs = tiles * (tiles + 1) // 2
        T, a, b = layer.T, layer.a, layer.b
        if T == 1:
            return [(pairs, noise(t, a), noise(a, t)), (pairs, noise(C * t, b), noise(b, C * t))]
        ghost = T * T * (a + C * b) + C * C * T * b
        if ghost < C * C * a * b + 2 * C * T * a * b / N:
            return [
                (pairs, noise(t * T, a), noise(a, t * T)),
                (pairs, noise(t, t * T, T), noise(t, T, C * b)),
                (pairs, noise(t, C, T * b), noise(t, T * b, C * t)),
            ]
        panels = [min(512, N * C - i) for i in range(0, N * C, 512)]
        done = [(1, noise(N, C * b, T), noise(N, T, a))]
        step = max(1, min(b, 2**22 // (a * N * C)))  # as many channels at a time as make 32 MB of rows
        rows = noise(N * C, step * a)
        return done + [(-(-b // step), rows[:h], rows[i * 512 :].T) for i, h in enumerate(panels)]

    def passes(layer: Layer, first: bool) -> list[tuple[int, Tensor, Tensor]]:
        forward = (1, noise(N * layer.T, layer.a), noise(layer.a, layer.b))
        return [forward] if first else [forward, (1, noise(C * N * layer.T, layer.b), noise(layer.b, layer.a))]

    def ready(work: list[tuple[int, Tensor, Tensor]]) -> Callable[[], None]:
        todo = [(k, left, right, left @ right) for k, left, right in work]

        def run() -> None:
            for k, left, right, out in todo:
                for _ in range(k):
                    torch.matmul(left, right, out=out)

        return run

    ahead = [p for i, layer in enumerate(case.layers) for p in passes(layer, i == 0)]
    alone, with_passes = [], []
    for t in sorted({min(N, n) for n in (16, 32, 64, 128)}):
        work = [p for layer in case.layers for p in products(layer, t)]
        alone.append(Way(f"tiles of {t} samples", ready(work)))
        with_passes.append(Way(f"tiles of {t} samples", ready(work + ahead)))
    return {"GEMM floor: contraction": alone, "GEMM floor: contraction, forward and backward": with_passes}


def noise(*shape: int) -> Tensor:
    """Return a float64 matrix (or a batch of them) of noise."""
    return torch.randn(shape, dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------------- all


def ours(case: Case) -> dict[str, list[Way]]:
    """Return the library's Gram, as a user calls it: the copy and the checks of the model included."""
    return {"surefoot": [Way("", lambda: tangent_gram(case.model, case.x), lambda K: K)]}


FAMILIES: dict[str, Callable[[Case], dict[str, list[Way]]]] = {
    "surefoot": ours,
    "floor": floor,
    "torch.func": torch_func,
    "nngeometry": nngeometry,
    "curvlinops": curvlinops,
    "neural-tangents": neural_tangents,
}
