"""The demo model's networks with random weights, in the folders that `python -m export demo` takes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from conftest import ROOT
from export.demo.training import networks
from export.enter_demo import ADAPTERS, LORAS
from export.initial import initialise
from export.models import unet
from export.models.ip_adapter import KeysValues, Projection, Tokens
from PIL import Image
from safetensors.torch import save_file
from torch import nn

_INDEX = {
    "text_encoder": "CLIPTextModel",
    "text_encoder_2": "CLIPTextModelWithProjection",
}


def write(out: Path, seed: int = 0) -> None:
    """Writes everything; the refiner's text encoder and VAE are the base's."""
    torch.manual_seed(seed)
    base = _base(out / "demo")
    _adapters(base, out / "demo-adapters")
    for file, _ in LORAS.values():
        _lora(base, out / file)
    _refiner(out / "demo", out / "demo-refiner")
    pictures = out / "demo-pictures"
    pictures.mkdir()
    for number, name in enumerate(("face", "style")):
        Image.effect_noise((128, 128), 50 + 40 * number).convert("RGB").save(pictures / f"{name}.png")
    tile = {"caption": "text", "request": {"prompt": "a woman with red glasses", "model": "demo", "seed": 1}}
    sheet = {"columns": 1, "tiles": [tile]}
    (pictures / "sheet.json").write_text(json.dumps(sheet), encoding="utf-8")


def _net(net: nn.Module) -> nn.Module:
    initialise(net)
    return net.half()


def _base(folder: Path) -> nn.Module:
    for tokenizer in ("tokenizer", "tokenizer_2"):
        shutil.copytree(ROOT / "models" / "demo" / tokenizer, folder / tokenizer)
    nets = {name: _net(getattr(networks, name)()) for name in ("text_encoder", "text_encoder_2", "unet", "vae")}
    for name, net in nets.items():
        net.save_pretrained(folder / name)
    _index(folder, "StableDiffusionXLPipeline", _INDEX, {"force_zeros_for_empty_prompt": True})
    return nets["unet"]


def _refiner(base: Path, folder: Path) -> None:
    for name in ("text_encoder_2", "tokenizer_2", "vae"):
        shutil.copytree(base / name, folder / name)
    _net(networks.refiner()).save_pretrained(folder / "unet")
    encoders = {"text_encoder": None, "text_encoder_2": _INDEX["text_encoder_2"]}
    rest = {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True}
    _index(folder, "StableDiffusionXLImg2ImgPipeline", encoders, rest)


def _index(folder: Path, pipeline: str, encoders: dict[str, str | None], rest: dict) -> None:
    index: dict[str, object] = {"_class_name": pipeline, **rest}
    for (name, kind), tokenizer in zip(encoders.items(), ("tokenizer", "tokenizer_2"), strict=True):
        index[name] = ["transformers", kind] if kind else [None, None]
        index[tokenizer] = ["transformers", "CLIPTokenizer"] if kind else [None, None]
    index["unet"], index["vae"] = ["diffusers", "UNet2DConditionModel"], ["diffusers", "AutoencoderKL"]
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (folder / "scheduler").mkdir()
    config = {"_class_name": "EulerDiscreteScheduler", **networks.SCHEDULE}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "model_index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def _adapters(base: nn.Module, folder: Path) -> None:
    _net(networks.image_encoder()).save_pretrained(folder / "models" / "image_encoder")
    sizes = {"form": "plus", "image": networks.VISION_WIDTH, "tokens": networks.IMAGE_TOKENS}
    projection = Projection(**sizes, width=64, layers=2, heads=1, context=networks.CONTEXT)
    (folder / "sdxl_models").mkdir()
    for name in ADAPTERS:
        tensors: dict[str, torch.Tensor] = {}
        for part in (Tokens(projection), KeysValues(networks.CONTEXT, unet.attentions(base))):
            tensors.update(_net(part.net).state_dict())
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / "sdxl_models" / f"{name}_sdxl_vit-h.safetensors", {"format": "pt"})


def _lora(base: nn.Module, path: Path, rank: int = 4) -> None:
    tensors = {}
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear) and ".attn" in name:
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(rank, layer.in_features).half() / 16
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, rank).half() / 16
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path, {"format": "pt"})
