"""Residual networks in the form He et al. used for CIFAR: a 3x3 stem, no max-pooling.

Source: He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, arXiv 1512.03385, section 4.2.
"""

from collections.abc import Callable
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.models.widths import single_width


class PaddedShortcut(nn.Module):
    """Option A of the paper: every `stride`-th pixel, and zeros for the channels that are new. No parameters."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        new = channels_out - channels_in
        self.before, self.after = new // 2, new - new // 2

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, channels_out, ceil(H/stride), ceil(W/stride))."""
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, self.before, self.after))


def projection_shortcut(channels_in: int, channels_out: int, stride: int) -> nn.Module:
    """Option B of the paper: a 1x1 convolution and a batch norm."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False), nn.BatchNorm2d(channels_out)
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut: relu(shortcut(x) + bn(conv(relu(bn(conv(x))))))."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, shortcut: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        same = stride == 1 and channels_in == channels_out
        self.shortcut = nn.Identity() if same else shortcut(channels_in, channels_out, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, channels_in, H, W) -> (N, channels_out, ceil(H/stride), ceil(W/stride))."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.shortcut(x) + residual)


def _resnet(
    input_shape: tuple[int, ...], outputs: int, base: int, stages: int, blocks: int, shortcut: Callable[..., nn.Module]
) -> nn.Sequential:
    channels, *size = input_shape
    if min(size) < 8:
        raise InputError(f"a resnet needs images of at least 8x8, and these are {size[0]}x{size[1]}: take 'mlp'")
    layers: list[nn.Module] = [nn.Conv2d(channels, base, 3, padding=1, bias=False), nn.BatchNorm2d(base), nn.ReLU()]
    widths = [base] + [base * 2**stage for stage in range(stages)]
    for stage, (channels_in, channels_out) in enumerate(pairwise(widths)):
        layers.append(BasicBlock(channels_in, channels_out, 1 if stage == 0 else 2, shortcut))
        layers += [BasicBlock(channels_out, channels_out, 1, shortcut) for _ in range(blocks - 1)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], outputs)]
    model = nn.Sequential(*layers)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def resnet20(input_shape: tuple[int, ...], outputs: int, *, width: tuple[int, ...] | None = None) -> nn.Sequential:
    """ResNet-20: three stages of three blocks, 16-32-64 channels, parameter-free shortcuts.

    269,722 parameters for CIFAR-10.

    Args:
        input_shape: (C, H, W), H and W at least 8.
        outputs: The number of outputs.
        width: The channels of the first stage; default (16,). Each later stage has twice as many.

    Returns:
        A module (N, C, H, W) -> (N, outputs).

    Raises:
        InputError: If the images are too small or `width` is not one number.
    """
    base = single_width(width, 16, "the channels of the first stage")
    return _resnet(input_shape, outputs, base, stages=3, blocks=3, shortcut=PaddedShortcut)


def resnet18(input_shape: tuple[int, ...], outputs: int, *, width: tuple[int, ...] | None = None) -> nn.Sequential:
    """ResNet-18 for small images: four stages of two blocks, 64-128-256-512 channels, projection shortcuts.

    11,173,962 parameters for CIFAR-10. Arguments, result and errors as in `resnet20`; `width` is (64,) by default.
    """
    base = single_width(width, 64, "the channels of the first stage")
    return _resnet(input_shape, outputs, base, stages=4, blocks=2, shortcut=projection_shortcut)
