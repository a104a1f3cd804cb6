"""Running text: predict the next character."""

from pathlib import Path

import numpy as np
import torch

from surefoot.data.dataset import Dataset
from surefoot.data.options import Options
from surefoot.data.split import limited
from surefoot.errors import InputError

TEST_FRACTION = 0.1
UNKNOWN = "\N{REPLACEMENT CHARACTER}"


def load_text(source: str, path: Path, options: Options) -> Dataset:
    """Windows of `context` characters side by side, each with the same window one character later.

    The last tenth of the text (or `test_fraction` of it) is the test part. The vocabulary is the characters of the
    training part in code point order; if the test part has others, they share one more id at the end.

    Args:
        source: What the user asked for.
        path: The file, UTF-8.
        options: `context`, `test_fraction`, `limit` and `seed` are used.

    Raises:
        InputError: The file is not UTF-8, empty, or too short for a window in each part.
    """
    options.refuse(source, "running text", "target", "task", "image_size")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"data {source!r} is not UTF-8 text ({error}): save it as UTF-8") from error
    if not text.strip():
        raise InputError(f"data {source!r} is empty: give a text to learn from")
    fraction = TEST_FRACTION if options.test_fraction is None else options.test_fraction
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    cut = len(codes) - round(fraction * len(codes))
    shorter = min(cut, len(codes) - cut)
    if shorter < options.context + 1:
        raise InputError(
            f"data {source!r}: {len(codes)} characters with test_fraction={fraction} leave a part of {shorter}, too "
            f"short for a window of context={options.context} and the next character: "
            f"give a longer text or a smaller context"
        )
    notes = [f"no test split: the last {100 * fraction:g}% of the text held out"]
    known = np.unique(codes[:cut])
    vocabulary = [chr(code) for code in known.tolist()]
    if len(vocabulary) < 2:
        raise InputError(
            f"data {source!r}: the text repeats one character, {vocabulary[0]!r}: there is nothing to learn"
        )
    strange = ~np.isin(codes, known)
    ids = np.searchsorted(known, codes).astype(np.int64)
    if strange.any():
        if UNKNOWN not in vocabulary:
            vocabulary.append(UNKNOWN)
        ids[strange] = vocabulary.index(UNKNOWN)
        notes.append(
            f"{int(strange.sum())} characters of the test part do not occur in the training part: read as {UNKNOWN}"
        )
    train_x, train_y = _windows(ids[:cut], options.context)
    test_x, test_y = _windows(ids[cut:], options.context)
    rows = limited(np.arange(len(train_x)), options, notes, None)
    return Dataset(
        name=path.name,
        source=source,
        task="language",
        kind="text",
        train_x=torch.from_numpy(train_x[rows]),
        train_y=torch.from_numpy(train_y[rows]),
        test_x=torch.from_numpy(test_x),
        test_y=torch.from_numpy(test_y),
        outputs=len(vocabulary),
        vocabulary=tuple(vocabulary),
        classes=None,
        statistics={"vocabulary_size": len(vocabulary)},
        notes=tuple(notes),
    )


def _windows(ids: np.ndarray, context: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and next characters, each ``(N, context)``; what does not fill a window is left out."""
    rows = (len(ids) - 1) // context
    end = rows * context
    return ids[:end].reshape(rows, context).copy(), ids[1 : end + 1].reshape(rows, context).copy()
