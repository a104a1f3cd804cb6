"""What every clipped optimizer promises, as tests that anybody's own rule can be run through."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.testing.no_sync import NoSync
from surefoot.testing.reference import ReferenceGroup, ReferenceOptimizer

EVERYTHING: dict[str, Any] = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}
SHAPES = [(), (1,), (3,), (2, 3), (2, 1, 2), (0,)]
BAD_OPTIONS: list[tuple[str, Any]] = [
    *[("lr", bad) for bad in (0.0, -0.1, math.nan, math.inf, "0.1", None)],
    *[("momentum", bad) for bad in (-0.1, math.nan, math.inf, "0.9")],
    *[("dampening", bad) for bad in (math.nan, math.inf)],
    *[("weight_decay", bad) for bad in (-0.1, math.nan, math.inf)],
    ("nesterov", True),  # without momentum
    ("scope", "layer"),
    ("nonfinite", "ignore"),
]


class OptimizerSuite:
    """The conformance tests of a scale rule: w <- w - lr scale(||g||) g, with all the options of `DeltaGClip`.

    Subclass it in a test file under a name that begins with Test and say how the optimizer is built and what its
    formula is; pytest (or any runner that calls the methods named test_*) does the rest. Each failure says in words
    which promise was broken.

    Attributes:
        make: make(params, lr, **options) returns the optimizer with the letters under test. Options are those of
            `ClippedOptimizer`: momentum, dampening, nesterov, weight_decay, decoupled_weight_decay, scope, nonfinite,
            maximize.
        scale: the multiplier for one norm, a number, written down independently of the optimizer.
        thresholds: the norm above which a step counts as clipped, and the one from which it counts as floored; None
            leaves these counts unchecked.
        norms: gradient norms to try, on both sides of whatever the rule distinguishes. The multiplier must not be the
            same for all.
        problems: how many random problems are compared with the float64 twin.

    Example:
        >>> from surefoot import NormalizedGD
        >>> class TestNormalizedGD(OptimizerSuite):
        ...     make = staticmethod(lambda params, lr, **options: NormalizedGD(params, lr, beta=2.0, **options))
        ...     scale = staticmethod(lambda norm: 1 / (norm + 2.0))
        ...     thresholds = (2.0, float("inf"))
        >>> TestNormalizedGD().test_the_multiplier_is_the_formula()
    """

    make: Callable[..., Any]
    scale: Callable[[float], float]
    thresholds: tuple[float, float] | None = None
    norms: Sequence[float] = (1e-3, 0.1, 0.5, 1.0, 2.0, 5.0, 30.0, 1e3)
    problems: int = 60

    # ------------------------------------------------------------------------------------------------- the formula

    def test_the_multiplier_is_the_formula(self) -> None:
        """A step without options has length lr scale(||g||) ||g||, against the gradient."""
        for norm in self.norms:
            w = _leaf([1.0, -2.0], [0.6 * norm, -0.8 * norm])
            self.make([w], 0.25).step()
            move = 0.25 * self.scale(norm) * norm
            right = torch.tensor([1.0 - 0.6 * move, -2.0 + 0.8 * move], dtype=torch.float64)
            assert _near(w, right, 1e-12 * (2 + move)), f"||g|| = {norm}: {w.tolist()} and not {right.tolist()}"

    def test_the_multiplier_takes_any_number_of_norms_and_does_not_wait_for_the_device(self) -> None:
        """scale() maps (K,) to (K,), each norm by itself, and asks no tensor for its value."""
        opt = self.make([_leaf([1.0])], 0.1)
        norms = torch.tensor(list(self.norms), dtype=torch.float64)
        with NoSync():
            together = opt.scale(norms, opt.param_groups[0])
        assert together.shape == norms.shape, f"scale() of {tuple(norms.shape)} norms has shape {tuple(together.shape)}"
        right = torch.tensor([self.scale(norm) for norm in self.norms], dtype=torch.float64)
        assert _near(together, right, 1e-14 * float(right.abs().max())), f"{together.tolist()} and not {right.tolist()}"

    def test_the_float64_twin_takes_the_same_steps(self) -> None:
        """Weights, momentum and counts agree on random problems: groups, scopes, options, odd shapes, NaN."""
        for seed in range(self.problems):
            self._compare_with_twin(random.Random(seed), seed)

    def test_the_norm_is_over_all_groups(self) -> None:
        """With scope="global" two groups of norms 5t and 12t are judged by 13t; by their own with scope="group"."""
        self._assert_that_the_multiplier_varies()
        for size in self.norms:
            for scope, norms in (("global", (13 * size, 13 * size)), ("group", (5 * size, 12 * size))):
                a, b = _leaf([0.0, 0.0], [3 * size, 4 * size]), _leaf([0.0], [12 * size])
                self.make([{"params": [a]}, {"params": [b]}], 0.5, scope=scope).step()
                for w, own, judged in ((a, 5 * size, norms[0]), (b, 12 * size, norms[1])):
                    right, moved = 0.5 * self.scale(judged) * own, float(w.detach().norm())
                    assert math.isclose(moved, right, rel_tol=1e-12), f"scope={scope!r}: moved {moved}, not {right}"

    def test_a_zero_gradient_moves_nothing_but_what_decay_moves(self) -> None:
        """||g|| = 0 is no division by zero; the decay of the weights acts all the same."""
        for options, right in (({}, [1.0, -2.0]), ({"weight_decay": 0.2}, [0.9, -1.8])):
            w = _leaf([1.0, -2.0], [0.0, 0.0])
            self.make([w], 0.5, **options).step()
            assert _near(w, torch.tensor(right, dtype=torch.float64), 1e-14), f"{options}: {w.tolist()}, not {right}"

    # ------------------------------------------------------------------------------------------ what is not touched

    def test_gradients_are_read_and_never_written(self) -> None:
        """p.grad is the same tensor with the same bits after a step, whatever the options."""
        for options in ({}, EVERYTHING, {"weight_decay": 0.1, "decoupled_weight_decay": True}, {"maximize": True}):
            params = self._params(torch.float32)
            opt = self.make(params, 0.1, **options)
            for _ in range(2):
                grads = [p.grad for p in params]
                copies = _copies(g for g in grads if g is not None)
                opt.step()
                assert all(p.grad is g for p, g in zip(params, grads)), f"{options}: p.grad was replaced"
                assert _same_bits([g for g in grads if g is not None], copies), f"{options}: p.grad was written"

    def test_random_numbers_and_defaults_are_left_alone(self) -> None:
        """A step draws no random number and changes neither the default dtype nor requires_grad."""
        params = self._params(torch.float32)
        before = torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled()
        self.make(params, 0.1, **EVERYTHING).step()
        assert torch.equal(torch.get_rng_state(), before[0]), "the step drew a random number"
        assert (torch.get_default_dtype(), torch.is_grad_enabled()) == before[1:], "a global setting was changed"
        assert all(p.requires_grad for p in params), "requires_grad was changed"

    def test_the_step_leaves_lr_to_the_schedule(self) -> None:
        """Schedulers rewrite lr between steps, from 0 on; the step reads it and never writes it."""
        w = _leaf([0.0], [2.0])
        opt = self.make([w], 0.5)
        schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: t / 4)
        where = 0.0
        for t in range(5):
            opt.step()
            where -= 0.5 * t / 4 * self.scale(2.0) * 2.0
            assert opt.param_groups[0]["lr"] == 0.5 * t / 4, "the step wrote lr"
            assert math.isclose(w.item(), where, rel_tol=1e-12), f"lr is {0.5 * t / 4}: {w.item()}, not {where}"
            schedule.step()

    # ------------------------------------------------------------------------------------------------ what is taken

    def test_a_closure_runs_once_with_gradients_and_its_loss_is_returned(self) -> None:
        """step(closure) re-evaluates under enable_grad, returns the loss, then steps."""
        w, plain = _leaf([3.0, 4.0]), _leaf([3.0, 4.0], [3.0, 4.0])
        opt = self.make([w], 0.1)
        seen = []

        def closure() -> Tensor:
            opt.zero_grad()
            seen.append(torch.is_grad_enabled())
            loss = w.square().sum() / 2
            loss.backward()
            return loss

        with torch.no_grad():
            loss = opt.step(closure)
        assert seen == [True], f"the closure ran {len(seen)} times, with gradients enabled: {seen}"
        assert loss is not None and loss.item() == 12.5, f"step(closure) returned {loss}"  # noqa: PT018
        opt = self.make([plain], 0.1)
        assert opt.step() is None, "step() without a closure returned something"
        assert _same_bits([w], [plain]), "a step with a closure is another step"

    def test_groups_keep_their_own_lr(self) -> None:
        """A group's lr, given or added later, is the one that its parameters move by."""
        a, b, c = (_leaf([0.0], [2.0]) for _ in range(3))
        opt = self.make([{"params": [a]}, {"params": [b], "lr": 0.5}], 0.25, scope="tensor")
        opt.add_param_group({"params": [c], "lr": 1.0})
        opt.step()
        for w, lr in ((a, 0.25), (b, 0.5), (c, 1.0)):
            right = -lr * self.scale(2.0) * 2.0
            assert math.isclose(w.item(), right, rel_tol=1e-12), f"lr={lr}: {w.item()}, not {right}"

    def test_parameters_without_gradient_are_passed_over(self) -> None:
        """None is no zero: no decay, no state, no part in the norm; a step of nothing counts as none."""
        for scope in ("global", "group", "tensor"):
            used, unused, alone = _leaf([1.0], [4.0]), _leaf([2.0]), _leaf([1.0], [4.0])
            opt = self.make([{"params": [unused, used]}, {"params": [_leaf([3.0])]}], 0.1, scope=scope, **EVERYTHING)
            other = self.make([alone], 0.1, scope=scope, **EVERYTHING)
            opt.step()
            other.step()
            assert unused.item() == 2.0, f"scope={scope!r}: a parameter without gradient moved"
            assert _same_bits([used], [alone]), f"scope={scope!r}: a parameter without gradient changed the others"
            used.grad = None
            before = _copies([used])
            opt.step()
            assert _same_bits([used], before), f"scope={scope!r}: a step without any gradient moved something"
            assert opt.telemetry()["steps"] == 1, f"scope={scope!r}: a step without any gradient was counted"

    def test_any_memory_layout_is_taken(self) -> None:
        """Channels-last, transposed, strided and expanded gradients take the step of a contiguous one."""
        base = torch.randn(2, 3, 4, 10, generator=_generator(7), dtype=torch.float64)
        whole = base[..., :5].contiguous()
        layouts = {
            "channels_last": whole.contiguous(memory_format=torch.channels_last),
            "transposed": whole.transpose(0, 3).contiguous().transpose(0, 3),
            "strided": base[..., ::2],
            "expanded": whole[:1].expand(2, 3, 4, 5),
        }
        for name, grad in layouts.items():
            odd, plain = (nn.Parameter(torch.ones(2, 3, 4, 5, dtype=torch.float64)) for _ in range(2))
            odd.grad, plain.grad = grad, grad.contiguous()
            for w in (odd, plain):
                opt = self.make([w], 0.1, **EVERYTHING)
                opt.step()
                opt.step()
            assert _near(odd, plain.detach(), 1e-13), f"a {name} gradient takes another step"

    def test_scalars_and_empty_tensors_are_taken(self) -> None:
        """0-dim and empty parameters are parameters like others."""
        scalar, empty, flat = _leaf(2.0, 3.0), _leaf([], []), _leaf([2.0], [3.0])
        self.make([scalar, empty], 0.1, **EVERYTHING).step()
        self.make([flat], 0.1, **EVERYTHING).step()
        assert scalar.shape == () and empty.shape == (0,), "a shape changed"  # noqa: PT018
        assert scalar.item() == flat.item(), f"a 0-dim parameter went to {scalar.item()}, a 1-dim one to {flat.item()}"

    def test_a_complex_parameter_steps_like_its_two_real_parts(self) -> None:
        """||a + ib||² = ||a||² + ||b||², and the step acts on both parts."""
        z = nn.Parameter(torch.tensor([1.0 + 2.0j, -1.0j], dtype=torch.complex128))
        pair = nn.Parameter(torch.view_as_real(z.detach()).clone())
        z.grad = torch.tensor([3.0 - 4.0j, 12.0 + 0.0j], dtype=torch.complex128)
        pair.grad = torch.view_as_real(z.grad).clone()
        for w in (z, pair):
            opt = self.make([w], 0.1, **EVERYTHING)
            opt.step()
            opt.step()
        assert _near(torch.view_as_real(z.detach()), pair.detach(), 1e-13), "a complex parameter takes another step"

    def test_half_precision_keeps_the_norm_and_moves_the_weights(self) -> None:
        """The norm of float16 and bfloat16 gradients is accumulated in more; the weights move and keep their dtype."""
        for dtype in (torch.float16, torch.bfloat16):
            grad = torch.full((1000,), 300.0, dtype=dtype)  # its squares are beyond float16, its sum eats bfloat16
            w = nn.Parameter(torch.zeros(1000, dtype=dtype))
            w.grad = grad
            norm = float(grad.double().norm())
            opt = self.make([w], 1.0)
            opt.step()
            seen = opt.telemetry()["norm"]
            assert math.isclose(seen, norm, rel_tol=1e-6), f"{dtype}: the norm is {seen}, not {norm}"
            move = self.scale(norm) * 300.0
            far = float((w.detach().double() + move).abs().max())
            assert w.dtype is dtype, f"{dtype} weights became {w.dtype}"
            assert far <= 2 * torch.finfo(dtype).eps * move, f"{dtype}: the weights are {far} from -{move}"

    def test_a_sparse_gradient_is_refused_before_anything_is_touched(self) -> None:
        """A TypeError that says sparse, with weights, state and counts as they were."""
        dense, table = _leaf([1.0, 2.0], [3.0, 4.0]), nn.Embedding(5, 2, sparse=True)
        opt = self.make([dense, table.weight], 0.1, **EVERYTHING)
        table(torch.tensor([1, 1])).sum().backward()
        before = _copies([dense, table.weight])
        message = _raised(TypeError, opt.step, "a sparse gradient")
        assert "sparse" in message, f"the error does not say what is wrong: {message}"
        assert _same_bits([dense, table.weight], before), "a sparse gradient was refused after weights had moved"
        assert not opt.state.get(dense), "a sparse gradient was refused after state had been made"

    # ----------------------------------------------------------------------------------------------- NaN and errors

    def test_skip_leaves_everything_bit_for_bit_and_counts(self) -> None:
        """nonfinite="skip": as though the step had not been, at the first step and later; counted as skipped."""
        for bad in (math.nan, math.inf):
            straight, spoiled = self._params(torch.float64), self._params(torch.float64)
            opts = [self.make(params, 0.1, nonfinite="skip", **EVERYTHING) for params in (straight, spoiled)]
            for _ in range(3):
                opts[0].step()
                good = spoiled[1].grad
                spoiled[1].grad = torch.full_like(spoiled[1], bad)
                opts[1].step()
                spoiled[1].grad = good
                opts[1].step()
            assert _same_bits(spoiled, straight), f"a step with {bad} left a trace"
            counts = opts[1].telemetry()
            assert counts["skipped"] == 3, f"{counts['skipped']} steps with {bad} counted as skipped, not 3"
            assert counts["steps"] == 6, f"{counts['steps']} steps counted, not 6"

    def test_raise_says_so_and_touches_nothing(self) -> None:
        """nonfinite="raise": FloatingPointError, weights and state as they were."""
        params = self._params(torch.float64)
        opt = self.make(params, 0.1, nonfinite="raise", **EVERYTHING)
        opt.step()
        assert params[1].grad is not None
        params[1].grad.view(-1)[0] = math.nan
        before = _copies(_everything(opt))
        _raised(FloatingPointError, opt.step, "a NaN")
        assert _same_bits(_everything(opt), before), "something was touched before the error was raised"

    def test_propagate_lets_nan_through(self) -> None:
        """nonfinite="propagate": the NaN reaches the weights, as in torch."""
        w = _leaf([1.0, 2.0], [math.nan, 1.0])
        self.make([w], 0.1, nonfinite="propagate").step()
        assert w.isnan().all(), f"NaN did not reach all the weights that it is judged with: {w.tolist()}"

    def test_options_out_of_range_are_refused_by_name(self) -> None:
        """ValueError or TypeError that names the option and echoes its value."""
        for name, bad in BAD_OPTIONS:
            make = partial(self.make, [_leaf([1.0])], **{"lr": 0.1, name: bad})
            message = _raised((ValueError, TypeError), make, f"{name}={bad!r}")
            assert name in message, f"{name}={bad!r}: the error does not name it: {message}"
            assert str(bad) in message, f"{name}={bad!r}: the error does not echo it: {message}"

    def test_an_option_rewritten_to_nonsense_is_refused_before_anything_moves(self) -> None:
        """Options are checked at every step: a group edited by hand cannot spoil the weights."""
        for name, bad in (("lr", math.nan), ("momentum", math.nan), ("weight_decay", -1.0)):
            params = self._params(torch.float64)
            opt = self.make([{"params": params[:2]}, {"params": params[2:]}], 0.1, momentum=0.9)
            opt.step()
            opt.param_groups[1][name] = bad
            before = _copies(_everything(opt))
            _raised((ValueError, TypeError), opt.step, f"{name}={bad!r}")
            assert _same_bits(_everything(opt), before), f"{name}={bad!r} was refused after something had moved"

    # -------------------------------------------------------------------------------------------- saved and counted

    def test_a_resumed_run_is_bit_for_bit_the_same(self) -> None:
        """state_dict() through a file, read back without pickle, into a fresh optimizer."""
        straight = self._params(torch.float32)
        opt = self.make(straight, 0.1, **EVERYTHING)
        for _ in range(3):
            opt.step()
        file = io.BytesIO()
        torch.save({"weights": _copies(straight), "opt": opt.state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = self._params(torch.float32)
        for p, w in zip(resumed, saved["weights"]):
            p.data.copy_(w)
        other = self.make(resumed, 0.7)
        other.load_state_dict(saved["opt"])
        for _ in range(3):
            opt.step()
            other.step()
        assert _same_bits(resumed, straight), "the resumed run is another run"
        assert opt.telemetry() == other.telemetry(), "the resumed run counts otherwise"

    def test_copies_go_on_by_themselves(self) -> None:
        """copy.deepcopy and pickle keep options, state and counts."""
        for name, copied in (("deepcopy", copy.deepcopy), ("pickle", _pickled)):
            params = self._params(torch.float64)
            opt = self.make(params, 0.1, scope="tensor", **EVERYTHING)
            opt.step()
            others, other = copied((params, opt))
            for p, copied_p in zip(params, others):
                copied_p.grad = p.grad  # torch copies parameters without
            other.step()
            assert not _same_bits(others, params), f"{name}: the copy steps the original or nothing"
            opt.step()
            assert _same_bits(others, params), f"{name}: the copy takes another step"
            assert other.telemetry() == opt.telemetry(), f"{name}: the copy counts otherwise"

    def test_telemetry_counts_what_happened(self) -> None:
        """Counts of steps, regimes and skipped steps, norms and path length; reading begins anew."""
        w = _leaf([0.0])
        opt = self.make([w], 0.5)
        for norm in (*self.norms, math.nan):
            w.grad = torch.tensor([norm], dtype=torch.float64)
            opt.step()
        seen = opt.telemetry()
        right: dict[str, float] = {
            "steps": len(self.norms) + 1,
            "skipped": 1,
            "norm_min": min(self.norms),
            "norm_max": max(self.norms),
            "norm_mean": sum(self.norms) / len(self.norms),
            "path_length": sum(0.5 * self.scale(norm) * norm for norm in self.norms),
        }
        if self.thresholds is not None:
            low, high = self.thresholds
            right["unclipped"] = sum(norm <= low for norm in self.norms)
            right["floored"] = sum(norm > low and norm >= high for norm in self.norms)
            right["clipped"] = len(self.norms) - right["unclipped"] - right["floored"]
        for name, value in right.items():
            assert math.isclose(seen[name], value, rel_tol=1e-12), f"{name} is {seen[name]}, not {value}"
        assert opt.telemetry()["steps"] == 0, "reading did not begin the counts anew"

    def test_a_grad_scaler_is_unscaled_before_it_is_judged(self) -> None:
        """torch.amp.GradScaler: the rule sees ||g||, not the scaled norm; an overflowed step is left out."""
        for size in self.norms:
            plain, scaled = (_leaf([1.0, 2.0], dtype=torch.float32) for _ in range(2))
            opts = [self.make([w], 0.1, momentum=0.9) for w in (plain, scaled)]
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            for t in range(3):
                for opt, w, grow in zip(opts, (plain, scaled), (lambda x: x, scaler.scale)):
                    opt.zero_grad()
                    grow(size * w.square().sum() * (math.inf if t == 0 else 1.0)).backward()
                opts[0].step()
                scaler.step(opts[1])
                scaler.update()
            far = float((plain - scaled).detach().abs().max())
            assert far <= 1e-5 * float(plain.detach().abs().max()), f"size {size}: {far} apart from the unscaled run"
            counts = opts[1].telemetry()
            assert (counts["steps"], counts["skipped"]) == (3, 1), f"counts of three steps, one overflowed: {counts}"

    # ------------------------------------------------------------------------------------------------------ helpers

    def _params(self, dtype: torch.dtype) -> list[nn.Parameter]:
        """Return three parameters with gradients, the same at each call."""
        values = _generator(3)
        params = []
        for shape in ((4, 3), (3,), (2, 2, 2)):
            p = nn.Parameter(torch.randn(shape, generator=values).to(dtype))
            p.grad = torch.randn(shape, generator=values).to(dtype)
            params.append(p)
        return params

    def _assert_that_the_multiplier_varies(self) -> None:
        multipliers = {self.scale(norm) for norm in self.norms}
        assert len(multipliers) > 1, f"scale is {multipliers} for every one of norms={self.norms}: nothing is tested"

    def _compare_with_twin(self, rng: random.Random, seed: int) -> None:
        suite = self

        class Twin(ReferenceOptimizer):
            def scale(self, norm: float, group: ReferenceGroup) -> float:
                return suite.scale(norm)

            def thresholds(self, group: ReferenceGroup) -> tuple[float, float]:
                return suite.thresholds or (math.inf, math.inf)

        options = [_random_options(rng) for _ in range(rng.randint(1, 3))]
        values = _generator(rng.randint(0, 2**31))
        starts = [
            [torch.randn(rng.choice(SHAPES), generator=values, dtype=torch.float64) for _ in range(rng.randint(1, 4))]
            for _ in options
        ]
        groups: list[dict[str, Any]] = [
            {"params": [nn.Parameter(w.clone()) for w in start], **own} for start, own in zip(starts, options)
        ]
        scope = rng.choice(["global", "group", "tensor"])
        opt = self.make(groups, 1.0, scope=scope)
        twin = Twin("", [ReferenceGroup(start, own) for start, own in zip(starts, options)], scope)
        largest = 1.0
        for t in range(rng.randint(1, 5)):
            grads = [[_random_grad(rng, w, values) for w in start] for start in starts]
            for group, group_grads in zip(opt.param_groups, grads):
                for p, g in zip(group["params"], group_grads):
                    p.grad = g
            opt.step()
            twin.step(grads)
            for group, other in zip(opt.param_groups, twin.groups):
                for p, w in zip(group["params"], other.params):
                    largest = max([largest, *w.abs().flatten().tolist()])
                    assert _near(p, w, 1e-12 * largest), (
                        f"random problem {seed}, scope={scope!r}, step {t}: with {other.options} the weights are "
                        f"{p.tolist()} and the twin's {w.tolist()}"
                    )
        counts = opt.telemetry()
        for name in ("steps", "skipped", *(("unclipped", "clipped", "floored") if self.thresholds else ())):
            assert counts[name] == twin.counts[name], (
                f"random problem {seed}, scope={scope!r}: {name} is {counts[name]}, not {twin.counts[name]}"
            )


def _random_options(rng: random.Random) -> dict[str, Any]:
    momentum, dampening = rng.choice([0.0, 0.5, 0.9]), rng.choice([0.0, 0.0, 0.3])
    return {
        "lr": 10 ** rng.uniform(-3, 0.5),
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": momentum > 0 and dampening == 0 and rng.random() < 0.5,
        "weight_decay": rng.choice([0.0, 0.01, 0.3]),
        "decoupled_weight_decay": rng.random() < 0.5,
        "maximize": rng.random() < 0.3,
    }


def _random_grad(rng: random.Random, w: Tensor, values: torch.Generator) -> Tensor | None:
    kind = rng.choice(["usual"] * 16 + ["none", "none", "zero", "nan"])
    if kind == "none":
        return None
    g = torch.randn(w.shape, generator=values, dtype=torch.float64) * 10 ** rng.uniform(-3, 3)
    return g * math.nan if kind == "nan" else g * (kind != "zero")


def _leaf(value: Any, grad: Any = None, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    w = nn.Parameter(torch.tensor(value, dtype=dtype))
    if grad is not None:
        w.grad = torch.tensor(grad, dtype=dtype)
    return w


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [t.detach().clone() for t in tensors]


def _everything(opt: torch.optim.Optimizer) -> list[Tensor]:
    """Return the weights and all tensors of the state."""
    params = [p for group in opt.param_groups for p in group["params"]]
    return params + [v for p in params for v in opt.state.get(p, {}).values() if isinstance(v, Tensor)]


def _near(a: Tensor, b: Tensor, allowed: float) -> bool:
    return a.shape == b.shape and bool(((a.detach() - b).abs() <= allowed).all())


def _same_bits(left: Iterable[Tensor], right: Iterable[Tensor]) -> bool:
    pairs = list(zip(list(left), list(right), strict=True))
    return all(
        torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))
        for a, b in pairs
    )


def _pickled(pair: tuple[list[nn.Parameter], Any]) -> tuple[list[nn.Parameter], Any]:
    """Send parameters and optimizer through pickle, wherever the class was defined."""
    params, opt = pair
    others, state = pickle.loads(pickle.dumps((params, opt.__getstate__())))
    other = object.__new__(type(opt))
    other.__setstate__(state)
    return others, other


def _raised(kind: type[Exception] | tuple[type[Exception], ...], call: Callable[[], Any], what: str) -> str:
    """Return the message of the error that `call` must raise."""
    try:
        call()
    except kind as error:
        return str(error)
    raise AssertionError(f"{what} was let through")
