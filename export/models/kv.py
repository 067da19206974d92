"""Keys and values of every cross-attention layer, once per prompt. Twin: `to_k`, `to_v` of diffusers' `Attention`."""

from __future__ import annotations

from collections.abc import Iterable

from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from export import composite as op
from export.models.unet import kv_layers


class TextKeysValues(nn.Module):
    """`encoder_hidden_states [batch, tokens, ctx] -> text_kv_<w> [2*layers, batch, tokens, w]`, widths ascending."""

    def __init__(self, net: UNet2DConditionModel) -> None:
        super().__init__()
        self.net = net

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        widths = kv_layers(self.net).values()
        return pack(encoder_hidden_states, [[(attn.to_k, attn.to_v) for _, attn in layers] for layers in widths])


def pack(tokens: Tensor, widths: Iterable[list[tuple[nn.Linear, nn.Linear]]]) -> tuple[Tensor, ...]:
    """`tokens [batch, tokens, ctx]` through each layer's two projections, stacked for each width."""
    x = op.flatten(tokens)
    return tuple(op.stack([op.linear(side, x) for layer in layers for side in layer], tokens) for layers in widths)
