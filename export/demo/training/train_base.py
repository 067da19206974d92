"""The base's stage: UNet, text encoders and both adapters at once; two cores have no time to train them in turn."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import nn

from export.demo import captions
from export.demo.people import STYLES, Portrait
from export.demo.training import networks
from export.demo.training.networks import IMAGE_TOKENS, SIDE
from export.demo.training.stage import Losses, Stage
from export.demo.training.texts import Context, Texts
from export.demo.training.train_clip import OF_PERSON, Looks
from export.demo.training.world import PER_PERSON, World

ADAPTERS = ("style", "face")
_BATCH = 32
_NO_TEXT = 0.1
"""Share of samples without text, for guidance."""
_REFERENCES = 0.1
"""Share of samples that are a person's reference picture."""
_READ = 0.02
"""Weight of what readers lose."""


def lost(made: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """`[n]`, mean squared differences of latents' velocities; the middle, where faces are, counts more."""
    places = torch.full(wanted.shape[-2:], 0.6)
    places[SIDE // 32 : 3 * SIDE // 32, SIDE // 32 : 3 * SIDE // 32] = 2.0
    return (places * (made - wanted).square()).mean((1, 2, 3))


@dataclass(frozen=True)
class Seen:
    """What the frozen encoders made of every picture."""

    latents: torch.Tensor
    """`[pictures, 8, 16, 16]`, scaled."""
    features: torch.Tensor
    """`[pictures, 65, 96]`, the image encoder's last layer but one."""
    factor: float
    """What latents were multiplied with to be of spread 1."""
    nothing: torch.Tensor
    """`[65, 96]`, the same of an image of zeros: what an adapter sees without guidance."""


@dataclass(frozen=True)
class Batch:
    """Pictures to paint, by index, with texts and a picture to look at for each adapter, or none."""

    pictures: list[int]
    texts: list[str]
    seen: dict[str, list[int | None]]
    untold: list[bool]
    """Which are painted without guidance."""


@dataclass(frozen=True)
class Noised:
    """Latents on their way to noise, and the velocity that a UNet should see in them."""

    latents: torch.Tensor
    times: torch.Tensor
    velocity: torch.Tensor

    @classmethod
    def at_random(cls, latents: torch.Tensor, chance: torch.Generator, below: int = 1000) -> Noised:
        """Each at a timestep of its own, less than `below`; the middle ones, where shapes are settled, more often.

        Logit-normal (Esser et al., 2024).
        """
        noises = networks.schedule()
        noise = torch.randn(latents.shape, generator=chance)
        times = (torch.randn(len(latents), generator=chance).sigmoid() * below).long().clamp(max=below - 1)
        return cls(noises.add_noise(latents, noise, times), times, noises.get_velocity(latents, noise, times))

    def lost(self, made: torch.Tensor) -> torch.Tensor:
        """`[n]`, how far off velocities are; see `lost`."""
        return lost(made, self.velocity)


class Pictures:
    """Draws batches."""

    def __init__(self, world: World) -> None:
        self._portraits = [world.portrait(index) for index in range(world.pictures)]
        self._of_style = {
            style: [index for index, shown in enumerate(self._portraits) if shown.style == style] for style in STYLES
        }

    def any(self, chance: random.Random) -> Portrait:
        """One of the portraits."""
        return chance.choice(self._portraits)

    def batch(self, chance: random.Random) -> Batch:
        """Of texts alone, with the face, with the style, or with both."""
        rows = [self._sample(chance) for _ in range(_BATCH)]
        index, text, style, face = (list(column) for column in zip(*rows, strict=True))
        untold = [chance.random() < _NO_TEXT for _ in rows]
        return Batch(index, text, {"style": style, "face": face}, untold)

    def _sample(self, chance: random.Random) -> tuple[int, str, int | None, int | None]:
        index = chance.randrange(len(self._portraits) // PER_PERSON) * PER_PERSON
        index += 0 if chance.random() < _REFERENCES else chance.randint(1, PER_PERSON - 1)
        shown, kind = self._portraits[index], chance.choices(("text", "face", "style", "both"), (9, 4, 3, 4))[0]
        style = face = None
        if kind in ("style", "both"):
            style = chance.choice(self._of_style[shown.style])
        if kind in ("face", "both"):
            first = index - index % PER_PERSON
            others = [other for other in range(first, first + PER_PERSON) if other != index]
            face = first if index != first and chance.random() < 0.7 else chance.choice(others)
        named = style is None or chance.random() < 0.3
        looks = 0.75 if face is None else chance.choice((0.0, 0.3, 0.75))
        return index, captions.caption(shown, chance, style=named, looks=looks), style, face


def with_adapters(unet: UNet2DConditionModel, projections: dict[str, nn.Module]) -> nn.ModuleDict:
    """Puts processors for both adapters at the UNet's cross attentions -> those and the projections."""
    processors = {}
    for name, old in unet.attn_processors.items():
        if name.endswith("attn1.processor"):
            processors[name] = old
            continue
        attention = unet.get_submodule(name.removesuffix(".processor"))
        sizes = {"num_tokens": (IMAGE_TOKENS,) * 2, "scale": [1.0] * 2}
        new = IPAdapterAttnProcessor2_0(attention.to_q.in_features, networks.CONTEXT, **sizes)
        for own, given in ((new.to_k_ip, attention.to_k), (new.to_v_ip, attention.to_v)):
            for layer in own:
                layer.load_state_dict(given.state_dict())
        processors[name] = new
    unet.set_attn_processor(processors)
    return nn.ModuleDict(projections)


def tokens(
    projections: nn.ModuleDict, seen: Seen, given: dict[str, list[int | None]], untold: list[bool]
) -> list[torch.Tensor]:
    """`[n, 1, 16, 64]` of each adapter; zeros, which add nothing, where it has no picture."""
    made = []
    for name in ADAPTERS:
        here = [row for row, index in enumerate(given[name]) if index is not None]
        out = torch.zeros(len(untold), 1, IMAGE_TOKENS, networks.CONTEXT)
        if here:
            features = seen.features[[given[name][row] for row in here]].float()
            blind = torch.tensor([untold[row] for row in here])
            features = torch.where(blind[:, None, None], seen.nothing, features)
            out[here] = projections[name](features)[:, None]
        made.append(out)
    return made


def conditions(pooled: torch.Tensor) -> dict[str, torch.Tensor]:
    """What SDXL is told beside the context."""
    return {"text_embeds": pooled, "time_ids": torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]]).repeat(len(pooled), 1)}


def readers() -> nn.ModuleDict:
    """What reads off an adapter's tokens what it has to keep: looks of the person, or the style."""
    return nn.ModuleDict(
        {
            "face": Looks(networks.CONTEXT, OF_PERSON),
            "style": Looks(networks.CONTEXT, ("style",), measured=False),
        }
    )


def train(stage: Stage, world: World, seen: Seen) -> None:
    """Trains `unet` (with processors of both adapters) and `projections`; `first` and `second` too or frozen.

    With `readers`, projections learn from them too what they have to tell: the UNet alone asks for it late.
    """
    nets, texts, pictures = {**stage.frozen, **stage.nets}, Texts(), Pictures(world)
    context = Context(nets["first"], nets["second"])

    def losses(step: int, chance: torch.Generator) -> Losses:
        spoken = random.Random(f"{stage.name}/{step}")
        batch = pictures.batch(spoken)
        told = 1.0 - torch.tensor(batch.untold, dtype=torch.float)
        with torch.set_grad_enabled("first" in stage.nets):
            hidden, pooled = context(*texts(batch.texts, spoken))
        images = tokens(nets["projections"], seen, batch.seen, batch.untold)
        noised = Noised.at_random(seen.latents[batch.pictures].float(), chance)
        made = nets["unet"](
            noised.latents,
            noised.times,
            (hidden * told[:, None, None], images),
            added_cond_kwargs=conditions(pooled * told[:, None]),
        ).sample
        each, high = noised.lost(made), noised.times >= 500
        parts = {"low": (each * ~high).sum() / _BATCH, "high": (each * high).sum() / _BATCH}
        if "readers" in nets:
            for name, image in zip(ADAPTERS, images, strict=True):
                parts[name] = _READ * _read(nets["readers"][name], image[:, 0], batch, name, world)
        return parts

    stage.run(losses)


def _read(looks: Looks, image: torch.Tensor, batch: Batch, name: str, world: World) -> torch.Tensor:
    """How badly a reader tells off the tokens of one adapter what its pictures show."""
    here = [row for row, index in enumerate(batch.seen[name]) if index is not None and not batch.untold[row]]
    if not here:
        return torch.zeros(())
    return looks.loss(looks(image[here]), [world.portrait(batch.seen[name][row]) for row in here])
