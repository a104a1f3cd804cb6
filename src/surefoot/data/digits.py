"""The 8x8 handwritten digits that scikit-learn bundles: 1,797 images, no network."""

import numpy as np

from surefoot.data.dataset import Dataset
from surefoot.data.extra import needed
from surefoot.data.options import Options
from surefoot.data.pictures import from_pixels
from surefoot.data.split import divide

GREY_LEVELS = 16
STEP = 15  # 16 levels times 15: bytes up to 240, which Pillow resizes without losing a level


def load_digits(source: str, options: Options) -> Dataset:
    """The digits with a fifth of each class held out.

    Args:
        source: What the user asked for.
        options: `image_size`, `test_fraction`, `limit`, `seed` and `dtype` are used.

    Raises:
        InputError: An option that has no effect was given.
    """
    options.refuse(source, "images with labels", "target")
    if options.task == "regression":
        options.refuse(source, "images with labels", "task")
    bunch = needed("sklearn.datasets", "load the digits").load_digits()
    images = (bunch.images * STEP).astype(np.uint8)
    labels = bunch.target.astype(np.int64)
    notes = options.unused("images")
    if options.image_size is not None:
        images = _resized(images, options.image_size)
        notes.append(f"images resized to {options.image_size}x{options.image_size}")
    train, test = divide(source, options, notes, rows=len(images), labels=labels, has_test=False)
    assert test is not None
    images = images[..., None]
    return from_pixels(
        source,
        "digits",
        options,
        (images[train], labels[train]),
        (images[test], labels[test]),
        tuple("0123456789"),
        notes,
        white=STEP * GREY_LEVELS,
    )


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    pil = needed("PIL.Image", "resize images")
    return np.stack([np.asarray(pil.fromarray(i).resize((size, size), pil.Resampling.BILINEAR)) for i in images])
