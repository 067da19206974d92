"""Composite nodes of the `tronie` domain: what the networks emit while traced and the dialects lower to ONNX.

Every function returns a (fake) tensor of the right shape and records one node. Tokens travel flat, `[batch*tokens,
width]`, so that a Linear is a single Gemm on the weight as stored; `like` is the tensor whose leading dimension is the
batch, needed wherever the batch has to be told apart from the tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.onnx.ops import symbolic, symbolic_multi_out

DOMAIN = "tronie"


def _node(name: str, inputs: Sequence[Tensor | None], shape: Sequence[int], attrs: dict | None = None) -> Tensor:
    return symbolic(f"{DOMAIN}::{name}", inputs, attrs=attrs or {}, dtype=torch.float32, shape=shape, version=1)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """`x [rows, in] -> [rows, out]` with the weight `[out, in]` as stored."""
    inputs = (x, layer.weight) if layer.bias is None else (x, layer.weight, layer.bias)
    return _node("Linear", inputs, (x.shape[0], layer.out_features))


def group_norm(layer: nn.GroupNorm, x: Tensor) -> Tensor:
    """`x [batch, channels, height, width]`, normalised over each group."""
    attrs = {"groups": layer.num_groups, "epsilon": float(layer.eps)}
    return _node("GroupNorm", (x, layer.weight, layer.bias), x.shape, attrs)


def layer_norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    """`x [rows, width]`, normalised over the last axis."""
    return _node("LayerNorm", (x, layer.weight, layer.bias), x.shape, {"epsilon": float(layer.eps)})


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """`torch.nn.functional.gelu`."""
    return _node("Gelu", (x,), x.shape, {"approximate": approximate})


def attention(q: Tensor, k: Tensor, v: Tensor, like: Tensor, heads: int, scale: float, *, causal: bool) -> Tensor:
    """Softmax attention of flat `q [batch*tokens, width]`; `k`, `v` are flat or `[batch, tokens, width]`."""
    attrs = {"heads": heads, "scale": float(scale), "causal": int(causal)}
    return _node("Attention", (q, k, v, like), (q.shape[0], v.shape[-1]), attrs)


def merge_sources(x: Tensor, valid: Tensor) -> Tensor:
    """`x [n, batch, sources, tokens, width] -> [n, batch*sources, tokens, width]`; `valid [sources, tokens]`."""
    n, batch, sources, tokens, width = x.shape
    return _node("MergeSources", (x, valid), (n, batch * sources, tokens, width), {"width": width})


def image_attention(
    q: Tensor, kv: tuple[Tensor, Tensor], valid: Tensor, area: Tensor, like: Tensor, heads: int, scale: float
) -> Tensor:
    """What every source of an image prompt adds to an attention: one softmax each, weighted by its area, and summed.

    Flat `q [batch*positions, width]`, k and v `[batch*sources, tokens, width]`, `valid [sources, tokens]` with 0 for
    padding, `area [sources, positions]`; returns `[batch*positions, width]`.
    """
    attrs = {"heads": heads, "scale": float(scale)}
    return _node("ImageAttention", (q, *kv, valid, area, like), (q.shape[0], q.shape[1]), attrs)


def unstack(x: Tensor) -> Sequence[Tensor]:
    """`x [n, batch, tokens, width]` cut along its first axis into n tensors `[batch, tokens, width]`."""
    n, *rest = x.shape
    if n == 1:
        return (_node("Unstack", (x,), rest),)
    return symbolic_multi_out(f"{DOMAIN}::Unstack", (x,), dtypes=[torch.float32] * n, shapes=[rest] * n, version=1)


def halves(x: Tensor) -> Sequence[Tensor]:
    """x cut in two along axis 1."""
    half = (x.shape[0], x.shape[1] // 2, *x.shape[2:])
    return symbolic_multi_out(f"{DOMAIN}::Halves", (x,), dtypes=[torch.float32] * 2, shapes=[half] * 2, version=1)


def stack(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """n flat tensors `[batch*tokens, width]` -> `[n, batch, tokens, width]`."""
    return _node("Stack", (*parts, like), (len(parts), like.shape[0], like.shape[1], parts[0].shape[1]))


def to_tokens(x: Tensor) -> Tensor:
    """`[batch, channels, height, width] -> [batch*height*width, channels]`."""
    batch, channels, height, width = x.shape
    return _node("ToTokens", (x,), (batch * height * width, channels))


def to_image(x: Tensor, like: Tensor) -> Tensor:
    """`[batch*height*width, channels] -> [batch, channels, height, width]`, the sizes taken from `like`."""
    return _node("ToImage", (x, like), (like.shape[0], x.shape[1], like.shape[2], like.shape[3]), {"width": x.shape[1]})


def flatten(x: Tensor) -> Tensor:
    """`[batch, tokens, width] -> [batch*tokens, width]`."""
    return _node("Flatten", (x,), (x.shape[0] * x.shape[1], x.shape[2]), {"width": x.shape[2]})


def unflatten(x: Tensor, like: Tensor) -> Tensor:
    """`[batch*tokens, width] -> [batch, tokens, width]`, the batch taken from `like [batch, tokens, ...]`."""
    return _node("Unflatten", (x, like), (like.shape[0], like.shape[1], x.shape[1]), {"width": x.shape[1]})


def split_rows(x: Tensor, width: int) -> Tensor:
    """`[rows, n*width] -> [rows*n, width]`."""
    return _node("SplitRows", (x,), (x.shape[0] * (x.shape[1] // width), width), {"width": width})


def group_rows(x: Tensor, count: int) -> Tensor:
    """`[batch*count, width] -> [batch, count, width]`."""
    return _node("GroupRows", (x,), (x.shape[0] // count, count, x.shape[1]), {"count": count, "width": x.shape[1]})


def repeat(table: Tensor, like: Tensor) -> Tensor:
    """A parameter `[width]` or `[1, tokens, width]` for each of the batch of `like`: `[batch, tokens, width]`."""
    tokens = table.shape[1] if table.dim() == 3 else 1
    shape = (like.shape[0], tokens, table.shape[-1])
    return _node("Repeat", (table, like), shape, {"tokens": tokens, "width": table.shape[-1]})


def first(x: Tensor, like: Tensor) -> Tensor:
    """The first row of each of the batch of `like`, of flat `x [batch*tokens, width]`."""
    return _node("First", (x, like), (like.shape[0], x.shape[1]), {"width": x.shape[1]})


def upsample(x: Tensor, like: Tensor | None = None) -> Tensor:
    """Nearest neighbour to the height and width of `like`, or by two."""
    if like is None:
        return _node("Upsample", (x,), (x.shape[0], x.shape[1], x.shape[2] * 2, x.shape[3] * 2))
    return _node("Upsample", (x, like), (x.shape[0], x.shape[1], like.shape[2], like.shape[3]))


def upsample_conv(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Nearest neighbour by two, then a 3x3 convolution with one row and column of zeros around."""
    batch, _, height, width = x.shape
    inputs = (x, conv.weight) if conv.bias is None else (x, conv.weight, conv.bias)
    return _node("UpsampleConv", inputs, (batch, conv.out_channels, height * 2, width * 2))


def sinusoid(x: Tensor, frequencies: Sequence[float], *, cos_first: bool) -> Tensor:
    """`x [rows, n] -> [rows, n * 2 * len(frequencies)]`: cos and sin of x times each frequency, in flat order of x."""
    attrs = {"frequencies": list(frequencies), "cos_first": int(cos_first), "count": x.shape[1]}
    return _node("Sinusoid", (x,), (x.shape[0], x.shape[1] * 2 * len(frequencies)), attrs)


def embed(table: nn.Embedding, ids: Tensor) -> Tensor:
    """Rows of the table, `[batch, tokens, width]`."""
    return _node("Embed", (table.weight, ids), (*ids.shape, table.embedding_dim))


def positions(table: nn.Embedding, ids: Tensor) -> Tensor:
    """The first `tokens` rows of the table, `[tokens, width]`."""
    return _node("Positions", (table.weight, ids), (ids.shape[1], table.embedding_dim))


def pick_end(x: Tensor, ids: Tensor, end: int) -> Tensor:
    """The row of flat `x [batch*tokens, width]` at the end token: first `end`, or first largest id when end is -1."""
    return _node("PickEnd", (x, ids), (ids.shape[0], x.shape[1]), {"end": end, "width": x.shape[1]})
