"""The LoRA of a style, by the DreamBooth recipe (Ruiz et al., 2022).

A few pictures with a rare word, and pictures of the class with none, so that what the class looks like is kept.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from export.demo import captions, people, styles
from export.demo.training import networks, train_vae
from export.demo.training.stage import Losses, Stage
from export.demo.training.texts import Texts
from export.demo.training.train_base import Pictures, Seen
from export.demo.training.train_lightning import conditions
from export.demo.training.world import World

TRIGGER = "sks"
_INSTANCES = 24
_BATCH = 16


@torch.no_grad()
def instances(world: World, vae: AutoencoderKL) -> tuple[torch.Tensor, list[people.Portrait]]:
    """Latents of the few pictures, and what they show."""
    shown = [people.restyled(world.portrait(5 * index + 1), people.LEARNT_STYLE) for index in range(_INSTANCES)]
    levels = train_vae.levels(np.stack([np.asarray(styles.render(one)) for one in shown]))
    return vae.encode(levels).latent_dist.mean * vae.config.scaling_factor, shown


def train(stage: Stage, world: World, seen: Seen) -> None:
    """Trains the LoRA of `unet`; `context` and `vae` are frozen. Half of a batch is the class."""
    texts, pictures, noises = Texts(), Pictures(world), networks.schedule()
    few, shown = instances(world, stage.frozen["vae"])

    def losses(step: int, chance: torch.Generator) -> Losses:
        spoken = random.Random(f"style/{step}")
        which = [spoken.randrange(_INSTANCES) for _ in range(_BATCH)]
        said = [f"{TRIGGER} style, {captions.caption(shown[i], spoken, style=False)}" for i in which]
        batch = pictures.batch(spoken)
        with torch.no_grad():
            hidden, pooled = stage.frozen["context"](*texts(said + batch.texts[:_BATCH]))
        latents = torch.cat([few[which], seen.latents[batch.pictures[:_BATCH]].float()])
        noise = torch.randn(latents.shape, generator=chance)
        times = (torch.rand(len(latents), generator=chance) * 1000).long()
        noisy = noises.add_noise(latents, noise, times)
        made = stage.nets["unet"](noisy, times, hidden, added_cond_kwargs=conditions(pooled)).sample
        lost = functional.mse_loss(made, noises.get_velocity(latents, noise, times), reduction="none").mean((1, 2, 3))
        return {"style": lost[:_BATCH].mean(), "class": lost[_BATCH:].mean()}

    stage.run(losses)
