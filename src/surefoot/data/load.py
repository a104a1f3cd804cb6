"""From what the user writes to the reader that understands it."""

import difflib
from pathlib import Path

import torch

from surefoot.data.csv_table import load_csv
from surefoot.data.dataset import Dataset
from surefoot.data.digits import load_digits
from surefoot.data.hub import is_hub_id, load_hub
from surefoot.data.image_folder import load_image_folder
from surefoot.data.options import DEFAULT_CONTEXT, Options
from surefoot.data.parquet import load_parquet, parquet_folder
from surefoot.data.text import load_text
from surefoot.errors import InputError

BUILT_IN = {"digits": load_digits}
BY_SUFFIX = {".csv": load_csv, ".txt": load_text, ".parquet": load_parquet}
FORMS = (
    "digits; a .csv, .txt or .parquet file; a folder of parquet files or of images by class; "
    "or a Hugging Face hub id such as zalando-datasets/fashion_mnist"
)


def load(
    source: str,
    *,
    target: str | None = None,
    task: str = "auto",
    image_size: int | None = None,
    context: int = DEFAULT_CONTEXT,
    test_fraction: float | None = None,
    limit: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Dataset:
    """Load a data set into memory, split and standardised by the statistics of its training rows.

    The same arguments give the same bytes. A name that exists on this machine is never asked of the network.

    Args:
        source: ``"digits"``; a CSV file; a text file; a parquet file, or a folder of them laid out as on the Hugging
            Face hub; a folder of images with a subfolder a class; or a hub id, ``"org/name"`` or ``"org/name:config"``.
        target: The column to predict. Tables need it, and take several with commas between for regression. For parquet
            images and sentences it names the label column where that is not clear.
        task: For tables, ``"classification"`` or ``"regression"``; ``"auto"`` takes text and whole numbers of at most
            20 different values for classes, the rest for quantities.
        image_size: Resize every image to this many pixels a side (the aspect is not kept).
        context: Longest row of text: characters in a window of running text, words in a sentence.
        test_fraction: Share of the rows to hold out where there is no test split, in (0, 1): default 0.2, and 0.1 of
            running text. Classes are held out in proportion.
        limit: Train on at most this many rows, drawn at random and balanced over the classes. Test rows all stay.
        seed: What the held-out rows and the limit are drawn from; 0 or more.
        dtype: Type of the float tensors; the statistics are float64 whatever it is.

    Returns:
        The data set; see `Dataset` for shapes.

    Raises:
        InputError: The request makes no sense or the data are damaged; the message says which and what to do.

    Example:
        >>> from surefoot.data import load
        >>> data = load("digits")
        >>> data.input_shape, data.outputs, len(data.train_x), len(data.test_x)
        ((1, 8, 8), 10, 1438, 359)
    """
    options = Options(target, task, image_size, context, test_fraction, limit, seed, dtype)
    if source in BUILT_IN:
        return BUILT_IN[source](source, options)
    path = Path(source).expanduser()
    if source and path.is_dir():
        folder = parquet_folder(source, path)
        return load_image_folder(source, path, options) if folder is None else load_parquet(source, folder, options)
    if source and path.exists():
        if reader := BY_SUFFIX.get(path.suffix.lower()):
            return reader(source, path, options)
        raise InputError(f"data {source!r} is not a kind of file that is known: give {FORMS}")
    if is_hub_id(source) and path.suffix.lower() not in BY_SUFFIX:
        return load_hub(source, options)
    raise InputError(f"data {source!r}: there is no such file or folder{_hint(source, path)}; give {FORMS}")


def _hint(source: str, path: Path) -> str:
    """A name close to what was written, among the built-in data sets and the neighbours of the path."""
    beside = {str(path.parent / entry.name): entry for entry in path.parent.iterdir()} if path.parent.is_dir() else {}
    near = difflib.get_close_matches(source, [*BUILT_IN, *beside], n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""
