"""The vision transformer, from Hugging Face transformers.

Source: Dosovitskiy et al., An Image is Worth 16x16 Words, arXiv 2010.11929.
"""

import math
from typing import Any

from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.models.widths import single_width

HEAD = 64  # features of one attention head


def patch_size(height: int, width: int) -> int:
    """The side of a patch: the largest up to 16 that divides both sides and cuts the shorter into 4 or more.

    224 -> 16, 64 -> 16, 32 -> 8, 28 -> 7, 8 -> 2.

    Raises:
        InputError: If only single pixels would do for an image of 16x16 or more.
    """
    shorter = min(height, width)
    largest = max(1, min(16, shorter // 4))
    side = max(p for p in range(1, largest + 1) if height % p == 0 and width % p == 0)
    if side == 1 and shorter >= 16:
        raise InputError(
            f"images of {height}x{width} cannot be cut into equal square patches for 'vit-tiny': "
            f"resize or crop them to {height - height % 8}x{width - width % 8}"
        )
    return side


class VisionTransformer(nn.Module):
    """`transformers.ViTForImageClassification` as a plain function of the image: (N, C, H, W) -> logits (N, outputs).

    Args:
        input_shape: (C, H, W).
        outputs: The number of outputs.
        hidden: The features of a token; the hidden layer of each block is four times as wide.
        heads: Attention heads; they divide `hidden`.
        layers: Blocks.
    """

    def __init__(self, input_shape: tuple[int, ...], outputs: int, *, hidden: int, heads: int, layers: int) -> None:
        super().__init__()
        try:
            from transformers import ViTConfig, ViTForImageClassification
        except ImportError as error:
            raise InputError(
                "model='vit-tiny' needs the package transformers: pip install 'surefoot[transformers]'"
            ) from error
        channels, height, width = input_shape
        patch = patch_size(height, width)
        # Like the published models, those with patches of 16 learn 14x14 positions and resample them to the grid of the
        # image: the number of parameters does not depend on its size.
        positions = (224, 224) if patch == 16 else (height, width)
        settings: dict[str, Any] = {
            "image_size": positions,
            "patch_size": patch,
            "num_channels": channels,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": 4 * hidden,
            "num_labels": outputs,
            "attn_implementation": "eager",  # the fused kernels have no second derivative, which curvature needs
        }
        self.vit = ViTForImageClassification(ViTConfig(**settings))
        self.resample = positions != (height, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, outputs)."""
        return self.vit(pixel_values=x, interpolate_pos_encoding=self.resample).logits


def vit_tiny(
    input_shape: tuple[int, ...], outputs: int, *, width: tuple[int, ...] | None = None, depth: int | None = None
) -> VisionTransformer:
    """ViT-Tiny: 12 blocks, 192 features, 3 heads, no dropout; 5,526,346 parameters for 10 classes of 64x64 RGB images.

    Args:
        input_shape: (C, H, W); `patch_size` says how it is cut.
        outputs: The number of outputs.
        width: The features of a token, default (192,): a multiple of 64 (a head has 64), or less than 64 for one head.
        depth: The number of blocks, default 12.

    Returns:
        A module (N, C, H, W) -> (N, outputs).

    Raises:
        InputError: If the image cannot be cut, `width` does not suit the heads, or transformers is missing.
    """
    hidden = single_width(width, 192, "the features of a token")
    if hidden > HEAD and hidden % HEAD:
        raise InputError(
            f"width={hidden} is not a multiple of {HEAD}, the features of one attention head: "
            f"give {HEAD * math.floor(hidden / HEAD)} or {HEAD * math.ceil(hidden / HEAD)}"
        )
    layers = 12 if depth is None else depth
    return VisionTransformer(input_shape, outputs, hidden=hidden, heads=max(1, hidden // HEAD), layers=layers)
