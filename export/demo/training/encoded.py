"""What the frozen encoders make of all pictures, kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from transformers import CLIPVisionModelWithProjection

from export.demo.training import train_clip, train_vae
from export.demo.training.train_base import Seen
from export.demo.training.world import levels

_BATCH = 100
_NAME = "encoded.pt"


@torch.no_grad()
def encode(folder: Path, vae: AutoencoderKL, image: CLIPVisionModelWithProjection, pictures: np.ndarray) -> None:
    """Writes latents of spread 1 and features, where they are not there yet."""
    path = folder / _NAME
    if path.is_file():
        return
    latents, features = [], []
    for start in range(0, len(pictures), _BATCH):
        some = pictures[start : start + _BATCH]
        latents.append(vae.encode(train_vae.signed(some)).latent_dist.mean)
        features.append(_seen(image, train_clip.pixels(levels(some))).half())
    whole = torch.cat(latents)
    factor = 1.0 / float(whole.std())
    nothing = _seen(image, torch.zeros(1, 3, *pictures.shape[1:3]))[0]
    torch.save((factor, (whole * factor).half(), torch.cat(features), nothing), path)


def read(folder: Path, vae: AutoencoderKL) -> Seen:
    """What was written; sets the autoencoder's scaling factor."""
    factor, latents, features, nothing = torch.load(folder / _NAME, map_location=torch.get_default_device())
    vae.register_to_config(scaling_factor=factor)
    return Seen(latents, features, factor, nothing)


def _seen(image: CLIPVisionModelWithProjection, pixels: torch.Tensor) -> torch.Tensor:
    """`[n, 65, 96]`, what the adapters take."""
    return image(pixels, output_hidden_states=True).hidden_states[-2]
