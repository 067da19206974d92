"""Distilled models among the cases of parity: variants of a tiny checkpoint, as the catalogue has SDXL-Lightning's.

diffusers runs each as a checkpoint of its own, with the base's text encoders and VAE, a UNet of other weights and a
scheduler of trailing spacing; tronie as a variant of the base's entry that says no more than that.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from export import catalogue, tiny

BASE = "alpha"
SCHEDULERS = {
    "alpha-lightning": {"timestep_spacing": "trailing"},
    "alpha-lightning-x0": {"timestep_spacing": "trailing", "prediction_type": "sample"},
}
"""Variants, and what their schedulers say that the base's does not."""
_SEED = 51


def cases() -> Iterator[tuple[str, str, dict]]:
    """Name, model and fields of every run; without guidance, as these models are made for."""
    off = {"guidance": 0.0}
    for steps in (1, 2, 4, 8):
        for model in SCHEDULERS:
            yield f"{model}-{steps}", model, {"steps": steps, **off}
    yield "alpha-lightning-4-batch-2", "alpha-lightning", {"steps": 4, "batch": 2, **off}
    yield "alpha-lightning-4-guided", "alpha-lightning", {"steps": 4, "guidance": 2.0, "negative": "blurred"}
    refined = {"refiner": "alpha-refiner", "spacing": "trailing", **off}
    for model in SCHEDULERS:
        yield f"{model}-4-refined-0.5", model, {"steps": 4, "refine_at": 0.5, **refined}
        yield f"{model}-8-refined-0.8", model, {"steps": 8, "refine_at": 0.8, **refined}
    prompt = {"adapter": "ip-adapter-plus", "pictures": ["pictures/sailor.png"], "scale": 0.7}
    yield "alpha-lightning-4-image", "alpha-lightning", {"steps": 4, "image_prompts": [prompt], **off}


def write(models: Path) -> None:
    """Writes the variants as checkpoints for diffusers, beside their base and its adapters."""
    for place, (name, scheduler) in enumerate(SCHEDULERS.items()):
        tiny.write_variant(BASE, _SEED + place, scheduler, models / name)
        shutil.copytree(models / f"{BASE}-adapters", models / f"{name}-adapters")


def enter(models: Path) -> None:
    """Enters the variants into the catalogue that has their base."""
    for name, scheduler in SCHEDULERS.items():
        unet = f"{name}/unet/diffusion_pytorch_model.safetensors"
        entry = {"like": BASE, "origin": name, "weights": {"unet": [unet]}, "scheduler": scheduler}
        catalogue.put(models / "models.yaml", name, entry)
