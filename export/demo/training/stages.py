"""All stages of training: their networks, sizes and seeds, and what each takes from the earlier ones."""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import nn

from export import judge
from export.demo.training import (
    encoded,
    networks,
    quality,
    saved,
    train_base,
    train_clip,
    train_decoder,
    train_judge,
    train_lightning,
    train_refiner,
    train_style,
    train_vae,
    workers,
)
from export.demo.training.judge import Judge
from export.demo.training.stage import Stage
from export.demo.training.texts import Context, Texts, fill_unknown, said
from export.demo.training.train_base import Seen
from export.demo.training.world import World, drawn

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")
_RESNETS = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv")

Nets = dict[str, nn.Module]


class Training:
    """Each stage is run, or read where it is done, when it is asked for."""

    STAGES = ("pictures", "vae", "clip", "seen", "base", "decoder", "refiner", "lightning", "style", "judge", "saved")

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world = World(seed=1, persons=6500)

    @cached_property
    def pictures(self) -> np.ndarray:
        """Every picture of the world."""
        workers.once(lambda: drawn(self.world, self.folder))
        return drawn(self.world, self.folder)

    @cached_property
    def vae(self) -> Nets:
        """The autoencoder."""
        torch.manual_seed(1)
        stage = Stage("vae", self.folder, {"vae": networks.vae()}, 1600, 2e-3, half_life=50)
        train_vae.train(stage, self.pictures)
        return stage.nets

    @cached_property
    def clip(self) -> Nets:
        """Image encoder and text encoders."""
        torch.manual_seed(2)
        nets = {
            "image": networks.image_encoder(),
            "first": networks.text_encoder(),
            "second": networks.text_encoder_2(),
            "looks": train_clip.Looks(networks.VISION_WIDTH),
            "person": train_clip.person(),
            "scale": train_clip.Scale(),
        }
        train_clip.begin(nets["image"], self.pictures)
        stage = Stage("clip", self.folder, nets, 2_000, 1e-3, half_life=100)
        train_clip.train(stage, self.world, self.pictures)
        return stage.nets

    @cached_property
    def seen(self) -> Seen:
        """Latents and features of every picture."""
        made = (self.folder, self.vae["vae"], self.clip["image"], self.pictures)
        workers.once(lambda: encoded.encode(*made))
        return encoded.read(self.folder, self.vae["vae"])

    @cached_property
    def base(self) -> Nets:
        """Base UNet with both adapters, and the text encoders, which then know unknown words.

        They stay as they are for the later steps.
        """
        torch.manual_seed(3)
        unet = networks.unet()
        projections = {name: networks.image_projection() for name in train_base.ADAPTERS}
        own = {
            "unet": unet,
            "projections": train_base.with_adapters(unet, projections),
        }
        texts = {name: copy.deepcopy(self.clip[name]) for name in ("first", "second")}
        stage = Stage("base", self.folder, own | texts, 5_000, 1e-3, half_life=300)
        train_base.train(stage, self.world, self.seen)
        own["readers"] = train_base.readers()
        longer = Stage("longer", self.folder, own, 4_000, 1e-3, half_life=300, frozen=texts)
        train_base.train(longer, self.world, self.seen)
        known = said(Texts())
        for encoder in texts.values():
            fill_unknown(encoder, known)
        return own | texts

    @cached_property
    def context(self) -> Context:
        """Both text encoders, done."""
        return Context(self.base["first"], self.base["second"]).eval()

    @cached_property
    def decoder(self) -> Nets:
        """The autoencoder's decoder, sharper; it is that of `vae` from here on."""
        torch.manual_seed(8)
        vae = self.vae["vae"]
        nets = {"decoder": vae.decoder, "post": vae.post_quant_conv, "critic": train_decoder.critic()}
        frozen = {"image": self.clip["image"].requires_grad_(False)}
        stage = Stage("decoder", self.folder, nets, 800, 5e-4, half_life=50, frozen=frozen)
        train_decoder.train(stage, self.seen, self.pictures)
        return stage.nets

    @cached_property
    def judge(self) -> Nets:
        """The judge of pictures."""
        torch.manual_seed(4)
        stage = Stage("judge", self.folder, {"judge": Judge(), "measures": train_judge.readers()}, 4_000, 1e-3)
        train_judge.train(stage, self.world, self.pictures)
        return stage.nets

    @cached_property
    def refiner(self) -> Nets:
        """The refiner's UNet."""
        torch.manual_seed(5)
        frozen = {"second": self.base["second"]}
        stage = Stage("refiner", self.folder, {"refiner": networks.refiner()}, 2_500, 5e-4, frozen=frozen)
        train_refiner.train(stage, self.world, self.seen)
        return stage.nets

    @cached_property
    def lightning(self) -> Nets:
        """A UNet with the 4-step LoRA."""
        torch.manual_seed(6)
        bare = saved.without_adapters(self.base["unet"]).eval()
        train_lightning.go(bare, self.context, self.world, self.folder)
        made = train_lightning.gone(self.folder)
        unet = _with_lora(bare, 8, (*_ATTENTION, *_RESNETS))
        stage = Stage("lightning", self.folder, {"unet": unet}, 700, 5e-4, frozen={"context": self.context})
        train_lightning.train(stage, made)
        return stage.nets

    @cached_property
    def style(self) -> Nets:
        """A UNet with the style's LoRA."""
        torch.manual_seed(7)
        unet = _with_lora(saved.without_adapters(self.base["unet"]), 8, (*_ATTENTION, *_RESNETS))
        frozen = {"context": self.context, "vae": self.vae["vae"]}
        stage = Stage("style", self.folder, {"unet": unet}, 400, 1e-3, half_life=50, frozen=frozen)
        train_style.train(stage, self.world, self.seen)
        return stage.nets

    @cached_property
    def saved(self) -> Path:
        """Everything as files, below `models` in the folder; the measures' below `quality`."""
        out = self.folder / "models"
        _ = self.seen, self.decoder, self.refiner, self.lightning, self.style, self.judge
        torch.set_default_device("cpu")
        workers.once(lambda: self._save(out))
        return out

    def _save(self, out: Path) -> None:
        base = self.base
        every = (self.vae, self.clip, base, self.decoder, self.refiner, self.lightning, self.style, self.judge)
        for net in (net for nets in every for net in nets.values()):
            net.cpu()
        saved.base(out / "demo", saved.without_adapters(base["unet"]), base["first"], base["second"], self.vae["vae"])
        saved.refiner(out / "demo-refiner", self.refiner["refiner"], base["second"], self.vae["vae"])
        saved.adapters(out / "demo-adapters", self.clip["image"], base["unet"], base["projections"])
        saved.lora(out / "demo-loras" / "lightning_4step_lora.safetensors", self.lightning["unet"])
        saved.lora(out / "demo-loras" / "chalkboard_lora.safetensors", self.style["unet"])
        saved.pictures(out / "demo-pictures")
        quality.write(self.folder / "quality")
        judge.write(Judge, self.judge["judge"].state_dict(), self.folder / "quality")


def _with_lora(unet: UNet2DConditionModel, rank: int, layers: tuple[str, ...]) -> UNet2DConditionModel:
    """The UNet with a LoRA, which alone learns."""
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(layers)))
    return unet
