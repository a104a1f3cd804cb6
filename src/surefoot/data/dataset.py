"""A data set in memory, standardised and split, ready for a training loop."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """Training and test rows as tensors, and what was done to get them.

    Attributes:
        name: Short name for titles, such as ``"digits"`` or ``"yacht.csv"``.
        source: What the user asked for.
        task: ``"classification"``, ``"regression"`` or ``"language"`` (predict the next character).
        kind: What one input row is: ``"image"``, ``"table"`` or ``"text"``.
        train_x: Inputs. Image ``(N, channels, H, W)`` float; table ``(N, d)`` float; text ``(N, T)`` int64 token ids,
            where for sentences 0 is padding and 1 a word outside the vocabulary.
        train_y: Targets. Classification ``(N,)`` int64; regression ``(N, t)`` float, standardised; language
            ``(N, T)`` int64, the token that follows.
        test_x: Inputs of the test rows, put through the same map as the training rows.
        test_y: Targets of the test rows.
        outputs: Number of classes, of regression targets, or of characters.
        vocabulary: Characters or words, by token id; None unless ``kind`` is ``"text"``.
        classes: Names of the classes, by label; None unless ``task`` is ``"classification"``.
        statistics: Plain numbers the standardisation used, from the training rows alone. Images: ``input_mean`` and
            ``input_std`` per channel, pixels in [0, 1]. Tables: ``columns``, ``input_mean`` and ``input_std``.
            Regression: ``targets``, ``target_mean`` and ``target_std``, in the user's units (an RMSE in
            standardised units times ``target_std`` is an RMSE in the user's). Text: ``vocabulary_size``.
        notes: What a reader of the results should know, a sentence each.
    """

    name: str
    source: str
    task: str
    kind: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    outputs: int
    vocabulary: tuple[str, ...] | None
    classes: tuple[str, ...] | None
    statistics: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input row."""
        return tuple(self.train_x.shape[1:])

    def summary(self) -> dict[str, Any]:
        """What a report says of the data: plain values only, ready for JSON."""
        return {
            "name": self.name,
            "source": self.source,
            "task": self.task,
            "kind": self.kind,
            "train_rows": len(self.train_x),
            "test_rows": len(self.test_x),
            "input_shape": list(self.input_shape),
            "outputs": self.outputs,
            "notes": list(self.notes),
        }
