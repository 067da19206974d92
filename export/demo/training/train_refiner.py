"""The refiner's stage: latents of the last fifth of the noise levels and a little before."""

from __future__ import annotations

import random

import torch

from export.demo.training.networks import SIDE
from export.demo.training.stage import Losses, Stage
from export.demo.training.texts import Texts
from export.demo.training.train_base import Noised, Pictures, Seen
from export.demo.training.world import World

HIGHEST = 350
"""Timesteps from here on are the base's."""
_GOOD, _BAD = 6.0, 2.5
"""Aesthetic scores: of every picture, and of what has no text; diffusers' defaults."""


def train(stage: Stage, world: World, seen: Seen) -> None:
    """Trains `refiner`; `second` is frozen."""
    texts, pictures = Texts(), Pictures(world)
    second = stage.frozen["second"]

    def losses(step: int, chance: torch.Generator) -> Losses:
        spoken = random.Random(f"refiner/{step}")
        batch = pictures.batch(spoken)
        spoke = ["" if untold else text for text, untold in zip(batch.texts, batch.untold, strict=True)]
        with torch.no_grad():
            told = second(texts(spoke, spoken)[1], output_hidden_states=True)
        latents = seen.latents[batch.pictures].float()
        noised = Noised.at_random(latents, chance, HIGHEST)
        score = torch.tensor([[_BAD if untold else _GOOD] for untold in batch.untold])
        ids = torch.cat([torch.tensor([[SIDE, SIDE, 0, 0]]).repeat(len(latents), 1), score], dim=-1)
        made = stage.nets["refiner"](
            noised.latents,
            noised.times,
            told.hidden_states[-2],
            added_cond_kwargs={"text_embeds": told.text_embeds, "time_ids": ids},
        ).sample
        return {"velocity": noised.lost(made).mean()}

    stage.run(losses)
