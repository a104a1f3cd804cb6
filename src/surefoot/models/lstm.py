"""LSTM networks on token ids: a language model and a classifier of sentences."""

from torch import Tensor, nn

from surefoot.errors import InputError
from surefoot.models.widths import single_width

PADDING = 0  # the token id that fills up sentences


class LSTM(nn.Module):
    """Embedding, LSTM layers, linear head.

    Args:
        vocabulary_size: Token ids are 0 .. vocabulary_size - 1.
        outputs: The number of outputs.
        width: The features of the embedding and of each layer.
        layers: LSTM layers.
        per_token: True: an output for each token (N, T) -> (N, T, outputs), and id 0 is a token like any other.
            False: one for each sentence, (N, T) -> (N, outputs), from the mean over its tokens. There 0 is padding,
            which follows the sentence and has no influence on the output.
    """

    def __init__(self, vocabulary_size: int, outputs: int, *, width: int, layers: int, per_token: bool) -> None:
        super().__init__()
        self.per_token = per_token
        self.embedding = nn.Embedding(vocabulary_size, width, padding_idx=None if per_token else PADDING)
        self.lstm = nn.LSTM(width, width, num_layers=layers, batch_first=True)
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (N, T), int64 -> (N, T, outputs) or (N, outputs)."""
        states, _ = self.lstm(self.embedding(tokens))  # (N, T, width)
        if self.per_token:
            return self.head(states)
        real = (tokens != PADDING).unsqueeze(-1)  # (N, T, 1)
        length = real.sum(dim=1).clamp(min=1)  # (N, 1); an empty sentence has the mean 0
        return self.head((states * real).sum(dim=1) / length)


def lstm(
    task: str,
    outputs: int,
    vocabulary_size: int | None,
    *,
    width: tuple[int, ...] | None = None,
    depth: int | None = None,
) -> LSTM:
    """An LSTM for text: next-token prediction for the task "language", one output a sentence for the others.

    Args:
        task: "language", "classification" or "regression".
        outputs: The number of outputs; for "language" the size of the vocabulary.
        vocabulary_size: Token ids are 0 .. vocabulary_size - 1.
        width: The features of the embedding and of each layer, one number; default (128,).
        depth: The number of layers, default 2.

    Returns:
        A module (N, T) -> (N, T, vocabulary_size) for "language", else (N, T) -> (N, outputs).

    Raises:
        InputError: If the vocabulary is not given or contradicts `outputs`, or `width` is not one number.
    """
    if vocabulary_size is None:
        raise InputError("vocabulary_size=None: 'lstm' needs the number of different token ids")
    if task == "language" and outputs != vocabulary_size:
        raise InputError(
            f"outputs={outputs} must equal vocabulary_size={vocabulary_size} when the task is to predict the next token"
        )
    return LSTM(
        vocabulary_size,
        outputs,
        width=single_width(width, 128, "the features of the embedding and of each layer"),
        layers=2 if depth is None else depth,
        per_token=task == "language",
    )
