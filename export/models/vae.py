"""The autoencoder's two halves. Twin: `diffusers.AutoencoderKL` (`encode` up to the moments, `decode`)."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from export import composite as op
from export.errors import refuse
from export.models import blocks

CLASS = "AutoencoderKL"
_LOGVAR = (-30.0, 20.0)


def check(config: dict) -> None:
    """Refuses block types other than the plain convolutional ones."""
    kinds = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
    for key, allowed in kinds.items():
        for value in config.get(key, ()):
            if value != allowed:
                raise refuse("vae", key, value, allowed)
        if len(config.get(key, ())) != len(config["block_out_channels"]):
            raise refuse("vae", key, config.get(key), f"{len(config['block_out_channels'])} blocks")
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            raise refuse("vae", key, config[key], "3")


def build(config: dict) -> AutoencoderKL:
    """The diffusers module, under whatever tensor mode is active."""
    return AutoencoderKL.from_config(config).eval()


class Decoder(nn.Module):
    """`latent_sample [batch, C, height, width] -> sample [batch, 3, Height, Width]`."""

    def __init__(self, net: AutoencoderKL) -> None:
        super().__init__()
        self.net = net

    def forward(self, latent_sample: Tensor) -> Tensor:
        net, x = self.net.decoder, latent_sample
        if self.net.post_quant_conv is not None:
            x = self.net.post_quant_conv(x)
        x = _middle(net.mid_block, net.conv_in(x))
        for block in net.up_blocks:
            for res in block.resnets:
                x = blocks.resnet(res, x, None)
            for sampler in block.upsamplers or ():
                x = blocks.upsample(sampler, x)
        return net.conv_out(blocks.activate(net.conv_act, op.group_norm(net.conv_norm_out, x)))


class Encoder(nn.Module):
    """`sample [batch, 3, Height, Width] -> mean, logvar [batch, C, height, width]`."""

    def __init__(self, net: AutoencoderKL) -> None:
        super().__init__()
        self.net = net

    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        net, x = self.net.encoder, self.net.encoder.conv_in(sample)
        for block in net.down_blocks:
            for res in block.resnets:
                x = blocks.resnet(res, x, None)
            for sampler in block.downsamplers or ():
                x = blocks.downsample(sampler, x)
        x = _middle(net.mid_block, x)
        x = net.conv_out(blocks.activate(net.conv_act, op.group_norm(net.conv_norm_out, x)))
        if self.net.quant_conv is not None:
            x = self.net.quant_conv(x)
        mean, logvar = op.halves(x)
        return mean, torch.clamp(logvar, *_LOGVAR)


def _middle(block: nn.Module, x: Tensor) -> Tensor:
    x = blocks.resnet(block.resnets[0], x, None)
    for attn, res in zip(block.attentions, block.resnets[1:], strict=True):
        if attn is not None:
            x = _attend(attn, x)
        x = blocks.resnet(res, x, None)
    return x


def _attend(attn: Attention, x: Tensor) -> Tensor:
    h = op.to_tokens(op.group_norm(attn.group_norm, x))
    q, k, v = (op.linear(side, h) for side in (attn.to_q, attn.to_k, attn.to_v))
    h = op.attention(q, k, v, x, attn.heads, attn.scale, causal=False)
    h = op.to_image(op.linear(attn.to_out[0], h), x) + x
    return h if attn.rescale_output_factor == 1 else h / attn.rescale_output_factor
