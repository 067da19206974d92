"""The 4-step stage: a LoRA takes in one step the way that the base, guided, takes in five.

Progressive distillation (Salimans and Ho, 2022) in one round, on whole paths; the trailing timesteps of SDXL-Lightning.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from export.demo import captions
from export.demo.training import networks, workers
from export.demo.training.stage import Losses, Stage
from export.demo.training.texts import Context, Texts
from export.demo.training.train_base import Pictures, conditions, lost
from export.demo.training.world import World

STEPS = 4
_SUBSTEPS = 5
GUIDANCE = 4.0
_PATHS = 1280
_BATCH = 32
_NAME = "paths"
Paths = dict[str, torch.Tensor]
"""`states` `[n, 5, 8, 16, 16]`, `first` and `second` `[n, 77]` tokens."""


def grid(steps: int) -> list[int]:
    """Trailing timesteps, as SDXL-Lightning takes them."""
    return [round(1000 - i * 1000 / steps) - 1 for i in range(steps)]


def moved(x: torch.Tensor, velocity: torch.Tensor, now: float, then: float) -> torch.Tensor:
    """A deterministic step (DDIM) between two shares of signal `alpha_bar`."""
    clean = now**0.5 * x - (1.0 - now) ** 0.5 * velocity
    noise = now**0.5 * velocity + (1.0 - now) ** 0.5 * x
    return then**0.5 * clean + (1.0 - then) ** 0.5 * noise


@torch.no_grad()
def go(unet: UNet2DConditionModel, context: Context, world: World, folder: Path) -> None:
    """The guided base's ways from noise to pictures; kept on disk. Every worker goes its share of them."""
    (folder / _NAME).mkdir(exist_ok=True)
    texts, pictures = Texts(), Pictures(world)
    for number in range(workers.rank(), _PATHS // _BATCH, workers.count()):
        path = _kept(folder, number)
        if path.is_file():
            continue
        spoken = random.Random(f"paths/{number}")
        chance = torch.Generator(torch.get_default_device()).manual_seed(number)
        ids = texts([captions.caption(pictures.any(spoken), spoken) for _ in range(_BATCH)])
        half_written = path.with_suffix(".part")
        torch.save({"states": _path(unet, *context(*ids), chance), "first": ids[0], "second": ids[1]}, half_written)
        half_written.replace(path)
        print(f"paths {(number + 1) * _BATCH}/{_PATHS}", flush=True)
    workers.wait()


def gone(folder: Path) -> Paths:
    """All ways."""
    device = torch.get_default_device()
    done = [torch.load(_kept(folder, number), map_location=device) for number in range(_PATHS // _BATCH)]
    return {name: torch.cat([part[name] for part in done]) for name in ("states", "first", "second")}


def _kept(folder: Path, number: int) -> Path:
    return folder / _NAME / f"{number:03}.pt"


def _path(
    unet: UNet2DConditionModel, hidden: torch.Tensor, pooled: torch.Tensor, chance: torch.Generator
) -> torch.Tensor:
    alphas, times = networks.alphas_cumprod(), grid(STEPS * _SUBSTEPS)
    x = (1.0 - alphas[times[0]]) ** 0.5 * torch.randn(
        len(hidden), networks.LATENTS, networks.SIDE // 8, networks.SIDE // 8, generator=chance
    )
    hidden = torch.cat([hidden, torch.zeros_like(hidden)])
    added, states = conditions(torch.cat([pooled, torch.zeros_like(pooled)])), [x]
    for i, time in enumerate(times):
        told, untold = unet(x.repeat(2, 1, 1, 1), time, hidden, added_cond_kwargs=added).sample.chunk(2)
        then = alphas[times[i + 1]] if i + 1 < len(times) else 1.0
        x = moved(x, untold + GUIDANCE * (told - untold), alphas[time], then)
        if (i + 1) % _SUBSTEPS == 0:
            states.append(x)
    return torch.stack(states, dim=1)


def train(stage: Stage, made: Paths) -> None:
    """Trains the LoRA of `unet`; the text encoders in `context` are frozen."""
    alphas, times = networks.alphas_cumprod(), grid(STEPS)
    signal = torch.tensor([*(alphas[time] for time in times), 1.0])

    def losses(_: int, chance: torch.Generator) -> Losses:
        which = torch.randint(len(made["states"]), (_BATCH,), generator=chance)
        steps = torch.randint(STEPS, (_BATCH,), generator=chance)
        with torch.no_grad():
            hidden, pooled = stage.frozen["context"](made["first"][which], made["second"][which])
        x, after = made["states"][which, steps], made["states"][which, steps + 1]
        now, then = (signal[steps + i][:, None, None, None] for i in (0, 1))
        share = ((1.0 - then) / (1.0 - now)).sqrt()
        clean = (after - share * x) / (then.sqrt() - share * now.sqrt())
        velocity = (now.sqrt() * x - clean) / (1.0 - now).sqrt()
        guess = stage.nets["unet"](x, torch.tensor(times)[steps], hidden, added_cond_kwargs=conditions(pooled)).sample
        return {"velocity": lost(guess, velocity).mean()}

    stage.run(losses)
