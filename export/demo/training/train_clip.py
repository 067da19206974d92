"""The encoders' stage: image and texts against one another; the image's also learns what captions leave out."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from export.demo import captions, people
from export.demo.people import Portrait
from export.demo.training.networks import POOLED, TEXT_WIDTHS, VISION_WIDTH
from export.demo.training.stage import Losses, Stage
from export.demo.training.texts import Context, Texts
from export.demo.training.world import World, levels

_BATCH = 96
CHOICES: dict[str, tuple[str, ...]] = {
    "face": people.FACES,
    "skin": tuple(people.SKINS),
    "hair": people.HAIR_STYLES,
    "hair_colour": tuple(people.HAIR_COLOURS),
    "eyes": tuple(people.EYES),
    "beard": people.BEARDS,
    "nose": people.NOSES,
    "mark": people.MARKS,
    "glasses": people.GLASSES,
    "hat": people.HATS,
    "earrings": people.EARRINGS,
    "tattoo": people.TATTOOS,
    "expression": people.EXPRESSIONS,
    "scene": people.SCENES,
    "style": people.STYLES,
}
"""Parameters with named values, of a person or of a picture."""
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
"""CLIP's own, of its preprocessor."""


class Looks(nn.Module):
    """Reads a portrait's parameters off an embedding; used in training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.choices = nn.ModuleDict({name: nn.Linear(width, len(values)) for name, values in CHOICES.items()})
        self.measures = nn.Linear(width, len(people.MEASURES))

    def loss(self, embedding: torch.Tensor, shown: list[Portrait]) -> torch.Tensor:
        """Mean over parameters: cross entropy of choices, squared error of measures."""
        named = [
            functional.cross_entropy(net(embedding), named_index(name, shown)) for name, net in self.choices.items()
        ]
        return (sum(named) + functional.mse_loss(self.measures(embedding), measures(shown))) / (len(named) + 1)


class Scale(nn.Module):
    """Contrast of the comparison, and what makes the first encoder's text comparable."""

    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(2.5))
        self.first = nn.Linear(TEXT_WIDTHS[0], POOLED)


def value(name: str, shown: Portrait) -> str:
    """What a portrait or its person has for a parameter."""
    return getattr(shown, name) if hasattr(shown, name) else getattr(shown.person, name)


def named_index(name: str, shown: list[Portrait]) -> torch.Tensor:
    """`[n]`, which of its values each has."""
    return torch.tensor([CHOICES[name].index(value(name, one)) for one in shown])


def measures(shown: list[Portrait]) -> torch.Tensor:
    """`[n, measures]` of the persons."""
    return torch.tensor([[getattr(one.person, name) for name in people.MEASURES] for one in shown])


def pixels(shown: torch.Tensor) -> torch.Tensor:
    """What CLIP's preprocessor makes of levels from 0 to 1."""
    return (shown - _MEAN) / _STD


def train(stage: Stage, world: World, pictures: np.ndarray) -> None:
    """Trains `image`, `first`, `second`, with `looks` and `scale` beside them."""
    nets, texts = stage.nets, Texts()
    context = Context(nets["first"], nets["second"])

    def losses(step: int, chance: torch.Generator) -> Losses:
        spoken = random.Random(f"clip/{step}")
        which = torch.randint(world.pictures, (_BATCH,), generator=chance).tolist()
        shown = [world.portrait(index) for index in which]
        ids = texts([captions.caption(one, spoken, looks=0.9) for one in shown], spoken)
        seen = nets["image"](pixels(levels(pictures[which])), output_hidden_states=True)
        hidden, pooled = context(*ids)
        ends = (ids[0] == ids[0].max()).int().argmax(dim=-1)
        first = nets["scale"].first(hidden[torch.arange(len(which)), ends, : TEXT_WIDTHS[0]])
        scale, target = nets["scale"].log.exp().clamp(max=100.0), torch.arange(len(which))
        image = functional.normalize(seen.image_embeds, dim=-1)
        parts = {"looks": 2.0 * nets["looks"].loss(seen.hidden_states[-2].mean(dim=1), shown)}
        for name, text in (("first", first), ("second", pooled)):
            logits = scale * image @ functional.normalize(text, dim=-1).T
            parts[name] = functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)
        return parts

    stage.run(losses)


def looks() -> Looks:
    """The readers of a picture's parameters."""
    return Looks(VISION_WIDTH)
