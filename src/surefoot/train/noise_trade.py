"""How large a perturbation of the hidden weights is worth: conditioning of the features against loss and accuracy."""

from __future__ import annotations

from dataclasses import dataclass

NOISES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2)  # what noise="auto" tries
WORTH = 10.0  # a larger perturbation is worth it if steps fall by more than this factor
LOST = 0.01  # ... and accuracy by no more than this, or without one the loss rises by no more, relative


@dataclass(frozen=True)
class NoiseTrial:
    """One row of the trade of noise="auto".

    Attributes:
        noise: nu.
        status: of rank N at these weights: "PROVED", "REFUTED" or "UNDECIDED".
        s_min: verified lower bound of s_N.
        steps: of gradient descent that are enough, squared loss, to 1e-6 of the residual.
        loss: f with the perturbed features and the head as it is.
        accuracy: on the training samples; None for a regression.
        chosen: whether it was taken.
    """

    noise: float
    status: str
    s_min: float
    steps: float
    loss: float
    accuracy: float | None
    chosen: bool = False


def choose(trials: list[NoiseTrial]) -> NoiseTrial:
    """Return the smallest perturbation that is worth it: see `ExploreExploit`, noise="auto".

    Example:
        >>> rows = [
        ...     NoiseTrial(0.0, "UNDECIDED", 0.0, float("inf"), 0.1, 0.98),
        ...     NoiseTrial(1e-4, "PROVED", 1e-5, 1e12, 0.1, 0.98),
        ...     NoiseTrial(1e-2, "PROVED", 1e-2, 1e8, 0.12, 0.975),
        ...     NoiseTrial(1e-1, "PROVED", 1e-1, 1e4, 0.7, 0.6),
        ... ]
        >>> choose(rows).noise
        0.01
    """
    plain = trials[0]

    def cheap(row: NoiseTrial) -> bool:
        if plain.accuracy is not None and row.accuracy is not None:
            return row.accuracy >= plain.accuracy - LOST
        return row.loss <= plain.loss * (1 + LOST)

    allowed = [row for row in trials if cheap(row)]
    fewest = min(row.steps for row in allowed)
    return next(row for row in allowed if row.steps <= WORTH * fewest)
