"""The decoder's stage: it alone, against a critic of patches, as the autoencoders of latent diffusion learn.

Latents stay what they are, so this stage may come after every other. Without the critic, paper, strokes and pixels,
which no latent can place, come out as their mean: a blur (Esser et al., 2021).
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection

from export.demo.training import train_clip, train_vae
from export.demo.training.stage import Losses, Stage
from export.demo.training.train_base import Seen

_BATCH = 5
_NOISE = 0.03
"""Spread of what is added to latents, which are of spread 1: those that a UNet makes are never quite right."""
_CRITIC, _ALIKE = 0.06, 0.5
_WARM = 100
"""Steps of the critic before it is listened to."""


def critic() -> nn.Module:
    """Says of every patch of 22 pixels how real it looks."""
    layers: list[nn.Module] = []
    for before, width, stride in ((3, 32, 2), (32, 64, 2), (64, 64, 1)):
        layers += [nn.Conv2d(before, width, 4, stride, padding=1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(64, 1, 3, padding=1))


def train(stage: Stage, seen: Seen, pictures: np.ndarray) -> None:
    """Trains `decoder`, `post` (the 1x1 convolution before it) and `critic`; `image` is frozen."""
    decoder, post, judge = stage.nets["decoder"], stage.nets["post"], stage.nets["critic"]
    image: CLIPVisionModelWithProjection = stage.frozen["image"]

    def losses(step: int, chance: torch.Generator) -> Losses:
        spoken = random.Random(f"decoder/{step}")
        which = [spoken.randrange(len(pictures)) for _ in range(_BATCH)]
        real = train_vae.signed(pictures[which])
        latents = seen.latents[which].float()
        latents = latents + _NOISE * torch.randn(latents.shape, generator=chance)
        made = decoder(post(latents / seen.factor))
        fixed = {name: weight.detach() for name, weight in judge.named_parameters()}
        doubt = -functional_call(judge, fixed, (made,)).mean()
        told = functional.relu(1.0 - judge(real)).mean() + functional.relu(1.0 + judge(made.detach())).mean()
        return {
            "picture": train_vae.difference(made, real),
            "alike": _ALIKE * functional.l1_loss(_looked(image, made), _looked(image, real)),
            "doubt": (_CRITIC if step >= _WARM else 0.0) * doubt,
            "critic": told,
        }

    stage.run(losses)


def _looked(image: CLIPVisionModelWithProjection, shown: torch.Tensor) -> torch.Tensor:
    """What the image encoder makes of levels from -1 to 1."""
    return image(train_clip.pixels((shown + 1.0) / 2.0), output_hidden_states=True).hidden_states[2]
