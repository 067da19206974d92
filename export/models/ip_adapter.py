"""The networks of an IP-Adapter, under the names of its published files.

Twins: `ImageProjModel`, `Resampler`, `MLPProjModel` and their FaceID relatives of the authors' code, which diffusers
has as `ImageProjection`, `IPAdapterPlusImageProjection`, `IPAdapterFullImageProjection`,
`IPAdapterFaceIDImageProjection` and `IPAdapterFaceIDPlusImageProjection`; `to_k_ip` and `to_v_ip` of
`IPAdapterAttnProcessor2_0`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from export import composite as op
from export.errors import ExportError
from export.graphs import Dim, Port
from export.models.kv import pack

# Width of a resampler's heads, which no file says.
_HEAD = 64
# How many times wider its feed-forward layers are.
_WIDER = 4

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Projection:
    """What a projection is built from: its form, and sizes as its tensors have them.

    `context` is the width of its tokens, `image` of what the image encoder gives, `identity` of a face's embedding,
    `width` of its inner layers; 0 stands for what its form does not have. `tokens` of 0 are as many as come in.
    """

    form: str
    context: int
    tokens: int = 0
    image: int = 0
    identity: int = 0
    width: int = 0
    layers: int = 0
    heads: int = 0

    @property
    def inputs(self) -> tuple[Port, ...]:
        """The ports of its graph."""
        ports = {
            "id_embeds": Port("id_embeds", ("batch", self.identity)),
            "image_embeds": Port("image_embeds", ("batch", self.image)),
            "hidden_states": Port("hidden_states", ("batch", "tokens", self.image)),
            "shortcut_scale": Port("shortcut_scale", (1,)),
        }
        return tuple(ports[name] for name in _INPUTS[self.form])

    @property
    def output(self) -> tuple[Dim, int]:
        """Number and width of its tokens."""
        return self.tokens or "tokens", self.context

    def build(self) -> nn.Module:
        """The modules, named as in the file below `image_proj.`, under whatever tensor mode is active."""
        return _CLASSES[self.form](self).eval()


def recognise(shapes: Shapes) -> Projection:
    """Form and sizes of a projection, from the tensors below `image_proj.`."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in shapes:
            raise ExportError(f"tensor image_proj.{name} is missing; the file is not a whole IP-Adapter")
        return shapes[name]

    if "proj.weight" in shapes:
        (rows, image), (context,) = shape("proj.weight"), shape("norm.weight")
        return Projection("base", context, rows // context, image=image)
    if "proj.3.weight" in shapes:
        width, image = shape("proj.0.weight")
        return Projection("full", shape("proj.3.weight")[0], image=image, width=width)
    if "latents" in shapes:
        _, tokens, width = shape("latents")
        image, context = shape("proj_in.weight")[1], shape("norm_out.weight")[0]
        heads = shape("layers.0.0.to_q.weight")[0] // _HEAD
        return Projection("plus", context, tokens, image, width=width, layers=_depth(shapes, ""), heads=heads)
    if "norm.weight" not in shapes:
        raise ExportError(
            "its image_proj.* tensors are of no known form; known: IP-Adapter, -plus, -full, -faceid and -faceid-plusv2"
        )
    (context,), (width, identity) = shape("norm.weight"), shape("proj.0.weight")
    tokens = shape("proj.2.weight")[0] // context
    if "perceiver_resampler.proj_in.weight" not in shapes:
        return Projection("faceid", context, tokens, identity=identity, width=width)
    image = shape("perceiver_resampler.proj_in.weight")[1]
    heads = shape("perceiver_resampler.layers.0.0.to_q.weight")[0] // _HEAD
    layers = _depth(shapes, "perceiver_resampler.")
    return Projection("faceid-plusv2", context, tokens, image, identity, width, layers, heads)


def _depth(shapes: Shapes, prefix: str) -> int:
    start = f"{prefix}layers."
    return len({name.removeprefix(start).split(".")[0] for name in shapes if name.startswith(start)})


class _Base(nn.Module):
    def __init__(self, sizes: Projection) -> None:
        super().__init__()
        self.proj = nn.Linear(sizes.image, sizes.tokens * sizes.context)
        self.norm = nn.LayerNorm(sizes.context)
        self.sizes = sizes

    def forward(self, image_embeds: Tensor) -> Tensor:
        x = op.split_rows(op.linear(self.proj, image_embeds), self.sizes.context)
        return op.group_rows(op.layer_norm(self.norm, x), self.sizes.tokens)


def _mlp(net: nn.Sequential, x: Tensor) -> Tensor:
    return op.linear(net[2], op.gelu(op.linear(net[0], x)))


class _Full(nn.Module):
    def __init__(self, sizes: Projection) -> None:
        super().__init__()
        wide = nn.Linear(sizes.image, sizes.width)
        self.proj = nn.Sequential(wide, nn.GELU(), nn.Linear(sizes.width, sizes.context), nn.LayerNorm(sizes.context))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = op.layer_norm(self.proj[3], _mlp(self.proj, op.flatten(hidden_states)))
        return op.unflatten(x, hidden_states)


class _FaceId(nn.Module):
    def __init__(self, sizes: Projection) -> None:
        super().__init__()
        last = nn.Linear(sizes.width, sizes.tokens * sizes.context)
        self.proj = nn.Sequential(nn.Linear(sizes.identity, sizes.width), nn.GELU(), last)
        self.norm = nn.LayerNorm(sizes.context)
        self.sizes = sizes

    def rows(self, id_embeds: Tensor) -> Tensor:
        """`[batch*tokens, context]`."""
        return op.layer_norm(self.norm, op.split_rows(_mlp(self.proj, id_embeds), self.sizes.context))

    def forward(self, id_embeds: Tensor) -> Tensor:
        return op.group_rows(self.rows(id_embeds), self.sizes.tokens)


class _Attention(nn.Module):
    """Latents look at what the encoder saw and at each other. Twin: `PerceiverAttention`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * _HEAD, bias=False)
        self.to_kv = nn.Linear(width, 2 * heads * _HEAD, bias=False)
        self.to_out = nn.Linear(heads * _HEAD, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor, like: Tensor, count: int) -> Tensor:
        latents = op.layer_norm(self.norm2, latents)
        seen = op.unflatten(op.layer_norm(self.norm1, x), like)
        q = op.linear(self.to_q, latents)
        both = op.flatten(torch.cat([seen, op.group_rows(latents, count)], dim=1))
        k, v = op.halves(op.linear(self.to_kv, both))
        return op.linear(self.to_out, op.attention(q, k, v, like, self.heads, _HEAD**-0.5, causal=False))


class _Resampler(nn.Module):
    """Latents that are told in several rounds what an image encoder saw; without latents of its own, those given."""

    def __init__(self, sizes: Projection, width: int, *, latents: bool) -> None:
        super().__init__()
        self.sizes = sizes
        if latents:
            self.latents = nn.Parameter(torch.empty(1, sizes.tokens, width))
        self.proj_in = nn.Linear(sizes.image, width)
        self.proj_out = nn.Linear(width, sizes.context)
        self.norm_out = nn.LayerNorm(sizes.context)
        self.layers = nn.ModuleList(
            nn.ModuleList([_Attention(width, sizes.heads), _feed_forward(width)]) for _ in range(sizes.layers)
        )

    def rows(self, hidden_states: Tensor, latents: Tensor) -> Tensor:
        """Flat latents `[batch*tokens, width] -> [batch*tokens, context]`."""
        x = op.linear(self.proj_in, op.flatten(hidden_states))
        for attention, wide in self.layers:
            latents = latents + attention(x, latents, hidden_states, self.sizes.tokens)
            h = op.gelu(op.linear(wide[1], op.layer_norm(wide[0], latents)))
            latents = latents + op.linear(wide[3], h)
        return op.layer_norm(self.norm_out, op.linear(self.proj_out, latents))


def _feed_forward(width: int) -> nn.Sequential:
    inner = width * _WIDER
    layers = (nn.Linear(width, inner, bias=False), nn.GELU(), nn.Linear(inner, width, bias=False))
    return nn.Sequential(nn.LayerNorm(width), *layers)


class _Plus(_Resampler):
    def __init__(self, sizes: Projection) -> None:
        super().__init__(sizes, sizes.width, latents=True)

    def forward(self, hidden_states: Tensor) -> Tensor:
        latents = op.flatten(op.repeat(self.latents, hidden_states))
        return op.group_rows(self.rows(hidden_states, latents), self.sizes.tokens)


class _FaceIdPlus(_FaceId):
    """Version 2, the only one for SDXL: what the resampler finds, times a scale, is added to the face's own tokens."""

    def __init__(self, sizes: Projection) -> None:
        super().__init__(sizes)
        self.perceiver_resampler = _Resampler(sizes, sizes.context, latents=False)

    def forward(self, id_embeds: Tensor, hidden_states: Tensor, shortcut_scale: Tensor) -> Tensor:
        face = self.rows(id_embeds)
        found = self.perceiver_resampler.rows(hidden_states, face)
        return op.group_rows(face + shortcut_scale * found, self.sizes.tokens)


_CLASSES = {"base": _Base, "plus": _Plus, "full": _Full, "faceid": _FaceId, "faceid-plusv2": _FaceIdPlus}
_INPUTS = {
    "base": ("image_embeds",),
    "plus": ("hidden_states",),
    "full": ("hidden_states",),
    "faceid": ("id_embeds",),
    "faceid-plusv2": ("id_embeds", "hidden_states", "shortcut_scale"),
}


class Tokens(nn.Module):
    """A projection's inputs `-> ip_hidden_states [batch, tokens, ctx]`."""

    def __init__(self, sizes: Projection) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"image_proj": sizes.build()})

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net["image_proj"](*inputs)


def numbered(attentions: list[dict]) -> dict[int, list[int]]:
    """Width -> the numbers in the file of its layers: their places among all attentions, every second one of text."""
    widths: dict[int, list[int]] = {}
    number = 1
    for attention in attentions:
        for _ in range(attention["layers"]):
            widths.setdefault(attention["width"], []).append(number)
            number += 2
    return dict(sorted(widths.items()))


class KeysValues(nn.Module):
    """`encoder_hidden_states [batch, tokens, ctx] -> text_kv_<w> [2*layers, batch, tokens, w]`, widths ascending."""

    def __init__(self, context: int, attentions: list[dict]) -> None:
        super().__init__()
        self.widths = numbered(attentions)
        layers = {}
        for width, numbers in self.widths.items():
            for number in numbers:
                sides = {f"to_{side}_ip": nn.Linear(context, width, bias=False) for side in "kv"}
                layers[str(number)] = nn.ModuleDict(sides)
        self.net = nn.ModuleDict({"ip_adapter": nn.ModuleDict(layers)})

    def forward(self, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        layers = self.net["ip_adapter"]
        sides = [
            [(layers[str(number)]["to_k_ip"], layers[str(number)]["to_v_ip"]) for number in numbers]
            for numbers in self.widths.values()
        ]
        return pack(encoder_hidden_states, sides)
