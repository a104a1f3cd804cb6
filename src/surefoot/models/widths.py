"""How the options `width` and `depth` are read."""

from surefoot.errors import InputError


def layer_widths(width: tuple[int, ...] | None, depth: int | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """One width for each hidden layer; a single width is repeated `depth` times.

    Args:
        width: One width for all hidden layers, or one for each; None: `default`.
        depth: The number of hidden layers; None: as many as there are widths.
        default: The widths when neither is given; its first one is repeated when only `depth` is given.

    Raises:
        InputError: If there are several widths and `depth` contradicts their number.
    """
    if width is None:
        width = default if depth is None else default[:1]
    if depth is None or depth == len(width):
        return width
    if len(width) > 1:
        raise InputError(
            f"width={width} names {len(width)} hidden layers and depth={depth} asks for {depth}: "
            "give one width and a depth, or several widths and no depth"
        )
    return width * depth


def single_width(width: tuple[int, ...] | None, default: int, meaning: str) -> int:
    """The one number that `width` must be for a model whose layers follow from it.

    Raises:
        InputError: If there are several.
    """
    if width is None:
        return default
    if len(width) != 1:
        raise InputError(f"width={width} has {len(width)} numbers; this model takes one, {meaning} (default {default})")
    return width[0]
