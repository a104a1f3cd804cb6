"""From the name of a model to the model."""

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, NamedTuple

from torch import nn

from surefoot.errors import InputError
from surefoot.models.gpt import gpt
from surefoot.models.lstm import lstm
from surefoot.models.mlp import mlp
from surefoot.models.resnet import resnet18, resnet20
from surefoot.models.user import from_file
from surefoot.models.vae import vae
from surefoot.models.vit import vit_tiny

KINDS = {"image": ("C", "H", "W"), "table": ("d",), "text": ("T",)}
TASKS = ("classification", "regression", "language")


class Model(NamedTuple):
    """What `build` knows of a model: who makes it, for which rows, from which facts, with which options."""

    make: Callable[..., nn.Module]
    kinds: tuple[str, ...]
    facts: tuple[str, ...]
    options: tuple[str, ...]


MODELS = {
    "mlp": Model(mlp, ("image", "table"), ("input_shape", "outputs"), ("width", "depth", "activation")),
    "resnet20": Model(resnet20, ("image",), ("input_shape", "outputs"), ("width",)),
    "resnet18": Model(resnet18, ("image",), ("input_shape", "outputs"), ("width",)),
    "vit-tiny": Model(vit_tiny, ("image",), ("input_shape", "outputs"), ("width", "depth")),
    "lstm": Model(lstm, ("text",), ("task", "outputs", "vocabulary_size"), ("width", "depth")),
    "gpt": Model(gpt, ("text",), ("task", "input_shape", "outputs", "vocabulary_size"), ("width", "depth")),
    "vae": Model(vae, ("image", "table"), ("input_shape",), ("width", "depth", "latent")),
}


def build(
    name: str,
    *,
    kind: str,
    task: str,
    input_shape: tuple[int, ...],
    outputs: int,
    vocabulary_size: int | None = None,
    width: tuple[int, ...] | None = None,
    depth: int | None = None,
    activation: str | None = None,
    latent: int | None = None,
) -> nn.Module:
    """Build a model for given data; its initial weights come from torch's global random generator.

    Args:
        name: One of `MODELS`, or "path/to/file.py:factory" for your own (see `surefoot.models.user`).
        kind: What one row of input is: "image" (C, H, W) float, "table" (d,) float, or "text" (T,) int64 token ids,
            where 0 is padding in sentences.
        task: "classification", "regression" or "language" (predict the next token).
        input_shape: The shape of one row, without the batch.
        outputs: Classes, target values, or token ids. `vae` reconstructs its input and has no use for it.
        vocabulary_size: The number of different token ids, for text.
        width: Widths, at least 1 each; what they mean is the model's to say. None, here and below: its default.
        depth: The number of layers, at least 1.
        activation: The name of the nonlinearity.
        latent: The dimension of the latent space.

    Returns:
        The model, in train mode, float32. It maps (N, *input_shape) to (N, outputs); for "language" (N, T) to
        (N, T, outputs); `vae` to the triple `elbo_loss` takes.

    Raises:
        InputError: If there is no such model, it does not fit the data, or an option would have no effect on it.

    Example:
        >>> model = build("mlp", kind="table", task="regression", input_shape=(8,), outputs=1, width=(64,), depth=2)
        >>> sum(p.numel() for p in model.parameters())
        4801
    """
    width = None if width is None else tuple(width)
    facts = {
        "kind": kind, "task": task, "input_shape": tuple(input_shape), "outputs": outputs,
        "vocabulary_size": vocabulary_size,
    }  # fmt: skip
    given = {"width": width, "depth": depth, "activation": activation, "latent": latent}
    options = {option: value for option, value in given.items() if value is not None}
    _check_data(**facts)
    _check_sizes(options)
    if name not in MODELS and (":" in name or name.endswith(".py")):
        if latent is not None:
            raise InputError(_no_effect("latent", latent, name))
        return from_file(name, facts, options)
    if name not in MODELS:
        close = get_close_matches(name.lower(), MODELS, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise InputError(
            f"model={name!r} is not known: {hint}There are {', '.join(MODELS)}, and your own as path/to/file.py:factory"
        )
    model = MODELS[name]
    if kind not in model.kinds:
        fitting = ", ".join(other for other in MODELS if kind in MODELS[other].kinds)
        raise InputError(
            f"model={name!r} takes {' or '.join(model.kinds)} rows, and these are {kind} rows of shape "
            f"{tuple(input_shape)}: for {kind} there is {fitting}, or your own as path/to/file.py:factory"
        )
    for option, value in options.items():
        if option not in model.options:
            raise InputError(_no_effect(option, value, name))
    return model.make(**{fact: facts[fact] for fact in model.facts}, **options)


def _no_effect(option: str, value: Any, name: str) -> str:
    takers = ", ".join(other for other in MODELS if option in MODELS[other].options)
    return f"{option}={value!r} has no effect on model={name!r}: leave it out, or take one of {takers}"


def _check_data(kind: str, task: str, input_shape: tuple[int, ...], outputs: int, vocabulary_size: int | None) -> None:
    if kind not in KINDS:
        raise InputError(f"kind={kind!r} is not one of {', '.join(KINDS)}")
    if task not in TASKS:
        raise InputError(f"task={task!r} is not one of {', '.join(TASKS)}")
    if task == "language" and kind != "text":
        raise InputError(f"task='language' predicts tokens of text, and these are {kind} rows: take another task")
    if len(input_shape) != len(KINDS[kind]) or min(input_shape) < 1:
        raise InputError(f"input_shape={input_shape}: {kind} rows have the shape ({', '.join(KINDS[kind])}), each >= 1")
    if outputs < 1:
        raise InputError(f"outputs={outputs} must be at least 1")
    if vocabulary_size is not None and vocabulary_size < 1:
        raise InputError(f"vocabulary_size={vocabulary_size} must be at least 1")


def _check_sizes(options: dict[str, Any]) -> None:
    if "width" in options and (not options["width"] or min(options["width"]) < 1):
        raise InputError(f"width={options['width']} must be one or more numbers, each at least 1")
    for option in ("depth", "latent"):
        if options.get(option, 1) < 1:
            raise InputError(f"{option}={options[option]} must be at least 1")
