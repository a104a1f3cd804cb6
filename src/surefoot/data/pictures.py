"""Image files to one array of bytes, and the labelled image data set made of them."""

import io
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from surefoot.data import standardise
from surefoot.data.dataset import Dataset
from surefoot.data.extra import needed
from surefoot.data.options import Options
from surefoot.data.split import divide
from surefoot.errors import InputError

# How Pillow's modes are read; the others (16-bit, 32-bit, float) have no byte a pixel.
GREY = ("1", "L")
COLOUR = ("RGB", "P", "CMYK", "YCbCr", "RGBA", "LA", "PA", "RGBX", "HSV", "LAB")
TRANSPARENT = ("RGBA", "LA", "PA")


@dataclass(frozen=True)
class Pictures:
    """Labelled images that have not been read yet.

    Attributes:
        labels: Class number of each, ``(N,)``.
        read: From ascending row indices to the images in that order, each a name for messages and a file's path or
            its bytes.
    """

    labels: np.ndarray
    read: Callable[[np.ndarray], Iterable[tuple[str, bytes | Path]]]


def image_dataset(
    source: str,
    name: str,
    options: Options,
    train: Pictures,
    test: Pictures | None,
    classes: tuple[str, ...],
    notes: list[str],
) -> Dataset:
    """Choose the rows, decode them, scale to [0, 1] and standardise a channel.

    Raises:
        InputError: An image cannot be read, sizes differ, or there are too few rows or classes.
    """
    notes += options.unused("images")
    train_rows, held_out = divide(
        source, options, notes, rows=len(train.labels), labels=train.labels, has_test=test is not None
    )
    if test is None:
        test, test_rows = train, held_out
    else:
        test_rows = np.arange(len(test.labels))
    assert test_rows is not None
    decoder = Decoder(source, options.image_size)
    train_pixels = decoder.decode(train.read(train_rows), len(train_rows))
    test_pixels = decoder.decode(test.read(test_rows), len(test_rows))
    if train_pixels.shape[3] != test_pixels.shape[3]:
        train_pixels, test_pixels = _colour(train_pixels), _colour(test_pixels)
    notes += decoder.notes()
    return from_pixels(
        source,
        name,
        options,
        (train_pixels, train.labels[train_rows]),
        (test_pixels, test.labels[test_rows]),
        classes,
        notes,
    )


def from_pixels(
    source: str,
    name: str,
    options: Options,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: tuple[str, ...],
    notes: list[str],
    *,
    white: int = 255,
) -> Dataset:
    """The data set of images that are in memory: ``(N, H, W, C)`` uint8 and labels ``(N,)``, twice."""

    train_x, test_x, statistics, more = standardise.pixels(train[0], test[0], options.dtype, white=white)
    return Dataset(
        name=name,
        source=source,
        task="classification",
        kind="image",
        train_x=train_x,
        train_y=torch.from_numpy(train[1].astype(np.int64)),
        test_x=test_x,
        test_y=torch.from_numpy(test[1].astype(np.int64)),
        outputs=len(classes),
        vocabulary=None,
        classes=classes,
        statistics=statistics,
        notes=tuple(notes + more),
    )


class Decoder:
    """Decodes images to bytes of one size, and remembers what kinds it met.

    One thread: with small images the interpreter's lock makes a pool slower than a loop (60,000 28x28 PNGs: 4 s in a
    loop, 10 s in a pool of four).
    """

    def __init__(self, source: str, image_size: int | None) -> None:
        self._pil = needed("PIL.Image", "read images")
        self.source = source
        self.image_size = image_size
        self.first: tuple[str, tuple[int, int]] | None = None  # name and (width, height) of the first image
        self.modes: Counter[str] = Counter()

    def decode(self, images: Iterable[tuple[str, bytes | Path]], count: int) -> np.ndarray:
        """The `count` images as ``(N, H, W, C)`` uint8: C is 1 if all of them are grey, else 3."""
        out: np.ndarray = np.empty((0, 0, 0, 1), dtype=np.uint8)
        for row, (name, image) in enumerate(images):
            one = self._one(name, image)
            if row == 0:
                out = np.empty((count, *one.shape), dtype=np.uint8)
            if one.shape[2] > out.shape[3]:
                out = _colour(out)
            out[row] = one  # a grey image fills all three channels of a colour one
        return out

    def notes(self) -> list[str]:
        """What happened to images of unlike kinds."""
        notes = []
        grey = sum(self.modes[mode] for mode in GREY)
        if 0 < grey < self.modes.total():
            notes.append(f"{grey} grey and {self.modes.total() - grey} colour images: all read as RGB")
        if clear := sum(self.modes[mode] for mode in TRANSPARENT):
            notes.append(f"{clear} images have transparency: dropped")
        if self.image_size is not None and self.first is not None:
            notes.append(f"images resized to {self.image_size}x{self.image_size}")
        return notes

    def _one(self, name: str, image: bytes | Path) -> np.ndarray:
        pil = self._pil
        try:
            opened = pil.open(io.BytesIO(image if isinstance(image, bytes) else image.read_bytes()))
            opened.load()
        except (OSError, SyntaxError, ValueError, EOFError, pil.DecompressionBombError) as error:
            # Pillow raises each of these for damaged files, according to the format.
            raise InputError(
                f"data {self.source!r}: the image {name} cannot be read ({error}): replace it or remove it"
            ) from error
        mode = opened.mode
        if mode not in GREY + COLOUR:
            raise InputError(
                f"data {self.source!r}: the image {name} does not hold 8 bits a channel (Pillow's mode {mode}): "
                f"convert it to 8-bit grey or RGB"
            )
        wanted = "L" if mode in GREY else "RGB"
        picture = opened if mode == wanted else opened.convert(wanted)
        self.modes[mode] += 1
        if self.image_size is not None:
            picture = picture.resize((self.image_size, self.image_size), pil.Resampling.BILINEAR)
        if self.first is None:
            self.first = (name, picture.size)
        elif self.first[1] != picture.size:
            raise InputError(
                f"data {self.source!r}: images differ in size, {self.first[0]} is {_size(self.first[1])} and {name} is "
                f"{_size(picture.size)}: give image_size (--image-size {min(self.first[1])}) to resize all of them"
            )
        bytes_ = np.asarray(picture)
        return bytes_[:, :, None] if bytes_.ndim == 2 else bytes_


def _colour(images: np.ndarray) -> np.ndarray:
    return images if images.shape[3] == 3 else np.repeat(images, 3, axis=3)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
