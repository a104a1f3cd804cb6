"""Parquet files on this machine, laid out as on the Hugging Face hub. Nothing here asks the network."""

import re
from pathlib import Path

from surefoot.data.dataset import Dataset
from surefoot.data.extra import needed
from surefoot.data.hub import quiet
from surefoot.data.options import Options
from surefoot.data.splits import TEST_SPLITS, from_splits
from surefoot.errors import InputError

_SPLIT = re.compile(rf"(?:^|[-_.])(train|{'|'.join(TEST_SPLITS)})(?:[-_.]|$)")


def parquet_folder(source: str, folder: Path) -> Path | None:
    """Where a folder's parquet files lie: in it, in its ``data/``, or in its only subfolder that has any.

    Raises:
        InputError: Several subfolders have some.
    """
    if any(folder.glob("*.parquet")):
        return folder
    below = sorted({file.parent for file in folder.glob("*/*.parquet")})
    data = [sub for sub in below if sub.name == "data"]
    if len(data or below) > 1:
        named = ", ".join(sub.name for sub in below)
        raise InputError(
            f"data {source!r}: parquet files lie in {named}: give one of them, such as {folder / below[0].name}"
        )
    return (data or below or [None])[0]


def load_parquet(source: str, path: Path, options: Options) -> Dataset:
    """A folder of ``train-*.parquet`` and ``test-*.parquet`` or ``validation-*.parquet``, or one file.

    Args:
        source: What the user asked for.
        path: The folder that holds the files, or a file.
        options: What was asked.

    Raises:
        InputError: A file is damaged or its columns are unusable.
    """
    notes: list[str] = []
    files = _files(path, notes)
    datasets = needed("datasets", "read parquet files")
    for file in (file for group in files.values() for file in group):
        _check(source, file)
    with quiet(datasets):
        # Not load_dataset("parquet", ...), which reports its use to the hub before it reads a local file.
        try:
            splits = datasets.DatasetDict.from_parquet(
                {name: [str(file) for file in group] for name, group in files.items()}
            )
        except datasets.exceptions.DatasetGenerationError as error:
            listing = ", ".join(file.name for group in files.values() for file in group)
            raise InputError(
                f"data {source!r}: the parquet files ({listing}) cannot be read together ({error.__cause__ or error}): "
                f"give every split the same columns and fetch damaged files again"
            ) from error
    folder = path if path.is_dir() else path.parent
    name = (folder.parent if folder.name == "data" else folder).resolve().name if path.is_dir() else path.name
    return from_splits(source, name, splits, options, notes)


def _files(path: Path, notes: list[str]) -> dict[str, list[Path]]:
    """Files by split, as their names say; without a name that says, all of them are for training."""
    if path.is_file():
        return {"train": [path]}
    every = sorted(path.glob("*.parquet"))
    splits: dict[str, list[Path]] = {}
    for file in every:
        if match := _SPLIT.search(file.stem):
            splits.setdefault(match[1], []).append(file)
    if not splits:
        return {"train": every}
    unnamed = len(every) - sum(map(len, splits.values()))
    if unnamed:
        notes.append(f"{unnamed} parquet files are named after no split: not used")
    return splits


def _check(source: str, file: Path) -> None:
    """Refuse a damaged file by its name: `datasets` names none."""
    pyarrow = needed("pyarrow", "read parquet files")
    parquet = needed("pyarrow.parquet", "read parquet files")
    try:
        rows = parquet.read_metadata(file).num_rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(
            f"data {source!r}: the parquet file {file.name} is cut short or damaged ({error}): fetch it again"
        ) from error
    if not rows:
        raise InputError(f"data {source!r}: the parquet file {file.name} has no rows: fetch it again or remove it")
