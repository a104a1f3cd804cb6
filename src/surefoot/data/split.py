"""Which rows train and which test: drawn from a seed, so that the same request gives the same rows."""

import numpy as np

from surefoot.data.options import Options
from surefoot.errors import InputError

TEST_FRACTION = 0.2


def divide(
    source: str, options: Options, notes: list[str], *, rows: int, labels: np.ndarray | None, has_test: bool
) -> tuple[np.ndarray, np.ndarray | None]:
    """Choose the training rows, and the test rows where the data bring none.

    Args:
        source: What the user asked for, for messages.
        options: `test_fraction`, `limit` and `seed` are used.
        notes: What was decided is appended here.
        rows: Number of rows to choose from.
        labels: Class of each row; None for regression. With labels, each class is held out in proportion, and a limit
            takes as many rows of each class as it can.
        has_test: The data have test rows of their own.

    Returns:
        Indices of the training rows, and of the test rows (None when `has_test`), both ascending.

    Raises:
        InputError: There are too few rows.
    """
    least = 2 if has_test else 3
    if rows < least:
        raise InputError(f"data {source!r}: {rows} training rows are too few, give at least {least}")
    if has_test:
        train, test = np.arange(rows), None
        if options.test_fraction is not None:
            notes.append(
                f"test_fraction={options.test_fraction} has no effect: the data have a test split of their own"
            )
    else:
        fraction = TEST_FRACTION if options.test_fraction is None else options.test_fraction
        train, test = held_out(rows, fraction, options.seed, labels)
        if len(train) < 2 or len(test) < 1:
            raise InputError(
                f"data {source!r}: test_fraction={fraction} of {rows} rows leaves {len(train)} to train on and "
                f"{len(test)} to test on: give more rows or another test_fraction"
            )
        notes.append(f"no test split: {100 * fraction:g}% of the rows held out (seed {options.seed})")
    kept = limited(train, options, notes, None if labels is None else labels[train])
    if labels is not None and len(np.unique(labels[kept])) < 2:
        raise InputError(f"data {source!r}: every training row is of one class, give rows of at least two")
    return kept, test


def held_out(rows: int, fraction: float, seed: int, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the training and of the test rows, each ascending; every class keeps a training row."""
    groups = [np.arange(rows)] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    rng = np.random.default_rng(seed)
    parts = [rng.permutation(group)[: min(round(fraction * len(group)), len(group) - 1)] for group in groups]
    if not any(len(part) for part in parts):  # too few rows for the fraction: one row of the largest group
        parts = [max(groups, key=len)[:1]]
    test = np.sort(np.concatenate(parts))
    return np.setdiff1d(np.arange(rows), test), test


def limited(train: np.ndarray, options: Options, notes: list[str], labels: np.ndarray | None) -> np.ndarray:
    """At most `limit` of the training rows, class after class in turn when there are labels.

    Args:
        train: Indices of the training rows.
        options: `limit` and `seed` are used.
        notes: What was decided is appended here.
        labels: Class of each of `train`, or None.
    """
    if options.limit is None:
        return train
    if options.limit >= len(train):
        notes.append(f"limit={options.limit} has no effect: there are {len(train)} training rows")
        return train
    rng = np.random.default_rng(options.seed)
    order = rng.permutation(len(train))
    if labels is not None:
        # The first row of each class, then the second of each, and so on until the limit is reached.
        turn = np.empty(len(train), dtype=np.int64)
        for c in np.unique(labels):
            of_class = order[labels[order] == c]
            turn[of_class] = np.arange(len(of_class))
        order = order[np.argsort(turn[order], kind="stable")]
    balanced = "" if labels is None else ", balanced over the classes"
    notes.append(f"limit: {options.limit} of {len(train)} training rows drawn (seed {options.seed}){balanced}")
    return np.sort(train[order[: options.limit]])
