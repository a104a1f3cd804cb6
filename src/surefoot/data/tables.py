"""A table of numbers with one or more target columns, wherever it came from."""

import difflib
from collections.abc import Callable, Sequence

import numpy as np
import torch

from surefoot.data import standardise
from surefoot.data.dataset import Dataset
from surefoot.data.labels import class_numbers, distinct
from surefoot.data.options import Options
from surefoot.data.split import divide
from surefoot.errors import InputError

MOST_CLASSES = 20  # a column of whole numbers with more different values is read as a quantity


def target_columns(source: str, options: Options, columns: Sequence[str]) -> list[str]:
    """The columns `target` names: one, or several with commas between.

    Raises:
        InputError: No target, an unknown one, the same one twice, or nothing left to predict from.
    """
    listing = ", ".join(columns)
    if options.target is None:
        raise InputError(
            f"data {source!r}: a table needs target (--target COLUMN), the column to predict; its columns are {listing}"
        )
    if options.target in columns:
        names = [options.target]
    else:
        names = [name.strip() for name in options.target.split(",")]
    for name in names:
        if name not in columns:
            near = difflib.get_close_matches(name, columns, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"target={options.target!r}: there is no column {name!r} in {source!r}; {hint}its columns are {listing}"
            )
    if len(set(names)) < len(names):
        raise InputError(f"target={options.target!r} names a column twice: name each once")
    if len(names) == len(columns):
        raise InputError(f"target={options.target!r} names every column of {source!r}: leave some to predict from")
    return names


def table_dataset(
    source: str,
    name: str,
    options: Options,
    *,
    columns: list[str],
    features: np.ndarray,
    targets: dict[str, np.ndarray],
    where: Callable[[int], str],
    test: tuple[np.ndarray, dict[str, np.ndarray]] | None = None,
    notes: list[str],
) -> Dataset:
    """Decide the task, choose the rows, standardise.

    Args:
        source: What the user asked for.
        name: Short name of the data.
        options: `task`, `test_fraction`, `limit`, `seed` and `dtype` are used.
        columns: Names of the input columns.
        features: ``(N, d)`` float64, finite.
        targets: The target columns: ``(N,)`` float64 or, for text, str.
        where: From a row index to its place as the user sees it, for messages.
        test: Features and targets of a test split, if the data bring one.
        notes: What was decided so far.

    Raises:
        InputError: The targets do not fit the task, or there are too few rows.
    """
    options.refuse(source, "a table", "image_size")
    notes += options.unused("tables")
    task = _task(source, options, targets, where, notes)
    if task == "classification":
        (column,) = targets
        known = distinct(targets[column])
        if len(known) < 2:
            raise InputError(
                f"data {source!r}: the target {column!r} has one class only ({str(known[0])!r}): "
                f"give rows of at least two"
            )
        labels = class_numbers(source, targets[column], known, "the training split")
        classes = tuple(v if isinstance(v, str) else f"{v:g}" for v in known)
    else:
        labels = classes = known = None
    train, held_out = divide(source, options, notes, rows=len(features), labels=labels, has_test=test is not None)
    test_features, test_targets = (features, targets) if test is None else test
    test_rows = np.arange(len(test_features)) if held_out is None else held_out

    train_x, test_x, means, deviations, constant = standardise.columns(
        columns, features[train], test_features[test_rows], options.dtype
    )
    if constant.any():
        named = ", ".join(columns[i] for i in np.flatnonzero(constant))
        notes.append(f"{int(constant.sum())} constant columns left at zero: {named}")
    statistics = {"columns": columns, "input_mean": means, "input_std": deviations}
    if labels is not None and known is not None:
        train_y = torch.from_numpy(labels[train])
        (column,) = targets
        test_y = torch.from_numpy(class_numbers(source, test_targets[column][test_rows], known, "the test split"))
        outputs = len(known)
    else:
        names = list(targets)
        train_y, test_y, target_means, target_deviations, constant = standardise.columns(
            names,
            np.stack([targets[n][train] for n in names], axis=1),
            np.stack([test_targets[n][test_rows] for n in names], axis=1),
            options.dtype,
        )
        if constant.any():
            column = names[int(constant.argmax())]
            raise InputError(
                f"data {source!r}: the target {column!r} is the same in every training row: there is nothing to learn"
            )
        statistics |= {"targets": names, "target_mean": target_means, "target_std": target_deviations}
        outputs = len(names)
    return Dataset(
        name=name,
        source=source,
        task=task,
        kind="table",
        train_x=train_x,
        train_y=train_y,
        test_x=test_x,
        test_y=test_y,
        outputs=outputs,
        vocabulary=None,
        classes=classes,
        statistics=statistics,
        notes=tuple(notes),
    )


def _task(
    source: str, options: Options, targets: dict[str, np.ndarray], where: Callable[[int], str], notes: list[str]
) -> str:
    """What `task` says; left to us, text and few whole numbers are classes and the rest are quantities."""
    text = [name for name, values in targets.items() if values.dtype.kind in "OU"]
    if len(targets) > 1 or options.task == "regression":
        if options.task == "classification":
            raise InputError(f"task='classification' takes one target column, target={options.target!r} names several")
        if text:
            value, row = str(targets[text[0]][0]), where(0)
            raise InputError(f"data {source!r}: the target {text[0]!r} is to be a number, but {row} holds {value!r}")
        return "regression"
    ((name, values),) = targets.items()
    if text:
        return "classification"
    fractions = np.flatnonzero(values != np.round(values))
    if options.task == "classification":
        if len(fractions):
            row = int(fractions[0])
            raise InputError(
                f"task='classification' does not fit the target {name!r} of {source!r}: {where(row)} holds "
                f"{values[row]:g}, which is not a whole number; use task='regression' or name the classes"
            )
        return "classification"
    different = len(np.unique(values))
    if len(fractions) or different > MOST_CLASSES:
        return "regression"
    notes.append(
        f"target {name!r} read as {different} classes, since it holds few different whole numbers "
        f"(task='regression' reads it as a quantity)"
    )
    return "classification"
