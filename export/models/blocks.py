"""Forward passes of the diffusers blocks that UNet and VAE share, written over diffusers' own submodules.

Twin: `diffusers.models.resnet`, `diffusers.models.downsampling`, `diffusers.models.upsampling`.
"""

from __future__ import annotations

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from export import composite as op
from export.errors import ExportError


def activate(layer: nn.Module, x: Tensor) -> Tensor:
    """Applies an activation; GELU becomes one node, the others export as they are."""
    if isinstance(layer, nn.GELU):
        return op.gelu(x, layer.approximate)
    return layer(x)


def resnet(block: ResnetBlock2D, x: Tensor, temb: Tensor | None) -> Tensor:
    """`ResnetBlock2D.forward` without resampling; `temb [1 or batch, time width]`."""
    h = activate(block.nonlinearity, op.group_norm(block.norm1, x))
    h = block.conv1(h)
    shift = None
    if block.time_emb_proj is not None:
        emb = temb if block.skip_time_act else activate(block.nonlinearity, temb)
        shift = op.linear(block.time_emb_proj, emb).unsqueeze(-1).unsqueeze(-1)
    if block.time_embedding_norm == "scale_shift":
        scale, shift = op.halves(shift)
        h = op.group_norm(block.norm2, h) * (scale + 1) + shift
    else:
        h = op.group_norm(block.norm2, h if shift is None else h + shift)
    h = block.conv2(activate(block.nonlinearity, h))
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x)
    h = x + h
    return h if block.output_scale_factor == 1 else h / block.output_scale_factor


def downsample(block: Downsample2D, x: Tensor) -> Tensor:
    """`Downsample2D.forward` for the convolution form; padding 0 means one row and column after the last."""
    if not block.use_conv or block.norm is not None:
        raise ExportError("a down block resamples without convolution, which is not supported")
    if block.padding == 0:
        x = torch.nn.functional.pad(x, (0, 1, 0, 1), mode="constant", value=0.0)
    return block.conv(x)


def upsample(block: Upsample2D, x: Tensor, like: Tensor | None = None) -> Tensor:
    """`Upsample2D.forward`; the size always comes from `like` when it is given, so odd sizes are exact."""
    if not block.use_conv or block.use_conv_transpose or block.norm is not None:
        raise ExportError("an up block resamples without convolution, which is not supported")
    conv = block.conv
    if like is None and _is_plain(conv):
        return op.upsample_conv(conv, x)
    return conv(op.upsample(x, like))


def _is_plain(conv: nn.Conv2d) -> bool:
    """Whether it is the 3x3 convolution that keeps sizes, the only one that diffusers builds here."""
    form = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    return form == ((3, 3), (1, 1), (1, 1), (1, 1), 1)
