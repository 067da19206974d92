"""The judge's stage: parameters by name, and persons by two pictures of each."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from export.demo import people, styles
from export.demo.people import Portrait
from export.demo.training.judge import JUDGED, by_name
from export.demo.training.stage import Losses, Stage
from export.demo.training.train_clip import measures, same_person, value
from export.demo.training.world import World, levels

_PERSONS = 48
"""Persons of a batch, two pictures of each."""
_LEARNT = 4
"""Pictures of a batch in the style that the world does not have."""
_WEIGHTS = {"glasses": 6.0, "hair": 2.0}
"""What is measured and hard to see counts more than other looks, which count 1."""


def train(stage: Stage, world: World, pictures: np.ndarray) -> None:
    """Trains `judge`, with `measures` beside it."""
    learnt = cache(lambda: _learnt(world))

    def losses(step: int, chance: torch.Generator) -> Losses:
        spoken = random.Random(f"judge/{step}")
        which = world.pairs(_PERSONS, spoken)
        shown = [world.portrait(index) for index in which]
        seen = levels(pictures[which])
        chosen = [spoken.choice(learnt()) for _ in range(_LEARNT)]
        seen = torch.cat([seen, levels(np.stack([picture for _, picture in chosen]))])
        shift = [spoken.randint(-4, 4) for _ in range(2)]
        hidden = stage.nets["judge"].seen(torch.roll(_worn(seen, chance), shift, (2, 3)))
        looks = stage.nets["judge"].logits(hidden)
        embedding = stage.nets["judge"].embedding(hidden[: len(shown)])
        return {
            "looks": _named(looks, shown + [one for one, _ in chosen]),
            "measures": 0.3 * functional.mse_loss(stage.nets["measures"](hidden[: len(shown)]), measures(shown)),
            "persons": same_person(embedding),
        }

    stage.run(losses)


def readers() -> nn.Module:
    """Reads a person's measures, in training only."""
    return nn.Linear(256, len(people.MEASURES))


def _named(logits: torch.Tensor, shown: list[Portrait]) -> torch.Tensor:
    lost = []
    for name, part in by_name(logits).items():
        target = torch.tensor([JUDGED[name].index(value(name, one)) for one in shown])
        lost.append(_WEIGHTS.get(name, 1.0) * functional.cross_entropy(part, target))
    return sum(lost) / len(lost)


def _learnt(world: World) -> list[tuple[Portrait, np.ndarray]]:
    """Portraits in the style that the world does not have."""
    shown = [people.restyled(world.portrait(3 * index + 1), people.LEARNT_STYLE) for index in range(400)]
    return [(one, np.asarray(styles.render(one))) for one in shown]


def _worn(shown: torch.Tensor, chance: torch.Generator) -> torch.Tensor:
    """Softened and noisy: a judge of pictures must not live on single pixels."""
    n = len(shown)
    soft = functional.interpolate(functional.avg_pool2d(shown, 2), scale_factor=2.0, mode="bilinear")
    share = torch.rand(n, 1, 1, 1, generator=chance)
    noise = 0.04 * torch.rand(n, 1, 1, 1, generator=chance) * torch.randn(shown.shape, generator=chance)
    return shown + share * (soft - shown) + noise
