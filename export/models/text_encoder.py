"""CLIP text encoders, read at hidden_states[-2]. Twin: `transformers.CLIPTextModel`, `CLIPTextModelWithProjection`."""

from __future__ import annotations

from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.activations import GELUActivation

from export import composite as op
from export.errors import ExportError, refuse

CLASSES = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}

# Configs written before transformers 4.31 carry 2 here although the tokenizer ends with another id; transformers then
# takes the largest id of the sequence.
_LARGEST_ID = 2


def check(component: str, config: dict) -> None:
    """Refuses sizes that cannot be a CLIP text encoder."""
    width, heads = config["hidden_size"], config["num_attention_heads"]
    if width % heads:
        raise refuse(component, "num_attention_heads", heads, f"a divisor of hidden_size {width}")
    if config["num_hidden_layers"] < 1:
        raise refuse(component, "num_hidden_layers", config["num_hidden_layers"], "1 or more")


def parse(config: dict) -> CLIPTextConfig:
    """The config with transformers' defaults filled in."""
    return CLIPTextConfig.from_dict(config)


def build(class_name: str, config: dict) -> nn.Module:
    """The transformers module, under whatever tensor mode is active."""
    if class_name not in CLASSES:
        raise ExportError(f"text encoder class {class_name!r} is not supported; allowed: {', '.join(CLASSES)}")
    return CLASSES[class_name](parse(config)).eval()


class TextEncoder(nn.Module):
    """`input_ids [batch, tokens] -> hidden_states` and, with a projection, `text_embeds [batch, projection]`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        # transformers 5 dropped the `text_model` level of CLIPTextModel but kept it in CLIPTextModelWithProjection.
        text = getattr(self.net, "text_model", self.net)
        tokens = op.embed(text.embeddings.token_embedding, input_ids)
        x = op.flatten(tokens + op.positions(text.embeddings.position_embedding, input_ids))
        layers = list(text.encoder.layers)
        for layer in layers[:-1]:
            x = clip_layer(layer, x, input_ids, causal=True)
        hidden = op.unflatten(x, input_ids)
        projection = getattr(self.net, "text_projection", None)
        if projection is None:
            return (hidden,)
        x = clip_layer(layers[-1], x, input_ids, causal=True)
        end = text.eos_token_id
        row = op.pick_end(x, input_ids, -1 if end == _LARGEST_ID else end)
        return hidden, op.linear(projection, op.layer_norm(text.final_layer_norm, row))


def clip_layer(layer: nn.Module, x: Tensor, like: Tensor, *, causal: bool) -> Tensor:
    """`CLIPEncoderLayer.forward` of flat `x [batch*tokens, width]`; text and pictures have the same."""
    attn, mlp = layer.self_attn, layer.mlp
    h = op.layer_norm(layer.layer_norm1, x)
    q, k, v = (op.linear(side, h) for side in (attn.q_proj, attn.k_proj, attn.v_proj))
    x = x + op.linear(attn.out_proj, op.attention(q, k, v, like, attn.num_heads, attn.scale, causal=causal))
    h = op.linear(mlp.fc1, op.layer_norm(layer.layer_norm2, x))
    exact = isinstance(mlp.activation_fn, (nn.GELU, GELUActivation))
    h = op.gelu(h) if exact else mlp.activation_fn(h)
    return x + op.linear(mlp.fc2, h)
