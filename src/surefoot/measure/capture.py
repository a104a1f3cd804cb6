"""From a network and some samples to the terms of their Jacobian: one forward pass and a backward pass an output.

The network is copied in float64 and every module with a rule adds a zero, eps, to its output: B = dF/d(eps) are the
gradients at that output, whatever is done to it later, in place too. What the rules claim is held against autograd on
a few samples; a parameter for which they are wrong, or that no rule knows, gets its rows from per-sample gradients
instead, which is exact for any code and slower.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from surefoot.errors import InputError
from surefoot.measure.contraction import Lookup, Outer, Rows, Term
from surefoot.measure.inputs import count, deterministic, take
from surefoot.measure.layout import Layouts
from surefoot.measure.per_sample import dense, rows_one_by_one, rows_together
from surefoot.measure.precision import Float64Only
from surefoot.measure.rules import Use, find_rule
from surefoot.measure.unrolled import UNROLLED, Record

AGREEMENT = 1e-9  # relative difference to autograd below which a rule is believed
ROUNDING = 1e-13  # and what may be the rounding of sums that cancel, relative to all parameters' gradient
CHECKED = 3  # on how many samples
TOGETHER = 2**17  # numbers in all gradients at outputs that a backward pass takes together; more leave the cache

Key = tuple[str, tuple[int, int] | None]  # a parameter's name and the part of it that is used


@dataclass
class _Site:
    """A use of a parameter in one forward pass."""

    key: Key
    use: Use
    eps: int  # whose gradient it needs
    fold: int  # how many rows of the module's input belong to one sample


@dataclass
class Tape:
    """What one forward pass recorded."""

    samples: int
    outputs: Tensor  # (n, C)
    eps: list[Tensor] = field(default_factory=list)
    sites: list[_Site] = field(default_factory=list)


class Network:
    """A float64 copy of a model whose parameters' Jacobians can be had, block of samples by block.

    Args:
        model: left as it is.
        inputs: some samples, to look at what the rules can treat.
        params: names of parameters or modules, or parameters themselves; None: all that require a gradient.
        output: takes the outputs (n, ...) out of what the model returns; None: itself, or its logits.
        cotangents: (C, k): measure k combinations of outputs in place of the C outputs.

    Raises:
        InputError: nothing to differentiate, a model that is not deterministic, or one that cannot be treated.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        params: Sequence[str | nn.Parameter] | None = None,
        output: Callable[[Any], Tensor] | None = None,
        cotangents: Tensor | None = None,
    ) -> None:
        names = choose_parameters(model, params)
        self.model = float64_copy(model)
        self.output = output or logits
        self.cotangents = None if cotangents is None else cotangents.double()
        # Tied weights have several names; the first is theirs.
        owner: dict[int, str] = {}
        self.names: dict[tuple[int, str], str] = {}
        for prefix, module in self.model.named_modules():
            for name, p in module.named_parameters(recurse=False):
                full = owner.setdefault(id(p), f"{prefix}.{name}".lstrip("."))
                if full in names:
                    self.names[id(module), name] = full
        self.parameters = {name: self.model.get_parameter(name) for name in dict.fromkeys(self.names.values())}
        self.fallback: tuple[str, ...] = ()
        self._together = True  # whether per-sample gradients can be had for several samples at once
        self._clone = False  # whether the model overwrites what its modules were given
        with exact_kernels(), Float64Only(self.model):
            deterministic(self.model, inputs, self.output)
        self.layouts = self._find_layouts(inputs)
        self._check_rules(inputs)

    # ------------------------------------------------------------------------------------------------ the terms

    def terms(self, inputs: Any) -> list[Term]:
        """Return the samples' Jacobian as terms, one or more a parameter, always in the same order."""
        tape = self._forward(inputs)
        found = self._terms(tape, self._gradients(tape))
        if self.fallback:
            found += [Rows(rows) for rows in self._per_sample_rows(inputs).values()]
        return found

    def outputs(self, inputs: Any) -> Tensor:
        """Return F at the samples: (n, C)."""
        with torch.no_grad(), exact_kernels():
            return self._evaluate(inputs).detach()

    def _evaluate(self, inputs: Any) -> Tensor:
        F = self.output(call(self.model, inputs))
        return F[:, None] if F.dim() == 1 else F.flatten(1)

    def _find_layouts(self, inputs: Any) -> Layouts:
        def run(n: int, see: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
            with torch.no_grad():
                return self._recorded(take(inputs, [0] * n), lambda module, x, output, uses: see(module, output))

        return Layouts(run)

    def _recorded(self, inputs: Any, record: Record) -> Tensor:
        """Return F at the samples, after every use of a parameter that is known has gone through `record`."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
            rule = find_rule(module)
            assert rule is not None
            x = args[0] if args else kwargs["input"]
            return record(module, x, output, lambda x, z: rule(module, x, z))

        with exact_kernels(), ExitStack() as stack:
            for module in self.model.modules():
                unroll = UNROLLED.get(type(module))
                users = module.modules() if unroll is not None else [module]
                if not any((id(m), name) in self.names for m in users for name, _ in m.named_parameters(recurse=False)):
                    continue
                if unroll is not None:
                    stack.enter_context(_replaced_forward(module, unroll(module, record)))
                elif find_rule(module) is not None:
                    stack.callback(module.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)
            return self._evaluate(inputs)

    def _forward(self, inputs: Any) -> Tape:
        n = count(inputs)
        tape = Tape(n, torch.empty(0))
        calls: dict[int, int] = {}
        seen: list[tuple[Tensor, int]] = []

        def record(module: nn.Module, x: Tensor, output: Tensor, uses: Callable[[Tensor, Tensor], list[Use]]) -> Tensor:
            call = calls[id(module)] = calls.get(id(module), -1) + 1
            layout = self.layouts.get(module, call)
            front = None if layout is None else layout.front(x, output, n)
            if layout is None or front is None:
                return output
            x, z = front
            x = x.detach().clone() if self._clone else x.detach()
            seen.append((x, x._version))
            found = [u for u in uses(x, z) if (id(module), u.parameter) in self.names]
            for use in found:
                key = (self.names[id(module), use.parameter], use.part)
                if key[0] not in self.fallback:
                    tape.sites.append(_Site(key, use, len(tape.eps), layout.fold))
            if not found:
                return output
            eps = torch.zeros_like(z, requires_grad=True)
            tape.eps.append(eps)
            return layout.back(z + eps)

        with torch.enable_grad():
            tape.outputs = self._recorded(inputs, record)
        if not self._clone and any(x._version != version for x, version in seen):
            self._clone = True  # an input was overwritten in place after its use
            return self._forward(inputs)
        return tape

    def _cotangents(self, outputs: Tensor) -> Tensor:
        if self.cotangents is None:
            return torch.eye(outputs.shape[1], dtype=torch.float64, device=outputs.device)
        return self.cotangents.T

    def _gradients(self, tape: Tape) -> list[Tensor]:
        """Return the gradients at every eps, for each combination of outputs: (C, *eps.shape)."""
        V = self._cotangents(tape.outputs)
        return _gradients(tape, V[:, None, :].expand(-1, tape.samples, -1))

    def _terms(self, tape: Tape, grads: list[Tensor]) -> list[Term]:
        uses: dict[Key, list[_Site]] = {}
        for site in tape.sites:
            uses.setdefault(site.key, []).append(site)
        # A bias is the weight of an input that is always 1, where it goes with a weight at all its uses.
        biases = {_places(sites): key for key, sites in uses.items() if all(site.use.is_bias for site in sites)}
        folded: set[Key] = set()
        terms: list[Term] = []
        for key, sites in uses.items():
            if key in folded:
                continue
            combined = self._combined(key, sites, [_term(site, grads, tape.samples) for site in sites])
            bias = biases.get(_places(sites))
            if isinstance(combined, Outer) and bias is not None:
                folded.add(bias)
                A = combined.inputs
                combined = Outer(torch.cat([A, A.new_ones(*A.shape[:-1], 1)], -1), combined.grads)
            terms.append(combined)
        return terms

    def _combined(self, key: Key, sites: list[_Site], each: list[Term]) -> Term:
        """Return one term for all uses of a parameter, cross terms between them included."""
        if len(each) == 1:
            return each[0]
        if all(isinstance(e, Lookup) for e in each):
            return Lookup(
                torch.cat([e.ids for e in each], 1),  # type: ignore[union-attr]
                torch.cat([e.grads for e in each], 2),  # type: ignore[union-attr]
            )
        if all(isinstance(e, Outer) for e in each) and len({s.use.transposed for s in sites}) == 1:
            return Outer(
                torch.cat([e.inputs for e in each], 2),  # type: ignore[union-attr]
                torch.cat([e.grads for e in each], 3),  # type: ignore[union-attr]
            )
        size = self._part(key).numel()
        total = None
        for site, e in zip(sites, each):
            rows = flat_rows(e, size, site.use.transposed)
            total = rows if total is None else total + rows
        assert total is not None
        return Rows(total)

    def _part(self, key: Key) -> Tensor:
        p = self.parameters[key[0]]
        return p if key[1] is None else p[key[1][0] : key[1][1]]

    # ------------------------------------------------------------------------------ holding the rules against autograd

    def _check_rules(self, inputs: Any) -> None:
        """Find the parameters for which the rules do not give autograd's gradient, and how else to get theirs.

        Asked for is the gradient of a random combination of outputs, u, and of samples, s: what the rules put down to
        another sample than autograd does shows as well.
        """
        few = take(inputs, torch.arange(CHECKED) % count(inputs))
        params = self.parameters
        with _requiring_grad(params.values()), torch.enable_grad(), exact_kernels():
            F = self._evaluate(few)
            if len(F) != CHECKED:
                raise InputError(
                    f"output= gives {tuple(F.shape)} for {CHECKED} samples; the samples have to be in front, and not "
                    "averaged away"
                )
            if not F.requires_grad:
                raise InputError(
                    "params: the model's outputs depend on none of the chosen parameters, or it cuts the graph "
                    "(no_grad, detach); choose others"
                )
            generator = torch.Generator().manual_seed(0)
            u, s = (
                torch.randn(k, generator=generator, dtype=torch.float64).to(F.device) for k in (F.shape[1], CHECKED)
            )
            try:
                grads = torch.autograd.grad((F @ u) @ s, list(params.values()), allow_unused=True)
            except RuntimeError as error:  # as by an input of a module that is overwritten later
                raise InputError(
                    f"model={type(self.model).__name__} cannot be differentiated: {str(error).splitlines()[0]}"
                ) from error
        right = {name: torch.zeros_like(p) if g is None else dense(g) for g, (name, p) in zip(grads, params.items())}
        wrong = self._wrong(few, u, s, right)
        for swap in (wrong, ()):
            # Rows (place, sample) and (sample, place) have the same shape.
            if wrong and self.layouts.swap({m for m, name in self.names if self.names[m, name] in swap}):
                wrong = self._wrong(few, u, s, right)
        self.fallback = tuple(wrong)
        if wrong:
            self._check_fallback(few, u, s, right)

    def _wrong(self, few: Any, u: Tensor, s: Tensor, right: dict[str, Tensor]) -> list[str]:
        """Return the parameters whose gradient of s^T F u is not what the rules say."""
        tape = self._forward(few)
        grads = _gradients(tape, u.expand(1, tape.samples, -1))
        claimed = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        for site in tape.sites:
            name, part = site.key
            target = claimed[name] if part is None else claimed[name][part[0] : part[1]]
            target += _summed(_term(site, grads, tape.samples), s, target.numel(), site.use.transposed).view_as(target)
        norm = torch.linalg.vector_norm
        # A gradient that is zero but for rounding (of a bias before a norm, of attention's keys) agrees too.
        rounding = ROUNDING * sum(norm(g) ** 2 for g in right.values()) ** 0.5
        wrong = set(_overlapping(tape, self.parameters))
        wrong |= {name for name, g in right.items() if not norm(claimed[name] - g) <= AGREEMENT * norm(g) + rounding}
        return [name for name in right if name in wrong]

    def _check_fallback(self, few: Any, u: Tensor, s: Tensor, right: dict[str, Tensor]) -> None:
        """One sample alone must give what it gives among others, and its gradients add up to the gradient of all."""
        modules = ", ".join(dict.fromkeys(self._owner(name) for name in self.fallback))
        together = self.outputs(few)
        alone = torch.cat([self.outputs(take(few, slice(i, i + 1))) for i in range(len(together))])
        if alone.shape != together.shape or not torch.allclose(alone, together, rtol=1e-9, atol=1e-12):
            raise InputError(
                f"model={type(self.model).__name__} gives a sample another output alone than among others, so its "
                "outputs have no Jacobian of their own; put whatever mixes the samples of a batch in eval mode, or "
                f"leave it out (parameters that no rule treats are in {modules})"
            )
        loop = self._rows(few, together=False)
        for name, rows in loop.items():
            if not _agree(torch.einsum("n,c,ncp->p", s, u, rows), right[name].flatten()):
                raise InputError(
                    f"params={name!r} in {self._owner(name)} cannot be treated: its gradients, a sample alone, do not "
                    "add up to its gradient for all of them; leave it out of params="
                )
        try:
            self._together = all(_agree(rows, loop[name]) for name, rows in self._rows(few, together=True).items())
        except (RuntimeError, UserWarning, TypeError):
            self._together = False  # something that only works one sample at a time

    def _owner(self, parameter: str) -> str:
        owner = parameter.rpartition(".")[0]
        return f"{owner or 'model'} ({type(self.model.get_submodule(owner)).__name__})"

    def _rows(self, inputs: Any, *, together: bool) -> dict[str, Tensor]:
        """Return the rows (n, all C, p) of the parameters that no rule treats, by per-sample gradients."""
        params = {name: self.parameters[name] for name in self.fallback}
        with exact_kernels(), torch.enable_grad():
            if together:
                return rows_together(self.model, self.output, params, inputs)
            with _requiring_grad(params.values()):
                return rows_one_by_one(self._evaluate, params, inputs)

    def _per_sample_rows(self, inputs: Any) -> dict[str, Tensor]:
        """Return the same for the combinations of outputs asked for."""
        found = self._rows(inputs, together=self._together)
        if self.cotangents is None:
            return found
        return {name: torch.einsum("ck,ncp->nkp", self.cotangents, rows) for name, rows in found.items()}


def _agree(one: Tensor, other: Tensor) -> bool:
    norm = torch.linalg.vector_norm
    return bool(norm(one - other) <= AGREEMENT * norm(other) + ROUNDING)


def _gradients(tape: Tape, seeds: Tensor) -> list[Tensor]:
    """Return the gradients of <seed, outputs> at every eps: seeds (k, n, C) -> (k, *eps.shape).

    In memory the samples come first, as the contractions want them.
    """
    k = len(seeds)
    found = [e.new_empty(len(e), k, *e.shape[1:]).transpose(0, 1) for e in tape.eps]
    together = TOGETHER // max(1, sum(e.numel() for e in tape.eps))
    start = 0 if tape.eps else k
    with exact_kernels(), warnings.catch_warnings():
        warnings.simplefilter("error")  # an operation without a batching rule is quicker one by one
        while start < k:
            batched = min(k, together) >= 4
            stop = min(k, start + (together if batched else 1))
            seed = seeds[start:stop] if batched else seeds[start]
            try:
                grads = torch.autograd.grad(
                    tape.outputs, tape.eps, seed, retain_graph=stop < k, allow_unused=True, is_grads_batched=batched
                )
            except (RuntimeError, UserWarning):
                if not batched:
                    raise
                together = 1
                continue
            for whole, g in zip(found, grads):
                if g is None:
                    whole[start:stop].zero_()
                else:
                    whole[start:stop] = g
            start = stop
    return found


def _term(site: _Site, grads: list[Tensor], n: int) -> Term:
    """Return a use's share of the Jacobian."""
    return _refold(site.use.term(grads[site.eps]), n, site.fold)


def _places(sites: list[_Site]) -> tuple[int, ...]:
    return tuple(site.eps for site in sites)


def _summed(term: Term, s: Tensor, size: int, transposed: bool) -> Tensor:
    """Return sum_i s_i J_i of a single combination of outputs, in the order of the parameter's elements: (size,)."""
    if not isinstance(term, Outer):
        return s @ flat_rows(term, size, transposed)[:, 0]
    A, B = (X.transpose(0, 1).flatten(1, 2) for X in (term.inputs, term.grads[0] * s[:, None, None, None]))
    return (A.transpose(1, 2) @ B if transposed else B.transpose(1, 2) @ A).flatten()  # of (G, n T, a) and (G, n T, b)


def _overlapping(tape: Tape, params: dict[str, nn.Parameter]) -> list[str]:
    """Return the parameters used in different parts that have rows in common: cross terms would be missing."""
    found = []
    for name, p in params.items():
        parts = sorted({site.key[1] or (0, len(p)) for site in tape.sites if site.key[0] == name})
        if any(one[1] > other[0] for one, other in pairwise(parts)):
            found.append(name)
    return found


def flat_rows(term: Term, size: int, transposed: bool) -> Tensor:
    """Return a term's rows in the order of its parameter's elements: (n, C, size)."""
    if isinstance(term, Rows):
        return term.rows
    if isinstance(term, Lookup):
        C, n, _, d = term.grads.shape
        found = term.grads.new_zeros(n, C, size // d, d)
        for c in range(C):
            used = term.grads[c] * (term.ids >= 0)[..., None]
            found[:, c].scatter_add_(1, term.ids.clamp(min=0)[..., None].expand_as(used), used)
        return found.flatten(2)
    C, n, G, _, b = term.grads.shape
    rows = term.rows(0, b)
    if transposed:
        rows = rows.view(n, C, G, b, -1).transpose(3, 4)
    return rows.reshape(n, C, -1)


def _refold(term: Term, n: int, fold: int) -> Term:
    """Join the `fold` rows of the module's batch that belong to one sample: more places, or a sum."""
    if fold == 1:
        return term
    if isinstance(term, Rows):
        return Rows(term.rows.view(n, fold, *term.rows.shape[1:]).sum(1))
    C = len(term.grads)
    if isinstance(term, Lookup):
        return Lookup(term.ids.reshape(n, -1), term.grads.reshape(C, n, -1, term.grads.shape[-1]))
    _, G, T, a = term.inputs.shape
    A = term.inputs.view(n, fold, G, T, a).transpose(1, 2).reshape(n, G, fold * T, a)
    B = term.grads.view(C, n, fold, G, T, -1).transpose(2, 3).reshape(C, n, G, fold * T, -1)
    return Outer(A, B)


# ------------------------------------------------------------------------------------------------------ the model


def choose_parameters(model: nn.Module, params: Sequence[str | nn.Parameter] | None) -> set[str]:
    """Return the first names of the chosen parameters.

    Raises:
        InputError: none is chosen, or a name is unknown.
    """
    named = dict(model.named_parameters())
    if params is None:
        chosen = {name for name, p in named.items() if p.requires_grad}
    else:
        chosen = set()
        by_id = {id(p): name for name, p in named.items()}
        aliases = {name: by_id[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        for wanted in params:
            if isinstance(wanted, str):
                found = {full for name, full in aliases.items() if name == wanted or name.startswith(f"{wanted}.")}
            else:
                found = {by_id[id(wanted)]} if id(wanted) in by_id else set()
            if not found:
                text = repr(wanted) if isinstance(wanted, str) else f"a tensor of shape {tuple(wanted.shape)}"
                raise InputError(f"params={text} is no parameter or module of the model; it has {sorted(named)[:12]}")
            chosen |= found
    if not chosen:
        raise InputError(f"params={params!r}: no parameter requires a gradient; name some, or unfreeze the model")
    return chosen


def float64_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the model in float64 that can be changed at will."""
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise InputError(
            f"model={type(model).__name__} cannot be copied ({str(error).splitlines()[0]}); hand in a fresh one whose "
            "attributes are parameters, buffers and plain values"
        ) from error
    return twin.double().requires_grad_(False)


def call(model: nn.Module, inputs: Any) -> Any:
    """Call the model on a tensor, a tuple of arguments or a dictionary of keyword arguments."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def logits(found: Any) -> Tensor:
    """Return the tensor that the model's outputs are: itself, .logits, ["logits"] or the first of a tuple."""
    if isinstance(found, Tensor):
        return found
    if hasattr(found, "logits"):
        return found.logits
    if isinstance(found, dict) and "logits" in found:
        return found["logits"]
    if isinstance(found, (tuple, list)) and found and isinstance(found[0], Tensor):
        return found[0]
    raise InputError(
        f"output=None cannot find the outputs in a {type(found).__name__}; pass a function that returns them as a "
        "tensor"
    )


class _StayInFloat64(TorchFunctionMode):
    """Let float64 stand wherever a model asks for less, as many do to be careful with half precision."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.float, Tensor.half, Tensor.bfloat16):
            return args[0].double()
        if func in (Tensor.to, Tensor.type):
            args = tuple(torch.float64 if isinstance(x, torch.dtype) and x in _SHORTER else x for x in args)
        if kwargs.get("dtype") in _SHORTER:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


_SHORTER = (torch.float32, torch.float16, torch.bfloat16)


@contextmanager
def exact_kernels() -> Iterator[None]:
    """Leave out what has no exact derivatives, or another precision; the user's settings come back."""
    fast, dtype = torch.backends.mha.get_fastpath_enabled(), torch.get_default_dtype()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.set_default_dtype(torch.float64)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", enabled=False), _StayInFloat64():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch.set_default_dtype(dtype)


@contextmanager
def _replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        del module.forward


@contextmanager
def _requiring_grad(params: Any) -> Iterator[None]:
    chosen = list(params)
    for p in chosen:
        p.requires_grad_(True)
    try:
        yield
    finally:
        for p in chosen:
            p.requires_grad_(False)
