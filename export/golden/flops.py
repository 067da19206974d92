"""Floating-point operations of the tiny model's UNet and VAE decoder, by torch's own counter."""

import json
from pathlib import Path

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.upsampling import Upsample2D
from torch.utils.flop_counter import FlopCounterMode

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENS = 77
LATENTS = [12, 20]
"""Height and width: different, so that a mistaken axis shows."""


def _unet(folder: Path) -> int:
    # Attention of plain products, which the counter knows on every device.
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.float32)
    unet.set_attn_processor(AttnProcessor())
    config = unet.config
    ids = 6
    pooled = config.projection_class_embeddings_input_dim - ids * config.addition_time_embed_dim
    added = {"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, ids)}
    text = torch.zeros(1, TOKENS, config.cross_attention_dim)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(torch.zeros(1, config.in_channels, *LATENTS), torch.tensor([500.0]), text, added_cond_kwargs=added)
    return counter.get_total_flops()


def _decoder(folder: Path) -> tuple[int, int]:
    vae = diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    vae.set_attn_processor(AttnProcessor())
    counter = FlopCounterMode(display=False)
    upsampling: list[int] = []
    for module in vae.decoder.modules():
        if isinstance(module, Upsample2D):
            module.register_forward_pre_hook(lambda *_: upsampling.append(-counter.get_total_flops()))
            module.register_forward_hook(lambda *_: upsampling.append(counter.get_total_flops()))
    with torch.no_grad(), counter:
        vae.decode(torch.zeros(1, vae.config.latent_channels, *LATENTS))
    return counter.get_total_flops(), sum(upsampling)


def write(out: Path) -> list[Path]:
    """Write ``flops.json``."""
    tiny = REPOSITORY / "tests" / "models" / "tiny"
    decoder, upsampling = _decoder(tiny / "vae")
    document = {
        "made_by": "python -m export.golden flops",
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "tolerance": "none",
        "model": "tiny",
        "width": LATENTS[1] * 8,
        "height": LATENTS[0] * 8,
        "batch": 1,
        # Projections of the text to keys and values included, which the engine has in a graph of its own.
        "unet": _unet(tiny / "unet"),
        "decoder": decoder,
        # The part of it that the engine computes with 4/9 of the operations.
        "decoder_upsampling": upsampling,
    }
    path = out / "flops.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    return [path]
