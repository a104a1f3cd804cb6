"""Sentences to rows of word ids."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

PADDING, UNKNOWN = "<pad>", "<unk>"  # ids 0 and 1
MOST_WORDS = 20_000
LEAST_COUNT = 2

_TOKEN = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


def words(sentence: str) -> list[str]:
    """Lower-case words and single punctuation marks.

    Example:
        >>> words("It isn't bad, is it?")
        ['it', "isn't", 'bad', ',', 'is', 'it', '?']
    """
    return _TOKEN.findall(sentence.lower())


def vocabulary(sentences: Iterable[list[str]]) -> tuple[str, ...]:
    """The words that occur at least twice, the most frequent first, at most 20,000 ids with padding and unknown."""
    counts = Counter(word for sentence in sentences for word in sentence)
    kept = sorted((-count, word) for word, count in counts.items() if count >= LEAST_COUNT)
    return (PADDING, UNKNOWN, *(word for _, word in kept[: MOST_WORDS - 2]))


def encode(sentences: Sequence[list[str]], vocabulary: Sequence[str], length: int) -> np.ndarray:
    """Word ids, cut or padded on the right.

    Args:
        sentences: N lists of words.
        vocabulary: Words by id.
        length: Ids a row.

    Returns:
        ``(N, length)`` int64. A sentence without words is one unknown word, so that no row is padding alone.
    """
    table = {word: number for number, word in enumerate(vocabulary)}
    out = np.zeros((len(sentences), length), dtype=np.int64)
    for row, sentence in enumerate(sentences):
        ids = [table.get(word, 1) for word in sentence[:length]] or [1]
        out[row, : len(ids)] = ids
    return out
