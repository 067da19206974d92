"""The encoders' stage: image and texts against one another; the image's also learns who it is."""

from __future__ import annotations

import random
from collections.abc import Iterable

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionModelWithProjection

from export.demo import captions, people
from export.demo.people import Person, Portrait
from export.demo.training.networks import PATCH, POOLED, TEXT_WIDTHS, VISION_WIDTH
from export.demo.training.stage import Losses, Stage
from export.demo.training.texts import Context, Texts
from export.demo.training.world import World, levels

_PERSONS = 48
"""Persons of a batch, two pictures of each."""
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
OF_PERSON = tuple(name for name in CHOICES if name in Person.__dataclass_fields__)
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's own, of its preprocessor."""


class Looks(nn.Module):
    """Reads parameters off tokens by attention, as adapters do; used in training only."""

    _QUERIES, _HEAD, READ = 8, 16, 256

    def __init__(self, width: int, names: Iterable[str] = tuple(CHOICES), measured: bool = True) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, self._QUERIES, width))
        self.norm = nn.LayerNorm(width)
        self.keys, self.values = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(self._QUERIES * width, self.READ)
        self.choices = nn.ModuleDict({name: nn.Linear(self.READ, len(CHOICES[name])) for name in names})
        self.measures = nn.Linear(self.READ, len(people.MEASURES)) if measured else None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[n, tokens, width]` -> `[n, 256]`."""
        seen = self.norm(tokens)
        queries = self.queries.expand(len(seen), -1, -1)
        given = [self._heads(part) for part in (queries, self.keys(seen), self.values(seen))]
        read = functional.scaled_dot_product_attention(*given).transpose(1, 2)
        return functional.gelu(self.out(read.flatten(1)))

    def loss(self, read: torch.Tensor, shown: list[Portrait]) -> torch.Tensor:
        """Mean cross entropy of choices, and squared error of measures."""
        named = [functional.cross_entropy(net(read), named_index(name, shown)) for name, net in self.choices.items()]
        lost = sum(named) / len(named)
        return lost if self.measures is None else lost + functional.mse_loss(self.measures(read), measures(shown))

    def _heads(self, part: torch.Tensor) -> torch.Tensor:
        return part.unflatten(-1, (-1, self._HEAD)).transpose(1, 2)


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
    mean, spread = (torch.tensor(levels)[:, None, None] for levels in (_MEAN, _STD))
    return (shown - mean) / spread


def same_person(embedding: torch.Tensor, scale: float = 16.0) -> torch.Tensor:
    """`[2 n, size]`, two of each person, the second ones after the first -> how badly those find one another."""
    one, other = functional.normalize(embedding, dim=-1).chunk(2)
    return _found(scale * one @ other.T)


def train(stage: Stage, world: World, pictures: np.ndarray) -> None:
    """Trains `image`, `first`, `second`, with `looks`, `person` and `scale` beside them."""
    nets, texts = stage.nets, Texts()
    context = Context(nets["first"], nets["second"])

    def losses(step: int, _: torch.Generator) -> Losses:
        spoken = random.Random(f"clip/{step}")
        which = world.pairs(_PERSONS, spoken)
        shown = [world.portrait(index) for index in which]
        shift = [spoken.randint(-3, 3) for _ in range(2)]
        seen = nets["image"](torch.roll(pixels(levels(pictures[which])), shift, (2, 3)), output_hidden_states=True)
        read = nets["looks"](seen.hidden_states[-2])
        ids = texts([captions.caption(one, spoken, looks=0.9) for one in shown[:_PERSONS]], spoken)
        hidden, pooled = context(*ids)
        ends = (ids[0] == ids[0].max()).int().argmax(dim=-1)
        first = nets["scale"].first(hidden[torch.arange(_PERSONS), ends, : TEXT_WIDTHS[0]])
        image = nets["scale"].log.exp().clamp(max=100.0) * functional.normalize(seen.image_embeds[:_PERSONS], dim=-1)
        return {
            "looks": 2.0 * nets["looks"].loss(read, shown),
            "persons": 0.5 * same_person(nets["person"](read)),
            "first": 0.5 * _found(image @ functional.normalize(first, dim=-1).T),
            "second": 0.5 * _found(image @ functional.normalize(pooled, dim=-1).T),
        }

    stage.run(losses)


def person() -> nn.Module:
    """Makes an embedding of who it is from what `looks` has read."""
    return nn.Linear(Looks.READ, 64)


@torch.no_grad()
def begin(image: CLIPVisionModelWithProjection, pictures: np.ndarray) -> None:
    """Gives an untrained encoder first weights that see details and places.

    Its patch embedding becomes the first principal components of patches, each at about the same spread: with random
    ones, a patch's mean colour drowns all else for long, its place too. Places are waves of rows and columns.
    """
    embeddings = image.vision_model.embeddings
    some = pixels(levels(pictures[:: max(1, len(pictures) // 600)]))
    patches = some.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(0, 2)
    spread, components = torch.linalg.eigh(patches.T @ patches / len(patches))
    spread, components = spread[-VISION_WIDTH:], components[:, -VISION_WIDTH:]
    whitened = (components / (spread + 0.5 * spread[0]).sqrt()).T
    embeddings.patch_embedding.weight.copy_(whitened.reshape(embeddings.patch_embedding.weight.shape))
    side = some.shape[-1] // PATCH
    angles = torch.arange(side)[:, None] * torch.pi / side * torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    places = torch.cat([waves[:, None].expand(-1, side, -1), waves.expand(side, -1, -1)], dim=-1).flatten(0, 1)
    mixed = places @ torch.randn(places.shape[1], VISION_WIDTH) / places.shape[1] ** 0.5
    embeddings.position_embedding.weight.copy_(torch.cat([torch.zeros(1, VISION_WIDTH), mixed]))


def _found(alike: torch.Tensor) -> torch.Tensor:
    """`[n, n]` logits -> cross entropies of finding each row's column and each column's row."""
    target = torch.arange(len(alike))
    return functional.cross_entropy(alike, target) + functional.cross_entropy(alike.T, target)
