"""`python -m export.demo.training FOLDER [--until STAGE]`: trains the demo model; run it again and it goes on."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from export.demo.training import encoded, networks, train_base, train_clip, train_vae
from export.demo.training.stage import Stage
from export.demo.training.train_base import Seen
from export.demo.training.world import World, drawn


class Training:
    """All stages; each is run, or read where it is done, when a later one needs it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world = World(seed=1, persons=6500)

    @cached_property
    def pictures(self):  # noqa: ANN201
        """Every picture of the world."""
        return drawn(self.world, self.folder)

    @cached_property
    def vae(self) -> dict[str, nn.Module]:
        """The autoencoder."""
        torch.manual_seed(1)
        stage = Stage("vae", self.folder, {"vae": networks.vae()}, 2400, 2e-3, half_life=100)
        train_vae.train(stage, self.pictures)
        return stage.nets

    @cached_property
    def clip(self) -> dict[str, nn.Module]:
        """Image encoder and text encoders."""
        torch.manual_seed(2)
        nets = {
            "image": networks.image_encoder(),
            "first": networks.text_encoder(),
            "second": networks.text_encoder_2(),
            "looks": train_clip.looks(),
            "scale": train_clip.Scale(),
        }
        stage = Stage("clip", self.folder, nets, 1500, 1.5e-3, half_life=100)
        train_clip.train(stage, self.world, self.pictures)
        return stage.nets

    @cached_property
    def seen(self) -> Seen:
        """Latents and features of every picture."""
        return encoded.encoded(self.folder, self.vae["vae"], self.clip["image"], self.pictures)

    @cached_property
    def base(self) -> dict[str, nn.Module]:
        """Base UNet with both adapters, and the text encoders."""
        torch.manual_seed(3)
        unet = networks.unet()
        projections = {name: networks.image_projection() for name in train_base.ADAPTERS}
        nets = {
            "unet": unet,
            "projections": train_base.with_adapters(unet, projections),
            "first": self.clip["first"],
            "second": self.clip["second"],
        }
        stage = Stage("base", self.folder, nets, 24000, 8e-4, half_life=500)
        train_base.train(stage, self.world, self.seen)
        return stage.nets


STAGES: dict[str, Callable[[Training], object]] = {
    name: (lambda training, name=name: getattr(training, name)) for name in ("pictures", "vae", "clip", "seen", "base")
}


def main() -> None:
    """Runs the stages in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where pictures and the states of training are kept; 4 GB")
    parser.add_argument("--until", choices=[*STAGES], default=[*STAGES][-1], help="last stage to run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    given.folder.mkdir(parents=True, exist_ok=True)
    training = Training(given.folder)
    for name, stage in STAGES.items():
        print(f"stage {name}", flush=True)
        stage(training)
        if name == given.until:
            break


if __name__ == "__main__":
    main()
