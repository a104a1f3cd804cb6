"""From a Hugging Face `DatasetDict` to a data set: which split is which, and what the columns are.

The dictionary comes from a local folder or from the hub; from here on there is no difference.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from surefoot.data import words
from surefoot.data.dataset import Dataset
from surefoot.data.extra import needed
from surefoot.data.labels import class_numbers, distinct
from surefoot.data.options import Options
from surefoot.data.pictures import Pictures, image_dataset
from surefoot.data.split import divide
from surefoot.data.tables import table_dataset, target_columns
from surefoot.errors import InputError

TEST_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")
LABEL_NAMES = ("label", "labels")
TEXT_NAMES = ("text", "sentence")
ROWS_AT_ONCE = 1024


def from_splits(source: str, name: str, splits: Mapping[str, Any], options: Options, notes: list[str]) -> Dataset:
    """Images with labels, sentences with labels, or a table of numbers, as the columns have it.

    Args:
        source: What the user asked for.
        name: Short name of the data.
        splits: `datasets.Dataset` by split name.
        options: What was asked.
        notes: What was decided so far.

    Raises:
        InputError: There is no training split, the columns are ambiguous, or what they hold is unusable.
    """
    train = _training_split(source, splits)
    columns = Columns(source, train)
    images = [column for column in columns.names if columns.is_image(column)]
    texts = [column for column in columns.names if columns.is_text(column) and column != options.target]
    if not images and not texts:
        test = _test_split(splits, train, columns, notes, label=None)
        return _table(source, name, columns, train, test, options, notes)

    holds = "images with labels" if images else "sentences with labels"
    if options.task == "regression":
        options.refuse(source, holds, "task")
    label = _label_column(source, columns, options)
    inputs = _one(source, images, "image", ()) if images else _one(source, texts, "text", TEXT_NAMES)
    unused = [column for column in columns.names if column not in (inputs, label)]
    if unused:
        notes.append(f"columns not used: {', '.join(unused)}")
    test = _test_split(splits, train, columns, notes, label=label)
    labels, test_labels, classes = _labels(source, columns, label, train, test)
    if images:
        pictures = Pictures(labels, _reader(source, train, inputs, "train"))
        held_out = None if test is None else Pictures(test_labels, _reader(source, test[1], inputs, test[0]))
        return image_dataset(source, name, options, pictures, held_out, classes, notes)
    options.refuse(source, holds, "image_size")
    return _sentences(source, name, inputs, train, test, labels, test_labels, classes, options, notes)


class Columns:
    """What the columns of a `datasets.Dataset` hold."""

    def __init__(self, source: str, rows: Any) -> None:
        self._datasets = needed("datasets", "read parquet files and the Hugging Face hub")
        self.source = source
        self.features = rows.features
        self.names: list[str] = list(rows.column_names)

    def is_image(self, name: str) -> bool:
        """An Image, or a struct of bytes and path, which is what an Image is on disk."""
        feature = self.features[name]
        return isinstance(feature, self._datasets.Image) or (
            isinstance(feature, dict) and set(feature) == {"bytes", "path"}
        )

    def is_text(self, name: str) -> bool:
        """A column of strings."""
        return self._type(name) in ("string", "large_string", "string_view")

    def is_number(self, name: str) -> bool:
        """A column of numbers or of class labels."""
        return self._type(name).startswith(("int", "uint", "float", "bool"))

    def is_whole(self, name: str) -> bool:
        """A column of whole numbers or of class labels."""
        return self._type(name).startswith(("int", "uint", "bool"))

    def class_names(self, name: str) -> list[str] | None:
        """The names of a ClassLabel column's classes."""
        feature = self.features[name]
        return list(feature.names) if isinstance(feature, self._datasets.ClassLabel) else None

    def _type(self, name: str) -> str:
        return getattr(self.features[name], "dtype", "")


def _training_split(source: str, splits: Mapping[str, Any]) -> Any:
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise InputError(f"data {source!r}: none of its splits ({', '.join(splits)}) is called train: name one so")


def _test_split(
    splits: Mapping[str, Any], train: Any, columns: Columns, notes: list[str], label: str | None
) -> tuple[str, Any] | None:
    """The first of test, validation ... that has labels; None if there is none."""
    for name in TEST_SPLITS:
        if name not in splits or splits[name] is train or not len(splits[name]):
            continue
        rows = splits[name]
        if label is not None and (label not in rows.column_names or _unlabelled(rows, label, columns)):
            notes.append(f"the {name} split has no labels: not used")
            continue
        if name != "test":
            notes.append(f"tested on the {name} split")
        return name, rows
    return None


def _unlabelled(rows: Any, label: str, columns: Columns) -> bool:
    """Every label is missing, or below zero, as hubs mark hidden labels."""
    values = _column(rows, label)
    known = values.drop_null()
    return not len(known) or (columns.is_whole(label) and bool((known.to_numpy() < 0).all()))


def _label_column(source: str, columns: Columns, options: Options) -> str:
    """The column that `target` names, the only ClassLabel, one called label, or the only whole numbers."""
    listing = ", ".join(columns.names)
    if options.target is not None:
        (label, *more) = target_columns(source, options, columns.names)
        if more:
            raise InputError(f"target={options.target!r}: {source!r} takes one label column, its columns are {listing}")
        if not columns.is_whole(label) and not columns.is_text(label):
            raise InputError(
                f"target={options.target!r} does not hold class labels (whole numbers or text): give another "
                f"of {listing}"
            )
        return label
    whole = [name for name in columns.names if columns.is_whole(name)]
    for candidates in (
        [name for name in whole if columns.class_names(name) is not None],
        [name for name in whole if name in LABEL_NAMES],
        whole,
    ):
        if len(candidates) == 1:
            return candidates[0]
    if whole:
        raise InputError(
            f"data {source!r}: {' and '.join(whole)} could each be the label: name one with target "
            f"(--target {whole[0]})"
        )
    raise InputError(
        f"data {source!r} has no label column of whole numbers among {listing}: add one, or name a text column "
        f"with target"
    )


def _one(source: str, names: list[str], what: str, preferred: tuple[str, ...]) -> str:
    if len(names) > 1:
        usual = [name for name in names if name in preferred]
        if len(usual) != 1:
            raise InputError(
                f"data {source!r} has {len(names)} {what} columns ({', '.join(names)}), one is needed: drop the others"
            )
        return usual[0]
    return names[0]


def _labels(
    source: str, columns: Columns, label: str, train: Any, test: tuple[str, Any] | None
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Class numbers of the training and of the test rows (none without a test split), and the class names."""
    values = _label_values(source, columns, train, label, "train")
    test_values = values[:0] if test is None else _label_values(source, columns, test[1], label, test[0])
    if len(np.unique(values)) < 2:
        raise InputError(
            f"data {source!r}: every training row has the same {label!r}: give rows of at least two classes"
        )
    names = columns.class_names(label)
    known = distinct(values) if names is None else list(range(len(names)))
    which = "the test split" if test is None else f"the {test[0]} split"
    return (
        class_numbers(source, values, known, "the training split"),
        class_numbers(source, test_values, known, which),
        tuple(map(str, known) if names is None else names),
    )


def _label_values(source: str, columns: Columns, rows: Any, label: str, split: str) -> np.ndarray:
    values = _whole_column(source, rows, label, split)
    if columns.is_text(label):
        return np.array(values.to_pylist())
    numbers = values.to_numpy().astype(np.int64)
    if (numbers < 0).any():
        row = int(np.argmax(numbers < 0))
        raise InputError(
            f"data {source!r}: row {row + 1} of the {split} split has the label {numbers[row]} in {label!r}: "
            f"labels start at 0, correct it or remove the row"
        )
    return numbers


def _column(rows: Any, name: str) -> Any:
    """A column as a pyarrow ChunkedArray."""
    return rows.select_columns([name]).with_format("arrow")[:].column(name)


def _whole_column(source: str, rows: Any, name: str, split: str) -> Any:
    """The same, refused if a value is missing."""
    if name not in rows.column_names:
        raise InputError(f"data {source!r}: the {split} split has no column {name!r}: give the splits the same columns")
    values = _column(rows, name)
    if values.null_count:
        row = values.is_null().to_pylist().index(True)
        raise InputError(
            f"data {source!r}: row {row + 1} of the {split} split has no {name!r}: fill it in or remove the row"
        )
    return values


def _reader(source: str, rows: Any, column: str, split: str):
    """A `Pictures.read` over the undecoded bytes of an image column."""

    def read(wanted: np.ndarray) -> Iterator[tuple[str, bytes | Path]]:
        for start in range(0, len(wanted), ROWS_AT_ONCE):
            part = wanted[start : start + ROWS_AT_ONCE]
            table = rows.select_columns([column]).with_format("arrow")[part.tolist()]
            for row, image in zip(part, table.column(column).to_pylist()):
                place = f"in row {row + 1} of the {split} split"
                if image and image["bytes"] is not None:
                    yield place, image["bytes"]
                elif image and image["path"] is not None:
                    yield place, Path(image["path"])
                else:
                    raise InputError(f"data {source!r}: there is no image {place}: fill it in or remove the row")

    return read


def _sentences(
    source: str,
    name: str,
    column: str,
    train: Any,
    test: tuple[str, Any] | None,
    labels: np.ndarray,
    test_labels: np.ndarray,
    classes: tuple[str, ...],
    options: Options,
    notes: list[str],
) -> Dataset:
    """Word ids by the vocabulary of the training rows."""
    rows, held_out = divide(source, options, notes, rows=len(labels), labels=labels, has_test=test is not None)
    sentences = _whole_column(source, train, column, "train").to_pylist()
    train_words = [words.words(sentences[row]) for row in rows]
    if held_out is not None:
        test_words, test_labels = [words.words(sentences[row]) for row in held_out], labels[held_out]
    else:
        assert test is not None
        test_words = [words.words(s) for s in _whole_column(source, test[1], column, test[0]).to_pylist()]
    vocabulary = words.vocabulary(train_words)
    longest = max(map(len, train_words))
    length = max(min(options.context, longest), 1)
    cut = sum(len(sentence) > length for sentence in train_words + test_words)
    if cut:
        notes.append(f"{cut} sentences cut to {length} words")
    return Dataset(
        name=name,
        source=source,
        task="classification",
        kind="text",
        train_x=torch.from_numpy(words.encode(train_words, vocabulary, length)),
        train_y=torch.from_numpy(labels[rows]),
        test_x=torch.from_numpy(words.encode(test_words, vocabulary, length)),
        test_y=torch.from_numpy(test_labels),
        outputs=len(classes),
        vocabulary=vocabulary,
        classes=classes,
        statistics={"vocabulary_size": len(vocabulary)},
        notes=tuple(notes),
    )


def _table(
    source: str,
    name: str,
    columns: Columns,
    train: Any,
    test: tuple[str, Any] | None,
    options: Options,
    notes: list[str],
) -> Dataset:
    wanted = target_columns(source, options, columns.names)
    inputs = [column for column in columns.names if column not in wanted]
    for column in inputs:
        if not columns.is_number(column):
            raise InputError(f"data {source!r}: the column {column!r} does not hold numbers: convert it or remove it")

    def read(rows: Any, split: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        numbers = [_numbers(source, rows, column, split) for column in inputs]
        targets = {
            column: np.array(_whole_column(source, rows, column, split).to_pylist())
            if columns.is_text(column)
            else _numbers(source, rows, column, split)
            for column in wanted
        }
        return np.stack(numbers, axis=1), targets

    features, targets = read(train, "train")
    return table_dataset(
        source,
        name,
        options,
        columns=inputs,
        features=features,
        targets=targets,
        where=lambda row: f"row {row + 1} of the train split",
        test=None if test is None else read(test[1], test[0]),
        notes=notes,
    )


def _numbers(source: str, rows: Any, name: str, split: str) -> np.ndarray:
    values = _whole_column(source, rows, name, split).to_numpy().astype(np.float64)
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values)))
        raise InputError(
            f"data {source!r}: row {row + 1} of the {split} split holds {values[row]} in {name!r}, which is not a "
            f"finite number: correct it or remove the row"
        )
    return values
