"""Scales of image prompts by attention, as ``set_ip_adapter_scale`` of diffusers' SDXL pipeline gives them to a UNet.

The UNets are built from their configs on torch's meta device, with IP-Adapter's processors in every cross-attention.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.loaders.ip_adapter import IPAdapterMixin
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

REPOSITORY = Path(__file__).resolve().parents[2]

CONFIGS = {
    "sdxl-base": REPOSITORY / "export" / "configs" / "sdxl-base" / "unet" / "config.json",
    "sdxl-refiner": REPOSITORY / "export" / "configs" / "sdxl-refiner" / "unet" / "config.json",
    "tiny": REPOSITORY / "tests" / "models" / "tiny" / "unet" / "config.json",
}
"""Configs of the UNets by name; the refiner's has cross-attention in other blocks."""

STYLE = {"up": {"block_0": [0.0, 1.0, 0.0]}}
LAYOUT = {"down": {"block_2": [0.0, 1.0]}}

NAMED: dict[str, dict[str, Any]] = {"style": STYLE, "layout": LAYOUT, "style+layout": {**STYLE, **LAYOUT}}
"""tronie's names and InstantStyle's dictionaries, as diffusers documents them."""

SCALES: list[Any] = [
    0.7,
    0,
    -0.25,
    {},
    {"mid": 0.5},
    {"mid": [0.25]},
    {"down": 2, "mid": 3, "up": {"block_0": 4, "block_1": [5, 6, 7]}},
    {"down": 0.125},
    {"up": [1, 2, 3]},
    {"up": [-1.5]},
    {"down": {"block_1": 0.5}},
    {"down": {"block_2": [0.3]}},
    {"down": {"block_1": [0.1, 0.2], "block_2": [0.3, 0.4]}, "up": {"block_1": 1}},
]

REFUSED: list[Any] = [
    {"mid": [1, 2]},
    {"mid": []},
    {"up": [1, 2]},
    {"up": {"block_0": [1, 2]}},
    {"down": {"block_1": []}},
    {"down": {"block_2": [1, 2, 3]}},
]
"""Lists of the wrong length, which diffusers refuses too."""


def _unet(config: Path) -> diffusers.UNet2DConditionModel:
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel.from_config(json.loads(config.read_text()))
        modules = dict(unet.named_modules())
        processors = dict(unet.attn_processors)
        for name in processors:
            attention = modules[name.removesuffix(".processor")]
            if name.endswith("attn2.processor"):
                width, text = attention.to_q.in_features, attention.to_k.in_features
                processors[name] = IPAdapterAttnProcessor2_0(width, text)
        unet.set_attn_processor(processors)
    return unet


def _attentions(unet: diffusers.UNet2DConditionModel) -> dict[str, list[IPAdapterAttnProcessor2_0]]:
    """The processors of each module with cross-attention, in the order of ``attn_processors``."""
    found: dict[str, list[IPAdapterAttnProcessor2_0]] = {}
    for name, processor in unet.attn_processors.items():
        if isinstance(processor, IPAdapterAttnProcessor2_0):
            found.setdefault(name.split(".transformer_blocks.")[0], []).append(processor)
    return found


def _expand(unet: diffusers.UNet2DConditionModel, scale: Any) -> list[float]:
    pipeline = SimpleNamespace(unet=unet, unet_name="unet")
    # Nothing of the scale before may be left.
    IPAdapterMixin.set_ip_adapter_scale(pipeline, 0.0)
    IPAdapterMixin.set_ip_adapter_scale(pipeline, scale)
    scales = []
    for name, processors in _attentions(unet).items():
        of_module = {processor.scale[0] for processor in processors}
        if len(of_module) != 1:
            raise AssertionError(f"the layers of {name} have scales {of_module}")
        scales.append(float(of_module.pop()))
    return scales


def _fits(unet: diffusers.UNet2DConditionModel, scale: Any) -> bool:
    """Whether the UNet has all blocks that a scale names: diffusers ignores the others, tronie refuses them."""
    if not isinstance(scale, dict):
        return True
    sides = {"down": unet.down_blocks, "up": unet.up_blocks}
    named = [(sides[side], int(block.removeprefix("block_")))
             for side, given in scale.items() if isinstance(given, dict) for block in given]  # fmt: skip
    return all(hasattr(blocks[at], "attentions") for blocks, at in named)


def _model(config: Path) -> dict[str, Any]:
    unet = _unet(config)
    refused = [scale for scale in REFUSED if _fits(unet, scale)]
    for scale in refused:
        try:
            _expand(unet, scale)
        except ValueError:
            continue
        raise AssertionError(f"diffusers takes {scale}")
    cases = [(scale, scale) for scale in SCALES] + list(NAMED.items())
    cases = [(scale, twin) for scale, twin in cases if _fits(unet, twin)]
    return {
        "attentions": [
            {"name": name, "width": processors[0].hidden_size, "layers": len(processors)}
            for name, processors in _attentions(unet).items()
        ],
        "cases": [{"scale": scale, "expanded": _expand(unet, twin)} for scale, twin in cases],
        "refused": refused,
    }


def write(out: Path) -> list[Path]:
    """Write ``image-scales.json``."""
    document = {
        "made_by": "python -m export.golden image-scales",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "tolerance": "none",
        "models": {name: _model(config) for name, config in CONFIGS.items()},
    }
    path = out / "image-scales.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return [path]
