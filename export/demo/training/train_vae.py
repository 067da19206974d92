"""The autoencoder's stage, on crops of pictures."""

from __future__ import annotations

import random

import numpy as np
import torch
from diffusers import AutoencoderKL

from export.demo.training.stage import Losses, Stage
from export.demo.training.world import levels

_CROP = 64
_BATCH = 16
_KL = 1e-4


def losses(vae: AutoencoderKL, pictures: np.ndarray, step: int, chance: torch.Generator) -> Losses:
    """What is lost between crops and their reconstructions, and the pull to a normal law."""
    crops = _crops(pictures, random.Random(f"vae/{step}"))
    law = vae.encode(crops).latent_dist
    again = vae.decode(law.mean + law.std * torch.randn(law.mean.shape, generator=chance)).sample
    return {"picture": difference(again, crops), "kl": _KL * law.kl().mean() / law.mean[0].numel()}


def difference(again: torch.Tensor, pictures: torch.Tensor) -> torch.Tensor:
    """Mean absolute and squared difference of levels, absolute of changes from pixel to pixel and of green to purple.

    The last is a small part of the colours' spread, and learnt late or never without.
    """
    lost = again - pictures
    edges = lost.diff(dim=-1).abs().mean() + lost.diff(dim=-2).abs().mean()
    green = (lost[:, 1] - (lost[:, 0] + lost[:, 2]) / 2.0).abs().mean()
    return lost.abs().mean() + 2.0 * lost.square().mean() + 0.25 * edges + green


def signed(pictures: np.ndarray) -> torch.Tensor:
    """`[n, height, width, 3]` bytes -> `[n, 3, height, width]`, -1 to 1, as the autoencoder takes them."""
    return 2.0 * levels(pictures) - 1.0


def train(stage: Stage, pictures: np.ndarray) -> None:
    """Trains the whole autoencoder."""
    stage.run(lambda step, chance: losses(stage.nets["vae"], pictures, step, chance))


def _crops(pictures: np.ndarray, chance: random.Random) -> torch.Tensor:
    cut, corners = [], range(pictures.shape[1] - _CROP + 1)
    for _ in range(_BATCH):
        i, y, x = chance.randrange(len(pictures)), chance.choice(corners), chance.choice(corners)
        cut.append(pictures[i, y : y + _CROP, x : x + _CROP])
    return signed(np.stack(cut))
