"""Modules whose own forward pass hides how they use their weights, written out in steps that can be recorded.

`UNROLLED[type](module, record)` returns a forward function with the module's signature and, to rounding, its values.
For each use of a weight it calls `record(module, x, output, uses)`, with `uses(x, output)` as a rule returns them, and
goes on with what that gives back. There x and output have the samples in front. Dropout is left out: a model in which
it acts has no Jacobian and was refused before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from surefoot.measure.contraction import Rows
from surefoot.measure.rules import Use, bias_rows, embedding, outer

Record = Callable[[nn.Module, Tensor, Tensor, Callable[[Tensor, Tensor], list[Use]]], Tensor]
Unroll = Callable[[Any, Record], Callable[..., Any]]

UNROLLED: dict[type[nn.Module], Unroll] = {}


def unroll(*modules: type[nn.Module]) -> Callable[[Unroll], Unroll]:
    """Register how modules are unrolled."""

    def add(function: Unroll) -> Unroll:
        for module in modules:
            UNROLLED[module] = function
        return function

    return add


def dense(
    module: nn.Module, record: Record, x: Tensor, weight: str, bias: str | None, part: tuple[int, int] | None = None
) -> Tensor:
    """Return W x + b, with the names of W and b in the module and which of their rows are used, and record it.

    A weight has the same parts at all its uses: what two different parts have in common is not noticed.
    """
    W = getattr(module, weight)
    b = None if bias is None else getattr(module, bias)
    if part is not None:
        W, b = W[part[0] : part[1]], None if b is None else b[part[0] : part[1]]

    def uses(x: Tensor, z: Tensor) -> list[Use]:
        found = [Use(weight, lambda B: outer(x, B), part=part)]
        if bias is not None and b is not None:
            found.append(Use(bias, lambda B: bias_rows(B, z.dim() - 1), part=part, is_bias=True))
        return found

    return record(module, x, F.linear(x, W.flatten(1), b), uses)


# ------------------------------------------------------------------------------------------------------- attention


@unroll(nn.MultiheadAttention)
def multihead_attention(module: nn.MultiheadAttention, record: Record) -> Callable[..., Any]:
    """Three dense layers (thirds of one weight, or three weights), softmax(q k^T / sqrt(d) + mask) v, a dense layer."""
    E, heads = module.embed_dim, module.num_heads

    def forward(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        batched = query.dim() == 3

        def batch_first(x: Tensor) -> Tensor:
            return x[None] if not batched else x if module.batch_first else x.transpose(0, 1)

        q, k, v = (project(batch_first(x), third) for third, x in enumerate((query, key, value)))
        if module.bias_k is not None:
            k, v = (torch.cat([x, one_more(name, len(x))], 1) for x, name in ((k, "bias_k"), (v, "bias_v")))
        if module.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (n, heads, L or S, E / heads)
        causal = is_causal and key_padding_mask is None and not need_weights  # then torch ignores the mask itself
        mask = None if causal else _mask(attn_mask, key_padding_mask, q, k)
        weights = None
        if need_weights:
            scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            z = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            z = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        z = module.out_proj(z.transpose(1, 2).flatten(2))  # (n, L, E)
        return (z[0] if not batched else z if module.batch_first else z.transpose(0, 1)), weights

    def project(x: Tensor, third: int) -> Tensor:
        bias = None if module.in_proj_bias is None else "in_proj_bias"
        part = (third * E, (third + 1) * E)
        if module.in_proj_weight is not None:
            return dense(module, record, x, "in_proj_weight", bias, part)
        weight = ("q_proj_weight", "k_proj_weight", "v_proj_weight")[third]
        z = dense(module, record, x, weight, None)
        if bias is None:
            return z
        # The three biases are one parameter though the weights are three.
        b = module.in_proj_bias[part[0] : part[1]]
        return record(
            module, x, z + b, lambda x, z: [Use("in_proj_bias", lambda B: bias_rows(B, z.dim() - 1), part=part)]
        )

    def one_more(name: str, n: int) -> Tensor:
        """Return the learned key or value that is put behind every sample's: (n, 1, E)."""
        b = getattr(module, name).expand(n, 1, E)
        return record(module, b, b, lambda x, z: [Use(name, lambda B: Rows(B.flatten(2).transpose(0, 1)))])

    return forward


def _mask(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return what is added to the scores, (n or 1, heads or 1, L or 1, S): 0 or -inf for masks of truth values."""
    n, heads, L, _ = q.shape
    S = k.shape[2]

    def added(mask: Tensor) -> Tensor:
        if mask.dtype == torch.bool:
            mask = q.new_zeros(mask.shape).masked_fill(mask, -math.inf)
        return F.pad(mask, (0, S - mask.shape[-1]))  # a learned or zero key is seen by all

    found = None
    if attn_mask is not None:
        found = added(attn_mask).to(q.dtype)
        found = found.view(1, 1, L, S) if found.dim() == 2 else found.view(n, heads, L, S)
    if padding is not None:
        padding = added(padding).to(q.dtype).view(n, 1, 1, S)
        found = padding if found is None else found + padding
    return found


# -------------------------------------------------------------------------------------------------------- recurrence

State = tuple[Tensor, ...]  # (h,), for an LSTM (h, c)


def _lstm(ih: Tensor, hh: Tensor, state: State) -> State:
    i, f, g, o = (ih + hh).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(ih: Tensor, hh: Tensor, state: State) -> State:
    (ir, iz, inew), (hr, hz, hnew) = ih.chunk(3, -1), hh.chunk(3, -1)
    z = torch.sigmoid(iz + hz)
    return ((1 - z) * torch.tanh(inew + torch.sigmoid(ir + hr) * hnew) + z * state[0],)


def _tanh(ih: Tensor, hh: Tensor, state: State) -> State:
    return (torch.tanh(ih + hh),)


def _relu(ih: Tensor, hh: Tensor, state: State) -> State:
    return (torch.relu(ih + hh),)


STEPS = {"LSTM": _lstm, "GRU": _gru, "RNN_TANH": _tanh, "RNN_RELU": _relu}


@unroll(nn.LSTM, nn.GRU, nn.RNN)
def recurrent(module: nn.LSTM | nn.GRU | nn.RNN, record: Record) -> Callable[..., Any]:
    """W_ih x_t + b_ih for all steps at once, W_hh h_t + b_hh step by step, an LSTM's projection W_hr h_t too.

    A packed sequence goes through the module as it is: its weights are left to per-sample gradients.
    """
    step = STEPS[module.mode]
    as_it_is: Callable[..., Any] = type(module).forward
    is_lstm = module.mode == "LSTM"

    def forward(input: Tensor | PackedSequence, hx: Any = None) -> Any:
        if isinstance(input, PackedSequence):
            return as_it_is(module, input, hx)
        batched = input.dim() == 3
        x = input[None] if not batched else input if module.batch_first else input.transpose(0, 1)  # (n, T, a)
        if hx is None:
            sizes = [module.proj_size or module.hidden_size, module.hidden_size][: 1 + is_lstm]
            start = tuple(x.new_zeros(module.num_layers * directions, len(x), size) for size in sizes)
        else:
            start = tuple(s if batched else s[:, None] for s in (hx if is_lstm else (hx,)))
        ends: list[State] = []
        for layer in range(module.num_layers):
            sides = []
            for direction in range(directions):
                suffix = f"_l{layer}" + "_reverse" * direction
                states = scan(x.flip(1) if direction else x, tuple(s[len(ends)] for s in start), suffix)
                ends.append(states[-1])
                h = torch.stack([state[0] for state in states], 1)
                sides.append(h.flip(1) if direction else h)
            x = torch.cat(sides, 2)
        last = tuple(torch.stack(s) if batched else torch.stack(s)[:, 0] for s in zip(*ends))  # (layers, n, features)
        output = x[0] if not batched else x if module.batch_first else x.transpose(0, 1)
        return output, last if is_lstm else last[0]

    def scan(x: Tensor, state: State, suffix: str) -> list[State]:
        """Return the states after each step: x (n, T, a), state (n, features)."""
        bias_ih, bias_hh = ("bias_ih" + suffix, "bias_hh" + suffix) if module.bias else (None, None)
        ih = dense(module, record, x, "weight_ih" + suffix, bias_ih)
        states = []
        for t in range(x.shape[1]):
            state = step(ih[:, t], dense(module, record, state[0], "weight_hh" + suffix, bias_hh), state)
            if module.proj_size:
                state = (dense(module, record, state[0], "weight_hr" + suffix, None), *state[1:])
            states.append(state)
        return states

    directions = 1 + module.bidirectional
    return forward


@unroll(nn.LSTMCell, nn.GRUCell, nn.RNNCell)
def cell(module: nn.LSTMCell | nn.GRUCell | nn.RNNCell, record: Record) -> Callable[..., Any]:
    """One step of the recurrent layer of that name."""
    is_lstm = isinstance(module, nn.LSTMCell)
    mode = f"RNN_{module.nonlinearity.upper()}" if isinstance(module, nn.RNNCell) else "LSTM" if is_lstm else "GRU"

    def forward(input: Tensor, hx: Any = None) -> Any:
        batched = input.dim() == 2
        x = input if batched else input[None]
        if hx is None:
            state = (x.new_zeros(len(x), module.hidden_size),) * (1 + is_lstm)
        else:
            state = tuple(s if batched else s[None] for s in (hx if is_lstm else (hx,)))
        biases = ("bias_ih", "bias_hh") if module.bias else (None, None)
        ih = dense(module, record, x, "weight_ih", biases[0])
        state = STEPS[mode](ih, dense(module, record, state[0], "weight_hh", biases[1]), state)
        state = tuple(s if batched else s[0] for s in state)
        return state if is_lstm else state[0]

    return forward


# ------------------------------------------------------------------------------------------------------------ others


@unroll(nn.EmbeddingBag)
def embedding_bag(module: nn.EmbeddingBag, record: Record) -> Callable[..., Any]:
    """An embedding, then the sum, mean or maximum over each bag; padding belongs to no bag.

    Bags of different sizes, given by offsets, go through the module as they are, to per-sample gradients.
    """

    as_it_is: Callable[..., Any] = type(module).forward

    def forward(input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        if input.dim() != 2:
            return as_it_is(module, input, offsets, per_sample_weights)
        x = F.embedding(input, module.weight)
        x = record(module, input, x, lambda ids, z: embedding(module, ids, z))  # (n, T, d)
        real = torch.ones_like(input) if module.padding_idx is None else input != module.padding_idx
        real = real.to(x.dtype)[..., None]
        if module.mode == "max":
            highest = x.masked_fill(real == 0, -math.inf).amax(1) if input.shape[1] else x.sum(1)
            return highest.masked_fill(real.sum(1) == 0, 0.0)
        total = (x * real if per_sample_weights is None else x * real * per_sample_weights[..., None]).sum(1)
        return total / real.sum(1).clamp(min=1) if module.mode == "mean" else total

    return forward


@unroll(nn.Bilinear)
def bilinear(module: nn.Bilinear, record: Record) -> Callable[..., Any]:
    """A dense layer on the products x_i y_j: x W y + b."""

    def forward(input1: Tensor, input2: Tensor) -> Tensor:
        products = (input1[..., :, None] * input2[..., None, :]).flatten(-2)
        return dense(module, record, products, "weight", None if module.bias is None else "bias")

    return forward
