"""Small random IP-Adapters in the layout of the published ones, each for one of the small checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPVisionConfig

from export.initial import initialise
from export.models import image_encoder, unet
from export.models.ip_adapter import KeysValues, Projection, Tokens

ENCODER = "models/image_encoder"
FILES = {
    "ip-adapter": "sdxl_models/ip-adapter_sdxl_vit-h.safetensors",
    "ip-adapter-plus": "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
    "ip-adapter-plus-face": "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
    "ip-adapter-full": "sdxl_models/ip-adapter-full_sdxl_vit-h.safetensors",
    "ip-adapter-faceid": "ip-adapter-faceid_sdxl.safetensors",
    "ip-adapter-faceid-plusv2": "ip-adapter-faceid-plusv2_sdxl.safetensors",
}
"""Name of each adapter -> its file."""
TINY = tuple(name for name in FILES if name not in ("ip-adapter-full", "ip-adapter-faceid-plusv2"))
"""Those of the tiny model, the small ones."""
IDENTITY = 16
"""Width of the identities of faces, which is ArcFace's 512 in the published adapters."""


@dataclass(frozen=True)
class Adapters:
    """An image encoder and adapters that read it; `vision` is passed to transformers' config."""

    seed: int
    vision: dict
    plus_width: int
    plus_heads: int
    names: tuple[str, ...] = tuple(FILES)


def _vision(width: int, layers: int, heads: int, projection: int, **settings: object) -> dict:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "projection_dim": projection}
    return {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads, "hidden_act": "gelu", **settings}


_SMALL = {"image_size": 32, "patch_size": 8}

ADAPTERS: dict[str, Adapters] = {
    "alpha-adapters": Adapters(51, _vision(16, 3, 2, 12, image_size=28, patch_size=14), 24, 2),
    "beta-adapters": Adapters(52, _vision(20, 2, 5, 8, hidden_act="quick_gelu", **_SMALL), 16, 1),
    "tiny-adapters": Adapters(53, _vision(8, 2, 2, 12, **_SMALL), 8, 1, TINY),
}


def projection(adapters: Adapters, name: str, context: int) -> Projection:
    """The sizes of one adapter's projection."""
    width, pooled = adapters.vision["hidden_size"], adapters.vision["projection_dim"]
    plus = {"tokens": 16, "width": adapters.plus_width, "layers": 4, "heads": adapters.plus_heads}
    face = {"tokens": 4, "identity": IDENTITY, "width": 2 * IDENTITY}
    forms = {
        "ip-adapter": {"form": "base", "image": pooled, "tokens": 4},
        "ip-adapter-full": {"form": "full", "image": width, "width": width},
        "ip-adapter-faceid": {"form": "faceid", **face},
        "ip-adapter-faceid-plusv2": {"form": "faceid-plusv2", **face, "image": width, "layers": 4, "heads": 1},
    }
    return Projection(**forms.get(name, {"form": "plus", "image": width, **plus}), context=context)


def write(adapters: Adapters, net: nn.Module, half: bool, out: Path) -> None:
    """Writes encoder and adapters for the UNet `net` into the folder `out`."""
    torch.manual_seed(adapters.seed)
    encoder = image_encoder.build(CLIPVisionConfig(**adapters.vision).to_dict())
    initialise(encoder)
    (encoder.half() if half else encoder).save_pretrained(out / ENCODER)
    context, attentions = net.config.cross_attention_dim, unet.attentions(net)
    for name in adapters.names:
        tensors: dict[str, torch.Tensor] = {}
        for part in (Tokens(projection(adapters, name, context)), KeysValues(context, attentions)):
            initialise(part.net)
            tensors.update(part.net.state_dict())
        kind = torch.float16 if half else torch.float32
        path = out / FILES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.to(kind).contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})
