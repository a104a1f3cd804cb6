"""What may be asked of any data set, checked once."""

from dataclasses import dataclass

import torch

from surefoot.errors import InputError

TASKS = ("auto", "classification", "regression")
DEFAULT_CONTEXT = 128


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `surefoot.data.load`; see there."""

    target: str | None
    task: str
    image_size: int | None
    context: int
    test_fraction: float | None
    limit: int | None
    seed: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"task={self.task!r} is not known: give one of {', '.join(TASKS)}")
        _at_least("image_size", self.image_size, 1)
        _at_least("context", self.context, 1)
        _at_least("limit", self.limit, 2)
        _at_least("seed", self.seed, 0)
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise InputError(
                f"test_fraction={self.test_fraction!r} is not between 0 and 1: give the share of rows to hold out, "
                f"such as 0.2"
            )
        if not self.dtype.is_floating_point:
            raise InputError(f"dtype={self.dtype} is not a floating point type: give torch.float32 or torch.float64")

    def refuse(self, source: str, what: str, *names: str) -> None:
        """Refuse the options `names`, which would change nothing here.

        Args:
            source: What the user asked for.
            what: What the data are, such as "a table".
            names: Options among "target", "task" and "image_size".

        Raises:
            InputError: One of them was given.
        """
        for name in names:
            value = getattr(self, name)
            if value not in (None, "auto"):
                raise InputError(f"{name}={value!r} has no effect on {source!r}, which is {what}: leave {name} out")

    def unused(self, what: str) -> list[str]:
        """Notes on a `context` that was given for data without one."""
        if self.context == DEFAULT_CONTEXT:
            return []
        return [f"context={self.context} has no effect on {what}"]


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value!r} makes no sense: give a whole number, {least} or more")
