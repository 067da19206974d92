"""The denoiser with K and V of the text, and of pictures, as inputs. Twin: `diffusers.UNet2DConditionModel.forward`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from export import composite as op
from export.errors import ExportError, refuse
from export.models import blocks

CLASS = "UNet2DConditionModel"

# config key -> the values that are supported, besides null
_ALLOWED: dict[str, tuple] = {
    "addition_embed_type": ("text_time",),
    "attention_type": ("default",),
    "class_embed_type": (),
    "num_class_embeds": (),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (),
    "encoder_hid_dim_type": (),
    "mid_block_only_cross_attention": (False,),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_cond_proj_dim": (),
    "time_embedding_type": ("positional",),
}
_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")


def check(config: dict) -> None:
    """Refuses every setting whose graph would not be SDXL's, naming key and value."""
    for key, allowed in _ALLOWED.items():
        value = config.get(key)
        if value is not None and value not in allowed:
            raise refuse("unet", key, value, ", ".join(map(repr, (None, *allowed))))
    for key in ("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"):
        if config.get(key) is None:
            raise refuse("unet", key, None, "the SDXL form (text_time with its dimensions)")
    for key, allowed in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        for value in config.get(key, ()):
            if value not in allowed:
                raise refuse("unet", key, value, ", ".join(allowed))
    only = config.get("only_cross_attention", False)
    if only is True or (isinstance(only, list) and any(only)):
        raise refuse("unet", "only_cross_attention", only, "False")
    context = config.get("cross_attention_dim")
    if isinstance(context, list) and len(set(context)) > 1:
        raise refuse("unet", "cross_attention_dim", context, "one width for all blocks")
    if config["block_out_channels"][0] % 2 or config["addition_time_embed_dim"] % 2:
        raise refuse("unet", "block_out_channels", config["block_out_channels"], "an even first width")


def overrides(config: dict) -> dict:
    """Settings to pass besides the config: older files name the number of heads `num_attention_heads`."""
    heads = config.get("num_attention_heads")
    return {} if heads is None else {"num_attention_heads": None, "attention_head_dim": heads}


def build(config: dict) -> UNet2DConditionModel:
    """The diffusers module, under whatever tensor mode is active."""
    return UNet2DConditionModel.from_config({**config, **overrides(config)}).eval()


def cross_attentions(unet: UNet2DConditionModel) -> list[tuple[str, Attention]]:
    """The attn2 modules in `attn_processors` order (down, up, mid): the order of K and V in the packed inputs."""
    names = [name.removesuffix(".processor") for name in unet.attn_processors]
    return [(name, unet.get_submodule(name)) for name in names if name.endswith(".attn2")]


def kv_layers(unet: UNet2DConditionModel) -> dict[int, list[tuple[str, Attention]]]:
    """Cross-attention layers by the width of their keys, widths ascending."""
    layers: dict[int, list[tuple[str, Attention]]] = {}
    for name, attn in cross_attentions(unet):
        if attn.to_k.out_features != attn.to_v.out_features:
            raise ExportError(f"unet: {name} has keys and values of different width, which is not supported")
        layers.setdefault(attn.to_k.out_features, []).append((name, attn))
    return dict(sorted(layers.items()))


def attentions(unet: UNet2DConditionModel) -> list[dict]:
    """Every module with cross-attention in `attn_processors` order: its name, width, layers, and downsampling."""
    found: dict[str, dict] = {}
    factors = dict(_factors(unet))
    for name, attn in cross_attentions(unet):
        module = name.partition(".transformer_blocks.")[0]
        block = module.partition(".attentions.")[0]
        new = {"name": module, "width": attn.to_k.out_features, "layers": 0, "factor": factors[block]}
        found.setdefault(module, new)["layers"] += 1
    return list(found.values())


def _factors(unet: UNet2DConditionModel) -> Iterator[tuple[str, int]]:
    """How many times smaller than the latents the images are that a block's attentions see."""
    factor = 1
    for i, block in enumerate(unet.down_blocks):
        yield f"down_blocks.{i}", factor
        factor *= 2 if block.downsamplers else 1
    yield "mid_block", factor
    for i, block in enumerate(unet.up_blocks):
        yield f"up_blocks.{i}", factor
        factor //= 2 if block.upsamplers else 1


def frequencies(steps: Timesteps) -> list[float]:
    """What `get_timestep_embedding` multiplies time with; f32 exactly as torch computes it. Needs real tensors."""
    half = steps.num_channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32)
    return (torch.exp(exponent / (half - steps.downscale_freq_shift)) * steps.scale).tolist()


def _time_mlp(layer: TimestepEmbedding, x: Tensor) -> Tensor:
    x = op.linear(layer.linear_1, x)
    if layer.act is not None:
        x = blocks.activate(layer.act, x)
    x = op.linear(layer.linear_2, x)
    return x if layer.post_act is None else blocks.activate(layer.post_act, x)


class Denoiser(nn.Module):
    """`(sample, timestep, text_embeds, time_ids, text_kv_<w>...) -> out_sample`, shapes as `export.graphs` has them.

    One that sees pictures takes `image_kv_<w>..., image_valid, image_area_<f>...` besides.
    """

    def __init__(
        self, net: UNet2DConditionModel, freqs: list[float], id_freqs: list[float], *, pictures: bool = False
    ) -> None:
        super().__init__()
        self.net = net
        self.freqs = freqs
        self.id_freqs = id_freqs
        self.pictures = pictures
        self.widths = {width: [name for name, _ in layers] for width, layers in kv_layers(net).items()}
        self.factors = {attention["name"]: attention["factor"] for attention in attentions(net)}

    def forward(self, sample: Tensor, timestep: Tensor, text_embeds: Tensor, time_ids: Tensor, *rest: Tensor) -> Tensor:
        net = self.net
        text, rest = rest[: len(self.widths)], rest[len(self.widths) :]
        walk = _Walk(self._layers(text), sample, self._pictures(rest) if self.pictures else None)
        temb = self._embedding(timestep, text_embeds, time_ids)
        x = net.conv_in(sample * 2 - 1.0 if net.config.center_input_sample else sample)
        skips = [x]
        for i, block in enumerate(net.down_blocks):
            x = walk.down(f"down_blocks.{i}", block, x, temb, skips)
        if net.mid_block is not None:
            x = walk.middle(net.mid_block, x, temb)
        for i, block in enumerate(net.up_blocks):
            x = walk.up(f"up_blocks.{i}", block, x, temb, skips)
        if net.conv_norm_out is not None:
            x = blocks.activate(net.conv_act, op.group_norm(net.conv_norm_out, x))
        return net.conv_out(x)

    def _layers(self, kv: Sequence[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """K and V of each cross-attention, from those packed by width."""
        layers: dict[str, tuple[Tensor, Tensor]] = {}
        for names, packed in zip(self.widths.values(), kv, strict=True):
            parts = op.unstack(packed)
            layers.update({name: (parts[2 * i], parts[2 * i + 1]) for i, name in enumerate(names)})
        return layers

    def _pictures(self, inputs: Sequence[Tensor]) -> _Pictures:
        count = len(self.widths)
        valid, areas = inputs[count], dict(zip(sorted(set(self.factors.values())), inputs[count + 1 :], strict=True))
        layers = self._layers([op.merge_sources(packed, valid) for packed in inputs[:count]])
        return _Pictures(layers, valid, {name: areas[factor] for name, factor in self.factors.items()})

    def _embedding(self, timestep: Tensor, text_embeds: Tensor, time_ids: Tensor) -> Tensor:
        net = self.net
        time = op.sinusoid(timestep.unsqueeze(0), self.freqs, cos_first=net.time_proj.flip_sin_to_cos)
        emb = _time_mlp(net.time_embedding, time)
        ids = op.sinusoid(time_ids, self.id_freqs, cos_first=net.add_time_proj.flip_sin_to_cos)
        emb = emb + _time_mlp(net.add_embedding, torch.cat([text_embeds, ids], dim=-1))
        return emb if net.time_embed_act is None else blocks.activate(net.time_embed_act, emb)


@dataclass(frozen=True)
class _Pictures:
    """What image prompts bring: K and V by the name of the cross-attention, and the area by the module's."""

    layers: dict[str, tuple[Tensor, Tensor]]
    valid: Tensor
    areas: dict[str, Tensor]


class _Walk:
    """One pass over the blocks; knows where each cross-attention finds its K and V."""

    def __init__(self, text: dict[str, tuple[Tensor, Tensor]], batch: Tensor, pictures: _Pictures | None) -> None:
        self.text = text
        self.batch = batch
        self.pictures = pictures

    def down(self, name: str, block: nn.Module, x: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        attentions = getattr(block, "attentions", None)
        for i, res in enumerate(block.resnets):
            x = blocks.resnet(res, x, temb)
            if attentions is not None:
                x = self.transformer(f"{name}.attentions.{i}", attentions[i], x)
            skips.append(x)
        for sampler in block.downsamplers or ():
            x = blocks.downsample(sampler, x)
            skips.append(x)
        return x

    def middle(self, block: nn.Module, x: Tensor, temb: Tensor) -> Tensor:
        x = blocks.resnet(block.resnets[0], x, temb)
        for i, res in enumerate(block.resnets[1:]):
            if block.attentions[i] is not None:
                x = self.transformer(f"mid_block.attentions.{i}", block.attentions[i], x)
            x = blocks.resnet(res, x, temb)
        return x

    def up(self, name: str, block: nn.Module, x: Tensor, temb: Tensor, skips: list[Tensor]) -> Tensor:
        attentions = getattr(block, "attentions", None)
        for i, res in enumerate(block.resnets):
            x = blocks.resnet(res, torch.cat([x, skips.pop()], dim=1), temb)
            if attentions is not None:
                x = self.transformer(f"{name}.attentions.{i}", attentions[i], x)
        for sampler in block.upsamplers or ():
            x = blocks.upsample(sampler, x, skips[-1])
        return x

    def transformer(self, name: str, net: Transformer2DModel, x: Tensor) -> Tensor:
        """`Transformer2DModel.forward` on continuous inputs."""
        h = op.group_norm(net.norm, x)
        if net.use_linear_projection:
            h = op.linear(net.proj_in, op.to_tokens(h))
        else:
            h = op.to_tokens(net.proj_in(h))
        for i, block in enumerate(net.transformer_blocks):
            h = self.block(f"{name}.transformer_blocks.{i}", block, h)
        if net.use_linear_projection:
            h = op.to_image(op.linear(net.proj_out, h), x)
        else:
            h = net.proj_out(op.to_image(h, x))
        return h + x

    def block(self, name: str, block: BasicTransformerBlock, x: Tensor) -> Tensor:
        """`BasicTransformerBlock.forward` in its layer-norm form."""
        attn = block.attn1
        h = op.layer_norm(block.norm1, x)
        k, v, q = (op.linear(side, h) for side in (attn.to_k, attn.to_v, attn.to_q))
        h = x + op.linear(attn.to_out[0], self.attend(attn, q, k, v))
        h = h + self.cross(f"{name}.attn2", block.attn2, op.layer_norm(block.norm2, h))
        return h + _feed_forward(block.ff, op.layer_norm(block.norm3, h))

    def attend(self, attn: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return op.attention(q, k, v, self.batch, attn.heads, attn.scale, causal=False)

    def cross(self, name: str, attn: Attention, x: Tensor) -> Tensor:
        """Text and pictures are asked with the same queries; twin of the sum: `IPAdapterAttnProcessor2_0`."""
        q = op.linear(attn.to_q, x)
        h = self.attend(attn, q, *self.text[name])
        if (seen := self.pictures) is not None:
            area = seen.areas[name.partition(".transformer_blocks.")[0]]
            h = h + op.image_attention(q, seen.layers[name], seen.valid, area, self.batch, attn.heads, attn.scale)
        return op.linear(attn.to_out[0], h)


def _feed_forward(ff: nn.Module, x: Tensor) -> Tensor:
    gate, out = ff.net[0], ff.net[-1]
    if type(gate).__name__ != "GEGLU":
        raise ExportError(f"unet: feed-forward activation {type(gate).__name__} is not supported; allowed: GEGLU")
    value, gates = op.halves(op.linear(gate.proj, x))
    return op.linear(out, value * op.gelu(gates))
