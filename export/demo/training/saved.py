"""The trained networks as files, in the layouts in which models are published."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

from export.demo import people, styles
from export.demo.training import networks
from export.demo.training.texts import TOKENIZER
from export.demo.training.world import reference

SHEET = Path("models/demo-pictures/sheet.json")
ENCODER = "models/image_encoder"
FILES = {
    "style": "sdxl_models/ip-adapter-plus_sdxl_vit-h.safetensors",
    "face": "sdxl_models/ip-adapter-plus-face_sdxl_vit-h.safetensors",
}
_RENAMED = (
    (r"layers\.(\d+)\.ln0", r"layers.\1.0.norm1"),
    (r"layers\.(\d+)\.ln1", r"layers.\1.0.norm2"),
    (r"layers\.(\d+)\.attn\.to_q", r"layers.\1.0.to_q"),
    (r"layers\.(\d+)\.attn\.to_out\.0", r"layers.\1.0.to_out"),
    (r"layers\.(\d+)\.ff\.0", r"layers.\1.1.0"),
    (r"layers\.(\d+)\.ff\.1\.net\.0\.proj", r"layers.\1.1.1"),
    (r"layers\.(\d+)\.ff\.1\.net\.2", r"layers.\1.1.3"),
)
"""diffusers' names in a resampler -> the authors'."""


def base(
    folder: Path,
    unet: UNet2DConditionModel,
    first: CLIPTextModel,
    second: CLIPTextModelWithProjection,
    vae: AutoencoderKL,
) -> None:
    """Writes the base as a folder of diffusers, in f16."""
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=CLIPTokenizer.from_pretrained(TOKENIZER),
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER.with_name("tokenizer_2")),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**networks.SCHEDULE),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    _published_tokenizers(folder)


def refiner(folder: Path, unet: UNet2DConditionModel, second: CLIPTextModelWithProjection, vae: AutoencoderKL) -> None:
    """Writes the refiner as a folder of diffusers, in f16."""
    pipeline = StableDiffusionXLImg2ImgPipeline(
        vae=vae,
        text_encoder=None,
        text_encoder_2=second,
        tokenizer=None,
        tokenizer_2=CLIPTokenizer.from_pretrained(TOKENIZER.with_name("tokenizer_2")),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**networks.SCHEDULE),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder)
    _published_tokenizers(folder)


def adapters(
    folder: Path, image: CLIPVisionModelWithProjection, unet: UNet2DConditionModel, projections: nn.ModuleDict
) -> None:
    """Writes the image encoder and the adapters, which lie in the processors of `unet`, as their authors do, in f16."""
    image.half().save_pretrained(folder / ENCODER)
    for number, (name, file) in enumerate(FILES.items()):
        tensors = {f"image_proj.{key}": tensor for key, tensor in _resampler(projections[name]).items()}
        tensors.update(_keys_values(unet, number))
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.half().contiguous() for key, tensor in tensors.items()}, path, {"format": "pt"})


def without_adapters(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The UNet alone."""
    bare = networks.unet()
    bare.load_state_dict({name: tensor for name, tensor in unet.state_dict().items() if ".processor." not in name})
    return bare


def _published_tokenizers(folder: Path) -> None:
    """Puts the tokenizers' files as they are published in the place of those that transformers writes."""
    for place in folder.glob("tokenizer*"):
        shutil.rmtree(place)
        shutil.copytree(TOKENIZER.with_name(place.name), place)


def _resampler(net: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in net.state_dict().items():
        if ".attn.to_v." in name:
            continue
        if ".attn.to_k." in name:
            values = net.state_dict()[name.replace("to_k", "to_v")]
            tensors[re.sub(r"attn\.to_k", "0.to_kv", name)] = torch.cat([tensor, values])
            continue
        for diffusers, published in _RENAMED:
            name = re.sub(diffusers, published, name)
        tensors[name] = tensor
    return tensors


def _keys_values(unet: UNet2DConditionModel, number: int) -> dict[str, torch.Tensor]:
    """Of adapter `number`, numbered as its authors do: by processors, of which every second is a cross attention's."""
    tensors = {}
    for index, (name, processor) in enumerate(unet.attn_processors.items()):
        if name.endswith("attn2.processor"):
            tensors[f"ip_adapter.{index}.to_k_ip.weight"] = processor.to_k_ip[number].weight
            tensors[f"ip_adapter.{index}.to_v_ip.weight"] = processor.to_v_ip[number].weight
    return tensors


def pictures(folder: Path) -> None:
    """Draws somebody to keep and a style to take, for the contact sheet; what is on it lies beside."""
    chance = random.Random("pictures")
    folder.mkdir(parents=True, exist_ok=True)
    styles.render(reference(people.person(chance), chance)).save(folder / "face.png", optimize=True)
    styles.render(people.portrait(chance, style="watercolour")).save(folder / "style.png", optimize=True)
    shutil.copy(SHEET, folder)


def lora(path: Path, unet: UNet2DConditionModel) -> None:
    """Writes the LoRA that `unet` carries, as diffusers does, in f16."""
    weights = {name: tensor.half() for name, tensor in get_peft_model_state_dict(unet).items()}
    StableDiffusionXLPipeline.save_lora_weights(path.parent, unet_lora_layers=weights, weight_name=path.name)
