"""Verdict: what follows from some measurements, or why nothing does and what would help."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from surefoot.measure.measurement import Measurement


class Outcome(Enum):
    """What a theorem says of the case at hand."""

    PROVED = "proved"
    REFUTED = "refuted"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Finding:
    """One hypothesis held against what was measured.

    Attributes:
        hypothesis: in words or a formula: "q < (1 - epsilon)/2".
        outcome: PROVED, REFUTED or UNDECIDED.
        reason: the numbers: "q = 12.4, and (1 - epsilon)/2 = 0.45".
        remedy: what would help; "" if it is proved.
    """

    hypothesis: str
    outcome: Outcome
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Verdict:
    """The outcome of checking a theorem; true if and only if it is proved.

    Attributes:
        theorem: its name.
        outcome: PROVED, REFUTED (a hypothesis fails) or UNDECIDED (one is not settled).
        conclusion: what follows, in words with its numbers; "" unless proved.
        numbers: the conclusion's numbers by name: "radius", "eta_max", "rate" ...
        findings: one a hypothesis, in the theorem's order.
        measurements: what it rests on.
        criteria: which published criterion would also have applied: name -> true or false.
        source: whose theorem it is.
        certificate: the proof, if one was written.

    Example:
        >>> v = Verdict("a theorem", Outcome.UNDECIDED, findings=(
        ...     Finding("beta is known", Outcome.UNDECIDED, "beta is an estimate", "give a verified bound"),))
        >>> bool(v)
        False
        >>> print(v)
        UNDECIDED: a theorem
          undecided  beta is known: beta is an estimate; give a verified bound
    """

    theorem: str
    outcome: Outcome
    conclusion: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    criteria: Mapping[str, bool] = field(default_factory=dict)
    source: str = ""
    certificate: Any = None

    def __bool__(self) -> bool:
        return self.outcome is Outcome.PROVED

    def __str__(self) -> str:
        lines = [f"{self.outcome.name}: {self.theorem}" + (f": {self.conclusion}" if self.conclusion else "")]
        width = max((len(f.outcome.value) for f in self.findings), default=0)
        for f in self.findings:
            lines.append(
                f"  {f.outcome.value:{width}}  {f.hypothesis}: {f.reason}" + (f"; {f.remedy}" if f.remedy else "")
            )
        return "\n".join(lines)

    def with_certificate(self, certificate: Any) -> Verdict:
        """Return this verdict with its proof."""
        return replace(self, certificate=certificate)

    def to_json(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold."""
        return {
            "theorem": self.theorem,
            "outcome": self.outcome.value,
            "conclusion": self.conclusion,
            "numbers": {k: float(v) for k, v in self.numbers.items()},
            "findings": [
                {"hypothesis": f.hypothesis, "outcome": f.outcome.value, "reason": f.reason, "remedy": f.remedy}
                for f in self.findings
            ],
            "measurements": [m.to_json() for m in self.measurements],
            "criteria": dict(self.criteria),
            "source": self.source,
        }


def conclude(
    theorem: str,
    findings: tuple[Finding, ...],
    measurements: tuple[Measurement, ...],
    *,
    conclusion: str,
    numbers: Mapping[str, float],
    criteria: Mapping[str, bool] | None = None,
    source: str = "",
) -> Verdict:
    """Return PROVED if every hypothesis is, REFUTED if one is refuted, else UNDECIDED; only PROVED has a conclusion."""
    outcomes = {f.outcome for f in findings}
    if Outcome.REFUTED in outcomes:
        outcome = Outcome.REFUTED
    elif outcomes <= {Outcome.PROVED}:
        outcome = Outcome.PROVED
    else:
        outcome = Outcome.UNDECIDED
    proved = outcome is Outcome.PROVED
    return Verdict(
        theorem,
        outcome,
        conclusion if proved else "",
        numbers if proved else {},
        findings,
        measurements,
        criteria or {},
        source,
    )


def bounded(m: Measurement, kind: str, *, remedy: str = "") -> Finding:
    """Return whether a measurement is a proof of the bound that a theorem needs.

    An exact number serves as either bound. An estimate, or a bound of the other side, leaves the matter undecided.
    """
    hypothesis = f"{m.name} has a proved {kind}"
    if m.proves and m.kind in (kind, "exact"):
        return Finding(hypothesis, Outcome.PROVED, str(m))
    why = f"it is a {m.kind} of level {m.level}" if m.kind != "estimate" else "it is an estimate, which proves nothing"
    return Finding(hypothesis, Outcome.UNDECIDED, why, remedy or f"measure it with level='verified' as a {kind}")
