"""A decoder of the shape of GPT-2, from Hugging Face transformers.

Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019.
"""

import math
from typing import Any

from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.models.widths import single_width

HEAD = 64  # features of one attention head


class GPT(nn.Module):
    """`transformers.GPT2LMHeadModel` as a plain function of the tokens: (N, T) -> logits (N, T, V). No dropout.

    Args:
        vocabulary_size: V; token ids are 0 .. V - 1. The output layer shares the weights of the embedding.
        context: The longest T.
        hidden: The features of a token; the hidden layer of each block is four times as wide.
        heads: Attention heads; they divide `hidden`.
        layers: Blocks.
    """

    def __init__(self, vocabulary_size: int, context: int, *, hidden: int, heads: int, layers: int) -> None:
        super().__init__()
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ImportError as error:
            raise InputError(
                "model='gpt' needs the package transformers: pip install 'surefoot[transformers]'"
            ) from error
        settings: dict[str, Any] = {
            "vocab_size": vocabulary_size,
            "n_positions": context,
            "n_embd": hidden,
            "n_layer": layers,
            "n_head": heads,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": None,  # GPT-2's own ids lie outside a small vocabulary
            "eos_token_id": None,
            "use_cache": False,
            "attn_implementation": "eager",  # the fused kernels have no second derivative, which curvature needs
        }
        self.gpt = GPT2LMHeadModel(GPT2Config(**settings))

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (N, T), int64 -> logits (N, T, V) of the token that follows."""
        return self.gpt(input_ids=tokens).logits


def gpt(
    task: str,
    input_shape: tuple[int, ...],
    outputs: int,
    vocabulary_size: int | None,
    *,
    width: tuple[int, ...] | None = None,
    depth: int | None = None,
) -> GPT:
    """A GPT-2 for running text: 12 blocks, 256 features, 4 heads; 9,527,040 parameters for 65 characters, 128 a window.

    Args:
        task: "language".
        input_shape: (T,), the length of a window.
        outputs: The size of the vocabulary.
        vocabulary_size: Token ids are 0 .. vocabulary_size - 1.
        width: The features of a token, default (256,): a multiple of 64 (a head has 64), or less than 64 for one head.
        depth: The number of blocks, default 12.

    Returns:
        A module (N, T) -> (N, T, vocabulary_size), causal: an output depends on the tokens up to its own.

    Raises:
        InputError: If the task is another one, the vocabulary is not given or contradicts `outputs`, `width` does not
            suit the heads, or transformers is missing.
    """
    if task != "language":
        raise InputError(f"task={task!r}: 'gpt' predicts the next token of running text; for sentences there is lstm")
    if vocabulary_size is None or outputs != vocabulary_size:
        raise InputError(
            f"vocabulary_size={vocabulary_size} and outputs={outputs}: both must be the number of different token ids"
        )
    hidden = single_width(width, 256, "the features of a token")
    if hidden > HEAD and hidden % HEAD:
        raise InputError(
            f"width={hidden} is not a multiple of {HEAD}, the features of one attention head: "
            f"give {HEAD * math.floor(hidden / HEAD)} or {HEAD * math.ceil(hidden / HEAD)}"
        )
    layers = 12 if depth is None else depth
    return GPT(vocabulary_size, input_shape[0], hidden=hidden, heads=max(1, hidden // HEAD), layers=layers)
