"""A folder of images: a subfolder a class, perhaps below train/ and test/."""

from pathlib import Path

import numpy as np

from surefoot.data.dataset import Dataset
from surefoot.data.options import Options
from surefoot.data.pictures import Pictures, image_dataset
from surefoot.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TEST_FOLDERS = ("test", "validation", "valid", "val")


def load_image_folder(source: str, folder: Path, options: Options) -> Dataset:
    """Images by class subfolder, the classes in the order of their names.

    Args:
        source: What the user asked for.
        folder: ``folder/<class>/*.png``, or ``folder/train/<class>/*.png`` with ``test``, ``validation``, ``valid`` or
            ``val`` beside ``train``.
        options: `image_size`, `test_fraction`, `limit`, `seed` and `dtype` are used.

    Raises:
        InputError: There are no class subfolders, a class is empty or only in the test part, an image cannot be read,
            or sizes differ and no `image_size` was given.
    """
    options.refuse(source, "a folder of images with a subfolder a class", "target")
    if options.task == "regression":
        options.refuse(source, "a folder of images with a subfolder a class", "task")
    notes: list[str] = []
    train_folder = folder / "train"
    split = train_folder.is_dir() and bool(_subfolders(train_folder))
    test_folders = [folder / name for name in TEST_FOLDERS if (folder / name).is_dir()] if split else []
    train_folder = train_folder if split else folder
    classes = tuple(sub.name for sub in _subfolders(train_folder))
    if not classes:
        raise InputError(
            f"data {source!r}: the folder holds neither parquet files nor class subfolders: lay it out as "
            f"{folder.name}/<class>/<image> or as {folder.name}/train-*.parquet"
        )
    train = _pictures(source, folder, train_folder, classes, notes)
    test = None
    if test_folders:
        if len(test_folders) > 1:
            unused = ", ".join(f.name for f in test_folders[1:])
            notes.append(f"tested on {test_folders[0].name}; not used: {unused}")
        strange = [sub.name for sub in _subfolders(test_folders[0]) if sub.name not in classes]
        if strange:
            raise InputError(
                f"data {source!r}: {test_folders[0].name}/{strange[0]} is a class that {train_folder.name} does not "
                f"have: add training images of it or remove the folder"
            )
        present = tuple(sub.name for sub in _subfolders(test_folders[0]))
        if not present:
            raise InputError(f"data {source!r}: {test_folders[0].name} has no class subfolders: add them or remove it")
        test = _pictures(source, folder, test_folders[0], classes, notes, present)
    return image_dataset(source, folder.resolve().name, options, train, test, classes, notes)


def _subfolders(folder: Path) -> list[Path]:
    return sorted(sub for sub in folder.iterdir() if sub.is_dir() and not sub.name.startswith("."))


def _pictures(
    source: str,
    root: Path,
    folder: Path,
    classes: tuple[str, ...],
    notes: list[str],
    present: tuple[str, ...] | None = None,
) -> Pictures:
    files: list[Path] = []
    labels: list[int] = []
    others = 0
    for name in classes if present is None else present:
        entries = sorted(f for f in (folder / name).rglob("*") if f.is_file() and not f.name.startswith("."))
        images = [f for f in entries if f.suffix.lower() in SUFFIXES]
        if not images:
            raise InputError(
                f"data {source!r}: the class folder {(folder / name).relative_to(root)} holds no images "
                f"({', '.join(SUFFIXES)}): add some or remove the folder"
            )
        others += len(entries) - len(images)
        files += images
        labels += [classes.index(name)] * len(images)
    if others:
        notes.append(f"{others} files that are not images skipped in {folder.name}")

    def read(rows: np.ndarray):
        return ((str(files[row].relative_to(root)), files[row]) for row in rows)

    return Pictures(np.array(labels, dtype=np.int64), read)
