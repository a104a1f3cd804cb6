"""Whole networks: those of transformers at tiny size, and the ones the command line builds."""

from typing import Any

import pytest
import torch
from rules_reference import assert_exact, difference, naive_gram, randomise
from torch import Tensor, nn

from surefoot.measure.capture import Network
from surefoot.measure.tangent import tangent_gram
from surefoot.models import build

transformers = pytest.importorskip("transformers")


class Logits(nn.Module):
    """A network as a function of its first argument, its outputs reduced to a few."""

    def __init__(self, network: nn.Module, outputs: int = 2) -> None:
        super().__init__()
        self.network, self.outputs = network, outputs

    def forward(self, x: Tensor) -> Tensor:
        found = self.network(x)
        return found.flatten(1)[:, -self.outputs :]


class Tokens(nn.Module):
    """A language model as a function of the token ids, two of its logits for the last token."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, ids: Tensor) -> Tensor:
        return self.network(input_ids=ids).logits[:, -1, :2]


def text(vocabulary: int = 11, n: int = 3, T: int = 4) -> dict[str, Tensor]:
    mask = (torch.arange(T) < torch.tensor([[T], [T - 2], [T - 1]][:n])).long()
    return {"input_ids": torch.randint(1, vocabulary, (n, T)), "attention_mask": mask}


COMMON: dict[str, Any] = {"vocab_size": 11, "num_labels": 2, "pad_token_id": 0}
BERT: dict[str, Any] = {
    **COMMON, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12,
    "max_position_embeddings": 8,
}  # fmt: skip


def gpt2(**more: Any) -> nn.Module:
    return transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(n_positions=8, n_embd=8, n_layer=2, n_head=2, **COMMON, **more)
    )


def bert(**more: Any) -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT, **more))


def distilbert(**more: Any) -> nn.Module:
    config = transformers.DistilBertConfig(
        dim=8, n_layers=2, n_heads=2, hidden_dim=12, max_position_embeddings=8, **COMMON, **more
    )
    return transformers.DistilBertForSequenceClassification(config)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [gpt2, bert, distilbert])
def test_text(make: Any, attention: str) -> None:
    model = randomise(make(attn_implementation=attention), 0.3).eval()
    assert_exact(model, text())


def test_a_language_model_with_tied_weights() -> None:
    config = transformers.GPT2Config(
        n_positions=8, n_embd=8, n_layer=1, n_head=2, vocab_size=11, bos_token_id=None, eos_token_id=None
    )
    model = randomise(transformers.GPT2LMHeadModel(config), 0.3).eval()
    ids = torch.randint(0, 11, (3, 4))
    network = Network(model, {"input_ids": ids}, output=lambda found: found.logits[:, -1])
    assert network.fallback == ()
    assert "lm_head.weight" not in network.parameters  # the embedding's
    assert "transformer.wte.weight" in network.parameters

    right = assert_exact(Tokens(model), ids)
    head = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(head.detach().clone())
    assert difference(naive_gram(Tokens(model), ids), right) > 1e-3  # its cross terms matter


def vit(**more: Any) -> nn.Module:
    config = transformers.ViTConfig(
        image_size=4, patch_size=2, num_channels=1, hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=12, num_labels=2, **more,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=2
    )
    return transformers.ResNetForImageClassification(config)


def test_vision_transformer() -> None:
    assert_exact(randomise(vit(attn_implementation="sdpa"), 0.3).eval(), {"pixel_values": torch.randn(3, 1, 4, 4)})


def causal(kind: str) -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4, max_position_embeddings=8, pad_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_networks_with_rms_norm_and_rotations(kind: str) -> None:
    model = randomise(causal(kind), 0.3).eval()
    # Their norms take float32, so that the naive way is exact to that only.
    assert_exact(Tokens(model), torch.randint(1, 11, (3, 4)), tolerance=1e-5)


def test_softmax_in_float32_is_lifted() -> None:
    """The eager attention of transformers takes its softmax in float32 whatever the model's dtype."""
    model = randomise(vit(attn_implementation="eager"), 0.3).eval()
    other = vit(attn_implementation="sdpa").double().eval()
    other.load_state_dict(model.state_dict())
    x = {"pixel_values": torch.randn(3, 1, 4, 4).double()}
    right = naive_gram(other, x)
    assert difference(naive_gram(model, x), right) > 1e-10
    assert difference(tangent_gram(model, x), right) < 1e-12


def test_residual_network() -> None:
    assert_exact(randomise(resnet(), 0.3).eval(), {"pixel_values": torch.randn(3, 1, 16, 16)})


# --------------------------------------------------------------------------------------------------- our own models


def own(name: str, **options: Any) -> tuple[nn.Module, Tensor]:
    kind = "text" if name in ("lstm", "gpt") else "image"
    shape = (4,) if kind == "text" else (1, 8, 8)
    vocabulary = 11 if kind == "text" else None
    task = options.pop("task", "classification")
    model = build(
        name, kind=kind, task=task, input_shape=shape, outputs=vocabulary or 2, vocabulary_size=vocabulary, **options
    )
    x = torch.randint(0, 11, (3, 4)) if kind == "text" else torch.randn(3, *shape)
    return model, x


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mlp", {"width": (5, 4), "activation": "tanh"}),
        ("mlp", {"width": (5,), "depth": 2, "activation": "gelu"}),
        ("resnet20", {"width": (2,)}),
        ("resnet18", {"width": (2,)}),
        ("vit-tiny", {"width": (8,), "depth": 2}),
        ("lstm", {"width": (5,), "depth": 2}),
        ("lstm", {"width": (5,), "depth": 2, "task": "language"}),
        ("gpt", {"width": (8,), "depth": 2, "task": "language"}),
    ],
    ids=str,
)
def test_the_models_of_the_command_line(name: str, options: dict[str, Any]) -> None:
    model, x = own(name, **options)
    model = Logits(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    # The eager attention's softmax in float32 makes the naive Gram inexact, not ours (see above).
    assert_exact(model.eval(), x, tolerance=1e-6 if name in ("vit-tiny", "gpt") else 1e-12)


def test_the_autoencoder() -> None:
    """Of what it returns, the first is the output unless told otherwise; the variance has no part in that."""
    model, x = own("vae", width=(5,), latent=3)
    model, x = model.eval().double(), x.double()
    network = Network(model, x)
    assert network.fallback == ()
    K = tangent_gram(model, x)

    class Reconstruction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vae = model

        def forward(self, x: Tensor) -> Tensor:
            return self.vae(x)[0]

    assert difference(K, naive_gram(Reconstruction(), x)) < 1e-12
