"""How random weights are drawn: activations stay near one through any depth, and every input moves the output."""

from __future__ import annotations

import torch
from torch import nn

# Tokens that a layer has beside its weights: a vision model's first, a resampler's.
_TOKENS = ("class_embedding", "latents")
# Pictures' contrast comes from the autoencoder's last convolution, so it starts smaller than the others.
_QUIETER = {"decoder.conv_out.weight": 0.5}


def law(net: nn.Module, name: str) -> tuple[float, float] | None:
    """Mean and deviation to draw one tensor of `net.state_dict()` with, or None if its layer is of no known kind."""
    path, _, kind = name.rpartition(".")
    layer = net.get_submodule(path)
    if kind in _TOKENS:
        return 0.0, 0.7
    if isinstance(layer, (nn.Linear, nn.Conv2d)):
        if kind == "bias":
            return 0.0, 0.1
        return 0.0, _QUIETER.get(name, 1.0) * layer.weight.shape[1:].numel() ** -0.5
    if isinstance(layer, nn.Embedding):
        return 0.0, 0.7
    if isinstance(layer, (nn.GroupNorm, nn.LayerNorm)):
        return (0.0 if kind == "bias" else 1.0), 0.1
    return None


def initialise(net: nn.Module) -> None:
    """Draws every known layer's weights with torch's generator; other layers keep what they were built with."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if (normal := law(net, name)) is not None:
                parameter.normal_(*normal)
