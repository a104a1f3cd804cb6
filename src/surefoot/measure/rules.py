"""How each kind of module uses its parameters: what `capture` needs to write a sample's Jacobian down.

A rule takes a module, its input and its output, and returns one `Use` for each parameter. When the gradients B at the
module's output have been worked out, (C, n, *output.shape[1:]), the use turns them into the parameter's share of the
Jacobian: an `Outer` (weights), a `Lookup` (embeddings) or `Rows` (gains, biases). To add a module, write such a
function and put it under @rule(ModuleType); what it claims is compared with autograd whenever a Gram is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surefoot.errors import InputError
from surefoot.measure.contraction import Lookup, Outer, Rows, Term


@dataclass
class Use:
    """One use of one parameter in a forward pass.

    Attributes:
        parameter: its name in the module.
        term: B (C, n, *output.shape[1:]) -> this use's share of the Jacobian.
        transposed: whether an Outer's rows come as (G, a, b) in the parameter, and not as (G, b, a).
        part: which rows of the parameter are used, if not all of them.
        is_bias: whether it is the weight of an input that is always 1, beside an Outer at the same output.
    """

    parameter: str
    term: Callable[[Tensor], Term]
    transposed: bool = False
    part: tuple[int, int] | None = None
    is_bias: bool = False


Rule = Callable[[Any, Tensor, Tensor], list[Use]]
RULES: dict[Any, Rule] = {}  # by the module's forward function, so that a subclass with its own forward has no rule
NAMED_RULES: dict[str, Rule] = {}  # by class name, for libraries that may not be installed


def rule(*modules: type[nn.Module] | str) -> Callable[[Rule], Rule]:
    """Register a rule for module types, or for class names."""

    def add(function: Rule) -> Rule:
        for module in modules:
            if isinstance(module, str):
                NAMED_RULES[module] = function
            else:
                RULES[module.forward] = function
        return function

    return add


def find_rule(module: nn.Module) -> Rule | None:
    """Return the rule for a module, or None."""
    return RULES.get(type(module).forward) or NAMED_RULES.get(type(module).__name__)


def bias_rows(B: Tensor, channel: int) -> Rows:
    """Sum the gradients over everything but classes, samples and the channel dimension (counted in the output)."""
    others = [d + 1 for d in range(1, B.dim() - 1) if d != channel]
    return Rows((B.sum(others) if others else B).transpose(0, 1))


@rule(nn.Linear)
def linear(module: nn.Linear, x: Tensor, output: Tensor) -> list[Use]:
    """A dense layer: W x + b at every place."""
    uses = [Use("weight", lambda B: outer(x, B))]
    if module.bias is not None:
        uses.append(Use("bias", lambda B: bias_rows(B, output.dim() - 1), is_bias=True))
    return uses


@rule("Conv1D")
def transposed_linear(module: Any, x: Tensor, output: Tensor) -> list[Use]:
    """A dense layer in the form of GPT-2 in transformers: x W + b, W is (in, out)."""
    return [
        Use("weight", lambda B: outer(x, B), transposed=True),
        Use("bias", lambda B: bias_rows(B, output.dim() - 1), is_bias=True),
    ]


def outer(x: Tensor, B: Tensor) -> Outer:
    """Return the Outer of inputs (n, ..., a) and gradients (C, n, ..., b): every middle index is a place."""
    n, C = x.shape[0], B.shape[0]
    return Outer(x.reshape(n, 1, -1, x.shape[-1]), B.reshape(C, n, 1, -1, B.shape[-1]))


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def convolution(module: Any, x: Tensor, output: Tensor) -> list[Use]:
    """A convolution is a dense layer on patches."""
    d, G = len(module.kernel_size), module.groups

    def term(B: Tensor) -> Outer:
        mode = module.padding_mode
        padded = F.pad(x, module._reversed_padding_repeated_twice, mode="constant" if mode == "zeros" else mode)
        A = patches(padded, module.kernel_size, module.stride, module.dilation)
        return Outer(_grouped(A, G), _channels_last(B, G, d))

    uses = [Use("weight", term)]
    if module.bias is not None:
        uses.append(Use("bias", lambda B: bias_rows(B, 1), is_bias=True))
    return uses


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def transposed_convolution(module: Any, x: Tensor, output: Tensor) -> list[Use]:
    """The adjoint of a convolution: inputs and patches of the output's gradients change places."""
    G = module.groups

    def term(B: Tensor) -> Outer:
        C, n = B.shape[:2]
        pad = [side for p, o in zip(module.padding, _output_padding(module, x, output)) for side in (p - o, p)][::-1]
        windows = patches(F.pad(B.flatten(0, 1), pad), module.kernel_size, module.stride, module.dilation)
        grads = _grouped(windows, G)
        inputs = x.reshape(n, G, x.shape[1] // G, -1).transpose(2, 3)
        return Outer(inputs, grads.view(C, n, *grads.shape[1:]))

    uses = [Use("weight", term, transposed=True)]
    if module.bias is not None:
        uses.append(Use("bias", lambda B: bias_rows(B, 1)))
    return uses


def patches(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """Return the patches a kernel sees: (n, channels, *positions, *kernel)."""
    for d, (k, s, r) in enumerate(zip(kernel, stride, dilation)):
        x = x.unfold(2 + d, r * (k - 1) + 1, s)[..., ::r]
    return x


def _grouped(windows: Tensor, G: int) -> Tensor:
    """(n, channels, *positions, *kernel) -> (n, G, T, channels / G * kernel)."""
    d = (windows.dim() - 2) // 2
    n, channels = windows.shape[:2]
    T = windows.shape[2 : 2 + d].numel()
    return windows.reshape(n, G, channels // G, T, -1).transpose(2, 3).reshape(n, G, T, -1)


def _channels_last(B: Tensor, G: int, d: int) -> Tensor:
    """(C, n, channels, *positions) -> (C, n, G, T, channels / G)."""
    C, n, channels = B.shape[:3]
    return B.reshape(C, n, G, channels // G, -1).transpose(3, 4)


def _output_padding(module: Any, x: Tensor, output: Tensor) -> list[int]:
    """Return how many positions each dimension of the output has beyond the least (output_size may ask for some)."""
    geometry = zip(x.shape[2:], output.shape[2:], module.kernel_size, module.stride, module.padding, module.dilation)
    return [o - ((i - 1) * s - 2 * p + r * (k - 1) + 1) for i, o, k, s, p, r in geometry]


@rule(nn.Embedding)
def embedding(module: nn.Embedding | nn.EmbeddingBag, x: Tensor, output: Tensor) -> list[Use]:
    """A dense layer whose inputs are one-hot; the row of padding_idx gets no gradient.

    Raises:
        InputError: max_norm or scale_grad_by_freq is set: autograd leaves the one out of account and multiplies by the
            other, so that what it returns is no derivative.
    """
    for option in ("max_norm", "scale_grad_by_freq"):
        if getattr(module, option):
            raise InputError(
                f"model has a {type(module).__name__} with {option}={getattr(module, option)!r}, whose gradient is not "
                "the derivative of its output; set it to its default, or leave the embedding out of params"
            )
    n = x.shape[0]
    ids = x.reshape(n, -1)
    if module.padding_idx is not None:
        ids = ids.masked_fill(ids == module.padding_idx, -1)
    return [Use("weight", lambda B: Lookup(ids, B.reshape(len(B), n, ids.shape[1], -1)))]


def _affine(module: Any, normalised: Callable[[], Tensor], first: int, last: int) -> list[Use]:
    """Gain and bias over the dimensions [first, last) of the output, counted without the samples."""

    def rows(B: Tensor) -> Rows:
        others = [d + 2 for d in range(B.dim() - 2) if not first <= d < last]
        return Rows((B.sum(others) if others else B).flatten(2).transpose(0, 1))

    uses = []
    if getattr(module, "weight", None) is not None:
        uses.append(Use("weight", lambda B: rows(B * normalised())))
    if getattr(module, "bias", None) is not None:
        uses.append(Use("bias", rows))
    return uses


@rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
def batch_norm(module: Any, x: Tensor, output: Tensor) -> list[Use]:
    """Eval mode: an affine map with the stored statistics."""
    mean, variance = module.running_mean, module.running_var
    return _affine(module, lambda: F.batch_norm(x, mean, variance, None, None, False, 0.0, module.eps), 0, 1)


@rule(nn.LayerNorm)
def layer_norm(module: nn.LayerNorm, x: Tensor, output: Tensor) -> list[Use]:
    """Normalise each place over its features, then gain and bias a feature."""
    inner, shape = x.dim() - 1, module.normalized_shape
    return _affine(module, lambda: F.layer_norm(x, shape, None, None, module.eps), inner - len(shape), inner)


@rule(nn.RMSNorm)
def rms_norm(module: nn.RMSNorm, x: Tensor, output: Tensor) -> list[Use]:
    """LayerNorm without the mean."""
    inner, shape = x.dim() - 1, list(module.normalized_shape)
    return _affine(module, lambda: F.rms_norm(x, shape, None, module.eps), inner - len(shape), inner)


@rule("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm", "T5LayerNorm")
def rms_norm_of_transformers(module: Any, x: Tensor, output: Tensor) -> list[Use]:
    """RMSNorm over the last dimension, under the names it has in transformers."""
    inner = x.dim() - 1
    return _affine(module, lambda: F.rms_norm(x, [x.shape[-1]], None, module.variance_epsilon), inner - 1, inner)


@rule(nn.GroupNorm)
def group_norm(module: nn.GroupNorm, x: Tensor, output: Tensor) -> list[Use]:
    """Normalise groups of channels, then gain and bias a channel."""
    return _affine(module, lambda: F.group_norm(x, module.num_groups, None, None, module.eps), 0, 1)


@rule(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
def instance_norm(module: Any, x: Tensor, output: Tensor) -> list[Use]:
    """Normalise each channel of a sample, by the stored statistics if there are any (eval mode), then gain and bias."""
    own = module.training or not module.track_running_stats
    mean, variance = (None, None) if own else (module.running_mean, module.running_var)
    return _affine(module, lambda: F.instance_norm(x, mean, variance, None, None, own, 0.0, module.eps), 0, 1)


@rule(nn.PReLU)
def prelu(module: nn.PReLU, x: Tensor, output: Tensor) -> list[Use]:
    """max(x, 0) + w min(x, 0), w shared by all channels or one a channel."""
    shared = module.num_parameters == 1
    inner = x.dim() - 1
    negative = torch.clamp(x, max=0)

    def rows(B: Tensor) -> Rows:
        B = B * negative
        found = B.flatten(2).sum(2, keepdim=True) if shared else B.flatten(3).sum(3) if inner > 1 else B
        return Rows(found.transpose(0, 1))

    return [Use("weight", rows)]


@rule("ViTEmbeddings")
def vision_embeddings(module: Any, x: Tensor, output: Tensor) -> list[Use]:
    """Learned positions, added to the tokens of an image, of which the first is learned (the ViT of transformers)."""
    return [
        Use("position_embeddings", lambda B: Rows(B.flatten(2).transpose(0, 1))),
        Use("cls_token", lambda B: Rows(B[:, :, 0].transpose(0, 1))),
    ]
