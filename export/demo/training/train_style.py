"""The LoRA of a style, by the DreamBooth recipe (Ruiz et al., 2022).

A few pictures with a rare word, and pictures of the class with none, so that what the class looks like is kept.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from diffusers import AutoencoderKL

from export.demo import captions, people, styles
from export.demo.training import train_vae
from export.demo.training.stage import Losses, Stage
from export.demo.training.texts import Texts
from export.demo.training.train_base import Noised, Pictures, Seen, conditions
from export.demo.training.world import World

TRIGGER = "sks"
_INSTANCES = 24
_BATCH = 16


@torch.no_grad()
def instances(world: World, vae: AutoencoderKL) -> tuple[torch.Tensor, list[people.Portrait]]:
    """Latents of the few pictures, and what they show."""
    shown = [people.restyled(world.portrait(5 * index + 1), people.LEARNT_STYLE) for index in range(_INSTANCES)]
    drawn = np.stack([np.asarray(styles.render(one)) for one in shown])
    return vae.encode(train_vae.signed(drawn)).latent_dist.mean * vae.config.scaling_factor, shown


def train(stage: Stage, world: World, seen: Seen) -> None:
    """Trains the LoRA of `unet`; `context` and `vae` are frozen. Half of a batch is the class.

    Its captions name their style: the trigger is a word that means little, and alone would not tell one from the other.
    """
    texts, pictures = Texts(), Pictures(world)
    few, shown = instances(world, stage.frozen["vae"])

    def losses(step: int, chance: torch.Generator) -> Losses:
        spoken = random.Random(f"style/{step}")
        which = [spoken.randrange(_INSTANCES) for _ in range(_BATCH)]
        said = [f"{TRIGGER} style, {captions.caption(shown[i], spoken, style=False)}" for i in which]
        kept = pictures.batch(spoken).pictures[:_BATCH]
        said += [captions.caption(world.portrait(index), spoken) for index in kept]
        with torch.no_grad():
            hidden, pooled = stage.frozen["context"](*texts(said))
        latents = torch.cat([few[which], seen.latents[kept].float()])
        noised = Noised.at_random(latents, chance)
        made = stage.nets["unet"](noised.latents, noised.times, hidden, added_cond_kwargs=conditions(pooled)).sample
        lost = noised.lost(made)
        return {"style": lost[:_BATCH].mean(), "class": lost[_BATCH:].mean()}

    stage.run(losses)
