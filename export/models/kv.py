"""Keys and values of every cross-attention layer, once per prompt. Twin: `to_k`, `to_v` of diffusers' `Attention`."""

from __future__ import annotations

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
        x = op.flatten(encoder_hidden_states)
        packed = []
        for layers in kv_layers(self.net).values():
            parts = [op.linear(side, x) for _, attn in layers for side in (attn.to_k, attn.to_v)]
            packed.append(op.stack(parts, encoder_hidden_states))
        return tuple(packed)
