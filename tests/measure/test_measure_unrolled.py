"""Attention, recurrence, bags: the unrolled forward passes give torch's values, and the Gram is exact."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rules_reference import Net, assert_exact, difference, jacobian, naive_gram, randomise
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from surefoot.measure.capture import Network
from surefoot.measure.contraction import add_gram
from surefoot.measure.rules import Use
from surefoot.measure.tangent import tangent_gram
from surefoot.measure.unrolled import UNROLLED

randn = torch.randn


def unrolled(module: nn.Module) -> tuple[Callable[..., Any], set[str]]:
    """The unrolled forward, and the names of the parameters it will have recorded."""
    recorded: set[str] = set()

    def record(m: nn.Module, x: Tensor, z: Tensor, uses: Callable[[Tensor, Tensor], list[Use]]) -> Tensor:
        assert m is module
        assert x.shape[0] == z.shape[0]
        recorded.update(use.parameter for use in uses(x, z))
        return z

    return UNROLLED[type(module)](module, record), recorded


def assert_same(found: Any, right: Any) -> None:
    if isinstance(right, Tensor):
        assert found.shape == right.shape
        torch.testing.assert_close(found, right, rtol=1e-13, atol=1e-14)
    elif right is None:
        assert found is None
    else:
        assert len(found) == len(right)
        for one, other in zip(found, right):
            assert_same(one, other)


def names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters(recurse=False)}


# ------------------------------------------------------------------------------------------------------- attention

ATTENTION = [
    {},
    {"bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
    {"kdim": 3, "vdim": 5},
    {"kdim": 3, "vdim": 5, "bias": False},
    {"kdim": 3, "add_bias_kv": True},
]


def attention_inputs(options: dict[str, Any], n: int, L: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value with the samples in front."""
    return (
        randn(n, L, 4).double(),
        randn(n, S, options.get("kdim", 4)).double(),
        randn(n, S, options.get("vdim", 4)).double(),
    )


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", ATTENTION, ids=str)
def test_attention_gives_torchs_values(options: dict[str, Any], batch_first: bool) -> None:
    n, L, S, heads = 3, 4, 5, 2
    module = randomise(nn.MultiheadAttention(4, heads, batch_first=batch_first, **options))
    q, k, v = attention_inputs(options, n, L, S)
    if not batch_first:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    padding = torch.arange(S) >= torch.tensor([[5], [3], [4]])
    forbidden = torch.rand(L, S) < 0.3
    forbidden[:, 0] = False
    forward, recorded = unrolled(module)
    for settings in (
        {},
        {"need_weights": False},
        {"average_attn_weights": False},
        {"key_padding_mask": padding},
        {"key_padding_mask": padding, "attn_mask": forbidden, "need_weights": False},
        {"key_padding_mask": randn(n, S).double(), "attn_mask": randn(L, S).double()},
        {"attn_mask": forbidden.expand(n * heads, L, S)},
        {"attn_mask": randn(n * heads, L, S).double(), "need_weights": False},
        {"attn_mask": torch.ones(L, S).triu(1).bool(), "is_causal": True, "need_weights": False},
        {"attn_mask": torch.ones(L, S).triu(1).bool(), "is_causal": True},
        {"attn_mask": forbidden, "key_padding_mask": padding, "is_causal": True, "need_weights": False},
    ):
        assert_same(forward(q, k, v, **settings), module(q, k, v, **settings))
    assert recorded == names(module)
    one = tuple(x[0] if batch_first else x[:, 0] for x in (q, k, v))
    assert_same(forward(*one, key_padding_mask=padding[1]), module(*one, key_padding_mask=padding[1]))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", ATTENTION, ids=str)
def test_the_gram_of_cross_attention(options: dict[str, Any], batch_first: bool, need_weights: bool) -> None:
    def attend(attention: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if batch_first:
            return attention(q, k, v, need_weights=need_weights)[0]
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        return attention(q, k, v, need_weights=need_weights)[0].transpose(0, 1)

    model = randomise(Net(attend, nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)))
    assert_exact(model, attention_inputs(options, 3, 3, 4))


@pytest.mark.parametrize("masked", [True, False])
def test_the_gram_of_self_attention(masked: bool) -> None:
    def attend(attention: Any, x: Tensor, padding: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() if masked else None
        z, weights = attention(x, x, x, key_padding_mask=padding if masked else None, attn_mask=mask)
        return torch.cat([z, weights], 2)  # the weights may be used as well

    model = randomise(Net(attend, nn.MultiheadAttention(4, 2, batch_first=True)))
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4]])
    assert_exact(model, (randn(3, 5, 4), padding))


def test_parts_of_attentions_parameters() -> None:
    model = randomise(Net(lambda attention, x: attention(x, x, x)[0], nn.MultiheadAttention(4, 2, batch_first=True)))
    x = randn(3, 4, 4)
    prefix = "parts.0."
    shares = [
        assert_exact(model, x, params=[prefix + name]) for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight")
    ]
    shares.append(assert_exact(model, x, params=[prefix + "out_proj.bias"]))
    assert difference(sum(shares), naive_gram(model, x)) < 1e-13  # type: ignore[arg-type]


def test_an_attention_used_twice_has_its_cross_terms() -> None:
    def again(attention: Any, x: Tensor, y: Tensor) -> Tensor:
        h = attention(x, x, x)[0]
        return attention(h, y, y, need_weights=False)[0]

    module = nn.MultiheadAttention(4, 2, batch_first=True)
    model, inputs = randomise(Net(again, module)), (randn(3, 4, 4), randn(3, 5, 4))
    right = assert_exact(model, inputs)
    apart = randomise(
        Net(
            lambda one, other, x, y: other(one(x, x, x)[0], y, y, need_weights=False)[0],
            nn.MultiheadAttention(4, 2, batch_first=True),
            nn.MultiheadAttention(4, 2, batch_first=True),
        )
    )
    for part in apart.parts:
        part.load_state_dict(model.parts[0].state_dict())  # type: ignore[union-attr,operator,index]
    assert difference(naive_gram(apart, tuple(x.double() for x in inputs)), right) > 1e-3


def test_a_weight_used_whole_here_and_in_parts_there_is_left_to_autograd() -> None:
    """Else the cross terms between the whole and its parts would be missing, and no first-order check sees that."""

    def both(attention: Any, dense: Any, x: Tensor) -> Tensor:
        return torch.cat([attention(x, x, x)[0], dense(x)], 2)

    attention, dense = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 12, bias=False)
    model = randomise(Net(both, attention, dense))
    dense.weight = attention.in_proj_weight
    assert_exact(model, randn(3, 4, 4), fallback=["parts.0.in_proj_weight"])


@pytest.mark.parametrize("T", [3, 5])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": "gelu", "bias": False}], ids=str)
def test_transformer_encoder(options: dict[str, Any], batch_first: bool, T: int) -> None:
    def encode(encoder: Any, x: Tensor) -> Tensor:
        return encoder(x) if batch_first else encoder(x.transpose(0, 1)).transpose(0, 1)

    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=batch_first, **options)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    for mode in (True, False):  # in eval mode torch has a fast path, without derivatives
        assert_exact(randomise(Net(encode, encoder)).train(mode), randn(3, T, 4))


def test_a_dropout_that_does_not_act() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.5, batch_first=True)
    assert_exact(randomise(Net(lambda m, x: m(x), layer)).eval(), randn(3, 4, 4))


def test_transformer_decoder_with_masks() -> None:
    def decode(decoder: Any, x: Tensor, memory: Tensor, padding: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return decoder(x, memory, tgt_mask=mask, tgt_is_causal=True, memory_key_padding_mask=padding)

    layer = nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    padding = torch.arange(4) >= torch.tensor([[4], [2], [3]])
    assert_exact(randomise(Net(decode, nn.TransformerDecoder(layer, 2))), (randn(3, 3, 4), randn(3, 4, 4), padding))


def test_the_whole_transformer() -> None:
    model = nn.Transformer(4, 2, 1, 1, 6, dropout=0.0, batch_first=True)
    assert_exact(randomise(Net(lambda m, x, y: m(x, y), model)), (randn(3, 4, 4), randn(3, 3, 4)))


# ------------------------------------------------------------------------------------------------------- recurrence

RECURRENT = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
    (nn.LSTM, {"bias": False}),
    (nn.LSTM, {"proj_size": 2}),
    (nn.LSTM, {"proj_size": 2, "num_layers": 2, "bidirectional": True, "bias": False}),
    (nn.GRU, {}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    (nn.GRU, {"bias": False}),
    (nn.RNN, {}),
    (nn.RNN, {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}),
    (nn.RNN, {"bias": False}),
]


def start(module: Any, n: int) -> Any:
    layers = module.num_layers * (1 + module.bidirectional)
    h = randn(layers, n, module.proj_size or module.hidden_size).double()
    return (h, randn(layers, n, module.hidden_size).double()) if isinstance(module, nn.LSTM) else h


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("kind", "options"), RECURRENT, ids=str)
def test_recurrence_gives_torchs_values(kind: Any, options: dict[str, Any], batch_first: bool) -> None:
    module = randomise(kind(3, 4, batch_first=batch_first, **options))
    x = randn(2, 5, 3).double()
    forward, recorded = unrolled(module)
    for given in (None, start(module, 2 if batch_first else 5)):
        assert_same(forward(x, given), module(x, given))
    assert recorded == names(module)
    h = start(module, 1)
    h = tuple(s[:, 0] for s in h) if kind is nn.LSTM else h[:, 0]
    assert_same(forward(x[0], h), module(x[0], h))
    assert_same(forward(x[0]), module(x[0]))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("kind", "options"), RECURRENT, ids=str)
def test_the_gram_of_recurrence(kind: Any, options: dict[str, Any], batch_first: bool) -> None:
    def run(layer: Any, x: Tensor) -> Tensor:
        z, last = layer(x if batch_first else x.transpose(0, 1))
        last = last[1] if kind is nn.LSTM else last
        return torch.cat([(z if batch_first else z.transpose(0, 1)).flatten(1), last.transpose(0, 1).flatten(1)], 1)

    assert_exact(randomise(Net(run, kind(3, 4, batch_first=batch_first, **options))), randn(3, 4, 3))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrence_from_a_given_state(kind: Any) -> None:
    def run(layer: Any, x: Tensor, h: Tensor) -> Tensor:
        h = h[None]
        return layer(x, (h, torch.sin(h)) if kind is nn.LSTM else h)[0]

    model = randomise(Net(run, kind(3, 4, batch_first=True)))
    right = assert_exact(model, (randn(3, 3, 3), randn(3, 4)))
    assert right.abs().min() > 0


def test_recurrence_from_a_learned_state() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru, self.h = nn.GRU(3, 4, batch_first=True), nn.Parameter(torch.zeros(1, 1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x, self.h.expand(1, len(x), 4).contiguous())[0][:, -1]

    assert_exact(randomise(Learned()), randn(4, 3, 3), fallback=["h"])


def test_the_recurrences_cross_terms_matter() -> None:
    """The steps share a weight: a Gram of the steps' own Grams would be another one."""
    model = randomise(Net(lambda rnn, x: rnn(x)[0], nn.RNN(3, 4, batch_first=True)))
    x = randn(3, 4, 3).double()
    right = assert_exact(model, x, params=["parts.0.weight_hh_l0"])
    W = model.get_parameter("parts.0.weight_hh_l0").detach()
    per_step = torch.zeros_like(right)
    for step in range(4):

        class Apart(nn.Module):
            def __init__(self, step: int) -> None:
                super().__init__()
                self.step, self.own, self.rest = step, nn.Parameter(W.clone()), model

            def forward(self, x: Tensor) -> Tensor:
                rnn, h, outputs = self.rest.parts[0], x.new_zeros(len(x), 4), []  # type: ignore[index]
                for t in range(4):
                    V = self.own if t == self.step else W
                    h = torch.tanh(
                        x[:, t] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + h @ V.T + rnn.bias_hh_l0  # type: ignore[union-attr]
                    )
                    outputs.append(h)
                return self.rest.readout(torch.stack(outputs, 1))  # type: ignore[operator]

        apart = Apart(step).double()
        torch.testing.assert_close(apart(x), model(x))
        per_step += naive_gram(apart, x, ["own"])
    assert difference(per_step, right) > 1e-3


def test_a_packed_sequence_is_left_to_autograd() -> None:
    def run(layer: Any, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return pad_packed_sequence(layer(packed)[0], batch_first=True, total_length=x.shape[1])[0]

    model = randomise(Net(run, nn.LSTM(3, 4, batch_first=True)))
    fallback = [f"parts.0.{name}_l0" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    assert_exact(model, (randn(3, 4, 3), torch.tensor([4, 2, 3])), fallback=fallback)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_cells(kind: Any, bias: bool) -> None:
    module = randomise(kind(3, 4, bias=bias))
    forward, recorded = unrolled(module)
    x, h = randn(5, 3).double(), randn(5, 4).double()
    state, one = ((h, h.sin()), (h[0], h[0].sin())) if kind is nn.LSTMCell else (h, h[0])
    for inputs in ((x,), (x, state), (x[0],), (x[0], one)):
        assert_same(forward(*inputs), module(*inputs))
    assert recorded == names(module)

    def run(cell: Any, x: Tensor) -> Tensor:
        state = None
        for t in range(x.shape[1]):
            state = cell(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state  # type: ignore[return-value]

    assert_exact(randomise(Net(run, kind(3, 4, bias=bias))), randn(3, 4, 3))


def test_a_relu_cell() -> None:
    module = randomise(nn.RNNCell(3, 4, nonlinearity="relu"))
    x = randn(5, 3).double()
    assert_same(unrolled(module)[0](x), module(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_sequences_of_another_length_than_the_first(kind: Any) -> None:
    """The layout of a step not seen when the network was looked at is that of the steps before."""
    model = randomise(Net(lambda m, x: m(x)[0][:, -1], kind(3, 4, batch_first=True)))
    short, long = randn(3, 2, 3).double(), randn(4, 6, 3).double()
    network = Network(model, short)
    K = torch.zeros(6, 8, dtype=torch.float64)
    add_gram(K, network.terms(short), network.terms(long), symmetric=False)
    J, S = (torch.cat(list(jacobian(model, x).values()), 1) for x in (short, long))
    assert difference(K, J @ S.T) < 1e-12
    assert difference(tangent_gram(model, short, long), J @ S.T) < 1e-12


# ------------------------------------------------------------------------------------------------------------ others


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0])
def test_embedding_bag(mode: str, padding: int | None) -> None:
    module = randomise(nn.EmbeddingBag(6, 3, mode=mode, padding_idx=padding))
    ids = torch.tensor([[1, 2, 2, 0], [0, 0, 0, 0], [5, 0, 1, 1], [3, 4, 5, 2]])
    forward, recorded = unrolled(module)
    assert_same(forward(ids), module(ids))
    assert recorded == {"weight"}
    assert_exact(Net(lambda bag, x: bag(x), module), ids)
    offsets = torch.tensor([0, 3, 7])
    assert_same(forward(ids.flatten(), offsets), module(ids.flatten(), offsets))


def test_embedding_bag_with_weights() -> None:
    module = randomise(nn.EmbeddingBag(6, 3, mode="sum"))
    inputs = (torch.randint(0, 6, (4, 5)), randn(4, 5).double())
    assert_same(unrolled(module)[0](inputs[0], None, inputs[1]), module(inputs[0], None, inputs[1]))
    assert_exact(Net(lambda bag, x, w: bag(x, per_sample_weights=w), module), inputs)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_bilinear(shape: tuple[int, ...], bias: bool) -> None:
    module = randomise(nn.Bilinear(2, 3, 4, bias=bias))
    inputs = randn(4, *shape, 2).double(), randn(4, *shape, 3).double()
    forward, recorded = unrolled(module)
    assert_same(forward(*inputs), module(*inputs))
    assert recorded == names(module)
    assert_exact(Net(lambda m, x, y: m(x, y), module), inputs)
