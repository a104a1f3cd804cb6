"""Each optimizer against its slow float64 twin, on random problems: parameters, buffers, counts and path length."""

import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from optim_helpers import buffers_of
from torch import Tensor, nn

import surefoot.testing.reference
from surefoot import DeltaGClip, GClip, NormalizedGD, SmoothClip
from surefoot.optim._base import ClippedOptimizer
from surefoot.testing import ReferenceGroup, ReferenceOptimizer

COUNTS = ("unclipped", "clipped", "floored", "skipped", "steps")
SHAPES = [(), (1,), (3,), (2, 3), (2, 1, 2), (0,)]
SEEDS = range(100)  # problems that stay the same


@dataclass
class Problem:
    """What both sides are given."""

    rule: str  # of the optimizer; the twin of "gclip" is delta_gclip with delta = 0
    scope: str
    options: list[dict[str, Any]]  # one a group
    starts: list[list[Tensor]]
    steps: list[list[list[Tensor | None]]]


def random_problem(rng: random.Random, dtype: torch.dtype = torch.float64) -> Problem:
    rule = rng.choice(["delta_gclip", "delta_gclip", "gclip", "normalized", "smooth_clip"])
    alike = rng.random() < 0.3
    options = [random_options(rng, rule) for _ in range(rng.randint(1, 3))]
    options = [options[0] if alike else o for o in options]
    shapes = [[rng.choice(SHAPES) for _ in range(rng.randint(1, 4))] for _ in options]
    values = torch.Generator().manual_seed(rng.randint(0, 2**31))
    starts = [[torch.randn(s, generator=values, dtype=torch.float64).to(dtype) for s in group] for group in shapes]
    steps = [random_grads(rng, shapes, values, dtype) for _ in range(rng.randint(1, 6))]
    return Problem(rule, rng.choice(["global", "group", "tensor"]), options, starts, steps)


def random_options(rng: random.Random, rule: str) -> dict[str, Any]:
    momentum = rng.choice([0.0, 0.5, 0.9])
    dampening = rng.choice([0.0, 0.0, 0.3])
    options = {
        "lr": 10 ** rng.uniform(-3, 0.5),
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": momentum > 0 and dampening == 0 and rng.random() < 0.5,
        "weight_decay": rng.choice([0.0, 0.01, 0.3]),
        "decoupled_weight_decay": rng.random() < 0.5,
        "maximize": rng.random() < 0.3,
    }
    if rule in ("delta_gclip", "gclip"):
        options["gamma"] = rng.choice([math.inf, *(10 ** rng.uniform(-2, 2) for _ in range(6))])
        options["delta"] = 0.0 if rule == "gclip" else rng.choice([0.0, 1e-3, 0.1, 0.5, 1.0])
    elif rule == "normalized":
        options["beta"] = rng.choice([0.0, 10 ** rng.uniform(-2, 2)])
    else:
        options |= {"L0": 10 ** rng.uniform(-2, 2), "L1": rng.choice([0.0, 10 ** rng.uniform(-2, 2)])}
    return options


def random_grads(
    rng: random.Random, shapes: list[list[tuple[int, ...]]], values: torch.Generator, dtype: torch.dtype
) -> list[list[Tensor | None]]:
    reach = 90 if dtype == torch.float64 else 9
    size = rng.choice([rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(-4, 4), rng.uniform(-reach, reach)])
    kind = rng.choice(["usual"] * 9 + ["zero", "nan", "inf", "none"])
    grads: list[list[Tensor | None]] = []
    for group in shapes:
        grads.append([])
        for shape in group:
            g = torch.randn(shape, generator=values, dtype=torch.float64) * 10 ** (size + rng.uniform(-1, 1))
            if kind == "zero" or rng.random() < 0.1:
                g.zero_()
            if kind in ("nan", "inf") and g.numel() and rng.random() < 0.5:
                g.view(-1)[0] = math.nan if kind == "nan" else rng.choice([math.inf, -math.inf])
            grads[-1].append(None if kind == "none" or rng.random() < 0.2 else g.to(dtype))
    return grads


def build(problem: Problem) -> ClippedOptimizer:
    """Return the optimizer: group 0 has its options from the constructor, the others have their own."""
    cls = {"delta_gclip": DeltaGClip, "gclip": GClip, "normalized": NormalizedGD, "smooth_clip": SmoothClip}
    own = [{k: v for k, v in o.items() if problem.rule != "gclip" or k != "delta"} for o in problem.options]
    groups = [{"params": [nn.Parameter(w.clone()) for w in start]} for start in problem.starts]
    for group, options in zip(groups[1:], own[1:]):
        group.update(options)
    return cls[problem.rule](groups, scope=problem.scope, **own[0])


def differences(problem: Problem, twin_problem: Problem | None = None) -> list[str]:
    """Run both sides and return what differs, with the step; the twin may be given another problem to make it wrong."""
    told = twin_problem or problem
    twin = ReferenceOptimizer(
        "delta_gclip" if told.rule == "gclip" else told.rule,
        [ReferenceGroup(start, dict(options)) for start, options in zip(told.starts, told.options)],
        told.scope,
    )
    opt = build(problem)
    params = [list(group["params"]) for group in opt.param_groups]
    # Rounding is relative to the largest value a tensor ever had: it may have come back from there.
    eps = torch.finfo(problem.starts[0][0].dtype).eps
    largest = [[max(1e-300, _peak(w)) for w in start] for start in told.starts]
    found: list[str] = []
    for t, (grads, twin_grads) in enumerate(zip(problem.steps, told.steps)):
        for group, group_grads in zip(params, grads):
            for p, g in zip(group, group_grads):
                p.grad = None if g is None else g.clone()
        opt.step()
        twin.step(twin_grads)
        buffers = buffers_of(opt)
        for k, group in enumerate(params):
            for i, p in enumerate(group):
                w, b = twin.groups[k].params[i], twin.groups[k].buffers[i]
                largest[k][i] = max(largest[k][i], _peak(w), 0.0 if b is None else _peak(b))
                allowed = 2000 * eps * largest[k][i]
                if not _near(p, w, allowed):
                    found.append(f"step {t}: parameter {i} of group {k}")
                mine = buffers.get(p)
                if (mine is None) != (b is None) or (
                    mine is not None and b is not None and not _near(mine, b, allowed)
                ):
                    found.append(f"step {t}: momentum buffer {i} of group {k}")
        seen = opt.telemetry(reset=False)
        found += [f"step {t}: {name}" for name in COUNTS if seen[name] != twin.counts[name]]
        if not math.isclose(seen["path_length"], twin.path_length, rel_tol=1e-12 if eps < 1e-12 else 4e-7):
            found.append(f"step {t}: path_length")
    return found


def _peak(w: Tensor) -> float:
    return float(w.abs().max()) if w.numel() else 0.0


def _near(a: Tensor, b: Tensor, allowed: float) -> bool:
    return a.shape == b.shape and bool(((a.detach().double() - b).abs() <= allowed).all())


def units(problem: Problem) -> dict[str, float]:
    opt = build(problem)
    for grads in problem.steps:
        for group, group_grads in zip(opt.param_groups, grads):
            for p, g in zip(group["params"], group_grads):
                p.grad = g
        opt.step()
    return opt.telemetry()


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.randoms(use_true_random=False))
def test_every_rule_agrees_with_its_twin(rng: random.Random) -> None:
    problem = random_problem(rng)
    event(f"{problem.rule}, scope {problem.scope}")
    assert differences(problem) == []


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.randoms(use_true_random=False))
def test_in_float32_the_parameters_are_right_to_rounding_and_the_counts_exact(rng: random.Random) -> None:
    assert differences(random_problem(rng, torch.float32)) == []


@pytest.mark.parametrize("seed", SEEDS)
def test_fixed_problems_agree_with_the_twin(seed: int) -> None:
    assert differences(random_problem(random.Random(seed))) == []


def test_the_fixed_problems_reach_every_regime_option_and_odd_input() -> None:
    seen: Counter[str] = Counter()
    for seed in SEEDS:
        problem = random_problem(random.Random(seed))
        counts = units(problem)
        seen.update(f"{problem.rule} {name}" for name in COUNTS if counts[name])
        seen[f"{problem.rule} scope {problem.scope}"] += 1
        for options in problem.options:
            seen.update(f"{problem.rule} {name}" for name, value in options.items() if value)
        tensors = [g for step in problem.steps for group in step for g in group]
        present = [g for g in tensors if g is not None]
        seen["missing"] += len(tensors) - len(present)
        seen["step without any gradient"] += sum(all(g is None for group in s for g in group) for s in problem.steps)
        seen["zero step"] += sum(
            all(g is None or not g.any() for group in s for g in group) and any(g is not None for g in s[0])
            for s in problem.steps
        )
        seen["0-dim"] += sum(g.dim() == 0 for g in present)
        seen["empty"] += sum(g.numel() == 0 for g in present)
        seen["groups that differ"] += len(problem.options) > 1 and problem.options[0] != problem.options[1]
        seen["groups that agree"] += len(problem.options) > 1 and problem.options[0] == problem.options[1]
        seen["tiny"] += any(0 < _peak(g) < 1e-20 for g in present)
        seen["huge"] += any(1e20 < _peak(g) < math.inf for g in present)
    shared = ["lr", "momentum", "dampening", "nesterov", "weight_decay", "decoupled_weight_decay", "maximize"]
    for rule, letters in {
        "delta_gclip": ["gamma", "delta", "floored"],
        "gclip": ["gamma"],
        "normalized": ["beta"],
        "smooth_clip": ["L0", "L1"],
    }.items():
        scopes = [f"scope {scope}" for scope in ("global", "group", "tensor")]
        for name in [*letters, *shared, *scopes, "unclipped", "clipped", "skipped", "steps"]:
            assert seen[f"{rule} {name}"] >= 2, f"{rule} {name}"
    for name in ("missing", "step without any gradient", "zero step", "0-dim", "empty", "tiny", "huge"):
        assert seen[name] >= 2, name
    assert seen["groups that differ"] >= 10
    assert seen["groups that agree"] >= 3


def _with(problem: Problem, **changed: Any) -> Problem:
    options = [
        {k: changed[k](v) if k in changed else v for k, v in group_options.items()} for group_options in problem.options
    ]
    return replace(problem, options=options)


SMALL = 1 + 1e-6
WRONG_TWINS = {
    "lr": lambda p: _with(p, lr=lambda v: v * SMALL),
    "gamma": lambda p: _with(p, gamma=lambda v: v * SMALL),
    "delta": lambda p: _with(p, delta=lambda v: v * SMALL),
    "beta": lambda p: _with(p, beta=lambda v: v * SMALL),
    "L0": lambda p: _with(p, L0=lambda v: v * SMALL),
    "L1": lambda p: _with(p, L1=lambda v: v * SMALL),
    "momentum": lambda p: _with(p, momentum=lambda v: v * SMALL),
    "no momentum": lambda p: _with(p, momentum=lambda v: 0.0),
    "dampening": lambda p: _with(p, dampening=lambda v: v * SMALL),
    "nesterov": lambda p: _with(p, nesterov=lambda v: False),
    "weight_decay": lambda p: _with(p, weight_decay=lambda v: v * SMALL),
    "decoupled_weight_decay": lambda p: _with(p, decoupled_weight_decay=lambda v: not v),
    "maximize": lambda p: _with(p, maximize=lambda v: not v),
    "options of group 0 everywhere": lambda p: replace(p, options=[p.options[0]] * len(p.options)),
    "scope group": lambda p: replace(p, scope="group"),
    "scope tensor": lambda p: replace(p, scope="tensor"),
    "scope global": lambda p: replace(p, scope="global"),
    "a missing gradient counts as zero": lambda p: replace(
        p,
        steps=[
            [
                [torch.zeros_like(w) if g is None else g for w, g in zip(start, group)]
                for start, group in zip(p.starts, step)
            ]
            for step in p.steps
        ],
    ),
}


@pytest.mark.parametrize("wrong", WRONG_TWINS)
def test_a_twin_told_otherwise_would_be_caught(wrong: str) -> None:
    caught = 0
    for seed in SEEDS:
        problem = random_problem(random.Random(seed))
        caught += bool(differences(problem, WRONG_TWINS[wrong](problem)))
        if caught == 2:
            return
    pytest.fail(f"no two of the fixed problems notice a wrong {wrong}")


WRONG_RULES = {
    "min and max swapped": lambda norm, o: max(1.0, min(o["delta"], o["gamma"] / norm if norm else math.inf)),
    "no floor": lambda norm, o: min(1.0, o["gamma"] / norm if norm else math.inf),
    "floor instead of clip": lambda norm, o: 1.0 if norm <= o["gamma"] else o["delta"],
    "torch's 1e-6": lambda norm, o: min(1.0, max(o["delta"], o["gamma"] / (norm + 1e-6))),
    "amplifies": lambda norm, o: max(o["delta"], o["gamma"] / norm if norm else 1.0),
    "squared norm": lambda norm, o: min(1.0, max(o["delta"], o["gamma"] / norm**2 if norm else math.inf)),
}


@pytest.mark.parametrize("wrong", WRONG_RULES)
def test_a_twin_with_another_formula_would_be_caught(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = surefoot.testing.reference.reference_scale

    def scale(rule: str, norm: float, **letters: float) -> float:
        return WRONG_RULES[wrong](norm, letters) if rule == "delta_gclip" else right(rule, norm, **letters)

    monkeypatch.setattr(surefoot.testing.reference, "reference_scale", scale)
    problems = [random_problem(random.Random(seed)) for seed in SEEDS]
    assert sum(bool(differences(p)) for p in problems if p.rule == "delta_gclip") >= 3
