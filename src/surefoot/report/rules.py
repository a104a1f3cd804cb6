"""What an optimizer's rule says, in words: the formula, its letters, and what each regime means under it."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from surefoot.report.figures import Guide
from surefoot.report.formats import is_number, number, percent
from surefoot.report.read import Array, Table, known

_TITLES = {
    "delta-gclip": "δ-GClip",
    "gclip": "GClip",
    "normalized-gd": "Normalised gradient descent",
    "smooth-clip": "Smooth clipping",
    "sgd": "SGD",
    "adam": "Adam",
    "adamw": "AdamW",
}


@dataclass(frozen=True)
class Letter:
    """A symbol of the formula and its value."""

    symbol: str
    value: str
    meaning: str


@dataclass(frozen=True)
class Definition:
    """What a regime means: when a step is in it, what the multiplier then is, and what that does."""

    regime: str
    when: str
    multiplier: str
    effect: str


@dataclass(frozen=True)
class Rule:
    """How this run turned a gradient into a step.

    `kind` is one of: clip (the threshold γ multiplies the step), wrapped (the gradient is clipped before another
    optimizer sees it), normalized, smooth, plain (no threshold at all). `ceilings` are 1/L₀ and 1/L₁ of a smooth rule.
    """

    kind: str
    title: str
    formula: str
    letters: tuple[Letter, ...]
    threshold: str
    has_floor: bool
    momentum: bool
    decayed: bool
    adaptive: bool
    ceilings: tuple[float | None, float | None] = (None, None)

    @property
    def exact(self) -> bool:
        """True where the scaled gradient is the whole step."""
        return not (self.adaptive or self.momentum or self.decayed)


def read_rule(config: dict[str, Any], series: Table) -> Rule:
    """The rule that `config["optimizer"]` names, with its letters' values (a schedule's as a range)."""
    given = str(config.get("optimizer") or "")
    name = given.lower().replace("_", "-").replace(" ", "-")
    name = {"deltagclip": "delta-gclip", "normalizedgd": "normalized-gd", "smoothclip": "smooth-clip"}.get(name, name)
    has_gamma = _present(config.get("gamma")) or bool(known(series.numbers("gamma")).size)
    delta = config.get("delta") if config.get("delta") is not None else _first(series.numbers("delta"))
    has_floor = has_gamma and _positive(delta)
    title = _TITLES.get(name, given or "Optimizer")
    eta = Letter("η", _span(series.numbers("lr"), config.get("lr")), "learning rate")
    gamma = Letter("γ", _span(series.numbers("gamma"), config.get("gamma")), "threshold")
    floor = Letter("δ", _span(series.numbers("delta"), delta), "floor")
    adaptive = name not in ("delta-gclip", "gclip", "normalized-gd", "smooth-clip", "sgd")
    kind, threshold = "plain", ""
    formula, letters = f"η · {title}(g)" if adaptive else "h = η", [eta]
    factor = "min{1, max{δ, γ/‖g‖}}" if has_floor else "min{1, γ/‖g‖}"
    if name == "normalized-gd":
        kind, threshold = "normalized", "β"
        formula = "h = η / (‖g‖ + β)"
        letters = [eta, Letter("β", _span(series.numbers("gamma"), config.get("beta")), "threshold")]
    elif name == "smooth-clip":
        kind, threshold = "smooth", "L₀/L₁"
        formula = "h = η / (L₀ + L₁‖g‖)"
        letters = [
            eta,
            Letter("L₀", number(config.get("L0")), "smoothness at zero gradient"),
            Letter("L₁", number(config.get("L1")), "growth of smoothness with the gradient"),
        ]
    elif has_gamma:
        kind, threshold = "wrapped" if adaptive else "clip", "γ"
        formula = f"η · {title}(g · {factor})" if adaptive else f"h = η · {factor}"
        letters = [eta, gamma, floor] if has_floor else [eta, gamma]
    if _positive(config.get("momentum")):
        letters.append(Letter("μ", number(config["momentum"]), "momentum"))
    return Rule(
        kind=kind,
        title=title,
        formula=formula,
        letters=tuple(letters),
        threshold=threshold,
        has_floor=has_floor and kind in ("clip", "wrapped"),
        momentum=_positive(config.get("momentum")),
        decayed=_positive(config.get("weight_decay")),
        adaptive=adaptive,
        ceilings=(_inverse(config.get("L0")), _inverse(config.get("L1"))) if kind == "smooth" else (None, None),
    )


def definitions(rule: Rule) -> list[Definition]:
    """The words unclipped, clipped, floored and skipped under this rule."""
    skipped = Definition("skipped", "‖g‖ is not finite", "none", "The step was not taken: nothing changed.")
    if rule.kind == "plain":
        return [Definition("unclipped", "always", "h = η", "This rule has no threshold: no step is clipped."), skipped]
    if rule.kind == "normalized":
        return [
            Definition("unclipped", "‖g‖ ≤ β", "η/2β ≤ h ≤ η/β", "Close to gradient descent with learning rate η/β."),
            Definition("clipped", "‖g‖ > β", "h < η/2β", "The step length lies between η/2 and η, whatever the norm."),
            skipped,
        ]
    if rule.kind == "smooth":
        return [
            Definition("unclipped", "‖g‖ ≤ L₀/L₁", "η/2L₀ ≤ h ≤ η/L₀", "Close to gradient descent with rate η/L₀."),
            Definition("clipped", "‖g‖ > L₀/L₁", "h < η/2L₀", "The step length lies between η/2L₁ and η/L₁."),
            skipped,
        ]
    upper = " < γ/δ" if rule.has_floor else ""
    if rule.kind == "wrapped":
        rows = [
            Definition("unclipped", "‖g‖ ≤ γ", "× 1", f"{rule.title} sees the gradient as it is."),
            Definition("clipped", f"γ < ‖g‖{upper}", "× γ/‖g‖", f"{rule.title} sees a gradient of norm exactly γ."),
        ]
        floored = Definition(
            "floored", "‖g‖ ≥ γ/δ", "× δ", f"{rule.title} sees a gradient of norm δ‖g‖, at least γ: the floor acts."
        )
    else:
        length = "The step length is exactly ηγ." if rule.exact else "The scaled gradient has length exactly ηγ."
        rows = [
            Definition("unclipped", "‖g‖ ≤ γ", "h = η", "A plain gradient step."),
            Definition("clipped", f"γ < ‖g‖{upper}", "h = ηγ/‖g‖", length),
        ]
        floored = Definition(
            "floored", "‖g‖ ≥ γ/δ", "h = ηδ", "The floor acts: the length is ηδ‖g‖ and grows with the norm again."
        )
    if not rule.has_floor:
        floored = Definition("floored", "never here", "h = ηδ", "This run had no floor (δ = 0).")
    return [*rows, floored, skipped]


def regime_sentence(rule: Rule, counts: dict[str, int]) -> str:
    """What the regimes of a run's steps say about the run."""
    total = sum(counts.values())
    taken = total - counts["skipped"]
    if not total:
        return "No steps were taken."
    if not taken:
        return "Every step was skipped: no gradient was finite, and nothing changed."
    sentences = []
    shares = {regime: counts[regime] / taken for regime in ("unclipped", "clipped", "floored")}
    much, every = max(shares, key=lambda regime: shares[regime]), max(shares.values()) == 1
    lead = "Every step was" if every else "Nearly every step was"
    if rule.kind == "plain":
        sentences.append("There is no threshold: every step was made with the full learning rate.")
    elif shares[much] > 0.99:
        sentences.append(f"{lead} {much}: {_regime_means(rule, much)}.")
    else:
        parts = [f"{percent(share)} {'were ' * (i == 0)}{name}" for i, (name, share) in enumerate(_some(shares))]
        sentences.append(f"Of the steps taken, {', '.join(parts[:-1])} and {parts[-1]}.")
    if rule.has_floor and counts["clipped"] and not counts["floored"]:
        sentences.append("The floor δ never acted: the run is plain clipping.")
    if counts["skipped"]:
        were = "step was" if counts["skipped"] == 1 else "steps were"
        sentences.append(f"{counts['skipped']:,} {were} skipped for a gradient that was not finite.")
    return " ".join(sentences)


def _some(shares: dict[str, float]) -> list[tuple[str, float]]:
    return [(regime, share) for regime, share in shares.items() if share]


def _regime_means(rule: Rule, regime: str) -> str:
    if rule.kind == "normalized":
        return {
            "unclipped": "this is close to gradient descent with learning rate η/β",
            "clipped": "this is nearly normalised gradient descent: every step has a length between η/2 and η",
        }.get(regime, "")
    if rule.kind == "smooth":
        return {
            "unclipped": "this is close to gradient descent with learning rate η/L₀",
            "clipped": "this is nearly normalised gradient descent: every step has a length between η/2L₁ and η/L₁",
        }.get(regime, "")
    if rule.kind == "wrapped":
        return {
            "unclipped": f"this is plain {rule.title}",
            "clipped": f"{rule.title} saw gradients of one norm, γ, and only their direction",
            "floored": f"this is {rule.title} on gradients multiplied by δ",
        }[regime]
    length = "every step has length η·γ" if rule.exact else "every scaled gradient has length η·γ"
    return {
        "unclipped": "this is plain gradient descent with learning rate η",
        "clipped": f"this is normalised gradient descent: {length}",
        "floored": "this is gradient descent with the small learning rate η·δ",
    }[regime]


def norm_guides(rule: Rule, series: Table) -> list[Guide]:
    """The norms at which the regime changes; none where no step has a threshold."""
    gamma = series.numbers("gamma")
    if not rule.threshold or not known(gamma).size:
        return []
    guides = [Guide(rule.threshold, gamma)]
    if rule.has_floor:
        guides.append(Guide("γ/δ", _over(gamma, series.numbers("delta"))))
    return guides


def multiplier(rule: Rule, series: Table) -> tuple[Array, list[Guide]]:
    """The multiplier h at every step, and the lines that bound it."""
    lr, scale, gamma = series.numbers("lr"), series.numbers("scale"), series.numbers("gamma")
    guides = {
        "clip": [Guide("η", lr)],
        "wrapped": [Guide("η", lr)],
        "normalized": [Guide("η/β", _over(lr, gamma))],
        "smooth": _times_lr("η/L₀", rule.ceilings[0], series),
        "plain": [],
    }[rule.kind]
    if rule.has_floor:
        guides.append(Guide("ηδ", _positive_only(lr * series.numbers("delta"))))
    return lr * scale, guides


def length_guides(rule: Rule, series: Table) -> list[Guide]:
    """The length of a clipped step, or that which no step exceeds; none where momentum or another rule blurs it."""
    if not rule.exact or rule.kind == "plain":
        return []
    if rule.kind == "smooth":
        return _times_lr("η/L₁", rule.ceilings[1], series)
    lr = series.numbers("lr")
    return [Guide("η", lr)] if rule.kind == "normalized" else [Guide("ηγ", lr * series.numbers("gamma"))]


def _times_lr(label: str, factor: float | None, series: Table) -> list[Guide]:
    return [] if factor is None else [Guide(label, factor * series.numbers("lr"))]


def _inverse(value: Any) -> float | None:
    return 1 / value if _positive(value) and value > 1e-100 else None


def _over(a: Array, b: Array) -> Array:
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def _positive_only(values: Array) -> Array:
    return np.where(values > 0, values, np.nan)


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _present(value: Any) -> bool:
    """A threshold that can act: null and infinity cannot."""
    return is_number(value)


def _first(values: Array) -> float | None:
    found = known(values)
    return float(found[0]) if found.size else None


def _span(values: Array, configured: Any) -> str:
    """`0.1`, or `0.1 → 0.001` where a schedule moved it."""
    found = known(values)
    if not found.size:
        return number(configured)
    first, last = float(found[0]), float(found[-1])
    return number(first) if np.allclose(found, first, rtol=1e-9) else f"{number(first)} → {number(last)}"
