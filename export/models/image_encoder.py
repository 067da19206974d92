"""The encoder of pictures for image prompts. Twin: `transformers.CLIPVisionModelWithProjection`."""

from __future__ import annotations

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from export import composite as op
from export.errors import ExportError, refuse
from export.models.text_encoder import clip_layer

CLASS = "CLIPVisionModelWithProjection"
# transformers' name of the config's kind.
_KIND = "clip_vision_model"


def check(component: str, config: dict) -> None:
    """Refuses what is no CLIP vision model, and sizes that one cannot have."""
    if config.get("model_type", _KIND) != _KIND:
        raise refuse(component, "model_type", config["model_type"], _KIND)
    names = config.get("architectures") or [CLASS]
    if CLASS not in names:
        raise refuse(component, "architectures", names, CLASS)
    usual = CLIPVisionConfig()
    width, heads = (config.get(key, getattr(usual, key)) for key in ("hidden_size", "num_attention_heads"))
    if not isinstance(width, int) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise refuse(component, "num_attention_heads", heads, f"a divisor of hidden_size {width}")
    try:
        parsed = parse(config)
    except (StrictDataclassError, TypeError, ValueError) as error:
        raise ExportError(f"{component}/config.json: is no {CLASS}'s: {' '.join(str(error).split())}") from error
    if parsed.num_hidden_layers < 1:
        raise refuse(component, "num_hidden_layers", parsed.num_hidden_layers, "1 or more")
    if parsed.num_channels != 3:
        raise refuse(component, "num_channels", parsed.num_channels, "3")
    if parsed.image_size < parsed.patch_size:
        raise refuse(component, "image_size", parsed.image_size, f"patch_size {parsed.patch_size} or more")


def parse(config: dict) -> CLIPVisionConfig:
    """The config with transformers' defaults filled in."""
    return CLIPVisionConfig.from_dict(config)


def sizes(config: dict) -> dict[str, int]:
    """Edge of the picture, tokens and their width, width of the projection."""
    parsed = parse(config)
    tokens = (parsed.image_size // parsed.patch_size) ** 2 + 1
    return {
        "size": parsed.image_size,
        "tokens": tokens,
        "width": parsed.hidden_size,
        "projection": parsed.projection_dim,
    }


def build(config: dict) -> CLIPVisionModelWithProjection:
    """The transformers module, under whatever tensor mode is active."""
    return CLIPVisionModelWithProjection(parse(config)).eval()


class ImageEncoder(nn.Module):
    """`pixel_values [batch, 3, size, size] -> image_embeds [batch, projection], hidden_states [batch, tokens, width]`.

    The hidden states are those before the last layer, without the last norm.
    """

    def __init__(self, net: CLIPVisionModelWithProjection) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        vision, places = self.net.vision_model, self.net.vision_model.embeddings
        patches = op.group_rows(op.to_tokens(places.patch_embedding(pixel_values)), places.num_patches)
        tokens = torch.cat([op.repeat(places.class_embedding, pixel_values), patches], dim=1)
        # transformers' spelling.
        x = op.layer_norm(vision.pre_layrnorm, op.flatten(tokens + places.position_embedding.weight))
        layers = list(vision.encoder.layers)
        for layer in layers[:-1]:
            x = clip_layer(layer, x, pixel_values, causal=False)
        hidden = op.group_rows(x, places.num_positions)
        x = op.first(clip_layer(layers[-1], x, pixel_values, causal=False), pixel_values)
        return op.linear(self.net.visual_projection, op.layer_norm(vision.post_layernorm, x)), hidden
